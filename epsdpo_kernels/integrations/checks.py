"""What both trainers see to before a run: a forward without chance, a reference that stays, a whole checkpoint; and
before every step: a gradient that is finite."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import local, vocab_group, whole_shape
from .transformers import (
    HeadInputs,
    as_reference,
    causal_lm,
    check_head,
    evaluating,
    few_tokens,
    head_inputs,
    lm_head,
    perturbed,
    virtual_tokens,
)

# Names of what a forward does at random in training: dropout of values, layers and paths, noise on a router's inputs.
RANDOM = re.compile("drop|jitter")
_NO_ENCODER = "PEFT saves the virtual tokens that its encoder puts out, and not the encoder"
_NOT_LOADED = "transformers saves whole weights, without the optimizer, and does not load them into split layers"
# Initialisations of LoRA that take what the adapter begins with out of the base, which alone is another model then.
FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def turn_off_dropout(
    model: nn.Module, autocast: torch.dtype | None = None, batch: dict[str, Any] | None = None
) -> None:
    """Makes the forward in training the forward in evaluation: the check of a pair would read the noise of any other.

    Sets to 0 the dropout of all layers, adapters' included, and of functions that take it from an attribute; in the
    configuration only where a forward reads it from there. Measured where an adapter does something.

    Args:
        model: a causal language model, within PEFT or not.
        autocast: dtype that training computes in, where that is not the weights'.
        batch: what to run it on in place of a few tokens, as :func:`check_head` takes it.

    Raises:
        ValueError: its forward stays random, or becomes another one, so that policy and reference would differ.
    """
    inner = causal_lm(model)
    measured = inner.device.type != "meta"  # FSDP's memory-saving loading: only the first rank holds weights
    with perturbed(model) if measured else contextlib.nullcontext():
        before = _hidden(model, False, autocast, batch) if measured else None

        def quiet() -> bool:
            return all(_close(_hidden(model, training, autocast, batch), before) for training in (False, True, True))

        for module in model.modules():
            if isinstance(getattr(module, "p", None), float) and RANDOM.search(type(module).__name__.lower()):
                module.p = 0.0  # type: ignore[assignment]
            _zero(module)
        if not measured or not quiet():
            _zero(inner.config)
            _zero(inner.config.get_text_config())
        still = not measured or quiet()
    if not still:
        raise ValueError(
            f"model: the forward of {type(inner).__name__} in training is not that of evaluation, also with all "
            "dropout at 0, and the check of a pair would read the difference. With dropout=True (TRL: "
            "disable_dropout=False) it is taken as it is"
        )


def check_causal(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None = None) -> None:
    """Checks that a token's hidden state does not know of the tokens after it, which it has to predict.

    What a batch has beside its ids may say otherwise: of PaliGemma's prompts all tokens see each other.

    Args:
        model: a causal language model, within PEFT or not.
        batch: input_ids, attention_mask, 0 to the right of tokens, and what else its backbone takes.
        autocast: dtype that training computes in, where that is not the weights'.

    Raises:
        ValueError: the last token of a row is seen from before it.
    """
    inner = causal_lm(model)
    if inner.device.type == "meta":
        return
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].bool()
    last = mask.sum(1, keepdim=True) - 1
    one, other = few_tokens(model)["input_ids"][0, :2]
    before = _hidden(model, False, autocast, batch)
    changed = ids.scatter(1, last, torch.where(ids.gather(1, last) == one, other, one))
    after = _hidden(model, False, autocast, batch | {"input_ids": changed})
    earlier = (torch.arange(mask.shape[1], device=mask.device) < last)[mask]
    difference, eps = (after - before)[earlier].norm(dim=-1), torch.finfo(autocast or inner.dtype).eps
    if not (difference <= 8 * eps * before[earlier].norm(dim=-1)).all():
        raise ValueError(
            f"model: in the collator's batches a token of {type(inner).__name__} sees those after it, which it has to "
            "predict. Its attention is not causal in an answer, which token_type_ids may say"
        )


def _zero(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if RANDOM.search(name) and _is_number(value):
            setattr(owner, name, type(value)(0))
        elif RANDOM.search(name) and isinstance(value, dict):  # PEFT's, by adapter
            value.update({key: type(one)(0) for key, one in value.items() if _is_number(one)})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@torch.no_grad()
def _hidden(model: nn.Module, training: bool, autocast: torch.dtype | None, batch: dict[str, Any] | None) -> Tensor:
    """(tokens, H) fp32 last hidden states of a few tokens. The random generators stay where they were."""
    inner = causal_lm(model)
    batch = batch or few_tokens(model, 32)
    devices = [inner.device] if inner.device.type == "cuda" else []
    with evaluating(model, autocast), torch.random.fork_rng(devices):
        model.train(training)
        return head_inputs(model, **batch).hidden[batch["attention_mask"].bool()].float()


def _close(found: Tensor, expected: Tensor | None) -> bool:
    """To rounding: training may take another kernel."""
    assert expected is not None
    return bool((found - expected).norm() <= 1e-2 * expected.norm())


def check_reference(
    policy: nn.Module,
    reference: nn.Module | None,
    autocast: torch.dtype | None = None,
    inputs: Callable[..., HeadInputs] = head_inputs,
    batch: dict[str, Any] | None = None,
    cast: bool = False,
) -> None:
    """Checks the reference as :func:`check_head` does a policy, and that training leaves it as it is.

    Args:
        policy: the model that trains, within PEFT or not.
        reference: a second model, or None where the policy without its adapter is the reference.
        autocast: dtype that training computes in, where that is not the weights'.
        inputs: what gives the second model's hidden states and head where :func:`head_inputs` itself does not.
        batch: what to run them on in place of a few tokens, as :func:`check_head` takes it.
        cast: whether an engine casts both models before they run, so that their own dtypes say nothing.

    Raises:
        TypeError, ValueError: its head cannot be fused, its vocabulary or dtype is another, it shares weights that
            train, or it is not what training starts from; or nothing of the policy trains.
    """
    if not any(p.requires_grad and math.prod(whole_shape(p)) for p in policy.parameters()):
        raise ValueError(
            f"model: got {type(policy).__name__} of which nothing trains, takes weights with requires_grad, none "
            "of size 0. An adapter trains that was loaded with peft.AutoPeftModelForCausalLM.from_pretrained(…, "
            "is_trainable=True)"
        )
    if reference is None:
        _check_initialisation(policy)
        with as_reference(policy):
            check_head(policy, autocast, argument="ref_model", batch=batch)
        shared = _trained_in_reference(policy, autocast, batch)
    else:
        check_head(reference, autocast, argument="ref_model", inputs=inputs, batch=batch)
        check_vocabulary(policy, whole_shape(lm_head(causal_lm(reference), "ref_model").weight)[0])
        if not cast:
            check_dtypes(policy, reference)
        split, other = (vocab_group(lm_head(causal_lm(model))) is not None for model in (policy, reference))
        if split != other:
            raise ValueError(
                "ref_model: got a model that tensor parallelism has split beside one that is whole, takes both loaded "
                "alike (TRL: model by name, with distributed_config in model_init_kwargs): they round otherwise, which "
                "the check would read"
            )
        trained = {_storage(p) for p in policy.parameters() if p.requires_grad} - {0}
        shared = [name for name, p in reference.named_parameters() if _storage(p) in trained]
    if shared:
        names = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
        raise ValueError(
            f"ref_model: training would move the reference, which shares {names} with the policy. Train adapters alone "
            "(bias='none', no other weight with requires_grad), or give as ref_model a model of its own"
        )


def check_dtypes(policy: nn.Module, reference: nn.Module) -> None:
    """Raises ValueError where a reference has weights of the policy's names in another dtype, which round otherwise.

    Also under autocast, which leaves norms and the sums between layers in the weights' dtype. What PEFT has beside the
    base's weights may be what it is.
    """
    own, theirs = _dtypes(policy), _dtypes(reference)
    other = [name for name in own if theirs.get(name, own[name]) != own[name]]
    if other:
        name, more = other[0], f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(
            f"ref_model: got {theirs[name]} for {name}{more}, takes the policy's dtype, {own[name]}: the check would "
            "read how they round, also under bf16=True, where norms and sums keep the weights' dtype. Load both alike "
            "(dtype=…), or cast the reference to the policy's"
        )


def _dtypes(model: nn.Module) -> dict[str, str]:
    """Of a model's weights by their names in the plain model, whatever PEFT has made of these; and of its head."""
    inner, found = causal_lm(model), {}
    for name, p in inner.named_parameters():
        found[name.replace("base_layer.", "").replace("original_module.", "")] = p.dtype
    found["its head"] = lm_head(inner).weight.dtype
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}


def _check_initialisation(model: Any) -> None:
    for name, config in model.peft_config.items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(FROM_BASE):
            raise ValueError(
                f"peft_config: got init_lora_weights={init!r} (adapter {name}), which changes the base: without the "
                "adapter it is not the model that training starts from. Give ref_model, a model of its own"
            )


def check_vocabulary(policy: nn.Module, size: int) -> None:
    """Raises ValueError where a reference's vocabulary is not of the policy's size."""
    own = whole_shape(lm_head(causal_lm(policy)).weight)[0]
    if size != own:
        raise ValueError(f"ref_model: got a vocabulary of {size}, takes the policy's, {own}")


def _storage(parameter: Tensor) -> int:
    """Where it is in memory; 0 on "meta", where it is nowhere."""
    return local(parameter).untyped_storage().data_ptr()


def _trained_in_reference(model: Any, autocast: torch.dtype | None, batch: dict[str, Any] | None) -> list[str]:
    """Names of the weights that train and have a part in the hidden states or the head of a model's own reference."""
    inner = causal_lm(model)
    if inner.device.type == "meta":
        return []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with evaluating(model, autocast), as_reference(model), torch.enable_grad():
        head = head_inputs(model, **(batch or few_tokens(model)))
        parts = [t.float().square().sum() for t in (head.hidden, head.weight, head.bias) if t is not None]
        total = torch.stack(parts).sum()
        # Of an adapter that is switched off PEFT asks no gradient.
        asked = {name: p for name, p in trained.items() if p.requires_grad}
        if not asked or not total.requires_grad:
            return []
        gradients = torch.autograd.grad(total, list(asked.values()), allow_unused=True)
    return [name for name, gradient in zip(asked, gradients, strict=True) if gradient is not None]


def check_adapter(config: Any) -> None:
    """Raises ValueError where PEFT would make an adapter of nothing, or no causal language model with virtual tokens.

    Args:
        config: a ``peft.PeftConfig``, or None.
    """
    for name in ("num_virtual_tokens", "adapter_len"):
        count = getattr(config, name, 1)
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"peft_config: got {name}={count!r} of {type(config).__name__}, takes a positive number: with no token "
                "nothing would train"
            )
    if getattr(config, "peft_type", None) in ("VERA", "PVERA") and config.r < 1:  # PEFT divides by it first
        raise ValueError(f"peft_config: got r={config.r} of {type(config).__name__}, takes a positive number")
    task = getattr(config, "task_type", None)
    if getattr(config, "is_prompt_learning", False) and task != "CAUSAL_LM":
        got = getattr(task, "value", task)
        raise ValueError(f"peft_config: got task_type={got!r} of {type(config).__name__}, takes 'CAUSAL_LM'")


def check_prompt_learning(model: Any, args: Any) -> None:
    """Raises ValueError where an option would train another model than PEFT's prompt learning makes.

    Args:
        model: a causal language model, within PEFT or not.
        args: ``transformers.TrainingArguments``.
    """
    if not virtual_tokens(model):
        return
    config = model.active_peft_config
    if args.gradient_checkpointing and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"gradient_checkpointing: got True with {type(config).__name__}, takes False: transformers drops the keys "
            "and values of a prefix from layers that it runs again, and the prefix would have no part in the model"
        )
    if args.load_best_model_at_end and _has_encoder(model):
        raise ValueError(f"load_best_model_at_end: got True with {type(config).__name__}, takes False: {_NO_ENCODER}")


def _has_encoder(model: Any) -> bool:
    """Whether virtual tokens come out of more than a table of them."""
    encoder = model.prompt_encoder[model.active_adapter]
    return [name for name, _ in encoder.named_parameters()] != ["embedding.weight"]


# Numbers of transformers' and TRL's options that fail later, in words of their own, or make a run do nothing: what they
# take, and in words.
_POSITIVE = (lambda x: 0 < x < math.inf, "a positive number")
_COUNT = (lambda x: x >= 0, "0 or a positive number")
_NUMBER = (lambda x: 0 <= x < math.inf, "0 or a positive finite number")
_SHARE = (lambda x: 0 <= x < 1, "a number in [0, 1)")
_SEED = (lambda x: 0 <= x < 2**32, "an integer in [0, 2³²)")
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "eval_accumulation_steps",
            "dataloader_prefetch_factor", "dataset_num_proc", "pad_to_multiple_of",
            "ref_model_sync_steps",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha", "warmup_steps"), _NUMBER),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "max_grad_norm", "adam_epsilon"), _COUNT),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "max_steps": (lambda x: x > 0 or x == -1, "a positive number, or -1 for num_train_epochs"),
    "max_length": (lambda x: x >= 2, "an integer from 2, or None"),
    "ref_model_mixup_alpha": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
}  # fmt: skip


def check_options(args: Any) -> None:
    """Checks what transformers and TRL fail on later, in words of their own.

    Args:
        args: ``transformers.TrainingArguments`` or ``trl.DPOConfig``.

    Raises:
        ValueError: a number out of range, a compiler that is not there, or sizes of parallelism that do not make up the
            run's processes.
    """
    # What nothing reads may be anything.
    unread = {f"{what}_steps" for what in ("logging", "save", "eval") if getattr(args, f"{what}_strategy") != "steps"}
    if args.max_steps > 0:
        unread.add("num_train_epochs")
    for name, (taken, words) in NUMBERS.items():
        value = getattr(args, name, None)
        if isinstance(value, (int, float)) and name not in unread and not taken(value):
            raise ValueError(f"{name}: got {value}, takes {words}")
    backend, known = args.torch_compile_backend, torch.compiler.list_backends(exclude_tags=())
    if args.torch_compile and backend not in known:
        raise ValueError(f"torch_compile_backend: got {backend!r}, takes one of {', '.join(known)}")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: got True on a CPU, takes bf16: accelerate would train in float32 without a word")
    sizes = args.parallelism_config
    # Of sp_size sequence.py says it.
    together = 1 if sizes is None else sizes.total_size // sizes.sp_size
    if args.world_size % together:
        raise ValueError(
            f"parallelism_config: got sizes of {together} processes together in a run of {args.world_size}, takes a "
            "launch of as many (torchrun, accelerate launch)"
        )


def check_launch(trainer: Any) -> None:
    """Raises ValueError where the model, or its batches, would be split in a way that the loss does not know."""
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and parallelism.cp_size > 1:
        raise ValueError(
            f"parallelism_config: got cp_size={parallelism.cp_size}, takes sp_size: context parallelism drops the mask "
            "and takes a row as one causal text, where answers would see each other"
        )
    if parallelism is not None and parallelism.tp_size > 1:
        _check_tensor_parallelism(trainer)
    if trainer.is_deepspeed_enabled:
        check_deepspeed(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("fsdp: got version 1, takes version 2: set fsdp_version to 2 in accelerate's config")
    if trainer.args.n_gpu > 1:  # and not where the layers of one model are on several
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES: got {trainer.args.n_gpu} GPUs in one process, which transformers deals batches out "
            "to (DataParallel), chosen rows to one and rejected rows to another. Takes one GPU a process: launch with "
            f"torchrun --nproc_per_node {trainer.args.n_gpu} or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises ValueError where DeepSpeed's configuration asks for what the loss does not go with."""
    if (size := config.get("tensor_parallel", {}).get("autotp_size", 0)) > 1:
        raise ValueError(f"deepspeed: got autotp_size={size}, takes ZeRO alone: the vocabulary has to be whole")
    zero = config.get("zero_optimization", {})
    if (stage := zero.get("stage")) not in (1, 2, 3):
        raise ValueError(f"deepspeed: got stage {stage} of zero_optimization, takes 1, 2 or 3")
    if stage == 3 and (size := zero.get("stage3_module_granularity_threshold", 0)) > 0:
        raise ValueError(
            f"deepspeed: got stage3_module_granularity_threshold={size} of zero_optimization, takes 0: DeepSpeed then "
            "gathers modules whole, and fails on the gradients of those that the loss runs in"
        )


def _check_tensor_parallelism(trainer: Any) -> None:
    parallelism = trainer.accelerator.parallelism_config
    ranks, data = parallelism.tp_size, parallelism.dp_replicate_size * parallelism.dp_shard_size
    if data > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"parallelism_config: got tp_size={ranks} with data parallelism, FSDP or DeepSpeed, takes it alone, over "
            "all ranks, and gradient_accumulation_steps"
        )
    if hasattr(trainer.model, "peft_config"):
        raise ValueError(
            f"peft_config: got an adapter with tp_size={ranks}, takes none: PEFT's layers fail in training where "
            "transformers has split the model's"
        )
    if vocab_group(lm_head(causal_lm(trainer.model))) is None:
        raise ValueError(
            f"model: got a head that is whole, with tp_size={ranks}, takes a model that was loaded split, by "
            "from_pretrained(…, distributed_config=DistributedConfig(tp_size=…)), and whose tp_plan splits its head"
        )
    if trainer.args.load_best_model_at_end:
        raise ValueError(f"load_best_model_at_end: got True with tp_size={ranks}, takes False: {_NOT_LOADED}")


def check_metric(trainer: Any, names: Iterable[str]) -> None:
    """Raises ValueError where metric_for_best_model is nothing that an evaluation gives: its loss, or ``names``.

    What a ``compute_metrics`` gives nobody knows before.
    """
    asked, held_out = trainer.args.metric_for_best_model, trainer.eval_dataset
    if asked is None or held_out is None or trainer.compute_metrics is not None:
        return
    losses = [f"{name}_loss" for name in held_out] if isinstance(held_out, dict) else ["loss"]
    there = [*losses, *names]
    if asked.removeprefix("eval_") not in there:
        raise ValueError(f"metric_for_best_model: got {asked!r}, takes one of {', '.join(there)}")


def check_resume(trainer: Any, checkpoint: Any) -> None:
    """Raises ValueError where a run is to go on from a checkpoint that its engine does not load."""
    if checkpoint and trainer.get_tp_size() > 1:
        raise ValueError(f"resume_from_checkpoint: got {checkpoint} with tensor parallelism, takes none: {_NOT_LOADED}")


def check_checkpoint(folder: Path, trainer: Any, *own: str) -> None:
    """Raises ValueError where a checkpoint lacks what ``transformers.Trainer`` would go on without, and not say so.

    ``own`` are files beside transformers' that it has to have.
    """
    if virtual_tokens(trainer.model) and _has_encoder(trainer.model):
        config = type(trainer.model.active_peft_config).__name__
        raise ValueError(
            f"resume_from_checkpoint: got {folder} of {config}, which takes none: {_NO_ENCODER}. A plain table of "
            "tokens (PromptTuningConfig, PrefixTuningConfig without prefix_projection) is resumed"
        )
    rank, world = trainer.args.process_index, trainer.args.world_size
    names = [*own, f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"]
    # DeepSpeed has formats of its own, in which a schedule that it was given is too, and says what it misses.
    if not trainer.is_deepspeed_enabled:
        names.append("optimizer*")
    if not trainer.is_deepspeed_enabled or trainer.deepspeed.lr_scheduler is None:
        names.append("scheduler.pt")
    if trainer.accelerator.scaler is not None:
        names.append("scaler.pt")
    missing = [name.replace("*", ".pt") for name in names if not any(folder.glob(name))]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: got {folder} without {', '.join(missing)}, takes a whole checkpoint of as many "
            "processes: optimizer and learning rate would start over. save_only_model leaves them out; to start a new "
            "run from its weights, give it as model"
        )


class NotFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite; the run stops before the optimizer step, its last checkpoint kept."""


def stop_not_finite(pairs: str, trainer: Any) -> NoReturn:
    """Raises NotFiniteError for the losses of some pairs of a step; ``pairs`` says which."""
    raise NotFiniteError(
        f"step {trainer.state.global_step + 1}: the loss of the pairs {pairs} is not finite. Nothing of this step was "
        f"applied; the last checkpoint is in {trainer.args.output_dir}"
    )


def check_gradient(norm: Any, trainer: Any) -> None:
    """To be called with the gradient's norm before each optimizer step, which would make every weight NaN.

    A loss scaler leaves such a step out by itself and goes on at a smaller scale. DeepSpeed is past its step: it has
    left it out, or without ``check_grad_overflow`` made it.

    Raises:
        NotFiniteError: on all ranks alike.
    """
    deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    if trainer.accelerator.scaler is not None or (deepspeed and trainer.accelerator.mixed_precision == "fp16"):
        return
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):
        applied = deepspeed and not trainer.accelerator.optimizer_step_was_skipped
        done = "DeepSpeed has applied it" if applied else "Nothing of this step was applied"
        raise NotFiniteError(
            f"step {trainer.state.global_step + 1}: the losses are finite, and the norm of their gradient is {norm}. "
            f"{done}; the last checkpoint is in {trainer.args.output_dir}. Weights in 16 bits overflow: keep them in "
            "float32, under bf16=True"
        )
