"""A micro-batch of pairs as one packed row: a pair's prompt once, its two completions after it, and no padding.

    tokens      P …            C …                 R …
    positions   0 … p−1        p … p+c−1           p … p+r−1
    attends     P (causal)     P, C (causal)       P, R (causal), never C

P is what a pair's two rows share of their prompts, C and R are the rest of the chosen and of the rejected row. The
hidden state of a prompt's last token predicts the first token of both completions, so it is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORE = -100
Row = TypeVar("Row", "Segments", "Packing")


@dataclass(frozen=True)
class Segments:
    """Who attends to whom in a packed row, as variable-length attention takes it.

    Queries are the row itself, cut into [P C] and [R] of every pair; keys are [P C] and [P R], so a prompt's keys are
    there twice. Both are causal to the lower right: a segment's last query sees all its keys. Keys are consecutive in
    their positions, so a sliding window may count either.
    """

    lengths: tuple[tuple[int, int, int], ...]  # (p, c, r) of each pair
    cu_queries: Tensor  # (S+1,) int32, bounds of the queries in the row
    cu_keys: Tensor  # (S+1,) int32, bounds of the keys in row[keys]
    keys: Tensor  # (K,) int64, places in the row
    max_queries: int  # the longest segment's
    max_keys: int
    group: ProcessGroup | None = None  # of ranks that share the row's tokens; see sequence.py

    @property
    def tokens(self) -> int:
        """N, of the whole row."""
        return sum(map(sum, self.lengths))


@dataclass(frozen=True)
class Packing:
    """B pairs as one row of N tokens, M of whose hidden states are scored."""

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64, the rejected completion's start again where the prompt ends
    segments: Segments
    scored: Tensor  # (M,) int64, places in the row: all chosen completions', then all rejected ones'
    labels: Tensor  # (M,) int64, what the scored states have to predict
    cu_seqlens: Tensor  # (2B+1,) int64, bounds of the completions in scored and labels

    def rows(self) -> list[Tensor]:
        """The 2B token sequences, chosen ones first."""
        chosen, rejected, start = [], [], 0
        for p, c, r in self.segments.lengths:
            prompt, rest = self.input_ids[0, start : start + p + c + r].split((p, c + r))
            chosen.append(torch.cat((prompt, rest[:c])))
            rejected.append(torch.cat((prompt, rest[c:])))
            start += p + c + r
        return chosen + rejected


def to(row: Row, device: torch.device) -> Row:
    """With every tensor on a device."""
    moved: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Segments):
            moved[field.name] = to(value, device)
    return replace(row, **moved)


def pack(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Packing:
    """Lays padded rows out as one packed row, on the CPU.

    A pair shares the tokens that both rows begin with, as far as both are prompt: up to the first scored hidden state.
    Rows whose prompts differ share what they share. What the mask leaves out, on either side, is dropped.

    Args:
        input_ids: (2B, T) int64, the chosen rows first, then the rejected.
        attention_mask: (2B, T), 0 on padding.
        labels: (2B, T) int64, already shifted: what the hidden state at t has to predict; −100 is not scored.

    Raises:
        ValueError: the shapes differ or the number of rows is odd; or padding is scored.
    """
    if input_ids.shape != attention_mask.shape or input_ids.shape != labels.shape or len(input_ids) % 2:
        raise ValueError(
            f"input_ids, attention_mask, labels: got shapes {tuple(input_ids.shape)}, {tuple(attention_mask.shape)}, "
            f"{tuple(labels.shape)}, takes one shape (2B, T)"
        )
    input_ids, attention_mask, labels = input_ids.cpu(), attention_mask.cpu().bool(), labels.cpu()
    if (labels[~attention_mask] != IGNORE).any():
        raise ValueError("labels: got a scored token where attention_mask is 0, takes -100 there")
    ids = [row[kept] for row, kept in zip(input_ids, attention_mask, strict=True)]
    targets = [row[kept] for row, kept in zip(labels, attention_mask, strict=True)]
    pairs, start = len(ids) // 2, 0
    tokens, positions, lengths, keys = [], [], [], []
    scored: list[Tensor] = [torch.empty(0)] * (2 * pairs)
    for i in range(pairs):
        both = i, pairs + i
        p = _shared(*(ids[j] for j in both), *(targets[j] for j in both))
        c, r = (len(ids[j]) - p for j in both)
        lengths.append((p, c, r))
        tokens += [ids[i], ids[pairs + i][p:]]
        positions += [torch.arange(p + c), torch.arange(p, p + r)]
        place = start + torch.arange(p + c + r)
        keys += [place[: p + c], place[:p], place[p + c :]] if r else [place]
        rejected = torch.cat((place[:p], place[p + c :]))
        for j, own in zip(both, (place[: p + c], rejected), strict=True):
            scored[j] = own[targets[j] != IGNORE]
        start += p + c + r
    queries = [n for p, c, r in lengths for n in (p + c, r) if n]
    attended = [n for p, c, r in lengths for n in (p + c, (p + r) * (r > 0)) if n]
    segments = Segments(
        tuple(lengths), _bounds(queries, torch.int32), _bounds(attended, torch.int32), torch.cat(keys),
        max(queries), max(attended),
    )  # fmt: skip
    return Packing(
        torch.cat(tokens)[None], torch.cat(positions)[None], segments, torch.cat(scored),
        torch.cat([row[row != IGNORE] for row in targets]), _bounds([len(own) for own in scored], torch.int64),
    )  # fmt: skip


def no_mask(input_ids: Tensor) -> Tensor:
    """What stands for the attention mask of a packed row: transformers makes none where it is given four dimensions."""
    return input_ids.new_ones(1, 1, 1, 1)


def part(batch: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Pairs ``first`` to ``last`` of a batch whose tensors have a row a pair, or two."""
    pairs = len(batch["input_ids"]) // 2
    return {
        name: torch.cat((t[first:last], t[pairs + first : pairs + last])) if len(t) == 2 * pairs else t[first:last]
        for name, t in batch.items()
    }


class PaddedRight:
    """Any collator of pairs, whose rows then have their padding on the right, in the order of their tokens.

    Positions count from a row's first place, and PEFT's virtual tokens come before it: padding there would be read.

    Raises:
        ValueError: a batch without rows, mask and what is to be scored, of one shape; or padding is scored.
    """

    NAMES = ("input_ids", "attention_mask", "completion_mask")

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        shapes = {name: tuple(batch[name].shape) for name in self.NAMES if name in batch}
        shape = shapes.get("input_ids", ())
        if len(shape) != 2 or [shapes.get(name) for name in self.NAMES] != [shape] * 3:
            raise ValueError(
                f"data_collator: got {shapes} in a batch, takes {', '.join(self.NAMES)} of one shape (2B, T)"
            )
        mask = batch["attention_mask"].bool()
        if batch["completion_mask"][~mask].any():
            raise ValueError("data_collator: got a completion_mask of 1 where attention_mask is 0, takes 0 there")
        order = (~mask).int().argsort(dim=1, stable=True)
        return {
            name: t.gather(1, order) if isinstance(t, Tensor) and t.shape == shape else t for name, t in batch.items()
        }


def of_pairs(rows: Tensor, pairs: Tensor) -> Tensor:
    """The rows of some pairs, of rows (2B, …) chosen first; pairs (n,) int64."""
    return torch.cat([half[pairs] for half in rows.chunk(2)])


def _shared(chosen: Tensor, rejected: Tensor, chosen_targets: Tensor, rejected_targets: Tensor) -> int:
    """Tokens that two rows begin with alike, before the first token that is scored in either."""
    prompts = []
    for targets in (chosen_targets, rejected_targets):
        scored = (targets != IGNORE).nonzero()
        prompts.append(int(scored[0]) + 1 if len(scored) else len(targets))
    n = min(prompts)
    different = (chosen[:n] != rejected[:n]).nonzero()
    return int(different[0]) if len(different) else n


def _bounds(lengths: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)
