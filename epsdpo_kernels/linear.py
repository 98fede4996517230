"""The public functions: ε-DPO, and per-sequence log-probs for other losses, straight from hidden states.

References in docstrings are to "KL Penalty Control via Perturbation for Direct Preference Optimization" (Lee et al.,
2025, arXiv 2502.13177).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import ops
from .call import bind_execution, bind_inputs, bind_settings, heads
from .plan import PairResults


class EpsilonDPOOutput(NamedTuple):
    """Result of ε-DPO. (B,) tensors are fp32 (float64 for float64 inputs) and carry no gradient."""

    loss: Tensor  # () mean over pairs, differentiable
    losses: Tensor  # (B,)
    step: Tensor  # (B,) int8: +1 relaxed, 0 kept, −1 tightened
    beta: Tensor  # (B,) the β each pair used
    chosen_logps: Tensor  # (B,) nats, summed over tokens
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_rewards: Tensor  # (B,) β_i·(logp − ref_logp)
    rejected_rewards: Tensor
    chosen_kl: Tensor  # (B,) nats, exact over the vocabulary, summed over tokens
    rejected_kl: Tensor
    chosen_entropy: Tensor  # (B,) nats, mean per token
    rejected_entropy: Tensor
    chosen_token_accuracy: Tensor  # (B,) share of the tokens that the policy ranks first
    rejected_token_accuracy: Tensor
    chosen_tokens: Tensor  # (B,) int64: scored tokens, over all ranks of a sequence_group
    rejected_tokens: Tensor
    relaxed_shift: Tensor  # (B,) z_relaxed − z
    tightened_shift: Tensor  # (B,) z_tightened − z
    vetoed: Tensor  # (B,) bool: the check would have relaxed the pair, and a second signal withheld it


class PairStatistics(NamedTuple):
    """Per-sequence statistics. The policy's log-probs carry gradient; all else is constant."""

    chosen_logps: Tensor  # (B,) nats, summed over tokens, differentiable
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_kl: Tensor
    rejected_kl: Tensor
    chosen_entropy: Tensor
    rejected_entropy: Tensor
    chosen_token_accuracy: Tensor
    rejected_token_accuracy: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    relaxed_shift: Tensor
    tightened_shift: Tensor


def output(loss: Tensor, results: PairResults) -> EpsilonDPOOutput:
    """The result of a call from its loss and its pairs' results, with the rewards added."""
    named = results._asdict()
    named["step"], named["vetoed"] = results.step.to(torch.int8), results.vetoed.bool()
    named["chosen_tokens"], named["rejected_tokens"] = results.chosen_tokens.long(), results.rejected_tokens.long()
    named["chosen_rewards"] = results.beta * (results.chosen_logps - results.ref_chosen_logps)
    named["rejected_rewards"] = results.beta * (results.rejected_logps - results.ref_rejected_logps)
    return EpsilonDPOOutput(loss=loss, **named)


def linear_epsilon_dpo(
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
    engine: str = "auto",
    max_tile_bytes: int | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> EpsilonDPOOutput:
    """ε-DPO (Algorithm 1) from hidden states, exact and without the logits in memory.

    Args:
        hidden: (2B, T, H) the policy's last hidden states, chosen rows first, then rejected; or (N, H) packed.
        weight: (V, H) the policy's head, in hidden's dtype.
        labels: (2B, T) or (N,) int64, already shifted: hidden[t] predicts labels[t]; −100 is not scored.
        ref_hidden: (2B, T, H_ref) or (N, H_ref), the reference's.
        ref_weight: (V, H_ref), in ref_hidden's dtype.
        beta: the running β, a float or a one-element tensor.
        epsilon: size of the perturbation, in (0, 1); 0 is plain DPO.
        bias, ref_bias: (V,) of the heads.
        logit_scale, softcap: logits = softcap·tanh(scale·(x·Wᵀ + bias)/softcap); a softcap of None is none.
        ref_logit_scale, ref_softcap: the same of the reference; "policy" takes the policy's.
        label_smoothing: s in [0, 0.5).
        max_entropy, max_kl: withhold relaxation where the policy's entropy on the chosen completion (nats a token), or
            the pair's KL (nats, both completions), is above; see :func:`epsdpo_kernels.pair.withhold_relaxation`.
        engine: "torch" runs on any device, "triton" on a GPU and not in float64; "auto" is "triton" on
            NVIDIA GPUs where that runs.
        max_tile_bytes: budget of both models' tiles of logits and, in 16 bits on a GPU, of their gradients; None takes
            1 GiB on a GPU, elsewhere 4·V·H, from 256 MiB to 1 GiB.
        cu_seqlens: (2B+1,) int, bounds of the completions in the packed form, all chosen first.
        vocab_group: its ranks hold consecutive slices of both heads, in their order and of any sizes, and the same
            tokens with labels of the whole vocabulary. The gradient of hidden is summed over them.
        sequence_group: its ranks hold the same pairs and heads, each with tokens of its own, some or none. Gradients
            are those of a rank's own tokens: weight's and bias's are to be summed over the group.

    Returns:
        EpsilonDPOOutput. Its loss is differentiable once, backward, in hidden, weight and bias; the reference gets no
        gradient. Under autocast, hidden states and heads are taken in the autocast dtype. Where nothing at all is
        scored the loss and its gradients are zeros, and so is every vector, β included. Logits that differ from the
        reference's by a constant c, which softmax does not see, cost digits as ε·c grows: from about 10 on, steps can
        be wrong. Where a word's logits differ by d and e^(ε·|d|) beside its probability overflows fp32, as of a word
        that the reference alone rules out, the shifts are not finite: step is 0 and the loss NaN.

    Raises:
        TypeError, ValueError: name the argument, what came and what is taken.
        NotImplementedError: forward-mode or second derivatives are asked for, or one by torch.func.
    """
    policy, reference = heads(
        (weight, bias), (ref_weight, ref_bias), (logit_scale, ref_logit_scale), (softcap, ref_softcap)
    )
    inputs = bind_inputs(hidden, policy, ref_hidden, reference, labels, cu_seqlens)
    settings = bind_settings(beta, epsilon, label_smoothing, max_entropy, max_kl, hidden)
    execution = bind_execution(engine, max_tile_bytes, vocab_group, sequence_group, hidden)
    loss, results = ops.epsilon_dpo(inputs, settings, execution)
    return output(loss, PairResults(*results))


def linear_pair_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    epsilon: float = 0.01,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float | Literal["policy"] = "policy",
    ref_softcap: float | Literal["policy"] | None = "policy",
    engine: str = "auto",
    max_tile_bytes: int | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> PairStatistics:
    """Per-sequence log-probs that carry gradient, for any other loss, and beside them all statistics of a pair.

    Two passes over the policy's logits (5 products instead of 4), because a general loss is not known before all
    log-probs are. Arguments and errors as for :func:`linear_epsilon_dpo`. torch.compile breaks its graph here.
    """
    policy, reference = heads(
        (weight, bias), (ref_weight, ref_bias), (logit_scale, ref_logit_scale), (softcap, ref_softcap)
    )
    inputs = bind_inputs(hidden, policy, ref_hidden, reference, labels, cu_seqlens)
    settings = bind_settings(1.0, epsilon, 0.0, None, None, hidden)
    execution = bind_execution(engine, max_tile_bytes, vocab_group, sequence_group, hidden)
    chosen, rejected, results = ops.pair_stats(inputs, settings, execution)
    found = PairStatistics(chosen, rejected, *results)
    return found._replace(chosen_tokens=found.chosen_tokens.long(), rejected_tokens=found.rejected_tokens.long())
