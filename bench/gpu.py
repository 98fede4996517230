"""The GPU's part of the benchmark. Needs torch, triton and numpy; rivals that are not installed are reported absent.

    python -m bench.gpu --out DIR [--quick] [--seconds S] [--part NAME …]

Each figure is written as soon as it is there; the same command goes on where it was stopped, and stops by itself before
its time is up. Parts, in their order: device, exact, speed, stages, long, training.
"""

from __future__ import annotations

import argparse
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
from .cases import LENGTHS, Case, head_shape, make_inputs
from .variants import EPSILON, LIMIT, VARIANTS

PARTS = ("device", "exact", "speed", "stages", "long", "training")
HEAD_ORDER = ("llama3", "qwen3", "gemma2", "smollm2")


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
    """Every variant against float64, decisions of thousands of pairs, and the same bits 50 times over."""
    for dtype in ("bfloat16",) if s.quick else ("bfloat16", "float32"):
        for head in ("tiny", "tiny-softcap"):
            for variant in s.variants:
                case = Case(head, 12, pairs=3, masked=0.5, dtype=dtype)
                s.once(partial(_check, variant, case, s.device), kind="check", variant=variant, **case.as_dict())
    for drift in fidelity.DRIFTS[:: 2 if s.quick else 1]:
        batches, vocabulary = (1, 1031) if s.tiny else (20, 16384)
        pairs = fidelity.synthetic(drift, batches, vocabulary=vocabulary, device=s.device)
        s.once(partial(fidelity.decide_all, pairs, s.progress, f"drift {drift}"), kind="synthetic", drift=drift)

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


# Speed and memory


def speed_cases(s: Session) -> Iterator[tuple[Case, list[str]]]:
    """In the order of what is most wanted, for a session that ends early."""
    everything = [v for v in s.variants if v != "ours"]
    if s.tiny:
        yield Case("tiny", 16, dtype="bfloat16"), everything
        yield Case("tiny", 16, mode="frozen", dtype="bfloat16"), ["trl", "liger"]
        return
    nearest = ["trl", "liger", "cut-cross-entropy", "torch"]
    for head in HEAD_ORDER:
        yield Case(head, 4096, dtype="bfloat16"), everything
        yield Case(head, 4096, mode="frozen", dtype="bfloat16"), nearest
        yield Case(head, 4096, mode="score", dtype="bfloat16"), nearest
        if not s.quick:
            yield Case(head, 8192, masked=0.5, dtype="bfloat16"), nearest
            yield Case(head, 256, pairs=32, masked=0.5, dtype="bfloat16"), nearest


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
        measure_case(s, case, names, rounds=3 if s.quick or s.tiny else 10)


def long(s: Session) -> None:
    """Tokens a completion until nothing fits any more: where a variant is out of memory, longer ones are not tried."""
    heads = ("tiny",) if s.tiny else HEAD_ORDER[:1] if s.quick else HEAD_ORDER
    lengths = (16, 32) if s.tiny else LENGTHS
    everything = [v for v in s.variants if v not in ("ours", *variants.COMPILED)]
    for head in heads:
        full: set[str] = set()
        for length in lengths:
            case = Case(head, length, dtype="bfloat16")
            names = [v for v in everything if v not in full]
            measure_case(s, case, names, rounds=2 if s.quick or s.tiny or length > 16384 else 5)
            for record in s.results.data["records"]:
                if record["kind"] == "memory" and record["case"] == case.name and record["outcome"] == "out of memory":
                    full.add(record["variant"])
            if "ours" in full:
                break


# Stages of one tile, and what each costs when all else is left out


def stages(s: Session) -> None:
    heads = ("tiny",) if s.tiny else HEAD_ORDER[:1] if s.quick else HEAD_ORDER
    for head in heads:
        case = Case(head, 16 if s.tiny else 2048, dtype="bfloat16")
        s.once(partial(stage_times, case, s.device), kind="stages", **case.as_dict())


def stage_times(case: Case, device: str) -> dict[str, Any]:
    """Median seconds of each stage over one tile of all the case's tokens."""
    inputs = make_inputs(case, device)
    engine = "triton" if device != "cpu" else "torch"
    budget = 8 * case.total * len(inputs.weight)
    with torch.no_grad():
        bound, settings, execution = variants.bound(inputs, engine, budget)
        run = plan.Pass(bound, settings, execution, (True, True, False))
        into = run.accumulators()
        tile, tokens = run.layout.series[0].tiles[0], run.tokens
        rows = run.layout.order[tile]
        x, ref_x = run.x.index_select(0, rows), run.ref_x.index_select(0, rows)
        a, b = (torch.empty(len(x), len(inputs.weight), device=device) for _ in range(2))
        g = a if engine == "torch" else torch.empty_like(a, dtype=inputs.weight.dtype)
        coefficient = torch.ones(len(x), device=device)
        out = torch.empty(plan.PAIR, case.pairs, device=device)
        what = (tile, tokens, run.policy, run.reference, EPSILON)
        # In the order of a call, so that each finds what it would find there.
        work = {
            "policy product": lambda: run.policy.project(x, a),
            "reference product": lambda: run.reference.project(ref_x, b),
            "sweep": lambda: run.engine.sweep(a, b, *what),
            "decide": lambda: plan.decide(tokens, range(case.pairs), settings, out),
            "gradient": lambda: run.engine.gradient(a, tile, tokens, coefficient, run.policy, g),
            "dX": lambda: run.policy.backward(g, x, rows, Gradients(into.hidden, None, None), False),
            "dW": lambda: run.policy.backward(g, x, rows, Gradients(None, into.weight, None), False),
        }
        if engine == "triton":
            work["head and sweep in one"] = lambda: run.engine.project_and_sweep(x, ref_x, *what, a)
            work["head and sweep in one, logits not kept"] = lambda: run.engine.project_and_sweep(x, ref_x, *what, None)
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(8):
            for name, call in work.items():
                tokens.arrived.zero_()  # or no launch but the first would reduce a pair
                times[name].append(measure.seconds(call, device))
        if engine == "triton":
            assert tokens.arrived.sum() == len(x), "the last launch has swept all tokens of every pair"
        found = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {"stages": found, "tile_rows": len(x)}


# Training


def training(s: Session) -> None:
    """Whole steps of Llama-shaped models of random weights, with this loss and with the materialised one."""
    shapes = {
        "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                 "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        "1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
               "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    }  # fmt: skip
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    if s.tiny:
        shapes = {"tiny": shapes["135M"] | {"vocab_size": 1031, "num_hidden_layers": 2, "hidden_size": 144}}
        lengths = (16,)
    elif s.quick:
        lengths = (1024, 4096, 16384)
    for model, shape in shapes.items():
        for loss in ("ours", "materialised"):
            for length in lengths:
                record = s.once(
                    partial(training_steps, s, shape, loss, length),
                    kind="training", model=model, loss=loss, length=length,
                )  # fmt: skip
                if record is None or record["outcome"] != "ok":
                    break


def training_steps(s: Session, shape: dict[str, Any], loss: str, length: int) -> dict[str, Any]:
    """Tokens a second and peak memory of steps of one pair, backbone, head, loss and optimizer in all."""
    try:
        import transformers
    except ImportError as error:
        raise variants.Unavailable("transformers is not installed") from error

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=length)
    policy, reference = (transformers.LlamaForCausalLM(config) for _ in range(2))
    for model in (policy, reference):
        torch.nn.Module.to(model, s.device, torch.bfloat16)
    reference.requires_grad_(False)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(0, shape["vocab_size"], (2, length + 1), device=s.device)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results (gpu.json)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop cleanly before this many")
    parser.add_argument("--quick", action="store_true", help="fewer heads, lengths and rounds")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="by default all")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu with --tiny: a test of this program
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU here; `make bench` measures the CPU")
    results = measure.Results(options.out / "gpu.json", options.device)
    s = Session(options.device, results, measure.Progress(), options.seconds, options.quick, options.tiny)
    s.progress(f"{results.data['environment']['device']}, {len(results.data['records'])} records are there already")
    functions = {"device": device, "exact": exact, "speed": speed, "stages": stages, "long": long, "training": training}
    for name in PARTS:
        if name in options.part and not s.out_of_time():
            s.progress(f"part {name}")
            functions[name](s)
    s.progress("time is up; the same command goes on from here" if s.out_of_time() else "done")


if __name__ == "__main__":
    main()
