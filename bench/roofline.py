"""What the single pass should take on paper: bytes, operations and instructions of its stages against a device's
ceilings.

    python -m bench.roofline        predictions for devices that are not here

Every stage takes the longer of its operations at the device's rate and its bytes at the device's bandwidth; of a
product's result only a share is written beside the next block's operations. Tiles are cut by the plan's own code, and
what a GPU's kernels do is counted in the machine code that they compile to. docs/roofline.md tells the model in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from epsdpo_kernels import plan

from .cases import Case, head_shape
from .variants import LIMIT_BYTES

# Passes over a tile's elements of torch_engine.py: (exponentials, other operations).
SWEEP, GRADIENT = (2, 22), (1, 3)


class Kernel(NamedTuple):
    """What a Triton kernel does with 32 pairs of logits (the gradient: with 32 logits)."""

    instructions: float  # of a warp
    exponentials: int  # of them, and roots, which a unit of its own takes


@dataclass(frozen=True)
class Device:
    """Ceilings that can be reached, not those of a data sheet."""

    name: str
    flops: float  # operations a second of a matrix product in the inputs' dtype
    bandwidth: float  # bytes a second between memory and the processor
    first_touch: float = float("inf")  # bytes a second of memory that the system has to hand out and clear first
    gradient_bytes: int = 4  # of an element of the gradient tile: 2 where a 16-bit product gives fp32
    hidden_stores: float = 1.0  # share of the shorter of a product's operations and its stores that hides in the longer

    def elementwise(self, kernel: str, softcap: float | None) -> float:
        """Seconds of a stage's work on one pair of logits, memory aside."""
        raise NotImplementedError


@dataclass(frozen=True)
class CPU(Device):
    exponentials: float = 1.0  # exp2 a second
    tanhs: float = 1.0
    others: float = 1.0  # other elementwise operations a second, on what is in cache

    def elementwise(self, kernel: str, softcap: float | None) -> float:
        exponentials, others = SWEEP if kernel == "sweep" else GRADIENT
        time = exponentials / self.exponentials + others / self.others
        if softcap is None:
            return time
        models = 2 if kernel == "sweep" else 1  # a division, tanh and product each; the gradient's slope takes 5 more
        return time + models / self.tanhs + (2 * models + 5 * (kernel == "gradient")) / self.others


@dataclass(frozen=True)
class GPU(Device):
    arch: str = ""  # of triton_blocks
    issued: float = 1.0  # instructions of warps a second
    exponentials: float = 1.0  # of threads, a second
    fused_flops: float = 1.0  # of the products in the logit-free kernel
    fused_issue: float = 1.0  # its share of ``issued``

    def elementwise(self, kernel: str, softcap: float | None) -> float:
        of = compiled(self.arch, kernel, softcap)
        return max(of.instructions / 32 / self.issued, of.exponentials / self.exponentials)

    def project(self, hidden: float, softcap: float | None) -> float:
        """Seconds of the logit-free kernel for one pair of logits: its programs multiply, then sweep."""
        of = compiled(self.arch, "project", softcap)
        return 4 * hidden / self.fused_flops + self.fused_sweep(of.instructions, of.exponentials)

    def fused_sweep(self, instructions: float, exponentials: float) -> float:
        """Seconds of what that kernel does beside its products."""
        return max(instructions / 32 / (self.fused_issue * self.issued), exponentials / self.exponentials)


def _published(name: str, arch: str, tflops: float, terabytes: float, multiprocessors: int, gigahertz: float) -> GPU:
    """From a data sheet: three quarters of its dense bf16 rate, which library products reach (QuACK reports 745 of 989
    TFLOP/s on an H200), nine tenths of its bandwidth, seven tenths of the issue slots, four a clock and multiprocessor.
    The logit-free kernel, one program a multiprocessor, was measured on an H100 to multiply at 31 % and to take 44 % of
    the issue slots. Half of a product's stores hide behind the next block's operations."""
    clock = multiprocessors * gigahertz * 1e9
    return GPU(
        name, 0.75e12 * tflops, 0.9e12 * terabytes, gradient_bytes=2, hidden_stores=0.5, arch=arch,
        issued=0.7 * 4 * clock, exponentials=0.7 * 16 * clock, fused_flops=0.31e12 * tflops, fused_issue=0.44 / 0.7,
    )  # fmt: skip


GPUS = (
    _published("H100", "sm_90", 989, 3.35, 132, 1.75),
    _published("H200", "sm_90", 989, 4.8, 132, 1.75),
    _published("B200", "sm_100", 2250, 8.0, 148, 1.85),
)
# One card for each architecture of the gate.
CARDS = {
    "sm_80": _published("A100", "sm_80", 312, 2.04, 108, 1.41),
    "sm_90": GPUS[0],
    "sm_100": GPUS[2],
    "sm_120": _published("RTX 5090", "sm_120", 210, 1.79, 170, 2.41),
}


@cache
def compiled(arch: str, kernel: str, softcap: float | None) -> Kernel:
    """Of the committed counts those in bf16, the most of any Triton's."""
    from .results import kernels

    variant = "plain" if softcap is None else "softcap"
    counts = [k["instructions"] for k in kernels(arch=arch, kernel=kernel, variant=variant, dtype="bf16")]
    return Kernel(max(counts), exponentials(kernel, softcap))


def exponentials(kernel: str, softcap: float | None) -> int:
    models = 1 if kernel == "gradient" else 2
    return models * (1 if softcap is None else 3)


def kernel_seconds(kernel: str, arch: str, head: str, instructions: float, rows: int = 8192) -> float:
    """Of one kernel on the architecture's card, over so many rows of a 16-bit head."""
    card, (vocabulary, hidden, softcap) = CARDS[arch], head_shape(head)
    special = exponentials(kernel, softcap)
    work = max(instructions / 32 / card.issued, special / card.exponentials)
    if kernel.startswith("project"):
        work = card.fused_sweep(instructions, special)
        cell = 4 * hidden / card.fused_flops + max(work, 4 * (kernel == "project_store") / card.bandwidth)
    else:
        cell = max(work, (8 if kernel == "sweep" else 6) / card.bandwidth)
    return rows * vocabulary * cell


def product(device: Device, flops: float, loaded: float, stored: float) -> float:
    """Seconds of a matrix product; ``stored`` are the bytes of its result, read as well where it adds to one."""
    work, memory = flops / device.flops, (loaded + stored) / device.bandwidth
    exposed = (1 - device.hidden_stores) * min(work, stored / device.bandwidth)
    return max(work, memory) + exposed


def limit(case: Case, device: Device) -> float:
    """Seconds of the bare products, as ``variants.Products`` runs them."""
    vocabulary, width, _ = head_shape(case.head)
    rows = min(case.scored, max(1, LIMIT_BYTES // (4 * vocabulary)))
    total, done = 0.0, 0
    while done < case.scored:
        n = min(rows, case.scored - done)
        total += 2 * projection(case, device, n) + sum(gradients(case, device, n, done > 0).values())
        done += n
    return total


def itemsize(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize


def projection(case: Case, device: Device, n: int) -> float:
    """One model's logits of n rows."""
    vocabulary, width, _ = head_shape(case.head)
    loaded = itemsize(case) * (vocabulary * width + n * width)
    return product(device, 2.0 * n * vocabulary * width, loaded, 4 * n * vocabulary)


def gradients(case: Case, device: Device, n: int, again: bool) -> dict[str, float]:
    """dX and dW of n rows. dW is read where it has something in it already, and written, in fp32."""
    vocabulary, width, _ = head_shape(case.head)
    flops, head, size = 2.0 * n * vocabulary * width, vocabulary * width, itemsize(case)
    tile, found = device.gradient_bytes * n * vocabulary, {}
    if case.mode != "score":
        found["dX"] = product(device, flops, tile + size * head, 4 * n * width)
    if case.mode == "train":
        found["dW"] = product(device, flops, tile + size * n * width, (8 if again else 4) * head)
    return found


def rows_of(case: Case, device: Device, max_tile_bytes: int | None = None) -> plan.Rows:
    """As the pass takes them."""
    vocabulary, width, _ = head_shape(case.head)
    beside = device.gradient_bytes if device.gradient_bytes != 4 and case.mode != "score" else 0
    budget = plan.tile_budget(vocabulary, width, isinstance(device, GPU), max_tile_bytes)
    sizes = [case.scored // case.pairs] * case.pairs
    return plan.rows_per_tile(sizes, vocabulary, budget, 4, beside, case.mode == "train")


def stages(case: Case, device: Device, max_tile_bytes: int | None = None) -> dict[str, float]:
    """Seconds of every stage of a call, over all its tiles."""
    vocabulary, width, softcap = head_shape(case.head)
    rows = rows_of(case, device, max_tile_bytes)
    if logit_free(case, device, rows):
        return {"head and sweep in one": case.scored * vocabulary * device.project(width, softcap)}  # type: ignore[attr-defined]
    lengths = [case.scored // (2 * case.pairs)] * (2 * case.pairs)
    labels = torch.zeros(sum(lengths), dtype=torch.int64)
    layout = plan.lay_out(labels, lengths, rows)
    head = vocabulary * width
    total: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        total[name] = total.get(name, 0.0) + seconds

    def elementwise(n: int, kernel: str, traffic: float) -> float:
        return n * vocabulary * max(device.elementwise(kernel, softcap), traffic / device.bandwidth)

    train, again = case.mode == "train", False
    for series in layout.series:
        own = train and series.long and again  # a further long pair fills a dW of its own first
        for k, group in enumerate(series.groups):
            for tile in group:
                n = len(tile)
                add("policy product", projection(case, device, n))
                add("reference product", projection(case, device, n))
                add("sweep", elementwise(n, "sweep", 8))
                if case.mode != "score":
                    add("gradient", elementwise(n, "gradient", 4 + device.gradient_bytes))
            fills = k > 0 or (again and not series.long)
            for name, seconds in gradients(case, device, sum(map(len, group)), fills).items():
                add(name, seconds)
        if train and series.long and layout.n_pairs > 1:
            add("scale", (12 if own else 8) * head / device.bandwidth)
            if own:
                add("first touch", 4 * head / device.first_touch)
        again = True
    if train:  # backward: what it receives is multiplied in, and the result cast
        add("scale", (4 + itemsize(case)) * head / device.bandwidth)
    touched = 8 * layout.rows * vocabulary + (4 * head if train else 0)
    add("first touch", touched / device.first_touch)
    return total


def logit_free(case: Case, device: Device, rows: plan.Rows) -> bool:
    """Whether a call goes through the logit-free kernel there, by the package's table."""
    if not isinstance(device, GPU) or case.mode != "score":
        return False
    from epsdpo_kernels.engines import triton_blocks

    return triton_blocks.logit_free(itemsize(case), rows.tile)


def predicted_ratio(case: Case, device: Device, max_tile_bytes: int | None = None) -> float:
    """Time of a call over that of its bare products."""
    return sum(stages(case, device, max_tile_bytes).values()) / limit(case, device)


def balanced_rows(device: Device) -> float:
    """Rows of a product at which reading and writing dW takes as long as its operations: 2·R·V·H, and 8·V·H bytes."""
    return 4 * device.flops / device.bandwidth


def few_rows(device: GPU) -> float:
    """Rows of a tile below which a library reads a 16-bit head longer than the logit-free kernel multiplies by it."""
    return device.fused_flops / device.bandwidth


@dataclass(frozen=True)
class Model:
    """A model large enough to be sharded."""

    name: str
    parameters: float
    vocabulary: int
    hidden: int


LARGE = (
    Model("Llama-3.1-70B", 70.6e9, 128256, 8192),
    Model("Qwen2.5-72B", 72.7e9, 152064, 8192),
    Model("Llama-3.1-405B", 405.9e9, 128256, 16384),
)


@dataclass(frozen=True)
class Sharded:
    """What the head costs one rank of a step: operations as a share of the whole, bytes held and bytes sent."""

    share: float  # of the step's operations, both models
    logits: float  # bytes of ONE fp32 logits tensor, were it materialised
    tiles: float  # bytes of the tiles
    gradient: float  # bytes of dW in fp32
    statistics: float  # bytes of sums exchanged so that every rank has whole-vocabulary statistics
    hidden_gradient: float  # bytes of dX exchanged


def sharded(model: Model, tokens: int, tensor: int = 1, sequence: int = 1) -> Sharded:
    """One pair of 2 × ``tokens`` on a rank that holds V/``tensor`` of the vocabulary and 1/``sequence`` of the tokens.

    Tensor parallelism splits the vocabulary: every product by V/tensor, sums merged over ranks (ten numbers a token),
    dX summed over ranks. Sequence parallelism splits the tokens: sums of a pair's completions, a few numbers, are
    merged, and each rank has a dW of the whole (slice of the) head. Data parallelism splits pairs and changes nothing
    here; dW is then reduced with all other gradients.
    """
    n, words = 2 * tokens / sequence, model.vocabulary / tensor
    head = 8.0 * n * words * model.hidden
    backbone = (6.0 + 2.0) * (model.parameters - model.vocabulary * model.hidden) * n / tensor
    return Sharded(
        share=head / (head + backbone),
        logits=4 * n * words,
        tiles=min(10 * n * words, plan.tile_budget(int(words), model.hidden, on_gpu=True)),
        gradient=4 * words * model.hidden,
        statistics=(4 * 10 * n if tensor > 1 else 0) + (4 * 2 * 8 if sequence > 1 else 0),
        hidden_gradient=4 * n * model.hidden if tensor > 1 else 0,
    )


def main() -> None:
    for gpu in GPUS:
        print(f"{gpu.name}: dW's traffic and product balance at {balanced_rows(gpu):.0f} rows")
        print(f"  head and sweep in one score faster below {few_rows(gpu):.0f} rows a tile")
        for head in ("llama3", "qwen3", "gemma2", "gemma2-9b", "mistral", "smollm2"):
            case = Case(head, 4096, dtype="bfloat16")
            parts = stages(case, gpu)
            whole = sum(parts.values())
            said = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())
            print(f"  {head:9s} {predicted_ratio(case, gpu):.3f} of the limit, {whole * 1e3:.1f} ms: {said}")


if __name__ == "__main__":
    main()
