"""What follows from other columns of a record, worked out again: decisions, every β, margins, losses, coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..pair import (
    BETA_DPO_MOMENTUM,
    beta_dpo,
    losses_and_coefficients,
    lsc_dpo,
    next_beta,
    pair_beta,
    perturbation_step,
)

if TYPE_CHECKING:
    from .audit import Audit, Columns

# A figure may differ from what follows by 8 roundings of float32, relative to the largest number that went into it.
ROUNDING = 8 * 2.0**-24


def check_values(result: Audit, rows: Columns) -> None:
    """Everything that follows from other columns of its row and from the step before."""
    options = result.facts["options"]
    method, epsilon = options["method"], options["epsilon"] if options["method"] == "eps-dpo" else 0.0
    smoothing = options["label_smoothing"]
    for name, value in (("method", method), ("epsilon", epsilon), ("label_smoothing", smoothing)):
        told = np.float32(value) if isinstance(value, float | int) else value
        result.name_rows(rows, "value", name, rows[name] != told, told)

    # Training moves the last step's policy; an evaluation may be one of an earlier checkpoint.
    done = rows["step"] - rows["train"]
    ahead = np.where(rows["train"], rows["policy_step"] != done, rows["policy_step"] > done)
    result.name_rows(rows, "value", "policy_step", ahead, done)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(rows[name].astype(np.float64))

    step = perturbation_step(tensor("relaxed_shift"), tensor("tightened_shift")).numpy()
    if method != "eps-dpo":
        step = np.zeros_like(step)
    vetoed = _vetoed(rows, step, options.get("veto") or [])
    result.name_rows(rows, "value", "vetoed", rows["vetoed"] != vetoed, vetoed)
    decision = np.where(vetoed, 0, step).astype(np.int8)
    result.name_rows(rows, "value", "decision", rows["decision"] != decision, decision)

    beta, beta_used = _betas(result, rows, decision)
    result.name_rows(rows, "value", "beta", _differ(rows["beta"], beta, beta), beta.astype(np.float32))
    used = _differ(rows["beta_used"], beta_used, np.maximum(beta, beta_used))
    result.name_rows(rows, "value", "beta_used", used, beta_used.astype(np.float32))

    logps = [tensor(name) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")]
    margin = ((logps[0] - logps[1]) - (logps[2] - logps[3])).numpy()
    size = torch.stack(logps).abs().sum(0).numpy()
    result.name_rows(rows, "value", "margin", _differ(rows["margin"], margin, size), margin.astype(np.float32))
    losses, coefficients = losses_and_coefficients(tuple(logps), torch.from_numpy(beta_used), smoothing)
    # A shift that is not finite stops a run, however finite the log-probs are.
    shifts = np.isfinite(rows["relaxed_shift"]) & np.isfinite(rows["tightened_shift"])
    loss, coefficient = (np.where(shifts, t.numpy(), np.nan) for t in (losses, coefficients))
    # beta-dpo leaves pairs out: β 0 and no loss at all, where the loss at β 0 would be log 2.
    loss = np.where(beta_used == 0, 0, loss)
    logit = 1 + beta_used * size
    result.name_rows(rows, "value", "loss", _differ(rows["loss"], loss, logit), loss.astype(np.float32))
    weight = _differ(rows["coefficient"], coefficient, beta_used * logit)
    result.name_rows(rows, "value", "coefficient", weight, coefficient.astype(np.float32))


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
    epsilon, after = options["epsilon"], held
    if options["method"] == "lsc-dpo":
        after = _lsc_dpo_after(options, rows, held, group, count)
    elif options["method"] == "eps-dpo":
        kept = count - relaxed - tightened
        after = next_beta(held, relaxed, kept, tightened, epsilon, options["beta_update"])
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


def _differ(holds: np.ndarray, follows: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Where two columns differ by more than rounding; a NaN follows from a NaN."""
    with np.errstate(invalid="ignore"):
        near = np.abs(holds.astype(np.float64) - follows) <= ROUNDING * np.asarray(scale)
    return ~(near | (holds == follows) | (np.isnan(holds) & np.isnan(follows)))
