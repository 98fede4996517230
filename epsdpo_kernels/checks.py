"""What bad input gets: an error that names the argument, what came and what is taken, before any work."""

from __future__ import annotations

import math
import struct
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import parallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# What a number may be that is one in fp32 too.
LEAST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
BELOW_1 = 1 - 2**-24


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def check_scalars(beta: float | Tensor, epsilon: float, label_smoothing: float) -> None:
    """Raises ValueError for a β, ε or smoothing outside its range; a tensor β is checked by shape only."""
    if isinstance(beta, Tensor):
        if beta.numel() != 1 or not beta.is_floating_point():
            raise ValueError(f"beta: got a {beta.dtype} tensor of shape {tuple(beta.shape)}, takes one float")
    elif not (_is_number(beta) and 0 < beta <= LARGEST):
        raise ValueError(f"beta: got {beta!r}, takes a positive finite number")
    if not (_is_number(epsilon) and 0 <= epsilon <= BELOW_1):
        raise ValueError(f"epsilon: got {epsilon!r}, takes a number in (0, 1), in fp32 too, or 0 for plain DPO")
    if not (_is_number(label_smoothing) and 0 <= label_smoothing < 0.5):
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, takes a number in [0, 0.5)")


def check_veto(max_entropy: float | None, max_kl: float | None) -> tuple[float | None, float | None]:
    """Python's own floats of the two, or ValueError."""
    for name, value in (("max_entropy", max_entropy), ("max_kl", max_kl)):
        if value is not None and not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{name}: got {value!r}, takes nats from 0, or None")
    return None if max_entropy is None else float(max_entropy), None if max_kl is None else float(max_kl)


def check_transforms(scale: Any, softcap: Any, prefix: str = "") -> None:
    """Raises ValueError for a scale or softcap of logits outside its range."""
    also = ", or 'policy' for the policy's" if prefix else ""
    if not (_is_number(scale) and LEAST <= abs(scale) <= LARGEST):
        raise ValueError(f"{prefix}logit_scale: got {scale!r}, takes a finite number other than 0{also}")
    if softcap is not None and not (_is_number(softcap) and LEAST <= softcap <= LARGEST):
        raise ValueError(f"{prefix}softcap: got {softcap!r}, takes a positive finite number, None for none{also}")


def check_floating(**tensors: Any) -> None:
    """Raises TypeError where one is no dense tensor of a dtype that a loss can be computed in."""
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, takes float32, bfloat16, float16 or float64")


def check_tensors(**tensors: Any) -> None:
    """Raises TypeError where one is no dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            came = f"a {tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {came}, takes a dense tensor")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raises TypeError or ValueError where hidden (…, H), weight (V, H) and bias (V,) do not fit each other."""
    check_tensors(**{f"{prefix}weight": weight}, **({} if bias is None else {f"{prefix}bias": bias}))
    names = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias}
    for name, tensor in names.items():
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, takes {prefix}hidden's dtype, {hidden.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, takes {prefix}hidden's device, {hidden.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, takes (V, {hidden.shape[-1]})")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias: got shape {tuple(bias.shape)}, takes ({weight.shape[0]},)")


def check_tokens(hidden: Tensor, labels: Tensor, ref_hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises where the padded (2B, T, H) or packed (N, H) tensors do not fit each other."""
    bounds = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    check_tensors(hidden=hidden, labels=labels, ref_hidden=ref_hidden, **bounds)
    if hidden.is_meta:
        raise ValueError("hidden: got a tensor on meta, which holds no numbers, takes one on a device")
    dims, form = (3, "(2B, T, H)") if cu_seqlens is None else (2, "(N, H)")
    check_floating(hidden=hidden, ref_hidden=ref_hidden)
    for name, tensor in (("hidden", hidden), ("ref_hidden", ref_hidden)):
        if tensor.dim() != dims:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes {form}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, takes int64")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, takes {tuple(hidden.shape[:-1])}")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: got shape {tuple(ref_hidden.shape)}, takes {tuple(hidden.shape[:-1])} and its own H"
        )
    for name, other in (("labels", labels), ("ref_hidden", ref_hidden), ("cu_seqlens", cu_seqlens)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name}: got a tensor on {other.device}, takes hidden's device, {hidden.device}")
    if cu_seqlens is None:
        if hidden.shape[0] % 2:
            raise ValueError(f"hidden: got {hidden.shape[0]} rows, takes an even number, chosen then rejected")
    elif cu_seqlens.dim() != 1 or cu_seqlens.numel() % 2 == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, takes int32 or int64 (2B+1,)"
        )
    if (hidden.dtype == torch.float64) != (ref_hidden.dtype == torch.float64):
        raise TypeError(
            f"ref_hidden: got {ref_hidden.dtype} with hidden {hidden.dtype}, takes float64 with float64 only"
        )


def scored_lengths(
    labels: Tensor, cu_seqlens: Tensor, slices: Tensor, beta: Tensor, sequence_group: str | None = None
) -> tuple[list[int], list[int]]:
    """Scored tokens of each completion, read together with all checks on values: the call's one host read.

    Args:
        slices: (ranks, 3) of a slice of the vocabulary its words, and the tokens and bounds that its rank was given.
        sequence_group: over whose ranks the completions' tokens are spread, each rank having its own.

    Returns:
        2B lengths, or none where nothing at all is scored; and the slices' sizes.

    Raises:
        ValueError: a label outside [0, V), cu_seqlens that do not partition the tokens, a β that is not positive and
            finite, a pair with an empty completion, or ranks of a group that were not given the same pairs.
    """
    scored = labels != -100
    counts = torch.nn.functional.pad(scored.cumsum(0), (1, 0))
    counted = counts[cu_seqlens.clamp(0, labels.numel())]
    # 0 stands in where nothing is scored, and is a word of every vocabulary.
    words = torch.where(scored, labels, 0) if labels.numel() else labels.new_zeros(1)
    beta_bits = beta.to(labels.device, torch.float64).reshape(1).view(torch.int64)
    n_bounds, n_slices = len(cu_seqlens), len(slices)
    of_parts = parallel.gather((n_bounds,), sequence_group, labels.device)
    shapes = torch.cat((slices.T.flatten(), of_parts.flatten()))
    facts = torch.cat((cu_seqlens, counted, *(w[None] for w in words.aminmax()), beta_bits, shapes)).tolist()
    bounds, before = facts[:n_bounds], facts[n_bounds : 2 * n_bounds]
    least, most, bits = facts[2 * n_bounds : 2 * n_bounds + 3]
    told = facts[2 * n_bounds + 3 :]
    sizes, tokens, bounds_of_slices = (told[i * n_slices : (i + 1) * n_slices] for i in range(3))
    # Of what ranks exchange, all need as much.
    _check_ranks("sequence_group", told[3 * n_slices :])
    beta_read = struct.unpack("d", struct.pack("q", bits))[0]
    is_broken = bounds[0] != 0 or bounds[-1] != labels.numel() or bounds != sorted(bounds)
    is_unlike = len({*zip(tokens, bounds_of_slices, strict=True)}) > 1
    is_beta_bad = not (math.isfinite(beta_read) and beta_read > 0)
    outside = [label for label in (most, least) if not 0 <= label < sum(sizes)]
    own = [stop - start for start, stop in zip(before, before[1:], strict=False)]
    lengths, bad_ranks = own, 0
    if sequence_group is not None:
        # With the errors, so that no rank waits for one that has stopped.
        everywhere = labels.new_tensor([*own, is_broken or is_unlike or is_beta_bad or bool(outside)])
        parallel.sum_over(everywhere, sequence_group)
        *lengths, bad_ranks = everywhere.tolist()
    if is_unlike:
        _check_ranks("vocab_group", bounds_of_slices)
        raise ValueError(f"labels: got {tokens} tokens on the ranks of vocab_group, takes the same tokens on all")
    if is_broken:
        raise ValueError(f"cu_seqlens: got {bounds}, takes increasing bounds from 0 to {labels.numel()}")
    if is_beta_bad:
        raise ValueError(f"beta: got {beta_read}, takes a positive finite number")
    if outside:
        raise ValueError(f"labels: got {outside[0]}, takes [0, {sum(sizes)}) or -100")
    if bad_ranks:
        raise ValueError(f"labels, cu_seqlens or beta: refused on {bad_ranks} other ranks of sequence_group")
    pairs = len(lengths) // 2
    if sum(lengths) == 0:
        return [], sizes
    for i in range(pairs):
        for name, length in (("chosen", lengths[i]), ("rejected", lengths[pairs + i])):
            if length == 0:
                raise ValueError(f"labels: the {name} completion of pair {i} has no scored token, takes at least one")
    return own, sizes


def _check_ranks(group: str, bounds: list[int]) -> None:
    if len(set(bounds)) > 1:
        pairs = [n // 2 for n in bounds]
        raise ValueError(f"labels: got {pairs} pairs on the ranks of {group}, takes the same pairs on all")
