"""The tile operations: one file an engine, and the parts of Triton's. They know tiles and tokens, no losses."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..head import Head
from ..statistics import SWEPT
from . import torch_engine

ENGINES = ("auto", "torch", "triton")
# The oldest generation of NVIDIA's that Triton's kernels are compiled for.
LEAST_CAPABILITY = 8
# Whether Triton goes through its logit-free kernel, or through library products and a sweep: None leaves it to the
# rule in triton_blocks. Tests and benchmarks say True or False.
LOGIT_FREE: bool | None = None


def check(name: str, dtype: torch.dtype) -> None:
    """Raises ValueError or TypeError where there is no such engine, or it does not take this dtype."""
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, takes one of {ENGINES}")
    if name == "triton" and dtype == torch.float64:
        raise TypeError("hidden: got torch.float64, which the engine 'triton' has not; takes engine 'torch'")


def tile_operations(name: str, hidden: Tensor) -> ModuleType:
    """The module of an engine's ``sweep``, ``gradient`` and ``scaled``; "auto" is Triton's where that runs.

    Raises:
        ValueError: the engine does not run on this device.
    """
    if name == "torch" or name == "auto" and not (hidden.is_cuda and hidden.dtype != torch.float64):
        return torch_engine
    lacks = _lacks(hidden.device)
    if lacks and name == "auto":
        return torch_engine
    if lacks:
        raise ValueError(f"engine: got 'triton' {lacks}, takes 'torch' or 'auto' there")
    from . import triton_engine  # only when first asked for

    return triton_engine


def _lacks(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on a device, or None."""
    if device.type != "cuda":
        from . import triton_blocks

        return None if triton_blocks.INTERPRETED else f"for tensors on {device}"
    if torch.version.hip:
        # Compiled for gfx942, a barrier comes before the stores it should order have arrived.
        return "on an AMD GPU, where its barriers do not order memory"
    major, minor = torch.cuda.get_device_capability(device)
    if major < LEAST_CAPABILITY:
        return f"on a GPU of compute capability {major}.{minor}, below {LEAST_CAPABILITY}.0"
    return None


def logit_free(engine: ModuleType, policy: Head, rows: int, keep: bool) -> bool:
    """Whether a call goes through the kernel that needs no logits.

    Args:
        rows: of a tile, as many as memory allows.
        keep: whether a gradient will be asked for, which takes the policy's logits.
    """
    if engine is torch_engine:
        return False
    if LOGIT_FREE is not None:
        return LOGIT_FREE
    from . import triton_blocks

    return not keep and triton_blocks.logit_free(policy.weight.element_size(), rows)


def logit_free_row_bytes(hidden: Tensor, ref_hidden: Tensor) -> int:
    """What a row takes in the kernel that needs no logits: its hidden states, and its sums over parts of the head."""
    from . import triton_blocks

    sums = 4 * SWEPT * triton_blocks.splits(triton_blocks.architecture(hidden.device))
    return sums + sum(x.shape[-1] * x.element_size() for x in (hidden, ref_hidden))
