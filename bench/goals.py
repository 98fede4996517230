"""The goals of the CPU benchmark, what was measured, and whether they are met."""

from __future__ import annotations

from . import steps
from .cases import Case, head_shape
from .results import Record, Run, mib, spread

TRL = "faster than TRL's plain DPO at every shape"
LIGER = "faster than Liger's plain DPO with 50 % prompt tokens"
MEMORY = "least memory of all variants"
WRONG = "no wrong step outside the fp32 bound"


def goal_rows(run: Run) -> list[list[str]]:
    """(goal, figure, met | missed | not measured)."""
    main = Case("smollm2", 1024)
    return [
        at_most(run, "llama3, 1024 scored tokens", Case("llama3", 512), 1.10),
        at_most(run, "smollm2, 1024 scored tokens", Case("smollm2", 512), 1.10),
        faster(run, TRL, "trl", 0.0),
        faster(run, LIGER, "liger", 0.5),
        least_memory(run),
        no_wrong_step(run),
        at_most(run, "smollm2, one pair of 2 × 1024", main, 1.15),
        faster_than_materialised(run, main, 1.8),
        *(bounded_memory(run, Case("smollm2", rows)) for rows in (1024, 8192)),
    ]


def _row(goal: str, figure: str, met: bool | None) -> list[str]:
    return [goal, figure, "not measured" if met is None else "met" if met else "**missed**"]


def _ratio(run: Run, case: Case, variant: str, key: str) -> Record | None:
    return (run.one(kind="time", case=case.name, variant=variant) or {}).get(key)


def at_most(run: Run, what: str, case: Case, most: float) -> list[str]:
    found = _ratio(run, case, "ours", "to_limit")
    goal = f"{what}: ≤ {most:.2f} × the four bare products"
    return _row(goal, spread(found, 3), found["ratio"] <= most) if found else _row(goal, "", None)


def faster(run: Run, goal: str, rival: str, masked: float) -> list[str]:
    """Of all cases of at least this share of prompt tokens, the one where the rival comes nearest."""
    records = [r for r in run.all(kind="time", variant=rival) if "to_ours" in r and r["masked"] >= masked]
    if not records:
        return _row(goal, "", None)
    ratios = {r["case"]: r["to_ours"]["ratio"] for r in records}
    nearest = min(ratios, key=ratios.__getitem__)
    least, most = min(ratios.values()), max(ratios.values())
    return _row(goal, f"it takes {least:.2f} to {most:.2f} × our time, least at {nearest}", least > 1)


def faster_than_materialised(run: Run, case: Case, least: float) -> list[str]:
    found = _ratio(run, case, "materialised", "to_ours")
    goal = f"the same: ≥ {least} × faster than with all logits in memory"
    return _row(goal, spread(found), found["ratio"] >= least) if found else _row(goal, "", None)


def least_memory(run: Run) -> list[str]:
    """Of all cases, the one where another variant comes nearest."""
    nearest: list[tuple[float, str, str]] = []
    for mine in run.all(kind="memory", variant="ours", outcome="ok"):
        others = [r for r in run.all(kind="memory", case=mine["case"], outcome="ok") if "ours" not in r["variant"]]
        nearest += [(r["bytes"] / mine["bytes"], r["variant"], r["case"]) for r in others]
    if not nearest:
        return _row(MEMORY, "", None)
    ratio, variant, case = min(nearest)
    return _row(MEMORY, f"the next, {variant}, takes {ratio:.2f} × ours at {case}", ratio >= 1)


def no_wrong_step(run: Run) -> list[str]:
    judged = run.all(kind="synthetic") + run.all(kind="model")
    if not judged:
        return _row(WRONG, "", None)
    wrong = sum(count for r in judged for name, count in r["wrong"].items() if name.startswith("ours"))
    return _row(WRONG, f"{wrong} of {sum(r['pairs'] for r in judged)} pairs in each dtype", wrong == 0)


def bounded_memory(run: Run, case: Case) -> list[str]:
    goal = f"the same head, 2 × {case.rows}: memory ≤ (dW + dX + tile budget) × 1.1"
    found = run.one(kind="memory", case=case.name, variant="ours", outcome="ok")
    if not found:
        return _row(goal, "", None)
    vocabulary, width, _ = head_shape(case.head)
    bound = 1.1 * (found["gradients"] + max(256 << 20, 4 * vocabulary * width))
    return _row(goal, f"{mib(found['bytes'])} of {mib(bound)}", found["bytes"] <= bound)


def whole_step_rows(run: Run) -> list[list[str]]:
    """The goals of the whole optimizer step, as :func:`goal_rows` has its own."""
    rows = []
    for case, least in (("hh", 2.0), ("long prompts", 1.6), ("nothing to save", 0.97)):
        goal = f"{case}: ≥ {least} × faster than TRL's plain DPO"
        measured = run.all(kind="step", case=case)
        found = steps.faster(measured, "trl") if measured else None
        rows.append(_row(goal, spread(found), found["ratio"] >= least) if found else _row(goal, "", None))
    ours, theirs = (run.one(kind="step memory", case="hh", variant=v, outcome="ok") for v in ("packed", "trl"))
    goal = "hh: peak memory of the step ≤ 0.6 × TRL's"
    if ours and theirs:
        share = ours["bytes"] / theirs["bytes"]
        rows.append(_row(goal, f"{share:.2f}", share <= 0.6))
    else:
        rows.append(_row(goal, "", None))
    return rows
