"""The tables and pictures of docs, made from the committed results.

python -m bench.tables            writes them
python -m bench.tables --check    fails where one is not what the results say
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import cards, fidelity, roofline, variants
from . import steps as whole
from .cases import MODES, Case
from .goals import goal_rows, whole_step_rows
from .measure import ROOT
from .results import Record, Run, kernels, mib, runs, spread

DOCS = ROOT / "docs"
README = ROOT / "README.md"
MEASURED, ROOFLINE, KERNELS = DOCS / "measured.md", DOCS / "roofline.md", DOCS / "kernels.md"
PARALLEL = DOCS / "parallel.md"
IMAGES = DOCS / "img"
GPU = "python -m bench.gpu --out bench/results"
# How far a ratio may lie from what the roofline predicts, as a share of it.
MARGIN = 0.15
STEP_NAMES = {"trl": "TRL, plain DPO", "padded": "ours, padded", "packed": "**ours, packed**"}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def command(text: str) -> str:
    return f"`{text}`"


def case_of(record: Record) -> Case:
    return Case(**{name: record[name] for name in Case.__dataclass_fields__})


def say(case: Case) -> str:
    """A case in words: head, tokens, and what is out of the ordinary."""
    size = f"{case.pairs} pair{'s' * (case.pairs > 1)} of 2 × {case.rows}"
    notes = [case.mode] if case.mode != "train" else []
    notes += [f"{case.masked:.0%} prompt"] if case.masked else []
    notes += [case.dtype] if case.dtype != "float32" else []
    return f"{case.head}, {size}" + (f" ({', '.join(notes)})" if notes else "")


# docs/measured.md


def speed(run: Run) -> str:
    """Every case: the ratio to the bare products of each variant."""
    measured: dict[str, dict[str, Record]] = {}
    for record in run.all(kind="time"):
        measured.setdefault(record["case"], {})[record["variant"]] = record
    order = [variants.LIMIT, *variants.VARIANTS]
    rows: list[list[str]] = []
    for name, found in measured.items():
        case = case_of(next(iter(found.values())))
        for variant in sorted(found, key=order.index):
            record = found[variant]
            label = "ε-DPO" if variant in variants.EPSILON_DPO else "" if variant == variants.LIMIT else "plain DPO"
            memory = run.one(kind="memory", case=name, variant=variant) or {}
            if record["outcome"] != "ok":
                rows.append([say(case), variant, label, str(record.get("reason", record["outcome"])), "", "", "", ""])
                continue
            floor = memory["inputs"] + memory["gradients"] if "inputs" in memory else 0
            rows.append([
                say(case), f"**{variant}**" if variant == "ours" else variant, label, seconds(record["seconds"]),
                spread(record["to_limit"]) if "to_limit" in record else "",
                f"{record['flops'] / 1e9:,.0f}",
                mib(memory["bytes"]) if "bytes" in memory else str(memory.get("outcome", "")),
                f"{(memory['bytes'] + memory['inputs']) / floor:.2f}" if floor else "",
            ])  # fmt: skip
    header = ["case", "variant", "of", "time", "of the limit", "useful GFLOP/s", "memory beyond inputs", "of the floor"]
    return table(header, rows)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def goals(run: Run) -> str:
    return table([f"goal on this {'CPU' if run.is_cpu else 'GPU'}", "measured", ""], goal_rows(run))


def fidelity_table(run: Run) -> str:
    """Wrong steps of every variant, against drift and optimizer steps."""
    judged = [(f"noise of {r['drift']}", r) for r in run.all(kind="synthetic")]
    judged += [(f"SmolLM2, {r['after']} optimizer step{'s' * (r['after'] > 1)}", r) for r in run.all(kind="model")]
    header = ["wrong steps, of pairs", *(name for name, _ in judged)]
    rows = [["pairs (within the fp32 bound)", *(f"{r['pairs']} ({r['near']})" for _, r in judged)]]
    for name in fidelity.DECIDERS:
        rows.append([name, *(str(r["wrong"][name]) if name in r["wrong"] else "" for _, r in judged)])
    return table(header, rows)


def gradient_table(run: Run) -> str:
    """Relative errors of dX and dW, the largest of some pairs."""
    judged = run.all(kind="synthetic") + run.all(kind="model")
    with_errors = [r for r in judged if r["gradient_error"]]
    if not with_errors:
        return ""
    r = with_errors[-1]
    rows = [[name, f"{e['hidden']:.1e}", f"{e['weight']:.1e}"] for name, e in r["gradient_error"].items()]
    what = f"after {r['after']} optimizer steps" if r["kind"] == "model" else f"noise of {r['drift']}"
    return table([f"gradient error against float64, {what}", "hidden", "weight"], rows)


def beta_table(run: Run) -> str:
    record = run.one(kind="beta")
    if not record:
        return ""
    last = {name: course[-1] for name, course in record["courses"].items()}
    steps = len(record["courses"]["float64"]) - 1
    return table([f"β after {steps} steps from {fidelity.BETA}", "β"], [[n, f"{b:.5f}"] for n, b in last.items()])


def scaling(run: Run) -> str:
    rows = []
    for record in run.all(kind="scaling"):
        exponents = record["exponents"]
        sizes = " → ".join(str(p["size"]) for p in record["points"])
        rows.append([
            record["what"], sizes, f"{exponents['time']:.2f}",
            *(f"{exponents[k]:.2f}" if k in exponents else "" for k in ("memory", "memory beyond gradients")),
        ])  # fmt: skip
    for record in run.all(kind="time", variant="ours at ε = 0"):
        if "to_ours" in record:
            overhead = f"{1 / record['to_ours']['ratio']:.3f} × its time"
            rows.append([f"ε against plain DPO, {say(case_of(record))}", overhead, "", "", ""])
    return table(["against", "sizes", "time ~ xᵏ, k", "memory, k", "without dX, dW, k"], rows)


def lengths(run: Run) -> str:
    """Memory and time of one call by tokens a completion: a table a head, a row a variant."""
    measured = run.all(kind="length")
    found = []
    for head in dict.fromkeys(r["head"] for r in measured):
        of_head = [r for r in measured if r["head"] == head]
        sizes = sorted({r["rows"] for r in of_head})
        rows = []
        for variant in dict.fromkeys(r["variant"] for r in of_head):
            cells = {r["rows"]: length_cell(r) for r in of_head if r["variant"] == variant}
            name = f"**{variant}**" if variant == "ours" else variant
            rows.append([name, *(cells.get(size, "") for size in sizes)])
        found.append(table([f"{head}, one pair, memory and time", *(f"2 × {size}" for size in sizes)], rows))
    return "\n\n".join(found)


def length_cell(record: Record) -> str:
    if record["outcome"] == "ok":
        return f"{mib(record['bytes'])}, {seconds(record['seconds'])}"
    if "expected" in record:
        return f"{record['outcome']}: about {record['expected']:.0f} s"
    return str(record.get("reason", record["outcome"]))


def steps(run: Run) -> str:
    """The whole optimizer step, a row a case and variant, then the goals, then the longest length."""
    rows = []
    for model, case in dict.fromkeys((r.get("model"), r["case"]) for r in run.all(kind="step") if "seconds" in r):
        measured = [r for r in run.all(kind="step", model=model, case=case) if "seconds" in r]
        pairs = measured[0].get("pairs") or whole.CASES[case][0]
        for variant in whole.VARIANTS:
            memory = run.one(kind="step memory", model=model, case=case, variant=variant) or {}
            tokens = sum(r["tokens"]["packed" if variant == "packed" else "padded"] for r in measured)
            rows.append([
                f"{model + ', ' if model else ''}{case}, {pairs} pairs", STEP_NAMES[variant],
                f"{tokens / len(measured):,.0f}",
                seconds(statistics.median(r["seconds"][variant] for r in measured)),
                spread(whole.faster(measured, variant)), mib(memory["bytes"]) if "bytes" in memory else "",
                mib(memory["process"]) if "process" in memory else "",
            ])  # fmt: skip
    header = ["batch", "trainer", "tokens", "time", "packed is faster", "peak of a step", "peak of the process"]
    parts = [table(header, rows), table(["goal", "measured", ""], whole_step_rows(run))]
    climbed = run.all(kind="longest")
    if climbed:
        cells = []
        for variant in whole.VARIANTS:
            own = [r for r in climbed if r["variant"] == variant]
            last = max((r for r in own if r["outcome"] == "ok"), key=lambda r: r["length"], default=None)
            ended = next((f"{r['length']:,}: {r['outcome']}" for r in own if r["outcome"] != "ok"), "")
            if last:
                cells.append([
                    STEP_NAMES[variant], f"{last['length']:,}", mib(last["process"]), seconds(last["seconds"]), ended
                ])  # fmt: skip
        head = ["longest pair that trains in 20 GiB", "tokens, 7/8 prompt", "peak of the process", "time", "then"]
        parts.append(table(head, cells))
    return "\n\n".join(parts)


def real_step() -> str:
    """The step on real pairs, for the README; of the one CPU."""
    (run,) = (run for run in runs() if run.is_cpu)
    rows = []
    for variant in whole.VARIANTS:
        times = [r["seconds"][variant] for r in run.all(kind="step", case="hh")]
        (memory,) = run.all(kind="step memory", case="hh", variant=variant)
        rows.append([STEP_NAMES[variant], seconds(statistics.median(times)), mib(memory["bytes"])])
    return table(["a step of 4 pairs of HH-RLHF", "time", "memory beyond weights and optimizer"], rows)


def training(run: Run) -> str:
    rows = []
    for record in run.all(kind="training"):
        done = record["outcome"] == "ok"
        rows.append([
            record["model"], record["loss"], str(record["length"]),
            f"{record['tokens_per_second']:,.0f}" if done else record["outcome"],
            mib(record["bytes"] + record["weights"]) if done else "",
        ])  # fmt: skip
    return table(["model", "loss", "tokens a completion", "tokens a second", "peak memory"], rows)


def measured_tables() -> dict[str, str]:
    """Every marker of docs/measured.md and its table."""
    cpu, gpu = [r for r in runs() if r.is_cpu], [r for r in runs() if not r.is_cpu]

    def joined(make: Callable[[Run], str], which: list[Run], how: str, needed: str) -> str:
        parts = [
            f"{command(how.format(run.name))} — {run.machine()}:\n\n{made}" for run in which
            if run.all(kind=needed) and (made := make(run))
        ]  # fmt: skip
        return "\n\n".join(parts) or f"Not measured yet: {command(how.format('DIR'))}."

    found = {
        "goals": joined(goals, cpu, "make bench", "time"),
        "speed": joined(speed, cpu, "make bench", "time"),
        "scaling": joined(scaling, cpu, "make bench", "scaling"),
        "lengths": joined(lengths, cpu, "python -m bench.lengths", "length"),
        "steps": joined(steps, cpu, "python -m bench.steps DATA", "step"),
        "fidelity": "\n\n".join(
            part for part in (
                joined(fidelity_table, cpu, "python -m bench.fidelity", "synthetic"),
                *(t for run in cpu for t in (gradient_table(run), beta_table(run)) if t),
            )
        ),
        "gpu-goals": joined(goals, gpu, GPU, "time"),
        "gpu": joined(speed, gpu, GPU, "time"),
        "gpu-lengths": joined(lengths, gpu, GPU, "length"),
        "gpu-steps": joined(steps, gpu, GPU, "step"),
        "gpu-training": joined(training, gpu, GPU, "training"),
    }  # fmt: skip
    return found


# docs/roofline.md


def cpu_device(run: Run) -> roofline.CPU | None:
    found = run.one(kind="device", what=None)
    if not found:
        return None
    names = [field.name for field in dataclasses.fields(roofline.CPU) if field.name in found]
    return roofline.CPU(run.name, **{name: found[name] for name in names})


def roofline_cpu() -> str:
    """Predicted and measured ratios to the limit, fp32 cases of this package."""
    rows = []
    for run in (r for r in runs() if r.is_cpu):
        ceilings = cpu_device(run)
        if ceilings is None:
            continue
        for record in run.all(kind="time", variant="ours", dtype="float32"):
            if "to_limit" not in record:
                continue
            case, got = case_of(record), record["to_limit"]["ratio"]
            (limit,) = run.all(kind="time", variant="limit", **dataclasses.asdict(case))
            predicted = roofline.predicted_ratio(case, dataclasses.replace(ceilings, flops=limit["flops"]))
            off = got / predicted - 1
            verdict = "" if abs(off) <= MARGIN else f"**outside {MARGIN:.0%}**"
            rows.append([say(case), f"{predicted:.2f}", spread(record["to_limit"]), f"{off:+.0%}", verdict])
    if not rows:
        return f"Not measured yet: {command('make bench')}."
    return f"{command('make bench')}\n\n" + table(["case", "predicted", "measured", "off by", ""], rows)


def roofline_gpu() -> str:
    def prediction(case: Case, gpu: roofline.Device) -> str:
        milliseconds = sum(roofline.stages(case, gpu).values()) * 1e3
        return f"{roofline.predicted_ratio(case, gpu):.2f} ({milliseconds:.1f} ms)"

    heads = ("llama3", "qwen3", "gemma2", "gemma2-9b", "mistral", "smollm2")
    cases = [Case(head, 4096, dtype="bfloat16") for head in heads]
    cases += [Case("llama3", 4096, mode=mode, dtype="bfloat16") for mode in MODES if mode != "train"]
    rows = [[say(case), *(prediction(case, gpu) for gpu in roofline.GPUS)] for case in cases]
    first = table(["of the limit (time)", *(gpu.name for gpu in roofline.GPUS)], rows)
    rows = [["rows of a product at balance", *(f"{roofline.balanced_rows(gpu):.0f}" for gpu in roofline.GPUS)]]
    for head in ("llama3", "gemma2-9b", "smollm2"):
        for budget in (256 << 20, 512 << 20, 1 << 30, 2 << 30):
            case = Case(head, 4096, dtype="bfloat16")
            tiles = roofline.rows_of(case, roofline.GPUS[0], budget)
            rows.append([
                f"{head}, {mib(budget)}: tiles of {tiles.tile} rows, {tiles.group // tiles.tile} to a product",
                *(f"{roofline.predicted_ratio(case, gpu, budget):.2f}" for gpu in roofline.GPUS),
            ])  # fmt: skip
    second = table(["bytes of tiles against dW's traffic", *(gpu.name for gpu in roofline.GPUS)], rows)
    return f"{command('python -m bench.roofline')}\n\n{first}\n\n{second}"


def roofline_head() -> str:
    rows = []
    for model in roofline.LARGE:
        for tensor, sequence in ((1, 1), (8, 1), (8, 4)):
            s = roofline.sharded(model, 8192, tensor, sequence)
            sums = mib(s.statistics) if s.statistics >= 1 << 20 else f"{s.statistics / 1024:.0f} KiB"
            held = [mib(size) for size in (s.logits, s.tiles, s.gradient)]
            name = f"{model.name}, TP {tensor}, SP {sequence}"
            rows.append([name, f"{s.share:.1%}", *held, sums, mib(s.hidden_gradient)])
    header = [
        "one pair of 2 × 8192, per rank",
        "head's share",
        "one logits tensor",
        "tiles",
        "dW, fp32",
        "sums sent",
        "dX sent",
    ]
    return table(header, rows)


def roofline_tables() -> dict[str, str]:
    return {"roofline-cpu": roofline_cpu(), "roofline-gpu": roofline_gpu(), "roofline-head": roofline_head()}


# docs/kernels.md


def kernel_table() -> str:
    """What the kernels of 16-bit heads compile to, a line for each with every Triton's figures."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for line in kernels():
        if line["dtype"] == "bf16" or "+" in line["dtype"]:
            of = (line["kernel"], line["arch"], line["dtype"], line["variant"])
            found.setdefault(of, {})[line["triton"]] = line
    versions = sorted({version for lines in found.values() for version in lines})

    def each(lines: dict[str, Record], name: str) -> str:
        """One figure where all Tritons agree."""
        values = [str(lines[v].get(name, "–")) if v in lines else "–" for v in versions]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    rows = [
        [*of, next(iter(lines.values()))["blocks"], *(each(lines, name) for name in RESOURCES), predicted(of, lines)]
        for of, lines in found.items()
    ]
    header = ["kernel", "arch", "dtype", "variant", "blocks", *RESOURCES, "predicted for 8192 rows"]
    return f"{command('make gate')} — Triton {' / '.join(versions)}\n\n" + table(header, rows)


RESOURCES = ("registers", "stack", "shared", "instructions")
# Heads whose times are predicted, by the variant of a kernel that they take.
HEADS = {"plain": ("llama3", "smollm2"), "softcap": ("gemma2-9b",)}


def predicted(of: tuple[str, ...], lines: dict[str, Record]) -> str:
    kernel, arch, dtype, variant = of
    counts = [line["instructions"] for line in lines.values() if "instructions" in line]
    if not counts or arch not in roofline.CARDS or dtype != "bf16":
        return ""
    times = {h: roofline.kernel_seconds(kernel, arch, h, max(counts)) for h in HEADS.get(variant, ())}
    return ", ".join(f"{head} {1e3 * seconds:.2f} ms" for head, seconds in times.items())


# Pictures


def pictures() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """File name -> (the data that it shows, how it is drawn). Made for the first CPU that has results."""
    found: dict[str, tuple[Any, Callable[[Any], None]]] = {}
    for run in (r for r in runs() if r.is_cpu):
        case = Case("smollm2", 512).name
        points = [
            (r["variant"], r["seconds"], m["bytes"] / 2**20)
            for r in run.all(kind="time", case=case)
            if r["outcome"] == "ok" and (m := run.one(kind="memory", case=case, variant=r["variant"])) and "bytes" in m
        ]
        limit = run.one(kind="time", case=case, variant=variants.LIMIT)
        if points and limit and "speed.png" not in found:
            found["speed.png"] = ({"points": points, "limit": limit["seconds"], "machine": run.machine()}, draw_speed)
        climbed: dict[str, list[tuple[int, float | None]]] = {}
        for r in run.all(kind="length"):
            if "expected" not in r:  # one that was not tried says nothing
                climbed.setdefault(r["variant"], []).append((r["rows"], r["bytes"] / 2**20 if "bytes" in r else None))
        if climbed and "lengths.png" not in found:
            found["lengths.png"] = (climbed, draw_lengths)
        stepped = [
            (case, {v: statistics.median(r["seconds"][v] for r in rounds) for v in whole.VARIANTS})
            for case in whole.CASES
            if (rounds := run.all(kind="step", case=case))
        ]
        if stepped and "steps.png" not in found:
            found["steps.png"] = (stepped, draw_steps)
        wrong = {
            name: [(r["mean_abs_margin"], r["wrong"][name] / r["pairs"]) for r in run.all(kind="synthetic")]
            for name in fidelity.DECIDERS
        }
        if run.all(kind="synthetic") and "fidelity.png" not in found:
            found["fidelity.png"] = (wrong, draw_fidelity)
    return found


def draw_speed(data: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.axvline(data["limit"], color="grey", linestyle="--", linewidth=1)
    axes.annotate("four bare products", (data["limit"], 1), xycoords=("data", "axes fraction"), xytext=(4, -14),
                  textcoords="offset points", color="grey", fontsize=9)  # fmt: skip
    for name, time, memory in data["points"]:
        plain = name in variants.PLAIN_DPO
        axes.scatter(time, memory, s=60, marker="s" if plain else "o", color="tab:blue" if plain else "tab:red",
                     zorder=3)  # fmt: skip
        axes.annotate(name, (time, memory), xytext=(7, 4), textcoords="offset points", fontsize=9,
                      weight="bold" if name == "ours" else "normal")  # fmt: skip
    axes.scatter([], [], marker="o", color="tab:red", label="ε-DPO")
    axes.scatter([], [], marker="s", color="tab:blue", label="plain DPO (less work)")
    most = [1.2 * max(values) for values in list(zip(*data["points"], strict=True))[1:]]
    axes.set(xlabel="seconds, forward and backward", ylabel="peak memory beyond inputs, MiB")
    axes.set(xlim=(0, most[0]), ylim=(0, most[1]))
    axes.set_title("One pair of 2 × 512 tokens, SmolLM2's head, fp32, CPU", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def draw_lengths(data: dict[str, list[tuple[int, float | None]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for name, points in data.items():
        x, y = zip(*(p for p in points if p[1] is not None), strict=True)
        plain = name in variants.PLAIN_DPO
        axes.plot(x, y, marker="s" if plain else "o", markersize=5, color="tab:blue" if plain else "tab:red",
                  linewidth=2.5 if name == "ours" else 1.2)  # fmt: skip
        ended = points[-1][1] is None
        if ended:
            axes.plot(x[-1], y[-1], marker="x", markersize=10, markeredgewidth=2, color="black")
        axes.annotate(name, (x[-1], y[-1]), xytext=(9, 1 if ended else -3), textcoords="offset points", fontsize=8,
                      rotation=25 if ended else 0, rotation_mode="anchor",
                      weight="bold" if name == "ours" else "normal")  # fmt: skip
    axes.plot([], [], marker="o", color="tab:red", label="ε-DPO")
    axes.plot([], [], marker="s", color="tab:blue", label="plain DPO (less work)")
    axes.set(xscale="log", yscale="log", xlabel="tokens a completion", ylabel="peak memory beyond inputs, MiB")
    axes.plot([], [], marker="x", markersize=9, color="black", linestyle="none", label="out of memory at twice as many")
    ticks = sorted({length for points in data.values() for length, _ in points})
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 2.2)
    axes.set_ylim(top=1e5)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_title("One pair under SmolLM2's head, fp32, CPU", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def draw_steps(data: list[tuple[str, dict[str, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    names = {"trl": "TRL, plain DPO", "padded": "ours, padded", "packed": "ours, packed"}
    for i, (variant, color) in enumerate(zip(names, ("tab:blue", "tab:orange", "tab:red"), strict=True)):
        places = [row + 0.26 * (i - 1) for row in range(len(data))]
        times = [found[variant] for _, found in data]
        bars = axes.barh(places, times, height=0.24, color=color, label=names[variant])
        axes.bar_label(bars, [seconds(t) for t in times], padding=3, fontsize=9)
    axes.set_yticks(range(len(data)), [case for case, _ in data])
    axes.invert_yaxis()
    axes.set(xlabel="seconds an optimizer step", xlim=(0, 1.15 * max(max(found.values()) for _, found in data)))
    axes.set_title("A step of 4 pairs, SmolLM2-135M and its reference, fp32, CPU", fontsize=11)
    axes.legend(loc="lower right")


def draw_fidelity(data: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown = {
        "ours, bf16": ("tab:red", "o"),
        "bf16 logits, then fp32": ("tab:orange", "s"),
        "composed from a log-prob kernel, bf16": ("tab:purple", "^"),
        "bf16 throughout": ("tab:blue", "D"),
    }
    for name, (color, marker) in shown.items():
        x, y = zip(*sorted(data[name]), strict=True)
        axes.plot(x, [100 * v for v in y], color=color, marker=marker, label=name)
    axes.set(
        xscale="log", xlabel="drift from the reference: mean |margin|, nats", ylabel="pairs whose step is wrong, %"
    )
    axes.set_title("Steps that differ from float64 of the same bf16 inputs (ε = 0.01, V = 16384)", fontsize=11)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def png_digest(path: Path) -> str:
    """The digest of the data that a picture was drawn from, kept in its own text chunk."""
    data = path.read_bytes() if path.exists() else b""
    start = data.find(b"digest\0")
    return data[start + 7 : start + 23].decode(errors="replace") if start >= 0 else ""


# Files


def stale(text: str, tables: dict[str, str], file: str) -> tuple[str, list[str]]:
    """The text with every table in its place, and what was wrong with it."""
    wrong = []
    for name, content in tables.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            wrong.append(f"{file}: the marker {begin} … {end} is missing")
            continue
        head, rest = text.split(begin)
        old, tail = rest.split(end)
        new = f"\n{content}\n"
        if old != new:
            wrong.append(f"{file}: the table {name} is not what the results say")
        text = f"{head}{begin}{new}{end}{tail}"
    return text, wrong


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is stale")
    options = parser.parse_args(arguments)
    problems = []
    for path, tables in (
        (README, {"real-step": real_step()}),
        (MEASURED, measured_tables()),
        (ROOFLINE, roofline_tables()),
        (KERNELS, {"kernels": kernel_table()}),
        (PARALLEL, {"cards-longest": table(*cards.longest_rows()), "cards-parts": table(*cards.parts())}),
    ):
        text, wrong = stale(path.read_text(encoding="utf-8"), tables, path.name)
        problems += wrong
        if not options.check:
            path.write_text(text, encoding="utf-8")
    for name, (data, draw) in pictures().items():
        if png_digest(IMAGES / name) == digest(data):
            continue
        problems.append(f"{name}: the picture is not what the results say")
        if not options.check:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt

            IMAGES.mkdir(parents=True, exist_ok=True)
            draw(data)
            plt.savefig(IMAGES / name, dpi=130, metadata={"digest": digest(data)})
            plt.close()
    missing = [p for p in problems if "missing" in p]
    if options.check and problems or missing:
        sys.exit("\n".join([*(problems if options.check else missing), "python -m bench.tables writes them"]))
    for problem in problems:
        print(f"written: {problem.partition(':')[0]}: {problem.partition(': ')[2].split(' is not')[0]}")


if __name__ == "__main__":
    main()
