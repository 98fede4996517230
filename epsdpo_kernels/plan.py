"""The single pass: how pairs are cut into tiles, and in which order a tile's loss and gradient are formed.

The gradient of the loss in a token's logits is ±c_i·(p − onehot), with one coefficient per pair. So a tile that holds
whole pairs is projected, swept, reduced, decided and turned into its own gradient while it is in memory, and no logit
is ever formed twice. A pair longer than a tile writes ±(p − onehot) unscaled, and is scaled when its last tile is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import parallel
from . import statistics as st
from .head import Gradients, Head
from .pair import losses_and_coefficients, pair_beta, withhold_relaxation
from .statistics import Tokens

IGNORE = -100
# Rows of the (PAIR, B) tensor that a pass returns.
(
    LOSS, STEP, BETA, CHOSEN_LOGP, REJECTED_LOGP, REF_CHOSEN_LOGP, REF_REJECTED_LOGP, CHOSEN_KL, REJECTED_KL,
    CHOSEN_ENTROPY, REJECTED_ENTROPY, CHOSEN_ACCURACY, REJECTED_ACCURACY, PAIR_RELAXED_SHIFT, PAIR_TIGHTENED_SHIFT,
    VETOED,
) = range(PAIR := 16)  # fmt: skip


class Decision(NamedTuple):
    """What a pair's β and loss depend on beside its log-probs."""

    beta: Tensor  # () the running β
    smoothing: float
    max_entropy: float | None
    max_kl: float | None


class Series(NamedTuple):
    """Consecutive pairs that are decided together, and the tiles of their scored tokens."""

    pairs: range
    tiles: list[slice]


@dataclass(frozen=True)
class Layout:
    """Where the scored tokens are: a pair's chosen tokens, its rejected ones, then the next pair's."""

    order: Tensor  # (N,) int64, rows of the flattened input
    bounds: Tensor  # (2B+1,) int64, completion j of [chosen_0, rejected_0, chosen_1, …] is order[bounds[j]:bounds[j+1]]
    edges: list[int]  # the same on the host
    series: list[Series]
    rows: int  # of the largest tile

    @property
    def n_pairs(self) -> int:
        return len(self.edges) // 2


def lay_out(labels: Tensor, cu_seqlens: Tensor, lengths: list[int], max_rows: int, alone: bool = False) -> Layout:
    """Cuts scored tokens into tiles of at most ``max_rows``. What it puts on the device is formed there.

    Args:
        labels: (M,) int64, −100 where a row is not scored.
        cu_seqlens: (2B+1,) where completions begin and end in ``labels``, all chosen ones first.
        lengths: 2B numbers of scored tokens, on the host, in the same order; empty where nothing is scored.
        alone: every pair in a series of its own, so that ranks which hold other tokens of them have the same series.
    """
    n_pairs = len(lengths) // 2
    edges = [0]
    for i in range(n_pairs):
        edges += [edges[-1] + lengths[i], edges[-1] + lengths[i] + lengths[n_pairs + i]]
    place = torch.arange(2 * n_pairs, device=labels.device)
    place = torch.where(place < n_pairs, 2 * place, 2 * (place - n_pairs) + 1)
    if n_pairs:
        position = torch.arange(labels.numel(), device=labels.device)
        key = place[torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)]
        key = torch.where(labels == IGNORE, 2 * n_pairs, key)
        key, order = torch.sort(key, stable=True)
        order = order[: edges[-1]]
        bounds = torch.searchsorted(key, torch.arange(2 * n_pairs + 1, device=key.device))
    else:
        order, bounds = place, place.new_zeros(1)

    series: list[Series] = []
    first = 0
    while first < n_pairs:
        start, last = edges[2 * first], first + 1
        while not alone and last < n_pairs and edges[2 * last + 2] - start <= max_rows:
            last += 1
        size = edges[2 * last] - start
        count = -(-size // max_rows)
        cuts = [start + size * k // max(count, 1) for k in range(count + 1)]
        series.append(Series(range(first, last), [slice(*c) for c in zip(cuts, cuts[1:], strict=False)]))
        first = last
    rows = max((t.stop - t.start for s in series for t in s.tiles), default=0)
    return Layout(order, bounds, edges, series, rows)


def rows_per_tile(vocabulary: int, hidden: int, itemsize: int, max_tile_bytes: int | None) -> int:
    """Rows of two (rows, V) tiles under the budget; by default as much as dW, but from 256 MiB to 1 GiB.

    More rows mean that dW is read and written less often; past 1 GiB that no longer shows (docs/roofline.md).
    """
    budget = min(max(256 << 20, vocabulary * hidden * 4), 1 << 30) if max_tile_bytes is None else max_tile_bytes
    return max(1, budget // (2 * vocabulary * itemsize))


class Pass:
    """Two heads over one layout, with the buffers that all tiles share."""

    def __init__(
        self,
        x: Tensor,  # (M, H)
        ref_x: Tensor,  # (M, H_ref)
        labels: Tensor,  # (M,)
        policy: Head,
        reference: Head,
        layout: Layout,
        epsilon: float,
        engine: ModuleType,
        logit_free: bool = False,  # whether the engine projects and sweeps in one kernel
        keep: bool = True,  # whether a gradient will be asked for
        vocab_group: str | None = None,  # whose ranks hold the vocabulary's slices
        sequence_group: str | None = None,  # whose ranks hold the completions' other tokens
    ):
        self.x, self.ref_x, self.policy, self.reference = x, ref_x, policy, reference
        self.layout, self.epsilon, self.engine = layout, epsilon, engine
        self.logit_free, self.keep = logit_free, keep
        self.vocab_group, self.sequence_group = vocab_group, sequence_group
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        device, pairs, n = x.device, layout.n_pairs, len(layout.order)
        self._tiles: dict[str, Tensor] = {}
        lengths = layout.bounds.diff()
        self.tokens = Tokens(
            labels=labels[layout.order],
            completion=torch.arange(2 * pairs, device=device).repeat_interleave(lengths, output_size=n),
            bounds=layout.bounds,
            edges=layout.edges,
            swept=torch.empty(st.SWEPT, n, dtype=dtype, device=device),
            sums=torch.empty(st.TOKEN, pairs, 2, dtype=torch.float64, device=device),
            step=torch.empty(pairs, dtype=torch.int8, device=device),
            arrived=torch.zeros(pairs, dtype=torch.int32, device=device),
        )

    def _tile(self, name: str, tile: slice) -> Tensor:
        """(rows, V) of a buffer that all tiles of a pass share, made when the first of them comes."""
        if name not in self._tiles:
            shape = self.layout.rows, len(self.policy.weight)
            self._tiles[name] = self.tokens.swept.new_empty(shape)
        return self._tiles[name][: tile.stop - tile.start]

    def release(self) -> None:
        """Frees the tiles, until a next one is projected."""
        self._tiles.clear()

    def project(self, tile: slice) -> tuple[Tensor, Tensor]:
        """The policy's x·Wᵀ of a tile and the hidden states it comes from."""
        a = self._tile("policy", tile)
        x = self.x.index_select(0, self.layout.order[tile])
        self.policy.project(x, a)
        return a, x

    def forward(self, tile: slice) -> tuple[Tensor | None, Tensor]:
        """Sweeps a tile; gives what :meth:`gradient` takes (no logits where none is asked for)."""
        ref_x = self.ref_x.index_select(0, self.layout.order[tile])
        what = (tile, self.tokens, self.policy, self.reference, self.epsilon)
        if self.logit_free:
            x = self.x.index_select(0, self.layout.order[tile])
            a = self._tile("policy", tile) if self.keep else None
            self.engine.project_and_sweep(x, ref_x, *what, a)
        else:
            a, x = self.project(tile)
            b = self._tile("reference", tile)
            self.reference.project(ref_x, b)
            self.engine.sweep(a, b, *what)
        if self.vocab_group is not None:
            # The engine has seen one slice, and what it has decided from that is overwritten.
            parallel.merge_slices(self.tokens.swept[:, tile], self.vocab_group)
            st.reduce_pairs(self.tokens, self.tokens.completed(tile), self.epsilon)
        return a, x

    def join(self, pairs: range) -> None:
        """Makes ``sums`` and ``step`` of a series' pairs whole, when all its tiles are swept."""
        if self.sequence_group is not None:
            parallel.join_completions(self.tokens, pairs, self.sequence_group)

    def finish(self, into: Gradients) -> None:
        """To be called when all gradients are accumulated: a slice's rank has a share of every hidden state's."""
        if self.vocab_group is not None and into.hidden is not None:
            parallel.sum_over(into.hidden, self.vocab_group)

    def gradient(
        self,
        tile: slice,
        a: Tensor | None,
        x: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        into: Gradients,
        accumulate: bool,
    ) -> None:
        """Adds what follows from the gradient coefficient·(p − onehot), with (B,) coefficients per side of a pair."""
        assert a is not None, "a pass without gradients keeps no logits"
        both = torch.stack((chosen, rejected), 1).flatten().to(a.dtype)
        coefficient = both[self.tokens.completion[tile]]
        g = self.engine.gradient(a, tile, self.tokens, coefficient, self.policy)
        self.policy.backward(g, x, self.layout.order[tile], into, accumulate)


def decide(tokens: Tokens, pairs: range, epsilon: float, by: Decision, out: Tensor) -> Tensor:
    """Fills the pairs' columns of a pass's result; gives (B,) coefficients ∂loss_i/∂rejected_logps_i of these pairs."""
    part = slice(pairs.start, pairs.stop)
    sums, check, out = tokens.sums[:, part], tokens.step[part], out[:, part]
    out[CHOSEN_KL:PAIR_RELAXED_SHIFT] = sums[st.KL : st.CORRECT + 1].transpose(1, 2).flatten(0, 1)
    # From the very figures that the caller sees.
    kl = out[CHOSEN_KL] + out[REJECTED_KL]
    step = withhold_relaxation(check, out[CHOSEN_ENTROPY], kl, by.max_entropy, by.max_kl)
    beta_i = pair_beta(step, by.beta, epsilon)
    logps = (*sums[st.LOGP].unbind(1), *sums[st.REF_LOGP].unbind(1))
    losses, coefficient = losses_and_coefficients(logps, beta_i.double(), by.smoothing)
    shifts = st.shifts(sums)
    finite = torch.isfinite(shifts[0]) & torch.isfinite(shifts[1])
    out[LOSS] = torch.where(finite, losses, torch.nan)
    out[STEP], out[BETA], out[VETOED] = step, beta_i, step != check
    out[CHOSEN_LOGP:CHOSEN_KL] = torch.stack(logps)
    out[PAIR_RELAXED_SHIFT], out[PAIR_TIGHTENED_SHIFT] = shifts
    everyone = coefficient.new_zeros(len(tokens.step))
    everyone[part] = torch.where(finite, coefficient, torch.nan)
    return everyone


def single_pass(run: Pass, by: Decision, into: Gradients) -> Tensor:
    """Everything of one call: (PAIR, B) results, and the gradients in ``into``, in units of β/B.

    The units keep 16-bit gradients of a small β from underflowing: whoever reads them multiplies by β/B once more,
    together with what backward receives.
    """
    tokens = run.tokens
    out = tokens.swept.new_empty(PAIR, run.layout.n_pairs)
    one = out.new_ones(run.layout.n_pairs)
    wanted = any(g is not None for g in into)
    accumulate = False
    for pairs, tiles in run.layout.series:
        if len(tiles) <= 1:
            swept = [run.forward(tile) for tile in tiles]
            run.join(pairs)
            unit = decide(tokens, pairs, run.epsilon, by, out) / by.beta
            for tile, (a, x) in zip(tiles, swept, strict=True):
                if wanted:
                    # d logp/d logits is onehot − p, and the loss falls with the chosen log-prob: +(p − onehot) there.
                    run.gradient(tile, a, x, unit, -unit, into, accumulate)
                    accumulate = True
        else:
            own = _own_buffers(into, accumulate)
            for k, tile in enumerate(tiles):
                a, x = run.forward(tile)
                if wanted:
                    run.gradient(tile, a, x, one, -one, own, k > 0)
            run.join(pairs)
            unit = decide(tokens, pairs, run.epsilon, by, out) / by.beta
            if wanted:
                rows = run.layout.order[tiles[0].start : tiles[-1].stop]
                _scale(own, into, rows, unit[pairs.start].to(out.dtype))
            accumulate = True
    run.finish(into)
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
        if mine is None or all_pairs is None:
            continue
        if mine is all_pairs:
            mine.mul_(coefficient)
        else:
            all_pairs.addcmul_(mine, coefficient)
