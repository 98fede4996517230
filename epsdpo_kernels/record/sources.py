"""Rows of a data set as preference pairs: from files and hub data sets to texts and ids, without a tokenizer."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
BROKEN, MALFORMED, DIFFERENT = "broken line", "malformed row", "different prompts"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# JSON can spell half a surrogate pair, which no tokenizer and no table takes.
SURROGATE = re.compile("[\ud800-\udfff]")


class NoPair(Exception):
    """A row is no pair; the text is the reason."""


class Pair(NamedTuple):
    """A pair as its source has it. The prompt is text, or messages {"role", "content"}."""

    prompt: str | list[dict[str, str]]
    chosen: str
    rejected: str

    def text(self) -> dict[str, str]:
        """Three plain strings; a prompt of messages becomes paragraphs `role: content`."""
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        return {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected}

    def id(self) -> str:
        text = json.dumps(list(self.text().values()), ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_rows(source: str, split: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (row, record), None for a broken line. Blank lines are no rows, but they count in the numbering."""
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
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"source: {source} can't be read: {error}") from error
    if ".jsonl" not in path.name and isinstance(array := _parse(data), list):
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
    except (ValueError, RecursionError):  # bad UTF-8 and bad JSON; brackets without end
        return None


def form_of(records: Iterable[dict[str, Any] | None], source: str) -> str:
    """The form of the first row that has one: "messages", "strings", "transcripts" or "shared prefix"."""
    columns: dict[str, None] = {}
    for record in records:
        columns.update(dict.fromkeys(record or {}))
        prompt, *sides = parts = _parts(record or {})
        if not all(isinstance(side, str | list) for side in sides):
            continue
        if any(isinstance(part, list) for part in parts):
            return "messages"
        if isinstance(prompt, str):
            return "strings"
        return "transcripts" if all(s.startswith(HUMAN) and ASSISTANT in s for s in sides) else "shared prefix"
    if columns:
        found = ", ".join(map(repr, columns))
        raise ValueError(f"source: {source} has the columns {found}, takes chosen and rejected as strings or messages")
    return "strings"  # nothing but broken lines, which load_pairs reports


def _parts(record: dict[str, Any]) -> tuple[Any, Any, Any]:
    return record.get("prompt"), record.get("chosen"), record.get("rejected")


def pair_of(record: dict[str, Any] | None, form: str = "") -> Pair:
    """The pair of a record, or NoPair."""
    if record is None:
        raise NoPair(BROKEN)
    form = form or form_of([record], "a row")
    prompt, chosen, rejected = parts = _parts(record)
    other = prompt
    if form == "messages":
        (prompt, chosen), (other, rejected) = (_conversation(prompt, side) for side in (chosen, rejected))
    elif not all(isinstance(part, str) for part in parts[form != "strings" :]):
        raise NoPair(MALFORMED)
    elif form == "transcripts":
        (prompt, chosen), (other, rejected) = map(_transcript, (chosen, rejected))
    elif form == "shared prefix":
        # Split at whitespace: the last two pieces are the last whitespace and what follows it.
        other = prompt = "".join(re.split(r"(\s+)", os.path.commonprefix((chosen, rejected)))[:-2])
        if not prompt and chosen != rejected:
            raise NoPair(DIFFERENT)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if prompt != other:
        raise NoPair(DIFFERENT)
    if not chosen.strip() or not rejected.strip():
        raise NoPair("empty completion")
    if chosen == rejected:
        raise NoPair("identical pair")
    pair = Pair(prompt, chosen, rejected)
    if any(map(SURROGATE.search, pair.text().values())):
        raise NoPair(MALFORMED)
    return pair


def _conversation(prompt: Any, side: Any) -> tuple[list[dict[str, str]], str]:
    """The messages before a side's final assistant turn, and that turn's content."""
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    side = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
    try:
        whole = side if any(turn["role"] == "user" for turn in side) else [*prompt, *side]
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in whole]
    except (KeyError, TypeError):
        raise NoPair(MALFORMED) from None
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise NoPair(MALFORMED)
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise NoPair(MALFORMED)
    return turns[:-1], turns[-1]["content"]


def _transcript(text: str) -> tuple[str, str]:
    prompt, marker, completion = text.rpartition(ASSISTANT)
    if not prompt.startswith(HUMAN) or HUMAN in completion:
        raise NoPair(MALFORMED)
    return prompt + marker, completion


def turns(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript's prompt, without the assistant turn that it opens at its end."""
    parts = re.split(f"({HUMAN}|{ASSISTANT})", transcript)[1:-2]
    roles = ("user" if marker == HUMAN else "assistant" for marker in parts[::2])
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]


def texts(source: str | os.PathLike, rows: Iterable[int], split: str = "train") -> list[dict[str, str]]:
    """The raw texts of pairs, by their `row`: {"prompt", "chosen", "rejected"} each, in the order asked for.

    A prompt of messages is rendered as paragraphs `role: content`. Raises ValueError for a row that holds no pair.
    """
    records = dict(read_rows(os.fspath(source), split))
    form = form_of(records.values(), os.fspath(source))
    try:
        return [pair_of(records.get(row := int(each)), form).text() for each in rows]
    except NoPair as drop:
        raise ValueError(f"rows: got {row}, where {source} holds no pair ({drop})") from None
