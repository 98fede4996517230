"""Reading committed results, and writing figures as tables say them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .measure import RESULTS, Record


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
        facts = self.files.get("speed", self.files.get("gpu", next(iter(self.files.values()))))["environment"]
        versions = facts["versions"]
        used = ", ".join(f"{n} {v}" for n, v in versions.items() if n not in ("numpy", "python") and v != "absent")
        device = f"{facts['cpu']}, {facts['threads']} threads" if self.is_cpu else facts["device"]
        return f"{device}; {used}"


def runs() -> list[Run]:
    return (
        [Run(folder) for folder in sorted(RESULTS.iterdir()) if any(folder.glob("*.json"))] if RESULTS.exists() else []
    )


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def spread(of: Record, digits: int = 2) -> str:
    """A median of ratios and, where there were several rounds, their range."""
    middle = f"{of['ratio']:.{digits}f}"
    return middle if of["least"] == of["most"] else f"{middle} ({of['least']:.{digits}f}–{of['most']:.{digits}f})"
