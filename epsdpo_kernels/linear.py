"""The public functions: ε-DPO, and per-sequence log-probs for other losses, straight from hidden states.

References in docstrings are to "KL Penalty Control via Perturbation for Direct Preference Optimization" (Lee et al.,
2025, arXiv 2502.13177).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, plan
from . import statistics as st
from .head import Gradients, Head

ENGINES = ("auto", "torch")


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
    relaxed_shift: Tensor  # (B,) z_relaxed − z
    tightened_shift: Tensor  # (B,) z_tightened − z


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
    relaxed_shift: Tensor
    tightened_shift: Tensor


def output(loss: Tensor, losses: Tensor, step: Tensor, beta: Tensor, logps, kls, entropies, shifts) -> EpsilonDPOOutput:
    """Joins the parts and adds the rewards; ``logps`` are chosen, rejected, reference chosen, reference rejected."""
    rewards = [beta * (logps[k] - logps[2 + k]) for k in (0, 1)]
    return EpsilonDPOOutput(loss, losses, step, beta, *logps, *rewards, *kls, *entropies, *shifts)


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
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    label_smoothing: float = 0.0,
    engine: str = "auto",
    max_tile_bytes: int | None = None,
    cu_seqlens: Tensor | None = None,
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
        logit_scale, softcap: logits = softcap·tanh(scale·(x·Wᵀ + bias)/softcap).
        ref_logit_scale, ref_softcap: None takes the policy's.
        label_smoothing: s in [0, 0.5).
        engine: "torch" runs on any device; "auto" picks the best there is.
        max_tile_bytes: budget of the two tiles of logits; None takes max(256 MiB, 4·V·H).
        cu_seqlens: (2B+1,) int, bounds of the completions in the packed form, all chosen first.

    Returns:
        EpsilonDPOOutput. Its loss is differentiable in hidden, weight and bias; the reference gets no gradient. Under
        autocast, hidden states and heads are taken in the autocast dtype. Where nothing at all is scored the loss is 0
        and its gradients are zeros.

    Raises:
        TypeError, ValueError: name the argument, what came and what is taken.
    """
    checks.check_scalars(beta, epsilon, label_smoothing)
    run, ref = _heads(
        hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, logit_scale, softcap, ref_logit_scale,
        ref_softcap, engine, max_tile_bytes, cu_seqlens,
    )  # fmt: skip
    x, head_weight, head_bias, labels, bounds, scale, cap = run
    needs = tuple(t is not None and torch.is_grad_enabled() and t.requires_grad for t in (x, head_weight, head_bias))
    double = x.dtype == torch.float64
    beta = torch.as_tensor(beta, dtype=torch.float64 if double else torch.float32).detach().to(x.device).reshape(())
    loss, r = _SinglePass.apply(
        x, head_weight, head_bias, ref, labels, bounds, beta, epsilon, scale, cap, label_smoothing, max_tile_bytes, needs
    )  # fmt: skip
    return output(
        loss, r[plan.LOSS], r[plan.STEP].to(torch.int8), r[plan.BETA],
        tuple(r[plan.CHOSEN_LOGP : plan.CHOSEN_KL]), r[plan.CHOSEN_KL : plan.CHOSEN_ENTROPY],
        r[plan.CHOSEN_ENTROPY : plan.PAIR_RELAXED_SHIFT], r[plan.PAIR_RELAXED_SHIFT :],
    )  # fmt: skip


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
    ref_logit_scale: float | None = None,
    ref_softcap: float | None = None,
    engine: str = "auto",
    max_tile_bytes: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> PairStatistics:
    """Per-sequence log-probs that carry gradient, with the shifts, KL and entropy beside them, for any other loss.

    Two passes over the policy's logits (5 products instead of 4), because a general loss is not known before all
    log-probs are. Arguments and errors as for :func:`linear_epsilon_dpo`.
    """
    checks.check_scalars(1.0, epsilon, 0.0)
    run, ref = _heads(
        hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, logit_scale, softcap, ref_logit_scale,
        ref_softcap, engine, max_tile_bytes, cu_seqlens,
    )  # fmt: skip
    x, head_weight, head_bias, labels, bounds, scale, cap = run
    chosen, rejected, r = _TwoPass.apply(
        x, head_weight, head_bias, ref, labels, bounds, epsilon, scale, cap, max_tile_bytes
    )
    return PairStatistics(chosen, rejected, *r)


def _heads(
    hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, scale, softcap, ref_scale, ref_softcap, engine,
    max_tile_bytes, cu_seqlens,
):  # fmt: skip
    """Checks by shape and dtype, autocast, and the packed form that the plan works on."""
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, takes one of {ENGINES}")
    if max_tile_bytes is not None and max_tile_bytes <= 0:
        raise ValueError(f"max_tile_bytes: got {max_tile_bytes}, takes a positive number of bytes or None")
    ref_scale = scale if ref_scale is None else ref_scale
    ref_softcap = softcap if ref_softcap is None else ref_softcap
    checks.check_transforms(scale, softcap)
    checks.check_transforms(ref_scale, ref_softcap, "ref_")
    checks.check_tokens(hidden, labels, ref_hidden, cu_seqlens)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, ref_hidden, ref_weight = (t.to(dtype) for t in (hidden, weight, ref_hidden, ref_weight))
        bias, ref_bias = (None if t is None else t.to(dtype) for t in (bias, ref_bias))
    checks.check_head(hidden, weight, bias)
    checks.check_head(ref_hidden, ref_weight, ref_bias, "ref_")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden: got a tensor on {ref_hidden.device}, takes hidden's device, {hidden.device}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: got a vocabulary of {ref_weight.shape[0]}, takes the policy's, {weight.shape[0]}"
        )
    if cu_seqlens is None:
        rows, length = labels.shape
        cu_seqlens = torch.arange(0, rows * length + 1, max(length, 1), device=labels.device)[: rows + 1]
        if length == 0:
            cu_seqlens = torch.zeros(rows + 1, dtype=torch.int64, device=labels.device)
    ref = (
        ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        Head(ref_weight.detach(), None if ref_bias is None else ref_bias.detach(), ref_scale, ref_softcap),
    )
    x = hidden.reshape(-1, hidden.shape[-1])
    return (x, weight, bias, labels.reshape(-1), cu_seqlens.long(), scale, softcap), ref


def _pass(x, weight, bias, ref, labels, bounds, beta, epsilon, scale, softcap, max_tile_bytes) -> plan.Pass:
    lengths = checks.scored_lengths(labels, bounds, weight.shape[0], beta)
    if sum(lengths) == 0:
        lengths = []
    itemsize = 8 if x.dtype == torch.float64 else 4
    rows = plan.rows_per_tile(*weight.shape, itemsize, max_tile_bytes)
    layout = plan.lay_out(labels, bounds, lengths, rows)
    return plan.Pass(x, ref[0], labels, Head(weight, bias, scale, softcap), ref[1], layout, epsilon)


def _buffers(run: plan.Pass, needs: tuple[bool, bool, bool]) -> Gradients:
    """Accumulators in the compute dtype. Where no tile will overwrite them they start, and stay, at zero."""
    make = torch.empty if run.layout.n_pairs else torch.zeros
    dtype, device, weight = run.dtype, run.x.device, run.head.weight
    return Gradients(
        torch.zeros(run.x.shape, dtype=dtype, device=device) if needs[0] else None,
        make(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        make(weight.shape[:1], dtype=dtype, device=device) if needs[2] else None,
    )


class _SinglePass(torch.autograd.Function):
    """Loss and gradients in one forward; backward only scales what is there."""

    @staticmethod
    def forward(ctx, x, weight, bias, ref, labels, bounds, beta, epsilon, scale, softcap, smoothing, budget, needs):
        run = _pass(x, weight, bias, ref, labels, bounds, beta, epsilon, scale, softcap, budget)
        into = _buffers(run, needs)
        results = plan.single_pass(run, beta, smoothing, into)
        pairs = results.shape[1]
        ctx.save_for_backward(*into)
        ctx.dtype, ctx.unit = x.dtype, beta / max(pairs, 1)
        loss = results[plan.LOSS].mean() if pairs else results.new_zeros(())
        ctx.mark_non_differentiable(results)
        return loss, results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        # In units of β/B until here; the factor comes in before the cast, so a loss scaler finds what it needs.
        factor = grad_loss * ctx.unit
        # A graph that is not kept gives its buffers away: no second dX and dW.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = []
        for g in ctx.saved_tensors:
            if g is None:
                gradients.append(None)
            elif g.dtype != ctx.dtype:
                gradients.append(torch.mul(g, factor, out=torch.empty_like(g, dtype=ctx.dtype)))
            else:
                gradients.append(g * factor if kept else g.mul_(factor))
        return (*gradients, *[None] * 10)


class _TwoPass(torch.autograd.Function):
    """Log-probs in forward; backward projects the policy once more, by the same route, when coefficients are known."""

    @staticmethod
    def forward(ctx, x, weight, bias, ref, labels, bounds, epsilon, scale, softcap, budget):
        run = _pass(x, weight, bias, ref, labels, bounds, torch.ones(()), epsilon, scale, softcap, budget)
        sums = run.swept.new_empty(st.TOKEN, run.layout.n_pairs, 2, dtype=torch.float64)
        for pairs, tiles in run.layout.series:
            for tile in tiles:
                run.sweep(tile, run.project(tile)[0])
            sums[:, pairs.start : pairs.stop] = run.completions(pairs)
        shifts = sums[[st.RELAXED_SHIFT, st.TIGHTENED_SHIFT]].diff(dim=2)[:, :, 0].neg()
        per_side = sums[[st.REF_LOGP, st.KL, st.ENTROPY]].transpose(1, 2).flatten(0, 1)
        results = torch.cat((per_side, shifts)).to(run.dtype)
        ctx.save_for_backward(x, weight, bias, labels, bounds, run.swept)
        ctx.ref, ctx.scalars, ctx.layout = ref, (epsilon, scale, softcap), run.layout
        ctx.mark_non_differentiable(results)
        return (*(sums[st.LOGP].t().to(run.dtype)), results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_chosen, grad_rejected, _):
        x, weight, bias, labels, bounds, swept = ctx.saved_tensors
        epsilon, scale, softcap = ctx.scalars
        run = plan.Pass(x, ctx.ref[0], labels, Head(weight, bias, scale, softcap), ctx.ref[1], ctx.layout, epsilon)
        run.swept = swept
        into = _buffers(run, ctx.needs_input_grad[:3])
        accumulate = False
        for pairs, tiles in ctx.layout.series:
            part = slice(pairs.start, pairs.stop)
            coefficient = run.coefficients(pairs, -grad_chosen[part], -grad_rejected[part])
            for tile in tiles:
                a, hidden = run.project(tile)
                begin = tile.start - tiles[0].start
                run.gradient(tile, a, hidden, coefficient[begin : begin + a.shape[0]], into, accumulate)
                accumulate = True
        return (*(None if g is None else g.to(x.dtype) for g in into), *[None] * 7)
