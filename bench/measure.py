"""The measuring core: interleaved times, peak memory, operations, and results that survive being stopped.

python -m bench.measure '<case as JSON>' VARIANT      peak memory of one variant, as JSON, in this fresh process
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from epsdpo_kernels.head import Head

from . import variants
from .cases import Case, Inputs, head_shape, make_inputs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "transformers", "numpy")
# What is left alone of the machine's memory. A variant that wants more is out of memory.
RESERVE = 1 << 30
Record = dict[str, Any]


def device_name(device: str) -> str:
    """The folder of a device's results: cpu-2 for two threads, else the accelerator's own name."""
    if device == "cpu":
        return f"cpu-{torch.get_num_threads()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on: device, threads, versions. Neither names nor paths of the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    facts: dict[str, Any] = {"device": device_name(device), "versions": versions, "machine": platform.machine()}
    if device == "cpu":
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if _linux() else None
        facts["cpu"] = cpu[1] if cpu else platform.processor()
        facts["threads"] = torch.get_num_threads()
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    else:
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["multiprocessors"] = properties.multi_processor_count
    return facts


def _linux() -> bool:
    return sys.platform.startswith("linux")


# Time


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall clock of one call; on a GPU from an idle device to an idle device."""
    if device != "cpu":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread, and every time measured."""
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "rounds": len(times),
        "times": times,
    }


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Median of round-by-round ratios and their range: a load that comes and goes hits both of a round."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def exponent(points: list[tuple[float, float]]) -> float:
    """The k of y ~ xᵏ, by least squares on logarithms."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    return statistics.linear_regression(x, y).slope


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def cpu_ceilings() -> dict[str, float]:
    """What this CPU reaches, measured: what bench/roofline.py predicts from."""

    def best(call: Callable[[], Any], rounds: int = 5) -> float:
        return min(seconds(call, "cpu") for _ in range(rounds))

    x, out, head = torch.randn(512, 4096), torch.empty(512, 8192), Head(torch.randn(8192, 4096), None, 1.0, None)
    found = {"flops": 2 * out.numel() * 4096 / best(lambda: head.project(x, out))}
    source, target = torch.zeros(1 << 27), torch.empty(1 << 27)  # 512 MiB, larger than any cache
    found["bandwidth"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    # Elementwise work on the chunk of rows that the sweep works on at a time.
    x, y = torch.randn(5, 49152), torch.empty(5, 49152)
    for name, operation in {"exponentials": torch.exp2, "tanhs": torch.tanh, "others": partial(torch.sub, x)}.items():
        found[name] = x.numel() * 40 / best(lambda f=operation: [f(x, out=y) for _ in range(40)])  # type: ignore[misc]
    # Memory that the system hands out is cleared at the first touch: fresh against used.
    size = 1 << 26
    fresh = best(lambda: torch.empty(size).fill_(1))
    used = torch.ones(size)
    found["first_touch"] = used.nbytes / max(fresh - best(lambda: used.fill_(1)), 1e-9)
    return found


# Memory


def _status(field: str) -> int:
    """Bytes of a field of Linux's account of this process."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def available() -> int:
    """Bytes that can be taken without pushing anything out."""
    if _linux():
        return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _trim() -> None:
    gc.collect()
    if _linux():
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _address_limit() -> Iterator[None]:
    """Allocations beyond what is available fail in this process, instead of pushing the machine into swap."""
    was = resource.getrlimit(resource.RLIMIT_AS)
    limit = _status("VmSize") + available() - RESERVE
    resource.setrlimit(resource.RLIMIT_AS, (limit if was[1] < 0 else min(limit, was[1]), was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, was)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that one call held beyond what was there before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim()
    with _address_limit():
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before


def outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives, or in one word and one sentence why there is nothing."""
    try:
        return {"outcome": "ok"} | work()
    except variants.Unavailable as reason:
        return {"outcome": "unavailable", "reason": str(reason)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"outcome": "out of memory"}
        traceback.print_exc(limit=-3)
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _warmed(variant: str, case: Case, device: str) -> None:
    """Imports, thread pools and compilers are not what a call costs: a small call of the same kind goes first."""
    small = case if variant in variants.COMPILED else replace(case, head="tiny", rows=8, pairs=1)
    if head_shape(case.head)[2] is not None and small is not case:
        small = replace(small, head="tiny-softcap")
    variants.call(variant, make_inputs(small, device))()


def memory_here(variant: str, case: Case, device: str) -> dict[str, Any]:
    """Peak memory beyond the inputs, the floor (the gradients that the call hands back), and the call's seconds."""

    def work() -> dict[str, Any]:
        with _address_limit() if device == "cpu" else nullcontext():
            _warmed(variant, case, device)
        inputs = make_inputs(case, device)
        run = variants.call(variant, inputs)
        gradients = sum(t.nbytes for t in (inputs.hidden, inputs.weight) if t.requires_grad)
        took: list[float] = []
        peak = peak_bytes(lambda: took.append(seconds(run, device)), device)
        return {"bytes": peak, "seconds": took[0], "inputs": inputs.nbytes, "gradients": gradients}

    return outcome(work)


def memory(variant: str, case: Case, device: str) -> dict[str, Any]:
    """:func:`memory_here`; on a CPU in a fresh process, because there the peak is that of the process.

    CUDA's allocator keeps exact accounts, so a process of its own would only cost time there.
    """
    if device != "cpu":
        return memory_here(variant, case, device)
    inputs = (
        2 * (head_shape(case.head)[0] + case.total) * head_shape(case.head)[1] * getattr(torch, case.dtype).itemsize
    )
    if inputs > available() - RESERVE:
        return {"outcome": "out of memory", "reason": "the inputs alone"}
    command = [sys.executable, "-m", "bench.measure", json.dumps(_fields(case)), variant]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return {"outcome": "failed", "reason": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


# One case


def _made(name: str, inputs: Inputs) -> dict[str, Any]:
    return {"call": variants.call(name, inputs)}


def _done(call: Callable[[], Any]) -> dict[str, Any]:
    call()
    return {}


def checked(variant: str, case: Case, device: str) -> dict[str, Any]:
    """Errors against float64 on a small head with the case's dtype, mode, mask and softcap."""
    head = "tiny" if head_shape(case.head)[2] is None else "tiny-softcap"
    small = Case(head, 12, pairs=3, masked=case.masked, mode=case.mode, dtype=case.dtype)
    return outcome(lambda: {"errors": variants.check(variant, make_inputs(small, device))})


class Timed:
    """One case's variants, timed in turn round by round on the same inputs; one that fails is out from then on."""

    def __init__(self, case: Case, names: list[str], device: str):
        self.case, self.device = case, device
        self.inputs: Inputs = make_inputs(case, device)
        self.times: dict[str, list[float]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            made = outcome(partial(_made, name, self.inputs))
            if made["outcome"] == "ok":
                self.calls[name], self.times[name] = made["call"], []
            else:
                self.failed[name] = made

    def warm(self) -> None:
        """Thread pools and compilers, on a small call; a compiled variant on the case itself."""
        for name in list(self.calls):
            if name == variants.LIMIT:
                continue
            # On a GPU the case itself, so that its kernels are loaded and its products tuned.
            call = self.calls[name] if self.device != "cpu" else partial(_warmed, name, self.case, self.device)
            result = outcome(partial(_done, call))
            self._keep_or_drop(name, result)

    def once(self, name: str) -> float | None:
        """Times one call of a variant; None where it has failed, now or before."""
        if name not in self.calls:
            return None
        result = outcome(lambda: {"seconds": seconds(self.calls[name], self.device)})
        self._keep_or_drop(name, result)
        if result["outcome"] != "ok":
            return None
        self.times[name].append(result["seconds"])
        return result["seconds"]

    def _keep_or_drop(self, name: str, result: dict[str, Any]) -> None:
        self.inputs.hidden.grad = self.inputs.weight.grad = None
        if result["outcome"] != "ok":
            self.failed[name] = result
            self.calls.pop(name)
            self.times.pop(name)
            if self.device != "cpu":
                torch.cuda.empty_cache()

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(variant, what was measured) with the ratio to the bare products."""
        base = self.times.get(variants.LIMIT)
        for name, times in self.times.items():
            if not times:
                continue
            record = {"outcome": "ok"} | summary(times)
            record["flops"] = self.case.limit * self.case.product / record["seconds"]
            if base and len(base) == len(times):
                record["to_limit"] = ratio(times, base)
            mine = self.times.get("ours")
            if mine and name != "ours" and len(mine) == len(times):
                record["to_ours"] = ratio(times, mine)
            yield name, record
        yield from self.failed.items()


# Operations


def count_flops(case: Case, device: str = "cpu") -> int:
    """Operations of this package's call, by torch's own counter; the products of backward are in the forward."""
    from torch.utils.flop_counter import FlopCounterMode

    from epsdpo_kernels import ops
    from epsdpo_kernels.call import flatten

    inputs = make_inputs(case, device)
    needs = [inputs.hidden.requires_grad, inputs.weight.requires_grad, False]

    def product(x: list[int], weight: list[int], *_, **__) -> int:
        return 2 * x[0] * x[1] * weight[0]

    # The counter sees no further than an op; the body of ours is torch's own, with one op that it does not know.
    known = {torch.ops.mkldnn._linear_pointwise: product}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        ops.single_pass_body(*flatten(*variants.bound(inputs)), needs)
    return counter.get_total_flops()


# Results


class Results:
    """Records in a JSON file, each written as it comes, so that what was measured survives whatever comes next.

    A file whose environment is another's is begun anew.
    """

    def __init__(self, path: Path, device: str):
        self.path = path
        here = environment(device)
        self.data: dict[str, Any] = {"environment": here, "records": []}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["environment"] == here:
                self.data = found
        path.parent.mkdir(parents=True, exist_ok=True)

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((r for r in self.data["records"] if all(r.get(k) == v for k, v in key.items())), None)

    def drop(self, **key: Any) -> None:
        """Forgets what is about to be measured again, all of it: a ratio is of one run."""
        self.data["records"] = [r for r in self.data["records"] if not all(r.get(k) == v for k, v in key.items())]

    def add(self, **record: Any) -> dict[str, Any]:
        self.data["records"].append(record)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(_rounded(self.data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
        return record


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value


class Progress:
    """A line of text for each thing that begins or ends, with the time since the start."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def __call__(self, text: str) -> None:
        print(f"[{int(self.elapsed) // 60:3d}:{int(self.elapsed) % 60:02d}] {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        sys.exit("usage: python -m bench.measure '<case as JSON>' VARIANT")
    print(json.dumps(memory_here(arguments[1], Case(**json.loads(arguments[0])), "cpu")))


if __name__ == "__main__":
    main(sys.argv[1:])
