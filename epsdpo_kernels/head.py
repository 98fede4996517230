"""The language-model head: the matrix products between hidden states and logits, and nothing else.

Products accumulate in fp32 (float64 for float64 inputs) and are never rounded to a 16-bit dtype on their way to the
sweep: that rounding alone decides ε-DPO's check and biases the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Without a 16-bit product that accumulates into fp32 (CPU), the weight is cast in blocks of this many vocabulary rows.
CAST_ROWS = 8192


class Gradients(NamedTuple):
    """Where a head's gradients accumulate, in the compute dtype; None where not asked for."""

    hidden: Tensor | None  # (M, H), M all rows of the input
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class Head:
    """logits = softcap·tanh(scale·(x·Wᵀ + bias) / softcap), the order that transformers' models apply them in."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    @property
    def _products_in_place(self) -> bool:
        return self.weight.dtype in (torch.float32, torch.float64)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """(rows, H) -> out (rows, V), overwritten."""
        if self._products_in_place:
            torch.mm(x, self.weight.t(), out=out)
        elif x.is_cuda:
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            x = x.to(out.dtype)
            for start in range(0, self.weight.shape[0], CAST_ROWS):
                block = slice(start, start + CAST_ROWS)
                out[:, block] = x @ self.weight[block].to(out.dtype).t()
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, g: Tensor, x: Tensor, rows: Tensor, into: Gradients, scratch: Tensor, accumulate: bool) -> None:
        """Adds the gradients that follow from g (rows, V), the gradient of x·Wᵀ + bias.

        Args:
            g: (rows, V) in the compute dtype.
            x: (rows, H) the hidden states that were projected.
            rows: (rows,) their indices in ``into.hidden``, which is overwritten there.
            scratch: (rows, V) in the compute dtype, free to be overwritten.
            accumulate: False overwrites ``into.weight`` and ``into.bias`` (which may be uninitialised).
        """
        beta = 1 if accumulate else 0
        if into.bias is not None:
            torch.add(g.sum(0), into.bias, out=into.bias) if accumulate else torch.sum(g, 0, out=into.bias)
        if self._products_in_place:
            if into.hidden is not None:
                into.hidden.index_copy_(0, rows, torch.mm(g, self.weight))
            if into.weight is not None:
                torch.addmm(into.weight, g.t(), x, beta=beta, out=into.weight)
        elif x.is_cuda:
            # The dead reference tile holds the gradient in the weight's dtype, so no third tile is needed.
            g16 = scratch.view(-1).view(x.dtype)[: g.numel()].view_as(g).copy_(g)
            if into.hidden is not None:
                into.hidden.index_copy_(0, rows, torch.mm(g16, self.weight, out_dtype=g.dtype))
            if into.weight is not None:
                torch.addmm(into.weight, g16.t(), x, beta=beta, out_dtype=g.dtype, out=into.weight)
        else:
            x = x.to(g.dtype)
            dx = g.new_zeros(x.shape)
            for start in range(0, self.weight.shape[0], CAST_ROWS):
                block = slice(start, start + CAST_ROWS)
                if into.hidden is not None:
                    dx.addmm_(g[:, block], self.weight[block].to(g.dtype))
                if into.weight is not None:
                    dw = into.weight[block]
                    torch.addmm(dw, g[:, block].t(), x, beta=beta, out=dw)
            if into.hidden is not None:
                into.hidden.index_copy_(0, rows, dx)
