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
from .triton_sums import (
    LARGEST_U,
    _add_words,
    _arrive,
    _exact_growth,
    _exp,
    _join,
    _load_words,
    _logits,
    _no_words,
    _slope,
    _store_sums,
    transforms,
)

__all__ = ["gradient", "project_and_sweep", "scaled", "sweep"]

# Words of a load of 16 bytes.
WIDTH = tl.constexpr(4)


@triton.jit
def _load_block(
    ptr,  # a row of x·Wᵀ
    bias_ptr,
    start,
    vocabulary,
    scale,
    softcap,
    EDGE: tl.constexpr,  # whether the vocabulary may end in this block
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """(DEPTH, LANES, WIDTH) logits of consecutive words; what a thread loads it keeps."""
    columns = tl.max_contiguous(start + tl.arange(0, DEPTH * LANES * WIDTH), WIDTH)
    if EDGE:
        valid = columns < vocabulary
    else:
        valid = None
    logits = _logits(_load_words(ptr, columns, valid), bias_ptr, columns, valid, scale, softcap)
    return tl.reshape(logits, [DEPTH, LANES, WIDTH])


@triton.jit(do_not_specialize=["first", "swept_stride", "pairs"])
def _sweep_kernel(
    a_ptr,  # (rows, V) the policy's x·Wᵀ
    b_ptr,  # (rows, V) the reference's
    a_stride,
    b_stride,
    bias_ptr,  # (V,) or None
    ref_bias_ptr,
    scale,  # None where it is 1
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
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    one = tl.arange(0, 1)
    a_ptr += row * a_stride
    b_ptr += row * b_stride
    WORDS: tl.constexpr = DEPTH * LANES * WIDTH
    MASKED: tl.constexpr = bias_ptr is not None or ref_bias_ptr is not None
    whole = vocabulary // WORDS * WORDS
    sums = _no_words(LANES)
    largest = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, WORDS):
        a = _load_block(a_ptr, bias_ptr, start, vocabulary, scale, softcap, False, DEPTH, LANES)
        b = _load_block(b_ptr, ref_bias_ptr, start, vocabulary, ref_scale, ref_softcap, False, DEPTH, LANES)
        added = _add_words(sums, a, b, epsilon, MASKED, PERTURB, False)
        sums, largest = added[:8], tl.maximum(largest, added[8])
    if whole < vocabulary:
        a = _load_block(a_ptr, bias_ptr, whole, vocabulary, scale, softcap, True, DEPTH, LANES)
        b = _load_block(b_ptr, ref_bias_ptr, whole, vocabulary, ref_scale, ref_softcap, True, DEPTH, LANES)
        added = _add_words(sums, a, b, epsilon, MASKED, PERTURB, False)
        sums, largest = added[:8], tl.maximum(largest, added[8])
    if PERTURB:
        if tl.max(largest) > LARGEST_U:
            # A row with a word beyond the polynomials, which hardly any has, is gone through once more.
            relaxed = tl.zeros([LANES], tl.float32)
            tightened = tl.zeros([LANES], tl.float32)
            for start in range(0, vocabulary, WORDS):
                a = _load_block(a_ptr, bias_ptr, start, vocabulary, scale, softcap, True, DEPTH, LANES)
                b = _load_block(b_ptr, ref_bias_ptr, start, vocabulary, ref_scale, ref_softcap, True, DEPTH, LANES)
                grown, shrunk = _exact_growth(a, b, sums[0], epsilon, MASKED)
                relaxed += grown
                tightened += shrunk
            sums = sums[:5] + (relaxed, tightened) + sums[7:]
    label = tl.load(labels_ptr + token + one)
    here = label >= 0  # not in another slice of the vocabulary
    a = _logits(tl.load(a_ptr + label, mask=here, other=0), bias_ptr, label, here, scale, softcap)
    b = _logits(tl.load(b_ptr + label, mask=here, other=0), ref_bias_ptr, label, here, ref_scale, ref_softcap)
    a, b = tl.where(here, a, -float("inf")), tl.where(here, b, -float("inf"))
    _store_sums(swept_ptr + token + one, swept_stride, one < 1, _join(sums, 1), a, b)
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
            a, b, a.stride(0), b.stride(0), policy.bias, reference.bias, *transforms(policy), *transforms(reference),
            epsilon, tile.start, tokens.labels, tokens.completion, tokens.bounds, tokens.arrived, tokens.swept,
            tokens.swept.stride(0), tokens.sums, tokens.step, len(tokens.step), a.shape[1], PERTURB=epsilon != 0,
            LANES=blocks.lanes, DEPTH=blocks.depth, TOKENS=blocks.tokens, num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    out_ptr,
    a_ptr,
    bias_ptr,
    start,
    vocabulary,
    scale,
    softcap,
    top,
    factor,
    EDGE: tl.constexpr,  # whether the vocabulary may end in this block
    WORDS: tl.constexpr,
):
    """factor·e^(logit − top), carried back through softcap, of WORDS consecutive words."""
    columns = start + tl.arange(0, WORDS)
    if EDGE:
        valid = columns < vocabulary
    else:
        valid = None
    logits = _logits(_load_words(a_ptr, columns, valid), bias_ptr, columns, valid, scale, softcap)
    g = (_exp(logits - top) * factor * _slope(logits, softcap)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + columns, g, mask=valid)


@triton.jit(do_not_specialize=["first", "swept_stride"])
def _gradient_kernel(
    a_ptr,  # (rows, V) the policy's x·Wᵀ
    out_ptr,  # (rows, V), which may be a
    a_stride,
    out_stride,
    bias_ptr,  # (V,) or None
    scale,  # None where it is 1
    softcap,  # None where there is none
    coefficient_ptr,  # (2B,)
    first,  # the token that row 0 is
    labels_ptr,  # (N,)
    completion_ptr,  # (N,)
    swept_ptr,  # (SWEPT, N)
    swept_stride,
    vocabulary,  # V
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    a_ptr += row * a_stride
    out_ptr += row * out_stride
    swept_ptr += token
    top, total = tl.load(swept_ptr), tl.load(swept_ptr + swept_stride)
    minus = tl.load(coefficient_ptr + tl.load(completion_ptr + token))
    if scale is not None:
        minus *= tl.cast(scale, tl.float32)
    factor = minus / total
    whole = vocabulary // WORDS * WORDS
    for start in range(0, whole, WORDS):
        _store_gradient(out_ptr, a_ptr, bias_ptr, start, vocabulary, scale, softcap, top, factor, False, WORDS)
    if whole < vocabulary:
        _store_gradient(out_ptr, a_ptr, bias_ptr, whole, vocabulary, scale, softcap, top, factor, True, WORDS)
    label = tl.load(labels_ptr + token)
    if label >= 0:  # not in another slice of the vocabulary
        # The label's word once more, with its onehot. Whoever stored it above has done so before the barrier.
        logit = tl.load(swept_ptr + 8 * swept_stride)
        g = (_exp(logit - top) * factor - minus) * _slope(logit, softcap)
        tl.debug_barrier()
        tl.store(out_ptr + label, g.to(out_ptr.dtype.element_ty))


def gradient(a: Tensor, tile: slice, tokens: Tokens, coefficient: Tensor, policy: Head, out: Tensor) -> None:
    """Writes coefficient·(softmax(a) − onehot(label)), carried back through softcap and scale.

    Args:
        a: (rows, V) fp32, the policy's x·Wᵀ, as the sweep saw it; not to be read afterwards.
        tile: the tokens that the rows are.
        coefficient: (2B,) what multiplies p − onehot in a completion, sign included.
        out: (rows, V) takes the gradient of x·Wᵀ + bias: a itself, or a tile in the policy's ``gradient_dtype``.
    """
    blocks = triton_blocks.row(triton_blocks.architecture(a.device))
    with torch.cuda.device_of(a):
        _gradient_kernel[(a.shape[0],)](
            a, out, a.stride(0), out.stride(0), policy.bias, *transforms(policy), coefficient, tile.start,
            tokens.labels, tokens.completion, tokens.swept, tokens.swept.stride(0), a.shape[1], WORDS=blocks.words,
            num_warps=blocks.warps, num_stages=1,
        )  # fmt: skip


@triton.jit
def _scale_kernel(
    g_ptr,  # (elements,)
    factor_ptr,  # ()
    out_ptr,  # (elements,)
    elements,
    WORDS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = place < elements
    scaled = tl.load(g_ptr + place, mask=inside) * tl.load(factor_ptr)
    tl.store(out_ptr + place, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def scaled(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """g·factor in another dtype, rounded once: contiguous g in fp32 and a () factor there.

    torch's own product takes twice as long, because it takes neither a factor on the device nor a cast by vectors.
    """
    blocks = triton_blocks.row(triton_blocks.architecture(g.device))
    out = torch.empty_like(g, dtype=dtype)
    with torch.cuda.device_of(g):
        _scale_kernel[(triton.cdiv(g.numel(), blocks.words),)](
            g, factor, out, g.numel(), WORDS=blocks.words, num_warps=blocks.warps
        )
    return out
