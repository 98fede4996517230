"""``epsdpo audit RUN``: checks a run's record against itself, and says OK or where not, and what it could not check.

Every figure that follows from others in the record is worked out again from those: the decision from the shifts, the β
of a pair from decision, ε and running β, margin, loss and coefficient from the log-probs, the running β of a step from
the one before it. So a figure that was altered is named where it stands, and only there. The same goes for what must be
there: every step, micro-batch, rank and pair, once. A part whose bytes are not those that the next part, or the end,
holds the digest of was altered after it was written, however well its figures agree.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .recorder import BEFORE, END, SCHEMA, TRAIN, in_order, numbers, parts
from .run import steps_done
from .schema import check_columns, read_facts
from .shown import in_a_line
from .values import check_values
from .words import words

SHOWN = 50
# Of an epoch's fraction that was summed up step by step; a step is more of an epoch.
FRACTION = 1e-8
Columns = dict[str, np.ndarray]


@dataclass
class Finding:
    """One thing that is not as it must be.

    kind: "value", a figure that does not follow; "unreadable", a part; "chain", a part that was altered, moved or
        removed after it was written; "gap", steps or micro-batches that are missing; "rank", a process that is not
        there, or lacks steps; "short", a step with fewer pairs than the others; "double", a pair that comes again;
        "missing", pairs that an epoch or evaluation lacks; "id", a row of the data with two ids; "end", a record that
        ends before its run.
    The place is given as far as there is one: part, place in the part (from 0), epoch (from 0), step, row of the data,
    pair id. ``holds`` and ``follows`` are values, or counts of what ``column`` names, "–" for none. What came from
    outside is as :func:`shown.in_a_line` shows it.
    """

    kind: str
    column: str
    holds: str
    follows: str
    part: str = ""
    place: int | None = None
    epoch: int | None = None
    step: int | None = None
    row: int | None = None
    pair_id: str = ""

    def __str__(self) -> str:
        where = [self.part] if self.part else []
        for name in ("place", "epoch", "step", "row"):
            value = getattr(self, name)
            where += [] if value is None else [f"{'row of the part' if name == 'place' else name} {value}"]
        where += [f"pair {self.pair_id}"] if self.pair_id else []
        return f"{', '.join(where) or 'record'}: {self.kind}, {self.column} holds {self.holds}, follows {self.follows}"


@dataclass
class Audit:
    """What was checked and what was found.

    Attributes:
        run: folder of the run.
        facts: its run.json.
        table: the rows that could be read, with ``part`` and ``place``, in the order of :func:`recorder.read`.
        digest: the SHA-256 over those of all ranks' last parts. Who keeps it can tell later whether anything changed.
        counts: findings by kind; ``findings`` holds the first 50 of each kind and column.
        limits: what could not be checked, by its name in words.py, with the values of that sentence.
    """

    run: Path
    facts: dict[str, Any]
    table: pa.Table
    parts: int
    digest: str = ""
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    limits: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def steps(self) -> int:
        """Training steps in the record."""
        return len(np.unique(self.table["step"].to_numpy()[self.table["split"].to_numpy() == TRAIN]))

    def add(self, kind: str, column: str, holds: Any, follows: Any, count: int = 1, **where) -> None:
        where = {name: in_a_line(value) if isinstance(value, str) else value for name, value in where.items()}
        self.findings.append(Finding(kind, in_a_line(column), in_a_line(holds), in_a_line(follows), **where))
        self.counts[kind] += count

    def name_rows(self, rows: Columns, kind: str, column: str, bad: np.ndarray, follows: Any) -> None:
        """A finding for every row in a mask, or for the first of them."""
        where = np.flatnonzero(bad)
        follows = np.broadcast_to(follows, bad.shape)
        for i in where[:SHOWN]:
            holds, then = (_short(values[i]) for values in (rows[column], follows))
            self.add(
                kind, column, holds, then, part=str(rows["part"][i]), place=int(rows["place"][i]),
                step=int(rows["step"][i]), row=int(rows["row"][i]) if rows["row"][i] >= 0 else None,
                pair_id=str(rows["pair_id"][i]),
            )  # fmt: skip
        if len(where) > SHOWN:
            self.counts[kind] += len(where) - SHOWN

    def limit(self, name: str, **values) -> None:
        self.limits.append((name, {k: in_a_line(v) if isinstance(v, str) else v for k, v in values.items()}))

    def unchecked(self, language: str = "en") -> list[str]:
        """What could not be checked, in sentences."""
        say = words("limits", language)
        return [say[name].format(**values) for name, values in self.limits]

    def __str__(self) -> str:
        counted = (
            f"{_counted(len(self.table), 'row')}, {_counted(self.steps, 'training step')}, "
            f"{_counted(self.parts, 'part')}"
        )
        found = sum(self.counts.values())
        lines = [f"NOT OK, {_counted(found, 'finding')} in {counted}" if found else f"OK, {counted}"]
        lines += [f"  {finding}" for finding in self.findings[:SHOWN]]
        if found > SHOWN:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())
            lines.append(f"  … the first {min(SHOWN, len(self.findings))} are shown of: {kinds}")
        return "\n".join([*lines, *(f"  not checked: {line}" for line in self.unchecked())])


def _short(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def audit(run: Path) -> Audit:
    """Checks the record in ``run``.

    Raises:
        FileNotFoundError: the folder holds no run.json, or no part of a record. ValueError: a run.json, or no part but
            such, that can't be read or holds what no run writes.
    """
    run = Path(run)
    facts = read_facts(run)
    found = parts(run / "record")
    links, tables, unreadable = [], [], []
    for part in found:
        data = part.read_bytes()
        try:
            table = pq.read_table(pa.BufferReader(data))
            table.validate(full=True)  # text that is no UTF-8, too
            if not table.schema.equals(SCHEMA):
                raise ValueError("its columns are not the schema's")
            check_columns(table, numbers(part)[0])
        except (pa.ArrowException, OSError, ValueError) as error:
            unreadable.append((part.name, in_a_line(" ".join(str(error).split()))))
            links.append(Link(part, hashlib.sha256(data).hexdigest(), None))
            continue
        before = (table.schema.metadata or {}).get(BEFORE, b"nothing").decode(errors="replace")
        links.append(Link(part, hashlib.sha256(data).hexdigest(), before))
        names = pa.array([part.name]).dictionary_encode().take(pa.array(np.zeros(len(table), np.int32)))
        table = table.cast(SCHEMA)
        tables.append(table.append_column("part", names).append_column("place", pa.array(np.arange(len(table)))))
    if not found:
        raise FileNotFoundError(f"run: {run / 'record'} holds no part of a record")
    if not tables:
        name, problem = unreadable[0]
        raise ValueError(f"{run / 'record' / name}: {problem}; no part of the record can be read")
    result = Audit(run, facts, in_order(pa.concat_tables(tables).unify_dictionaries()), len(found))
    for name, problem in unreadable:
        result.add("unreadable", "part", problem, "a part of a record", part=name)
    _check_chain(result, links)
    _check_ranks(result, links)
    rows = columns(result.table)
    rows["train"] = rows["split"] == TRAIN
    _note_unknown(result, rows)
    check_values(result, rows)
    _check_steps(result, rows)
    _check_pairs(result, rows)
    return result


def columns(table: pa.Table) -> Columns:
    """A record's columns as arrays: numbers as they are stored, text as objects.

    Of what is null, a row is −1, an epoch NaN, an id empty and a label None.
    """
    filled = {"row": pc.fill_null(table["row"], -1), "pair_id": pc.fill_null(table["pair_id"], "")}
    return {name: filled.get(name, table[name]).to_numpy() for name in table.column_names}


class Link(NamedTuple):
    """A part in the chain of its rank's."""

    part: Path
    digest: str
    before: str | None  # the digest that it holds of the part before it; None where it can't be read


def _check_chain(result: Audit, links: list[Link]) -> None:
    """Every part is as the next one, and the last as the end, says that it was written."""
    folder = result.run / "record"
    ends = {int(END.fullmatch(path.name)[1]): path for path in folder.glob("end-*.json") if END.fullmatch(path.name)}  # type: ignore[index]
    last, still_open = [], []
    for rank in sorted({numbers(link.part)[0] for link in links} | ends.keys()):
        own = [link for link in links if numbers(link.part)[0] == rank]
        before, number = Link(folder, "", None), -1
        for link in own:
            missing = range(number + 1, number := numbers(link.part)[2])
            for one in missing:
                result.add("chain", "part", "–", f"part {one} of rank {rank}", part=link.part.name)
            if not missing and link.before not in (None, before.digest):
                named = before.part.name if before.digest else link.part.name
                result.add("chain", "SHA-256", before.digest[:16] or "–", link.before[:16], part=named)  # type: ignore[index]
            before = link
        state = _check_end(result, ends.get(rank), folder / f"end-{rank:03d}.json", own)
        still_open += [rank] if state == "open" else []
        last.append(own[-1].digest if own else "")
    result.digest = hashlib.sha256("".join(last).encode()).hexdigest()
    if still_open:
        step = int(result.table["step"].to_numpy().max(initial=0))
        result.limit("open", ranks=", ".join(map(str, still_open)), step=step)


def _check_end(result: Audit, end: Path | None, expected: Path, own: list[Link]) -> str:
    """Compares the last parts of a rank with its end; "open" or "closed", as it says."""
    told: Any = None
    if end is not None:
        try:
            told = json.loads(end.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            pass
    well_formed = isinstance(told, dict) and all(isinstance(told.get(name), str) for name in ("part", "sha256"))
    there = [("", ""), *((link.part.name, link.digest) for link in own)]
    last, digest = there[-1]
    # A run that is killed between a part and its end leaves one part more than the end knows of. Not once it has closed
    # the end, which it opens again before it writes more.
    late = well_formed and told.get("closed") is not True and there[-2:-1] == [(told["part"], told["sha256"])]
    if late:
        result.limit("late_part", part=last)
    elif not well_formed:
        result.add("chain", "end", "–", expected.name)
    elif told["part"] not in dict(there):
        result.add("chain", "part", "–", told["part"], part=expected.name)
    elif told["part"] != last:
        result.add("chain", "end", last, told["part"] or "–", part=expected.name)
    elif told["sha256"] != digest:
        result.add("chain", "SHA-256", digest[:16] or "–", told["sha256"][:16], part=last)
    return "closed" if well_formed and told.get("closed") is True and not late else "open"


def _check_ranks(result: Audit, links: list[Link]) -> None:
    """Every process that made a record is there, with parts, or with an end if it had no pairs; and no other."""
    there = {numbers(link.part)[0] for link in links}
    if (ranks := result.facts.get("ranks")) is None:
        result.limit("no_ranks")
        return
    folder = result.run / "record"
    ends = {rank for rank in range(ranks) if (folder / f"end-{rank:03d}.json").is_file()}
    for rank in sorted((there | ends) ^ set(range(ranks))):
        holds, follows = (f"rank {rank}", f"ranks below {ranks}") if rank in there else ("–", f"rank {rank}")
        result.add("rank", "ranks", holds, follows)


def _note_unknown(result: Audit, rows: Columns) -> None:
    """What can't be checked, because the run didn't know it."""
    facts = result.facts
    if begins := facts.get("begins_after"):
        result.limit("begins_after", step=begins)
    if others := facts.get("states_of_others"):
        result.limit("states_of_others", states=", ".join(others))
    for split in dict.fromkeys(rows["split"]):
        own = rows["split"] == split
        for name, unknown in (
            ("no_row", rows["row"] < 0),
            ("no_id", rows["pair_id"] == ""),
            ("no_epoch", rows["train"] & np.isnan(rows["epoch"])),
        ):
            if n := int((own & unknown).sum()):
                result.limit(name, split=split, n=f"{n:,}")
        if split in _streams(facts):
            result.limit("stream", split=split)
        elif split not in facts.get("pairs", {}) and (own & (rows["row"] >= 0)).any():
            result.limit("no_pairs", split=split)


def _streams(facts: dict[str, Any]) -> list[str]:
    """The splits that came as streams: a row is a place in one pass, and how many there are nobody knows."""
    return facts.get("streams", [])


def _check_steps(result: Audit, rows: Columns) -> None:
    """Every step, micro-batch and rank is there, and the record reaches as far as the run."""
    train = rows["train"]
    step, rank = rows["step"][train], rows["rank"][train]
    steps, count = np.unique(step, return_counts=True)
    first, last = int(result.facts.get("begins_after", 0)) + 1, int(steps.max(initial=0))
    there = np.concatenate([[first - 1], steps[steps >= first]]).tolist()
    for one, other in itertools.pairwise(there):
        if other > one + 1:
            result.add("gap", "step", "–", _range(one + 1, other - 1), step=one + 1)
    done = steps_done(result.run, result.facts.get("states_of_others", ()))
    if done > last:
        result.add("end", "step", last, done)

    # At the end of an epoch there may be pairs for some ranks only.
    ends = _ends_of_epochs(result, rows)
    inner = ~np.isin(steps, ends)
    if inner.any():
        usual = int(np.bincount(count[inner]).argmax())
        fewer = np.flatnonzero(inner & (count < usual))
        if "per_device_train_batch_size" in result.facts.get("training_arguments", {}):
            for i in fewer:
                result.add("short", "pairs", count[i], usual, step=int(steps[i]))
        elif len(fewer):
            result.limit("no_batch_size", n=f"{len(fewer):,}", usual=f"{usual:,}")
    for one in range(max(result.facts.get("ranks", 0), int(rank.max(initial=-1)) + 1)):
        for begin, end in _ranges(np.setdiff1d(steps, np.concatenate([step[rank == one], ends]))):
            result.add("rank", f"step, rank {one}", "–", _range(begin, end), step=begin)

    _, split = np.unique(rows["split"], return_inverse=True)
    places = np.stack([split, rows["step"], rows["rank"], rows["micro"]], 1)
    _, index, inverse = np.unique(places[:, :3], axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    micros = np.zeros(len(index), np.int64)
    np.maximum.at(micros, inverse, rows["micro"].astype(np.int64) + 1)
    _, unique_index = np.unique(places, axis=0, return_index=True)
    there = np.bincount(inverse[unique_index], minlength=len(index))
    for i in np.flatnonzero(there < micros):
        at = index[i]
        column, part = f"micro, rank {rows['rank'][at]}", str(rows["part"][at])
        result.add("gap", column, there[i], micros[i], step=int(rows["step"][at]), part=part)


def _check_pairs(result: Audit, rows: Columns) -> None:
    """Every pair is there once an epoch and once an evaluation, as far as rows and their number are known."""
    known = rows["row"] >= 0
    for split in dict.fromkeys(rows["split"]):
        own = (rows["split"] == split) & known
        if split not in _streams(result.facts):
            _check_ids(result, rows, np.flatnonzero(own & (rows["pair_id"] != "")))
        if split == TRAIN:
            _check_epochs(result, rows, np.flatnonzero(own & ~np.isnan(rows["epoch"])))
        else:
            _check_evaluations(result, rows, split, np.flatnonzero(own))


def _check_ids(result: Audit, rows: Columns, of: np.ndarray) -> None:
    """A row of the data has one id; ``of`` are the places to look at."""
    ids = rows["pair_id"][of]
    _, first, inverse = np.unique(rows["row"][of], return_index=True, return_inverse=True)
    other, then = np.zeros(len(rows["row"]), bool), np.full(len(rows["row"]), "", object)
    other[of], then[of] = ids != ids[first][inverse], ids[first][inverse]
    result.name_rows(rows, "id", "pair_id", other, then)


def _check_epochs(result: Audit, rows: Columns, of: np.ndarray) -> None:
    arguments = result.facts.get("training_arguments", {})
    epoch = _passes(rows["epoch"][of])
    if arguments.get("ignore_data_skip"):  # a resumed run then begins its epoch's data again
        result.limit("ignore_data_skip")
    elif TRAIN in _streams(result.facts) or TRAIN in result.facts.get("pairs", {}):
        double = np.zeros(len(rows["row"]), bool)
        double[of] = _again(epoch, rows["row"][of])
        result.name_rows(rows, "double", "row", double, "–")
    least = _least(result, rows)
    if arguments.get("dataloader_drop_last") and "per_device_train_batch_size" not in arguments:
        result.limit("drop_last")
    epochs = np.unique(epoch)
    closed = not {"open", "late_part"} & {name for name, _ in result.limits}
    for one in epochs[1:] if result.facts.get("begins_after") else epochs:
        there = len(np.unique(rows["row"][of][epoch == one]))
        if there < least and one < epochs[-1]:
            result.add("missing", "pairs", there, least, least - there, epoch=int(one))
        elif there < least and closed:  # the run may have been told to end there
            result.limit("last_epoch", n=f"{there:,}", of=f"{_pairs(result, TRAIN):,}")


def _check_evaluations(result: Audit, rows: Columns, split: str, of: np.ndarray) -> None:
    least = _least(result, rows, split)
    for step in np.unique(rows["step"][of]):
        # After one step there may be several evaluations, each of all pairs.
        row, times = np.unique(rows["row"][of][rows["step"][of] == step], return_counts=True)
        usual = int(np.median(times))
        for r, n in zip(row[times != usual], times[times != usual], strict=True):
            result.add("double" if n > usual else "missing", split, n, usual, step=int(step), row=int(r))
        if len(row) < least:
            result.add("missing", f"{split} pairs", len(row), least, least - len(row), step=int(step))


def _pairs(result: Audit, split: str) -> int:
    """Pairs of a split, as the run counted them; 0 where it couldn't, or didn't say."""
    if split in _streams(result.facts):
        return 0
    return result.facts.get("pairs", {}).get(split, 0)


def _least(result: Audit, rows: Columns, split: str = TRAIN) -> int:
    """The fewest pairs of an evaluation, or an epoch of training that is over; 0 where nobody knows how many it has."""
    pairs, arguments = _pairs(result, split), result.facts.get("training_arguments", {})
    if not arguments.get("dataloader_drop_last"):
        return pairs
    # Less than one batch of every rank was left out.
    ranks = result.facts.get("ranks") or len(np.unique(rows["rank"][rows["train"]]))
    size = "per_device_train_batch_size" if split == TRAIN else "per_device_eval_batch_size"
    return max(pairs - ranks * arguments.get(size, pairs) + 1, 0)


def _passes(epoch: np.ndarray) -> np.ndarray:
    """Whole passes over the data: ten times 0.1 is one, though floats add up to less."""
    return np.floor(epoch + FRACTION).astype(np.int64)


def _again(epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which places hold an (epoch, row) that an earlier place holds."""
    order = np.lexsort([row, epoch])  # stable
    same = (np.diff(epoch[order]) == 0) & (np.diff(row[order]) == 0)
    again = np.zeros(len(row), bool)
    again[order[1:][same]] = True
    return again


def _ends_of_epochs(result: Audit, rows: Columns) -> np.ndarray:
    """The last step of every epoch that is over: another has begun, or all its pairs are there.

    And every step of which the epoch isn't known, for it may be one.
    """
    known = rows["train"] & ~np.isnan(rows["epoch"])
    epoch, step = _passes(rows["epoch"][known]), rows["step"][known]
    unknown = np.unique(rows["step"][rows["train"] & ~known])
    if not len(epoch):
        return unknown
    last = epoch.max()
    ends = [step[epoch == one].max() for one in np.unique(epoch) if one < last]
    of_last = rows["row"][known][epoch == last]
    # Of a stream, and without rows, nobody knows whether the last one is over.
    if len(np.unique(of_last[of_last >= 0])) >= _least(result, rows):
        ends.append(step.max())
    return np.concatenate([np.array(ends, np.int64), unknown])


def _ranges(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Runs of consecutive integers, as (first, last)."""
    pieces = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [(int(piece[0]), int(piece[-1])) for piece in pieces if len(piece)]


def _range(first: int, last: int) -> str:
    return f"{first}–{last}" if last > first else str(first)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("audit", help="check a run's record against itself")
    parser.add_argument("run", type=Path, help="folder of the run, with record/ and run.json")
    parser.set_defaults(run_command=_command)


def _command(given: argparse.Namespace) -> int:
    result = audit(given.run)
    print(f"{result.run / 'record'}: {result}\nSHA-256 of its end: {result.digest}")
    return 0 if result.ok else 1
