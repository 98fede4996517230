"""Block sizes of the Triton kernels, as data: what ``tests/kernel_gate.py`` shows to compile without spills."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

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


ROW = {"interpreter": Row(128, 16, 1), "gfx942": Row(4096, 512, 8), "sm": Row(4096, 512, 8)}

# By architecture and bytes of an element: (largest hidden size, blocks), the last for all others.
PRODUCT = {
    "interpreter": {2: ((None, Product(16, 64, 32, 1, 1)),), 4: ((None, Product(16, 64, 32, 1, 1)),)},
    "sm_80": {2: ((None, Product(64, 128, 64, 8, 3)),), 4: ((None, Product(64, 64, 32, 8, 2)),)},
    "sm_90": {2: ((1024, Product(64, 128, 64, 8, 3)), (None, Product(128, 128, 64, 8, 3))),
              4: ((None, Product(64, 64, 32, 8, 2)),)},
    "sm_100": {2: ((1024, Product(64, 128, 64, 8, 3)), (None, Product(128, 128, 64, 8, 3))),
               4: ((None, Product(64, 64, 32, 8, 2)),)},
    "sm_120": {2: ((None, Product(64, 128, 64, 8, 2)),), 4: ((None, Product(64, 64, 32, 8, 2)),)},
    "gfx942": {2: ((None, Product(64, 128, 64, 8, 2)),), 4: ((None, Product(64, 64, 32, 8, 2)),)},
}  # fmt: skip

# Splits of the vocabulary over programs. The same for every call: a pair's sums must not depend, not even in their
# last bit, on how many rows are swept with it.
SPLITS = {"interpreter": 3}
DEFAULT_SPLITS = 32


def architecture(device: torch.device) -> str:
    """The row of the tables for a device. One that is not in them takes the row with the least shared memory."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = {(8, 0): "sm_80", (9, 0): "sm_90"}.get((major, minor), "sm_100" if major == 10 else "sm_120")
    return known


def row(arch: str) -> Row:
    return ROW.get(arch, ROW["sm"])


def product(arch: str, itemsize: int, hidden: int) -> Product:
    return next(blocks for largest, blocks in PRODUCT[arch][itemsize] if largest is None or hidden <= largest)
