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
import torch

from ..pair import BETA_DPO_MOMENTUM, beta_dpo, losses_and_coefficients, lsc_dpo, pair_beta, perturbation_step
from .recorder import BEFORE, END, SCHEMA, TRAIN, in_order, numbers, parts
from .run import steps_done
from .schema import check_columns, read_facts
from .words import words

# A figure may differ from what follows by 8 roundings of float32, relative to the largest number that went into it.
ROUNDING = 8 * 2.0**-24
SHOWN = 50
Columns = dict[str, np.ndarray]


@dataclass
class Finding:
    """One thing that is not as it must be.

    kind: "value", a figure that does not follow; "unreadable", a part; "chain", a part that was altered, moved or
        removed after it was written; "gap", steps or micro-batches that are missing; "rank", steps that one process
        lacks; "short", a step with fewer pairs than the others; "double", a pair that comes again; "missing", pairs
        that an epoch or evaluation lacks; "id", a row of the data with two ids; "end", a record that ends before its
        run.
    The place is given as far as there is one: part, place in the part (from 0), epoch (from 0), step, row of the data,
    pair id. ``holds`` and ``follows`` are values, or counts of what ``column`` names, "–" for none.
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
        self.findings.append(Finding(kind, column, str(holds), str(follows), **where))
        self.counts[kind] += count

    def unchecked(self, language: str = "en") -> list[str]:
        """What could not be checked, in sentences."""
        say = words("limits", language)
        return [say[name].format(**values) for name, values in self.limits]

    def __str__(self) -> str:
        counted = (
            f"{len(self.table):,} rows, {self.steps:,} training steps, {self.parts:,} part{'s' * (self.parts != 1)}"
        )
        found = sum(self.counts.values())
        lines = [f"NOT OK, {found:,} finding{'s' * (found != 1)} in {counted}" if found else f"OK, {counted}"]
        lines += [f"  {finding}" for finding in self.findings[:SHOWN]]
        if found > SHOWN:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())
            lines.append(f"  … the first {min(SHOWN, len(self.findings))} are shown of: {kinds}")
        return "\n".join([*lines, *(f"  not checked: {line}" for line in self.unchecked())])


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
            unreadable.append((part.name, " ".join(str(error).split())[:200]))
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
    rows = columns(result.table)
    rows["train"] = rows["split"] == TRAIN
    _note_unknown(result, rows)
    _check_values(result, rows)
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
        result.limits.append(("open", {"ranks": ", ".join(map(str, still_open)), "step": step}))


def _check_end(result: Audit, end: Path | None, expected: Path, own: list[Link]) -> str:
    """Compares the last parts of a rank with its end; "open" or "closed", as it says."""
    told: Any = None
    if end is not None:
        try:
            told = json.loads(end.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            pass
    well_formed = isinstance(told, dict) and all(isinstance(told.get(name), str) for name in ("part", "sha256"))
    digests = [link.digest for link in own]
    # A run that is killed between a part and its end leaves one part more than the end knows of.
    late = well_formed and digests[-2:-1] == [told["sha256"]] or end is None and len(own) == 1
    if late:
        result.limits.append(("late_part", {"part": own[-1].part.name}))
    elif not well_formed:
        result.add("chain", "end", "–", expected.name)
    elif told["part"] not in [link.part.name for link in own]:
        result.add("chain", "part", "–", told["part"], part=expected.name)
    elif digests[-1] != told["sha256"]:
        if told["part"] == own[-1].part.name:
            result.add("chain", "SHA-256", digests[-1][:16], told["sha256"][:16], part=told["part"])
        else:
            result.add("chain", "end", own[-1].part.name, told["part"], part=expected.name)
    return "closed" if well_formed and told.get("closed") is True and not late else "open"


def _note_unknown(result: Audit, rows: Columns) -> None:
    """What can't be checked, because the run didn't know it."""
    facts = result.facts
    if begins := facts.get("begins_after"):
        result.limits.append(("begins_after", {"step": begins}))
    if others := facts.get("states_of_others"):
        result.limits.append(("states_of_others", {"states": ", ".join(map(str, others))}))
    for split in dict.fromkeys(rows["split"]):
        own = rows["split"] == split
        for name, unknown in (
            ("no_row", rows["row"] < 0),
            ("no_id", rows["pair_id"] == ""),
            ("no_epoch", rows["train"] & np.isnan(rows["epoch"])),
        ):
            if n := int((own & unknown).sum()):
                result.limits.append((name, {"split": split, "n": f"{n:,}"}))
        if split in _streams(facts):
            result.limits.append(("stream", {"split": split}))
        elif split not in facts.get("pairs", {}) and (own & (rows["row"] >= 0)).any():
            result.limits.append(("no_pairs", {"split": split}))


def _streams(facts: dict[str, Any]) -> list[str]:
    """The splits that came as streams: a row is a place in one pass, and how many there are nobody knows."""
    return facts.get("streams", [])


def _name_rows(result: Audit, rows: Columns, kind: str, column: str, bad: np.ndarray, follows: Any) -> None:
    """A finding for every row in a mask, or for the first of them."""
    where = np.flatnonzero(bad)
    follows = np.broadcast_to(follows, bad.shape)
    for i in where[:SHOWN]:
        holds, then = (_short(values[i]) for values in (rows[column], follows))
        result.add(
            kind, column, holds, then, part=str(rows["part"][i]), place=int(rows["place"][i]),
            step=int(rows["step"][i]), row=int(rows["row"][i]) if rows["row"][i] >= 0 else None,
            pair_id=str(rows["pair_id"][i]),
        )  # fmt: skip
    if len(where) > SHOWN:
        result.counts[kind] += len(where) - SHOWN


def _short(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)


def _differ(holds: np.ndarray, follows: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Where two columns differ by more than rounding; a NaN follows from a NaN."""
    with np.errstate(invalid="ignore"):
        near = np.abs(holds.astype(np.float64) - follows) <= ROUNDING * np.asarray(scale)
    return ~(near | (holds == follows) | (np.isnan(holds) & np.isnan(follows)))


def _check_values(result: Audit, rows: Columns) -> None:
    """Everything that follows from other columns of its row and from the step before."""
    options = result.facts["options"]
    method, epsilon = options["method"], options["epsilon"] if options["method"] == "eps-dpo" else 0.0
    smoothing = options["label_smoothing"]
    for name, value in (("method", method), ("epsilon", epsilon), ("label_smoothing", smoothing)):
        told = np.float32(value) if isinstance(value, float | int) else value
        _name_rows(result, rows, "value", name, rows[name] != told, told)

    # Training moves the last step's policy; an evaluation may be one of an earlier checkpoint.
    done = rows["step"] - rows["train"]
    ahead = np.where(rows["train"], rows["policy_step"] != done, rows["policy_step"] > done)
    _name_rows(result, rows, "value", "policy_step", ahead, done)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(rows[name].astype(np.float64))

    step = perturbation_step(tensor("relaxed_shift"), tensor("tightened_shift")).numpy()
    if method != "eps-dpo":
        step = np.zeros_like(step)
    vetoed = _vetoed(rows, step, options.get("veto") or [])
    _name_rows(result, rows, "value", "vetoed", rows["vetoed"] != vetoed, vetoed)
    decision = np.where(vetoed, 0, step).astype(np.int8)
    _name_rows(result, rows, "value", "decision", rows["decision"] != decision, decision)

    beta, beta_used = _betas(result, rows, decision)
    _name_rows(result, rows, "value", "beta", _differ(rows["beta"], beta, beta), beta.astype(np.float32))
    used = _differ(rows["beta_used"], beta_used, np.maximum(beta, beta_used))
    _name_rows(result, rows, "value", "beta_used", used, beta_used.astype(np.float32))

    logps = [tensor(name) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")]
    margin = ((logps[0] - logps[1]) - (logps[2] - logps[3])).numpy()
    size = torch.stack(logps).abs().sum(0).numpy()
    _name_rows(result, rows, "value", "margin", _differ(rows["margin"], margin, size), margin.astype(np.float32))
    losses, coefficients = losses_and_coefficients(tuple(logps), torch.from_numpy(beta_used), smoothing)
    # A shift that is not finite stops a run, however finite the log-probs are.
    shifts = np.isfinite(rows["relaxed_shift"]) & np.isfinite(rows["tightened_shift"])
    loss, coefficient = (np.where(shifts, t.numpy(), np.nan) for t in (losses, coefficients))
    # beta-dpo leaves pairs out: β 0 and no loss at all, where the loss at β 0 would be log 2.
    loss = np.where(beta_used == 0, 0, loss)
    logit = 1 + beta_used * size
    _name_rows(result, rows, "value", "loss", _differ(rows["loss"], loss, logit), loss.astype(np.float32))
    weight = _differ(rows["coefficient"], coefficient, beta_used * logit)
    _name_rows(result, rows, "value", "coefficient", weight, coefficient.astype(np.float32))


def _vetoed(rows: Columns, step: np.ndarray, veto: list[str]) -> np.ndarray:
    """Relaxations that a second signal withholds: entropy of the chosen answer, or KL of the pair, above its bound."""
    bounds = {name: float(value) for name, _, value in (bound.partition("=") for bound in veto)}
    signals = {"entropy": rows["chosen_entropy"], "kl": rows["chosen_kl"] + rows["rejected_kl"]}
    above = np.zeros(len(step), bool)
    for name, bound in bounds.items():
        # A signal that is its bound but for rounding may have fallen on either side: there the record's word stands.
        signal = signals[name].astype(np.float64)
        near = np.abs(signal - bound) <= ROUNDING * (abs(bound) + 1)
        above |= np.where(near, rows["vetoed"], signal > bound)
    return above & (step == 1)


def _betas(result: Audit, rows: Columns, decision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) running β and (N,) β used that follow, float64.

    The running β of a step follows from that of the step before. Where that step is missing, it is what most rows of
    the step hold.
    """
    options, train = result.facts["options"], rows["train"]
    if options["method"] == "beta-dpo":
        return _beta_dpo_betas(options, rows)
    steps, first, group, count = np.unique(
        rows["step"][train], return_index=True, return_inverse=True, return_counts=True
    )
    by_value = np.lexsort([rows["beta"][train], group])
    held = rows["beta"][train][by_value[first + count // 2]].astype(np.float64)  # rows are in the order of their steps
    relaxed, tightened = (np.bincount(group, decision[train] == sign) for sign in (1, -1))
    epsilon, update = options["epsilon"], options["beta_update"]
    if options["method"] == "lsc-dpo":
        after = _lsc_dpo_after(options, rows, held, group, count)
    elif options["method"] != "eps-dpo" or update == "none":
        after = held
    elif update == "mean-step":
        after = held / (1 + epsilon * (relaxed - tightened) / count)
    else:
        after = held * (relaxed / (1 + epsilon) + (count - relaxed - tightened) + tightened / (1 - epsilon)) / count
    # β after each step that was taken, and at the start: what the next step, and an evaluation of that policy, works
    # with.
    start = np.nan if result.facts.get("begins_after") else np.float32(options["beta"])
    done, known = np.concatenate([[0], steps]), np.concatenate([[start], after])
    before = np.where(train, rows["step"] - 1, rows["policy_step"])
    place = np.minimum(np.searchsorted(done, before), len(done) - 1)
    beta = np.where(done[place] == before, known[place], np.nan)
    own = np.searchsorted(steps, rows["step"]).clip(max=max(len(steps) - 1, 0))
    if len(steps):
        beta = np.where(np.isnan(beta) & train, held[own], beta)
    # An evaluation whose step is missing has nothing to follow from but itself.
    beta = np.where(np.isnan(beta), rows["beta"], beta)
    used = pair_beta(torch.from_numpy(decision), torch.from_numpy(beta), epsilon if epsilon else 0.0).numpy()
    return beta, used


def _lsc_dpo_after(
    options: dict[str, Any], rows: Columns, held: np.ndarray, group: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """β after each training step of lsc-dpo, from its β and its pairs' margins; see :func:`pair.lsc_dpo`."""
    chosen, rejected, ref_chosen, ref_rejected = (
        rows[name][rows["train"]] for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    )
    # Worked out again in float32, as the loss does: β may amplify a rounding of the margin.
    margin = np.bincount(group, ((chosen - rejected) - (ref_chosen - ref_rejected)).astype(np.float64)) / count
    settings = [options[name] for name in ("lsc_z_star", "lsc_eta", "lsc_tau_start")]
    return np.array([lsc_dpo(*step, *settings) for step in zip(held.tolist(), margin.tolist(), strict=True)])


def _beta_dpo_betas(options: dict[str, Any], rows: Columns) -> tuple[np.ndarray, np.ndarray]:
    """The same for beta-dpo, whose β moves with every micro-batch's margins; see :func:`pair.beta_dpo`."""
    base, alpha = options["beta"], options["beta_dpo_alpha"]
    beta, used = rows["beta"].astype(np.float64), rows["beta_used"].astype(np.float64)
    train = np.flatnonzero(rows["train"])
    kept = rows["beta_used"] > 0
    place = rows["step"][train] * (int(rows["micro"].max(initial=0)) + 1) + rows["micro"][train]
    _, group, count = np.unique(place, return_inverse=True, return_counts=True)
    margin = rows["margin"].astype(np.float64)[train]
    mean = np.bincount(group, margin) / count
    mean_kept = np.bincount(group, margin * kept[train]) / np.maximum(np.bincount(group, kept[train]), 1)
    batches = rows["step"][train][np.concatenate([[0], np.cumsum(count)[:-1]])] if len(train) else train
    running, average, after = float(np.float32(base)), 0.0, {0: float(np.float32(base))}
    before, moved = np.full(len(count), np.nan), np.full(len(count), np.nan)
    for i, step in enumerate(batches.tolist()):
        if step > (batches[i - 1] + 1 if i else 1):
            break  # past a gap, and where the record begins late, the moving average is not known
        average = BETA_DPO_MOMENTUM * average + (1 - BETA_DPO_MOMENTUM) * mean[i]
        before[i] = running
        running = moved[i] = beta_dpo(base, alpha, mean_kept[i], average)
        after[step] = running
    known = ~np.isnan(before[group])
    beta[train] = np.where(known, before[group], beta[train])
    used[train] = np.where(known & kept[train], moved[group], used[train])
    evaluated = np.flatnonzero(~rows["train"])
    beta[evaluated] = [
        after.get(step, held) for step, held in zip(rows["policy_step"][evaluated], beta[evaluated], strict=True)
    ]
    used[evaluated] = beta[evaluated]
    return beta, used


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
        for i in np.flatnonzero(inner & (count != usual)):
            result.add("short", "pairs", count[i], usual, step=int(steps[i]))
    for one in range(int(rank.max(initial=0)) + 1):
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
    _name_rows(result, rows, "id", "pair_id", other, then)


def _check_epochs(result: Audit, rows: Columns, of: np.ndarray) -> None:
    arguments = result.facts.get("training_arguments", {})
    epoch = np.floor(rows["epoch"][of]).astype(np.int64)
    if not arguments.get("ignore_data_skip"):  # a resumed run then begins its epoch's data again
        double = np.zeros(len(rows["row"]), bool)
        double[of] = _again(epoch, rows["row"][of])
        _name_rows(result, rows, "double", "row", double, "–")
    least = _least_of_an_epoch(result, rows)
    over = np.unique(epoch)[:-1]  # the last one may still go on
    if result.facts.get("begins_after"):
        over = over[1:]
    for one in over:
        there = len(np.unique(rows["row"][of][epoch == one]))
        if there < least:
            result.add("missing", "pairs", there, least, least - there, epoch=int(one))


def _check_evaluations(result: Audit, rows: Columns, split: str, of: np.ndarray) -> None:
    pairs = _pairs(result, split)
    for step in np.unique(rows["step"][of]):
        # After one step there may be several evaluations, each of all pairs.
        row, times = np.unique(rows["row"][of][rows["step"][of] == step], return_counts=True)
        usual = int(np.median(times))
        for r, n in zip(row[times != usual], times[times != usual], strict=True):
            result.add("double" if n > usual else "missing", split, n, usual, step=int(step), row=int(r))
        if len(row) < pairs:
            result.add("missing", f"{split} pairs", len(row), pairs, pairs - len(row), step=int(step))


def _pairs(result: Audit, split: str) -> int:
    """Pairs of a split, as the run counted them; 0 where it couldn't, or didn't say."""
    if split in _streams(result.facts):
        return 0
    return result.facts.get("pairs", {}).get(split, 0)


def _least_of_an_epoch(result: Audit, rows: Columns) -> int:
    """The fewest pairs of an epoch of training that is over; 0 where nobody knows how many there are."""
    pairs, arguments = _pairs(result, TRAIN), result.facts.get("training_arguments", {})
    if not arguments.get("dataloader_drop_last"):
        return pairs
    # Less than one batch of every rank was left out.
    batches = len(np.unique(rows["rank"][rows["train"]])) * arguments.get("per_device_train_batch_size", pairs)
    return max(pairs - batches + 1, 0)


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
    epoch, step = np.floor(rows["epoch"][known]).astype(np.int64), rows["step"][known]
    unknown = np.unique(rows["step"][rows["train"] & ~known])
    if not len(epoch):
        return unknown
    last = epoch.max()
    ends = [step[epoch == one].max() for one in np.unique(epoch) if one < last]
    of_last = rows["row"][known][epoch == last]
    # Of a stream, and without rows, nobody knows whether the last one is over.
    if len(np.unique(of_last[of_last >= 0])) >= _least_of_an_epoch(result, rows):
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
