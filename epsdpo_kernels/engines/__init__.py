"""The tile operations: one file an engine, and the parts of Triton's. They know tiles and tokens, no losses."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import torch_engine

ENGINES = ("auto", "torch", "triton")
# Whether Triton trains through its logit-free kernel, or through library products and a sweep. Scoring always takes the
# former.
TRAIN_LOGIT_FREE = False


def resolve(name: str, hidden: Tensor) -> str:
    """The engine's own name, with "auto" resolved for the device and dtype of ``hidden``.

    Raises:
        ValueError, TypeError: there is no such engine, or it does not take this dtype.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, takes one of {ENGINES}")
    if name == "auto":
        # On AMD a barrier does not wait for loads and stores under way, which two of the kernels count on.
        return "triton" if hidden.is_cuda and hidden.dtype != torch.float64 and not torch.version.hip else "torch"
    if name == "triton" and hidden.dtype == torch.float64:
        raise TypeError("hidden: got torch.float64, which the engine 'triton' has not; takes engine 'torch'")
    return name


def tile_operations(name: str, device: torch.device) -> ModuleType:
    """The module of an engine's ``sweep`` and ``gradient``; Triton's kernels are imported when first asked for.

    Raises:
        ValueError: the engine does not run on this device.
    """
    if name == "torch":
        return torch_engine
    from . import triton_blocks, triton_engine

    if device.type != "cuda" and not triton_blocks.INTERPRETED:
        raise ValueError(f"engine: got 'triton' for tensors on {device}, takes 'torch' or 'auto' there")
    if torch.version.hip:
        # Compiled for gfx942, a barrier comes before the stores it should order have arrived.
        raise ValueError("engine: got 'triton' on an AMD GPU, where its barriers do not order memory; takes 'torch'")
    return triton_engine


def logit_free(name: str, keep: bool) -> bool:
    """Whether a call goes through the kernel that needs no logits; ``keep`` says that a gradient will be asked for."""
    return name == "triton" and (TRAIN_LOGIT_FREE or not keep)
