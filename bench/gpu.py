"""The GPU's part of the benchmark. Needs torch, triton and numpy; rivals that are not installed are reported absent.

    python -m bench.gpu --out DIR [--quick] [--seconds S] [--part NAME …]

Each figure is written as soon as it is there, into DIR/<card>/<part>.json; the same command goes on where it was
stopped, and stops by itself before its time is up.

    smoke     each product that only CUDA has, each kernel at real heads: right, or what is wrong
    device    the card's own ceilings
    stages    one tile's stages by themselves
    tiles     budgets of tiles, and how many of them share a product
    routes    head and sweep in one kernel, or products and a sweep, by hidden size
    exact     every variant against float64, many decisions, the same bits 50 times over
    speed     every variant at real heads: time and memory
    long      the same for ever longer completions, until nothing fits
    steps     whole steps of TRL's trainer and of this one, padded and packed, at HH's lengths
    training  whole steps of a loop without a trainer, for ever longer completions
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epsdpo_kernels import plan
from epsdpo_kernels.head import Gradients

from . import fidelity, measure, variants
from . import smoke as smoke_checks
from . import steps as whole
from .cases import LENGTHS, MODELS, Case, head_shape, make_inputs
from .variants import EPSILON, LIMIT, VARIANTS

# In the order of what is most wanted, for a session that ends early.
HEAD_ORDER = ("llama3", "smollm2", "gemma2", "qwen3")
NEAREST = ["trl", "liger", "cut-cross-entropy", "torch"]


@dataclass
class Session:
    device: str
    results: measure.Results
    progress: measure.Progress
    seconds: float
    quick: bool
    tiny: bool  # shapes for a test of this program

    @property
    def variants(self) -> list[str]:
        return [v for v in VARIANTS if not (self.tiny and v in variants.COMPILED)]

    def out_of_time(self, needed: float = 0.0) -> bool:
        return self.progress.elapsed + needed > self.seconds

    def once(self, work: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any] | None:
        """A record by its key: found, or made and kept; None where time is up."""
        found = self.results.find(**key)
        if found is None and not self.out_of_time():
            found = self.results.add(**key, **measure.outcome(work))
            said = {k: v for k, v in found.items() if k not in key and not isinstance(v, (list, dict))}
            self.progress(f"{' '.join(map(str, key.values()))}: {said}")
        return found

    def bytes_free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.device != "cpu" else measure.available() - measure.RESERVE


def smoke(s: Session) -> None:
    for name, check in smoke_checks.checks(s.device, s.tiny):
        s.once(check, kind="smoke", what=name)


# The device's own ceilings


def device(s: Session) -> None:
    def copy() -> dict[str, Any]:
        """Bytes a second of a copy far larger than any cache, read and written."""
        source = torch.ones((1 << 22) if s.tiny else (1 << 30), device=s.device)
        target = torch.empty_like(source)
        times = [measure.seconds(lambda: target.copy_(source), s.device) for _ in range(12)][2:]
        return {"bandwidth": 2 * source.nbytes / statistics.median(times)}

    def product(dtype: torch.dtype, **wide) -> dict[str, Any]:
        """On random data: zeros draw less power, and clock higher, than any real product."""
        n = 256 if s.tiny else 8192
        a, b = (torch.randn(n, n, device=s.device).to(dtype) for _ in range(2))
        times = [measure.seconds(lambda: torch.mm(a, b, **wide), s.device) for _ in range(12)][2:]
        return {"flops": 2 * n**3 / statistics.median(times)}

    wide = {"out_dtype": torch.float32} if s.device != "cpu" else {}
    s.once(copy, kind="device", what="copy")
    s.once(lambda: product(torch.bfloat16), kind="device", what="bf16 product")
    s.once(lambda: product(torch.bfloat16, **wide), kind="device", what="bf16 product, fp32 result")
    s.once(lambda: product(torch.float32), kind="device", what="fp32 product")


# Right answers first


def _check(variant: str, case: Case, device: str) -> dict[str, Any]:
    return {"errors": variants.check(variant, make_inputs(case, device))}


def exact(s: Session) -> None:
    """The same bits 50 times over, decisions of thousands of pairs, and every variant against float64."""

    def repeated() -> dict[str, Any]:
        case = Case("tiny" if s.tiny else "llama3", 16 if s.tiny else 2048, pairs=2, masked=0.25, dtype="bfloat16")
        inputs, different = make_inputs(case, s.device), 0
        first: list[torch.Tensor] = []
        for _ in range(50):
            loss = variants.call("ours", inputs)()
            assert loss is not None and inputs.hidden.grad is not None and inputs.weight.grad is not None
            got = [loss.detach(), inputs.hidden.grad, inputs.weight.grad]
            first = first or [t.clone() for t in got]
            different += any(not torch.equal(a, b) for a, b in zip(got, first, strict=True))
        return {"repetitions": 50, "different": different}

    s.once(repeated, kind="repeated")
    for drift in fidelity.DRIFTS[:: 2 if s.quick else 1]:
        batches, vocabulary = (1, 1031) if s.tiny else (20, 16384)
        pairs = fidelity.synthetic(drift, batches, vocabulary=vocabulary, device=s.device)
        s.once(partial(fidelity.decide_all, pairs, s.progress, f"drift {drift}"), kind="synthetic", drift=drift)
    cases = [Case(head, 64, masked=0.25, dtype="bfloat16") for head in (() if s.tiny else HEAD_ORDER)]
    for dtype in ("bfloat16",) if s.quick else ("bfloat16", "float32"):
        cases += [Case(head, 12, pairs=3, masked=0.5, dtype=dtype) for head in ("tiny", "tiny-softcap")]
    for case in cases:
        for variant in s.variants:
            s.once(partial(_check, variant, case, s.device), kind="check", variant=variant, **case.as_dict())


# Speed and memory


def speed_cases(s: Session) -> Iterator[tuple[Case, list[str]]]:
    everything = [v for v in s.variants if v != "ours"]
    if s.tiny:
        yield Case("tiny", 16, dtype="bfloat16"), everything
        yield Case("tiny", 16, mode="frozen", dtype="bfloat16"), ["trl", "liger"]
        return
    for head in HEAD_ORDER:
        yield Case(head, 4096, dtype="bfloat16"), everything
        yield Case(head, 4096, mode="frozen", dtype="bfloat16"), NEAREST
        yield Case(head, 4096, mode="score", dtype="bfloat16"), NEAREST
        if not s.quick:
            yield Case(head, 8192, masked=0.5, dtype="bfloat16"), NEAREST
            yield Case(head, 256, pairs=32, masked=0.5, dtype="bfloat16"), NEAREST


def measure_case(s: Session, case: Case, names: list[str], rounds: int) -> None:
    """Memory of each, then interleaved times of those that fit."""
    if s.results.find(kind="time", variant="ours", case=case.name):
        return
    vocabulary, width, _ = head_shape(case.head)
    wanted = ["ours", LIMIT, *names]
    fits = []
    for name in wanted:
        if s.out_of_time(20):
            return
        if name == LIMIT:
            fits.append(name)
            continue
        record = s.once(partial(_memory, name, case, s.device), kind="memory", variant=name, **case.as_dict())
        if record and record["outcome"] == "ok":
            fits.append(name)
    inputs = 4 * (vocabulary + case.total) * width  # two bf16 heads and hidden states
    if "ours" not in fits or inputs > s.bytes_free():
        return
    timed = measure.Timed(case, fits, s.device)
    timed.warm()
    for _ in range(rounds):
        if s.out_of_time(10):
            break
        for name in fits:
            timed.once(name)
    for variant, record in timed.records():
        s.results.add(kind="time", variant=variant, **case.as_dict(), **record)
        if record["outcome"] == "ok":
            to_limit = record.get("to_limit", {}).get("ratio", float("nan"))
            s.progress(f"{case.name}: {variant} {record['seconds'] * 1e3:.1f} ms, {to_limit:.3f} of the limit")


def _memory(variant: str, case: Case, device: str) -> dict[str, Any]:
    """One call's memory, with nothing cached left over; its outcome becomes that of the record."""
    found = measure.memory_here(variant, case, device)
    if device != "cpu":
        torch.cuda.empty_cache()
    return found


def speed(s: Session) -> None:
    for case, names in speed_cases(s):
        measure_case(s, case, names, rounds=3 if s.quick or s.tiny else 5)


def long(s: Session) -> None:
    """One call a length, until it does not fit any more: then longer ones of the variant are not tried."""
    heads = ("tiny",) if s.tiny else HEAD_ORDER[:1] if s.quick else HEAD_ORDER
    for head in heads:
        wanted = ["ours", *NEAREST, *(v for v in s.variants if v not in ("ours", *NEAREST, *variants.COMPILED))]
        for variant in wanted:
            for length in (16, 32) if s.tiny else LENGTHS:
                case = Case(head, length, dtype="bfloat16")
                work = partial(_memory, variant, case, s.device)
                record = s.once(work, kind="length", variant=variant, **case.as_dict())
                if record is None or record["outcome"] != "ok":
                    break


# One way against another on the same machine


def tiles(s: Session) -> None:
    names = ["ours", *variants.BUDGETS, *variants.WAITING]
    for head in ("tiny",) if s.tiny else ("llama3", "gemma2", "smollm2"):
        case = Case(head, 16 if s.tiny else 4096, dtype="bfloat16")
        s.once(partial(in_turn, s, case, names), kind="tiles", **case.as_dict())


def routes(s: Session) -> None:
    """Of scoring, by hidden size; then at real heads."""
    cases = [Case(f"65536x{width}", 4096, mode="score", dtype="bfloat16") for width in (128, 320, 576, 2048)]
    cases += [Case(head, 4096, mode="score", dtype="bfloat16") for head in ("llama3", "gemma2")]
    for case in [Case("tiny", 16, mode="score", dtype="bfloat16")] if s.tiny else cases:
        s.once(partial(in_turn, s, case, list(variants.ROUTES)), kind="routes", **case.as_dict())


def in_turn(s: Session, case: Case, names: list[str]) -> dict[str, Any]:
    """Times of several ways and of the bare products, interleaved."""
    timed = measure.Timed(case, [LIMIT, *names], s.device)
    timed.warm()
    for i in range(3 if s.quick or s.tiny else 6):
        if i and s.out_of_time(10):
            break
        for name in (LIMIT, *names):
            timed.once(name)
    return {"found": dict(timed.records())}


# Stages of one tile, and what each costs when all else is left out


def stages(s: Session) -> None:
    heads = ("131x40",) if s.tiny else HEAD_ORDER[:1] if s.quick else HEAD_ORDER
    for head in heads:
        case = Case(head, 8 if s.tiny else 2048, dtype="bfloat16")
        s.once(partial(stage_times, case, s.device, 2 if s.tiny else 8), kind="stages", **case.as_dict())


def stage_times(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each stage over one tile of all the case's tokens, the first round left out."""
    inputs = make_inputs(case, device)
    engine = "triton" if device != "cpu" or _interpreted() else "torch"
    budget = 16 * case.total * len(inputs.weight)  # ample: all tokens in one tile, and their gradients beside it
    with torch.no_grad():
        bound, settings, execution = variants.bound(inputs, engine, budget)
        run = plan.Pass(bound, settings, execution, (True, True, False))
        into = run.accumulators()
        tile, tokens = run.layout.series[0].tiles[0].rows, run.tokens
        rows = run.layout.order[tile]
        x, ref_x = run.x.index_select(0, rows), run.ref_x.index_select(0, rows)
        a, b = (torch.empty(len(x), len(inputs.weight), device=device) for _ in range(2))
        g = a if run.policy.gradient_dtype == a.dtype else torch.empty_like(a, dtype=run.policy.gradient_dtype)
        coefficient = torch.ones(2 * case.pairs, device=device)
        what = (tile, tokens, run.policy, run.reference, EPSILON)
        # In the order of a call, so that each finds what it would find there.
        work = {
            "policy product": lambda: run.policy.project(x, a),
            "reference product": lambda: run.reference.project(ref_x, b),
            "sweep": lambda: run.engine.sweep(a, b, *what),
            "decide": lambda: plan.coefficients(tokens, slice(None), settings),
            "gradient": lambda: run.engine.gradient(a, tile, tokens, coefficient, run.policy, g),
            "dX": lambda: run.policy.backward(g, x, rows, Gradients(into.hidden, None, None), False),
            "dW": lambda: run.policy.backward(g, x, rows, Gradients(None, into.weight, None), False),
        }
        if engine == "triton":
            work["head and sweep in one"] = lambda: run.engine.project_and_sweep(x, ref_x, *what, a)
            work["head and sweep in one, logits not kept"] = lambda: run.engine.project_and_sweep(x, ref_x, *what, None)
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, call in work.items():
                tokens.arrived.zero_()  # or no launch but the first would reduce a pair
                times[name].append(measure.seconds(call, device))
        if engine == "triton":
            assert tokens.arrived.sum() == len(x), "the last launch has swept all tokens of every pair"
        found = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {"stages": found, "tile_rows": len(x)}


def _interpreted() -> bool:
    from epsdpo_kernels.engines import triton_blocks

    return triton_blocks.INTERPRETED


# Whole steps


def needs(*packages: str) -> None:
    """Raises Unavailable where one of them can't be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise variants.Unavailable(f"{package}: {error}") from error


def steps(s: Session) -> None:
    for case in (("tiny", "hh", 2, 2),) if s.tiny else whole.ON_GPU:
        trainer_steps(s, *case)
        gc.collect()


def trainer_steps(s: Session, model: str, case: str, size: int, rounds: int) -> None:
    """TRL's trainer beside this one, padded and packed: rounds of steps in turn, then the peak of each."""
    pairs = whole.random_pairs(case, size * rounds, MODELS[model]["vocab_size"])
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]

    @functools.cache
    def trainers() -> dict[str, Any]:
        needs("transformers", "datasets", "trl")
        made, tokenizer = whole.random_model(model, s.device), whole.words_tokenizer()
        found = {variant: whole.make_trainer(variant, made, tokenizer) for variant in whole.VARIANTS}
        for trainer in found.values():
            whole.step(trainer, batches[0])
        return found

    def memory(variant: str) -> dict[str, Any]:
        batch = max(batches, key=lambda b: max(sum(map(len, pair.values())) for pair in b))
        return {"bytes": measure.peak_bytes(partial(whole.step, trainers()[variant], batch), s.device)}

    key = {"model": model, "case": case, "pairs": size}
    for i, batch in enumerate(batches):
        work = lambda i=i, batch=batch: whole.time_round(trainers(), batch, i, s.device)  # noqa: E731
        record = s.once(work, kind="step", **key, round=i)
        if record is None or record["outcome"] != "ok":
            return
    for variant in whole.VARIANTS:
        s.once(partial(memory, variant), kind="step memory", **key, variant=variant)


def training(s: Session) -> None:
    """Models of random weights and one pair a step, with this loss and with the materialised one."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    if s.tiny:
        lengths = (16,)
    elif s.quick:
        lengths = (1024, 4096, 16384)
    for model in ("tiny",) if s.tiny else ("SmolLM2-135M", "Llama-3.2-1B"):
        for loss in ("ours", "materialised"):
            for length in lengths:
                record = s.once(
                    partial(training_steps, s, model, loss, length),
                    kind="training", model=model, loss=loss, length=length,
                )  # fmt: skip
                if record is None or record["outcome"] != "ok":
                    break


def training_steps(s: Session, name: str, loss: str, length: int) -> dict[str, Any]:
    """Tokens a second and peak memory of steps of one pair, backbone, head, loss and optimizer in all."""
    needs("transformers")
    policy, reference = (whole.random_model(name, s.device) for _ in range(2))
    reference.requires_grad_(False)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(0, MODELS[name]["vocab_size"], (2, length + 1), device=s.device)
    labels = ids[:, 1:].clone()
    labels[:, : length // 4] = -100

    def step() -> None:
        hidden = policy.model(ids[:, :-1], use_cache=False).last_hidden_state
        with torch.no_grad():
            ref_hidden = reference.model(ids[:, :-1], use_cache=False).last_hidden_state
        inputs = variants.Inputs(hidden, policy.lm_head.weight, labels, ref_hidden, reference.lm_head.weight, None)
        VARIANTS[loss](inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = sum(p.nbytes for m in (policy, reference) for p in m.parameters()) + 2 * sum(
        p.nbytes for p in policy.parameters()
    )
    peak = measure.peak_bytes(step, s.device)
    times = [measure.seconds(step, s.device) for _ in range(3)]
    middle = statistics.median(times)
    return {"seconds": middle, "tokens_per_second": 2 * length / middle, "bytes": peak, "weights": held, "times": times}


PARTS = {
    part.__name__: part for part in (smoke, device, stages, tiles, routes, exact, speed, long, steps, training)
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the card's folder of results")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop cleanly before this many")
    parser.add_argument("--quick", action="store_true", help="fewer heads, lengths and rounds")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="of the above; by default all")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu with --tiny: a test of this program
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU here; `make bench` measures the CPU")
    progress, folder = measure.Progress(), options.out / measure.device_name(options.device)
    versions = measure.environment(options.device)["versions"]
    progress(f"{folder.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    late = False
    for name, part in PARTS.items():
        if name in options.part:
            results = measure.Results(folder / f"{name}.json", options.device)
            s = Session(options.device, results, progress, options.seconds, options.quick, options.tiny)
            progress(f"part {name}: {len(results.data['records'])} records are there already")
            part(s)
            late = s.out_of_time()
    progress("time is up; the same command goes on from here" if late else "done")


if __name__ == "__main__":
    main()
