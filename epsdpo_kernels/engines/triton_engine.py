"""The tile operations as Triton kernels: from two tiles of logits to every pair's step in one launch.

The functions have the signatures and the results of ``torch_engine``; ``project_and_sweep`` needs no tiles at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from ..statistics import Tokens
from . import triton_blocks
from .triton_project import project_and_sweep
from .triton_sums import _arrive, _block_sums, _logits, _merge, _no_words, _store_sums

__all__ = ["gradient", "project_and_sweep", "sweep"]


@triton.jit(do_not_specialize=["first", "swept_stride", "pairs"])
def _sweep_kernel(
    a_ptr,  # (rows, V) the policy's x·Wᵀ
    b_ptr,  # (rows, V) the reference's
    a_stride,
    b_stride,
    bias_ptr,  # (V,) or None
    ref_bias_ptr,
    scale,
    softcap,  # None where there is none
    ref_scale,
    ref_softcap,
    epsilon,
    first,  # the token that row 0 is
    labels_ptr,  # (N,)
    completion_ptr,  # (N,)
    bounds_ptr,  # (2B+1,)
    arrived_ptr,  # (B,)
    swept_ptr,  # (SWEPT, N)
    swept_stride,
    sums_ptr,  # (TOKEN, B, 2)
    step_ptr,  # (B,)
    pairs,  # B
    vocabulary,  # V
    PERTURB: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    one = tl.arange(0, 1)
    a_ptr += row * a_stride
    b_ptr += row * b_stride
    sums = _no_words(1)
    for start in range(0, vocabulary, WORDS):
        columns = start + tl.arange(0, WORDS)[None, :]
        valid = columns < vocabulary
        a = tl.load(a_ptr + columns, mask=valid, other=0)
        b = tl.load(b_ptr + columns, mask=valid, other=0)
        a = _logits(a, bias_ptr, columns, valid, scale, softcap)
        b = _logits(b, ref_bias_ptr, columns, valid, ref_scale, ref_softcap)
        MASKED: tl.constexpr = bias_ptr is not None or ref_bias_ptr is not None
        sums = _merge(sums, _block_sums(a, b, valid, epsilon, MASKED, PERTURB))
    label = tl.load(labels_ptr + token + one)
    here = label >= 0  # not in another slice of the vocabulary
    a = _logits(tl.load(a_ptr + label, mask=here, other=0), bias_ptr, label, here, scale, softcap)
    b = _logits(tl.load(b_ptr + label, mask=here, other=0), ref_bias_ptr, label, here, ref_scale, ref_softcap)
    a, b = tl.where(here, a, -float("inf")), tl.where(here, b, -float("inf"))
    _store_sums(swept_ptr + token + one, swept_stride, one < 1, sums, a, b)
    _arrive(
        token, token + 1, completion_ptr, bounds_ptr, arrived_ptr, swept_ptr, swept_stride, sums_ptr, step_ptr, pairs,
        epsilon, TOKENS,
    )  # fmt: skip


def sweep(a: Tensor, b: Tensor, tile: slice, tokens: Tokens, policy: Head, reference: Head, epsilon: float) -> None:
    """Writes the sums of a tile's tokens, and reduces and decides every pair that they complete.

    Args:
        a: (rows, V) fp32, the policy's x·Wᵀ, kept.
        b: (rows, V) fp32, the reference's.
        tile: the tokens that the rows are. A negative label is in another slice of the vocabulary.
    """
    blocks = triton_blocks.row(triton_blocks.architecture(a.device))
    with torch.cuda.device_of(a):
        _sweep_kernel[(a.shape[0],)](
            a, b, a.stride(0), b.stride(0), policy.bias, reference.bias, policy.scale, policy.softcap, reference.scale,
            reference.softcap, epsilon, tile.start, tokens.labels, tokens.completion, tokens.bounds, tokens.arrived,
            tokens.swept, tokens.swept.stride(0), tokens.sums, tokens.step, len(tokens.step), a.shape[1],
            PERTURB=epsilon != 0, WORDS=blocks.words, TOKENS=blocks.tokens, num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "swept_stride"])
def _gradient_kernel(
    a_ptr,  # (rows, V) the policy's x·Wᵀ, overwritten
    out_ptr,  # (rows, V) in the same memory: the same tile, or 16-bit elements in the front half of each row
    a_stride,
    out_stride,
    bias_ptr,  # (V,) or None
    scale,
    softcap,  # None where there is none
    coefficient_ptr,  # (rows,)
    first,  # the token that row 0 is
    labels_ptr,  # (N,)
    swept_ptr,  # (SWEPT, N)
    swept_stride,
    vocabulary,  # V
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    a_ptr += row * a_stride
    out_ptr += row * out_stride
    label = tl.load(labels_ptr + token)
    top, total = tl.load(swept_ptr + token), tl.load(swept_ptr + swept_stride + token)
    minus = tl.load(coefficient_ptr + row) * tl.cast(scale, tl.float32)
    factor = minus / total
    for start in range(0, vocabulary, WORDS):
        columns = start + tl.arange(0, WORDS)
        valid = columns < vocabulary
        logits = _logits(tl.load(a_ptr + columns, mask=valid, other=0), bias_ptr, columns, valid, scale, softcap)
        g = tl.exp(logits - top) * factor - tl.where(columns == label, minus, 0)
        if softcap is not None:
            t = logits / tl.cast(softcap, tl.float32)
            g *= 1 - t * t
        # 16-bit stores of words start … start + WORDS − 1 cover what words below (start + WORDS)/2 were read from: in
        # the first block the block itself, in all others blocks before it. The barrier puts every thread's loads of
        # this block and of those before it ahead of any thread's stores; later blocks' words lie beyond them.
        tl.debug_barrier()
        tl.store(out_ptr + columns, g.to(out_ptr.dtype.element_ty), mask=valid)


def gradient(a: Tensor, tile: slice, tokens: Tokens, coefficient: Tensor, policy: Head) -> Tensor:
    """Overwrites the policy's tile by coefficient·(softmax(a) − onehot(label)), carried back through softcap and scale.

    Args:
        a: (rows, V) fp32, the policy's x·Wᵀ, as the sweep saw it, overwritten.
        tile: the tokens that the rows are.
        coefficient: (rows,) what multiplies p − onehot, sign included.

    Returns:
        (rows, V) the gradient of x·Wᵀ + bias in the policy's ``gradient_dtype``, in a's own memory.
    """
    dtype = policy.gradient_dtype
    out = a if dtype == a.dtype else a.view(dtype)[:, : a.shape[1]]
    blocks = triton_blocks.row(triton_blocks.architecture(a.device))
    with torch.cuda.device_of(a):
        _gradient_kernel[(a.shape[0],)](
            a, out, a.stride(0), out.stride(0), policy.bias, policy.scale, policy.softcap, coefficient, tile.start,
            tokens.labels, tokens.swept, tokens.swept.stride(0), a.shape[1], WORDS=blocks.words,
            num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip
    return out
