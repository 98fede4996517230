"""Preference pairs: from files and hub data sets to token ids, and from token ids to batches.

`load_pairs` reads rows, drops what can't be a pair (and says how many, which and why), tokenises and truncates.
`Collator` lays a list of pairs out as the losses take them: chosen first, then rejected, labels already shifted.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import tokenizers
import torch
import transformers
from datasets.fingerprint import Hasher

from epsdpo_kernels.record import rows as source_rows
from epsdpo_kernels.record import sources
from epsdpo_kernels.record.rows import LINES, Record, as_written, open_rows, parse
from epsdpo_kernels.record.sources import BROKEN, MALFORMED, PARTS, SURROGATE, NoPair, Pair, pair_of

from . import encode
from .encode import MARK, Encoded, Encoder, Rendered

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("pair_id", "row", *IDS)
TOKENISED = datasets.Features(
    {"pair_id": datasets.Value("string"), "row": datasets.Value("int64")}
    | {name: datasets.List(datasets.Value("int32")) for name in IDS}
    | {"note": datasets.Value("string")}
)
# Rows for which a process more is worth its start, and rows that are tokenised at once.
ROWS_A_PROCESS, ROWS_A_BATCH = 5000, 256
PLACES, MOST_COLUMNS = 20, 64
NOTHING = (np.zeros(0, np.int32),) * 3


@dataclass
class Report:
    """What became of a source's rows: `read` is `kept` plus the sum of `dropped`. Lengths are in tokens.

    `where` holds the first 20 places of each reason: line numbers from 1 for broken lines, rows from 0 for the others.
    Truncations are counted in kept pairs, a pair's two completions apart. `control_text` counts kept pairs whose own
    text spells a control token (an end of turn, say): it stays ordinary text. `parted` counts kept pairs whose
    completions begin before the prompt ends, because the tokenizer merges the two or the template writes the prompt
    alone in another way. `unwritten` counts kept pairs by fields that the chat template does not mention. `columns`
    are the source's: "read" as part of a pair, "carried" through, "unread" the others.
    """

    source: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[int]] = field(default_factory=dict)
    prompts_truncated: int = 0
    completions_truncated: int = 0
    control_text: int = 0
    parted: int = 0
    unwritten: Counter[str] = field(default_factory=Counter)
    columns: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= PLACES:
            self.where.setdefault(reason, []).append(row + (reason == BROKEN))

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"dropped": dict(self.dropped), "unwritten": dict(self.unwritten)}

    def __str__(self) -> str:
        lines = [f"{self.source}: kept {self.kept} of {self.read} rows"]
        for reason, count in self.dropped.most_common():
            places = ", ".join(map(str, self.where[reason])) + (", …" if count > PLACES else "")
            lines.append(f"  dropped   {count:7d}  {reason} ({'line' if reason == BROKEN else 'row'} {places})")
        lines.append(f"  truncated {self.prompts_truncated:7d}  prompts")
        lines.append(f"  truncated {self.completions_truncated:7d}  completions")
        if self.control_text:
            lines.append(f"  kept      {self.control_text:7d}  with text that spells a control token, as text")
        if self.parted:
            lines.append(
                f"  kept      {self.parted:7d}  whose completion begins before the prompt, by itself, would end"
            )
        for name, count in self.unwritten.most_common(PLACES):
            lines.append(f"  kept      {count:7d}  with {_shown(name)}, which the chat template does not write")
        for what, names in self.columns.items():
            if names:
                more = ", …" if len(names) > PLACES else ""
                lines.append(f"  {what:9s} columns  {', '.join(map(_shown, names[:PLACES]))}{more}")
        if self.lengths:
            lines.append("  tokens        p50    p95    max")
        lines += [f"  {name:10s}" + "".join(f"{n:7d}" for n in found.values()) for name, found in self.lengths.items()]
        return "\n".join(lines)


def _shown(name: str) -> str:
    """A name from the data, with nothing in it that a terminal obeys."""
    return name[:64] if name.isprintable() else repr(name[:64])


def load_pairs(
    source: str | os.PathLike,
    tokenizer,
    *,
    split: str = "train",
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    keep_columns: Sequence[str] | None = None,
    prerendered: bool | None = None,
) -> tuple[datasets.Dataset, Report]:
    """Reads preference pairs and tokenises them.

    source: a local file (.jsonl, .json, either with .gz, .parquet) or a data set's name on the hub. Rows have `chosen`
        and `rejected`, and each is read as what it is:
        - strings, with a string `prompt`: used as they are, but for a prompt that both repeat at their beginning;
        - messages, with all fields that the tokenizer's chat template reads: `prompt`, `chosen` and `rejected` are each
          messages or a string. A completion is all that follows the prompt, which it may repeat: where both hold the
          prompt, what is before it belongs to it. Without `prompt`, or where it is a string that is in their texts,
          the last two are whole conversations, which share the prompt and go on with the assistant.
          `tools` and `chat_template_kwargs`, as such or in JSON, go to the template;
        - transcripts, "\\n\\nHuman: …\\n\\nAssistant: …", whose prompt ends with the last "\\n\\nAssistant:" and holds
          `prompt`, if there is one. The turns go through the chat template where the tokenizer has one, else the text
          is used as it is;
        - strings that begin alike, without `prompt`: it is their longest common prefix, cut to end before its last
          whitespace. What the completions still share cancels in the margin.
    split: of a hub data set; a file has none.
    max_length: tokens of a prompt and a completion, from 2. A longer completion loses its end, EOS included.
    max_prompt_length: in tokens, 1 to max_length − 1, half of max_length by default. A longer prompt loses its start.
    keep_columns: columns to carry through; None takes all that fit. A column fits where it holds only strings of up to
        64 characters, only integers, or only booleans, nulls aside, and is one of the first 64.
    prerendered: whether strings were written by a chat template, so that control tokens in them are meant; False keeps
        them as text, None refuses such strings. In messages they are always text, and strings beside them have none.

    Returns the data set and the report. Rows have `pair_id` (16 hex digits, a hash of the pair), `row` (place in the
    source from 0; line number − 1), `prompt_ids`, `chosen_ids`, `rejected_ids` and the columns carried through. Prompt
    and completion are tokenised together and split where the prompt's own tokens end, or no longer agree. A completion
    ends with the template's end of turn, else with EOS. A control token that the data's text spells stays text.

    Rows are read in a stream, tokenised by several processes where there are many, and kept on disk in the cache of
    `datasets`, under a hash of the source's content, the tokenizer and all that is asked for here.

    Raises FileNotFoundError for a missing file. Raises ValueError for an argument out of range, a file that can't be
    read, a tokenizer without EOS (or, for messages, a chat template), and where no pair is left.
    """
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, takes an integer from 2")
    if max_prompt_length is None:
        max_prompt_length = max_length // 2
    if not 1 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length: got {max_prompt_length}, takes 1 to max_length − 1 = {max_length - 1}")
    report = Report(os.fspath(source))
    tokenise = _Tokenise(Encoder(tokenizer, prerendered), max_length, max_prompt_length)
    rows = open_rows(report.source, split)
    if not len(rows):
        raise ValueError(_nothing_left(report))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cpus, len(rows) // ROWS_A_PROCESS)
    found = rows.map(
        tokenise, fn_kwargs={"features": rows.features}, with_indices=True, batched=True, batch_size=ROWS_A_BATCH,
        remove_columns=rows.column_names, features=TOKENISED, num_proc=processes if processes > 1 else None,
        new_fingerprint=_fingerprint(rows, tokenizer, max_length, max_prompt_length, prerendered), desc="Tokenising",
    )  # fmt: skip

    kept, labels = _read_notes(found, report, keep_columns)
    if not report.kept:
        raise ValueError(_nothing_left(report))
    for name in IDS:
        lengths = pc.list_value_length(found.data.column(name)).to_numpy()[kept]
        numbers = np.percentile(lengths, (50, 95, 100), method="higher").tolist()
        report.lengths[name.removesuffix("_ids")] = dict(zip(("p50", "p95", "max"), numbers, strict=True))
    found = found.select_columns(list(COLUMNS))
    for name, values in labels.items():
        found = found.add_column(name, values)
    return found if kept.all() else found.select(np.flatnonzero(kept)), report


def _fingerprint(rows: datasets.Dataset, tokenizer, *settings: Any) -> str:
    """A hash of all that token ids depend on, this code included."""
    found = hashlib.blake2b(digest_size=16)
    for module in (sources, source_rows, encode, sys.modules[__name__]):
        found.update(Path(str(module.__file__)).read_bytes())
    versions = transformers.__version__, tokenizers.__version__
    found.update(json.dumps([rows._fingerprint, Hasher.hash(tokenizer), versions, settings]).encode())
    return found.hexdigest()


def _nothing_left(report: Report) -> str:
    if report.dropped[MALFORMED] < report.read or not report.read:
        return f"source: of {report.source} no pair is left\n{report}"
    names = ", ".join(map(repr, report.columns["read"] + report.columns["unread"]))
    takes = (
        "chosen and rejected as strings, or as messages of role and content, which end with the role assistant; tools "
        "as a list of objects; and with a column prompt a string or messages in every row"
    )
    return f"source: {report.source} has the columns {names}, takes {takes}\n{report}"


@dataclass
class _Tokenise:
    """Makes token ids of a batch of rows, and of each a note in JSON: what it has, what was dropped and cut."""

    encoder: Encoder
    max_length: int
    max_prompt_length: int

    def __call__(self, batch: dict[str, list], places: list[int], features: datasets.Features) -> dict[str, list]:
        if features == LINES:
            rows, records = batch["row"], list(map(parse, batch["line"]))
        else:
            columns = [[as_written(value, features[name]) for value in values] for name, values in batch.items()]
            rows, records = places, [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]
        notes, ids, rendered = [], [], []
        for row, record in zip(rows, records, strict=True):
            note, pair_id = _columns_of(record or {}), None
            try:
                pair = pair_of(record)
                self._check_control(pair, record or {}, row)
                rendered.append(self.encoder.render(pair))
                note["unwritten"], pair_id = self.encoder.unwritten(pair), pair.id()
            except NoPair as drop:
                note["dropped"] = str(drop)
            notes.append(note)
            ids.append(pair_id)
        encoded = zip(rendered, self.encoder.encode(rendered), strict=True)
        parts = [NOTHING if "dropped" in note else self._cut(*next(encoded), note) for note in notes]
        tokens = dict(zip(IDS, map(list, zip(*parts, strict=True)), strict=True))
        return {"pair_id": ids, "row": rows, **tokens, "note": [json.dumps(note) for note in notes]}

    def _check_control(self, pair: Pair, record: Record, row: int) -> None:
        """Control tokens in a row's strings are meant only where that is said, and where there are no messages."""
        if self.encoder.prerendered is False:
            return
        token = self.encoder.spelt(part for name in PARTS[:3] if isinstance(part := record.get(name), str))
        if token and self.encoder.prerendered is None:
            raise ValueError(
                f"prerendered: row {row} has text that spells the control token {token!r}. Give true where a chat "
                "template wrote the texts, so that it is one; false where it is text (or messages instead of texts)"
            )
        if token and not isinstance(pair.prompt, str):
            raise NoPair("control tokens in a string beside messages")

    def _cut(self, rendered: Rendered, encoded: Encoded, note: dict[str, Any]) -> tuple[np.ndarray, ...]:
        prompt = encoded.prompt[-self.max_prompt_length :]
        whole = encoded.chosen, encoded.rejected
        chosen, rejected = cut = [side[: self.max_length - len(prompt)] for side in whole]
        if not len(prompt):
            note["dropped"] = "prompt written otherwise by itself" if encoded.parted else "empty prompt"
        elif np.array_equal(*whole):
            note["dropped"] = "identical as tokens"
        elif np.array_equal(chosen, rejected):
            note["dropped"] = "identical after truncation"
        if "dropped" in note:
            return NOTHING
        counts = {
            "prompts_truncated": len(prompt) < len(encoded.prompt),
            "completions_truncated": sum(len(cut[i]) < len(whole[i]) for i in range(2)),
            "control_text": any(MARK in text for text in rendered[:3]),
            "parted": encoded.parted,
        }
        note["counts"] = {name: int(count) for name, count in counts.items() if count}
        return prompt, chosen, rejected


def _columns_of(record: Record) -> dict[str, Any]:
    """What a note says of columns: which are part of a pair, and the labels among the others; [] is no label."""
    given = {name: value for name, value in record.items() if value is not None and not SURROGATE.search(name)}
    labels = {name: value if _is_label(value) else [] for name, value in given.items() if name not in PARTS}
    return {"read": [name for name in PARTS if name in given], "columns": labels}


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 64 and not SURROGATE.search(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _fits(types: set[type]) -> bool:
    return types in ({str}, {int}, {bool})


def _read_notes(
    found: datasets.Dataset, report: Report, keep: Sequence[str] | None
) -> tuple[np.ndarray, dict[str, list]]:
    """Fills the report in. Which rows are kept, and the columns to carry through, None where a row is not kept."""
    kept = np.ones(len(found), bool)
    read: set[str] = set()
    values: dict[str, list] = {}
    types: dict[str, set[type]] = {}
    counts: Counter[str] = Counter()
    for batch in found.select_columns(["row", "note"]).iter(4096):
        for row, text in zip(batch["row"], batch["note"], strict=True):
            note = json.loads(text)
            read.update(note["read"])
            for name in note["columns"]:
                if len(types) < MOST_COLUMNS:
                    types.setdefault(name, set())
            if "dropped" in note:
                report.drop(note["dropped"], row)
                kept[report.read] = False
            else:
                counts.update(note["counts"])
                report.unwritten.update(note["unwritten"])
                for name, value in note["columns"].items():
                    if name not in types:
                        continue
                    types[name].add(type(value))
                    if not _fits(types[name]):
                        values.pop(name, None)
                        continue
                    column = values.setdefault(name, [])
                    column += [None] * (report.read - len(column))
                    # Categories are few: one string of each will do.
                    column.append(sys.intern(value) if isinstance(value, str) else value)
            report.read += 1
    report.kept = int(kept.sum())
    for name, count in counts.items():
        setattr(report, name, count)
    fit = [name for name in types if _fits(types[name]) and name not in COLUMNS]
    for name in keep or ():
        if name not in fit:
            raise ValueError(f"keep_columns: got {name!r}, takes columns of short strings, integers or booleans")
    carried = fit if keep is None else list(keep)
    unread = [name for name in types if name not in carried]
    report.columns = {"read": [name for name in PARTS if name in read], "carried": carried, "unread": unread}
    return kept, {name: values[name] + [None] * (report.read - len(values[name])) for name in carried}


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
