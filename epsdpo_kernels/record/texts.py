"""The pairs of a run, found again in its data set by their ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets

from . import rows, sources


def find(source: str | list[str], split: str, ids: Collection[str]) -> Iterator[tuple[str, sources.Pair]]:
    """Yields (id, pair) of those with one of some ids, wherever they stand, each once.

    Args:
        source: a file or a hub name that :func:`rows.read_rows` takes, an Arrow file of `datasets`, or several.
        split: of a hub data set.

    Raises:
        FileNotFoundError: no such file. ValueError: one that can't be read.
    """
    left = set(ids)
    for one in [source] if isinstance(source, str) else source:
        for record in _records(one, split) if left else ():
            try:
                pair = sources.pair_of(record)
            except (sources.NoPair, ValueError):
                continue
            if (name := pair.id()) in left:
                left.remove(name)
                yield name, pair
                if not left:
                    break


def _records(source: str, split: str) -> Iterator[dict[str, Any] | None]:
    if not source.endswith(".arrow"):
        yield from (record for _, record in rows.read_rows(source, split))
    elif Path(source).is_file():
        yield from datasets.Dataset.from_file(source)
    else:
        raise FileNotFoundError(f"dataset: there is no file {source}")
