"""Block sizes of the Triton kernels, as data: what ``tests/kernel_gate.py`` shows to compile without spills."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


class Row(NamedTuple):
    """Of the kernels that take one row of logits a program."""

    words: int  # of the vocabulary at a time
    tokens: int  # at a time, when a pair is reduced
    warps: int


class Product(NamedTuple):
    """Of the kernel that projects and sweeps."""

    rows: int
    words: int
    hidden: int
    warps: int
    stages: int


ROW = {"interpreter": Row(128, 16, 1), "gpu": Row(4096, 512, 8)}

# By architecture and bytes of an element: (largest hidden size, blocks), the last for all others. On sm_90
# 128 × 128 would read less for each product, and spills nothing with Triton 3.9, but 136 to 288 bytes with 3.6.
PRODUCT: dict[str, dict[int, tuple[tuple[int | None, Product], ...]]] = {
    "interpreter": {2: ((None, Product(16, 64, 32, 1, 1)),), 4: ((None, Product(16, 64, 32, 1, 1)),)},
    "sm_80": {2: ((None, Product(64, 64, 32, 8, 3)),), 4: ((None, Product(64, 64, 32, 8, 3)),)},
    "sm_90": {2: ((None, Product(64, 128, 64, 8, 3)),), 4: ((None, Product(32, 64, 32, 8, 2)),)},
    "sm_100": {2: ((None, Product(128, 64, 64, 8, 3)),), 4: ((None, Product(32, 64, 32, 8, 2)),)},
    "sm_120": {2: ((None, Product(64, 64, 64, 8, 2)),), 4: ((None, Product(32, 64, 32, 8, 2)),)},
    "gfx942": {2: ((None, Product(64, 128, 64, 8, 2)),), 4: ((None, Product(64, 64, 32, 8, 2)),)},
}  # fmt: skip

# Splits of the vocabulary over programs. One number for all calls: a pair's sums must not depend, not even in their
# last bit, on how many rows are swept with it.
SPLITS = {"interpreter": 3, "gpu": 32}
# Row blocks that go through a split of the head side by side. At H 4096 in 16 bits the hidden states of 16 blocks of 64
# rows, both models', are 16 MB, a third of an H100's L2; a block of the head then leaves memory once for 1024 rows.
GROUP = 16

# Architectures whose copy engine loads blocks through tensor descriptors.
DESCRIPTORS = ("sm_90", "sm_100", "sm_120")


def architecture(device: torch.device) -> str:
    """The row of the tables for a device.

    Within a generation the gate holds the blocks to the smallest card's shared memory; a generation that is not in the
    tables takes the row with the least.
    """
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def row(arch: str) -> Row:
    return ROW.get(arch, ROW["gpu"])


def product(arch: str, itemsize: int, hidden: int) -> Product:
    return next(blocks for largest, blocks in PRODUCT[arch][itemsize] if largest is None or hidden <= largest)


def splits(arch: str) -> int:
    return SPLITS.get(arch, SPLITS["gpu"])


def descriptors(arch: str, matrices: list[Tensor]) -> bool:
    """Whether the copy engine can load blocks of these: it wants rows of whole 16 bytes."""
    return arch in DESCRIPTORS and all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices
    )
