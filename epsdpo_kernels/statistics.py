"""What one sweep over the vocabulary keeps of a token, and what follows from it.

With a, b the logits of policy and reference, p = softmax(a), d = a − b and u = ε·d, the sweep keeps ten numbers a
token. They are sums relative to a maximum, so two slices of a vocabulary merge by rescaling and adding. The perturbed
log-probs are differences from the start: E_p[e^u − 1] and E_p[e^−u − 1] are of order ε, where subtracting two
log-softmaxes of order 10² would leave rounding to decide the check.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pair import perturbation_step

# Rows of the (SWEPT, N) tensor of sums that a sweep writes.
MAX, SUM, REF_MAX, REF_SUM, DIFFERENCE, RELAXED, TIGHTENED, CENTRED, LABEL, REF_LABEL = range(SWEPT := 10)
# Rows of the (TOKEN, …) tensors of statistics, in nats but for the last: 1 where the policy ranks the label first.
LOGP, REF_LOGP, RELAXED_SHIFT, TIGHTENED_SHIFT, KL, ENTROPY, CORRECT = range(TOKEN := 7)
# Those that are means over a completion's tokens; the others are sums.
MEANS = slice(ENTROPY, TOKEN)


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of a call, in the order of their completions, and what the sweeps write about them.

    Completion 2i is pair i's chosen one, 2i + 1 its rejected one.
    """

    labels: Tensor  # (N,) int64
    completion: Tensor  # (N,) int64, the completion that a token belongs to
    bounds: Tensor  # (2B+1,) int64, completion j has the tokens bounds[j] … bounds[j+1] − 1
    edges: list[int]  # the same on the host
    swept: Tensor  # (SWEPT, N) in the compute dtype
    sums: Tensor  # (TOKEN, B, 2) float64, a completion's, of its tokens; see MEANS
    step: Tensor  # (B,) int8
    arrived: Tensor  # (B,) int32, zero before; counts a pair's tokens as a kernel finishes them

    def completed(self, tile: slice) -> range:
        """The pairs whose last token is in a tile."""
        ends = [i for i, end in enumerate(self.edges[2::2]) if tile.start < end <= tile.stop]
        return range(ends[0], ends[-1] + 1) if ends else range(0)


def merge(parts: Tensor) -> Tensor:
    """Joins the sums of several vocabulary slices: (slices, SWEPT, N) -> (SWEPT, N).

    CENTRED is relative to its slice's maximum, so moving to the common one adds (old − new)·SUM. Labels are owned by
    one slice and −inf on the others.
    """
    out = torch.empty_like(parts[0])
    torch.amax(parts[:, MAX], 0, out=out[MAX])
    torch.amax(parts[:, REF_MAX], 0, out=out[REF_MAX])
    shift = parts[:, MAX] - out[MAX]
    rescale = shift.exp()
    out[SUM] = (parts[:, SUM] * rescale).sum(0)
    out[REF_SUM] = (parts[:, REF_SUM] * (parts[:, REF_MAX] - out[REF_MAX]).exp()).sum(0)
    for row in (DIFFERENCE, RELAXED, TIGHTENED):
        out[row] = (parts[:, row] * rescale).sum(0)
    moved = torch.where(rescale > 0, parts[:, CENTRED] + shift * parts[:, SUM], 0)
    out[CENTRED] = (moved * rescale).sum(0)
    torch.amax(parts[:, LABEL], 0, out=out[LABEL])
    torch.amax(parts[:, REF_LABEL], 0, out=out[REF_LABEL])
    return out


def token_statistics(swept: Tensor, epsilon: float) -> Tensor:
    """(SWEPT, N) sums of whole vocabularies -> (TOKEN, N) statistics of the tokens."""
    log_sum, ref_log_sum = swept[SUM].log(), swept[REF_SUM].log()
    u = epsilon * (swept[LABEL] - swept[REF_LABEL])
    out = swept.new_empty(TOKEN, swept.shape[1])
    out[LOGP] = swept[LABEL] - swept[MAX] - log_sum
    out[REF_LOGP] = swept[REF_LABEL] - swept[REF_MAX] - ref_log_sum
    out[RELAXED_SHIFT] = u - torch.log1p(swept[RELAXED] / swept[SUM])
    out[TIGHTENED_SHIFT] = -u - torch.log1p(swept[TIGHTENED] / swept[SUM])
    # The two lse separately would cancel: their maxima differ exactly, their logs are small.
    out[KL] = swept[DIFFERENCE] / swept[SUM] - (swept[MAX] - swept[REF_MAX]) - (log_sum - ref_log_sum)
    out[ENTROPY] = log_sum - swept[CENTRED] / swept[SUM]
    out[CORRECT] = swept[LABEL] >= swept[MAX]
    return out


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
    relaxed, tightened = (sums[row, :, 0] - sums[row, :, 1] for row in (RELAXED_SHIFT, TIGHTENED_SHIFT))
    return relaxed, tightened
