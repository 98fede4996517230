"""The language-model head: the matrix products between hidden states and logits, and nothing else.

Products accumulate in fp32 (float64 for float64 inputs) and are never rounded to a 16-bit dtype on their way to the
sweep: that rounding alone decides ε-DPO's check and biases the gradient. Nor does TF32 form the logits of an fp32 head,
where the process allows it; its gradients follow that setting.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The precision of products is the process's, there is none of a thread: so one thread at a time sets it.
_PRECISION = threading.RLock()
# Off CUDA, products go over blocks of this many vocabulary rows: what is cast and what is multiplied stays in cache.
BLOCK = 2048


def _own_precision(mode: Any, above: Any) -> str:
    """What a mode of torch's is set to: "none" where it follows the one above, whose setting its getter gives then."""
    return "none" if mode.fp32_precision == above.fp32_precision else mode.fp32_precision


@contextlib.contextmanager
def _cpu_precision(dtype: torch.dtype) -> Iterator[None]:
    """How a CPU multiplies fp32 tensors that hold a head of this dtype, for the time being.

    Those of a bf16 head are bf16 numbers already: instructions that take such and accumulate in fp32 round no logit,
    and are faster where a CPU has them. Those of any other head are multiplied in fp32, whatever the process has
    allowed (``torch.set_float32_matmul_precision``): less would decide ε-DPO's check.
    """
    mkldnn: Any = torch.backends.mkldnn
    mode = mkldnn.matmul
    with _PRECISION:
        before = _own_precision(mode, mkldnn)
        mode.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
        try:
            yield
        finally:
            mode.fp32_precision = before


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """A GPU's fp32 products with all their digits, for the time being, whatever the process has allowed.

    Both of torch's interfaces are set, because it refuses to multiply where they disagree.
    """
    backends: Any = torch.backends
    with _PRECISION:
        modes = ((backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn))
        each = [(mode, _own_precision(mode, above)) for mode, above in modes]
        try:
            overall = torch.get_float32_matmul_precision()
        except RuntimeError:  # they disagree: the newer one alone was used
            overall = "highest"
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(overall)
            for mode, before in each:
                mode.fp32_precision = before


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ of two fp32 matrices.

    On a CPU by oneDNN, through the op that Inductor compiles a linear layer to: torch.mm and torch.nn.functional.linear
    go to MKL, which uses half of the vector width of processors that Intel did not make. The op is private until one
    of those lets the caller choose.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


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
        if out.dtype == torch.float32 and not x.is_cuda:
            x = x.to(out.dtype)
            with _cpu_precision(self.weight.dtype):
                for block in self._blocks():
                    out[:, block] = _linear(x, self.weight[block].to(out.dtype))
        elif self.weight.dtype == out.dtype:
            with _without_tf32():
                torch.mm(x, self.weight.t(), out=out)
        else:
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, start + BLOCK) for start in range(0, len(self.weight), BLOCK))

    def backward(self, g: Tensor, x: Tensor, rows: Tensor, into: Gradients, accumulate: bool) -> None:
        """Adds the gradients that follow from g, the gradient of x·Wᵀ + bias.

        Args:
            g: (rows, V) in ``gradient_dtype``; its rows may lie apart.
            x: (rows, H) the hidden states that were projected.
            rows: (rows,) their indices in ``into.hidden``, which is overwritten there.
            accumulate: False overwrites ``into.weight`` and ``into.bias`` (which may be uninitialised).
        """
        if into.bias is not None:
            total = g.sum(0, dtype=into.bias.dtype)
            into.bias.add_(total) if accumulate else into.bias.copy_(total)
        if g.dtype == torch.float32 and not g.is_cuda:
            self._backward_by_blocks(g, x.to(g.dtype), rows, into, accumulate)
            return
        wide: dict[str, Any] = {} if g.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
        if into.hidden is not None:
            into.hidden.index_copy_(0, rows, torch.mm(g, self.weight, **wide))
        if into.weight is not None:
            torch.addmm(into.weight, g.t(), x, beta=int(accumulate), out=into.weight, **wide)

    def _backward_by_blocks(self, g: Tensor, x: Tensor, rows: Tensor, into: Gradients, accumulate: bool) -> None:
        dx = torch.zeros_like(x)
        with _cpu_precision(self.weight.dtype):
            for block in self._blocks():
                if into.hidden is not None:
                    dx += _linear(g[:, block], self.weight[block].to(g.dtype).t())
                if into.weight is not None:
                    dw = _linear(g[:, block].t(), x.t())
                    into.weight[block].add_(dw) if accumulate else into.weight[block].copy_(dw)
        if into.hidden is not None:
            into.hidden.index_copy_(0, rows, dx)
