"""What one sweep over the vocabulary keeps of a token, and what follows from it.

With a, b the logits of policy and reference, p = softmax(a), d = a − b and u = ε·d, the sweep keeps ten numbers a
token. They are sums relative to a maximum, so two slices of a vocabulary merge by rescaling and adding. The perturbed
log-probs are differences from the start: E_p[e^u − 1] and E_p[e^−u − 1] are of order ε, where subtracting two
log-softmaxes of order 10² would leave rounding to decide the check.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pair import perturbation_step


class Swept(NamedTuple):
    """Rows of the (SWEPT, N) tensor that a sweep writes; ``Swept(*tensor)`` names them."""

    max: Tensor  # (N,) of a
    sum: Tensor  # Σ e, with e = exp(a − max)
    ref_max: Tensor  # of b
    ref_sum: Tensor
    difference: Tensor  # Σ e·d
    relaxed: Tensor  # Σ e·(exp(u) − 1)
    tightened: Tensor  # Σ e·(exp(−u) − 1)
    centred: Tensor  # Σ e·(a − max)
    label: Tensor  # a of the label, −inf where another slice has it
    ref_label: Tensor


class TokenStatistics(NamedTuple):
    """Rows of the (TOKEN, …) tensors of statistics, in nats but for the last."""

    logp: Tensor
    ref_logp: Tensor
    relaxed_shift: Tensor
    tightened_shift: Tensor
    kl: Tensor
    entropy: Tensor
    correct: Tensor  # 1 where the policy ranks the label first


SWEPT, TOKEN = len(Swept._fields), len(TokenStatistics._fields)
# Of a completion: entropy and correct are means over its tokens, the others sums.
MEANS = slice(5, TOKEN)


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of a call, in the order of their completions, and what the sweeps write about them.

    Completion 2i is pair i's chosen one, 2i + 1 its rejected one.
    """

    labels: Tensor  # (N,) int64
    completion: Tensor  # (N,) int64, the completion that a token belongs to
    count: Tensor  # (B, 2) float64, tokens of a completion: this rank's until all ranks' are joined
    bounds: Tensor  # (2B+1,) int64, completion j has the tokens bounds[j] … bounds[j+1] − 1
    edges: list[int]  # the same on the host
    swept: Tensor  # (SWEPT, N) in the compute dtype
    sums: Tensor  # (TOKEN, B, 2) float64, a completion's, of its tokens; see MEANS
    step: Tensor  # (B,) int8
    arrived: Tensor  # (B,) int32, zero before; counts a pair's tokens as a kernel finishes them

    def completed(self, tile: slice) -> range:
        """The pairs whose last token is in a tile."""
        ends = self.edges[2::2]
        return range(bisect_right(ends, tile.start), bisect_right(ends, tile.stop))


def merge(parts: Tensor) -> Tensor:
    """Joins the sums of several vocabulary slices: (slices, SWEPT, N) -> (SWEPT, N).

    ``centred`` is relative to its slice's maximum, so moving to the common one adds (old − new)·sum. Labels are owned
    by one slice and −inf on the others.
    """
    out = torch.empty_like(parts[0])
    whole, of = Swept(*out), Swept(*parts.unbind(1))
    torch.amax(of.max, 0, out=whole.max)
    torch.amax(of.ref_max, 0, out=whole.ref_max)
    shift = of.max - whole.max
    rescale = shift.exp()
    whole.sum.copy_((of.sum * rescale).sum(0))
    whole.ref_sum.copy_((of.ref_sum * (of.ref_max - whole.ref_max).exp()).sum(0))
    whole.difference.copy_((of.difference * rescale).sum(0))
    whole.relaxed.copy_((of.relaxed * rescale).sum(0))
    whole.tightened.copy_((of.tightened * rescale).sum(0))
    moved = torch.where(rescale > 0, of.centred + shift * of.sum, 0)
    whole.centred.copy_((moved * rescale).sum(0))
    torch.amax(of.label, 0, out=whole.label)
    torch.amax(of.ref_label, 0, out=whole.ref_label)
    return out


def token_statistics(swept: Tensor, epsilon: float) -> Tensor:
    """(SWEPT, N) sums of whole vocabularies -> (TOKEN, N) statistics of the tokens."""
    of = Swept(*swept)
    log_sum, ref_log_sum = of.sum.log(), of.ref_sum.log()
    u = epsilon * (of.label - of.ref_label)
    statistics = TokenStatistics(
        logp=of.label - of.max - log_sum,
        ref_logp=of.ref_label - of.ref_max - ref_log_sum,
        relaxed_shift=u - torch.log1p(of.relaxed / of.sum),
        tightened_shift=-u - torch.log1p(of.tightened / of.sum),
        # The two lse separately would cancel: their maxima differ exactly, and their sums are nearly the same.
        kl=of.difference / of.sum - (of.max - of.ref_max) - (of.sum / of.ref_sum).log(),
        entropy=log_sum - of.centred / of.sum,
        correct=(of.label >= of.max).to(swept.dtype),
    )
    return torch.stack(statistics)


def reduce_pairs(tokens: Tokens, pairs: range, epsilon: float) -> None:
    """Writes ``sums`` and ``step`` of pairs whose tokens have all been swept.

    Each completion is summed by itself in float64, so that a pair's figures do not depend on its neighbours.
    """
    if not pairs:
        return
    edges = tokens.edges[2 * pairs.start : 2 * pairs.stop + 1]
    first = edges[0]
    of_token = token_statistics(tokens.swept[:, first : edges[-1]], epsilon)
    for j, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        sums = tokens.sums[:, pairs.start + j // 2, j % 2]
        torch.sum(of_token[:, start - first : stop - first], 1, dtype=torch.float64, out=sums)
        sums[MEANS] /= stop - start
    part = slice(pairs.start, pairs.stop)
    tokens.step[part] = perturbation_step(*shifts(tokens.sums[:, part]))


def shifts(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(TOKEN, pairs, 2) -> Δ_relaxed, Δ_tightened, each (pairs,): how z moves under the two perturbed policies."""
    of = TokenStatistics(*sums)
    relaxed, tightened = (side[:, 0] - side[:, 1] for side in (of.relaxed_shift, of.tightened_shift))
    return relaxed, tightened
