"""The single pass: how pairs are cut into tiles, and in which order a tile's loss and gradient are formed.

The gradient of the loss in a token's logits is ±c_i·(p − onehot), with one coefficient per pair. So a tile that holds
whole pairs is projected, swept, reduced, decided and turned into its own gradient while it is in memory, and no logit is
ever formed twice. A pair longer than a tile writes ±(p − onehot) unscaled, and is scaled when its last tile is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import statistics as st
from . import tiles_torch
from .head import Gradients, Head
from .pair import losses_and_coefficients, pair_beta, perturbation_step

IGNORE = -100
# Rows of the (PAIR, B) tensor that a pass returns.
(
    LOSS, STEP, BETA, CHOSEN_LOGP, REJECTED_LOGP, REF_CHOSEN_LOGP, REF_REJECTED_LOGP, CHOSEN_KL, REJECTED_KL,
    CHOSEN_ENTROPY, REJECTED_ENTROPY, PAIR_RELAXED_SHIFT, PAIR_TIGHTENED_SHIFT,
) = range(PAIR := 13)  # fmt: skip


class Series(NamedTuple):
    """Consecutive pairs that are decided together, and the tiles of their scored tokens."""

    pairs: range
    tiles: list[slice]


@dataclass(frozen=True)
class Layout:
    """Where the scored tokens are: a pair's chosen tokens, its rejected ones, then the next pair's."""

    order: Tensor  # (N,) int64, rows of the flattened input
    bounds: list[int]  # (2B+1,) completion j of [chosen_0, rejected_0, chosen_1, …] is order[bounds[j]:bounds[j+1]]
    series: list[Series]
    rows: int  # of the largest tile

    @property
    def n_pairs(self) -> int:
        return len(self.bounds) // 2


def lay_out(labels: Tensor, cu_seqlens: Tensor, lengths: list[int], max_rows: int) -> Layout:
    """Cuts scored tokens into tiles of at most ``max_rows``.

    Args:
        labels: (M,) int64, −100 where a row is not scored.
        cu_seqlens: (2B+1,) where completions begin and end in ``labels``, all chosen ones first.
        lengths: 2B numbers of scored tokens, on the host, in the same order.
    """
    n_pairs = len(lengths) // 2
    place = torch.arange(2 * n_pairs, device=labels.device)
    place = torch.where(place < n_pairs, 2 * place, 2 * (place - n_pairs) + 1)
    position = torch.arange(labels.numel(), device=labels.device)
    key = place[torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True).clamp_max(2 * n_pairs - 1)]
    key = torch.where(labels == IGNORE, 2 * n_pairs, key)
    order = torch.sort(key, stable=True).indices[: sum(lengths)]

    bounds = [0]
    for i in range(n_pairs):
        bounds += [bounds[-1] + lengths[i], bounds[-1] + lengths[i] + lengths[n_pairs + i]]
    series: list[Series] = []
    first = 0
    while first < n_pairs:
        start, last = bounds[2 * first], first + 1
        while last < n_pairs and bounds[2 * last + 2] - start <= max_rows:
            last += 1
        size = bounds[2 * last] - start
        count = -(-size // max_rows)
        cuts = [start + size * k // count for k in range(count + 1)]
        series.append(Series(range(first, last), [slice(*c) for c in zip(cuts, cuts[1:], strict=False)]))
        first = last
    rows = max((t.stop - t.start for s in series for t in s.tiles), default=0)
    return Layout(order, bounds, series, rows)


def rows_per_tile(vocabulary: int, hidden: int, itemsize: int, max_tile_bytes: int | None) -> int:
    """Rows of two (rows, V) tiles under the budget; by default 256 MiB, or as much as dW where that is more."""
    budget = max(256 << 20, vocabulary * hidden * 4) if max_tile_bytes is None else max_tile_bytes
    return max(1, budget // (2 * vocabulary * itemsize))


class Pass:
    """Two heads over one layout, with the buffers that all tiles share."""

    def __init__(
        self,
        x: Tensor,  # (M, H)
        ref_x: Tensor,  # (M, H_ref)
        labels: Tensor,  # (M,)
        head: Head,
        ref_head: Head,
        layout: Layout,
        epsilon: float,
    ):
        self.x, self.ref_x, self.head, self.ref_head = x, ref_x, head, ref_head
        self.layout, self.epsilon = layout, epsilon
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.labels = labels[layout.order]
        shape = (layout.rows, head.weight.shape[0])
        self._a, self._b = (torch.empty(shape, dtype=self.dtype, device=x.device) for _ in range(2))
        n = len(layout.order)
        self.swept = torch.empty(st.SWEPT, n, dtype=self.dtype, device=x.device)

    def project(self, tile: slice) -> tuple[Tensor, Tensor]:
        """The policy's logits of a tile and the hidden states they come from."""
        a = self._a[: tile.stop - tile.start]
        x = self.x.index_select(0, self.layout.order[tile])
        self.head.logits(x, a)
        return a, x

    def sweep(self, tile: slice, a: Tensor) -> None:
        b = self._b[: a.shape[0]]
        self.ref_head.logits(self.ref_x.index_select(0, self.layout.order[tile]), b)
        masked = self.head.bias is not None or self.ref_head.bias is not None
        tiles_torch.sweep(a, b, self.labels[tile], self.epsilon, masked, self.swept[:, tile])

    def gradient(
        self, tile: slice, a: Tensor, x: Tensor, coefficient: Tensor, into: Gradients, accumulate: bool
    ) -> None:
        """Turns a tile's logits into coefficient·(p − onehot) and adds what follows to ``into``."""
        swept = self.swept[:, tile]
        tiles_torch.gradient_(
            a, self.labels[tile], swept[st.MAX], swept[st.SUM], coefficient, self.head.scale, self.head.softcap
        )
        scratch = self._b[: a.shape[0]]
        self.head.backward(a, x, self.layout.order[tile], into, scratch, accumulate)

    def completions(self, pairs: range) -> Tensor:
        """Sums over tokens, (TOKEN, pairs, 2) with chosen and rejected in the last dimension; entropy is the mean.

        Each completion is summed by itself in float64, so a pair's figures do not depend on its neighbours.
        """
        bounds = self.layout.bounds[2 * pairs.start : 2 * pairs.stop + 1]
        tokens = st.token_statistics(self.swept[:, bounds[0] : bounds[-1]], self.epsilon)
        sums = tokens.new_empty(st.TOKEN, 2 * len(pairs), dtype=torch.float64)
        for j, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part = tokens[:, start - bounds[0] : stop - bounds[0]]
            torch.sum(part, 1, dtype=torch.float64, out=sums[:, j])
            sums[st.ENTROPY, j] /= stop - start
        return sums.view(st.TOKEN, len(pairs), 2)

    def coefficients(self, pairs: range, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Two (pairs,) vectors -> one value a token of these pairs."""
        bounds = self.layout.bounds[2 * pairs.start : 2 * pairs.stop + 1]
        lengths = torch.tensor([b - a for a, b in zip(bounds, bounds[1:], strict=False)])
        both = torch.stack((chosen, rejected), 1).flatten().to(self.dtype)
        return both.repeat_interleave(lengths.to(both.device), output_size=bounds[-1] - bounds[0])


def decide(sums: Tensor, beta: Tensor, epsilon: float, smoothing: float, out: Tensor) -> Tensor:
    """From (TOKEN, pairs, 2) sums to the rows of a pass's result, and the pairs' coefficients (pairs,)."""
    dtype = out.dtype
    shifts = [(sums[r, :, 0] - sums[r, :, 1]).to(dtype) for r in (st.RELAXED_SHIFT, st.TIGHTENED_SHIFT)]
    step = perturbation_step(*shifts)
    beta_i = pair_beta(step, beta, epsilon)
    logps = tuple(sums[r, :, k] for r in (st.LOGP, st.REF_LOGP) for k in (0, 1))
    losses, coefficient = losses_and_coefficients(logps, beta_i.double(), smoothing)
    finite = torch.isfinite(shifts[0]) & torch.isfinite(shifts[1])
    out[LOSS] = torch.where(finite, losses, torch.nan)
    out[STEP], out[BETA] = step, beta_i
    for row, (r, k) in zip(
        range(CHOSEN_LOGP, PAIR_RELAXED_SHIFT),
        [(r, k) for r in (st.LOGP, st.REF_LOGP, st.KL, st.ENTROPY) for k in (0, 1)],
        strict=True,
    ):
        out[row] = sums[r, :, k]
    out[PAIR_RELAXED_SHIFT], out[PAIR_TIGHTENED_SHIFT] = shifts
    return torch.where(finite, coefficient, torch.nan).to(dtype)


def single_pass(run: Pass, beta: Tensor, smoothing: float, into: Gradients) -> Tensor:
    """Everything of one call: (PAIR, B) results, and the gradients in ``into``, in units of β/B.

    The units keep 16-bit gradients of a small β from underflowing: whoever reads them multiplies by β/B once more,
    together with what backward receives.
    """
    layout = run.layout
    out = run.swept.new_empty(PAIR, layout.n_pairs)
    wanted = any(g is not None for g in into)
    accumulate = False
    for pairs, tiles in layout.series:
        part = out[:, pairs.start : pairs.stop]
        if len(tiles) == 1:
            a, x = run.project(tiles[0])
            run.sweep(tiles[0], a)
            coefficient = decide(run.completions(pairs), beta, run.epsilon, smoothing, part)
            if wanted:
                unit = coefficient / beta
                signed = run.coefficients(pairs, unit, -unit)
                run.gradient(tiles[0], a, x, signed, into, accumulate)
        else:
            own = _own_buffers(into, accumulate)
            one = run.swept.new_ones(1)
            sign = run.coefficients(pairs, one, -one)
            for k, tile in enumerate(tiles):
                a, x = run.project(tile)
                run.sweep(tile, a)
                if wanted:
                    begin = tile.start - tiles[0].start
                    # d logp/d logits is onehot − p, and the loss falls with the chosen log-prob: +(p − onehot).
                    signed = sign[begin : begin + tile.stop - tile.start]
                    run.gradient(tile, a, x, signed, own, k > 0)
            coefficient = decide(run.completions(pairs), beta, run.epsilon, smoothing, part)
            if wanted:
                rows = layout.order[tiles[0].start : tiles[-1].stop]
                _scale(own, into, rows, (coefficient / beta)[0])
        accumulate = True
    return out


def _own_buffers(into: Gradients, accumulate: bool) -> Gradients:
    """A long pair's own dW, which is the call's dW where nothing is in that yet."""
    if not accumulate:
        return into
    return Gradients(into.hidden, *(None if g is None else torch.empty_like(g) for g in into[1:]))


def _scale(own: Gradients, into: Gradients, rows: Tensor, coefficient: Tensor) -> None:
    if own.hidden is not None:
        for part in rows.split(1024):
            own.hidden.index_copy_(0, part, own.hidden.index_select(0, part).mul_(coefficient))
    for mine, all_pairs in zip(own[1:], into[1:], strict=True):
        if mine is all_pairs and mine is not None:
            mine.mul_(coefficient)
        elif mine is not None:
            all_pairs.addcmul_(mine, coefficient)
