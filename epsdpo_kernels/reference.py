"""ε-DPO with all logits in memory, to be read line by line against Algorithm 1. The oracle of tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .linear import EpsilonDPOOutput, output
from .pair import pair_beta, perturbation_step, preference_losses, withhold_relaxation


def epsilon_dpo_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    beta: float | Tensor = 0.1,
    epsilon: float = 0.01,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    label_smoothing: float = 0.0,
    max_entropy: float | None = None,
    max_kl: float | None = None,
) -> EpsilonDPOOutput:
    """Signature (padded form) and result of :func:`linear_epsilon_dpo`, in the inputs' dtype throughout.

    Give it float64 for the truth, bf16 for what a bf16 model's own logits would decide.
    """
    checks.check_scalars(beta, epsilon, label_smoothing)
    checks.check_veto(max_entropy, max_kl)
    checks.check_tokens(hidden, labels, ref_hidden, None)
    ref_logit_scale = logit_scale if ref_logit_scale is None else ref_logit_scale
    ref_softcap = softcap if ref_softcap is None else ref_softcap
    a = _logits(hidden, weight, bias, logit_scale, softcap)
    b = _logits(ref_hidden.detach(), ref_weight.detach(), ref_bias, ref_logit_scale, ref_softcap).detach()

    scored = labels != -100
    index = labels.clamp_min(0)[..., None]

    def sequence_logps(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(-1).gather(-1, index)[..., 0]
        return torch.where(scored, logps, 0).sum(-1)

    logps, ref_logps = sequence_logps(a), sequence_logps(b)
    with torch.no_grad():
        p, log_p, log_q = a.softmax(-1), a.log_softmax(-1), b.log_softmax(-1)
        impossible = p == 0
        # (1+ε)a − εb and (1−ε)a + εb, written so that they are a itself where the models agree.
        relaxed = torch.where(a == -torch.inf, a, a + epsilon * (a - b))
        tightened = torch.where(a == -torch.inf, a, a - epsilon * (a - b))
        z = _ratio(logps)
        shifts = [_ratio(sequence_logps(m)) - z for m in (relaxed, tightened)]
        kl = (p * (log_p - log_q).masked_fill(impossible, 0)).sum(-1)
        entropy = -(p * log_p.masked_fill(impossible, 0)).sum(-1)
        kl = torch.where(scored, kl, 0).sum(-1)
        entropy = torch.where(scored, entropy, 0).sum(-1) / scored.sum(-1)
        first = a.gather(-1, index)[..., 0] == a.amax(-1)
        accuracy = (first & scored).sum(-1, dtype=a.dtype) / scored.sum(-1)
        check = perturbation_step(*shifts)
        step = withhold_relaxation(check, entropy.chunk(2)[0], kl.view(2, -1).sum(0), max_entropy, max_kl)

    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    beta_i = pair_beta(step, torch.as_tensor(beta, dtype=dtype, device=hidden.device), epsilon)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref_logps.chunk(2)
    losses = preference_losses(chosen, rejected, ref_chosen, ref_rejected, beta_i, label_smoothing)
    losses = torch.where(torch.isfinite(shifts[0]) & torch.isfinite(shifts[1]), losses, torch.nan)
    of_logps, of_completions, of_shifts = (
        [t.detach().to(dtype) for t in group]
        for group in (
            (chosen, rejected, ref_chosen, ref_rejected),
            (*kl.chunk(2), *entropy.chunk(2), *accuracy.chunk(2)),
            shifts,
        )
    )
    return output(losses.mean(), losses.detach(), step, beta_i, of_logps, of_completions, of_shifts, step != check)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(x, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _ratio(logps: Tensor) -> Tensor:
    """log π(y_w) − log π(y_l): (2B,) -> (B,)."""
    chosen, rejected = logps.chunk(2)
    return chosen - rejected
