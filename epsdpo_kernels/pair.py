"""The mathematics of a preference pair: the check, the pair's β, the loss, the rewards.

Everything here works on vectors of length B, one entry a pair, and is the only place where ε-DPO is written down. The
reference, the single pass and every integration call it, and none of them repeats it; but the kernel that decides a
pair has the check once more, which tests hold against this. Sources: "KL Penalty Control via
Perturbation for Direct Preference Optimization" (Lee et al., 2025, arXiv 2502.13177), Algorithm 1; "Direct Preference
Optimization" (Rafailov et al., 2023, arXiv 2305.18290), equation 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid


def perturbation_step(relaxed_shift: Tensor, tightened_shift: Tensor) -> Tensor:
    """Which way the monotonicity check moves a pair's β (Algorithm 1).

    Args:
        relaxed_shift: (B,) z_relaxed − z, how the log-likelihood ratio moves under the smaller β/(1+ε), nats.
        tightened_shift: (B,) z_tightened − z, the same under the larger β/(1−ε), nats.

    Returns:
        (B,) int8: +1 relax the KL penalty, −1 tighten it, 0 keep it (also wherever a shift is not finite).
    """
    relax = (relaxed_shift > 0) & (tightened_shift < 0)
    tighten = (relaxed_shift < 0) & (tightened_shift > 0)
    finite = torch.isfinite(relaxed_shift) & torch.isfinite(tightened_shift)
    return (relax.to(torch.int8) - tighten.to(torch.int8)) * finite.to(torch.int8)


def withhold_relaxation(
    step: Tensor, chosen_entropy: Tensor, kl: Tensor, max_entropy: float | None, max_kl: float | None
) -> Tensor:
    """Keeps β where the check would relax it and a second signal says that the pair is doubtful.

    An extension of this package, not of the paper: the check reads which way a pair's likelihood ratio moves, not how
    far the policy has gone already or how sure it is of what it says.

    Args:
        step: (B,) int8, the check's.
        chosen_entropy: (B,) entropy of the policy on the chosen completion, nats, mean per token.
        kl: (B,) KL(policy‖reference) of the pair, nats, summed over the tokens of both completions.
        max_entropy, max_kl: above which a relaxation is withheld; None withholds none.

    Returns:
        (B,) int8.
    """
    doubtful = torch.zeros_like(step, dtype=torch.bool)
    if max_entropy is not None:
        doubtful |= chosen_entropy > max_entropy
    if max_kl is not None:
        doubtful |= kl > max_kl
    return torch.where(doubtful & (step > 0), 0, step)


def pair_beta(step: Tensor, beta: float | Tensor, epsilon: float) -> Tensor:
    """The β a pair uses, β / (1 + ε·step). (B,) int8 -> (B,), float32 unless β is a float64 tensor."""
    dtype = beta.dtype if isinstance(beta, Tensor) else torch.float32
    return beta / (1 + epsilon * step.to(dtype))


BETA_UPDATES = ("mean-step", "mean-beta", "none")


def next_beta(beta: Any, relaxed: Any, kept: Any, tightened: Any, epsilon: float, update: str) -> Any:
    """The running β after a step that relaxed, kept and tightened so many pairs, at least one in all.

    Tensors, arrays or numbers. "mean-step" is the authors' code, β/(1 + ε·mean step); "mean-beta" the paper's text, the
    mean of the pairs' β; "none" keeps it.
    """
    pairs = relaxed + kept + tightened
    if update == "mean-step":
        return beta / (1 + epsilon * (relaxed - tightened) / pairs)
    if update == "mean-beta":
        return beta * (relaxed / (1 + epsilon) + kept + tightened / (1 - epsilon)) / pairs
    return beta


# Of β-DPO's moving averages of a batch's margins, which start at 0 and move before they are used.
BETA_DPO_MOMENTUM = 0.9


def beta_dpo(beta: float, alpha: float, margin: float, average: float) -> float:
    """The β of a batch in β-DPO (Wu et al., 2024, arXiv 2407.08639): β₀·(1 + α·(margin − average)), at least 1e-3.

    Args:
        beta: β₀.
        alpha: how strongly β follows the margin.
        margin: mean margin of the kept pairs, nats, without β.
        average: M₀, the moving average of the mean margins of all pairs, nats.
    """
    return max(1e-3, beta * (1 + alpha * (margin - average)))


def lsc_dpo(beta: float, margin: float, z_star: float, eta: float, tau_start: float) -> float:
    """β after a step of LSC-DPO (Qu et al., 2026, arXiv 2610.07592, equation 11): β·exp(−η·(β·margin − z*)).

    It stays as it is where the learning signal σ(−β·margin) is not below τ_start. For a margin that stays the same,
    β = z*/margin is a fixed point, stable where 0 < η·z* < 2 (their proposition 1).

    Args:
        beta: β of the step.
        margin: mean margin of the step's pairs, nats, without β.
        z_star: z*, the scaled margin β·margin that is aimed at.
        eta: η, how fast.
        tau_start: τ_start; β moves where β·margin > log(1/τ_start − 1).
    """
    z = beta * margin
    # σ(−z) < τ, without the overflow of exp.
    return beta * math.exp(-eta * (z - z_star)) if z > math.log(1 / tau_start - 1) else beta


def preference_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−(1−s)·logsigmoid(β_i·margin_i) − s·logsigmoid(−β_i·margin_i) of every pair; all (B,).

    The log-probs are sums over a completion's tokens, in nats. ``beta`` is a constant of the loss. A margin that is not
    finite gives NaN: an infinity must stop a run, not look like a pair that is perfectly learnt.
    """
    logit = _logit((chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps), beta)
    # logsigmoid(−x) is logsigmoid(x) − x, which leaves one of the two.
    return label_smoothing * logit - logsigmoid(logit)


def loss_coefficients(logps: tuple[Tensor, ...], beta: Tensor, label_smoothing: float) -> Tensor:
    """c_i = −∂loss_i/∂chosen_logps_i = +∂loss_i/∂rejected_logps_i from four (B,) log-probs, detached.

    One number per pair is the whole gradient, because the loss reads the margin m alone:
    c = β·[(1−s)·σ(−βm) − s·σ(βm)] (Rafailov et al., 2023, the gradient below equation 7, with s for smoothing), which
    is β·[σ(−βm) − s].
    """
    logit = _logit(tuple(t.detach() for t in logps), beta)
    return beta.detach() * (sigmoid(-logit) - label_smoothing)


def losses_and_coefficients(logps: tuple[Tensor, ...], beta: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """:func:`preference_losses`, detached, and :func:`loss_coefficients` of four (B,) log-probs."""
    chosen, rejected, ref_chosen, ref_rejected = (t.detach() for t in logps)
    losses = preference_losses(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
    return losses, loss_coefficients(logps, beta, label_smoothing)


def _logit(logps: tuple[Tensor, ...], beta: Tensor) -> Tensor:
    """β_i·margin_i, NaN where the margin is not finite."""
    chosen, rejected, ref_chosen, ref_rejected = logps
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    return beta.detach() * torch.nan_to_num(margin, math.nan, math.nan, math.nan)
