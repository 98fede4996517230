"""What the studies share: a colour and a marker for every method, and how sure a mean is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Okabe and Ito's colours, which the colour-blind tell apart, and a marker each.
LOOKS = {
    "dpo": ("#000000", "s"),
    "eps-dpo": ("#0072B2", "o"),
    "lsc-dpo": ("#D55E00", "^"),
    "beta-dpo": ("#009E73", "D"),
    "tr-dpo": ("#CC79A7", "v"),
    "eps-dpo-veto": ("#56B4E9", "P"),
}
# The 97.5 % point of Student's t by degrees of freedom, from 1; past the last one it is taken, which is a little wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Mean(NamedTuple):
    """A mean, its standard error and the half width of its 95 % confidence interval; NaN where one value has none."""

    value: float
    error: float
    half_width: float


def mean(values: Sequence[float]) -> Mean:
    n = len(values)
    if n < 2:
        return Mean(values[0] if n else math.nan, math.nan, math.nan)
    middle = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1) / n)
    return Mean(middle, error, STUDENT[min(n - 2, len(STUDENT) - 1)] * error)


def plus_minus(value: float, error: float, digits: int, sign: str = "") -> str:
    """A figure and its error, where there is one."""
    return f"{value:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is of names."""
    lines = [" | ".join(cells) for cells in (heads, ["---", *["--:"] * (len(heads) - 1)], *rows)]
    return "\n".join(f"| {line} |" for line in lines)
