"""Preference pairs: from files and hub data sets to token ids, and from token ids to batches.

`load_pairs` reads rows, drops what can't be a pair (and says how many, which and why), tokenises and truncates.
`Collator` lays a list of pairs out as the losses take them: chosen first, then rejected, labels already shifted.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jinja2 import TemplateError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
OWN_COLUMNS = ("pair_id", "row", "prompt_ids", "chosen_ids", "rejected_ids")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# A Unicode noncharacter, which no text should hold. One that does is guarded like a control token.
MARK = "\ufdd0"

BROKEN, MALFORMED = "broken line", "malformed row"
DIFFERENT, EMPTY, IDENTICAL = "different prompts", "empty completion", "identical pair"
NO_PROMPT, TEMPLATE = "empty prompt", "refused by the chat template"
IDENTICAL_CUT = "identical after truncation"


class _Drop(Exception):
    """A row is no pair; its text is the reason."""


@dataclass
class Report:
    """What became of a source's rows. `read` is always `kept` plus the sum of `dropped`.

    `where` holds the first 20 places of each reason: line numbers from 1 for broken lines, rows from 0 for the others.
    Truncations are counted in kept pairs, a pair's two completions apart. `control_text` counts the rows whose own text
    spells a control token such as an end of turn: it was kept as ordinary text. Lengths are in tokens.
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
        places = self.where.setdefault(reason, [])
        if len(places) < 20:
            places.append(row + (reason == BROKEN))

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"dropped": dict(self.dropped)}

    def __str__(self) -> str:
        lines = [f"{self.source}: kept {self.kept} of {self.read} rows"]
        for reason, count in self.dropped.most_common():
            unit = "lines" if reason == BROKEN else "rows"
            places = ", ".join(map(str, self.where[reason])) + (", …" if count > len(self.where[reason]) else "")
            lines.append(f"  dropped    {count:6d}  {reason} ({unit} {places})")
        lines.append(f"  truncated  {self.prompts_truncated:6d}  prompts")
        lines.append(f"  truncated  {self.completions_truncated:6d}  completions")
        if self.control_text:
            lines.append(f"  kept       {self.control_text:6d}  rows that spell a control token, as ordinary text")
        if self.lengths:
            lines.append("  tokens        p50    p95    max")
        for name, found in self.lengths.items():
            lines.append(f"  {name:10s} {found['p50']:6d} {found['p95']:6d} {found['max']:6d}")
        return "\n".join(lines)


class Pair(NamedTuple):
    """A pair as its source has it. The prompt is text, or messages {"role", "content"}."""

    prompt: str | list[dict[str, str]]
    chosen: str
    rejected: str

    def text(self) -> dict[str, str]:
        """Three plain strings; messages of the prompt become paragraphs `role: content`."""
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        return {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected}


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
        and `rejected`, and one of these forms, found from the first row that fits one and expected of all others:
        - strings with a `prompt` string: used as they are;
        - messages (lists of {"role", "content"}): `prompt` and completions may each be messages or a string, or
          `chosen` and `rejected` are conversations that share all but the final assistant turn. A side with a user turn
          counts as a whole conversation, whatever `prompt` says. Needs the tokenizer's chat template;
        - transcripts ("\\n\\nHuman: …\\n\\nAssistant: …"): the prompt ends with the last "\\n\\nAssistant:". Turns go
          through the chat template where the tokenizer has one, and are used as raw text otherwise;
        - other strings without `prompt`: the prompt is the longest common prefix, cut back to end before the last
          whitespace in it. That whitespace and a word begun belong to the completions; their log-probs cancel in the
          margin, so a prompt that is too short does no harm.
    tokenizer: of transformers, with an EOS token.
    split: of a hub data set; files have none.
    max_length: tokens of prompt and completion together, from 2. A longer completion loses its end (and so its EOS).
    max_prompt_length: tokens of the prompt, from 1 to max_length − 1; a longer prompt loses its start. None: half of
        max_length.
    keep_columns: columns to carry through. None: every one that holds only strings of up to 64 characters, or only
        integers, or only booleans (and nulls).

    Returns the data set and what happened on the way. A row has `pair_id` (16 hex digits, a hash of the three texts),
    `row` (its place in the source from 0; for lines, line number − 1), `prompt_ids`, `chosen_ids`, `rejected_ids`
    (token ids) and the columns carried through. Prompt and completions are tokenised apart, so both sequences begin
    with the very ids that generation would start from. Completions end with the chat template's end of turn, or with
    EOS. Control tokens that the data's own text spells stay text.

    Raises FileNotFoundError for a file that isn't there, and ValueError for arguments out of range, a file that can't
    be read, columns that fit no form, a tokenizer without what the form needs, and when no pair is left.
    """
    max_prompt_length = _check_lengths(max_length, max_prompt_length)
    report = Report(os.fspath(source))
    records = list(_read(report.source, split))
    form = _form((record for _, record in records), report.source)
    encoder = _Encoder(tokenizer, form)

    rendered = []
    for row, record in records:
        report.read += 1
        try:
            pair = _pair(record, form)
            rendered.append((row, record, pair, encoder.render(pair)))
        except _Drop as drop:
            report.drop(str(drop), row)

    kept, labels = [], []
    for start in range(0, len(rendered), 512):
        batch = rendered[start : start + 512]
        ids = iter(encoder.encode([text for *_, texts in batch for text in texts]))
        for row, record, pair, texts in batch:
            whole = encoder.start(next(ids)), next(ids), next(ids)
            prompt = whole[0][-max_prompt_length:]
            chosen, rejected = (completion[: max_length - len(prompt)] for completion in whole[1:])
            if not prompt or chosen == rejected:
                report.drop(IDENTICAL_CUT if prompt else NO_PROMPT, row)
                continue
            report.prompts_truncated += len(prompt) < len(whole[0])
            report.completions_truncated += (len(chosen) < len(whole[1])) + (len(rejected) < len(whole[2]))
            report.control_text += any(MARK in text for text in texts)
            # 4 bytes a token: Python's own integers would take ten times that.
            kept.append((_pair_id(pair), row, *(np.array(part, np.int32) for part in (prompt, chosen, rejected))))
            labels.append(record)

    report.kept = len(kept)
    if not kept:
        raise ValueError(f"no pair is left\n{report}")
    columns = dict(zip(OWN_COLUMNS, map(list, zip(*kept, strict=True)), strict=True))
    for name in OWN_COLUMNS[2:]:
        found = np.percentile([len(ids) for ids in columns[name]], (50, 95, 100), method="higher").tolist()
        report.lengths[name.removesuffix("_ids")] = dict(zip(("p50", "p95", "max"), found, strict=True))
    return datasets.Dataset.from_dict(columns | _labels(labels, keep_columns)), report


def texts(source: str | os.PathLike, rows: Iterable[int], split: str = "train") -> list[dict[str, str]]:
    """The raw texts of pairs, by their `row`: {"prompt", "chosen", "rejected"} each, in the order asked for.

    A prompt of messages is rendered as paragraphs `role: content`. Raises ValueError for a row that holds no pair.
    """
    source = os.fspath(source)
    records = dict(_read(source, split))
    form = _form(records.values(), source)
    found = []
    for row in map(int, rows):
        try:
            found.append(_pair(records.get(row), form).text())
        except _Drop as drop:
            raise ValueError(f"rows: {source} holds no pair in row {row} ({drop})") from None
    return found


@dataclass
class Collator:
    """Lays rows of `load_pairs` out as a batch of 2B sequences, the B chosen ones first, then the B rejected.

    Gives `input_ids`, `attention_mask` and `labels`, all (2B, T) int64 and padded on the right, and `row` (B,) int64.
    labels[t] is input_ids[t + 1] where that is a completion's token and −100 elsewhere: what the hidden state at t has
    to predict, with no shift left to do. Raises ValueError for a row without a prompt, whose first token no hidden
    state predicts.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.pad_token_id is None:
            raise ValueError("pad_token_id: got None, takes a token id")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: got {self.pad_to_multiple_of}, takes None or an integer from 1")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if missing := [row["row"] for row in rows if not len(row["prompt_ids"])]:
            raise ValueError(f"rows: prompt_ids is empty in row {missing[0]}, takes at least one token")
        pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        shape = len(pairs), -(-longest // multiple) * multiple
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100)
        for i, (prompt, completion) in enumerate(pairs):
            start, end = len(prompt), len(prompt) + len(completion)
            input_ids[i, :start] = torch.as_tensor(prompt)
            input_ids[i, start:end] = labels[i, start - 1 : end - 1] = torch.as_tensor(completion)
            attention_mask[i, :end] = 1
        row = torch.tensor([row["row"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "row": row}


def _check_lengths(max_length: int, max_prompt_length: int | None) -> int:
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, takes an integer from 2")
    if max_prompt_length is None:
        return max_length // 2
    if not 1 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length: got {max_prompt_length}, takes 1 to max_length − 1 = {max_length - 1}")
    return max_prompt_length


def _read(source: str, split: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (row, record), None for a broken line. Blank lines are no rows, but count in the numbering."""
    path = Path(source)
    if not path.exists() and not source.endswith(SUFFIXES):
        yield from enumerate(datasets.load_dataset(source, split=split))
        return
    if not path.exists():
        raise FileNotFoundError(f"source: there is no file {source}")
    if not path.is_file() or not source.endswith(SUFFIXES):
        raise ValueError(f"source: got {source}, takes a hub name or a file that ends in {', '.join(SUFFIXES)}")
    try:
        if source.endswith(".parquet"):
            batches = pq.ParquetFile(path).iter_batches()
            yield from enumerate(record for batch in batches for record in batch.to_pylist())
            return
        data = path.read_bytes()
        data = (gzip.decompress(data) if source.endswith(".gz") else data).removeprefix(codecs.BOM_UTF8)
    except (pa.ArrowInvalid, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"source: {source} can't be read: {error}") from error
    if source.endswith((".json", ".json.gz")) and isinstance(array := _parse(data), list):
        yield from enumerate(record if isinstance(record, dict) else {} for record in array)
        return
    for row, line in enumerate(data.split(b"\n")):
        if line.strip():
            record = _parse(line)
            yield row, record if isinstance(record, dict) else None


def _parse(data: bytes) -> Any:
    """A JSON value, None where there is none."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):  # bad UTF-8 and bad JSON; nested without end
        return None


def _form(records: Iterable[dict[str, Any] | None], source: str) -> str:
    """The form of the first row that has one: "messages", "strings", "transcripts" or "shared prefix"."""
    columns: dict[str, None] = {}
    for record in records:
        record = record or {}
        columns.update(dict.fromkeys(record))
        prompt, *sides = (record.get(name) for name in ("prompt", "chosen", "rejected"))
        if not all(isinstance(side, str | list) for side in sides):
            continue
        if any(isinstance(part, list) for part in (prompt, *sides)):
            return "messages"
        if isinstance(prompt, str):
            return "strings"
        if all(side.startswith(HUMAN) and ASSISTANT in side for side in sides):
            return "transcripts"
        return "shared prefix"
    if columns:
        found = ", ".join(map(repr, columns))
        raise ValueError(f"source: {source} has the columns {found}, takes chosen and rejected as strings or messages")
    return "strings"  # nothing but broken lines, which load_pairs reports


def _pair(record: dict[str, Any] | None, form: str) -> Pair:
    """The pair of a record, or _Drop."""
    if record is None:
        raise _Drop(BROKEN)
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    other = prompt
    if form == "messages":
        (prompt, chosen), (other, rejected) = (_conversation(prompt, side) for side in (chosen, rejected))
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _Drop(MALFORMED)
    elif form == "strings" and not isinstance(prompt, str):
        raise _Drop(MALFORMED)
    elif form == "transcripts":
        (prompt, chosen), (other, rejected) = map(_transcript, (chosen, rejected))
    elif form == "shared prefix":
        # Split at whitespace: the last two parts are the last whitespace and what follows it.
        other = prompt = "".join(re.split(r"(\s+)", os.path.commonprefix((chosen, rejected)))[:-2])
        if not prompt and chosen != rejected:
            raise _Drop(DIFFERENT)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if prompt != other:
        raise _Drop(DIFFERENT)
    if not chosen.strip() or not rejected.strip():
        raise _Drop(EMPTY)
    if chosen == rejected:
        raise _Drop(IDENTICAL)
    pair = Pair(prompt, chosen, rejected)
    if not all(map(_encodable, pair.text().values())):
        raise _Drop(MALFORMED)
    return pair


def _conversation(prompt: Any, side: Any) -> tuple[list[dict[str, str]], str]:
    """The messages before a side's final assistant turn, and that turn's content."""
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    side = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
    try:
        whole = side if any(message["role"] == "user" for message in side) else [*prompt, *side]
        turns = [{"role": message["role"], "content": message["content"]} for message in whole]
    except (KeyError, TypeError, IndexError):
        raise _Drop(MALFORMED) from None
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise _Drop(MALFORMED)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise _Drop(MALFORMED)
    return turns[:-1], turns[-1]["content"]


def _transcript(text: str) -> tuple[str, str]:
    prompt, marker, completion = text.rpartition(ASSISTANT)
    if not prompt.startswith(HUMAN) or HUMAN in completion:
        raise _Drop(MALFORMED)
    return prompt + marker, completion


def _turns(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript's prompt, without the assistant turn that it opens at its end."""
    parts = re.split(f"({HUMAN}|{ASSISTANT})", transcript)[1:-2]
    names = {HUMAN: "user", ASSISTANT: "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": names[name], "content": content.strip()} for name, content in pairs]


class _Encoder:
    """Text to ids. A control token that a template writes is a token; one that the data's text spells stays text.

    Before anything is rendered, such text is replaced by a numbered mark; at tokenisation the mark gives way to the ids
    of the text. Only where a mark is does that change the pieces that the tokenizer sees.
    """

    def __init__(self, tokenizer, form: str):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: has no EOS token, which completions end with")
        if form == "messages" and not tokenizer.chat_template:
            raise ValueError("tokenizer: has no chat template, which rows of messages need")
        self.tokenizer = tokenizer
        self.template = bool(tokenizer.chat_template) and form in ("messages", "transcripts")
        self.control = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.guarded = sorted({MARK, *self.control}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.guarded)))
        self.has_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    def render(self, pair: Pair) -> tuple[str, str, str]:
        """Prompt, chosen and rejected as the texts to tokenise."""
        if not self.template:
            prompt, chosen, rejected = map(self._guard, pair)
            return prompt, chosen + self.tokenizer.eos_token, rejected + self.tokenizer.eos_token
        prompt, *sides = pair
        if isinstance(prompt, str):
            prompt, sides = _turns(prompt), [side.strip() for side in sides]
        turns = [turn | {"content": self._guard(turn["content"])} for turn in prompt]
        try:
            opened = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            chosen, rejected = (self._answer(turns, opened, side) for side in sides)
        except TemplateError:
            raise _Drop(TEMPLATE) from None
        return opened, chosen, rejected

    def _answer(self, turns: list[dict[str, str]], opened: str, side: str) -> str:
        turns = [*turns, {"role": "assistant", "content": self._guard(side)}]
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(opened):
            raise _Drop(TEMPLATE)
        answer = whole[len(opened) :]
        # A newline after the end of turn is never generated.
        return answer.rstrip() if answer.rstrip().endswith(self.control) else answer + self.tokenizer.eos_token

    def _guard(self, text: str) -> str:
        return self.pattern.sub(lambda match: f"{MARK}{self.guarded.index(match[0])}{MARK}", text)

    def start(self, prompt: list[int]) -> list[int]:
        """Raw text begins as the tokenizer begins a text; a template writes its own beginning."""
        return [self.tokenizer.bos_token_id, *prompt] if self.has_bos and not self.template else prompt

    def encode(self, rendered: list[str]) -> list[list[int]]:
        batch = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [self._pieces(text) if MARK in text else ids for text, ids in zip(rendered, batch, strict=True)]

    def _pieces(self, text: str) -> list[int]:
        ids = []
        for i, piece in enumerate(text.split(MARK)):
            marked = i % 2 == 1
            piece = self.guarded[int(piece)] if marked else piece
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=marked)["input_ids"]
        return ids


def _encodable(text: str) -> bool:
    """Whether text is valid Unicode: JSON can spell half a surrogate pair, which no tokenizer or table takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pair_id(pair: Pair) -> str:
    text = json.dumps(list(pair.text().values()), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _labels(records: list[dict[str, Any]], keep: Sequence[str] | None) -> dict[str, list]:
    """The columns to carry through."""
    present = dict.fromkeys(name for record in records for name in record)
    names = present if keep is None else keep
    found = {}
    for name in names:
        values = [record.get(name) for record in records]
        kinds = {type(value) for value in values if value is not None}
        if name not in (*OWN_COLUMNS, "prompt", "chosen", "rejected") and len(kinds) == 1 and _label_values(values):
            found[name] = values
        elif keep is not None:
            raise ValueError(f"keep_columns: got {name!r}, takes columns of short strings, integers or booleans")
    return {name: values for name, values in found.items() if _encodable(name)}


def _label_values(values: list) -> bool:
    return all(
        value is None
        or (isinstance(value, str) and len(value) <= 64 and _encodable(value))
        or (isinstance(value, int) and -(2**63) <= value < 2**63)
        for value in values
    )
