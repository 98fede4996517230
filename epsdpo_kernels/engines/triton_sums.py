"""What the Triton kernels share: from x·Wᵀ to logits, from logits to a token's sums, from sums to a pair's step.

A token's sums are those of ``statistics``, and tuples of them are in its rows' order: MAX, SUM, REF_MAX, REF_SUM,
DIFFERENCE, RELAXED, TIGHTENED, CENTRED.

While a kernel walks over the vocabulary, each thread keeps sums of the words that it sees itself: a *lane*. Blocks of
logits are (DEPTH, LANES, WIDTH), a lane's words along the first and the last axis, so that adding a block to the sums
takes no exchange between threads. Lanes are joined once, at the end of a row, and slices of the vocabulary are merged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..head import Head

LOG2_E = tl.constexpr(1.4426950408889634)
# The largest |u| at which Taylor's polynomials are as good as fp32.
LARGEST_U = tl.constexpr(1.0)
# The maximum of no words, less than any logit, and what stands for a logit beyond the vocabulary. Unlike −inf they may
# be subtracted from each other: there e is 0, and so is a − b.
LEAST, BEYOND = tl.constexpr(-1e38), tl.constexpr(-2e38)


def transforms(head: Head) -> tuple[float | None, float | None]:
    """A head's scale and softcap as the kernels take them: None for a scale of 1, which costs nothing then."""
    return (None if head.scale == 1 else head.scale), head.softcap


@triton.jit
def _exp(x):
    """e^x. ``tl.exp`` takes four instructions more, to tell apart results below 1e-38."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _sinh_cosh_1(u):
    """sinh u and cosh u − 1 by Taylor's polynomials: what they leave out is below 3e-8 of them up to LARGEST_U."""
    square = u * u
    sinh = u * (1 + square * (1 / 6 + square * (1 / 120 + square * (1 / 5040 + square * (1 / 362880)))))
    cosh_1 = square * (1 / 2 + square * (1 / 24 + square * (1 / 720 + square * (1 / 40320 + square * (1 / 3628800)))))
    return sinh, cosh_1


@triton.jit
def _growth(e, x, u):
    """e·(e^u − 1) and e·(e^−u − 1) for e = e^x and any u, so that no digit is lost where u is small.

    Where u is large, a factor e^u of its own would overflow at a word whose e is nothing: 0·∞.
    """
    sinh, cosh_1 = _sinh_cosh_1(u)
    small = tl.abs(u) <= LARGEST_U
    grown = tl.where(small, e * (cosh_1 + sinh), _exp(x + u) - e)
    shrunk = tl.where(small, e * (cosh_1 - sinh), _exp(x - u) - e)
    return grown, shrunk


@triton.jit
def _tanh(x):
    """To 3e-7 of it: an odd polynomial (minimax up to 0.8), then 1 − 2/(1 + e^2|x|).

    The root's square is the reciprocal: one instruction and a product, where a division takes eight. libdevice has no
    place in the interpreter or on AMD.
    """
    square = x * x
    tail = -0.333329 + square * (0.133228 + square * (-0.0531763 + square * (0.0191908 + square * -0.00441088)))
    root = tl.rsqrt(1 + tl.exp2(tl.abs(x) * (2 * LOG2_E)))
    beyond = 1 - 2 * (root * root)
    return tl.where(tl.abs(x) < 0.8, x + x * (square * tail), tl.where(x < 0, -beyond, beyond))


@triton.jit
def _log1p(x):
    """log(1 + x) as 2·atanh(x / (2 + x)) where x is small: the shifts are of order ε, and so is their x."""
    s = x / (2 + x)
    square = s * s
    series = 2 * s * (1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1 + x))


@triton.jit
def _load_words(ptr, columns, valid):
    """What ``ptr`` has in these columns; ``valid`` is None where all of them are inside the vocabulary."""
    if valid is None:
        words = tl.load(ptr + columns)
    else:
        words = tl.load(ptr + columns, mask=valid, other=0)
    return words


@triton.jit
def _logits(
    products,  # x·Wᵀ, of any shape that columns broadcast to
    bias_ptr,  # (V,) or None
    columns,
    valid,  # columns < V, or None where all are
    scale,  # None where it is 1
    softcap,  # None where there is none
):
    """softcap·tanh(scale·(x·Wᵀ + bias) / softcap), BEYOND where not valid; NaN where an infinite product is capped."""
    logits = products
    if bias_ptr is not None:
        logits += _load_words(bias_ptr, columns, valid).to(tl.float32)
    if softcap is not None:
        # Multiplied by inverses that do not change from word to word.
        softcap = tl.cast(softcap, tl.float32)
        inverse = 1 / softcap
        if scale is not None:
            inverse *= tl.cast(scale, tl.float32)
        logits = softcap * _tanh(logits * inverse) + products * 0
    elif scale is not None:
        logits *= tl.cast(scale, tl.float32)
    if valid is not None:
        logits = tl.where(valid, logits, BEYOND)
    return logits


@triton.jit
def _slope(logits, softcap):
    """d softcap·tanh(z/softcap) / dz from its value."""
    if softcap is None:
        slope = 1.0
    else:
        t = logits * (1 / tl.cast(softcap, tl.float32))
        slope = 1 - t * t
    return slope


@triton.jit
def _no_words(LANES: tl.constexpr):
    """The sums of lanes that have seen no word, which merge as nothing."""
    zero = tl.zeros([LANES], tl.float32)
    return zero + LEAST, zero, zero + LEAST, zero, zero, zero, zero, zero


@triton.jit
def _lane_sum(block):
    """(DEPTH, LANES, WIDTH) -> (LANES,), within a thread."""
    return tl.sum(tl.sum(block, 2), 0)


@triton.jit
def _lane_max(block):
    return tl.max(tl.max(block, 2), 0)


@triton.jit
def _moved(sums, top, ref_top):
    """The same sums, relative to other maxima."""
    old_top, total, old_ref_top, ref_total, difference, relaxed, tightened, centred = sums
    shift = old_top - top
    r, ref_r = _exp(shift), _exp(old_ref_top - ref_top)
    moved = (centred + shift * total) * r
    return top, total * r, ref_top, ref_total * ref_r, difference * r, relaxed * r, tightened * r, moved


@triton.jit
def _merge(p, q):
    """The sums of two slices of a vocabulary together, as ``statistics.merge``."""
    top, ref_top = tl.maximum(p[0], q[0]), tl.maximum(p[2], q[2])
    p, q = _moved(p, top, ref_top), _moved(q, top, ref_top)
    return top, p[1] + q[1], ref_top, p[3] + q[3], p[4] + q[4], p[5] + q[5], p[6] + q[6], p[7] + q[7]


@triton.jit
def _words(a, b, top, MASKED: tl.constexpr):
    """x = a − max, e = e^x and d = a − b of a block.

    Where a bias may be −inf (MASKED), a word that the policy gives no probability counts for nothing: e, x and d are 0.
    """
    x, d = a - top[None, :, None], a - b
    e = _exp(x)
    if MASKED:
        x, d = tl.where(a == -float("inf"), 0, x), tl.where(a == -float("inf"), 0, d)
    return x, e, d


@triton.jit
def _exact_growth(a, b, top, epsilon, MASKED: tl.constexpr):
    """The lanes' Σ e·(e^u − 1) and Σ e·(e^−u − 1) of a block, whatever u = ε·d is: 2 × (LANES,)."""
    x, e, d = _words(a, b, top, MASKED)
    grown, shrunk = _growth(e, x, d * tl.cast(epsilon, tl.float32))
    return _lane_sum(grown), _lane_sum(shrunk)


@triton.jit
def _add_words(
    sums,
    a,
    b,  # (DEPTH, LANES, WIDTH) logits
    epsilon,
    MASKED: tl.constexpr,
    PERTURB: tl.constexpr,
    BY_BLOCK: tl.constexpr,  # whether lanes with a |u| beyond LARGEST_U are summed exactly here, or by the caller
):
    """The sums with a block of words added, and the lanes' largest |u| in it: 9 × (LANES,)."""
    top, ref_top = tl.maximum(sums[0], _lane_max(a)), tl.maximum(sums[2], _lane_max(b))
    _, total, _, ref_total, difference, relaxed, tightened, centred = _moved(sums, top, ref_top)
    x, e, d = _words(a, b, top, MASKED)
    total += _lane_sum(e)
    ref_total += _lane_sum(_exp(b - ref_top[None, :, None]))
    difference += _lane_sum(e * d)
    centred += _lane_sum(e * x)
    largest = tl.zeros_like(top)
    if PERTURB:
        u = d * tl.cast(epsilon, tl.float32)
        sinh, cosh_1 = _sinh_cosh_1(u)
        odd, even = _lane_sum(e * sinh), _lane_sum(e * cosh_1)
        grown, shrunk = even + odd, even - odd
        largest = _lane_max(tl.abs(u))
        if BY_BLOCK:
            # Whether or not a neighbour makes the program come here, a lane's own |u| chooses.
            if tl.max(largest) > LARGEST_U:
                exact = _exact_growth(a, b, top, epsilon, MASKED)
                grown = tl.where(largest > LARGEST_U, exact[0], grown)
                shrunk = tl.where(largest > LARGEST_U, exact[1], shrunk)
        relaxed += grown
        tightened += shrunk
    return top, total, ref_top, ref_total, difference, relaxed, tightened, centred, largest


@triton.jit
def _by_row(lanes, ROWS: tl.constexpr):
    """(LANES,) -> (ROWS, lanes of a row)."""
    return tl.reshape(lanes, [ROWS, lanes.shape[0] // ROWS])


@triton.jit
def _row_sum(products):
    """(ROWS, lanes of a row) -> (ROWS,), the same to the last bit in every thread that has a copy of a row's sum.

    Threads exchange what they add. Were a thread's own product fused with the addition, it alone would not be rounded:
    the copies would differ, and which of them is stored would be chance. Fused with a zero it is rounded, at no cost.
    """
    return tl.sum(products + 0.0, 1)


@triton.jit
def _join(sums, ROWS: tl.constexpr):
    """The sums of rows from those of their lanes, which are neighbours: 8 × (LANES,) -> 8 × (ROWS,)."""
    lanes_top, lanes_ref_top = _by_row(sums[0], ROWS), _by_row(sums[2], ROWS)
    top, ref_top = tl.max(lanes_top, 1), tl.max(lanes_ref_top, 1)
    lanes = (
        lanes_top,
        _by_row(sums[1], ROWS),
        lanes_ref_top,
        _by_row(sums[3], ROWS),
        _by_row(sums[4], ROWS),
        _by_row(sums[5], ROWS),
        _by_row(sums[6], ROWS),
        _by_row(sums[7], ROWS),
    )
    _, total, _, ref_total, difference, relaxed, tightened, centred = _moved(lanes, top[:, None], ref_top[:, None])
    return (
        top,
        _row_sum(total),
        ref_top,
        _row_sum(ref_total),
        _row_sum(difference),
        _row_sum(relaxed),
        _row_sum(tightened),
        _row_sum(centred),
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
        difference / total - (top - ref_top) - tl.log(total / ref_total),
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
