"""ε-DPO on transformers.Trainer: backbones here, the loss in epsdpo_kernels, the rest inherited.

The loss runs inside the forward of the model that is wrapped, so that DDP reduces its gradients, FSDP gathers its
parameters and accelerate's autocast covers it. The trainer sees pairs as rows of figures; it knows no vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_utils import IntervalStrategy

from epsdpo_kernels.integrations.batches import PackedBatches
from epsdpo_kernels.integrations.checkpoints import as_metadata, set_later_aside
from epsdpo_kernels.integrations.checks import (
    check_checkpoint,
    check_launch,
    check_metric,
    check_prompt_learning,
    stop_not_finite,
)
from epsdpo_kernels.integrations.packing import part
from epsdpo_kernels.integrations.recording import Recorded, RecordElsewhere
from epsdpo_kernels.integrations.sharding import keep_figures, prepare_reference
from epsdpo_kernels.integrations.transformers import (
    PAIR_METRICS,
    AfterStep,
    Reference,
    load_renamed,
    pair_metrics,
    run_loss_in_forward,
    weighs_pairs_itself,
)
from epsdpo_kernels.linear import EpsilonDPOOutput
from epsdpo_kernels.record import Record

from .data import BLANK

LOSS_STATE = "loss.safetensors"
REFERENCE_STATE = "reference.safetensors"
RUNNING = "beta/running"  # in the log, beside what is logged of pairs


class PairSampler(Sampler[int]):
    """The order of an epoch: by seed and epoch alone, so that every rank and a resumed run agree on it.

    Where ranks would not all get full batches, blanks (the index one past the last pair) fill the end up, or it is
    dropped. Repeating pairs there, as is usual, would count their decisions twice.
    """

    def __init__(self, pairs: int, multiple: int, seed: int | None, drop_last: bool = False):
        self.pairs, self.multiple, self.seed, self.drop_last, self.epoch = pairs, multiple, seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = self.pairs // self.multiple if self.drop_last else -(-self.pairs // self.multiple)
        return batches * self.multiple

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.pairs))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.pairs, generator=generator).tolist()
        yield from order[: len(self)]
        yield from [self.pairs] * (len(self) - self.pairs)


class WithBlank(Dataset):
    """A data set and, one past its end, a blank row."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        return {"row": BLANK} if i == len(self.pairs) else self.pairs[i]


class PairTrainer(Recorded, PackedBatches, Trainer):
    """Trains on pairs with a loss module that owns its β.

    Args:
        model: the policy, a transformers causal language model or a PEFT model of one.
        reference: gives the reference's hidden states and head; see :func:`frozen_reference`.
        loss_fn: an :class:`epsdpo_kernels.EpsilonDPOLoss`, or any module with its call, ``beta`` and ``update_beta``.
        moving_reference: a :class:`train.methods.MovingReference`, or None where the reference stays.
        open_record: makes the :class:`epsdpo_kernels.record.Record` that takes every micro-batch, with the first
            evaluation or when training begins, which is when a checkpoint is loaded: what is refused until then has cut
            nothing. None for no record.
        ref_model: the model that ``reference`` runs, where that is not the policy.
        packed: whether pairs go through the models as packed rows, where these can.
        max_tokens: of a micro-batch; one of more is cut.
        settings: what a run that goes on from a checkpoint has to keep; its checkpoints say so.

    Raises:
        ValueError: ``args.fsdp`` is asked for where accelerate does not shard, or ``args.metric_for_best_model`` is no
            figure of an evaluation.
        NotFiniteError: during training, before the optimizer step, naming step and pairs.
    """

    def __init__(
        self, model, args, *, reference: Reference, loss_fn: Any, moving_reference=None,
        open_record: Callable[[], Record | RecordElsewhere] | None = None,
        ref_model=None, packed: bool = True, max_tokens: int | None = None,
        settings: Mapping[str, Any] | None = None, **kwargs,
    ):  # fmt: skip
        run_loss_in_forward(model, reference, loss_fn)
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                kwargs[name] = WithBlank(kwargs[name])
        super().__init__(model, args, **kwargs)
        check_launch(self)
        keep_figures(self.accelerator)
        check_prompt_learning(model, args)
        check_metric(self, [*PAIR_METRICS, RUNNING])
        if args.fsdp and not self.accelerator.is_fsdp2:
            raise ValueError(
                f"fsdp: accelerate makes {self.accelerator.distributed_type.value} of it here, takes several GPUs and "
                "version 2 (the default of fsdp_config); on CPUs it would replicate the model without a word"
            )
        self.by_batch = getattr(loss_fn, "by_batch", False)
        self.set_layout([model] if ref_model is None else [model, ref_model], packed, max_tokens)
        if ref_model is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.reference_engine = prepare_reference(ref_model, self.accelerator)
        weighs_pairs_itself(self)
        self.loss_fn = loss_fn.to(args.device)
        self.moving_reference = moving_reference
        self.open_record, self.settings = open_record, settings or {}
        self.add_callback(TrainingBegins(self))
        self.add_callback(AfterStep(lambda step: self.loss_fn.update_beta()))
        if moving_reference:
            self.add_callback(AfterStep(moving_reference.after_step))
        self._window: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        boards = [one for one in self.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
        self._board = boards[0] if boards else None
        if self._board and self._board.logging_dir is None:
            # It finds its folder when training begins; what is logged before would open one in the working directory.
            self._board.logging_dir = os.path.join(args.output_dir, default_logdir())
        self._betas: list[Tensor] = []

    def begin_record(self) -> None:
        if self.record is None and self.open_record:
            self.record = self.open_record()

    def evaluate(self, *args, **kwargs):
        self.begin_record()
        return super().evaluate(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        in_order = self.args.train_sampling_strategy == "sequential"
        data: Any = self.train_dataset
        return self.dealt(self._sampler(data, self._train_batch_size, None if in_order else seed), data.pairs)

    def _get_eval_sampler(self, eval_dataset):
        return self._sampler(eval_dataset, self.args.eval_batch_size, None)

    def _sampler(self, dataset: Any, batch_size: int, seed: int | None) -> PairSampler:
        # One rank's last batch may be short, and its loader can drop it by itself.
        multiple = self.data_ranks * batch_size if self.data_ranks > 1 else 1
        return PairSampler(len(dataset), multiple, seed, self.args.dataloader_drop_last)

    def labels_of(self, batch):
        return batch["labels"]

    def blank_of(self, batch):
        pair = part(batch, 0, 1)
        return pair | {"labels": torch.full_like(pair["labels"], -100), "row": torch.full_like(pair["row"], BLANK)}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.lay_out(batches)
        return batches, pairs

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs of an optimizer step, over micro-batches and ranks: ()."""
        pairs = sum(((batch["row"] != BLANK).sum() for batch in batch_samples), torch.tensor(0)).to(device)
        return self.count_once(pairs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, row = inputs["labels"], inputs["row"]
        self.loss_fn.train(model.training)
        beta = self.loss_fn.beta.clone()
        packing = self.packing_of(inputs)
        mask = inputs["attention_mask"] if packing is None else packing
        out = model(input_ids=inputs["input_ids"], attention_mask=mask, pair_labels=labels, row=row)
        split = "train" if model.training else "eval"
        loss = out.loss
        self._add_metrics(split, out, real=row != BLANK)
        if self.record:
            step, epoch = self.state.global_step + model.training, float(self.state.epoch or 0)
            self.record.append(out, step=step, policy_step=self._best_step, row=row, epoch=epoch, beta=beta)
        if model.training:
            # Ranks' gradients are averaged, hence times their number.
            loss = loss * ((row != BLANK).sum() * self.averaged_over / num_items_in_batch)
            self._window.append((row, out.losses))
            if self._board:
                self._betas.append(torch.where((row != BLANK) & self.first_of_row, out.beta, torch.nan))
            if self.accelerator.gradient_state.sync_gradients:
                self._stop_if_not_finite()
        return (loss, out) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return self.loss_of(model, self._prepare_inputs(inputs)), None, None

    def _stop_if_not_finite(self) -> None:
        """On all ranks alike, so that none waits for one that has stopped."""
        rows, losses = (torch.cat(parts) for parts in zip(*self._window, strict=True))
        self._window.clear()
        bad = torch.where(losses.isfinite(), BLANK, rows)
        bad = self.accelerator.gather(self.accelerator.pad_across_processes(bad, pad_index=BLANK))
        if found := sorted(set(bad.tolist()) - {BLANK}):
            stop_not_finite(f"at rows {found} of the data", self)

    def _add_metrics(self, split: str, out: EpsilonDPOOutput, real: Tensor) -> None:
        sums, figures = self._sums[split], pair_metrics(out)
        if split == "eval":
            # transformers weighs ranks' batches alike, however many pairs are in them.
            figures["loss"] = out.losses
        for name, values in figures.items():
            # Sum and count, because a micro-batch may be short or, on one rank, blank.
            part = torch.stack((torch.where(real, values.double(), 0).sum(), real.sum().double()))
            sums[name] = sums[name] + part if name in sums else part

    def log(self, logs, start_time=None):
        split = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        sums, prefix = self._sums[split], "eval_" if split == "eval" else ""
        if sums and ("loss" in logs or "eval_loss" in logs):
            totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
            for name, (total, count) in zip(sums, totals.tolist(), strict=True):
                logs[prefix + name] = total / count
            logs[prefix + RUNNING] = self.loss_fn.beta.item()
            sums.clear()
        if self._board and self._betas and "loss" in logs:
            self._log_betas(self._board)
        super().log(logs, start_time)

    def _log_betas(self, board: TensorBoardCallback) -> None:
        """A histogram in TensorBoard of the β that pairs have used since the last one, over all ranks."""
        own = torch.cat(self._betas)
        self._betas.clear()
        # Ranks' last batches may be of different sizes.
        padded = self.accelerator.pad_across_processes(own, pad_index=torch.nan)
        betas = self.accelerator.gather(padded)
        if board.tb_writer:
            betas = betas[~betas.isnan()].float().cpu()
            board.tb_writer.add_histogram("train/beta/pairs", betas, self.state.global_step)

    def save_own(self, checkpoint: Path) -> None:
        save_file(self.loss_fn.state_dict(), checkpoint / LOSS_STATE, as_metadata(self.settings))
        if self.moving_reference:
            self.moving_reference.save(checkpoint / REFERENCE_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        # The one place that every engine comes by when a run is resumed, its model loaded.
        if checkpoint is None:
            return
        own = [LOSS_STATE, REFERENCE_STATE] if self.moving_reference else [LOSS_STATE]
        check_checkpoint(Path(checkpoint), self, *own)
        super()._load_optimizer_and_scheduler(checkpoint)
        self.load_own(Path(checkpoint))

    def load_own(self, checkpoint: Path) -> None:
        """β, and the reference where it moves: the model at that step goes with them."""
        load_renamed(self, checkpoint)
        state = load_file(checkpoint / LOSS_STATE)
        if state.keys() != self.loss_fn.state_dict().keys():
            raise ValueError(f"resume_from_checkpoint: got {checkpoint} of another method, takes one of the same")
        self.loss_fn.load_state_dict(state)
        if self.moving_reference:
            self.moving_reference.load(checkpoint / REFERENCE_STATE)


class TrainingBegins(TrainerCallback):
    """The checkpoint is loaded: what is past its step, of a run that was given up, goes aside or out of the record."""

    def __init__(self, trainer: PairTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        with args.main_process_first(local=args.save_on_each_node, desc="setting checkpoints aside"):
            if args.should_save:
                set_later_aside(args.output_dir, state.global_step, LOSS_STATE)
        self.trainer.begin_record()


class EvaluateWithStep(TrainerCallback):
    """Evaluates an epoch's last step, where epochs are evaluated, and the run's last one, with the step itself.

    So that its checkpoint, which would come first, holds the evaluation; a resumed run neither misses nor repeats it.
    """

    def on_step_end(self, args, state, control, **kwargs):
        epoch_ends = args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch)
        due = epoch_ends and state.epoch >= args.eval_delay
        control.should_evaluate |= due or state.global_step >= state.max_steps

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate &= not evaluated(state)


def evaluated(state: TrainerState) -> bool:
    """Whether the log has an evaluation after the steps that are done."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
