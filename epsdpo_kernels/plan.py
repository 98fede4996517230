"""The single pass: how pairs are cut into tiles, and in which order a tile's loss and gradient are formed.

The gradient of the loss in a token's logits is ±c_i·(p − onehot), with one coefficient per pair. So a tile that holds
whole pairs is projected, swept, reduced, decided and turned into its own gradient while it is in memory, and no logit
is ever formed twice. A pair longer than a tile writes ±(p − onehot) unscaled, and is scaled when its last tile is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, engines, parallel
from .call import Execution, Inputs, Settings
from .head import Gradients, Head
from .pair import loss_coefficients, pair_beta, preference_losses, withhold_relaxation
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
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    relaxed_shift: Tensor
    tightened_shift: Tensor
    vetoed: Tensor


PAIR = len(PairResults._fields)


class Rows(NamedTuple):
    """How many rows there may be."""

    tile: int
    group: int  # of tiles whose gradients wait for one product; none waits where that is less than two tiles


@dataclass(frozen=True)
class Tile:
    """Scored tokens whose logits are in memory together."""

    rows: slice
    pairs: range  # whole in it; none in a part of a longer pair

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


class Series(NamedTuple):
    """Consecutive pairs that fit in tiles, or one that is longer than a tile.

    The gradients of a group of tiles are multiplied together.
    """

    pairs: range
    groups: list[list[Tile]]
    long: bool

    @property
    def tiles(self) -> list[Tile]:
        return [tile for group in self.groups for tile in group]


@dataclass(frozen=True)
class Layout:
    """Where the scored tokens are: a pair's chosen tokens, its rejected ones, then the next pair's."""

    order: Tensor  # (N,) int64, rows of the flattened input
    completion: Tensor  # (N,) int64, of [chosen_0, rejected_0, chosen_1, …]
    bounds: Tensor  # (2B+1,) int64, completion j is order[bounds[j]:bounds[j+1]]
    edges: list[int]  # the same on the host
    series: list[Series]
    rows: int  # of the largest tile
    group_rows: int  # of the largest group

    @property
    def n_pairs(self) -> int:
        return len(self.edges) // 2


def lay_out(labels: Tensor, lengths: list[int], rows: Rows, alone: bool = False) -> Layout:
    """Cuts scored tokens into tiles. What it puts on the device is formed there, from three numbers a completion.

    Args:
        labels: (M,) int64, −100 where a row is not scored.
        lengths: 2B numbers of scored tokens, on the host, all chosen completions first; empty where nothing is scored.
        alone: every pair in a tile of its own, so that ranks which hold other tokens of them decide in the same order.
    """
    n_pairs = len(lengths) // 2
    edges = [0]
    for i in range(n_pairs):
        edges += [edges[-1] + lengths[i], edges[-1] + lengths[i] + lengths[n_pairs + i]]
    device = labels.device
    bounds = _on_device(edges, device)
    if n_pairs:
        slot = torch.arange(edges[-1], device=device)
        completion = torch.searchsorted(bounds, slot, right=True) - 1
        # A token is as many places from where it is among the scored tokens of the input as its completion is.
        first = list(accumulate(lengths, initial=0))
        of_input = [first[i + side * n_pairs] for i in range(n_pairs) for side in range(2)]
        moved = _on_device([there + 1 - here for there, here in zip(of_input, edges, strict=False)], device)
        # The first row at which so many are counted is the one.
        order = torch.searchsorted((labels != IGNORE).cumsum(0), slot + moved[completion])
    else:
        order = completion = bounds[:0]
    series = list(_cut(edges, rows, alone))
    of_tiles = (len(tile) for each in series for tile in each.tiles)
    of_groups = (sum(map(len, group)) for each in series for group in each.groups)
    return Layout(order, completion, bounds, edges, series, max(of_tiles, default=0), max(of_groups, default=0))


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """(len,) int64, without waiting for the device."""
    host = torch.tensor(numbers, device="cpu")  # whatever the process makes its tensors on
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _cut(edges: list[int], rows: Rows, alone: bool) -> Iterator[Series]:
    """Pairs that fit in tiles, as many of them a tile and a group as fit there; longer ones in tiles of one size."""
    fitting: list[Tile] = []
    for i, (start, stop) in enumerate(zip(edges[:-1:2], edges[2::2], strict=True)):
        size = stop - start
        if size <= rows.tile:
            last = fitting[-1] if fitting else None
            if last is not None and not alone and stop - last.rows.start <= rows.tile:
                fitting[-1] = Tile(slice(last.rows.start, stop), range(last.pairs.start, i + 1))
            else:
                fitting.append(Tile(slice(start, stop), range(i, i + 1)))
            continue
        if fitting:
            yield _series_of_fitting(fitting, rows.group)
            fitting = []
        count = -(-size // rows.tile)
        cuts = [start + size * k // count for k in range(count + 1)]
        tiles = [Tile(slice(*cut), range(0)) for cut in zip(cuts, cuts[1:], strict=False)]
        waiting = max(1, rows.group // max(map(len, tiles)))
        each = -(-count // -(-count // waiting))
        yield Series(range(i, i + 1), [tiles[k : k + each] for k in range(0, count, each)], long=True)
    if fitting:
        yield _series_of_fitting(fitting, rows.group)


def _series_of_fitting(tiles: list[Tile], group_rows: int) -> Series:
    groups: list[list[Tile]] = []
    for tile in tiles:
        if groups and tile.rows.stop - groups[-1][0].rows.start <= group_rows:
            groups[-1].append(tile)
        else:
            groups.append([tile])
    return Series(range(tiles[0].pairs.start, tiles[-1].pairs.stop), groups, long=False)


# Tiles whose 16-bit gradients share a product, where a call has more rows than one tile. With more of them, tiles in
# the same budget would have fewer than the 250 rows below which reading the head takes longer than its product.
WAITING = 4


def tile_budget(vocabulary: int, hidden: int, on_gpu: bool, max_tile_bytes: int | None = None) -> int:
    """Bytes that tiles may take.

    By default 1 GiB on a GPU, where launches of many small tiles take longer than their work (docs/tuning.md).
    Elsewhere as much as dW in fp32, but from 256 MiB to 1 GiB.
    """
    if max_tile_bytes is not None:
        return max_tile_bytes
    return 1 << 30 if on_gpu else min(max(256 << 20, vocabulary * hidden * 4), 1 << 30)


def rows_per_tile(
    sizes: Sequence[int], vocabulary: int, budget: int, itemsize: int, gradient: int = 0, wait: bool = False
) -> Rows:
    """Rows of tiles under a budget of bytes.

    A row takes both models' logits, and its gradient where that does not overwrite them. Every product with a gradient
    reads and writes all of dW, so few are wanted (docs/roofline.md): of a call that is larger than a tile, the
    gradients of ``WAITING`` smaller tiles can wait for one.

    Args:
        sizes: scored tokens of every pair.
        itemsize: bytes of a logit.
        gradient: bytes of a gradient beside the logits, or 0.
        wait: whether dW is asked for.
    """
    words = budget // vocabulary
    whole = max(1, words // (2 * itemsize + gradient))
    if not (wait and gradient) or sum(sizes) <= whole:
        return Rows(whole, 0)
    # A pair that fits in a tile is decided there, and needs no dW of its own that is scaled later.
    fitting = max((size for size in sizes if size <= whole), default=0)
    tile = max(1, words // (2 * itemsize + WAITING * gradient), fitting)
    return Rows(tile, (words - 2 * itemsize * tile) // gradient)


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
        shape = len(policy.weight), labels.numel(), len(inputs.cu_seqlens)
        slices = parallel.gather(shape, self.vocab_group, device)
        lengths, sizes = checks.scored_lengths(labels, inputs.cu_seqlens, slices, settings.beta, self.sequence_group)
        # By the largest slice, because all ranks need the same tiles.
        beside = 0 if not any(needs) or policy.gradient_dtype == inputs.dtype else policy.gradient_dtype.itemsize
        budget = tile_budget(max(sizes), policy.weight.shape[1], device.type != "cpu", execution.max_tile_bytes)
        pairs = len(lengths) // 2
        of_pairs = [lengths[i] + lengths[pairs + i] for i in range(pairs)]
        rows = rows_per_tile(of_pairs, max(sizes), budget, inputs.dtype.itemsize, beside, needs[1])
        self.logit_free = engines.logit_free(self.engine, policy, rows.tile, self.keep)
        if self.logit_free and not any(needs):
            rows = Rows(max(1, budget // engines.logit_free_row_bytes(inputs.hidden, inputs.ref_hidden)), 0)
        self.layout = lay_out(labels, lengths, rows, alone=self.sequence_group is not None)
        if self.vocab_group is not None:
            rank = parallel.rank_in(self.vocab_group)
            labels = parallel.labels_in_slice(labels, sum(sizes[:rank]), sizes[rank])
        # Kernels read biases, and the logit-free one heads, without strides: copied once a call, where need be.
        self.policy, self.reference = _contiguous(policy, reference, weights=self.logit_free)
        self.x, self.ref_x = inputs.hidden, inputs.ref_hidden
        n = len(self.layout.order)
        self._tiles: dict[str, Tensor] = {}
        self.tokens = Tokens(
            labels=labels[self.layout.order],
            completion=self.layout.completion,
            count=self.layout.bounds.diff().view(-1, 2).double(),
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

        Its rows begin at multiples of 16 elements, so that kernels load 16 bytes at a time whatever V is.
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

    def gradient(self, tile: slice, a: Tensor, coefficient: Tensor, waiting: int = 0) -> Tensor:
        """coefficient·(p − onehot) of a tile, after the ``waiting`` rows of its group that are there already.

        Args:
            a: what :meth:`forward` or :meth:`project` gave, overwritten.
            coefficient: (2B,) of the completions in the layout's order, in the compute dtype.

        Returns:
            (waiting + rows, V) of the group so far.
        """
        group, dtype = a, self.policy.gradient_dtype
        if dtype != a.dtype:
            group = self._tile("gradients", waiting + len(a), self.layout.group_rows, dtype)
        self.engine.gradient(a, tile, self.tokens, coefficient, self.policy, group[-len(a) :])
        return group

    def backward(self, group: list[Tile], gradients: Tensor, into: Gradients, accumulate: bool) -> None:
        """Adds what follows from the gradients of a group of tiles."""
        order = self.layout.order[group[0].rows.start : group[-1].rows.stop]
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


def decisions(tokens: Tokens, pairs: slice, settings: Settings) -> tuple[Tensor, Tensor]:
    """(step, β) of pairs whose tokens have all been swept, each (pairs,)."""
    step = tokens.step[pairs]
    if settings.max_entropy is not None or settings.max_kl is not None:
        # The veto goes by the very figures that the caller sees, the loss by the sums in float64.
        kl, entropy = (row.to(tokens.swept.dtype) for row in TokenStatistics(*tokens.sums[:, pairs])[4:6])
        step = withhold_relaxation(step, entropy[:, 0], kl[:, 0] + kl[:, 1], settings.max_entropy, settings.max_kl)
    return step, pair_beta(step, settings.beta, settings.epsilon)


def coefficients(tokens: Tokens, pairs: slice, settings: Settings) -> Tensor:
    """(pairs,) ∂loss_i/∂rejected_logps_i, NaN where a shift is not finite: such a pair must stop a run."""
    sums, (_, beta) = tokens.sums[:, pairs], decisions(tokens, pairs, settings)
    relaxed, tightened = shifts(sums)
    return loss_coefficients(logps(sums), beta.double(), settings.label_smoothing) + (relaxed + tightened) * 0


def logps(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(TOKEN, pairs, 2) -> (pairs,) of chosen and rejected completions by the policy, then by the reference."""
    of = TokenStatistics(*sums)
    return of.logp[:, 0], of.logp[:, 1], of.ref_logp[:, 0], of.ref_logp[:, 1]


def results(tokens: Tokens, settings: Settings) -> Tensor:
    """(PAIR, B), the rows of :class:`PairResults`, when all tokens have been swept."""
    of = TokenStatistics(*tokens.sums)
    step, beta = (t.double() for t in decisions(tokens, slice(None), settings))
    relaxed, tightened = shifts(tokens.sums)
    losses = preference_losses(*logps(tokens.sums), beta, settings.label_smoothing)
    sides = (side for row in (of.logp, of.ref_logp, of.kl, of.entropy, of.correct) for side in row.unbind(1))
    vetoed = (step != tokens.step).double()
    rows = (
        losses + (relaxed + tightened) * 0, step, beta, *sides, *tokens.count.unbind(1), relaxed, tightened, vetoed,
    )  # fmt: skip
    return torch.stack(rows).to(tokens.swept.dtype)


def single_pass(run: Pass, settings: Settings, into: Gradients) -> tuple[Tensor, Tensor]:
    """Everything of one call.

    Returns:
        (PAIR, B) results, zeros where nothing is scored; and the () unit of the gradients in ``into``. That is β/B, by
        a power of two less in fp16, so that 16-bit gradients of a small β do not underflow; for a call of one long
        pair it has the pair's coefficient in β's place, so that dW is not scaled twice. Whoever reads the gradients
        multiplies by it, together with what backward receives.
    """
    tokens, n_pairs = run.tokens, run.layout.n_pairs
    enlarged = _enlargement(run.policy, settings.epsilon)
    unit = settings.beta / max(run.pairs, 1) / enlarged
    if not n_pairs:
        return tokens.swept.new_zeros(PAIR, run.pairs), unit
    wanted = any(run.needs)
    # d logp/d logits is onehot − p, and the loss falls with the chosen log-prob: +(p − onehot) there.
    signs = tokens.swept.new_full((n_pairs, 2), enlarged)
    signs[:, 1] = -enlarged
    signed = torch.empty_like(signs)
    accumulate = False
    for series in run.layout.series:
        own = _own_buffers(into, accumulate) if series.long else into
        for k, group in enumerate(series.groups):
            waiting = 0
            for tile in group:
                a = run.forward(tile.rows) if len(tile) else None
                if not series.long:
                    run.join(tile.pairs)
                    if wanted:
                        pairs = slice(tile.pairs.start, tile.pairs.stop)
                        scaled = coefficients(tokens, pairs, settings) / settings.beta
                        torch.mul(scaled[:, None], signs[pairs], out=signed[pairs])
                if wanted and a is not None:
                    g = run.gradient(tile.rows, a, (signs if series.long else signed).flatten(), waiting)
                    waiting += len(tile)
            if waiting:
                run.backward(group, g, own, k > 0 if series.long else accumulate)
                accumulate = True
        if series.long:
            run.join(series.pairs)
        if series.long and wanted:
            (coefficient,) = coefficients(tokens, slice(series.pairs.start, series.pairs.stop), settings)
            if n_pairs == 1:
                unit = (coefficient / enlarged).to(unit.dtype)
            else:
                tiles = series.tiles
                rows = run.layout.order[tiles[0].rows.start : tiles[-1].rows.stop]
                _scale(own, into, rows, (coefficient / settings.beta).to(unit.dtype))
    run.finish(into)
    return results(tokens, settings), unit


def _enlargement(policy: Head, epsilon: float) -> float:
    """The power of two by which fp16 tiles hold gradients enlarged; 1 for other dtypes, whose exponents reach further.

    c/β·(p − onehot) of a pair that is learnt well is all but 0, and fp16 ends at 6e-8, before any loss scaler comes in.
    |c/β| is at most 1/(1 − ε); what the power leaves of fp16's range is for rounding.
    """
    if policy.gradient_dtype != torch.float16:
        return 1.0
    _, exponent = math.frexp(max(abs(policy.scale), 1.0) / (1 - epsilon))
    return math.ldexp(1.0, 15 - exponent)


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
