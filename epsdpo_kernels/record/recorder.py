"""The record: for every pair and step, what was decided, from what, and with what effect.

A record is a folder of Parquet parts that one `Recorder` a rank appends to and `read` puts together.
`python -m epsdpo_kernels.record.recorder` prints its documentation, docs/record.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "eval")
STEPS_PER_PART = 200
PART = re.compile(r"part-(\d{3,})-(\d{8,})-(\d{4,})\.parquet")


def _field(name: str, kind: pa.DataType, unit: str, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"unit": unit, "description": description})


_F = pa.float32()
SCHEMA = pa.schema(
    [
        _field(
            "step", pa.int64(), "", "optimizer step that the pair was part of, from 1; in evaluation, steps done before"
        ),
        _field("micro", pa.int32(), "", "micro-batch within the step, or batch within the evaluation, from 0"),
        _field("rank", pa.int16(), "", "process that computed the pair, from 0"),
        _field("epoch", pa.float64(), "passes", "passes over the data done before the step"),
        _field("split", pa.string(), "", "train or eval"),
        _field("method", pa.string(), "", "eps-dpo, dpo, tr-dpo, beta-dpo or lsc-dpo"),
        _field("pair_id", pa.string(), "", "hash of the pair's texts, the same in every run"),
        _field("row", pa.int64(), "", "row in the source data, from 0"),
        _field("chosen_tokens", pa.int32(), "tokens", "scored tokens of the chosen completion"),
        _field("rejected_tokens", pa.int32(), "tokens", "the same of the rejected one"),
        _field("chosen_logp", _F, "nats", "log-probability of the chosen completion, summed, under the policy"),
        _field("rejected_logp", _F, "nats", "the same of the rejected one"),
        _field("ref_chosen_logp", _F, "nats", "log-probability of the chosen completion, summed, under the reference"),
        _field("ref_rejected_logp", _F, "nats", "the same of the rejected one"),
        _field("margin", _F, "nats", "(chosen_logp − rejected_logp) − (ref_chosen_logp − ref_rejected_logp)"),
        _field(
            "relaxed_shift", _F, "nats", "how chosen_logp − rejected_logp would move under the smaller beta / (1 + ε)"
        ),
        _field("tightened_shift", _F, "nats", "the same under the larger beta / (1 − ε)"),
        _field("decision", pa.int8(), "", "used for the pair: +1 KL penalty relaxed, 0 kept, −1 tightened"),
        _field(
            "vetoed", pa.bool_(), "", "the check said +1 and a second signal withheld it, which makes the decision 0"
        ),
        _field("epsilon", _F, "", "ε, size of the perturbation; 0 where the method has none"),
        _field("beta", _F, "", "running β before the step"),
        _field("beta_used", _F, "", "β of the pair's loss"),
        _field("label_smoothing", _F, "", "share of labels assumed flipped"),
        _field("loss", _F, "nats", "loss of the pair"),
        _field("coefficient", _F, "", "−∂loss/∂chosen_logp = +∂loss/∂rejected_logp, the pair's weight in the gradient"),
        _field("chosen_kl", _F, "nats", "KL(policy‖reference), full vocabulary, summed over the chosen tokens"),
        _field("rejected_kl", _F, "nats", "the same over the rejected tokens"),
        _field("chosen_entropy", _F, "nats per token", "entropy of the policy, mean over the chosen tokens"),
        _field("rejected_entropy", _F, "nats per token", "the same over the rejected tokens"),
        _field("label", pa.string(), "", "the pair's value in one categorical column of the data", nullable=True),
    ]
)


class Recorder:
    """Appends pairs to the record of a run.

    A part is written when it holds 200 steps or ``rows_per_part`` rows, at a step's end: under another name first, then
    renamed, so a kill loses the open part at most. Call :meth:`flush` when a checkpoint is saved.

    Args:
        folder: of the record; made where missing. It holds nothing but parts.
        rank: of this process. Every rank writes its own parts, so ranks need no agreement.
        rows_per_part: pairs.
        resume_step: steps in the checkpoint that the run goes on from. This rank's rows of later steps are removed, for
            they will come again. −1 removes them all. A run resumes with the ranks it had.

    Raises:
        FileExistsError: the folder holds parts of this rank and ``resume_step`` was not given.
    """

    def __init__(
        self, folder: str | os.PathLike, rank: int = 0, rows_per_part: int = 16384, resume_step: int | None = None
    ):
        self.folder, self.rank, self.rows_per_part = Path(folder), rank, rows_per_part
        self._rows: list[dict[str, Any]] = []
        self._count, self._steps = 0, 0
        self._step: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".part-{rank:03d}-*.tmp"):
            leftover.unlink()
        own = [part for part in parts(self.folder) if _numbers(part)[0] == rank]
        if own and resume_step is None:
            raise FileExistsError(f"folder: {folder} holds a record of rank {rank}; give resume_step to go on with it")
        for part in own:
            _cut(part, resume_step)
        self._next = max((_numbers(part)[2] for part in own), default=-1) + 1

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds the pairs of one micro-batch.

        Args:
            columns: a (B,) array or a scalar for every name in ``SCHEMA``; ``rank`` is not given, ``label`` may be left
                out. One step, one split.

        Raises:
            ValueError: a column that is missing, unknown or of another length.
        """
        given = columns.keys() | {"rank", "label"}
        if given != set(SCHEMA.names):
            raise ValueError(f"columns: {sorted(given ^ set(SCHEMA.names))} missing or unknown")
        arrays = {name: np.array(value) for name, value in columns.items()}
        lengths = {len(array) for array in arrays.values() if array.ndim}
        if len(lengths) != 1:
            raise ValueError(f"columns: got arrays of {sorted(lengths)} rows, takes arrays of one length")
        step = int(arrays["step"].flat[0])
        if step != self._step:
            if self._count >= self.rows_per_part or self._steps >= STEPS_PER_PART:
                self.flush()
            self._step, self._steps = step, self._steps + 1
        self._rows.append(arrays)
        self._count += lengths.pop()

    def flush(self) -> None:
        """Writes what was appended since the last part as a part. When it returns the rows are on disk."""
        if not self._count:
            return
        lengths = [max(array.size for array in arrays.values()) for arrays in self._rows]
        table = {}
        for field in SCHEMA:
            blocks = [arrays.get(field.name, np.array(None)) for arrays in self._rows]
            if field.name == "rank":
                blocks = [np.array(self.rank)] * len(lengths)
            values = np.concatenate([np.broadcast_to(b, n) for b, n in zip(blocks, lengths, strict=True)])
            table[field.name] = pa.array(values, field.type)
        first = int(self._rows[0]["step"].flat[0])
        _write(pa.table(table, SCHEMA), self.folder / f"part-{self.rank:03d}-{first:08d}-{self._next:04d}.parquet")
        self._rows.clear()
        self._count, self._steps, self._step, self._next = 0, 0, None, self._next + 1

    close = flush


def read(folder: str | os.PathLike) -> pa.Table:
    """A record as one table, train before eval, then by step, micro-batch, rank and place in the micro-batch.

    Raises:
        FileNotFoundError: the folder is missing or holds no part.
        ValueError: a part that can't be read, or with other columns than ``SCHEMA``.
    """
    found = parts(Path(folder))
    if not found:
        raise FileNotFoundError(f"folder: {folder} holds no part of a record")
    tables = []
    for part in found:
        try:
            table = pq.read_table(part)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{part}: can't be read ({error})") from None
        if not table.schema.equals(SCHEMA):
            names = sorted({field.name for field in set(table.schema) ^ set(SCHEMA)})
            raise ValueError(f"{part}: columns {names or 'in their order'} differ from the record's schema")
        tables.append(table)
    table = pa.concat_tables(tables)
    split = table["split"].to_numpy() != SPLITS[0]
    # The sort is stable, and parts are read in the order they were written: places stay as they were.
    return table.take(np.lexsort([*(table[name].to_numpy() for name in ("rank", "micro", "step")), split]))


def parts(folder: Path) -> list[Path]:
    """The parts in a folder, those of a rank in the order they were written."""
    return sorted((path for path in folder.glob("part-*.parquet") if PART.fullmatch(path.name)), key=_numbers)


def _numbers(part: Path) -> tuple[int, ...]:
    """Rank, first step, number."""
    return tuple(map(int, PART.fullmatch(part.name).groups()))  # type: ignore[union-attr]


def _cut(part: Path, step: int | None) -> None:
    """Removes the rows past a step."""
    table = pq.read_table(part)
    kept = table.filter(table["step"].to_numpy() <= step)
    if not len(kept):
        part.unlink()
    elif len(kept) < len(table):
        _write(kept, part)


def _write(table: pa.Table, part: Path) -> None:
    temporary = part.with_name(f".{part.name}.tmp")
    with open(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, part)
    # The rename lasts through a power cut when the folder is on disk too.
    folder = os.open(part.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


PAGE = """# The record of a run

Every training and evaluation batch appends one row a pair to `RUN/record/`, a folder of Parquet parts and nothing
else. `epsdpo audit RUN` checks a record against itself; `epsdpo report RUN` draws it.

```python
from epsdpo_kernels.record import read

table = read("RUN/record")  # a pyarrow.Table; .to_pandas() for a data frame
```

A part is named `part-RANK-FIRSTSTEP-NUMBER.parquet`. It is closed at the end of a step once it holds {steps} steps, and
whenever a checkpoint is saved; it appears under its name whole, or not at all. A run that is killed loses the open
part at most, and one that is resumed removes the rows past its checkpoint before it goes on.

Texts stay in the data set: `pair_id` and `row` lead there. Everything below is as the loss computed it, in its
precision, before the optimizer step. The table is made from the schema (`python -m epsdpo_kernels.record.recorder`).

| column | type | unit | |
| --- | --- | --- | --- |
"""


def document() -> str:
    """docs/record.md, from the schema."""
    page = PAGE.format(steps=STEPS_PER_PART)
    for field in SCHEMA:
        unit, description = (field.metadata[key].decode() for key in (b"unit", b"description"))
        kind = f"{field.type}, may be null" if field.nullable else str(field.type)
        page += f"| `{field.name}` | {kind} | {unit} | {description} |\n"
    return page


if __name__ == "__main__":
    print(document(), end="")
