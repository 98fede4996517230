"""``epsdpo audit RUN``: checks a run's record against itself, and says OK or where not.

Every figure that follows from others in the record is worked out again from those: the decision from the shifts, the β
of a pair from decision, ε and running β, margin, loss and coefficient from the log-probs, the running β of a step from
the one before it. So a figure that was altered is named where it stands, and only there. The same goes for what must be
there: every step, micro-batch, rank and pair, once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..pair import BETA_DPO_MOMENTUM, beta_dpo, losses_and_coefficients, lsc_dpo, pair_beta, perturbation_step
from .recorder import SCHEMA, SPLITS, parts

# A figure may differ from what follows by 8 roundings of float32, relative to the largest number that went into it.
ROUNDING = 8 * 2.0**-24
SHOWN = 50
Columns = dict[str, np.ndarray]


@dataclass
class Finding:
    """One thing that is not as it must be.

    kind: "value", a figure that does not follow; "unreadable", a part; "gap", steps or micro-batches that are missing;
        "rank", steps that one process lacks; "short", a step with fewer pairs than the others; "double", a pair that
        comes again; "missing", pairs that an epoch or evaluation lacks; "id", a row of the data with two ids; "end", a
        record that ends before its run.
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
        counts: findings by kind; ``findings`` holds the first 50 of each kind and column.
    """

    run: Path
    facts: dict[str, Any]
    table: pa.Table
    parts: int
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def steps(self) -> int:
        """Training steps in the record."""
        return len(np.unique(self.table["step"].to_numpy()[self.table["split"].to_numpy() == SPLITS[0]]))

    def add(self, kind: str, column: str, holds: Any, follows: Any, count: int = 1, **where) -> None:
        self.findings.append(Finding(kind, column, str(holds), str(follows), **where))
        self.counts[kind] += count

    def __str__(self) -> str:
        counted = (
            f"{len(self.table):,} rows, {self.steps:,} training steps, {self.parts:,} part{'s' * (self.parts != 1)}"
        )
        if self.ok:
            return f"OK, {counted}"
        found = sum(self.counts.values())
        lines = [f"NOT OK, {found:,} finding{'s' * (found != 1)} in {counted}"]
        lines += [f"  {finding}" for finding in self.findings[:SHOWN]]
        if found > SHOWN:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())
            lines.append(f"  … the first {min(SHOWN, len(self.findings))} are shown of: {kinds}")
        return "\n".join(lines)


def audit(run: Path) -> Audit:
    """Checks the record in ``run``.

    Raises:
        FileNotFoundError: the folder holds no run.json, or no part of a record that can be read.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"run: {run} holds no run.json")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8", errors="replace"))
    found = parts(run / "record")
    tables, unreadable = [], []
    for part in found:
        try:
            table = pq.read_table(part)
            table.validate(full=True)  # text that is no UTF-8, too
            if not table.schema.equals(SCHEMA):
                raise ValueError("its columns are not the schema's")
        except (pa.ArrowException, OSError, ValueError) as error:
            unreadable.append((part.name, " ".join(str(error).split())[:200]))
            continue
        names = pa.array([part.name]).dictionary_encode().take(pa.array(np.zeros(len(table), np.int32)))
        tables.append(table.append_column("part", names).append_column("place", pa.array(np.arange(len(table)))))
    if not tables:
        raise FileNotFoundError(f"run: {run / 'record'} holds no part of a record that can be read")
    table = pa.concat_tables(tables).unify_dictionaries()
    split = table["split"].to_numpy() != SPLITS[0]
    table = table.take(np.lexsort([*(table[name].to_numpy() for name in ("rank", "micro", "step")), split]))
    result = Audit(run, facts, table, len(found))
    for name, problem in unreadable:
        result.add("unreadable", "part", problem, "a part of a record", part=name)
    rows = columns(table)
    rows["train"] = rows["split"] == SPLITS[0]
    _check_values(result, rows)
    _check_steps(result, rows)
    _check_pairs(result, rows)
    return result


def columns(table: pa.Table) -> Columns:
    """A record's columns as arrays: numbers as they are stored, text as objects."""
    return {name: table[name].to_numpy() for name in table.column_names}


def _name_rows(result: Audit, rows: Columns, kind: str, column: str, bad: np.ndarray, follows: Any) -> None:
    """A finding for every row in a mask, or for the first of them."""
    where = np.flatnonzero(bad)
    follows = np.broadcast_to(follows, bad.shape)
    for i in where[:SHOWN]:
        holds, then = (_short(values[i]) for values in (rows[column], follows))
        result.add(
            kind, column, holds, then, part=str(rows["part"][i]), place=int(rows["place"][i]),
            step=int(rows["step"][i]), row=int(rows["row"][i]), pair_id=str(rows["pair_id"][i]),
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
    used = _differ(rows["beta_used"], beta_used, rows["beta"])
    _name_rows(result, rows, "value", "beta_used", used, beta_used.astype(np.float32))

    logps = [tensor(name) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")]
    margin = ((logps[0] - logps[1]) - (logps[2] - logps[3])).numpy()
    size = torch.stack(logps).abs().sum(0).numpy()
    _name_rows(result, rows, "value", "margin", _differ(rows["margin"], margin, size), margin.astype(np.float32))
    losses, coefficients = losses_and_coefficients(tuple(logps), torch.from_numpy(beta_used), smoothing)
    loss, coefficient = (t.detach().numpy() for t in (losses, coefficients))
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
    # β after each step that was taken, and at the start: what the next step, and an evaluation, works with.
    done, known = np.concatenate([[0], steps]), np.concatenate([[np.float32(options["beta"])], after])
    before = rows["step"] - train
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
            break  # past a gap, the moving average is not known
        average = BETA_DPO_MOMENTUM * average + (1 - BETA_DPO_MOMENTUM) * mean[i]
        before[i] = running
        running = moved[i] = beta_dpo(base, alpha, mean_kept[i], average)
        after[step] = running
    known = ~np.isnan(before[group])
    beta[train] = np.where(known, before[group], beta[train])
    used[train] = np.where(known & kept[train], moved[group], used[train])
    evaluated = np.flatnonzero(~rows["train"])
    beta[evaluated] = [
        after.get(step, held) for step, held in zip(rows["step"][evaluated], beta[evaluated], strict=True)
    ]
    used[evaluated] = beta[evaluated]
    return beta, used


def _check_steps(result: Audit, rows: Columns) -> None:
    """Every step, micro-batch and rank is there, and the record reaches as far as the run."""
    train = rows["train"]
    step, rank = rows["step"][train], rows["rank"][train]
    steps, count = np.unique(step, return_counts=True)
    last = int(steps.max(initial=0))
    for first, end in _ranges(np.setdiff1d(np.arange(1, last + 1), steps)):
        result.add("gap", "step", "–", _range(first, end), step=first)
    done = _steps_done(result.run)
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
        for first, end in _ranges(np.setdiff1d(steps, np.concatenate([step[rank == one], ends]))):
            result.add("rank", f"step, rank {one}", "–", _range(first, end), step=first)

    places = np.stack([~train, rows["step"], rows["rank"], rows["micro"]], 1)
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
    """Every pair is there once an epoch and once an evaluation."""
    train, facts = rows["train"], result.facts
    for split in (True, False):
        of = np.flatnonzero(train == split)
        row, ids = rows["row"][of], rows["pair_id"][of]
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        other = np.zeros(len(train), bool)
        other[of] = ids != ids[first][inverse]
        then = np.full(len(train), "", object)
        then[of] = ids[first][inverse]
        _name_rows(result, rows, "id", "pair_id", other, then)

    of = np.flatnonzero(train)
    epoch = np.floor(rows["epoch"][of]).astype(np.int64)
    double = np.zeros(len(train), bool)
    double[of] = _again(epoch, rows["row"][of])
    _name_rows(result, rows, "double", "row", double, "–")
    pairs = facts.get("train_pairs", len(np.unique(rows["row"][of])))
    if not facts.get("training_arguments", {}).get("dataloader_drop_last"):
        for one in np.unique(epoch)[:-1]:  # the last one may still go on
            there = len(np.unique(rows["row"][of][epoch == one]))
            if there < pairs:
                result.add("missing", "pairs", there, pairs, pairs - there, epoch=int(one))

    of = np.flatnonzero(~train)
    for step in np.unique(rows["step"][of]):
        # After one step there may be several evaluations, each of all pairs.
        row, times = np.unique(rows["row"][of][rows["step"][of] == step], return_counts=True)
        usual = int(np.median(times))
        for r, n in zip(row[times != usual], times[times != usual], strict=True):
            result.add("double" if n > usual else "missing", "eval", n, usual, step=int(step), row=int(r))
        if len(row) < facts.get("eval_pairs", 0):
            there, pairs = len(row), facts["eval_pairs"]
            result.add("missing", "eval pairs", there, pairs, pairs - there, step=int(step))


def _again(epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which places hold an (epoch, row) that an earlier place holds."""
    order = np.lexsort([row, epoch])  # stable
    same = (np.diff(epoch[order]) == 0) & (np.diff(row[order]) == 0)
    again = np.zeros(len(row), bool)
    again[order[1:][same]] = True
    return again


def _ends_of_epochs(result: Audit, rows: Columns) -> np.ndarray:
    """The last step of every epoch that is over: another has begun, or all its pairs are there."""
    train = rows["train"]
    epoch = np.floor(rows["epoch"][train]).astype(np.int64)
    if not len(epoch):
        return epoch
    last = epoch.max()
    ends = [rows["step"][train][epoch == one].max() for one in np.unique(epoch) if one < last]
    of_last = rows["row"][train][epoch == last]
    if len(np.unique(of_last)) >= result.facts.get("train_pairs", 0):
        ends.append(rows["step"][train].max())
    return np.array(ends, np.int64)


def _steps_done(run: Path) -> int:
    """The most optimizer steps that a state of the run counts; a state that a kill cut short counts none."""
    done = 0
    for state in (run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")):
        try:
            done = max(done, int(json.loads(state.read_text(encoding="utf-8"))["global_step"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return done


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
    print(f"{result.run / 'record'}: {result}")
    return 0 if result.ok else 1
