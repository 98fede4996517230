"""A call, bound once: its tensors in the packed form, what its loss depends on, and how it is computed.

The public functions check and bind their arguments here; below them these three travel together. Only a
``torch.library`` op wants them one by one: ``SCHEMA``, :func:`flatten` and :func:`restore` are that list.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks, engines
from .head import Head

# A transform of the reference's logits that is to be the policy's.
POLICY = "policy"


def heads(
    policy: tuple[Tensor, Tensor | None],
    reference: tuple[Tensor, Tensor | None],
    scales: tuple[float, float | str],
    softcaps: tuple[float | None, float | str | None],
) -> tuple[Head, Head]:
    """The heads of policy and reference from their weights and biases, scales and softcaps; "policy" is resolved."""
    scale, softcap = scales[0], softcaps[0]
    ref_scale = scale if scales[1] == POLICY else scales[1]
    ref_softcap = softcap if softcaps[1] == POLICY else softcaps[1]
    made = []
    for prefix, (weight, bias), s, cap in (("", policy, scale, softcap), ("ref_", reference, ref_scale, ref_softcap)):
        checks.check_transforms(s, cap, prefix)
        made.append(Head(weight, bias, float(s), None if cap is None else float(cap)))
    return made[0], made[1]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call: tokens one after the other, all chosen completions first, then all rejected ones."""

    hidden: Tensor  # (N, H)
    policy: Head
    ref_hidden: Tensor  # (N, H_ref)
    reference: Head
    labels: Tensor  # (N,) int64, −100 where not scored
    cu_seqlens: Tensor  # (2B+1,) int64, bounds of the completions

    @property
    def pairs(self) -> int:
        """B, scored or not."""
        return len(self.cu_seqlens) // 2

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and accumulated gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


def bind_inputs(
    hidden: Tensor, policy: Head, ref_hidden: Tensor, reference: Head, labels: Tensor, cu_seqlens: Tensor | None
) -> Inputs:
    """Checks shapes, dtypes and devices, takes autocast's dtype, and lays padded rows out as packed ones.

    Raises:
        TypeError, ValueError: name the argument, what came and what is taken.
    """
    checks.check_tokens(hidden, labels, ref_hidden, cu_seqlens)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        for prefix, head in (("", policy), ("ref_", reference)):  # a cast would take whole numbers for weights
            checks.check_floating(**{f"{prefix}weight": head.weight})
            if head.bias is not None:
                checks.check_floating(**{f"{prefix}bias": head.bias})
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, ref_hidden = hidden.to(dtype), ref_hidden.to(dtype)
        policy, reference = policy.to(dtype), reference.to(dtype)
    checks.check_head(hidden, policy.weight, policy.bias)
    checks.check_head(ref_hidden, reference.weight, reference.bias, "ref_")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden: got a tensor on {ref_hidden.device}, takes hidden's device, {hidden.device}")
    if reference.weight.shape[0] != policy.weight.shape[0]:
        raise ValueError(
            f"ref_weight: got a vocabulary of {reference.weight.shape[0]}, takes the policy's, {policy.weight.shape[0]}"
        )
    if cu_seqlens is None:
        rows, length = labels.shape
        cu_seqlens = torch.arange(0, rows * length + 1, max(length, 1), device=labels.device)[: rows + 1]
        if length == 0:
            cu_seqlens = torch.zeros(rows + 1, dtype=torch.int64, device=labels.device)
    return Inputs(
        hidden.reshape(-1, hidden.shape[-1]), policy, ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        reference.detach(), labels.reshape(-1), cu_seqlens.long(),
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What steps, β and losses of pairs depend on beside the tensors; see :mod:`epsdpo_kernels.pair`."""

    beta: Tensor  # () the running β
    epsilon: float
    label_smoothing: float = 0.0
    max_entropy: float | None = None
    max_kl: float | None = None


def bind_settings(
    beta: float | Tensor,
    epsilon: float,
    label_smoothing: float,
    max_entropy: float | None,
    max_kl: float | None,
    like: Tensor,
) -> Settings:
    """Checks the numbers, and takes β to the device of ``like`` in the compute dtype."""
    checks.check_scalars(beta, epsilon, label_smoothing)
    max_entropy, max_kl = checks.check_veto(max_entropy, max_kl)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(beta, Tensor):
        beta = beta.detach().to(like.device, dtype).reshape(())
    else:  # filled on the device: a copy from the host would wait for it
        beta = torch.full((), float(beta), dtype=dtype, device=like.device)
    return Settings(beta, float(epsilon), float(label_smoothing), max_entropy, max_kl)


@dataclass(frozen=True)
class Execution:
    """How a call is computed; nothing of it changes a result beyond rounding."""

    engine: str  # one of engines.ENGINES
    max_tile_bytes: int | None
    vocab_group: str | None  # names of process groups, which are what an op can take
    sequence_group: str | None


def bind_execution(
    engine: str,
    max_tile_bytes: int | None,
    vocab_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    hidden: Tensor,
) -> Execution:
    """Checks the options.

    Raises:
        TypeError, ValueError: name the argument, what came and what is taken.
    """
    engines.check(engine, hidden.dtype)
    if max_tile_bytes is not None:
        if not (isinstance(max_tile_bytes, Integral) and 0 < max_tile_bytes < 1 << 63):
            raise ValueError(f"max_tile_bytes: got {max_tile_bytes!r}, takes a positive integer of bytes or None")
        max_tile_bytes = int(max_tile_bytes)
    for name, group in (("vocab_group", vocab_group), ("sequence_group", sequence_group)):
        if group is not None and not hasattr(group, "group_name"):
            raise TypeError(f"{name}: got {group!r}, takes a process group of torch.distributed or None")
    names = (None if group is None else group.group_name for group in (vocab_group, sequence_group))
    return Execution(engine, max_tile_bytes, *names)


SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, float scale, float? softcap, "
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, float ref_scale, float? ref_softcap, "
    "Tensor labels, Tensor cu_seqlens, "
    "Tensor beta, float epsilon, float label_smoothing, float? max_entropy, float? max_kl, "
    "str engine, int? max_tile_bytes, str? vocab_group, str? sequence_group"
)


def flatten(inputs: Inputs, settings: Settings, execution: Execution) -> tuple[Any, ...]:
    """A call as ``SCHEMA`` has it; the tensors that get gradients come first."""
    i, p, r, s, e = inputs, inputs.policy, inputs.reference, settings, execution
    return (
        i.hidden, p.weight, p.bias, p.scale, p.softcap,
        i.ref_hidden, r.weight, r.bias, r.scale, r.softcap,
        i.labels, i.cu_seqlens,
        s.beta, s.epsilon, s.label_smoothing, s.max_entropy, s.max_kl,
        e.engine, e.max_tile_bytes, e.vocab_group, e.sequence_group,
    )  # fmt: skip


def restore(flat: tuple[Any, ...]) -> tuple[Inputs, Settings, Execution]:
    """What :func:`flatten` was given."""
    hidden, policy, ref_hidden, reference = flat[0], Head(*flat[1:5]), flat[5], Head(*flat[6:10])
    inputs = Inputs(hidden, policy, ref_hidden, reference, *flat[10:12])
    return inputs, Settings(*flat[12:17]), Execution(*flat[17:21])
