"""The goals of the benchmarks, what was measured, and whether they are met."""

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
    if not run.is_cpu:
        return gpu_goal_rows(run)
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


def gpu_goal_rows(run: Run) -> list[list[str]]:
    """Of an H100, for Llama-3's trainable head in bf16."""
    main, longest = (Case("llama3", rows, dtype="bfloat16") for rows in (4096, 131072))
    return [
        at_most(run, "llama3, 2 × 4096", main, 1.15),
        rival_takes(run, main, "trl", 1 / 0.5),
        rival_takes(run, main, "liger compiled", 1 / 0.6),
        rival_takes(run, main, "ours at ε = 0", 1 / 1.02),
        working_memory(run, main, 1.5),
        fits(run, longest),
        no_wrong_step(run),
        same_bits(run),
        *whole_step_rows(run),
    ]


def rival_takes(run: Run, case: Case, variant: str, least: float) -> list[str]:
    goal = f"the same: {variant} takes ≥ {least:.2f} × our time"
    found = _ratio(run, case, variant, "to_ours")
    return _row(goal, spread(found, 3), found["ratio"] >= least) if found else _row(goal, "", None)


def working_memory(run: Run, case: Case, gib: float) -> list[str]:
    """Beyond the inputs and, in fp32, the gradients."""
    goal = f"the same: memory beyond inputs, dX and dW ≤ {gib} GiB"
    found = run.one(kind="memory", case=case.name, variant="ours", outcome="ok")
    if not found:
        return _row(goal, "", None)
    beyond = found["bytes"] - 2 * found["gradients"]
    return _row(goal, mib(beyond), beyond <= gib * 2**30)


def fits(run: Run, case: Case) -> list[str]:
    found = run.one(kind="length", case=case.name, variant="ours")
    goal = f"the same head, 2 × {case.rows}: fits"
    if not found:
        return _row(goal, "", None)
    done = found["outcome"] == "ok"
    return _row(goal, mib(found["bytes"]) if done else found["outcome"], done)


def same_bits(run: Run) -> list[str]:
    goal, found = "50 repetitions are bitwise equal", run.one(kind="repeated", outcome="ok")
    return _row(goal, f"{found['different']} differ", found["different"] == 0) if found else _row(goal, "", None)


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
    return _row(goal, spread(found, 3), found["ratio"] >= least) if found else _row(goal, "", None)


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


def faster_step(run: Run, case: str, least: float, model: str | None = None) -> list[str]:
    """Of the packed step against TRL's; a model is named on a GPU alone."""
    goal = f"{model + ', ' if model else ''}{case}: ≥ {least} × faster than TRL's plain DPO"
    measured = [r for r in run.all(kind="step", model=model, case=case) if "seconds" in r]
    found = steps.faster(measured, "trl") if measured else None
    return _row(goal, spread(found, 3), found["ratio"] >= least) if found else _row(goal, "", None)


def whole_step_rows(run: Run) -> list[list[str]]:
    """The goals of the whole optimizer step, as :func:`goal_rows` has its own."""
    if not run.is_cpu:
        return [faster_step(run, "hh", 1.5, model) for model, case, *_ in steps.ON_GPU if case == "hh"]
    wanted = (("hh", 2.0), ("long prompts", 1.6), ("nothing to save", 0.97))
    rows = [faster_step(run, case, least) for case, least in wanted]
    ours, theirs = (run.one(kind="step memory", case="hh", variant=v, outcome="ok") for v in ("packed", "trl"))
    goal = "hh: peak memory of the step ≤ 0.6 × TRL's"
    if ours and theirs:
        share = ours["bytes"] / theirs["bytes"]
        rows.append(_row(goal, f"{share:.3f}", share <= 0.6))
    else:
        rows.append(_row(goal, "", None))
    return rows
