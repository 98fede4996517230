"""The single pass: how pairs are cut into tiles, and in which order a tile's loss and gradient are formed.

The gradient of the loss in a token's logits is ±c_i·(p − onehot), with one coefficient per pair. So a tile that holds
whole pairs is projected, swept, reduced, decided and turned into its own gradient while it is in memory, and no logit
is ever formed twice. A pair longer than a tile writes ±(p − onehot) unscaled, and is scaled when its last tile is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, engines, parallel
from .call import Execution, Inputs, Settings
from .head import Gradients, Head
from .pair import losses_and_coefficients, pair_beta, withhold_relaxation
from .statistics import SWEPT, TOKEN, Tokens, TokenStatistics, reduce_pairs, shifts

IGNORE = -100
# Elements that a row of a tile is a multiple of.
ALIGNED = 16


class PairResults(NamedTuple):
    """Rows of the (PAIR, B) tensor that a pass returns; ``PairResults(*tensor)`` names them.

    The names are the public result's, see :class:`epsdpo_kernels.EpsilonDPOOutput`.
    """

    losses: Tensor
    step: Tensor
    beta: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_kl: Tensor
    rejected_kl: Tensor
    chosen_entropy: Tensor
    rejected_entropy: Tensor
    chosen_token_accuracy: Tensor
    rejected_token_accuracy: Tensor
    relaxed_shift: Tensor
    tightened_shift: Tensor
    vetoed: Tensor


PAIR = len(PairResults._fields)


class Rows(NamedTuple):
    """How many rows a tile may have."""

    whole: int  # of whole pairs
    part: int  # of a longer pair
    waiting: int  # tiles of a longer pair whose gradients wait for one product


class Series(NamedTuple):
    """Consecutive pairs that are decided together, and the tiles of their scored tokens.

    Whole pairs are one tile. A longer pair's tiles are in groups, a group's gradients multiplied together.
    """

    pairs: range
    groups: list[list[slice]]

    @property
    def tiles(self) -> list[slice]:
        return [tile for group in self.groups for tile in group]


@dataclass(frozen=True)
class Layout:
    """Where the scored tokens are: a pair's chosen tokens, its rejected ones, then the next pair's."""

    order: Tensor  # (N,) int64, rows of the flattened input
    bounds: Tensor  # (2B+1,) int64, completion j of [chosen_0, rejected_0, chosen_1, …] is order[bounds[j]:bounds[j+1]]
    edges: list[int]  # the same on the host
    series: list[Series]
    rows: int  # of the largest tile
    group_rows: int  # of the largest group

    @property
    def n_pairs(self) -> int:
        return len(self.edges) // 2


def lay_out(labels: Tensor, cu_seqlens: Tensor, lengths: list[int], rows: Rows, alone: bool = False) -> Layout:
    """Cuts scored tokens into tiles. What it puts on the device is formed there.

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
        while not alone and last < n_pairs and edges[2 * last + 2] - start <= rows.whole:
            last += 1
        size = edges[2 * last] - start
        count = 1 if size <= rows.whole else -(-size // rows.part)
        cuts = [start + size * k // count for k in range(count + 1)]
        tiles = [slice(*cut) for cut in zip(cuts, cuts[1:], strict=False)] if size else []
        groups = -(-count // rows.waiting)
        each = -(-count // groups)
        series.append(Series(range(first, last), [tiles[k : k + each] for k in range(0, len(tiles), each)]))
        first = last
    of_tiles = (t.stop - t.start for s in series for t in s.tiles)
    of_groups = (group[-1].stop - group[0].start for s in series for group in s.groups)
    return Layout(order, bounds, edges, series, max(of_tiles, default=0), max(of_groups, default=0))


# Tiles of a long pair whose 16-bit gradients share a product. With more of them, tiles in the same budget would have
# fewer than the 250 rows below which reading the head takes longer than its product.
WAITING = 4


def tile_budget(vocabulary: int, hidden: int, max_tile_bytes: int | None = None) -> int:
    """Bytes that tiles may take; by default as much as dW in fp32, but from 256 MiB to 1 GiB."""
    return min(max(256 << 20, vocabulary * hidden * 4), 1 << 30) if max_tile_bytes is None else max_tile_bytes


def rows_per_tile(vocabulary: int, budget: int, itemsize: int, gradient: int = 0, wait: bool = False) -> Rows:
    """Rows of tiles under a budget of bytes.

    A row takes both models' logits, and its gradient where that does not overwrite them. Every product with a gradient
    reads and writes all of dW, so few are wanted (docs/roofline.md): of a pair longer than a tile, the gradients of
    ``WAITING`` smaller tiles can wait for one.

    Args:
        itemsize: bytes of a logit.
        gradient: bytes of a gradient beside the logits, or 0.
        wait: whether dW is asked for.
    """
    waiting = WAITING if wait and gradient else 1
    whole, part = (max(1, budget // (vocabulary * (2 * itemsize + n * gradient))) for n in (1, waiting))
    return Rows(whole, part, waiting)


class Pass:
    """Two heads over one layout, with the buffers that all tiles share."""

    def __init__(
        self, inputs: Inputs, settings: Settings, execution: Execution, needs: Sequence[bool], again: bool = False
    ):
        """Lays the call out. The numbers of scored tokens are read here, once, before any work.

        Args:
            needs: whether gradients of hidden, weight and bias will be asked for.
            again: whether the policy is projected once more for them.

        Raises:
            ValueError: values that the call does not take; see :func:`epsdpo_kernels.checks.scored_lengths`.
        """
        device, labels, policy, reference = inputs.hidden.device, inputs.labels, inputs.policy, inputs.reference
        self.engine = engines.tile_operations(execution.engine, inputs.hidden)
        self.vocab_group, self.sequence_group = execution.vocab_group, execution.sequence_group
        self.pairs, self.epsilon = inputs.pairs, settings.epsilon
        self.needs, self.keep = tuple(needs), any(needs) and not again
        slices, rank = parallel.slices(len(policy.weight), self.vocab_group, device)
        lengths, sizes = checks.scored_lengths(labels, inputs.cu_seqlens, slices, settings.beta, self.sequence_group)
        # By the largest slice, because all ranks need the same tiles.
        beside = 0 if not any(needs) or policy.gradient_dtype == inputs.dtype else policy.gradient_dtype.itemsize
        budget = tile_budget(max(sizes), policy.weight.shape[1], execution.max_tile_bytes)
        rows = rows_per_tile(max(sizes), budget, inputs.dtype.itemsize, beside, needs[1])
        self.logit_free = engines.logit_free(self.engine, policy, rows.whole, self.keep)
        if self.logit_free and not any(needs):
            rows = Rows(max(1, len(labels)), 1, 1)  # there are no logits to find room for
        self.layout = lay_out(labels, inputs.cu_seqlens, lengths, rows, alone=self.sequence_group is not None)
        if self.vocab_group is not None:
            labels = parallel.labels_in_slice(labels, sum(sizes[:rank]), sizes[rank])
        # Kernels read biases, and the logit-free one heads, without strides: copied once a call, where need be.
        self.policy, self.reference = _contiguous(policy, reference, weights=self.logit_free)
        self.x, self.ref_x = inputs.hidden, inputs.ref_hidden
        pairs, n = self.layout.n_pairs, len(self.layout.order)
        self._tiles: dict[str, Tensor] = {}
        lengths_here = self.layout.bounds.diff()
        self.tokens = Tokens(
            labels=labels[self.layout.order],
            completion=torch.arange(2 * pairs, device=device).repeat_interleave(lengths_here, output_size=n),
            bounds=self.layout.bounds,
            edges=self.layout.edges,
            swept=torch.empty(SWEPT, n, dtype=inputs.dtype, device=device),
            sums=torch.empty(TOKEN, pairs, 2, dtype=torch.float64, device=device),
            step=torch.empty(pairs, dtype=torch.int8, device=device),
            arrived=torch.zeros(pairs, dtype=torch.int32, device=device),
        )

    def accumulators(self) -> Gradients:
        """Of hidden, weight and bias, in the compute dtype. Where no tile will overwrite them they stay at zero."""
        make = torch.empty if len(self.layout.order) else torch.zeros
        dtype, device, weight = self.tokens.swept.dtype, self.x.device, self.policy.weight
        return Gradients(
            torch.zeros(self.x.shape, dtype=dtype, device=device) if self.needs[0] else None,
            make(weight.shape, dtype=dtype, device=device) if self.needs[1] else None,
            make(weight.shape[:1], dtype=dtype, device=device) if self.needs[2] else None,
        )

    def _tile(self, name: str, rows: int, largest: int, dtype: torch.dtype) -> Tensor:
        """(rows, V) of a buffer that all tiles of a pass share, made when the first of them comes.

        Its rows begin at multiples of 64 bytes, so that kernels load 16 at a time whatever V is.
        """
        vocabulary = len(self.policy.weight)
        if name not in self._tiles:
            stride = -(-vocabulary // ALIGNED) * ALIGNED
            self._tiles[name] = self.tokens.swept.new_empty(largest, stride, dtype=dtype)[:, :vocabulary]
        return self._tiles[name][:rows]

    def release(self) -> None:
        """Frees the tiles, until a next one is projected."""
        self._tiles.clear()

    def _logits(self, name: str, tile: slice) -> Tensor:
        return self._tile(name, tile.stop - tile.start, self.layout.rows, self.tokens.swept.dtype)

    def project(self, tile: slice) -> Tensor:
        """The policy's x·Wᵀ of a tile."""
        a = self._logits("policy", tile)
        self.policy.project(self.x.index_select(0, self.layout.order[tile]), a)
        return a

    def forward(self, tile: slice) -> Tensor | None:
        """Sweeps a tile; gives the policy's x·Wᵀ where :meth:`gradient` will take it."""
        ref_x = self.ref_x.index_select(0, self.layout.order[tile])
        what = (tile, self.tokens, self.policy, self.reference, self.epsilon)
        if self.logit_free:
            x = self.x.index_select(0, self.layout.order[tile])
            a = self._logits("policy", tile) if self.keep else None
            self.engine.project_and_sweep(x, ref_x, *what, a)
        else:
            a = self.project(tile)
            b = self._logits("reference", tile)
            self.reference.project(ref_x, b)
            self.engine.sweep(a, b, *what)
        if self.vocab_group is not None:
            # The engine has seen one slice, and what it has decided from that is overwritten.
            parallel.merge_slices(self.tokens.swept[:, tile], self.vocab_group)
            reduce_pairs(self.tokens, self.tokens.completed(tile), self.epsilon)
        return a

    def join(self, pairs: range) -> None:
        """Makes ``sums`` and ``step`` of a series' pairs whole, when all its tiles are swept."""
        if self.sequence_group is not None:
            parallel.join_completions(self.tokens, pairs, self.sequence_group)

    def finish(self, into: Gradients) -> None:
        """To be called when all gradients are accumulated: a slice's rank has a share of every hidden state's."""
        if self.vocab_group is not None and into.hidden is not None:
            parallel.sum_over(into.hidden, self.vocab_group)

    def gradient(self, tile: slice, a: Tensor | None, chosen: Tensor, rejected: Tensor, waiting: int = 0) -> Tensor:
        """coefficient·(p − onehot) of a tile, after the ``waiting`` rows of its group that are there already.

        Args:
            a: what :meth:`forward` or :meth:`project` gave, overwritten.
            chosen, rejected: (B,) coefficients per side of a pair.

        Returns:
            (waiting + rows, V) of the group so far.
        """
        assert a is not None, "a pass without gradients keeps no logits"
        both = torch.stack((chosen, rejected), 1).flatten().to(a.dtype)
        coefficient = both[self.tokens.completion[tile]]
        group, dtype = a, self.policy.gradient_dtype
        if dtype != a.dtype:
            group = self._tile("gradients", waiting + len(a), self.layout.group_rows, dtype)
        self.engine.gradient(a, tile, self.tokens, coefficient, self.policy, group[-len(a) :])
        return group

    def backward(self, group: list[slice], gradients: Tensor, into: Gradients, accumulate: bool) -> None:
        """Adds what follows from the gradients of a group of tiles."""
        order = self.layout.order[group[0].start : group[-1].stop]
        self.policy.backward(gradients, self.x.index_select(0, order), order, into, accumulate)


def _contiguous(policy: Head, reference: Head, weights: bool) -> tuple[Head, Head]:
    """The heads with contiguous biases and, where asked for, weights; a shared weight stays shared."""
    bias, ref_bias = (None if h.bias is None else h.bias.contiguous() for h in (policy, reference))
    weight, ref_weight = policy.weight, reference.weight
    if weights:
        same = weight.data_ptr() == ref_weight.data_ptr() and weight.shape == ref_weight.shape
        same = same and weight.stride() == ref_weight.stride()
        weight = weight.contiguous()
        ref_weight = weight if same else ref_weight.contiguous()
    return replace(policy, weight=weight, bias=bias), replace(reference, weight=ref_weight, bias=ref_bias)


def decide(tokens: Tokens, pairs: range, settings: Settings, results: Tensor) -> Tensor:
    """Fills the pairs' columns of a pass's result; gives (B,) coefficients ∂loss_i/∂rejected_logps_i of these pairs."""
    part = slice(pairs.start, pairs.stop)
    sums, check = tokens.sums[:, part], tokens.step[part]
    of = TokenStatistics(*sums)
    # The veto goes by the very figures that the caller sees, the loss by the sums in float64.
    sides = torch.stack((of.logp, of.ref_logp, of.kl, of.entropy, of.correct)).transpose(1, 2).flatten(0, 1)
    *_, chosen_kl, rejected_kl, chosen_entropy, _, _, _ = sides.to(results.dtype)
    step = withhold_relaxation(check, chosen_entropy, chosen_kl + rejected_kl, settings.max_entropy, settings.max_kl)
    beta_i = pair_beta(step, settings.beta, settings.epsilon)
    losses, coefficient = losses_and_coefficients(tuple(sides[:4]), beta_i.double(), settings.label_smoothing)
    relaxed, tightened = shifts(sums)
    finite = torch.isfinite(relaxed) & torch.isfinite(tightened)
    losses = torch.where(finite, losses, torch.nan)
    results[:, part] = torch.stack((losses, step, beta_i, *sides, relaxed, tightened, step != check))
    everyone = coefficient.new_zeros(len(tokens.step))
    everyone[part] = torch.where(finite, coefficient, torch.nan)
    return everyone


def single_pass(run: Pass, settings: Settings, into: Gradients) -> tuple[Tensor, Tensor]:
    """Everything of one call.

    Returns:
        (PAIR, B) results, zeros where nothing is scored; and the () unit of the gradients in ``into``. That is β/B, so
        that 16-bit gradients of a small β do not underflow; for a call of one long pair it is the pair's coefficient,
        so that dW is not scaled twice. Whoever reads the gradients multiplies by it, together with what backward
        receives.
    """
    tokens, n_pairs = run.tokens, run.layout.n_pairs
    unit = settings.beta / max(run.pairs, 1)
    if not n_pairs:
        return tokens.swept.new_zeros(PAIR, run.pairs), unit
    results = tokens.swept.new_empty(PAIR, n_pairs)
    one = results.new_ones(n_pairs)
    wanted = any(run.needs)
    accumulate = False
    for series in run.layout.series:
        pairs, groups, tiles = series.pairs, series.groups, series.tiles
        if len(tiles) <= 1:  # none where all tokens of the pair are on other ranks
            a = run.forward(tiles[0]) if tiles else None
            run.join(pairs)
            scaled = decide(tokens, pairs, settings, results) / settings.beta
            if wanted and tiles:
                # d logp/d logits is onehot − p, and the loss falls with the chosen log-prob: +(p − onehot) there.
                run.backward(tiles, run.gradient(tiles[0], a, scaled, -scaled), into, accumulate)
                accumulate = True
        else:
            own = _own_buffers(into, accumulate)
            for k, group in enumerate(groups):
                for tile in group:
                    a = run.forward(tile)
                    if wanted:
                        g = run.gradient(tile, a, one, -one, tile.start - group[0].start)
                if wanted:
                    run.backward(group, g, own, k > 0)
            run.join(pairs)
            coefficient = decide(tokens, pairs, settings, results)
            if n_pairs == 1:
                unit = coefficient[0].to(results.dtype)
            elif wanted:
                rows = run.layout.order[tiles[0].start : tiles[-1].stop]
                _scale(own, into, rows, (coefficient[pairs.start] / settings.beta).to(results.dtype))
            accumulate = True
    run.finish(into)
    return results, unit


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
