"""The record of a run: what the loss returned, as rows, and what the run was told, in run.json."""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .. import __version__
from ..pair import losses_and_coefficients
from .recorder import END, TRAIN, Recorder, parts, write_file
from .schema import check_facts, read_facts

if TYPE_CHECKING:
    from ..linear import EpsilonDPOOutput

STATE = "trainer_state.json"


class Record:
    """Writes ``run/record/`` and ``run/run.json``, which ``epsdpo audit`` and ``epsdpo report`` read.

    Every rank that has pairs of its own makes one; ranks that share their pairs (a ``vocab_group``, a
    ``sequence_group``) make one together. Call :meth:`append` after each call of the loss, :meth:`flush` when a
    checkpoint is saved, and :meth:`close` in the end.

    Args:
        run: folder of the run; made where missing.
        loss_fn: an :class:`epsdpo_kernels.EpsilonDPOLoss`, of which β and the settings are read.
        options: of the run, over those of ``loss_fn``. ``dataset`` is where ``epsdpo report --texts`` finds the texts:
            a file or a list of files, or a hub name with ``dataset_split``.
        facts: other things to keep in run.json; ``pairs`` is the number of pairs by split that an epoch or evaluation
            takes, each once, against which the audit counts; ``ranks`` the number of processes that make a record, by
            default 1 where torch.distributed is not in use.
        pairs: data sets by split, with ``row`` and ``pair_id``, in which :meth:`append` looks ids up; their lengths are
            the numbers of pairs where ``facts`` give none.
        label: a categorical column of theirs to carry along.
        rank: of this process, by default torch.distributed's, or 0.
        resume_step: steps in the checkpoint that the run goes on from; see :class:`Recorder`.

    Raises:
        FileExistsError: the run has a record and ``resume_step`` was not given.
        ValueError: options or facts that run.json doesn't take, a run.json there is that can't be read, or pairs
            without a column that they need.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        loss_fn: Any,
        *,
        options: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        pairs: Mapping[str, Any] | None = None,
        label: str | None = None,
        rank: int | None = None,
        resume_step: int | None = None,
    ):
        facts = dict(facts or {})
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
            if not distributed:  # there, ranks that share their pairs make one record, and nobody knows how many do
                facts.setdefault("ranks", 1)
        self.loss_fn, self.run = loss_fn, Path(run)
        begun = bool(parts(self.run / "record"))
        self._pairs = {split: _Pairs(split, data, label) for split, data in (pairs or {}).items() if data is not None}
        told = json.dumps(self._facts(options or {}, facts, begun, resume_step), indent=1, default=str)
        check_facts(json.loads(told), "facts")
        self._recorder = Recorder(self.run / "record", rank, resume_step=resume_step)
        options = json.loads(told)["options"]
        self._decides = options["method"] == "eps-dpo"
        self._constants = {
            "method": options["method"],
            "epsilon": options["epsilon"] if self._decides else 0.0,
            "label_smoothing": options["label_smoothing"],
        }
        self._place, self._micro = ("", 0), 0
        if rank == 0:
            write_file(self.run / "run.json", told.encode())
            if not begun:  # an attempt of more ranks that was killed before its first part
                for end in (self.run / "record").glob("end-*.json"):
                    if (found := END.fullmatch(end.name)) and int(found[1]) >= facts.get("ranks", math.inf):
                        end.unlink()

    def _facts(self, options: Mapping, facts: Mapping, begun: bool, resume_step: int | None) -> dict[str, Any]:
        told: dict[str, Any] = {"version": __version__, "torch": torch.__version__} | dict(facts)
        told["options"] = _settings(self.loss_fn) | dict(options)
        if self._pairs:
            told["pairs"] = {split: len(data) for split, data in self._pairs.items()} | told.get("pairs", {})
        if resume_step is None:
            # A run that begins anew in a folder does not answer for what it finds there.
            if states := [str(path.relative_to(self.run)) for path in _states(self.run)]:
                told["states_of_others"] = states
            return told
        if begun and (self.run / "run.json").is_file():
            old = read_facts(self.run)
            told |= {name: old[name] for name in ("states_of_others", "begins_after") if name in old}
            if "beta" not in options:  # the one at the start; the loss may hold the checkpoint's by now
                told["options"]["beta"] = old["options"]["beta"]
        elif resume_step > 0:
            told["begins_after"] = resume_step
        return told

    def append(
        self,
        out: EpsilonDPOOutput,
        *,
        step: int,
        row: Tensor | Sequence[int] | None = None,
        pair_id: Sequence[str | None] | None = None,
        epoch: float | None = None,
        split: str | None = None,
        policy_step: int | None = None,
        beta: Tensor | float | None = None,
    ) -> None:
        """Adds the pairs of one call of the loss. Reads them back from the device.

        A call in which nothing was scored has no rows. A step of such calls alone is a gap to the audit.

        What isn't given is null in the record, and the audit says what it can't check for want of it.

        Args:
            out: what the loss returned.
            step: optimizer step that the pairs are part of, from 1; in evaluation, steps done before. It never falls.
            row: (B,) places of the pairs in the data, from 0; below 0 where unknown.
            pair_id: (B,) ids; by default those of ``pairs`` at ``row``.
            epoch: passes over the data done before the step, 1.5 in the middle of the second; None where pairs are
                drawn anew at each step, not in passes.
            split: "train", or an evaluation's name; by default "train" or "eval", as ``loss_fn.training`` says.
            policy_step: of an evaluation of an earlier checkpoint, whose policy and β were loaded: the steps in it. By
                default the policy is the one after all steps before.
            beta: () the running β that the call began with; by default the one that ``loss_fn`` holds.

        Raises:
            ValueError: ``out`` does not follow from ``beta``, which moved in between; steps fall, or count from 0; an
                epoch below 0; a ``policy_step`` that isn't there yet, or of training; rows or ids of another number or
                kind than the pairs, or a row that ``pairs`` do not have.
        """
        split = split or (TRAIN if self.loss_fn.training else "eval")
        if not (split == TRAIN) <= step < 2**31:
            counted = "optimizer steps, counted from 1" if split == TRAIN else "optimizer steps done before, from 0"
            raise ValueError(f"step: got {step} of {split!r}, takes {counted}")
        if epoch is not None and not 0 <= epoch < 2**53:
            raise ValueError(f"epoch: got {epoch}, takes passes over the data done before the step, from 0, or None")
        done = step - (split == TRAIN)
        policy_step = done if policy_step is None else policy_step
        if not (policy_step == done or split != TRAIN and 0 <= policy_step < done):
            takes = done if split == TRAIN else f"0 to {done}"
            raise ValueError(f"policy_step: got {policy_step} at step {step} of {split!r}, takes {takes}")
        beta = torch.as_tensor(self.loss_fn.beta if beta is None else beta, device=out.beta.device)
        figures = _figures(out, beta, self._constants["label_smoothing"])
        if not figures["chosen_tokens"].any():
            return
        if self._decides:
            self._check_beta(figures)
        if (split, step) != self._place:
            self._place, self._micro = (split, step), 0
        columns = figures | self._constants | {"split": split, "step": step, "micro": self._micro, "epoch": epoch}
        columns["policy_step"] = policy_step
        columns |= self._identity(split, row, pair_id, len(figures["loss"]))
        self._recorder.append(columns)
        self._micro += 1

    def flush(self) -> None:
        """Writes what was appended. When it returns the rows are on disk."""
        self._recorder.flush()

    def close(self) -> None:
        """Writes what is left, and that the record ends here. A record that is appended to afterwards goes on."""
        self._recorder.close()

    def _check_beta(self, figures: dict[str, Any]) -> None:
        follows = figures["beta"] / (1 + self._constants["epsilon"] * figures["decision"])
        # Less than any step of ε that would move a β in float32; what is not finite is for the audit.
        if (np.abs(figures["beta_used"] / follows - 1) > 1e-6).any():
            raise ValueError(
                f"beta: got {figures['beta'][0]:.9g}, from which the pairs' β do not follow; append what a call of the "
                "loss returned before loss_fn.update_beta()"
            )

    def _identity(self, split: str, row: Any, pair_id: Any, pairs: int) -> dict[str, Any]:
        """Row, id and label of a batch's pairs, as far as they are known."""
        found: dict[str, Any] = {}
        if pair_id is not None:
            found["pair_id"] = _ids(pair_id, pairs)
        if row is not None:
            rows = _rows(row, pairs)
            found["row"] = np.array([one if one >= 0 else None for one in rows.tolist()], object)
            if pair_id is None and split in self._pairs:
                found |= self._pairs[split].at(rows)
        return found


def _rows(row: Any, pairs: int) -> np.ndarray:
    try:
        rows = [operator.index(one) for one in (row.tolist() if hasattr(row, "tolist") else row)]
    except TypeError:
        raise ValueError(f"row: got {row!r:.80}, takes {pairs} integers, below 0 where a row is unknown") from None
    if len(rows) != pairs:
        raise ValueError(f"row: got {len(rows)} rows, takes {pairs}, one a pair")
    return np.array(rows, np.int64)


def _ids(pair_id: Any, pairs: int) -> np.ndarray:
    if isinstance(pair_id, str) or not all(one is None or isinstance(one, str) for one in pair_id):
        raise ValueError(f"pair_id: got {pair_id!r:.80}, takes {pairs} strings, None where an id is unknown")
    if len(pair_id) != pairs:
        raise ValueError(f"pair_id: got {len(pair_id)} ids, takes {pairs}, one a pair")
    return np.array(pair_id, object)


class _Pairs:
    """Ids and labels of a split's pairs by their row."""

    def __init__(self, split: str, data: Any, label: str | None):
        self.split, rows = split, np.array(_column(split, data, "row"), np.int64)
        self.order = np.argsort(rows)
        self.rows = rows[self.order]
        self.columns = {"pair_id": pa.array(list(_column(split, data, "pair_id")), pa.string())}
        if label:
            labels = (None if value is None else str(value) for value in _column(split, data, label))
            self.columns["label"] = pa.array(labels, pa.string()).dictionary_encode()

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: np.ndarray) -> dict[str, list]:
        """The columns at some rows, null where a row is below 0. ValueError: a row that the data don't have."""
        place = np.searchsorted(self.rows, rows).clip(max=max(len(self) - 1, 0))
        there = self.rows[place] == rows if len(self) else np.zeros(len(rows), bool)
        if (rows[~there] >= 0).any():
            absent = sorted(set(rows[~there & (rows >= 0)].tolist()))
            raise ValueError(f"row: got {absent}, which pairs[{self.split!r}] do not have; takes theirs, or below 0")
        places = pa.array(
            [int(self.order[p]) if known else None for p, known in zip(place, there, strict=True)], pa.int64()
        )
        return {name: column.take(places).to_pylist() for name, column in self.columns.items()}


def _column(split: str, data: Any, name: str) -> Any:
    try:
        return data[name]
    except (KeyError, ValueError):  # a mapping's, a datasets.Dataset's
        there = ", ".join(map(repr, getattr(data, "column_names", data)))
        raise ValueError(
            f"pairs[{split!r}]: got {there} without {name!r}, takes row, pair_id, and the column that label names"
        ) from None


def _settings(loss_fn: Any) -> dict[str, Any]:
    """What a loss says of itself, under the names of ``python -m train``'s options."""
    bounds = {"entropy": getattr(loss_fn, "max_entropy", None), "kl": getattr(loss_fn, "max_kl", None)}
    return {
        "method": "eps-dpo",
        "beta": float(str(np.float32(loss_fn.beta.item()))),
        "epsilon": getattr(loss_fn, "epsilon", 0.0),
        "beta_update": getattr(loss_fn, "beta_update", "none"),
        "label_smoothing": getattr(loss_fn, "label_smoothing", 0.0),
        "veto": [f"{name}={bound}" for name, bound in bounds.items() if bound is not None],
    }


def _figures(out: EpsilonDPOOutput, beta: Tensor, label_smoothing: float) -> dict[str, np.ndarray]:
    """The columns that the loss measured, (B,) float64 each, and one transfer for all that a GPU holds of them."""
    logps = (out.chosen_logps, out.rejected_logps, out.ref_chosen_logps, out.ref_rejected_logps)
    _, coefficient = losses_and_coefficients(tuple(t.double() for t in logps), out.beta.double(), label_smoothing)
    # As in the loss, a shift that is not finite leaves no gradient.
    finite = torch.isfinite(out.relaxed_shift) & torch.isfinite(out.tightened_shift)
    coefficient = torch.where(finite, coefficient, torch.nan)
    columns = {
        "chosen_tokens": out.chosen_tokens, "rejected_tokens": out.rejected_tokens,
        "chosen_logp": logps[0], "rejected_logp": logps[1], "ref_chosen_logp": logps[2], "ref_rejected_logp": logps[3],
        "margin": (logps[0] - logps[1]) - (logps[2] - logps[3]),
        "relaxed_shift": out.relaxed_shift, "tightened_shift": out.tightened_shift,
        "decision": out.step, "vetoed": out.vetoed, "beta": beta.expand_as(out.beta), "beta_used": out.beta,
        "loss": out.losses, "coefficient": coefficient, "chosen_kl": out.chosen_kl, "rejected_kl": out.rejected_kl,
        "chosen_entropy": out.chosen_entropy, "rejected_entropy": out.rejected_entropy,
    }  # fmt: skip
    values = torch.stack([t.detach().double() for t in columns.values()]).cpu().numpy()
    found = dict(zip(columns, values, strict=True))
    return found | {"vetoed": found["vetoed"] > 0}


def set_aside(run: str | os.PathLike, aside: Path | None = None) -> Path | None:
    """Moves a run's record, with a copy of its run.json, into a folder, by default the run's first free ``earlier-N``.

    There it can be audited, and the run can begin anew. None where there is no record.
    """
    run = Path(run)
    if not parts(run / "record"):
        return None
    aside = aside or free_folder(run)
    if (run / "run.json").is_file():
        shutil.copy2(run / "run.json", aside)
    os.replace(run / "record", aside / "record")
    return aside


def free_folder(run: Path) -> Path:
    """The first ``earlier-N`` that a run does not have yet, made."""
    aside = next(path for n in range(1, 1 << 30) if not (path := run / f"earlier-{n}").exists())
    aside.mkdir()
    return aside


def _states(run: Path) -> list[Path]:
    """The states of a run that count its steps: the last one's, and one a checkpoint."""
    return [path for path in (run / STATE, *sorted(run.glob(f"checkpoint-*/{STATE}"))) if path.is_file()]


def steps_done(run: Path, states_of_others: Sequence[str] = ()) -> int:
    """The most optimizer steps that a state of the run counts."""
    own = (state for state in _states(run) if str(state.relative_to(run)) not in states_of_others)
    return max((state_step(state) or 0 for state in own), default=0)


def state_step(state: Path) -> int | None:
    """Optimizer steps that a state counts; None where a kill cut it short, or it is something else."""
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
