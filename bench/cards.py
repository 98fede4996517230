"""How long a row may be on how many cards, on paper: docs/parallel.md's tables.

    python -m bench.cards

Every card has an R-th of the row's tokens (sequence parallelism) and of weights, gradients and optimizer (FSDP2). What
a layer keeps for its backward is measured on a narrow layer of the same proportions and scaled; all else is computed,
layers' inputs and the loss by the formulae of a run's own expectation (epsdpo_kernels/integrations/memory.py). Parts
are those of one card, at the end of the forward; what allocators and communication libraries keep beside is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

NARROWER = 8  # how many times narrower the measured layer is
CARD = 80e9  # bytes, of which
USABLE = 0.9  # as a share; the rest is the allocator's and the communication's
SCORED = 0.5  # of a row's tokens
SHORT, LONG = 1 << 10, 1 << 24  # tokens between which the longest row is looked for


@dataclass(frozen=True)
class Model:
    """A Llama's shape, from its configuration."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    head_width: int = 128

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_width
        return attention + 3 * self.width * self.inner + 2 * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + 2 * self.vocabulary * self.width + self.width


MODELS = (Model("8B", 32, 4096, 14336, 32, 8), Model("70B", 80, 8192, 28672, 64, 8))
CARDS = (8, 16, 32, 64)
TOKENS = 1 << 18


class Memory(NamedTuple):
    """Bytes of one card."""

    weights: float  # its shard of policy and reference
    gradients: float
    optimizer: float
    gathered: float  # whole layers and heads that FSDP puts together for their turn
    activations: float
    loss: float


@cache
def kept_by_layer(model: Model) -> float:
    """Bytes a token that autograd keeps of one layer in bf16, measured ``NARROWER`` times narrower."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from epsdpo_kernels.integrations.memory import kept_of_forward

    def kept(layers: int) -> float:
        config = LlamaConfig(
            vocab_size=16, hidden_size=model.width // NARROWER, intermediate_size=model.inner // NARROWER,
            num_hidden_layers=layers, num_attention_heads=model.heads // NARROWER,
            num_key_value_heads=model.kv_heads // NARROWER, head_dim=model.head_width,
        )  # fmt: skip
        return kept_of_forward(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))[1]

    return NARROWER * (kept(3) - kept(2))


def memory(model: Model, cards: int, tokens: int, full: bool) -> Memory:
    """Of one card in a group of R = ``cards``, for a row of ``tokens`` (one pair: prompt, chosen, rejected).

    Full training keeps policy and reference, gradients and Adam's two states in fp32 and computes in bf16; LoRA's base
    is bf16 and the reference too, and what its adapters take is left out (rank 16: 0.5 % of the weights).
    """
    from epsdpo_kernels.integrations.memory import OPTIMIZER_STATES, kept_with_checkpointing, loss_memory

    own, head = math.ceil(tokens / cards) + 1, model.vocabulary * model.width
    trained = 4 * model.parameters / cards if full else 0
    # The layer at work and the next one, and a layer's gradient before it is scattered; embedding and both heads.
    gathered = 2 * ((3 if full else 2) * model.layer + (3 if full else 2) * head)
    # Before and after the attention, queries and its output, keys and values: what is sent and what came. Keys and
    # values are repeated where they have fewer heads than there are cards.
    kv_heads = math.lcm(model.kv_heads, cards)
    exchanged = 2 * 2 * 2 * (model.heads + kv_heads) * model.head_width
    layer = kept_by_layer(model) + 2 * 2 * (kv_heads - model.kv_heads) * model.head_width
    kept = kept_with_checkpointing(layer, model.layers, 2 * model.width) + exchanged
    return Memory(
        weights=2 * trained if full else 2 * model.parameters / cards,
        gradients=trained,
        optimizer=OPTIMIZER_STATES["adamw_torch"][0] * trained,
        gathered=gathered,
        activations=kept * own,
        loss=loss_memory(math.ceil(SCORED * own), model.vocabulary, model.width, full, on_gpu=True),
    )


def longest(model: Model, cards: int, full: bool) -> int | None:
    """Tokens of the longest row that fits, or None where not even a short one does."""
    room = USABLE * CARD
    if sum(memory(model, cards, SHORT, full)) > room:
        return None
    low, high = SHORT, LONG
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(memory(model, cards, middle, full)) <= room else (low, middle)
    return low


def longest_rows() -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of lengths."""
    header = ["longest row, tokens", *(f"{cards} cards" for cards in CARDS)]
    rows = []
    for model in MODELS:
        for full in (True, False):
            found = [longest(model, cards, full) for cards in CARDS if model.heads % cards == 0]
            cells = ["–" if n is None else f"{n // 1000:,}k" for n in found]
            cells += ["more cards than heads"] * (len(CARDS) - len(cells))
            rows.append([f"{model.name}, {'full' if full else 'LoRA'}", *cells])
    return header, rows


def parts() -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of parts."""
    header = [f"GB a card, row of {TOKENS // 1024}k", *Memory._fields, "all"]
    rows = []
    for model in MODELS:
        for full in (True, False):
            for cards in CARDS:
                if model.heads % cards:
                    continue
                found = memory(model, cards, TOKENS, full)
                kind = "full" if full else "LoRA"
                rows.append(
                    [f"{model.name}, {kind}, {cards} cards", *(f"{size / 1e9:.1f}" for size in (*found, sum(found)))]
                )
    return header, rows


def main() -> None:
    for header, rows in (longest_rows(), parts()):
        for row in (header, *rows):
            print("  ".join(f"{cell:>24s}" for cell in row))


if __name__ == "__main__":
    main()
