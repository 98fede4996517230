"""The tile operations in plain torch: one sweep over two tiles of logits, and the gradient in the policy's own tile.

Both walk over a few rows at a time, so that the dozen elementwise passes run in cache and not in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..head import Head
from ..statistics import Swept, Tokens, reduce_pairs

# Elements a chunk of rows may hold. Measured on 2 CPU cores at V 49152: 10 to 40 rows are fastest, 5 take 1.4 times as
# long and 2 take 1.6 times, because every operation on a chunk costs microseconds of its own.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
# e^x as 2^(x·log₂e): exp2 takes a tenth of exp's time on a CPU, whose exp may come from a library made for another one.
LOG2_E = math.log2(math.e)
# Up to which |u| Taylor's polynomials of which degree are as good as fp32: what they leave out of sinh u is below 6e-8
# of it.
DEGREES = {0.05: 4, 0.25: 6, 0.6: 8, 1.0: 10}
# Its tenth power, summed over a vocabulary, is still a number in fp32.
LARGEST_D = 1000.0


def _chunks(tile: Tensor) -> range:
    limit = CHUNK_ELEMENTS.get(tile.device.type, 1 << 22)
    return range(0, tile.shape[0], max(1, limit // tile.shape[1]))


def _logits(products: Tensor, head: Head) -> Tensor:
    """The logits that follow from x·Wᵀ: the products themselves where nothing follows, else a new tensor.

    An infinite product that is capped gives NaN: a finite logit would look like one that is right.
    """
    logits = products if head.bias is None else products + head.bias
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh_().mul_(head.softcap).add_(products, alpha=0)
    return logits


def sweep(a: Tensor, b: Tensor, tile: slice, tokens: Tokens, policy: Head, reference: Head, epsilon: float) -> None:
    """Writes the sums of a tile's tokens, and reduces and decides every pair that they complete.

    Args:
        a: (rows, V) the policy's x·Wᵀ, kept.
        b: (rows, V) the reference's, overwritten.
        tile: the tokens that the rows are. A negative label is in another slice of the vocabulary.
    """
    labels, out = tokens.labels[tile, None], Swept(*tokens.swept[:, tile])
    # A bias may be −inf: a word that the policy gives no probability counts for nothing.
    masked = policy.bias is not None or reference.bias is not None
    moments = _Moments(a, epsilon) if a.device.type == "cpu" and a.dtype == torch.float32 and epsilon else None
    chunks, least = _chunks(a), torch.finfo(a.dtype).min
    # Laid out as the tiles are: a sum over rows that lie otherwise rounds otherwise, and equal models must have KL 0.
    scratch = a.new_empty(2, min(chunks.step, a.shape[0]), a.stride(0))[..., : a.shape[1]]
    for start in chunks:
        part = slice(start, start + chunks.step)
        a_, b_, o = _logits(a[part], policy), _logits(b[part], reference), Swept(*(row[part] for row in out))
        torch.gather(a_, 1, labels[part].clamp_min(0), out=o.label[:, None])
        torch.gather(b_, 1, labels[part].clamp_min(0), out=o.ref_label[:, None])
        # Of a slice whose words are all impossible, −inf would be subtracted from −inf.
        top = torch.amax(a_, 1, out=o.max).clamp_(min=least)[:, None]
        ref_top = torch.amax(b_, 1, out=o.ref_max).clamp_(min=least)[:, None]
        # Each product goes into memory that is there: a new one would be paged in again for every chunk.
        e, d = scratch[:, : a_.shape[0]]
        torch.sub(a_, b_, out=d)
        torch.sum(b_.sub_(ref_top).mul_(LOG2_E).exp2_(), 1, out=o.ref_sum)
        product = torch.sub(a_, top, out=b_)
        torch.mul(product, LOG2_E, out=e).exp2_()
        if masked:
            impossible = a_ == -torch.inf
            d.masked_fill_(impossible, 0)
            product.masked_fill_(impossible, 0)
        torch.sum(e, 1, out=o.sum)
        torch.sum(product.mul_(e), 1, out=o.centred)
        torch.sum(torch.mul(e, d, out=product), 1, out=o.difference)
        if moments is not None:
            moments.add(part, e, d, product, a_, top)
        elif epsilon:
            _fill(o, _perturbed(e, d, torch.sub(a_, top, out=product), epsilon))
    for row in (out.label, out.ref_label):
        row.masked_fill_(labels[:, 0] < 0, -torch.inf)
    if epsilon == 0:
        out.relaxed.zero_(), out.tightened.zero_()
    elif moments is not None:
        _fill(out, moments.perturbed())
    reduce_pairs(tokens, tokens.completed(tile), epsilon)


def _fill(out: Swept, perturbed: tuple[Tensor, Tensor]) -> None:
    out.relaxed.copy_(perturbed[0])
    out.tightened.copy_(perturbed[1])


def _perturbed(e: Tensor, d: Tensor, x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Σ e·(e^u − 1) and Σ e·(e^−u − 1) over the vocabulary with u = ε·d and e = e^x: (rows, V) -> 2 × (rows,).

    Overwrites d. Where u is large, a factor e^u of its own would overflow at a word whose e is nothing: 0·∞.
    """
    u = d.mul_(epsilon)
    large = u.abs() > 1
    small = u.masked_fill(large, 0)
    grown, shrunk = (
        torch.linalg.vecdot(e, torch.expm1(sign * small)) + torch.where(large, torch.exp(x + sign * u) - e, 0).sum(1)
        for sign in (1, -1)
    )
    return grown, shrunk


class _Moments:
    """The same for a tile in fp32 on a CPU, by Taylor's polynomials from the moments Σ e·d^k.

    How many of them count, each row says for itself: a token's sums do not depend on its neighbours'.
    """

    def __init__(self, a: Tensor, epsilon: float):
        self.epsilon = epsilon
        self.limit = min(max(DEGREES), epsilon * LARGEST_D)
        self.moments = a.new_zeros(max(DEGREES.values()), a.shape[0])
        self.largest = a.new_empty(a.shape[0])  # |u| of the row
        self.exact = a.new_empty(2, a.shape[0])  # the sums of rows whose |u| is beyond the polynomials

    def add(self, part: slice, e: Tensor, d: Tensor, product: Tensor, logits: Tensor, top: Tensor) -> None:
        """Takes a chunk of rows with e = exp(logits − top); ``product`` is e·d, and it and d are overwritten."""
        largest = torch.mul(torch.maximum(d.amax(1), -d.amin(1)), self.epsilon, out=self.largest[part])
        most = largest.max().item()
        torch.sum(product, 1, out=self.moments[0, part])
        for k in range(2, next((n for limit, n in DEGREES.items() if most <= limit), len(self.moments)) + 1):
            torch.sum(product.mul_(d), 1, out=self.moments[k - 1, part])
        if not most <= self.limit:
            beyond = ~(largest <= self.limit)
            x = logits[beyond] - top[beyond]
            self.exact[:, part][:, beyond] = torch.stack(_perturbed(e[beyond], d[beyond], x, self.epsilon))

    def perturbed(self) -> tuple[Tensor, Tensor]:
        degree = 4 + 2 * sum(self.largest > limit for limit in list(DEGREES)[:-1])
        k = torch.arange(1, len(self.moments) + 1, dtype=torch.float64, device=self.moments.device)[:, None]
        terms = torch.where(k <= degree, self.moments * (self.epsilon**k / (k + 1).lgamma().exp()), 0)
        sinh, cosh_1 = terms[0::2].sum(0), terms[1::2].sum(0)
        within = self.largest <= self.limit
        return torch.where(within, cosh_1 + sinh, self.exact[0]), torch.where(within, cosh_1 - sinh, self.exact[1])


def gradient(a: Tensor, tile: slice, tokens: Tokens, coefficient: Tensor, policy: Head, out: Tensor) -> None:
    """Writes coefficient·(softmax(a) − onehot(label)), carried back through softcap and scale.

    Args:
        a: (rows, V) the policy's x·Wᵀ, as the sweep saw it; not to be read afterwards.
        tile: the tokens that the rows are.
        coefficient: (2B,) what multiplies p − onehot in a completion, sign included.
        out: (rows, V) takes the gradient of x·Wᵀ + bias: a itself, or a tile in the policy's ``gradient_dtype``.
    """
    swept, labels = Swept(*tokens.swept[:, tile]), tokens.labels[tile, None]
    coefficient = coefficient[tokens.completion[tile]]
    top, softcap = swept.max[:, None], policy.softcap
    factor = (coefficient / swept.sum * policy.scale)[:, None]
    minus = torch.where(labels < 0, 0, coefficient[:, None] * policy.scale)
    chunks = _chunks(a)
    for start in chunks:
        part = slice(start, start + chunks.step)
        logits = _logits(a[part], policy)
        slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
        g = torch.sub(logits, top[part], out=a[part]).mul_(LOG2_E).exp2_().mul_(factor[part])
        g.scatter_add_(1, labels[part].clamp_min(0), -minus[part])
        if slope is not None:
            g.mul_(slope)
        if out.dtype != a.dtype:
            out[part] = g


def scaled(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """g·factor in another dtype, rounded once, without a second copy in g's own."""
    return torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype))
