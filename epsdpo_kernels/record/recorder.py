"""The parts of a record: for every pair and step, what was decided, from what, and with what effect.

A record is a folder of Parquet parts that one `Recorder` a rank appends to and `read` puts together. Each part holds
the SHA-256 of the part before it, and a small file the last part's, so that an alteration shows unless all that comes
after it was rewritten too. `python -m epsdpo_kernels.record` prints docs/record.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .schema import check_columns

TRAIN = "train"
STEPS_PER_PART = 200
PART = re.compile(r"part-(\d{3,})-(\d{8,})-(\d{4,})\.parquet")
END = re.compile(r"end-(\d{3,})\.json")
# In a part's metadata: the SHA-256 of the rank's part before it, empty in the first.
BEFORE = b"sha256_before"


def _field(name: str, kind: pa.DataType, unit: str, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"unit": unit, "description": description})


_F = pa.float32()
SCHEMA = pa.schema(
    [
        _field(
            "step", pa.int64(), "", "optimizer step that the pair was part of, from 1; in evaluation, steps done before"
        ),
        _field(
            "policy_step",
            pa.int64(),
            "",
            "optimizer steps that policy and β had had: in training, those before the step; in evaluation, all that "
            "were done, or fewer where an earlier checkpoint was loaded",
        ),
        _field("micro", pa.int32(), "", "micro-batch within the step, or batch within the evaluation, from 0"),
        _field("rank", pa.int16(), "", "process that computed the pair, from 0; those that share a row count as one"),
        _field("epoch", pa.float64(), "passes", "passes over the data done before the step", nullable=True),
        _field("split", pa.string(), "", "train, or the prefix of an evaluation's metrics: eval, eval_NAME"),
        _field("method", pa.string(), "", "eps-dpo, dpo, tr-dpo, beta-dpo or lsc-dpo"),
        _field("pair_id", pa.string(), "", "hash of the pair's texts, the same in every run", nullable=True),
        _field("row", pa.int64(), "", "row in the data as given, from 0; in a stream the place", nullable=True),
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
        _field("beta", _F, "", "running β before the step; in evaluation, the one after policy_step"),
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
    renamed, so a kill loses the open part at most. Call :meth:`flush` when a checkpoint is saved, :meth:`close` in the
    end.

    Args:
        folder: of the record; made where missing. It holds nothing but parts, and an end a rank.
        rank: of this process. Every rank writes its own parts, so ranks need no agreement.
        rows_per_part: pairs.
        resume_step: steps in the checkpoint that the run goes on from. This rank's rows of later steps are removed, for
            they will come again. −1 removes them all. A run resumes with the ranks it had.

    Raises:
        FileExistsError: the folder holds parts of this rank and ``resume_step`` was not given. ValueError: one of them
            that is to be cut can't be read.
    """

    def __init__(
        self, folder: str | os.PathLike, rank: int = 0, rows_per_part: int = 16384, resume_step: int | None = None
    ):
        self.folder, self.rank, self.rows_per_part = Path(folder), rank, rows_per_part
        self._end = self.folder / f"end-{rank:03d}.json"
        self._rows: list[pa.Table] = []
        self._count, self._steps = 0, 0
        # Of the last pairs, and of the checkpoint, whose training is done; its evaluation may be to come.
        self._step = self._done = -1 if resume_step is None else resume_step
        self._closed = False
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.folder.glob(f".part-{rank:03d}-*.tmp"), *self.folder.glob(f".{self._end.name}.tmp")):
            leftover.unlink()
        own = [part for part in parts(self.folder) if numbers(part)[0] == rank]
        if own and resume_step is None:
            raise FileExistsError(f"folder: {folder} holds a record of rank {rank}; give resume_step to go on with it")
        # From the last one, and no further than there is something to remove: what is kept whole keeps its digest.
        while own and _cut(own[-1], resume_step):
            if own[-1].exists():
                break
            own.pop()
        self._last: Path | None = own[-1] if own else None
        self._digest = digest(own[-1]) if own else ""
        self._next = numbers(own[-1])[2] + 1 if own else 0
        self._write_end()

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds the pairs of one micro-batch.

        Args:
            columns: a (B,) array or a scalar for every name in ``SCHEMA``; ``rank`` is not given, and what may be null
                may be left out. One step, one split. No pairs at all leave nothing.

        Raises:
            ValueError: a column that is missing, unknown or of another length, or holds what the record does not take;
                a step before the last one, or one that a resumed run has done.
        """
        given = columns.keys() | {field.name for field in SCHEMA if field.nullable} | {"rank"}
        if given != set(SCHEMA.names):
            raise ValueError(f"columns: {sorted(given ^ set(SCHEMA.names))} missing or unknown")
        arrays = {name: np.array(value) for name, value in columns.items()}
        lengths = {len(array) for array in arrays.values() if array.ndim}
        if len(lengths) != 1:
            raise ValueError(f"columns: got arrays of {sorted(lengths)} rows, takes arrays of one length")
        if not (pairs := lengths.pop()):
            return
        arrays["rank"] = np.array(self.rank)
        whole = {name: array if array.ndim else np.full(pairs, array) for name, array in arrays.items()}
        table = pa.table([pa.array(whole.get(f.name, [None] * pairs), f.type) for f in SCHEMA], schema=SCHEMA)
        check_columns(table, self.rank)
        for name in ("step", "split"):
            if len(several := table[name].unique().to_pylist()) > 1:
                raise ValueError(f"{name}: got {several!r:.80}, takes one for all pairs of a micro-batch")
        step, split = table["step"][0].as_py(), table["split"][0].as_py()
        if step < (least := max(self._step, self._done + (split == TRAIN))):
            raise ValueError(f"step: got {step} after {self._step}, takes steps of {split!r} from {least}")
        if self._closed:
            self._closed = False
            self._write_end()
        if step != self._step:
            if self._count >= self.rows_per_part or self._steps >= STEPS_PER_PART:
                self.flush()
            self._step, self._steps = step, self._steps + 1
        self._rows.append(table)
        self._count += pairs

    def flush(self) -> None:
        """Writes what was appended since the last part as a part. When it returns the rows are on disk.

        Raises:
            FileExistsError: the last part of this rank is another than this recorder wrote: there are two of them.
        """
        if not self._count:
            return
        own = [part for part in parts(self.folder) if numbers(part)[0] == self.rank]
        if (own[-1] if own else None) != self._last:
            raise FileExistsError(
                f"folder: {self.folder} got parts of rank {self.rank} from another recorder, takes one"
            )
        first = self._rows[0]["step"][0].as_py()
        part = self.folder / f"part-{self.rank:03d}-{first:08d}-{self._next:04d}.parquet"
        self._digest = write_part(pa.concat_tables(self._rows).combine_chunks(), part, self._digest)
        self._last, self._next = part, self._next + 1
        self._rows.clear()
        self._count, self._steps = 0, 0
        self._write_end()

    def close(self) -> None:
        """Writes what is left, and that nothing was lost. Appending goes on with the record."""
        self.flush()
        self._closed = True
        self._write_end()

    def _write_end(self) -> None:
        write_end(self._end, self._last.name if self._last else "", self._digest, self._closed)


def read(folder: str | os.PathLike) -> pa.Table:
    """A record as one table, train first, then by step, split, micro-batch, rank and place in the micro-batch.

    Raises:
        FileNotFoundError: the folder is missing or holds no part.
        ValueError: a part that can't be read, or with other columns than ``SCHEMA``.
    """
    found = parts(Path(folder))
    if not found:
        raise FileNotFoundError(f"folder: {folder} holds no part of a record")
    return in_order(pa.concat_tables([_read_part(part).cast(SCHEMA) for part in found]))


def _read_part(part: Path) -> pa.Table:
    """A part with its own metadata."""
    try:
        table = pq.read_table(part)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{part}: can't be read ({error})") from None
    if not table.schema.equals(SCHEMA):
        names = sorted({field.name for field in set(table.schema) ^ set(SCHEMA)})
        raise ValueError(f"{part}: columns {names or 'in their order'} differ from the record's schema")
    return table


def in_order(table: pa.Table) -> pa.Table:
    """The rows of parts, in the order of :func:`read`."""
    name, split = np.unique(table["split"].to_numpy(), return_inverse=True)
    rank, micro, step = (table[column].to_numpy() for column in ("rank", "micro", "step"))
    # The sort is stable, and parts are read in the order they were written: places stay as they were.
    return table.take(np.lexsort([rank, micro, split, step, (name != TRAIN)[split]]))


def parts(folder: Path) -> list[Path]:
    """The parts in a folder, those of a rank in the order they were written."""
    return sorted((path for path in folder.glob("part-*.parquet") if PART.fullmatch(path.name)), key=numbers)


def numbers(part: Path) -> tuple[int, int, int]:
    """Rank, first step, and the part's number, which for each rank goes up by one from 0."""
    rank, step, number = map(int, PART.fullmatch(part.name).groups())  # type: ignore[union-attr]
    return rank, step, number


def digest(part: Path) -> str:
    """The SHA-256 of a part, as ``sha256sum`` prints it."""
    return hashlib.sha256(part.read_bytes()).hexdigest()


def write_part(table: pa.Table, part: Path, before: str) -> str:
    """Writes a part after the one with the digest ``before``; its own digest."""
    data = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({BEFORE: before}), data, compression="zstd")
    write_file(part, data.getvalue())
    return hashlib.sha256(data.getvalue()).hexdigest()


def write_end(end: Path, part: str, sha256: str, closed: bool) -> None:
    """Writes where the record of a rank ends, and whether the run has said that it does.

    Before the first part both strings are empty: a rank has an end from its start, so that none without one is whole.
    """
    write_file(end, json.dumps({"part": part, "sha256": sha256, "closed": closed}).encode())


def _cut(part: Path, step: int | None) -> bool:
    """Removes the rows past a step, and the part where none is left; whether there were any."""
    table = _read_part(part)
    kept = table.filter(table["step"].to_numpy() <= step)
    if not len(kept):
        part.unlink()
    elif len(kept) < len(table):
        write_part(kept, part, (table.schema.metadata or {}).get(BEFORE, b"").decode())
    return len(kept) < len(table)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; when it returns it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename lasts through a power cut when the folder is on disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
