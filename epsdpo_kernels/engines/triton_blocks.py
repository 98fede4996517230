"""Block sizes of the Triton kernels, as data: what ``tests/kernel_gate.py`` shows to compile without spills."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


class Row(NamedTuple):
    """Of the kernels that take one row of logits a program."""

    lanes: int  # threads of a program
    depth: int  # loads of 16 bytes that a thread of the sweep has under way of each model's logits
    words: int  # of the gradient at a time
    tokens: int  # at a time, when a pair is reduced
    warps: int


class Product(NamedTuple):
    """Of the kernel that projects and sweeps."""

    rows: int
    words: int
    hidden: int
    warps: int
    stages: int
    # How a matrix unit hands a row's words to its threads: to so many in turn, so many neighbours at a time.
    share: int = 4
    width: int = 2


ROW = {"interpreter": Row(16, 2, 128, 16, 1), "gpu": Row(256, 2, 4096, 256, 8)}

# By architecture and bytes of an element. In fp32 there are no matrix units that keep all digits.
FP32 = Product(32, 64, 16, 8, 2)
PRODUCT = {
    "interpreter": {2: Product(16, 64, 32, 1, 1), 4: Product(16, 64, 32, 1, 1)},
    "sm_80": {2: Product(64, 64, 32, 8, 3), 4: FP32},
    "sm_90": {2: Product(128, 64, 64, 8, 3), 4: FP32},
    "sm_100": {2: Product(128, 64, 64, 8, 3, share=1, width=64), 4: FP32},
    "sm_120": {2: Product(64, 64, 64, 8, 2), 4: FP32},
    "gfx942": {2: Product(64, 128, 64, 8, 2), 4: Product(64, 64, 32, 8, 2)},
}

# Splits of the vocabulary over programs. One number for all calls: a pair's sums must not depend, not even in their
# last bit, on how many rows are swept with it.
SPLITS = {"interpreter": 3, "gpu": 32}
# Row blocks that go through a split of the head side by side. At H 4096 in 16 bits the hidden states of 8 blocks of 128
# rows, both models', are 16 MB, a third of an H100's L2; a block of the head then leaves memory once for 1024 rows.
GROUP = 8

# Below how many rows a tile head and sweep in one score faster than library products and a sweep: there a library takes
# longer to read the head than this kernel to multiply. Measured on an H100: 131 rows (docs/tuning.md).
FEW_ROWS = 128

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


def product(arch: str, itemsize: int, descriptors: bool) -> Product:
    """The blocks for elements of so many bytes, the larger where the models differ.

    Where the copy engine cannot load them, neither does the matrix unit take them from it: a thread loads its elements
    one by one, and has registers for no more than sm_80's blocks.
    """
    if arch in DESCRIPTORS and not descriptors:
        arch = "sm_80"
    return PRODUCT[arch][itemsize]


def splits(arch: str) -> int:
    return SPLITS.get(arch, SPLITS["gpu"])


def descriptors(arch: str, matrices: list[Tensor]) -> bool:
    """Whether the copy engine can load blocks of these: it wants rows of whole 16 bytes."""
    return arch in DESCRIPTORS and all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices
    )


def logit_free(itemsize: int, rows: int) -> bool:
    """Whether scoring goes through head and sweep in one, where memory allows tiles of so many rows.

    In fp32 it never does: a library's products without matrix units are faster by more than the logits' traffic.
    """
    return itemsize == 2 and rows < FEW_ROWS
