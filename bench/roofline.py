"""What the single pass should take on paper: bytes and operations of its stages against a device's ceilings.

    python -m bench.roofline        predictions for devices that are not here

Every stage takes the longer of its operations at the device's rate and its bytes at the device's bandwidth; stages do
not overlap. The limit is the same for the bare products alone. Tiles are cut by the plan's own code. docs/roofline.md
tells the model in words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from epsdpo_kernels import plan

from .cases import Case, head_shape
from .variants import LIMIT_BYTES

# Passes over a tile's elements: (exponentials, other operations), counted in torch_engine.py.
SWEEP, GRADIENT = (3, 13), (1, 3)


@dataclass(frozen=True)
class Device:
    """Ceilings that can be reached, not those of a data sheet."""

    name: str
    flops: float  # operations a second of a matrix product in the inputs' dtype
    bandwidth: float  # bytes a second between memory and the processor
    exponentials: float  # a second
    others: float  # other elementwise operations a second, on what is in cache or registers
    first_touch: float = float("inf")  # bytes a second of memory that the system has to hand out and clear first
    gradient_bytes: int = 4  # of an element of the gradient tile: 2 where a 16-bit product gives fp32


def _published(name: str, tflops: float, terabytes: float, exponentials: float, vector_tflops: float) -> Device:
    """A data sheet's figures for dense bf16, three quarters of which library products reach, and nine tenths of its
    bandwidth. (QuACK reports 745 of 989 TFLOP/s on an H200.)"""
    return Device(
        name, 0.75e12 * tflops, 0.9e12 * terabytes, 0.5 * exponentials, 0.5e12 * vector_tflops / 2, gradient_bytes=2
    )


# Exponentials: 16 a clock and multiprocessor (an MI300X: a quarter of its vector lanes).
GPUS = (
    _published("H100", 989, 3.35, 132 * 16 * 1.75e9, 67),
    _published("H200", 989, 4.8, 132 * 16 * 1.75e9, 67),
    _published("B200", 2250, 8.0, 148 * 16 * 1.85e9, 75),
    _published("MI300X", 1307, 5.3, 304 * 16 * 2.1e9, 163),
)


def product(device: Device, flops: float, traffic: float) -> float:
    return max(flops / device.flops, traffic / device.bandwidth)


def limit(case: Case, device: Device) -> float:
    """Seconds of the bare products, as ``variants.Products`` runs them."""
    vocabulary, width, _ = head_shape(case.head)
    size = getattr(torch, case.dtype).itemsize
    rows = min(case.scored, max(1, LIMIT_BYTES // (4 * vocabulary)))
    total, done = 0.0, 0
    while done < case.scored:
        n = min(rows, case.scored - done)
        total += sum(_products(case.mode, device, n, vocabulary, width, size, done > 0).values())
        done += n
    return total


def _products(
    mode: str, device: Device, n: int, vocabulary: int, width: int, size: int, again: bool
) -> dict[str, float]:
    """Of a tile of n rows. dW is read where it has something in it already, and written, in fp32."""
    flops, head = 2.0 * n * vocabulary * width, vocabulary * width
    inputs = size * (head + n * width)
    found = {
        "policy product": product(device, flops, inputs + 4 * n * vocabulary),
        "reference product": product(device, flops, inputs + 4 * n * vocabulary),
    }
    tile = device.gradient_bytes * n * vocabulary
    if mode != "score":
        found["dX"] = product(device, flops, tile + size * head + 4 * n * width)
    if mode == "train":
        found["dW"] = product(device, flops, tile + size * n * width + (8 if again else 4) * head)
    return found


def stages(case: Case, device: Device, max_tile_bytes: int | None = None) -> dict[str, float]:
    """Seconds of every stage of a call, over all its tiles."""
    vocabulary, width, softcap = head_shape(case.head)
    size = getattr(torch, case.dtype).itemsize
    rows = plan.rows_per_tile(vocabulary, width, 4, max_tile_bytes)
    lengths = [case.scored // (2 * case.pairs)] * (2 * case.pairs)
    labels = torch.zeros(sum(lengths), dtype=torch.int64)
    bounds = torch.arange(2 * case.pairs + 1) * lengths[0]
    layout = plan.lay_out(labels, bounds, lengths, rows)
    head = vocabulary * width
    total: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        total[name] = total.get(name, 0.0) + seconds

    def elementwise(n: int, passes: tuple[int, int], traffic: float) -> float:
        cells = n * vocabulary
        # softcap: a tanh more for each model's logits, and a few operations around it
        exponentials, others = passes[0] + (softcap is not None), passes[1] + 3 * (softcap is not None)
        work = cells * exponentials / device.exponentials + cells * others / device.others
        return max(work, traffic * cells / device.bandwidth)

    train, again = case.mode == "train", False
    for series in layout.series:
        whole = len(series.tiles) == 1
        own = train and not whole and again  # a further long pair fills a dW of its own first
        for k, tile in enumerate(series.tiles):
            n = tile.stop - tile.start
            fills = again if whole else k > 0
            for name, seconds in _products(case.mode, device, n, vocabulary, width, size, fills).items():
                add(name, seconds)
            add("sweep", elementwise(n, SWEEP, 8))
            if case.mode != "score":
                add("gradient", elementwise(n, GRADIENT, 4 + device.gradient_bytes))
        if train and not whole:
            add("scale", (12 if own else 8) * head / device.bandwidth)
            if own:
                add("first touch", 4 * head / device.first_touch)
        again = True
    if train:  # backward: what it receives is multiplied in, and the result cast
        add("scale", (4 + size) * head / device.bandwidth)
    touched = 8 * layout.rows * vocabulary + (4 * head if train else 0)
    add("first touch", touched / device.first_touch)
    return total


def predicted_ratio(case: Case, device: Device, max_tile_bytes: int | None = None) -> float:
    """Time of a call over that of its bare products."""
    return sum(stages(case, device, max_tile_bytes).values()) / limit(case, device)


def balanced_rows(device: Device) -> float:
    """Tile rows at which reading and writing dW takes as long as its product: 2·R·V·H operations, 8·V·H bytes."""
    return 4 * device.flops / device.bandwidth


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
    tiles: float  # bytes of the two tiles
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
    rows = min(n, plan.rows_per_tile(int(words), model.hidden, 4, None))
    return Sharded(
        share=head / (head + backbone),
        logits=4 * n * words,
        tiles=8 * rows * words,
        gradient=4 * words * model.hidden,
        statistics=(4 * 10 * n if tensor > 1 else 0) + (8 * 12 if sequence > 1 else 0),
        hidden_gradient=2 * n * model.hidden if tensor > 1 else 0,
    )


def main() -> None:
    for gpu in GPUS:
        print(f"{gpu.name}: dW's traffic and product balance at {balanced_rows(gpu):.0f} rows a tile")
        for head in ("llama3", "qwen3", "gemma2", "mistral", "smollm2"):
            case = Case(head, 4096, dtype="bfloat16")
            parts = stages(case, gpu)
            whole = sum(parts.values())
            said = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())
            print(f"  {head:8s} {predicted_ratio(case, gpu):.3f} of the limit, {whole * 1e3:.1f} ms: {said}")
        for rows in (512, 1024, 2048, 4096, 8192):
            budget = 8 * rows * head_shape("llama3")[0]
            ratio = predicted_ratio(replace(case, head="llama3"), gpu, budget)
            print(f"    llama3 with tiles of {rows} rows ({budget / 2**30:.1f} GiB): {ratio:.3f}")


if __name__ == "__main__":
    main()
