"""The head and the sweep in one Triton kernel: no logit of either model reaches memory.

A program takes a block of rows and one split of the vocabulary, and keeps two accumulators, the policy's and the
reference's, for a block of words at a time. The last split of a row block to finish merges all of them in their order,
and the last row block of a pair reduces and decides it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head import Head
from ..statistics import SWEPT, Tokens
from . import triton_blocks
from .triton_sums import (
    _add_words,
    _arrive,
    _by_row,
    _join,
    _lane_max,
    _load,
    _load_sums,
    _logits,
    _merge,
    _no_words,
    _store_sums,
    transforms,
)


@triton.jit
def _load_tile(source, start, k, rows, hidden, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr):
    """(ROWS, HIDDEN) of a (rows, hidden) matrix from (start, k), zero beyond it."""
    if DESCRIPTORS:
        tile = source.load([start, k])
    else:
        row, column = start + tl.arange(0, ROWS)[:, None], k + tl.arange(0, HIDDEN)[None, :]
        tile = tl.load(source + row.to(tl.int64) * hidden + column, mask=(row < rows) & (column < hidden), other=0)
    return tile


@triton.jit
def _product(
    x,
    weight,
    row,
    word,
    rows,
    vocabulary,
    hidden,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """(ROWS, WORDS) of x·Wᵀ, accumulated in fp32."""
    products = tl.zeros([ROWS, WORDS], tl.float32)
    for k in range(0, hidden, HIDDEN):
        x_tile = _load_tile(x, row, k, rows, hidden, DESCRIPTORS, ROWS, HIDDEN)
        w_tile = _load_tile(weight, word, k, vocabulary, hidden, DESCRIPTORS, WORDS, HIDDEN)
        products = tl.dot(x_tile, w_tile.T, products, input_precision="ieee")
    return products


@triton.jit
def _products_of_shared_head(
    x,
    ref_x,
    weight,
    row,
    word,
    rows,
    vocabulary,
    hidden,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Two (ROWS, WORDS), with every tile of the head loaded once."""
    products = tl.zeros([ROWS, WORDS], tl.float32)
    ref_products = tl.zeros([ROWS, WORDS], tl.float32)
    for k in range(0, hidden, HIDDEN):
        w_tile = _load_tile(weight, word, k, vocabulary, hidden, DESCRIPTORS, WORDS, HIDDEN).T
        x_tile = _load_tile(x, row, k, rows, hidden, DESCRIPTORS, ROWS, HIDDEN)
        products = tl.dot(x_tile, w_tile, products, input_precision="ieee")
        ref_tile = _load_tile(ref_x, row, k, rows, hidden, DESCRIPTORS, ROWS, HIDDEN)
        ref_products = tl.dot(ref_tile, w_tile, ref_products, input_precision="ieee")
    return products, ref_products


@triton.jit
def _by_lane(block, SHARE: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WORDS) of a product in the shape that _add_words takes; a row's SHARE lanes are neighbours.

    The words of a row go to its lanes in turn, WIDTH at a time: so does the matrix unit hand them to its threads.
    """
    ROWS: tl.constexpr = block.shape[0]
    DEPTH: tl.constexpr = block.shape[1] // (SHARE * WIDTH)
    block = tl.permute(tl.reshape(block, [ROWS, DEPTH, SHARE, WIDTH]), [1, 0, 2, 3])
    return tl.reshape(block, [DEPTH, ROWS * SHARE, WIDTH])


@triton.jit(do_not_specialize=["first", "rows", "swept_stride", "pairs"])
def _project_kernel(
    x,  # (rows, H), a descriptor of blocks or a pointer, as the next three
    weight,  # (V, H)
    ref_x,  # (rows, H_ref)
    ref_weight,  # (V, H_ref)
    rows,
    vocabulary,  # V
    hidden,  # H
    ref_hidden,  # H_ref
    bias_ptr,  # (V,) or None
    ref_bias_ptr,
    scale,  # None where it is 1
    softcap,  # None where there is none
    ref_scale,
    ref_softcap,
    epsilon,
    a_ptr,  # (rows, V) fp32, takes the policy's x·Wᵀ; None where nobody needs it
    a_stride,
    part_ptr,  # (splits, SWEPT, rows) fp32
    finished_ptr,  # (row blocks,) int32, zero: splits that are done
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
    PERTURB: tl.constexpr,
    SHARED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,  # row blocks
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # The row blocks of a group run side by side through one split after the other: their hidden states stay in L2, and
    # what they read of the head there serves all of them.
    row_blocks = tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // (GROUP * SPLITS)
    width = tl.minimum(row_blocks - group * GROUP, GROUP)
    of_group = tl.program_id(0) % (GROUP * SPLITS)
    split, block = of_group // width, group * GROUP + of_group % width
    top_row = block * ROWS
    row = top_row + tl.arange(0, ROWS)
    inside = row < rows
    row, token = row.to(tl.int64), first.to(tl.int64) + row
    label = tl.load(labels_ptr + token, mask=inside, other=-1).to(tl.int32)[:, None]
    share = tl.cdiv(tl.cdiv(vocabulary, WORDS), SPLITS) * WORDS
    MASKED: tl.constexpr = bias_ptr is not None or ref_bias_ptr is not None

    sums = _no_words(ROWS * SHARE)
    # A label is in one lane of its row, and −inf in the others.
    of_label = tl.full([ROWS * SHARE], -float("inf"), tl.float32)
    ref_of_label = of_label
    for word in range(split * share, tl.minimum(split * share + share, vocabulary), WORDS):
        if SHARED:
            a, b = _products_of_shared_head(
                x, ref_x, weight, top_row, word, rows, vocabulary, hidden, DESCRIPTORS, ROWS, WORDS, HIDDEN
            )
        else:
            a = _product(x, weight, top_row, word, rows, vocabulary, hidden, DESCRIPTORS, ROWS, WORDS, HIDDEN)
            b = _product(
                ref_x, ref_weight, top_row, word, rows, vocabulary, ref_hidden, DESCRIPTORS, ROWS, WORDS, HIDDEN
            )
        columns = word + tl.arange(0, WORDS)[None, :]
        valid = columns < vocabulary
        if a_ptr is not None:
            tl.store(a_ptr + row[:, None] * a_stride + columns, a, mask=inside[:, None] & valid)
        a = _logits(a, bias_ptr, columns, valid, scale, softcap)
        b = _logits(b, ref_bias_ptr, columns, valid, ref_scale, ref_softcap)
        here = columns == label
        of_label = tl.maximum(of_label, _lane_max(_by_lane(tl.where(here, a, -float("inf")), SHARE, WIDTH)))
        ref_of_label = tl.maximum(ref_of_label, _lane_max(_by_lane(tl.where(here, b, -float("inf")), SHARE, WIDTH)))
        a, b = _by_lane(a, SHARE, WIDTH), _by_lane(b, SHARE, WIDTH)
        sums = _add_words(sums, a, b, epsilon, MASKED, PERTURB, True)[:8]
    sums = _join(sums, ROWS)
    of_label, ref_of_label = tl.max(_by_row(of_label, ROWS), 1), tl.max(_by_row(ref_of_label, ROWS), 1)

    # Offsets into the parts may pass 2³¹ as well: row is int64.
    part_ptr += row
    _store_sums(part_ptr + split.to(tl.int64) * 10 * rows, rows, inside, sums, of_label, ref_of_label)
    # The memory order is that of _arrive, once for the splits of a row block and once for the row blocks of a pair.
    tl.debug_barrier()
    if tl.atomic_add(finished_ptr + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        sums = _no_words(ROWS)
        of_label = tl.full([ROWS], -float("inf"), tl.float32)
        ref_of_label = of_label
        for _ in range(SPLITS):
            sums = _merge(sums, _load_sums(part_ptr, rows, inside))
            of_label = tl.maximum(of_label, _load(part_ptr + 8 * rows, inside))
            ref_of_label = tl.maximum(ref_of_label, _load(part_ptr + 9 * rows, inside))
            part_ptr += 10 * rows
        _store_sums(swept_ptr + token, swept_stride, inside, sums, of_label, ref_of_label)
        start = first.to(tl.int64) + top_row
        _arrive(
            start, tl.minimum(start + ROWS, first.to(tl.int64) + rows), completion_ptr, bounds_ptr, arrived_ptr,
            swept_ptr, swept_stride, sums_ptr, step_ptr, pairs, epsilon, TOKENS,
        )  # fmt: skip


def project_and_sweep(
    x: Tensor,
    ref_x: Tensor,
    tile: slice,
    tokens: Tokens,
    policy: Head,
    reference: Head,
    epsilon: float,
    a: Tensor | None = None,
) -> None:
    """Head and sweep of both models: all that ``sweep`` writes, from hidden states.

    Args:
        x: (rows, H) the policy's hidden states, in its weight's dtype.
        ref_x: (rows, H_ref) the reference's.
        tile: the tokens that the rows are.
        a: (rows, V) fp32, takes the policy's x·Wᵀ, for :func:`triton_engine.gradient`.
    """
    weight, ref_weight = policy.weight, reference.weight
    assert all(m.is_contiguous() for m in (x, weight, ref_x, ref_weight)), "the caller makes them so, once a call"
    shared = weight.data_ptr() == ref_weight.data_ptr() and weight.shape == ref_weight.shape
    matrices = [x, weight, ref_x, ref_weight]
    if triton_blocks.INTERPRETED:  # where products of bf16 come out wrong
        matrices = [m.float() if m.dtype == torch.bfloat16 else m for m in matrices]
    (rows, hidden), ref_hidden = x.shape, ref_x.shape[1]
    arch = triton_blocks.architecture(x.device)
    descriptors = triton_blocks.descriptors(arch, matrices)
    blocks = triton_blocks.product(arch, max(x.element_size(), ref_x.element_size()), descriptors)
    if descriptors:
        sizes = (blocks.rows, blocks.words, blocks.rows, blocks.words)
        matrices = [
            TensorDescriptor.from_tensor(m, [size, blocks.hidden]) for m, size in zip(matrices, sizes, strict=True)
        ]
    splits, row_blocks = triton_blocks.splits(arch), triton.cdiv(rows, blocks.rows)
    parts = torch.empty(splits, SWEPT, rows, dtype=torch.float32, device=x.device)
    finished = torch.zeros(row_blocks, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _project_kernel[(row_blocks * splits,)](
            *matrices, rows, weight.shape[0], hidden, ref_hidden, policy.bias, reference.bias, *transforms(policy),
            *transforms(reference), epsilon, a, 0 if a is None else a.stride(0), parts, finished, tile.start,
            tokens.labels, tokens.completion, tokens.bounds, tokens.arrived, tokens.swept, tokens.swept.stride(0),
            tokens.sums, tokens.step, len(tokens.step), PERTURB=epsilon != 0, SHARED=shared, DESCRIPTORS=descriptors,
            SPLITS=splits, GROUP=triton_blocks.GROUP, ROWS=blocks.rows, WORDS=blocks.words, HIDDEN=blocks.hidden,
            SHARE=blocks.share, WIDTH=blocks.width, TOKENS=triton_blocks.row(arch).tokens, num_warps=blocks.warps,
            num_stages=blocks.stages,
        )  # fmt: skip
