"""The language-model head: the matrix products between hidden states and logits, and nothing else.

Products accumulate in fp32 (float64 for float64 inputs) and are never rounded to a 16-bit dtype on their way to the
sweep: that rounding alone decides ε-DPO's check and biases the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """logits = softcap·tanh(scale·(x·Wᵀ + bias) / softcap), the order that transformers' models apply them in.

    Here are the products; what comes after x·Wᵀ belongs to the tile operations, which read a tile anyway.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def to(self, dtype: torch.dtype) -> Head:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.scale, self.softcap)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What :meth:`backward` takes its gradient tile in: 16 bits only where a product of them gives fp32."""
        weight = self.weight
        return weight.dtype if weight.dtype == torch.float64 or weight.is_cuda else torch.float32

    def project(self, x: Tensor, out: Tensor) -> None:
        """x·Wᵀ: (rows, H) -> out (rows, V) in the compute dtype, overwritten."""
        if self.weight.dtype == out.dtype:
            torch.mm(x, self.weight.t(), out=out)
        elif x.is_cuda:
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            x = x.to(out.dtype)
            for start in range(0, self.weight.shape[0], CAST_ROWS):
                block = slice(start, start + CAST_ROWS)
                out[:, block] = x @ self.weight[block].to(out.dtype).t()

    def backward(self, g: Tensor, x: Tensor, rows: Tensor, into: Gradients, accumulate: bool) -> None:
        """Adds the gradients that follow from g, the gradient of x·Wᵀ + bias.

        Args:
            g: (rows, V) in ``gradient_dtype``; its rows may lie apart.
            x: (rows, H) the hidden states that were projected.
            rows: (rows,) their indices in ``into.hidden``, which is overwritten there.
            accumulate: False overwrites ``into.weight`` and ``into.bias`` (which may be uninitialised).
        """
        beta = 1 if accumulate else 0
        if into.bias is not None:
            total = g.sum(0, dtype=into.bias.dtype)
            into.bias.add_(total) if accumulate else into.bias.copy_(total)
        if self.weight.dtype == g.dtype:
            wide: dict[str, Any] = {} if g.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
            if into.hidden is not None:
                into.hidden.index_copy_(0, rows, torch.mm(g, self.weight, **wide))
            if into.weight is not None:
                torch.addmm(into.weight, g.t(), x, beta=beta, out=into.weight, **wide)
            return
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
