"""The tile operations in plain torch: one sweep over two tiles of logits, and the gradient in the policy's own tile.

Both walk over a few rows at a time, so that the dozen elementwise passes run in cache and not in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import statistics as st
from .head import Head
from .statistics import Tokens

# Elements a chunk of rows may hold. Measured on 2 CPU cores at V 49152: 4 to 8 rows are fastest, 64 take 1.6 times
# as long.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
# e^x as 2^(x·log₂e): exp2 takes a tenth of exp's time on a CPU, whose exp may come from a library made for another one.
LOG2_E = math.log2(math.e)
# Up to here Taylor's polynomial of degree 6 in u is as good as fp32.
SMALL_U = 0.25


def _chunks(tile: Tensor) -> range:
    limit = CHUNK_ELEMENTS.get(tile.device.type, 1 << 22)
    return range(0, tile.shape[0], max(1, limit // tile.shape[1]))


def _logits(products: Tensor, head: Head) -> Tensor:
    """The logits that follow from x·Wᵀ: the products themselves where nothing follows, else a new tensor."""
    logits = products if head.bias is None else products + head.bias
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh_().mul_(head.softcap)
    return logits


def sweep(a: Tensor, b: Tensor, tile: slice, tokens: Tokens, policy: Head, reference: Head, epsilon: float) -> None:
    """Writes the sums of a tile's tokens, and reduces and decides every pair that they complete.

    Args:
        a: (rows, V) the policy's x·Wᵀ, kept.
        b: (rows, V) the reference's, overwritten.
        tile: the tokens that the rows are. A negative label is in another slice of the vocabulary.
    """
    labels, out = tokens.labels[tile, None], tokens.swept[:, tile]
    # A bias may be −inf: a word that the policy gives no probability counts for nothing.
    masked = policy.bias is not None or reference.bias is not None
    chunks = _chunks(a)
    scratch = a.new_empty(3, min(chunks.step, a.shape[0]), a.shape[1])
    for start in chunks:
        part = slice(start, start + chunks.step)
        a_, b_, o = _logits(a[part], policy), _logits(b[part], reference), out[:, part]
        for row, logits in ((st.LABEL, a_), (st.REF_LABEL, b_)):
            of_label = logits.gather(1, labels[part].clamp_min(0))
            o[row] = of_label.masked_fill_(labels[part] < 0, -torch.inf)[:, 0]
        centred, e, d = scratch[:, : a_.shape[0]]
        top, ref_top = a_.amax(1, keepdim=True), b_.amax(1, keepdim=True)
        torch.sub(a_, top, out=centred)
        torch.mul(centred, LOG2_E, out=e).exp2_()
        torch.sub(a_, b_, out=d)
        if masked:
            impossible = a_ == -torch.inf
            d.masked_fill_(impossible, 0)
            centred.masked_fill_(impossible, 0)
        o[st.MAX], o[st.REF_MAX] = top[:, 0], ref_top[:, 0]
        o[st.SUM] = e.sum(1)
        o[st.REF_SUM] = b_.sub_(ref_top).mul_(LOG2_E).exp2_().sum(1)
        o[st.CENTRED] = torch.linalg.vecdot(e, centred)
        o[st.DIFFERENCE] = torch.linalg.vecdot(e, d)
        if epsilon == 0:
            o[st.RELAXED] = o[st.TIGHTENED] = 0
        elif d.device.type == "cpu" and d.dtype == torch.float32:
            # Row by row, so that a token's sums do not depend on its neighbours'.
            large = ~(torch.maximum(d.amax(1), -d.amin(1)) * epsilon <= SMALL_U)
            o[st.RELAXED], o[st.TIGHTENED] = _perturbed_by_moments(e, d, o[st.DIFFERENCE], epsilon, b_, centred)
            if large.any():
                o[st.RELAXED, large], o[st.TIGHTENED, large] = _perturbed(e[large], d[large], epsilon)
        else:
            o[st.RELAXED], o[st.TIGHTENED] = _perturbed(e, d, epsilon)
    st.reduce_pairs(tokens, tokens.completed(tile), epsilon)


def _perturbed(e: Tensor, d: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Σ e·(e^u − 1) and Σ e·(e^−u − 1) over the vocabulary with u = ε·d: (rows, V) -> 2 × (rows,). Overwrites d."""
    u = d.mul_(epsilon)
    return torch.linalg.vecdot(e, torch.expm1(u)), torch.linalg.vecdot(e, torch.expm1(u.neg_()))


def _perturbed_by_moments(
    e: Tensor, d: Tensor, first: Tensor, epsilon: float, square: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from the moments Σ e·d^k, for |u| up to ``SMALL_U``.

    ``first`` is Σ e·d, ``square`` and ``product`` are scratch like e.
    """
    torch.mul(d, d, out=square)
    torch.mul(e, square, out=product)
    second, third = product.sum(1), torch.linalg.vecdot(product, d)
    product.mul_(square)
    fourth, fifth, sixth = product.sum(1), torch.linalg.vecdot(product, d), torch.linalg.vecdot(product, square)
    sinh = epsilon * first + epsilon**3 / 6 * third + epsilon**5 / 120 * fifth
    cosh_1 = epsilon**2 / 2 * second + epsilon**4 / 24 * fourth + epsilon**6 / 720 * sixth
    return cosh_1 + sinh, cosh_1 - sinh


def gradient(a: Tensor, tile: slice, tokens: Tokens, coefficient: Tensor, policy: Head) -> Tensor:
    """Overwrites the policy's tile by coefficient·(softmax(a) − onehot(label)), carried back through softcap and scale.

    Args:
        a: (rows, V) the policy's x·Wᵀ, as the sweep saw it, overwritten.
        tile: the tokens that the rows are.
        coefficient: (rows,) what multiplies p − onehot, sign included.

    Returns:
        (rows, V) the gradient of x·Wᵀ + bias in the policy's ``gradient_dtype``, in a's own memory.
    """
    swept, labels = tokens.swept[:, tile], tokens.labels[tile, None]
    top, softcap = swept[st.MAX, :, None], policy.softcap
    factor = (coefficient / swept[st.SUM] * policy.scale)[:, None]
    minus = torch.where(labels < 0, 0, coefficient[:, None] * policy.scale)
    # 16-bit gradients lie in the front half of their row.
    out = a if policy.gradient_dtype == a.dtype else a.view(policy.gradient_dtype)[:, : a.shape[1]]
    chunks = _chunks(a)
    for start in chunks:
        part = slice(start, start + chunks.step)
        logits = _logits(a[part], policy)
        slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
        g = torch.sub(logits, top[part], out=a[part]).mul_(LOG2_E).exp2_().mul_(factor[part])
        g.scatter_add_(1, labels[part].clamp_min(0), -minus[part])
        if slope is not None:
            g.mul_(slope)
        if out is not a:
            out[part] = g.to(out.dtype)
    return out
