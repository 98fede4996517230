"""`make bench`: speed and memory on this CPU, variants interleaved, on pytest-benchmark.

pytest-benchmark times this package's call; before each of its rounds every rival has its own, timed by the same clock.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark", reason="the extra `bench` is not installed")

from . import measure, variants  # noqa: E402
from .cases import Case  # noqa: E402

EVERYTHING = [v for v in variants.VARIANTS if v not in ("ours", "ours at ε = 0")]
GPU_ONLY = ["ours logit-free", "cut-cross-entropy"]
NEAREST = ["trl", "liger"]

# (case, rivals, variants whose memory is measured). Shapes whose goals are stated come first, with 1024 scored tokens.
CASES: list[tuple[Case, list[str], list[str]]] = [
    (Case("smollm2", 512), EVERYTHING, ["ours", *(v for v in EVERYTHING if v not in GPU_ONLY)]),
    (Case("llama3", 512), ["trl"], ["ours"]),
    (Case("smollm2", 1024), ["materialised"], ["ours"]),
    (Case("smollm2", 1024, masked=0.5), NEAREST, ["ours", *NEAREST]),
    (Case("smollm2", 64, pairs=16, masked=0.5), NEAREST, []),
    (Case("smollm2", 512, mode="frozen"), NEAREST, ["ours", *NEAREST]),
    (Case("smollm2", 512, mode="score"), NEAREST, []),
    (Case("smollm2", 256, dtype="bfloat16"), ["materialised", "authors", "composed", *NEAREST], []),
    (Case("llama3", 64, masked=0.5), NEAREST, ["ours", "liger"]),
    (Case("llama3", 32, mode="frozen"), NEAREST, []),
    (Case("qwen3", 32), NEAREST, []),
    (Case("gemma2", 32), ["trl"], []),
    (Case("mistral", 256), NEAREST, []),
    (Case("smollm2", 256, pairs=2), ["ours at ε = 0"], []),
]
MOST_ROUNDS = 7


def cost(case: Case, rivals: list[str], remembered: list[str]) -> tuple[float, float]:
    """Operations of a round, and of what is done once."""
    one = [variants.products(v, case) for v in ("ours", variants.LIMIT, *(r for r in rivals if r not in GPU_ONLY))]
    once = sum(variants.products(v, case) * (2 if v in variants.COMPILED else 1) for v in remembered)
    return sum(one) * case.product, once * case.product


def share(seconds: float, rate: float, position: int) -> float:
    """How much longer than a single round of every case there is time for, as a factor on rounds, from a case on."""
    rest = [cost(*c) for c in CASES[position:]]
    # Processes, imports and compilers: seconds that no rate of products explains.
    fixed = sum(4 + 6 * len(c[2]) + 40 * sum(v in variants.COMPILED for v in c[1]) for c in CASES[position:])
    once, rounds = sum(o for _, o in rest) / rate, sum(r for r, _ in rest) / rate
    return (seconds - fixed - once) / rounds


@pytest.mark.parametrize("position", range(len(CASES)), ids=[c.name for c, _, _ in CASES])
def test_case(position, benchmark, results, rate, progress, request):
    case, rivals, remembered = CASES[position]
    results.drop(**case.as_dict())
    for variant in remembered:
        record = results.add(kind="memory", variant=variant, **case.as_dict(), **measure.memory(variant, case, "cpu"))
        said = f"{record['bytes'] / 2**20:.0f} MiB" if record["outcome"] == "ok" else record["outcome"]
        progress(f"{case.name}: memory of {variant}: {said}")
    for variant in ("ours", *rivals):
        if not results.find(kind="check", variant=variant, dtype=case.dtype, mode=case.mode, head=case.head):
            results.add(kind="check", variant=variant, **case.as_dict(), **measure.checked(variant, case, "cpu"))

    timed = measure.Timed(case, ["ours", variants.LIMIT, *rivals], "cpu")
    timed.warm()
    left = request.config.getoption("--seconds") - progress.elapsed
    # One round more than one of a short case is bought before one of a long case.
    rounds = max(1, min(MOST_ROUNDS, int(share(left, rate, position))))
    if cost(case, rivals, [])[0] / rate < 15:
        rounds = max(rounds, 3)
    done = 0

    def rivals_first():
        nonlocal done
        done += 1
        progress(f"{case.name}: round {done} of {rounds}")
        for variant in (variants.LIMIT, *rivals):
            timed.once(variant)

    benchmark.pedantic(timed.once, args=("ours",), setup=rivals_first, rounds=rounds, iterations=1, warmup_rounds=0)
    records = dict(timed.records())
    for variant, record in records.items():
        results.add(kind="time", variant=variant, **case.as_dict(), **record)
        ratio = record.get("to_limit", {}).get("ratio")
        benchmark.extra_info[variant] = round(ratio, 3) if ratio else record.get("reason", record["outcome"])
    mine = records["ours"]
    assert mine["outcome"] == "ok", mine
    progress(f"{case.name}: {mine['seconds']:.2f} s, {mine['to_limit']['ratio']:.3f} of the limit")


def test_memory_at_8192(results, rate, progress):
    """Nothing of size tokens × vocabulary: the bound at 1024 tokens holds at 8192."""
    case = Case("smollm2", 8192)
    results.drop(**case.as_dict())
    record = results.add(kind="memory", variant="ours", **case.as_dict(), **measure.memory("ours", case, "cpu"))
    progress(f"{case.name}: memory of ours: {record.get('bytes', 0) / 2**20:.0f} MiB")
    assert record["outcome"] == "ok", record
