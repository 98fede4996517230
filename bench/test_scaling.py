"""`make bench`: what time and memory grow with, and what they don't."""

from __future__ import annotations

import pytest

from . import measure, variants
from .cases import Case

# What grows, and with what: (name, cases). Pairs share out the same tokens.
SCALING = {
    "tokens": [Case("16384x256", rows) for rows in (256, 512, 1024)],
    "vocabulary": [Case(f"{v}x256", 512) for v in (8192, 16384, 32768)],
    "pairs": [Case("16384x256", 512 // pairs, pairs=pairs) for pairs in (1, 8, 64)],
}


@pytest.mark.parametrize("what", SCALING)
def test_scaling(what, results, progress):
    """Time and memory against one size, and the exponents of their power laws."""
    cases = SCALING[what]
    runs = [measure.Timed(case, [variants.SMALL_TILES], "cpu") for case in cases]
    for _ in range(4):
        for run in runs:
            run.once(variants.SMALL_TILES)
    size = {"tokens": lambda c: c.scored, "vocabulary": lambda c: int(c.head.split("x")[0]), "pairs": lambda c: c.pairs}
    points = []
    for case, run in zip(cases, runs, strict=True):
        times = measure.summary(run.times[variants.SMALL_TILES][1:])
        point = {"size": size[what](case), "seconds": times["seconds"], "times": times["times"]}
        if what != "pairs":
            point |= {k: v for k, v in measure.memory(variants.SMALL_TILES, case, "cpu").items() if k != "outcome"}
        points.append(point)
    exponents = {"time": measure.exponent([(p["size"], p["seconds"]) for p in points])}
    if what != "pairs":
        exponents["memory"] = measure.exponent([(p["size"], p["bytes"]) for p in points])
        exponents["memory beyond gradients"] = measure.exponent(
            [(p["size"], max(p["bytes"] - p["gradients"], 1)) for p in points]
        )
    results.drop(kind="scaling", what=what)
    results.add(kind="scaling", what=what, variant=variants.SMALL_TILES, points=points, exponents=exponents)
    progress(f"against {what}: exponents " + ", ".join(f"{k} {v:.2f}" for k, v in exponents.items()))
