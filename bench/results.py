"""Reading committed results, and writing figures as tables say them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from .measure import RESULTS, Record

# What tests/kernel_gate.py has counted in machine code, by the version of Triton.
KERNELS = RESULTS / "kernels.json"


class Run:
    """The results of one device: a folder of bench/results."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self.files = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}

    def all(self, **key: Any) -> list[Record]:
        """Records of every file of the folder that have these values."""
        records = [r for data in self.files.values() for r in data["records"]]
        return [r for r in records if all(r.get(k) == v for k, v in key.items())]

    def one(self, **key: Any) -> Record | None:
        return next(iter(self.all(**key)), None)

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")

    def machine(self) -> str:
        """Device and versions that the figures are of, for the line above a table."""
        facts = self.files.get("speed", next(iter(self.files.values())))["environment"]
        versions = facts["versions"]
        used = ", ".join(f"{n} {v}" for n, v in versions.items() if n not in ("numpy", "python") and v != "absent")
        device = f"{facts['cpu']}, {facts['threads']} threads" if self.is_cpu else facts["device"]
        return f"{device}; {used}"


def runs() -> list[Run]:
    folders = [path for path in sorted(RESULTS.iterdir()) if path.is_dir()] if RESULTS.exists() else []
    return [Run(folder) for folder in folders if any(folder.glob("*.json"))]


def kernels(triton: str | None = None, **key: Any) -> list[Record]:
    """The counted kernels that have these values, of one Triton or of all; a line of several cases is several."""
    counted = json.loads(KERNELS.read_text(encoding="utf-8")) if KERNELS.exists() else {}
    found = []
    for version, lines in counted.items():
        for line in lines if triton in (None, version) else ():
            several = [line[name].split(", ") for name in ("arch", "dtype", "variant")]
            for arch, dtype, variant in product(*several):
                found.append(line | {"triton": version, "arch": arch, "dtype": dtype, "variant": variant})
    return [line for line in found if all(line[name] == value for name, value in key.items())]


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def spread(of: Record, digits: int = 2) -> str:
    """A median of ratios and, where there were several rounds, their range."""
    middle = f"{of['ratio']:.{digits}f}"
    return middle if of["least"] == of["most"] else f"{middle} ({of['least']:.{digits}f}–{of['most']:.{digits}f})"
