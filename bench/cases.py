"""What is measured: the head shapes of real models, and pairs of tokens for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (V, H, softcap) of models' heads, from their configurations. "tiny" is for tests.
HEADS: dict[str, tuple[int, int, float | None]] = {
    "smollm2": (49152, 576, None),
    "llama3": (128256, 4096, None),
    "qwen3": (151936, 4096, None),
    "gemma2": (256000, 2304, 30.0),
    "gemma2-9b": (256000, 3584, 30.0),
    "mistral": (32768, 4096, None),
    "tiny": (1031, 64, None),
    "tiny-softcap": (1031, 64, 3.0),
}

# Llama models by the fields of their configuration, for random weights.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1031, "hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 2,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip


def head_shape(head: str) -> tuple[int, int, float | None]:
    """(V, H, softcap) of a named head, or of one that is spelled out, as "16384x256"."""
    if head in HEADS:
        return HEADS[head]
    vocabulary, hidden = map(int, head.split("x"))
    return vocabulary, hidden, None


# Tokens a completion, 512 … 131072.
LENGTHS = tuple(512 << k for k in range(9))

# (products of the head's size, which need a gradient) by what is asked for.
MODES = {"train": (4, ("hidden", "weight")), "frozen": (3, ("hidden",)), "score": (2, ())}


@dataclass(frozen=True)
class Case:
    """One call to measure."""

    head: str  # see head_shape
    rows: int  # tokens per completion, prompt included
    pairs: int = 1
    masked: float = 0.0  # share of each row's tokens that are prompt
    mode: str = "train"  # a key of MODES
    dtype: str = "float32"

    @property
    def scored(self) -> int:
        """Tokens that reach the loss, chosen and rejected together."""
        return 2 * self.pairs * (self.rows - int(self.masked * self.rows))

    @property
    def total(self) -> int:
        return 2 * self.pairs * self.rows

    @property
    def product(self) -> int:
        """G: operations of one product of the head over the scored tokens."""
        vocabulary, hidden, _ = head_shape(self.head)
        return 2 * self.scored * vocabulary * hidden

    @property
    def limit(self) -> int:
        """How many of them the single pass takes."""
        return MODES[self.mode][0]

    @property
    def name(self) -> str:
        return f"{self.head}-{self.mode}-{self.pairs}x{self.rows}-masked{round(100 * self.masked)}-{self.dtype}"

    def as_dict(self) -> dict[str, Any]:
        return {"case": self.name, **asdict(self), "scored": self.scored}


class Inputs(NamedTuple):
    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T)
    ref_hidden: Tensor
    ref_weight: Tensor
    softcap: float | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self[:5])


def _normal(shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers; past a million they repeat with an odd period, because drawing a head's worth takes seconds."""
    size = 1
    for s in shape:
        size *= s
    g = torch.Generator().manual_seed(seed)
    block = (torch.randn(min(size, (1 << 20) - 3), generator=g) * std).to(dtype).to(device)
    out = torch.empty(size, dtype=dtype, device=device)
    for start in range(0, size, len(block)):
        part = out[start : start + len(block)]
        part.copy_(block[: len(part)])
    return out.view(shape)


def make_inputs(case: Case, device: str = "cpu", drift: float = 0.02, seed: int = 0) -> Inputs:
    """Seeded tensors near a reference, logits of about unit variance; gradients asked for by the case's mode."""
    vocabulary, width, softcap = head_shape(case.head)
    dtype = getattr(torch, case.dtype)
    g = torch.Generator().manual_seed(seed)
    shape = 2 * case.pairs, case.rows, width
    ref_hidden = _normal(shape, 1.0, seed + 1, dtype, device)
    hidden = ref_hidden + _normal(shape, drift, seed + 2, dtype, device)
    ref_weight = _normal((vocabulary, width), width**-0.5, seed + 3, dtype, device)
    weight = ref_weight.clone()
    noise = _normal((min(vocabulary, 1021), width), drift * width**-0.5, seed + 4, dtype, device)
    for start in range(0, vocabulary, len(noise)):
        weight[start : start + len(noise)] += noise[: vocabulary - start]
    labels = torch.randint(0, vocabulary, (2 * case.pairs, case.rows), generator=g)
    labels[:, : int(case.masked * case.rows)] = -100
    wanted = MODES[case.mode][1]
    hidden.requires_grad_("hidden" in wanted)
    weight.requires_grad_("weight" in wanted)
    return Inputs(hidden, weight, labels.to(device), ref_hidden, ref_weight, softcap)
