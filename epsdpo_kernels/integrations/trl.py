"""ε-DPO in TRL: :class:`EpsilonDPOTrainer` in the place of ``trl.DPOTrainer``.

    from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer

A plain ``DPOConfig`` is taken too, with the defaults of ε and of β's update. Data processing, collator, reference
models, adapters and evaluation are TRL's; what differs is what one optimizer step computes, as
:class:`epsdpo_kernels.EpsilonDPOLoss` says it. Every pair of an optimizer step weighs alike, whatever micro-batch and
rank it is in, where TRL averages micro-batches: the two differ where a micro-batch is short.

What it holds on to in TRL and transformers is in seams.py, where a version that lacks any of it is refused. The model's
``forward``, which TRL replaces too, is replaced once more, so that the loss runs inside whatever wraps the model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, send_to_device
from datasets import Dataset
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.peft_utils import find_adapter_config_file
from trl import DPOConfig, DPOTrainer

from ..linear import EpsilonDPOOutput
from ..module import BETA_UPDATES, EpsilonDPOLoss
from .batches import PackedBatches, SeededSampler, check_any, named_sets
from .checkpoints import adapter_settings, as_metadata, check_output, frozen_weights, run_settings
from .checks import (
    check_adapter,
    check_causal,
    check_checkpoint,
    check_deepspeed,
    check_launch,
    check_metric,
    check_options,
    check_prompt_learning,
    check_reference,
    stop_not_finite,
    turn_off_dropout,
)
from .packing import PaddedRight, of_pairs, part
from .recording import IDENTITY, PAIR_ID, RecordedTRL, hash_of
from .seams import check_trl
from .sharding import gathers_itself, keep_figures
from .transformers import (
    PAIR_METRICS,
    AfterStep,
    Reference,
    by_call,
    causal_lm,
    check_head,
    copy_adapter,
    frozen_reference,
    head_inputs,
    load_renamed,
    logit_transforms,
    pair_metrics,
    run_loss_in_forward,
    weighs_pairs_itself,
    without_adapter,
)

check_trl()

LOSS_STATE = "epsilon_dpo.safetensors"
REFERENCE_STATE = "reference.safetensors"
TOKENS = "num_tokens"  # beside β, trained on so far
IGNORE = -100
# A pair's figures by their names in TRL's log. Entropy is a token's there, and nothing is vetoed.
OF_PAIRS = {
    name: name.replace("beta/", "kl/") for name in PAIR_METRICS if name not in ("entropy", "beta/used", "beta/vetoed")
}
CITATION = """\
@article{lee2025kl,
    title         = {{KL Penalty Control via Perturbation for Direct Preference Optimization}},
    author        = {Lee, Sangkyu and Han, Janghoon and Song, Hosung and Choi, Stanley Jungkyu and Lee, Honglak and
                     Yu, Youngjae},
    year          = 2025,
    journal       = {arXiv preprint arXiv:2502.13177},
    eprint        = {2502.13177},
    archivePrefix = {arXiv},
}"""

_OWN_MARGIN = "ε-DPO is defined for DPO's own margin. Leave it out, or use trl.DPOTrainer"
_ROUNDED = "the check would read the rounding of a policy that is cast and of a reference that isn't"
# Of DPOConfig's fields: what ε-DPO takes alone, and why. docs/migrating.md has them all.
REFUSED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, "pairs of a step that is tried again would be counted twice"),
    "bf16_full_eval": (False, _ROUNDED),
    "debug": ([], "its hooks read the forward's tensors as numbers, and whether a pair was vetoed is none"),
    "enable_jit_checkpoint": (False, "its checkpoint can fall between a step's decisions and weights; set save_steps"),
    "f_divergence_type": ("reverse_kl", _OWN_MARGIN),
    "fp16_full_eval": (False, _ROUNDED),
    "label_smoothing_factor": (0.0, "it smooths over a vocabulary; set label_smoothing, over chosen and rejected"),
    "ld_alpha": (None, _OWN_MARGIN),
    "precompute_ref_log_probs": (
        False,
        "a log-prob is not the distribution that the check needs at every token. `python -m train --cache_reference` "
        "keeps the reference's hidden states instead",
    ),
    "use_weighting": (False, _OWN_MARGIN),
}


@dataclass
class EpsilonDPOConfig(DPOConfig):
    """``DPOConfig`` and what ε-DPO adds. ``beta`` is β at the start, ``label_smoothing`` is s in [0, 0.5)."""

    epsilon: float = field(
        default=0.01, metadata={"help": "Size ε of the perturbation that decides each pair's β, in (0, 1); 0 is DPO."}
    )
    beta_update: str = field(
        default="mean-step",
        metadata={
            "help": "How the running β moves once per optimizer step: by the mean step (the authors' code), to the "
            "mean of the pairs' β (the paper's text), or not at all.",
            "choices": list(BETA_UPDATES),
        },
    )
    packed: bool = field(
        default=True,
        metadata={"help": "Run a pair's prompt once and no padding, where the model's layers allow it."},
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens of a micro-batch; one of more is cut. A step keeps its pairs."}
    )
    record: bool = field(
        default=True,
        metadata={"help": "Write every pair's decision, and what it came from, to output_dir/record (epsdpo audit)."},
    )


class EpsilonDPOTrainer(RecordedTRL, PackedBatches, DPOTrainer):
    """``trl.DPOTrainer`` with the loss of ε-DPO, without logits in memory.

    Takes the arguments of ``DPOTrainer``. ``loss_fn`` holds the running β, which checkpoints carry. Beside TRL's
    metrics it logs ``kl/beta`` (the running β), ``kl/relaxed``, ``kl/kept``, ``kl/tightened`` (shares of pairs), and
    ``kl/chosen``, ``kl/rejected`` (exact, nats). ``logits/…`` are left out for a model that caps its logits. Unless
    ``record`` is off it records every pair into ``output_dir/record``, for ``epsdpo audit`` and ``epsdpo report``.

    Raises:
        ValueError, TypeError: what the loss cannot honour, with the reason and what to do instead; a head that cannot
            be fused.
        NotFiniteError: during training, before the optimizer step, where a pair's loss or the gradient is not finite.
    """

    args: DPOConfig
    model: Any
    loss_fn: _Loss
    _beside: frozenset[str] = frozenset()  # names of what the models were measured with beside ids and mask

    _tag_names = ["trl", "dpo", "epsilon-dpo"]
    _name = "ε-DPO"
    _paper = {
        "title": "KL Penalty Control via Perturbation for Direct Preference Optimization",
        "id": "2502.13177",
        "citation": CITATION,
    }

    def __init__(self, model, ref_model=None, args: DPOConfig | None = None, *rest, **kwargs):
        settings = args or DPOConfig
        config = args if isinstance(args, EpsilonDPOConfig) else EpsilonDPOConfig
        loss_fn = _Loss(settings.beta, config.epsilon, config.beta_update, settings.label_smoothing)
        if args is not None:
            _refuse_arguments(args)
            if args.deepspeed_plugin:  # before TRL makes its engines
                check_deepspeed(args.deepspeed_plugin.deepspeed_config)
        _refuse_adapters(model, ref_model)
        given = inspect.signature(DPOTrainer).bind(model, ref_model, args, *rest, **kwargs).arguments
        check_adapter(given.get("peft_config"))
        for name in ("train_dataset", "eval_dataset"):  # before their first rows are read
            for own, one in named_sets(given.get(name), name).items():
                check_any(one, own)
        super().__init__(model, ref_model, args, *rest, **kwargs)
        self.data_collator = PaddedRight(self.data_collator)
        _refuse_launch(self)
        for name, one in (("model", self.model), ("ref_model", self.ref_model)):
            if one is not None:
                check_output(str(self.args.output_dir), **{name: self._plain(one).config._name_or_path})
        keep_figures(self.accelerator)
        check_prompt_learning(self.model, self.args)
        self.loss_fn = loss_fn.to(self.args.device)
        weighs_pairs_itself(self)
        text_config = causal_lm(self.model).config.get_text_config()
        if hasattr(text_config, "output_router_logits"):
            text_config.output_router_logits = self.aux_loss_enabled
            text_config.router_aux_loss_coef = self.router_aux_loss_coef
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        batch = self._first_batch() if self._is_vision_dataset else None
        check_head(self.model, autocast, batch=batch)
        if batch is not None:
            check_causal(self.model, batch, autocast)
        if self.args.disable_dropout:
            turn_off_dropout(self.model, autocast, batch)
        run_loss_in_forward(self.model, self._reference(autocast, batch), self.loss_fn)
        self.add_callback(AfterStep(self._move_beta))
        models = [self.model] if self.ref_model is None else [self.model, self._plain(self.ref_model)]
        self._frozen = frozen_weights(*models)
        self.set_layout(models, config.packed, config.max_tokens_per_batch, images=self._is_vision_dataset)
        if self._is_vision_dataset:
            self.train_dataset = self.numbered(self.train_dataset, "train")
            self.eval_dataset = self.numbered(self.eval_dataset)
        self.keep_identities(LOSS_STATE, {*self.loss_fn.state_dict(), TOKENS})
        self._settings = self._run_settings()
        # Since the last line of the log, by split and figure: (2,) its sum over tokens, and these.
        self._sums: dict[str, Any] = {
            split: defaultdict(lambda: torch.zeros(2).double()) for split in ("train", "eval")
        }
        self._losses: list[float] = []  # of an evaluation's pairs
        check_metric(self, self._metric_names())
        if config.record:
            self.start_recording(self._options())

    def create_accelerator_and_postprocess(self):
        # accelerate would deal a stream's batches out from one rank, which TRL sees to for training data alone.
        batches: Any = self.args.accelerator_config
        if batches.dispatch_batches is None:
            batches.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    def _metric_names(self) -> list[str]:
        """What an evaluation gives beside its loss; a subclass with more says so here.

        Of several sets what is the same for all: of the others the last set's would stand for all.
        """
        if isinstance(self.eval_dataset, dict) and len(self.eval_dataset) > 1:
            return ["kl/beta", "num_tokens"]
        names = [*OF_PAIRS.values(), "kl/beta", "entropy", "mean_token_accuracy", "num_tokens"]
        if logit_transforms(causal_lm(self.model))[1] is None:
            names += ["logits/chosen", "logits/rejected"]
        return names + ["aux_loss"] * self.aux_loss_enabled

    def _options(self) -> dict[str, Any]:
        """What run.json says of the run beside its loss, under the names of ``python -m train``'s options."""
        return {
            "model": self.model.config._name_or_path, "max_length": self.args.max_length,
            "sync_ref_model": self.args.sync_ref_model,
        }  # fmt: skip

    def _run_settings(self) -> dict[str, Any]:
        reference = self.model if self.ref_model is None else self._plain(self.ref_model)
        names = (
            "beta", "label_smoothing", "max_length", "truncation_mode", "disable_dropout", "sync_ref_model",
            "ref_model_mixup_alpha", "ref_model_sync_steps",
        )  # fmt: skip
        return run_settings(
            self.args, {"train_dataset": self.train_dataset}, PAIR_ID, epsilon=self.loss_fn.epsilon,
            beta_update=self.loss_fn.beta_update, model=self.model.config._name_or_path,
            ref_model=reference.config._name_or_path, frozen_weights=self._frozen,
            **{name: getattr(self.args, name) for name in names},
            **adapter_settings(self.model), **adapter_settings(reference, "ref_model.peft_config"),
        )  # fmt: skip

    def _move_beta(self, step: int) -> None:
        self.loss_fn.update_beta()
        self._metrics["train"]["kl/beta"] = [self.loss_fn.beta.item()]

    def _first_batch(self) -> dict[str, Tensor]:
        """The first pair with images as its collator gives it to the models, to measure them with."""
        seen = (row for row in self.train_dataset if row.get("image") or row.get("images"))
        first = next(seen, None) or next(iter(self.train_dataset))
        batch = send_to_device(dict(self.data_collator([first])), causal_lm(self.model).device)
        batch.pop("completion_mask")
        self._beside = frozenset(batch) - {"input_ids", "attention_mask"}
        return batch

    def _reference(self, autocast: torch.dtype | None, batch: dict[str, Tensor] | None) -> Reference:
        if self.ref_model is None:
            if "ref" in self.model.peft_config:
                copy_adapter(self.model)  # TRL's copy leaves embeddings' adapters out
            check_reference(self.model, None, autocast, batch=batch)
            return without_adapter(self.model)
        ref_model = self._plain(self.ref_model)
        inputs = by_call(ref_model) if gathers_itself(ref_model) else head_inputs
        # To one dtype, which the reference has from TRL already and the policy gets when training begins.
        cast = self.is_deepspeed_enabled or (self.is_fsdp_enabled and autocast is not None)
        check_reference(self.model, ref_model, autocast, inputs, batch, cast)
        return frozen_reference(ref_model, inputs)

    def _plain(self, model: Any) -> Any:
        """A model that accelerate has not wrapped or compiled; the policy's compiled forward compiles what it calls."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """As TRL does, and refuses pairs that nothing of could be scored.

        TRL's last step, to drop pairs whose prompt fills max_length, is done here, where rows are still the user's.
        """
        whole = copy.copy(args)
        whole.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, whole, dataset_name)
        in_parallel = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        with args.main_process_first(desc=f"the lengths of the {dataset_name} dataset"):
            return dataset.filter(
                _has_completions, with_indices=True, input_columns=["prompt_ids", "chosen_ids", "rejected_ids"],
                fn_kwargs={
                    "max_length": args.max_length, "mode": args.truncation_mode, "data": dataset_name,
                    "code": hash_of(__file__),
                },
                **in_parallel,
            )  # fmt: skip

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and the number of pairs in them, over all ranks: ()."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # a stream is at its end
            return batches, None
        batches[-1] = self._without_repeats(batches[-1])
        # Of a stream transformers does not know the last step, and would not take it before there are as many batches.
        batches += [self.blank_of(batches[0]) for _ in range(num_batches - len(batches))]
        pairs = torch.stack([_pairs(batch).sum() for batch in batches]).sum()
        self.lay_out(batches)
        pairs = self.count_once(pairs.to(device))
        # Of a step with nothing to score the loss is 0, not 0 · 0/0.
        return batches, pairs.clamp(min=1)

    def _without_repeats(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the pairs that accelerate repeats to fill every rank's last batch: decisions count once."""
        pairs, mine = len(batch["input_ids"]) // 2, self.own_pairs(batch)
        if mine == pairs:
            return batch
        if mine == 0:  # a rank has to take part in the step
            return self.blank_of(batch)
        if self._is_vision_dataset:
            scored = torch.arange(pairs, device=batch["input_ids"].device).repeat(2) < mine
            return batch | {"completion_mask": batch["completion_mask"] * scored[:, None]}
        return part(batch, 0, mine)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, (RandomSampler, LengthGroupedSampler)):
            return sampler
        by_epoch = SeededSampler(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return self.dealt(by_epoch, sampler.data_source) if isinstance(sampler, RandomSampler) else by_epoch

    def labels_of(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def blank_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pair = batch if self._is_vision_dataset else part(batch, 0, 1)  # images are no rows that could be cut
        return pair | {"completion_mask": torch.zeros_like(pair["completion_mask"])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        beside = self._images_of(inputs)
        if unknown := sorted(set(beside) - self._beside):
            taken = ", ".join(["input_ids", "attention_mask", "completion_mask", *sorted(self._beside)])
            raise ValueError(
                f"data_collator: got a batch with {unknown}, takes {taken}: with nothing else were the models "
                "measured when the trainer was made"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels, packing = self.labels_of(inputs), self.packing_of(inputs)
        training = self.model.training
        self.loss_fn.train(training)
        rows, pairs = inputs, None
        if self._is_vision_dataset:
            rows, labels, pairs = self._scored_alone(inputs, labels)
        try:
            out = model(
                input_ids=ids, attention_mask=mask if packing is None else packing, pair_labels=labels, pairs=pairs,
                **beside,
            )  # fmt: skip
        except ValueError as error:
            if "features and image tokens do not match" not in str(error) or self.args.max_length is None:
                raise
            raise ValueError(
                f"max_length: got {self.args.max_length}, which cuts an image's tokens off ({error}). Take more or None"
            ) from error
        loss = out.loss
        self.append_to_record(out, rows)
        self._add_metrics("train" if training else "eval", out, labels, rows)
        if training and num_items_in_batch is not None:
            # Ranks' gradients are averaged, hence times their number.
            loss = loss * (_pairs(rows).sum() * self.averaged_over / num_items_in_batch)
        if not training:
            self._metrics["eval"]["kl/beta"] = [self.loss_fn.beta.item()]
        return (loss, self._outputs(model, inputs)) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.loss_of(model, self._without_repeats(inputs))
        if prediction_loss_only:
            return loss, None, None
        with self.compute_loss_context_manager():
            return loss, self._outputs(model, inputs).logits, inputs["input_ids"]

    @torch.no_grad()
    def _outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model itself makes of a batch, with logits, as TRL hands it on."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **self._images_of(batch))

    def _images_of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What a batch has beside tokens and which pairs they are."""
        known = {"input_ids", "attention_mask", "completion_mask", "packing", *IDENTITY}
        return {name: value for name, value in batch.items() if name not in known}

    def _scored_alone(self, batch: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Of a batch with images, rows and labels of those of its pairs that have anything to score, and which.

        max_length may leave a pair without, which nobody knows before its images are read.
        """
        pairs = _pairs(batch).nonzero().flatten()
        if not len(pairs):  # a rank has to take part in the step
            pairs, labels = torch.arange(len(labels) // 2, device=labels.device), torch.full_like(labels, IGNORE)
        rows = ("input_ids", "attention_mask", "completion_mask", *IDENTITY)
        return {name: of_pairs(batch[name], pairs) for name in rows if name in batch}, of_pairs(labels, pairs), pairs

    def _add_metrics(self, split: str, out: EpsilonDPOOutput, labels: Tensor, batch: dict[str, Tensor]) -> None:
        """Hands the log the figures of the pairs of every rank, so that its means are theirs."""
        chosen, rejected = (labels != IGNORE).sum(1).chunk(2)
        of_pair = {OF_PAIRS[name]: values for name, values in pair_metrics(out).items() if name in OF_PAIRS}
        of_pair["losses"] = out.losses
        if self.aux_loss_enabled:  # a micro-batch's, which weighs in the loss as many pairs as it has
            router_loss = (out.loss - out.losses.mean()).detach()
            of_pair["aux_loss"] = (router_loss / self.router_aux_loss_coef).expand_as(out.losses)
            of_pair["losses"] = out.losses + router_loss
        # Where TRL averages over tokens: sums over a pair's.
        sums = {
            "entropy": (out.chosen_entropy * chosen + out.rejected_entropy * rejected, chosen + rejected),
            "mean_token_accuracy": (out.chosen_token_accuracy * chosen, chosen),
        }
        if self.loss_fn.logits is not None:
            sums["logits/chosen"], sums["logits/rejected"] = zip(
                self.loss_fn.logits.chunk(2), (chosen, rejected), strict=True
            )
        tokens = batch["attention_mask"].sum(1).view(2, -1).sum(0)
        columns = [*of_pair.values(), *(t for pair in sums.values() for t in pair), tokens]
        # Ranks may hold unequal numbers of pairs; β is 0 in padding and where nothing is scored.
        rows = torch.stack([out.beta, *columns], 1).double()
        rows = self.accelerator.gather(self.accelerator.pad_across_processes(rows))
        scored = rows[:, 0] != 0
        beta, *figures = rows[scored].T.tolist()
        if not beta:
            return
        metrics = self._metrics[split]
        for name, values in zip(of_pair, figures, strict=False):
            if name != "losses":
                metrics[name].extend(values)
            elif split == "eval":
                self._losses += values
            else:
                if not all(map(math.isfinite, values)):
                    bad = ~rows[:, 1 + list(of_pair).index("losses")].isfinite() & scored
                    stop_not_finite(self.named(batch, bad), self)
        for i, name in enumerate(sums):
            first = len(of_pair) + 2 * i
            self._sums[split][name] += torch.tensor(figures[first : first + 2], dtype=torch.float64).sum(1)
        if split == "train":
            self._total_train_tokens += int(sum(figures[-1])) // self.row_ranks
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs, start_time=None):
        split = "train" if self.model.training else "eval"
        for name, (total, tokens) in self._sums[split].items():
            self._metrics[split][name] = [(total / tokens).item()]
        self._sums[split].clear()
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval"):  # fmt: skip
        for figures in (self._losses, self._metrics["eval"], self._sums["eval"]):
            figures.clear()  # of a prediction before, which nobody logs
        out = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._losses:  # transformers counts the repeats that fill a last batch up
            out.metrics[f"{metric_key_prefix}_loss"] = math.fsum(self._losses) / len(self._losses)
        return out

    def save_own(self, checkpoint: Path) -> None:
        state = self.loss_fn.state_dict() | {TOKENS: torch.tensor(self._total_train_tokens)}
        save_file(state, checkpoint / LOSS_STATE, as_metadata(self._settings))
        if self.args.sync_ref_model:
            save_model(self._plain(self.ref_model), str(checkpoint / REFERENCE_STATE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        # The one place that every engine comes by when a run is resumed, its model loaded.
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / LOSS_STATE).exists():
            raise ValueError(
                f"resume_from_checkpoint: got {folder} without {LOSS_STATE}, takes a checkpoint of EpsilonDPOTrainer: "
                "the running β would be lost. To start ε-DPO from another trainer's model, give it as model"
            )
        check_checkpoint(folder, self)
        super()._load_optimizer_and_scheduler(checkpoint)
        self.load_own(folder)
        self._total_train_tokens = int(load_file(folder / LOSS_STATE)[TOKENS])

    def load_own(self, checkpoint: Path) -> None:
        """β, and the reference where it moves: as they were with the checkpoint's model."""
        load_renamed(self, checkpoint)
        state = load_file(checkpoint / LOSS_STATE)
        del state[TOKENS]  # trained on in all, also beyond the best checkpoint
        self.loss_fn.load_state_dict(state)
        if self.args.sync_ref_model:
            load_model(self._plain(self.ref_model), str(checkpoint / REFERENCE_STATE))


class _Loss(EpsilonDPOLoss):
    """The loss, and what TRL logs of the logits themselves, of which ε-DPO has no need."""

    logits: Tensor | None  # (2B,) sums over a completion's tokens of the mean logit; None where logits are capped

    @torch.no_grad()
    def _read_logits(self, hidden, weight, labels, bias, logit_scale, softcap, bounds, words, group) -> None:
        self.logits = None
        if softcap is None:
            # The mean over the vocabulary of x·Wᵀ + b is x·mean(W) + mean(b).
            sums = [weight.sum(0, dtype=torch.float32), weight.new_full((1,), len(weight), dtype=torch.float32)]
            if bias is not None:
                sums.append(bias.sum(0, keepdim=True, dtype=torch.float32))
            means = torch.cat(sums)
            if words is not None:  # of which each rank of this group has a slice
                torch.distributed.all_reduce(means, group=words)
            mean, count, *of_bias = means.split([weight.shape[1], *[1] * (len(sums) - 1)])
            with torch.autocast(hidden.device.type, enabled=False):
                means = hidden.float() @ (mean / count)
            means = logit_scale * (means + sum(of_bias) / count)
            if bounds is None:
                self.logits = torch.where(labels == IGNORE, 0, means).sum(1)
            else:
                self.logits = torch.segment_reduce(means, "sum", offsets=bounds)
            if group is not None:
                torch.distributed.all_reduce(self.logits, group=group)

    def forward(self, hidden, weight, labels, ref_hidden, ref_weight, **kwargs) -> EpsilonDPOOutput:
        names = ("bias", "logit_scale", "softcap", "cu_seqlens", "vocab_group", "sequence_group")
        self._read_logits(hidden, weight, labels, *(kwargs[name] for name in names))
        return super().forward(hidden, weight, labels, ref_hidden, ref_weight, **kwargs)


def _pairs(batch: dict[str, Tensor]) -> Tensor:
    """(B,) whether a pair of a batch has anything to score; nothing predicts a row's first token."""
    return batch["completion_mask"][:, 1:].any(1).view(2, -1).all(0)


def _has_completions(
    prompt: list[int], chosen: list[int], rejected: list[int], row: int, max_length: int | None, mode: str, data: str,
    code: str,
) -> bool:  # fmt: skip
    """Whether max_length leaves a pair its completions, which has to have some."""
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        kept = length = len(prompt) + len(completion)
        if max_length is not None:
            kept = min(length, max_length)
        in_front = min(len(prompt), kept) if mode == "keep_start" else max(0, kept - len(completion))
        if kept > max(in_front, 1):  # nothing predicts the first token
            continue
        if completion and prompt and mode == "keep_start":
            return False
        raise ValueError(
            f"{data} dataset, row {row}: its {side} completion has {len(completion)} tokens after a prompt of "
            f"{len(prompt)}, none of which can be scored. Drop the row, or give the completion a text"
        )
    return True


def _refuse_arguments(args: DPOConfig) -> None:
    """Raises ValueError where a setting asks for what ε-DPO's loss is not, or for what would be done wrong."""
    check_options(args)
    for name, (taken, why) in REFUSED.items():
        if (value := getattr(args, name)) != taken:
            raise ValueError(f"{name}: got {value!r}, takes {taken!r}: {why}")
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("activation_offloading: got True on a CPU, takes False: there is no memory to offload to")
    if args.loss_type != ["sigmoid"] or args.loss_weights not in (None, [1.0]):
        raise ValueError(
            f"loss_type: got {args.loss_type} with loss_weights {args.loss_weights}, takes ['sigmoid'], whose β ε-DPO "
            "sets for each pair. For label smoothing set label_smoothing; for other losses use trl.DPOTrainer"
        )


def _refuse_adapters(model: Any, ref_model: Any) -> None:
    """Raises ValueError where a model's adapter would not have its copy as the reference."""
    by_name = isinstance(model, str) and find_adapter_config_file(model)
    if by_name or (ref_model is None and getattr(model, "_hf_peft_config_loaded", False)):
        raise ValueError(
            "model: got an adapter that transformers loads into the layers of its base, which would be the reference "
            "without it. Load it with peft.AutoPeftModelForCausalLM.from_pretrained(…, is_trainable=True): its copy is "
            "then the reference"
        )
    if ref_model is not None or isinstance(model, str) or not is_peft_model(model):
        return
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"model: got the active adapters {model.active_adapters}, takes 'default' alone, of which TRL makes the "
            "reference. Merge the others into the weights, load it as 'default', or give ref_model, a model of its own"
        )
    if "ref" in model.peft_config:
        raise ValueError(
            "model: got an adapter named 'ref', takes none: the copy that is the reference has that name. Is it an "
            "earlier trainer's? model.delete_adapter('ref')"
        )


def _refuse_launch(trainer: EpsilonDPOTrainer) -> None:
    check_launch(trainer)
    batches: Any = trainer.args.accelerator_config
    split, dispatch, even = batches.split_batches, batches.dispatch_batches, batches.even_batches
    if trainer.accelerator.num_processes > 1 and (split or dispatch or not even):
        raise ValueError(
            f"accelerator_config: got split_batches={split}, dispatch_batches={dispatch} and even_batches={even} in "
            "several processes, takes False, False and True: a batch is all chosen completions, then all rejected "
            "ones, and cannot be dealt out; all ranks take part in every step; and per_device_train_batch_size is what "
            "each of them has"
        )
    if trainer.accelerator.num_processes > 1 and trainer.args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy: got 'batch_rebalance' in several processes, takes 'random', whose pairs are "
            "dealt by tokens too where rows are packed: batches would be of different sizes, by which repeats are told"
        )
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    parallelism = trainer.accelerator.parallelism_config
    tensor = parallelism is not None and parallelism.tp_size > 1
    if trainer.args.sync_ref_model and (trainer.is_fsdp_enabled or zero3 or tensor):
        raise ValueError(
            "sync_ref_model: got True with FSDP, ZeRO-3 or tensor parallelism, takes False: a sharded reference would "
            "not be in the checkpoints. Use DDP, or keep the reference fixed"
        )
