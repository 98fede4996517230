"""ε-DPO with all logits in memory, to be read line by line against Algorithm 1. The oracle of tests and benchmarks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import checks
from .call import bind_inputs, bind_settings, heads
from .head import Head
from .linear import EpsilonDPOOutput, output
from .pair import pair_beta, perturbation_step, preference_losses, withhold_relaxation
from .plan import PairResults


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
    ref_logit_scale: float | Literal["policy"] = "policy",
    ref_softcap: float | Literal["policy"] | None = "policy",
    label_smoothing: float = 0.0,
    max_entropy: float | None = None,
    max_kl: float | None = None,
) -> EpsilonDPOOutput:
    """Signature (padded form) and result of :func:`linear_epsilon_dpo`, in the inputs' dtype throughout.

    Give it float64 for the truth, bf16 for what a bf16 model's own logits would decide.

    Raises:
        TypeError, ValueError: what that function refuses.
    """
    policy, reference = heads(
        (weight, bias), (ref_weight, ref_bias), (logit_scale, ref_logit_scale), (softcap, ref_softcap)
    )
    bound = bind_inputs(hidden, policy, ref_hidden, reference, labels, None)
    settings = bind_settings(beta, epsilon, label_smoothing, max_entropy, max_kl, hidden)
    whole = labels.new_tensor([[len(weight), labels.numel(), len(bound.cu_seqlens)]])
    lengths, _ = checks.scored_lengths(bound.labels, bound.cu_seqlens, whole, settings.beta)
    if not lengths:
        nothing = [t[:0].sum(dtype=bound.dtype) for t in (hidden, weight, bias) if t is not None]
        zeros = torch.zeros(bound.pairs, dtype=bound.dtype, device=hidden.device)
        return output(torch.stack(nothing).sum(), PairResults(*[zeros] * len(PairResults._fields)))
    a, b = _logits(hidden, policy), _logits(ref_hidden, reference).detach()

    scored = labels != -100
    index = labels.clamp_min(0)[..., None]

    def sequence_logps(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(-1).gather(-1, index)[..., 0]
        return torch.where(scored, logps, 0).sum(-1)

    logps, ref_logps = sequence_logps(a), sequence_logps(b)
    with torch.no_grad():
        p, log_p, log_q = a.softmax(-1), a.log_softmax(-1), b.log_softmax(-1)
        impossible = p == 0
        # (1+ε)a − εb and (1−ε)a + εb, written so that they are a itself where the models agree, or ε is 0.
        u = torch.where(a == -torch.inf, 0, epsilon * (a - b)) if epsilon else torch.zeros_like(a)
        relaxed, tightened = a + u, a - u
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

    beta_i = pair_beta(step, settings.beta, epsilon)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref_logps.chunk(2)
    losses = preference_losses(chosen, rejected, ref_chosen, ref_rejected, beta_i, label_smoothing)
    losses = torch.where(torch.isfinite(shifts[0]) & torch.isfinite(shifts[1]), losses, torch.nan)
    (chosen_kl, rejected_kl), (chosen_entropy, rejected_entropy) = kl.chunk(2), entropy.chunk(2)
    chosen_token_accuracy, rejected_token_accuracy = accuracy.chunk(2)
    chosen_tokens, rejected_tokens = scored.sum(-1).chunk(2)
    results = PairResults(
        losses, step, beta_i, chosen, rejected, ref_chosen, ref_rejected, chosen_kl, rejected_kl, chosen_entropy,
        rejected_entropy, chosen_token_accuracy, rejected_token_accuracy, chosen_tokens, rejected_tokens, shifts[0],
        shifts[1], step != check,
    )  # fmt: skip
    return output(losses.mean(), PairResults(*(row.detach().to(bound.dtype) for row in results)))


def _logits(x: Tensor, head: Head) -> Tensor:
    products = torch.nn.functional.linear(x, head.weight)
    logits = (products if head.bias is None else products + head.bias) * head.scale
    if head.softcap is None:
        return logits
    # An infinity stays one that stops the run.
    return head.softcap * torch.tanh(logits / head.softcap) + products.detach() * 0


def _ratio(logps: Tensor) -> Tensor:
    """log π(y_w) − log π(y_l): (2B,) -> (B,)."""
    chosen, rejected = logps.chunk(2)
    return chosen - rejected
