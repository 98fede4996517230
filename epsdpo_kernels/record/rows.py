"""Rows of a data set: JSON lines, JSON arrays, Parquet files and hub data sets, read in a stream."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
BLOCK, PEEK = 1 << 20, 64
LINES = datasets.Features({"row": datasets.Value("int64"), "line": datasets.Value("large_binary")})

Record = dict[str, Any]


def read_rows(source: str, split: str) -> Iterator[tuple[int, Record | None]]:
    """Yields (row, record), None for a broken line."""
    if is_hub_name(source) or source.endswith(".parquet"):
        yield from enumerate(records(open_rows(source, split)))
    else:
        yield from ((row, parse(line)) for row, line in lines(source))


def open_rows(source: str, split: str) -> datasets.Dataset:
    """The rows of a source, memory-mapped: `row` and `line` of a JSON file, the columns of anything else.

    What a file holds is kept in the cache of `datasets`, under a hash of the content.

    Raises:
        FileNotFoundError: no such file. ValueError: one of another kind, one that can't be read, or pictures in it.
    """
    if is_hub_name(source):
        rows = datasets.load_dataset(source, split=split)
    elif source.endswith(".parquet"):
        rows = _open_parquet(_file(source))
    else:
        return _open_lines(source)
    for name, feature in rows.features.items():
        if _is_media(feature):
            raise ValueError(f"source: {source} has pictures or sounds in {name!r}, takes text; remove the column")
    return rows


def is_hub_name(source: str) -> bool:
    return not Path(source).exists() and not source.endswith(SUFFIXES)


def _file(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"source: there is no file {source}")
    if not path.is_file() or not source.endswith(SUFFIXES):
        raise ValueError(f"source: got {source}, takes a hub name or a file that ends in {', '.join(SUFFIXES)}")
    return path


# Files


def _open_parquet(path: Path) -> datasets.Dataset:
    content = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            content.update(block)
    try:
        if not pq.read_metadata(path).num_rows:
            return datasets.Dataset.from_dict({})
        return datasets.Dataset.from_parquet(str(path), config_name=content.hexdigest())
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"source: {path} can't be read: {error.__cause__ or error}") from error


def _open_lines(source: str) -> datasets.Dataset:
    # Other code may read the same content in another way.
    content, found = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16), 0
    for found, (row, line) in enumerate(lines(source), 1):  # noqa: B007
        content.update(b"%d %d " % (row, len(line)) + line)
    if not found:
        return datasets.Dataset.from_dict({"row": [], "line": []}, features=LINES)
    return datasets.Dataset.from_generator(
        _numbered, features=LINES, gen_kwargs={"source": source}, fingerprint=content.hexdigest()
    )


def _numbered(source: str) -> Iterator[Record]:
    return ({"row": row, "line": line} for row, line in lines(source))


def lines(source: str) -> Iterator[tuple[int, bytes]]:
    """(row, JSON) of a file of lines, or of one array. Blank lines are no rows, but they count in the numbering."""
    path = _file(source)
    try:
        with gzip.open(path) if source.endswith(".gz") else path.open("rb") as file:
            if not path.name.endswith((".jsonl", ".jsonl.gz")) and _is_array(file):
                yield from enumerate(_elements(file))
                return
            for row, line in enumerate(file):
                line = line.removeprefix(codecs.BOM_UTF8) if row == 0 else line
                if line.strip():
                    yield row, line
    except (ValueError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"source: {source} can't be read: {error}") from error


def _is_array(file: Any) -> bool:
    """Whether a file begins with a bracket, behind any blanks; it is left at its start."""
    start = file.read(PEEK).removeprefix(codecs.BOM_UTF8).lstrip()
    while not start and (more := file.read(BLOCK)):
        start = more.lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _elements(file: Any) -> Iterator[bytes]:
    """The elements of a JSON array, one after the other; one that is no object is an empty one."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    stream = io.TextIOWrapper(file, "utf-8-sig")
    while not (text := stream.read(PEEK).lstrip()):
        pass
    at = 1  # behind the bracket
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError:
            end = len(text)
        if end == len(text):
            # As much again as there is, so that a long element is not parsed too often.
            if not (more := stream.read(max(BLOCK, end - at))):
                raise ValueError("its array has no end, or holds something broken")
            text, at = text[at:] + more, 0
            continue
        yield text[at:end].encode() if isinstance(value, dict) else b"{}"
        at = end


def parse(line: bytes) -> Record | None:
    """The row that a line holds, None where it holds none."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # bad UTF-8 and bad JSON; brackets without end
        return None
    return value if isinstance(value, dict) else None


# Tables


def records(rows: datasets.Dataset) -> Iterator[Record]:
    """The rows of a table, without what Arrow fills them with inside of a column."""
    for record in rows:
        yield {name: as_written(value, rows.features[name]) for name, value in record.items()}


def as_written(value: Any, feature: Any) -> Any:
    """A value without the nulls that stand for fields which other rows have."""
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: as_written(part, feature[name]) for name, part in value.items() if part is not None}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [as_written(part, feature.feature) for part in value]
    return value


def _is_media(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    if hasattr(feature, "feature"):
        return _is_media(feature.feature)
    return hasattr(feature, "decode_example") and not isinstance(feature, datasets.Json)
