"""What the loss needs of a transformers model: hidden states, the head, and the transforms of its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from ..linear import EpsilonDPOOutput
from .packing import Packing, no_mask


class HeadInputs(NamedTuple):
    """A model's side of :func:`epsdpo_kernels.linear_epsilon_dpo`."""

    hidden: Tensor  # (rows, T, H), or (M, H) of a packed row's scored tokens
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    router_loss: Tensor | None = None  # (), the load-balancing loss of a mixture of experts, weighted as the model does

    def logits(self) -> Tensor:
        """(rows, T, V), for checks."""
        logits = nn.functional.linear(self.hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# (input_ids, attention_mask, row) -> the reference's side of the loss; the mask may be a Packing, and row (B,) int64 is
# where the pairs are in the data
Reference = Callable[[Tensor, Tensor | Packing, Tensor | None], HeadInputs]


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, within a PEFT wrapper or none."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model: got {type(inner).__name__}, takes a transformers PreTrainedModel, or one within PEFT")
    return inner


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The model's head.

    Raises:
        ValueError: the head is not one plain linear layer: an adapter sits on it, or it is something of its own.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return head
    raise ValueError(
        f"model: the head of {type(model).__name__} is a {type(head).__module__}.{type(head).__name__}, takes a plain "
        "torch.nn.Linear. An adapter on the head (LoRA with target_modules naming lm_head, modules_to_save) would "
        "silently not train under a fused loss: leave the head out of the adapter's targets"
    )


def logit_transforms(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap) of logits = softcap·tanh(scale·x·Wᵀ / softcap), from the model's configuration."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return float(scale), getattr(config, "final_logit_softcapping", None)


def gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter that FSDP2 has sharded; any other as it is.

    FSDP gathers a head when the head's own forward is called, which a fused loss never does. One gather a call; the
    gradient comes back as FSDP's do, sharded and averaged over the ranks.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    ranks = parameter.device_mesh.size()
    cast: Any = parameter.to(dtype)
    whole = cast.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


def head_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | Packing) -> HeadInputs:
    """Runs the backbone, never the head.

    Args:
        model: a causal language model, within PEFT or not.
        input_ids: (rows, T) int64.
        attention_mask: (rows, T), 1 on tokens, 0 on padding to their right; or how the rows are packed as one, which
            takes ``input_ids``'s place and gives the scored hidden states only.

    Raises:
        TypeError, ValueError: the model's head cannot be fused; see :func:`lm_head`.
    """
    model = causal_lm(model)
    head, (scale, softcap) = lm_head(model), logit_transforms(model)
    packing = attention_mask if isinstance(attention_mask, Packing) else None
    if packing:
        out = model.base_model(
            input_ids=packing.input_ids, position_ids=packing.position_ids, attention_mask=no_mask(packing.input_ids),
            segments=packing.segments, use_cache=False,
        )  # fmt: skip
    else:
        out = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    router_loss = None
    config = model.config.get_text_config()
    if getattr(out, "router_logits", None) is not None and config.output_router_logits:
        # FSDP2 gives the model a class of its own, in a module of its own.
        modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
        balance = next(m.load_balancing_loss_func for m in modules if hasattr(m, "load_balancing_loss_func"))
        router_loss = config.router_aux_loss_coef * balance(
            out.router_logits, model.num_experts, model.num_experts_per_tok, None if packing else attention_mask
        )
    hidden = out.last_hidden_state
    if packing:
        hidden = hidden[0].index_select(0, packing.scored)
    weight = gathered(head.weight, hidden.dtype)
    bias = None if head.bias is None else gathered(head.bias, hidden.dtype)
    return HeadInputs(hidden, weight, bias, scale, softcap, router_loss)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compares the logits that follow from :func:`head_inputs` with the model's own, on a few tokens.

    Raises:
        TypeError, ValueError: they differ, so a fused loss would train something else than this model.
    """
    inner = causal_lm(model)
    ids = torch.arange(1, 9, device=inner.device)[None] % inner.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    training = inner.training
    inner.eval()
    try:
        ours = head_inputs(model, ids, mask).logits().float()
        theirs = inner(input_ids=ids, attention_mask=mask).logits.float()
    finally:
        inner.train(training)
    error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else torch.inf
    # Both round in the model's dtype; a wrong transform is off by the order of the logits.
    allowed = 8 * torch.finfo(inner.dtype).eps * max(1.0, theirs.abs().max().item())
    if not error <= allowed:
        raise ValueError(
            f"model: the logits of {type(inner).__name__} do not follow from its hidden states, head, scale and "
            f"softcap: they differ by {error:.2g} where {allowed:.2g} is rounding. Its head cannot be fused"
        )


def frozen_reference(ref_model: nn.Module) -> Reference:
    """A second model, without gradients and without dropout."""
    ref_model.requires_grad_(False).eval()

    def reference(input_ids: Tensor, attention_mask: Tensor | Packing, row: Tensor | None) -> HeadInputs:
        return head_inputs(ref_model, input_ids, attention_mask)

    return reference


def adapters_disabled(model: Any) -> Reference:
    """The base of a PEFT model, which costs no second model."""

    def reference(input_ids: Tensor, attention_mask: Tensor | Packing, row: Tensor | None) -> HeadInputs:
        training = model.training
        model.eval()
        try:
            with model.disable_adapter():
                return head_inputs(model, input_ids, attention_mask)
        finally:
            model.train(training)

    return reference


def run_loss_in_forward(model: nn.Module, reference: Reference, loss_fn: nn.Module) -> None:
    """Teaches ``model.forward`` to return the loss of pairs when it is given ``pair_labels``; else it is as before.

    ``attention_mask`` may be a :class:`Packing`, which comes with labels of its own.
    """
    plain_forward = model.forward

    def forward(*args, pair_labels: Tensor | None = None, row: Tensor | None = None, **inputs):
        if pair_labels is None:
            return plain_forward(*args, **inputs)
        with torch.no_grad():
            ref = reference(inputs["input_ids"], inputs["attention_mask"], row)
        policy = head_inputs(model, inputs["input_ids"], inputs["attention_mask"])
        packing, bounds = inputs["attention_mask"], None
        if isinstance(packing, Packing):
            pair_labels, bounds = packing.labels, packing.cu_seqlens
        out = loss_fn(
            policy.hidden, policy.weight, pair_labels, ref.hidden, ref.weight, bias=policy.bias, ref_bias=ref.bias,
            logit_scale=policy.logit_scale, softcap=policy.softcap, ref_logit_scale=ref.logit_scale,
            ref_softcap=ref.softcap, cu_seqlens=bounds,
        )  # fmt: skip
        return out if policy.router_loss is None else out._replace(loss=out.loss + policy.router_loss)

    model.forward = forward


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
