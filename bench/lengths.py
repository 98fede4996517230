"""Tokens a completion until nothing fits any more: memory and time of one call, each in a process of its own.

    python -m bench.lengths [VARIANT …]

Each figure is written as it comes; the same command goes on where it was stopped. Most of an hour on two cores.
"""

from __future__ import annotations

import argparse

from . import measure, variants
from .cases import LENGTHS, Case

HEAD = "smollm2"
# Those that a CPU can run, the ones that grow first: they are done soon.
CLIMBERS = (
    "ours",
    "materialised",
    "trl",
    "liger",
    "liger compiled",
    "materialised compiled",
    "composed",
    "torch",
    variants.SMALL_TILES,
)
# Where the next call would take longer than this, in seconds, it is not made.
LONGEST = 450.0
OUT_OF_PATIENCE = "not tried"


def climb(
    results: measure.Results, progress: measure.Progress, variant: str, head: str = HEAD,
    lengths: tuple[int, ...] = LENGTHS, longest: float = LONGEST,
) -> None:  # fmt: skip
    """A record a length, up to the first that does not fit, or whose call would take too long."""
    last: measure.Record | None = None
    for length in lengths:
        case = Case(head, length)
        found = results.find(kind="length", variant=variant, case=case.name)
        if found is None:
            expected = last["seconds"] * length / last["rows"] if last else 0.0
            if expected > longest:
                outcome: measure.Record = {"outcome": OUT_OF_PATIENCE, "expected": expected}
            else:
                outcome = measure.memory(variant, case, "cpu")
            found = results.add(kind="length", variant=variant, **case.as_dict(), **outcome)
            said = {k: v for k, v in outcome.items() if k in ("outcome", "bytes", "seconds", "reason")}
            progress(f"{variant}, 2 × {length}: {said}")
        if found["outcome"] != "ok":
            return
        last = found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lengths", description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"by default {', '.join(CLIMBERS)}")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(variants.CALLS):
        parser.error(f"VARIANT: {', '.join(sorted(unknown))} is not one of {', '.join(variants.CALLS)}")
    results = measure.Results(measure.RESULTS / measure.device_name("cpu") / "lengths.json", "cpu")
    progress = measure.Progress()
    for variant in options.variants or CLIMBERS:
        climb(results, progress, variant)


if __name__ == "__main__":
    main()
