"""What the loss needs of a transformers model: hidden states, the head, and the transforms of its logits."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel, TrainerCallback

from ..linear import EpsilonDPOOutput
from .packing import Packing, no_mask, of_pairs
from .sequence import whole_row
from .sharding import (
    another_forward,
    gathers_itself,
    is_split,
    local,
    own_slice,
    runnable,
    vocab_group,
    whole_head,
    whole_shape,
)


class HeadInputs(NamedTuple):
    """A model's side of :func:`epsdpo_kernels.linear_epsilon_dpo`."""

    hidden: Tensor  # (rows, T, H), or (M, H) of a packed row's scored tokens
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    vocab_group: ProcessGroup | None = None  # of ranks that hold a slice of weight and bias each
    router_loss: Tensor | None = None  # (), the load-balancing loss of a mixture of experts, weighted as the model does

    def logits(self, amplified: float = 1.0) -> Tensor:
        """(rows, T, V), for checks, of the words that are here; ``amplified`` multiplies what the head puts out."""
        logits = nn.functional.linear(self.hidden, self.weight, self.bias) * amplified * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# (row=…, input_ids=…, attention_mask=…, …) -> the reference's side of the loss, for what head_inputs takes; row (B,)
# int64 is where the pairs are in the data, or None
Reference = Callable[..., HeadInputs]

# Names of configurations for what multiplies the logits, what divides them, and what caps them after that.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, within a PEFT wrapper or none.

    Raises:
        TypeError: it is something else.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: got {type(inner).__name__}, takes a transformers PreTrainedModel, or one within PEFT")
    return inner


def lm_head(model: PreTrainedModel, argument: str = "model") -> nn.Linear:
    """The model's head; the copy that trains where PEFT's ``modules_to_save`` names it and adapters are on.

    Raises:
        ValueError: the head is not one plain linear layer: an adapter sits on it, or it is something of its own.
    """
    head: Any = model.get_output_embeddings()
    if (copies := getattr(head, "modules_to_save", None)) is not None:
        active = None if head.disable_adapters else next(iter(head.active_adapters), None)
        head = copies[active] if active in copies else head.original_module
    if isinstance(head, nn.Linear):
        return head
    raise ValueError(
        f"{argument}: the head of {type(model).__name__} is a {type(head).__module__}.{type(head).__name__}, takes a "
        "plain torch.nn.Linear. An adapter on the head (LoRA with target_modules naming lm_head) would silently not "
        "train under a fused loss: leave the head out of the adapter's targets, or train it whole with modules_to_save"
    )


def logit_transforms(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap) of logits = softcap·tanh(scale·(x·Wᵀ + bias) / softcap), from the model's configuration."""
    config = model.config.get_text_config()

    def given(names: tuple[str, ...]) -> list[float]:
        return [float(value) for name in names if (value := getattr(config, name, None))]

    divisor = math.prod(given(DIVISORS))
    if config.model_type == "hyperclovax":  # the one that multiplies by what has a divisor's name
        divisor = 1 / divisor
    return math.prod(given(MULTIPLIERS)) / divisor, next(iter(given(SOFTCAPS)), None)


def virtual_tokens(model: Any) -> int:
    """Of PEFT's prompt learning (prompt, prefix, p-tuning), before every row; 0 without it, or where it is off."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or not model.has_active_enabled_adapter:
        return 0
    return config.num_virtual_tokens


def rows_alone_up_to(model: PreTrainedModel) -> int | None:
    """Tokens up to which a row's rotary positions are its own; beyond, they go by the longest row of its batch.

    None where they are always its own.
    """
    text = model.config.get_text_config()
    scaling = getattr(text, "rope_parameters", None) or {}
    limits = []
    for one in (scaling, *scaling.values()):  # one for all layers, or by kinds of layers
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind == "longrope":
            limits.append(one["original_max_position_embeddings"])
        elif kind == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def _run_backbone(wrapper: nn.Module, model: PreTrainedModel, **inputs: Any) -> Any:
    """What the model's backbone puts out; within PEFT's prompt learning, with the virtual tokens' states in front."""
    # A few classes carry the name of a parent's backbone.
    backbone = model.base_model if model.base_model is not model else model.model
    if not virtual_tokens(wrapper):
        return backbone(**inputs)
    # PEFT puts the tokens there in its own forward, which calls the model's: the backbone in its place.
    with another_forward(
        model, lambda **given: backbone(**{name: value for name, value in given.items() if value is not None})
    ):
        return type(wrapper).forward(wrapper, **inputs)


def head_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | Packing, **beside: Any) -> HeadInputs:
    """Runs the backbone, never the head.

    Args:
        model: a causal language model, within PEFT or not. Of virtual tokens, which PEFT puts before a row's own, no
            hidden states are returned.
        input_ids: (rows, T) int64.
        attention_mask: (rows, T), 1 on tokens, 0 on padding to their right; or how the rows are packed as one, which
            takes ``input_ids``'s place and gives the scored hidden states only.
        beside: what the backbone takes beside them, like pixel_values.

    Raises:
        TypeError, ValueError: the model's head cannot be fused; see :func:`lm_head`.
    """
    inner = causal_lm(model)
    head, (scale, softcap) = lm_head(inner), logit_transforms(inner)
    if isinstance(attention_mask, Packing):  # without virtual tokens, or the row would not be packed
        packing, mask = attention_mask, None
        out = _run_backbone(
            model, inner, input_ids=packing.input_ids, position_ids=packing.position_ids,
            attention_mask=no_mask(packing.input_ids), segments=packing.segments, use_cache=False, **beside,
        )  # fmt: skip
        hidden = out.last_hidden_state[0].index_select(0, packing.scored)
    else:
        out = _run_backbone(
            model, inner, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **beside
        )  # fmt: skip
        virtual = out.last_hidden_state.shape[1] - input_ids.shape[1]
        hidden = out.last_hidden_state[:, virtual:]
        mask = nn.functional.pad(attention_mask, (virtual, 0), value=1)
    if not torch.is_autocast_enabled(hidden.device.type):
        # Of models whose head has another dtype, those run without autocast that cast to it.
        hidden = hidden.to(next(head.parameters()).dtype)
    of_words = vocab_group(head)
    if of_words is None:
        hidden, weight, bias = whole_head(head, hidden)
    else:
        weight, bias = local(head.weight), None if head.bias is None else local(head.bias)
    router_logits = getattr(out, "router_logits", None)
    if router_logits and mask is None and (group := packing.segments.group):
        # The loss is not a sum over tokens.
        router_logits = tuple(whole_row(one, group, packing.segments.tokens) for one in router_logits)
    router_loss = _router_loss(inner, router_logits, mask)
    return HeadInputs(hidden, weight, bias, scale, softcap, of_words, router_loss)


def _router_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor | None:
    """() the weighted load-balancing loss that the model's own forward adds, if it does."""
    config = model.config.get_text_config()
    if not router_logits or not getattr(config, "output_router_logits", False):
        return None
    # FSDP2 gives the model a class of its own, in a module of its own.
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    balance = next((m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func")), None)
    if balance is None:
        return None
    experts, chosen = (
        getattr(model if hasattr(model, name) else config, name) for name in ("num_experts", "num_experts_per_tok")
    )
    return config.router_aux_loss_coef * balance(router_logits, experts, chosen, attention_mask)


def check_head(
    model: nn.Module,
    autocast: torch.dtype | None = None,
    *,
    argument: str = "model",
    inputs: Callable[..., HeadInputs] = head_inputs,
    batch: dict[str, Any] | None = None,
) -> None:
    """Compares what follows from :func:`head_inputs` with what the model's own forward gives, on a few tokens.

    What the head puts out is amplified on both sides: near 0 a softcap that nobody has read would hide in rounding.
    Adapters that train are measured away from their start, at which most of them do nothing.

    Args:
        model: a causal language model, within PEFT or not. Nothing is measured where its weights are on "meta".
        autocast: dtype that training computes in, where that is not the weights'.
        argument: what errors call the model.
        inputs: what gives its hidden states and head where :func:`head_inputs` itself does not.
        batch: what to run it on in place of a few tokens: input_ids, attention_mask and what else its backbone takes.

    Raises:
        TypeError, ValueError: they differ, so a fused loss would train something else than this model; or there is
            nothing to compare, because its logits are not finite or its forward fails; or an adapter would not train.
    """
    inner = causal_lm(model)
    if inner.device.type == "meta":  # FSDP's memory-saving loading: only the first rank holds weights
        return
    head, name = lm_head(inner, argument), type(inner).__name__
    try:
        with evaluating(model, autocast), perturbed(model), torch.no_grad():
            batch = batch or few_tokens(model)
            mask = batch["attention_mask"].bool()
            ours = inputs(model, **batch)
            largest = ours._replace(logit_scale=1.0, softcap=None).logits().abs().max().item()
            factor = 2.0 ** round(math.log2(64 / largest)) if 0 < largest < math.inf else 1.0
            with head.register_forward_hook(lambda module, args, output: output * factor):
                own = model(**batch, use_cache=False)
            theirs = own.logits
            if ours.vocab_group is not None:
                theirs = theirs[..., own_slice(theirs.shape[-1], ours.vocab_group)]
            # PEFT's virtual tokens have logits too, in front.
            expected, found = (logits[:, -mask.shape[1] :][mask].float() for logits in (theirs, ours.logits(factor)))
            dtypes = {ours.hidden.dtype, ours.weight.dtype, own.logits.dtype, autocast or own.logits.dtype}
            eps = max(torch.finfo(dtype).eps for dtype in dtypes)
            router_losses = ours.router_loss, _own_router_loss(inner, own)
        idle = _idle(model, autocast, inputs, batch)
    except Exception as error:
        raise ValueError(
            f"{argument}: the head of {name} cannot be measured, because its forward fails with "
            f"{type(error).__name__}: {error}{_mixed_dtypes(inner, autocast)}"
        ) from error
    if idle:
        raise ValueError(
            f"{argument}: got an adapter whose weights get no gradient, on {len(idle)} layers, {idle[0]} first. The "
            "loss runs the backbone itself, without what PEFT's own forward tells an adapter, as that of "
            "alora_invocation_tokens: take one that needs no telling, and a scale (lora_alpha) other than 0"
        )
    if not torch.isfinite(expected).all():
        broken = [n for n, p in inner.named_parameters() if not torch.isfinite(p).all()]
        why = f"its weights are not, {broken[0]} first" if broken else "take bfloat16 or float32"
        raise ValueError(f"{argument}: the logits of {name} are not finite in {autocast or ours.hidden.dtype}: {why}")
    if found.shape != expected.shape:
        raise ValueError(
            f"{argument}: {name} gives logits of {expected.shape[-1]} tokens, its head of {found.shape[-1]}. Its head "
            "cannot be fused"
        )
    # Both round in the dtype they compute in; a wrong transform is off by the order of the logits.
    difference, allowed = (found - expected).abs().max().item(), 8 * eps * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ValueError(
            f"{argument}: the logits of {name} do not follow from its hidden states, head, scale and softcap: they "
            f"differ by {difference:.2g} where {allowed:.2g} is rounding. Its head cannot be fused"
        )
    by_router, by_model = (None if loss is None else float(loss) for loss in router_losses)
    if by_router != by_model and not math.isclose(by_router or 0.0, by_model or 0.0, rel_tol=1e-3):
        raise ValueError(
            f"{argument}: the router loss of {name} is {by_model} by its own forward and {by_router} by its router's "
            "logits. Set output_router_logits to false to train without it"
        )


def _idle(
    model: nn.Module, autocast: torch.dtype | None, inputs: Callable[..., HeadInputs], batch: dict[str, Any]
) -> list[str]:
    """Names of the layers that run, with an adapter that trains and gets no gradient.

    Tokens that are trained by themselves need not be among the few.
    """
    if not hasattr(model, "peft_config") or is_split(model):
        return []
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            found[name] = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
    found = {name: weights for name, weights in found.items() if weights}
    if not found:
        return []
    ran: set[str] = set()

    def hook(module, args, output, name):
        if all(one.numel() for one in args if isinstance(one, Tensor)):  # not an expert that no token has come to
            ran.add(name)

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(hook, name=name)) for name in found]
    try:
        with evaluating(model, autocast), perturbed(model), torch.enable_grad():
            total = inputs(model, **batch).hidden.float().square().sum()
            asked = [p for weights in found.values() for p in weights]
            got = torch.autograd.grad(total, asked, allow_unused=True) if total.requires_grad else [None] * len(asked)
    finally:
        for one in hooks:
            one.remove()
    trained = {id(p) for p, gradient in zip(asked, got, strict=True) if gradient is not None and gradient.any()}
    return [name for name, weights in found.items() if name in ran and not trained & set(map(id, weights))]


@contextlib.contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """A model whose adapters that train are away from where they are; they are there again in the end.

    Most begin as if they were not there. As many numbers as go into a sum, so small are the changes.
    """
    adapter = hasattr(model, "peft_config")
    kept = [(local(p), whole_shape(p)) for p in model.parameters() if adapter and p.requires_grad]
    before = [part.detach().clone() for part, _ in kept]
    try:
        with torch.no_grad():
            for part, shape in kept:
                generator = torch.Generator(part.device).manual_seed(0)  # that all ranks agree
                noise = torch.randn(part.shape, generator=generator, device=part.device)
                part.add_((noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)).to(part.dtype))
        yield
    finally:
        with torch.no_grad():
            for (part, _), own in zip(kept, before, strict=True):
                part.copy_(own)


def positions(model: nn.Module) -> int | None:
    """How many positions a model has for a row's own tokens; None where it has no table of them, and may go on."""
    inner = causal_lm(model)
    count = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    if count is None:
        return None
    words = inner.get_input_embeddings()
    tables = [module for module in inner.modules() if isinstance(module, nn.Embedding) and module is not words]
    # Some keep two rows more, for padding; sines may be a buffer.
    learned = any(module.num_embeddings in (count, count + 2) for module in tables)
    fixed = any(buffer.dim() == 2 and len(buffer) == count for buffer in inner.buffers())
    return count - virtual_tokens(model) if learned or fixed else None


def few_tokens(model: nn.Module, length: int = 8) -> dict[str, Tensor]:
    """input_ids and attention_mask, (2, length) each, to measure a model with; the second row has padding.

    Shorter where the model has fewer positions.
    """
    inner, places = causal_lm(model), positions(model)
    length = length if places is None else min(length, places)
    text = inner.config.get_text_config()
    # An image's or a padding token asks for more than ids.
    special = [value for name, value in (vars(inner.config) | vars(text)).items() if name.endswith("_token_id")]
    plain = [i for i in range(min(text.vocab_size, 256)) if i not in special]
    ids = torch.tensor((plain * 2 * length)[: 2 * length], device=inner.device).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, 3 * length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def evaluating(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """The model in evaluation mode, under autocast to a dtype where one is given."""
    training = model.training
    model.eval()
    try:
        cast = torch.autocast(causal_lm(model).device.type, autocast) if autocast else contextlib.nullcontext()
        with cast, runnable(model):
            yield
    finally:
        model.train(training)


def _own_router_loss(model: PreTrainedModel, out: Any) -> Any:
    loss = getattr(out, "aux_loss", None)
    return None if loss is None else model.config.get_text_config().router_aux_loss_coef * loss


def _mixed_dtypes(model: PreTrainedModel, autocast: torch.dtype | None) -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if len(dtypes) == 1 or autocast is not None:
        return ""
    return f". Its weights are {' and '.join(dtypes)}: that takes autocast, bf16=True"


def frozen_reference(ref_model: nn.Module, inputs: Callable[..., HeadInputs] = head_inputs) -> Reference:
    """A second model, without gradients and without dropout; ``inputs`` gives its hidden states and head."""
    ref_model.requires_grad_(False).eval()

    def reference(row: Tensor | None = None, **batch) -> HeadInputs:
        return inputs(ref_model, **batch)

    return reference


def by_call(model: Any) -> Callable[..., HeadInputs]:
    """:func:`head_inputs` of a model whose weights are whole in its own call alone; see :func:`gathers_itself`."""
    plain_forward = model.forward

    def forward(*args, head_only: bool = False, **inputs):
        if not head_only:
            return plain_forward(*args, **inputs)
        out = head_inputs(model, **inputs)
        if is_split(model):
            return out
        # FSDP frees what it gathered when this call returns.
        return out._replace(weight=out.weight.clone(), bias=None if out.bias is None else out.bias.clone())

    model.forward = forward
    return lambda model, **inputs: model(**inputs, head_only=True)


def without_adapter(model: Any) -> Reference:
    """A PEFT model's own reference, which costs no second model; see :func:`as_reference`."""

    def reference(row: Tensor | None = None, **batch) -> HeadInputs:
        with as_reference(model):
            return head_inputs(model, **batch)

    return reference


@contextlib.contextmanager
def _still_trains(model: nn.Module) -> Iterator[None]:
    """Which weights train is in the end what it was: PEFT lets all of an adapter train that it switches on."""
    kept = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, trains in kept:
            p.requires_grad_(trains)


def copy_adapter(model: Any) -> None:
    """Makes the PEFT model's adapter "ref" a frozen copy of its active one, with all that PEFT saves of an adapter.

    Raises:
        ValueError: PEFT has room for one adapter of its kind only.
    """
    import peft

    active = model.active_adapter
    if "ref" not in model.peft_config:
        try:
            with _still_trains(model):
                model.add_adapter("ref", model.active_peft_config)
        except ValueError as error:
            raise ValueError(
                f"model: its adapter cannot have a copy beside it as the reference: {error} Merge it into the weights "
                "(with lora_r for a new one on top), or give ref_model, a model of its own"
            ) from error
    weights = dict(model.named_parameters())
    for name, p in weights.items():  # PEFT makes them float32, also where those in use have been cast
        copy = weights.get(".".join("ref" if part == active else part for part in name.split(".")))
        if copy is not None and copy.dtype != p.dtype:
            copy.data = copy.to(p.dtype)
    if model.active_peft_config.is_prompt_learning:  # of which PEFT saves what an encoder puts out, not the encoder
        copy = model.prompt_encoder["ref"].requires_grad_(False)
        copy.load_state_dict(model.prompt_encoder[active].state_dict())
        return
    own = peft.get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    with _still_trains(model):
        peft.set_peft_model_state_dict(model, own, adapter_name="ref")
        model.set_adapter(active)


@contextlib.contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """A PEFT model as its base, or with its adapter "ref", the frozen copy of one that it came with; evaluating."""
    active = model.active_adapter
    with evaluating(model), _still_trains(model):
        if "ref" not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter(active)


def run_loss_in_forward(model: nn.Module, reference: Reference, loss_fn: nn.Module) -> None:
    """Teaches ``model.forward`` to return the loss of pairs when it is given ``pair_labels``; else it is as before.

    ``attention_mask`` may be a :class:`Packing`, which comes with labels of its own. Where ``pairs`` (n,) int64 says
    which of the batch's pairs the labels are of, the others run and play no part in the loss.
    """
    plain_forward = model.forward

    def forward(
        *args, pair_labels: Tensor | None = None, row: Tensor | None = None, pairs: Tensor | None = None, **inputs
    ):
        if pair_labels is None:
            return plain_forward(*args, **inputs)
        with torch.no_grad():
            ref = reference(row=row, **inputs)
        policy = head_inputs(model, **inputs)
        packing, bounds, group = inputs["attention_mask"], None, None
        if isinstance(packing, Packing):
            pair_labels, bounds, group = packing.labels, packing.cu_seqlens, packing.segments.group
        if pairs is not None:
            policy, ref = (side._replace(hidden=of_pairs(side.hidden, pairs)) for side in (policy, ref))
        out = loss_fn(
            policy.hidden, policy.weight, pair_labels, ref.hidden, ref.weight, bias=policy.bias, ref_bias=ref.bias,
            logit_scale=policy.logit_scale, softcap=policy.softcap, ref_logit_scale=ref.logit_scale,
            ref_softcap=ref.softcap, cu_seqlens=bounds, vocab_group=policy.vocab_group, sequence_group=group,
        )  # fmt: skip
        return out if policy.router_loss is None else out._replace(loss=out.loss + policy.router_loss)

    model.forward = forward


def load_renamed(trainer: Any, checkpoint: Path) -> None:
    """Loads a checkpoint's weights into a trainer's model where they are there under other names.

    ``save_pretrained`` writes mixtures of experts and many vision models as they are published. transformers' trainer
    takes the names as they stand, and goes on with the weights at hand where there are others.
    """
    model = trainer.model
    if not isinstance(model, PreTrainedModel) or gathers_itself(model) or trainer.is_deepspeed_enabled:
        return  # adapters are saved as they are, and FSDP and DeepSpeed have formats of their own
    saved: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved.update(file.keys())
    if not saved <= model.state_dict().keys():
        # In float32, of which any other dtype is made without loss.
        whole = type(model).from_pretrained(checkpoint, dtype=torch.float32)
        model.load_state_dict(whole.state_dict())


def weighs_pairs_itself(trainer: Any) -> None:
    """Tells a ``transformers.Trainer`` that its ``compute_loss`` weighs every pair of an optimizer step alike, whatever
    micro-batch and rank it is in, so that the trainer must not divide by the number of micro-batches."""
    trainer.loss_is_scaled_for_ga = True
    trainer.model_accepts_loss_kwargs = True  # what transformers before 5.19 goes by


class AfterStep(TrainerCallback):
    """Calls a function with the number of each optimizer step that is done, before anything of it is saved."""

    def __init__(self, function: Callable[[int], None]):
        self.function = function

    def on_optimizer_step(self, args, state, control, **kwargs):
        # transformers has not counted this step yet.
        self.function(state.global_step + 1)


def pair_metrics(out: EpsilonDPOOutput) -> dict[str, Tensor]:
    """(B,) figures under TRL's names, with KL and decisions beside them; their means are what is logged."""
    return {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": out.chosen_rewards - out.rejected_rewards,
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).float(),
        "margins": (out.chosen_logps - out.rejected_logps) - (out.ref_chosen_logps - out.ref_rejected_logps),
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
        "entropy": (out.chosen_entropy + out.rejected_entropy) / 2,
        "kl/chosen": out.chosen_kl,
        "kl/rejected": out.rejected_kl,
        "beta/used": out.beta,
        "beta/relaxed": (out.step == 1).float(),
        "beta/kept": (out.step == 0).float(),
        "beta/tightened": (out.step == -1).float(),
        "beta/vetoed": out.vetoed.float(),
    }


PAIR_METRICS = tuple(pair_metrics(EpsilonDPOOutput(*[torch.zeros(0)] * len(EpsilonDPOOutput._fields))))
