"""What the Triton kernels share: from x·Wᵀ to logits, from logits to a token's sums, from sums to a pair's step.

A token's sums are those of ``statistics``, and tuples of them are in its rows' order: MAX, SUM, REF_MAX, REF_SUM,
DIFFERENCE, RELAXED, TIGHTENED, CENTRED. A sweep is a chain of merges, of the words of a block into those before them,
and later of one split of the vocabulary into another: both are one function.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sinh_cosh_1(u):
    """sinh u and cosh u − 1 by their Taylor polynomials, which up to |u| = 1 are as good as fp32."""
    square = u * u
    sinh = u * (1 + square * (1 / 6 + square * (1 / 120 + square * (1 / 5040 + square * (1 / 362880)))))
    cosh_1 = square * (1 / 2 + square * (1 / 24 + square * (1 / 720 + square * (1 / 40320 + square * (1 / 3628800)))))
    return sinh, cosh_1


@triton.jit
def _growth(e, x, u):
    """e·(e^u − 1) and e·(e^−u − 1) for e = e^x, so that no digit is lost where u is small.

    Where u is large, a factor e^u of its own would overflow at a word whose e is nothing: 0·∞.
    """
    sinh, cosh_1 = _sinh_cosh_1(u)
    small = tl.abs(u) <= 1
    # Chosen by word: a branch for whole blocks would save exponentials, and keep every intermediate in registers.
    grown = tl.where(small, e * (cosh_1 + sinh), tl.exp(x + u) - e)
    shrunk = tl.where(small, e * (cosh_1 - sinh), tl.exp(x - u) - e)
    return grown, shrunk


@triton.jit
def _tanh(x):
    """From e^(−2|x|) − 1, which keeps the digits of a small x; libdevice has no place in the interpreter or on AMD."""
    u = -2 * tl.abs(x)
    sinh, cosh_1 = _sinh_cosh_1(u)
    minus = tl.where(u >= -1, cosh_1 + sinh, tl.exp(u) - 1)
    tanh = -minus / (2 + minus)
    return tl.where(x < 0, -tanh, tanh)


@triton.jit
def _log1p(x):
    """log(1 + x) as 2·atanh(x / (2 + x)) where x is small: the shifts are of order ε, and so is their x."""
    s = x / (2 + x)
    square = s * s
    series = 2 * s * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1 + x))


@triton.jit
def _logits(
    products,  # x·Wᵀ, of any shape that columns broadcast to
    bias_ptr,  # (V,) or None
    columns,
    valid,  # columns < V
    scale,
    softcap,  # None where there is none
):
    """softcap·tanh(scale·(x·Wᵀ + bias) / softcap)."""
    if bias_ptr is not None:
        products += tl.load(bias_ptr + columns, mask=valid, other=0).to(tl.float32)
    logits = products * tl.cast(scale, tl.float32)
    if softcap is not None:
        softcap = tl.cast(softcap, tl.float32)
        logits = softcap * _tanh(logits / softcap)
    return logits


@triton.jit
def _finite(top):
    """A maximum that may be subtracted: a slice without a possible word has −inf, and −inf − −inf is no number."""
    return tl.where(top == -float("inf"), 0, top)


@triton.jit
def _no_words(ROWS: tl.constexpr):
    """The sums of an empty slice, which merge as nothing."""
    zero = tl.zeros([ROWS], tl.float32)
    return zero - float("inf"), zero, zero - float("inf"), zero, zero, zero, zero, zero


@triton.jit
def _block_sums(
    a,
    b,  # (ROWS, WORDS) logits
    valid,  # (1, WORDS) false beyond the vocabulary
    epsilon,
    MASKED: tl.constexpr,  # a bias may be −inf: a word that the policy gives no probability counts for nothing
    PERTURB: tl.constexpr,
):
    """The sums of a block of words, each relative to the block's own maxima: 8 × (ROWS,)."""
    a, b = tl.where(valid, a, -float("inf")), tl.where(valid, b, -float("inf"))
    top, ref_top = tl.max(a, 1), tl.max(b, 1)
    centred, difference = a - _finite(top)[:, None], a - b
    e = tl.exp(centred)
    if MASKED:
        counted = a != -float("inf")
    else:
        counted = valid
    centred, difference = tl.where(counted, centred, 0), tl.where(counted, difference, 0)
    ref_total = tl.sum(tl.exp(b - _finite(ref_top)[:, None]), 1)
    relaxed = tl.zeros_like(ref_total)
    tightened = tl.zeros_like(ref_total)
    if PERTURB:
        grown, shrunk = _growth(e, centred, difference * tl.cast(epsilon, tl.float32))
        relaxed, tightened = tl.sum(grown, 1), tl.sum(shrunk, 1)
    return top, tl.sum(e, 1), ref_top, ref_total, tl.sum(e * difference, 1), relaxed, tightened, tl.sum(e * centred, 1)


@triton.jit
def _merge(p, q):
    """The sums of two slices of a vocabulary together, as ``statistics.merge``."""
    p_top, p_total, p_ref_top, p_ref_total, p_difference, p_relaxed, p_tightened, p_centred = p
    q_top, q_total, q_ref_top, q_ref_total, q_difference, q_relaxed, q_tightened, q_centred = q
    top, ref_top = tl.maximum(p_top, q_top), tl.maximum(p_ref_top, q_ref_top)
    p_shift, q_shift = p_top - _finite(top), q_top - _finite(top)
    r, s = tl.exp(p_shift), tl.exp(q_shift)
    ref_r, ref_s = tl.exp(p_ref_top - _finite(ref_top)), tl.exp(q_ref_top - _finite(ref_top))
    p_moved = tl.where(r > 0, p_centred + p_shift * p_total, 0)
    q_moved = tl.where(s > 0, q_centred + q_shift * q_total, 0)
    return (
        top,
        p_total * r + q_total * s,
        ref_top,
        p_ref_total * ref_r + q_ref_total * ref_s,
        p_difference * r + q_difference * s,
        p_relaxed * r + q_relaxed * s,
        p_tightened * r + q_tightened * s,
        p_moved * r + q_moved * s,
    )


@triton.jit
def _store_sums(ptr, stride, mask, sums, label, ref_label):
    """Ten (ROWS,) into the rows of a (SWEPT, …) tensor; ``ptr`` is (ROWS,), in its first row."""
    for i in tl.static_range(8):
        tl.store(ptr + i * stride, sums[i], mask=mask)
    tl.store(ptr + 8 * stride, label, mask=mask)
    tl.store(ptr + 9 * stride, ref_label, mask=mask)


@triton.jit
def _load(ptr, mask):
    """What other programs have written: from L2, because L1 may hold an older value."""
    return tl.load(ptr, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def _load_sums(ptr, stride, mask):
    """The first eight rows that :func:`_store_sums` wrote."""
    return (
        _load(ptr, mask),
        _load(ptr + stride, mask),
        _load(ptr + 2 * stride, mask),
        _load(ptr + 3 * stride, mask),
        _load(ptr + 4 * stride, mask),
        _load(ptr + 5 * stride, mask),
        _load(ptr + 6 * stride, mask),
        _load(ptr + 7 * stride, mask),
    )


@triton.jit
def _token_statistics(sums, label, ref_label, epsilon):
    """``statistics.token_statistics``, in the order of its rows: 7 × (TOKENS,), the last bool."""
    top, total, ref_top, ref_total, difference, relaxed, tightened, centred = sums
    log_sum, ref_log_sum = tl.log(total), tl.log(ref_total)
    u = tl.cast(epsilon, tl.float32) * (label - ref_label)
    return (
        label - top - log_sum,
        ref_label - ref_top - ref_log_sum,
        u - _log1p(relaxed / total),
        -u - _log1p(tightened / total),
        difference / total - (top - ref_top) - (log_sum - ref_log_sum),
        log_sum - centred / total,
        label >= top,
    )


@triton.jit
def _reduce_pair(
    pair,
    swept_ptr,  # (SWEPT, N)
    swept_stride,
    bounds_ptr,  # (2B+1,)
    sums_ptr,  # (TOKEN, B, 2)
    step_ptr,  # (B,)
    pairs,  # B
    epsilon,
    TOKENS: tl.constexpr,
):
    """Sums a pair's tokens in float64 and decides: ``statistics.reduce_pairs`` and ``pair.perturbation_step``.

    One program goes through the tokens in their order, so it does not matter which program that is.
    """
    relaxed_shift = tl.full([], 0, tl.float64)
    tightened_shift = tl.full([], 0, tl.float64)
    for side in range(2):
        start, stop = tl.load(bounds_ptr + 2 * pair + side), tl.load(bounds_ptr + 2 * pair + side + 1)
        zero = tl.zeros([TOKENS], tl.float64)
        logp, ref_logp, relaxed, tightened, kl, entropy = zero, zero, zero, zero, zero, zero
        # A count, exact in fp32 up to 2²⁴. In float64 or int32 it spills on sm_100.
        correct = tl.zeros([TOKENS], tl.float32)
        for first in range(start, stop, TOKENS):
            token = first + tl.arange(0, TOKENS)
            mask = token < stop
            ptr = swept_ptr + token
            sums = _load_sums(ptr, swept_stride, mask)
            label, ref_label = _load(ptr + 8 * swept_stride, mask), _load(ptr + 9 * swept_stride, mask)
            of_token = _token_statistics(sums, label, ref_label, epsilon)
            logp += tl.where(mask, of_token[0], 0).to(tl.float64)
            ref_logp += tl.where(mask, of_token[1], 0).to(tl.float64)
            relaxed += tl.where(mask, of_token[2], 0).to(tl.float64)
            tightened += tl.where(mask, of_token[3], 0).to(tl.float64)
            kl += tl.where(mask, of_token[4], 0).to(tl.float64)
            entropy += tl.where(mask, of_token[5], 0).to(tl.float64)
            correct += tl.where(mask & of_token[6], 1.0, 0.0)
        out_ptr = sums_ptr + 2 * pair + side
        relaxed_sum, tightened_sum = tl.sum(relaxed), tl.sum(tightened)
        tl.store(out_ptr, tl.sum(logp))
        tl.store(out_ptr + 2 * pairs, tl.sum(ref_logp))
        tl.store(out_ptr + 4 * pairs, relaxed_sum)
        tl.store(out_ptr + 6 * pairs, tightened_sum)
        tl.store(out_ptr + 8 * pairs, tl.sum(kl))
        count = (stop - start).to(tl.float64)
        tl.store(out_ptr + 10 * pairs, tl.sum(entropy) / count)
        tl.store(out_ptr + 12 * pairs, tl.sum(correct).to(tl.float64) / count)
        sign = 1 - 2 * side
        relaxed_shift += sign * relaxed_sum
        tightened_shift += sign * tightened_sum
    relax = (relaxed_shift > 0) & (tightened_shift < 0)
    tighten = (relaxed_shift < 0) & (tightened_shift > 0)
    finite = (tl.abs(relaxed_shift) < float("inf")) & (tl.abs(tightened_shift) < float("inf"))
    step = tl.where(finite, relax.to(tl.int32) - tighten.to(tl.int32), 0)
    tl.store(step_ptr + pair, step.to(tl.int8))


@triton.jit
def _arrive(
    first,
    stop,  # this program has written the sums of tokens first … stop − 1
    completion_ptr,  # (N,)
    bounds_ptr,  # (2B+1,)
    arrived_ptr,  # (B,) tokens of each pair that are swept, also by earlier launches
    swept_ptr,  # (SWEPT, N)
    swept_stride,
    sums_ptr,  # (TOKEN, B, 2)
    step_ptr,  # (B,)
    pairs,  # B
    epsilon,
    TOKENS: tl.constexpr,
):
    """Counts the program's tokens as swept; the program that completes a pair reduces and decides it.

    Why that program sees all sums: each program's stores come before its barrier, hence before the atomic that one of
    its threads does, which releases them. The atomics on one counter are a chain of read-modify-writes, each of which
    acquires what all before it released. So the last has acquired everything, and the barrier that hands its result
    to the program's other threads comes before their loads.
    """
    tl.debug_barrier()
    for pair in range(tl.load(completion_ptr + first) // 2, tl.load(completion_ptr + stop - 1) // 2 + 1):
        start, end = tl.load(bounds_ptr + 2 * pair), tl.load(bounds_ptr + 2 * pair + 2)
        count = (tl.minimum(end, stop) - tl.maximum(start, first)).to(tl.int32)
        before = tl.atomic_add(arrived_ptr + pair, count, sem="acq_rel", scope="gpu")
        if before + count == end - start:
            _reduce_pair(pair, swept_ptr, swept_stride, bounds_ptr, sums_ptr, step_ptr, pairs, epsilon, TOKENS)
