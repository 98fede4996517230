"""Preference pairs: from files and hub data sets to token ids, and from token ids to batches.

`load_pairs` reads rows, drops what can't be a pair (and says how many, which and why), tokenises and truncates.
`Collator` lays a list of pairs out as the losses take them: chosen first, then rejected, labels already shifted.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from jinja2 import TemplateError

from epsdpo_kernels.record.sources import BROKEN, SURROGATE, NoPair, Pair, form_of, pair_of, read_rows, turns

COLUMNS = ("pair_id", "row", "prompt_ids", "chosen_ids", "rejected_ids")
# A Unicode noncharacter, which no text should hold. One that does is guarded like a control token.
MARK = "\ufdd0"


@dataclass
class Report:
    """What became of a source's rows: `read` is `kept` plus the sum of `dropped`. Lengths are in tokens.

    `where` holds the first 20 places of each reason: line numbers from 1 for broken lines, rows from 0 for the others.
    Truncations are counted in kept pairs, a pair's two completions apart. `control_text` counts kept pairs whose own
    text spells a control token (an end of turn, say): it stays ordinary text.
    """

    source: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[int]] = field(default_factory=dict)
    prompts_truncated: int = 0
    completions_truncated: int = 0
    control_text: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= 20:
            self.where.setdefault(reason, []).append(row + (reason == BROKEN))

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"dropped": dict(self.dropped)}

    def __str__(self) -> str:
        lines = [f"{self.source}: kept {self.kept} of {self.read} rows"]
        for reason, count in self.dropped.most_common():
            places = ", ".join(map(str, self.where[reason])) + (", …" if count > 20 else "")
            lines.append(f"  dropped   {count:7d}  {reason} ({'line' if reason == BROKEN else 'row'} {places})")
        lines.append(f"  truncated {self.prompts_truncated:7d}  prompts")
        lines.append(f"  truncated {self.completions_truncated:7d}  completions")
        if self.control_text:
            lines.append(f"  kept      {self.control_text:7d}  with text that spells a control token, as text")
        if self.lengths:
            lines.append("  tokens        p50    p95    max")
        lines += [f"  {name:10s}" + "".join(f"{n:7d}" for n in found.values()) for name, found in self.lengths.items()]
        return "\n".join(lines)


def load_pairs(
    source: str | os.PathLike,
    tokenizer,
    *,
    split: str = "train",
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    keep_columns: Sequence[str] | None = None,
) -> tuple[datasets.Dataset, Report]:
    """Reads preference pairs and tokenises them.

    source: a local file (.jsonl, .json, either with .gz, .parquet) or a data set's name on the hub. Rows have `chosen`
        and `rejected` in one of four forms. The first row that fits one decides; a row of another form is malformed.
        - strings, with a string `prompt`: used as they are;
        - messages, lists of {"role", "content"}: `prompt`, `chosen` and `rejected` are each messages or a string, or
          the last two are whole conversations (they have a user turn; `prompt` is not read) that differ in the final
          assistant turn. The tokenizer's chat template is applied;
        - transcripts, "\\n\\nHuman: …\\n\\nAssistant: …", whose prompt ends with the last "\\n\\nAssistant:". The turns
          go through the chat template where the tokenizer has one, else the text is used as it is;
        - strings that begin alike, without `prompt`: it is their longest common prefix, cut to end before its last
          whitespace. What the completions still share cancels in the margin.
    split: of a hub data set; a file has none.
    max_length: tokens of a prompt and a completion, from 2. A longer completion loses its end, EOS included.
    max_prompt_length: in tokens, 1 to max_length − 1, half of max_length by default. A longer prompt loses its start.
    keep_columns: columns to carry through; None takes all that fit. A column fits where it holds only strings of up to
        64 characters, only integers, or only booleans, nulls aside.

    Returns the data set and the report. Rows have `pair_id` (16 hex digits, a hash of the texts), `row` (place in the
    source from 0; line number − 1), `prompt_ids`, `chosen_ids`, `rejected_ids` and the columns carried through. Prompt
    and completions are tokenised apart, so a completion follows the very ids that generation would follow. It ends with
    the template's end of turn, else with EOS. A control token that the data's text spells stays text.

    Raises FileNotFoundError for a missing file. Raises ValueError for an argument out of range, a file that can't be
    read, columns of no form, a tokenizer without EOS (or, for messages, a chat template), and where no pair is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, takes an integer from 2")
    if max_prompt_length is None:
        max_prompt_length = max_length // 2
    if not 1 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length: got {max_prompt_length}, takes 1 to max_length − 1 = {max_length - 1}")
    report = Report(os.fspath(source))
    records = list(read_rows(report.source, split))
    form = form_of((record for _, record in records), report.source)
    encoder = _Encoder(tokenizer, form)

    rendered = []
    for row, record in records:
        report.read += 1
        try:
            pair = pair_of(record, form)
            rendered.append((row, record, pair.id(), encoder.render(pair)))
        except NoPair as drop:
            report.drop(str(drop), row)

    kept: list[tuple] = []
    kept_records: list[Any] = []
    for start in range(0, len(rendered), 512):
        batch = rendered[start : start + 512]
        ids = iter(encoder.encode([text for *_, texts in batch for text in texts]))
        for row, record, pair_id, texts in batch:
            whole_prompt, *whole = next(ids), next(ids), next(ids)
            prompt = whole_prompt[-max_prompt_length:]
            chosen, rejected = completions = [completion[: max_length - len(prompt)] for completion in whole]
            if not prompt or chosen == rejected:
                report.drop("identical after truncation" if prompt else "empty prompt", row)
                continue
            report.prompts_truncated += len(prompt) < len(whole_prompt)
            report.completions_truncated += sum(len(completions[i]) < len(whole[i]) for i in range(2))
            report.control_text += any(MARK in text for text in texts)
            # An array takes 4 bytes a token, a list of Python's integers ten times that.
            kept.append((pair_id, row, *(np.array(part, np.int32) for part in (prompt, chosen, rejected))))
            kept_records.append(record)

    report.kept = len(kept)
    if not kept:
        raise ValueError(f"no pair is left\n{report}")
    columns = dict(zip(COLUMNS, map(list, zip(*kept, strict=True)), strict=True))
    for name in COLUMNS[2:]:
        found = np.percentile([len(ids) for ids in columns[name]], (50, 95, 100), method="higher").tolist()
        report.lengths[name.removesuffix("_ids")] = dict(zip(("p50", "p95", "max"), found, strict=True))
    return datasets.Dataset.from_dict(columns | _labels(kept_records, keep_columns)), report


# The row of a blank, which fills a batch up where there are no pairs left for a rank.
BLANK = -1


@dataclass
class Collator:
    """Lays rows of `load_pairs` out as a batch of 2B sequences: the B chosen ones first, then the B rejected.

    Gives `input_ids`, `attention_mask` and `labels`, all (2B, T) int64 and padded on the right, and `row` (B,) int64.
    labels[t] is input_ids[t + 1] where that is a completion's token and −100 elsewhere: what the hidden state at t has
    to predict, with no shift left to do. Blanks are left out; a batch of nothing else is one pair of a token each, and
    nothing to score. Raises ValueError for an empty prompt: a completion's first token would have
    no hidden state to predict it.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [row for row in rows if row["row"] != BLANK]
        if not rows:
            token = torch.full((2, 1), self.pad_token_id)
            mask, labels = torch.ones_like(token), torch.full_like(token, -100)
            return {"input_ids": token, "attention_mask": mask, "labels": labels, "row": torch.tensor([BLANK])}
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        if not all(len(prompt) for prompt, _ in pairs):
            raise ValueError("rows: got one with empty prompt_ids, takes at least one token")
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        shape = len(pairs), -(-longest // multiple) * multiple
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, -100)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, (prompt, completion) in enumerate(pairs):
            start, end = len(prompt), len(prompt) + len(completion)
            input_ids[i, :start] = torch.as_tensor(prompt)
            input_ids[i, start:end] = labels[i, start - 1 : end - 1] = torch.as_tensor(completion)
            attention_mask[i, :end] = 1
        row = torch.tensor([row["row"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "row": row}


class _Encoder:
    """Text to ids. A control token that a template writes is a token; one that the data's text spells stays text.

    Before anything is rendered, such text becomes a numbered mark, and at tokenisation the ids of the text as text. The
    tokenizer sees other pieces than it otherwise would only where a mark is.
    """

    def __init__(self, tokenizer, form: str):
        if tokenizer.eos_token is None:
            raise ValueError("tokenizer: got one without an EOS token, takes one that completions can end with")
        if form == "messages" and not tokenizer.chat_template:
            raise ValueError("tokenizer: got one without a chat template, takes one to write messages with")
        self.tokenizer = tokenizer
        self.template = bool(tokenizer.chat_template) and form in ("messages", "transcripts")
        self.control = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.guarded = sorted({MARK, *self.control}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.guarded)))
        # Raw text begins as the tokenizer begins a text; a template writes its own beginning.
        self.bos = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""

    def render(self, pair: Pair) -> list[str]:
        """Prompt, chosen and rejected as the texts to tokenise."""
        prompt, *sides = pair
        if isinstance(prompt, str) and not self.template:
            return [self.bos + self._guard(prompt), *(self._guard(side) + self.tokenizer.eos_token for side in sides)]
        if isinstance(prompt, str):
            prompt, sides = turns(prompt), [side.strip() for side in sides]
        rendered = [self._apply(prompt, add_generation_prompt=True)]
        for side in sides:
            whole = self._apply([*prompt, {"role": "assistant", "content": side}])
            if not whole.startswith(rendered[0]):
                raise NoPair("refused by the chat template")
            answer = whole[len(rendered[0]) :]
            # A newline after the end of turn is never generated.
            closed = answer.rstrip().endswith(self.control)
            rendered.append(answer.rstrip() if closed else answer + self.tokenizer.eos_token)
        return rendered

    def encode(self, rendered: list[str]) -> list[list[int]]:
        batch = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [self._pieces(text) if MARK in text else ids for text, ids in zip(rendered, batch, strict=True)]

    def _apply(self, turns: list[dict[str, str]], **options) -> str:
        turns = [turn | {"content": self._guard(turn["content"])} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except TemplateError:
            raise NoPair("refused by the chat template") from None

    def _guard(self, text: str) -> str:
        return self.pattern.sub(lambda match: f"{MARK}{self.guarded.index(match[0])}{MARK}", text)

    def _pieces(self, text: str) -> list[int]:
        ids = []
        for i, piece in enumerate(text.split(MARK)):
            text = self.guarded[int(piece)] if i % 2 else piece
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=i % 2 == 1)["input_ids"]
        return ids


def _labels(records: list[dict[str, Any]], keep: Sequence[str] | None) -> dict[str, list]:
    """The columns to carry through."""
    names = dict.fromkeys(name for record in records for name in record if not SURROGATE.search(name))
    columns = {}
    for name in names if keep is None else keep:
        values = [record.get(name) for record in records]
        given = [value for value in values if value is not None]
        own = name in (*COLUMNS, "prompt", "chosen", "rejected")
        if not own and len(set(map(type, given))) == 1 and all(map(_is_label, given)):
            columns[name] = values
        elif keep is not None:
            raise ValueError(f"keep_columns: got {name!r}, takes columns of short strings, integers or booleans")
    return columns


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 64 and not SURROGATE.search(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63
