"""The public functions: ε-DPO, and per-sequence log-probs for other losses, straight from hidden states.

References in docstrings are to "KL Penalty Control via Perturbation for Direct Preference Optimization" (Lee et al.,
2025, arXiv 2502.13177).
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import checks, parallel, plan
from . import statistics as st
from .engines import torch_engine
from .head import Gradients, Head

ENGINES = ("auto", "torch", "triton")
# Whether the Triton engine trains through its logit-free kernel, or through library products and a sweep. Scoring
# always takes the former.
TRAIN_LOGIT_FREE = False


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
    relaxed_shift: Tensor
    tightened_shift: Tensor


def output(
    loss: Tensor, losses: Tensor, step: Tensor, beta: Tensor, logps, of_completions, shifts, vetoed: Tensor
) -> EpsilonDPOOutput:
    """Joins the parts and adds the rewards.

    ``logps`` are chosen, rejected, reference chosen, reference rejected; ``of_completions`` KL, entropy and token
    accuracy, each chosen, then rejected.
    """
    rewards = [beta * (logps[k] - logps[2 + k]) for k in (0, 1)]
    return EpsilonDPOOutput(loss, losses, step, beta, *(*logps, *rewards, *of_completions, *shifts, vetoed))


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
        logit_scale, softcap: logits = softcap·tanh(scale·(x·Wᵀ + bias)/softcap).
        ref_logit_scale, ref_softcap: None takes the policy's.
        label_smoothing: s in [0, 0.5).
        max_entropy, max_kl: withhold relaxation where the policy's entropy on the chosen completion (nats a token), or
            the pair's KL (nats, both completions), is above; see :func:`epsdpo_kernels.pair.withhold_relaxation`.
        engine: "torch" runs on any device, "triton" on a GPU and not in float64; "auto" is "triton" on
            NVIDIA GPUs where that runs.
        max_tile_bytes: budget of the two tiles of logits; None takes 4·V·H, from 256 MiB to 1 GiB.
        cu_seqlens: (2B+1,) int, bounds of the completions in the packed form, all chosen first.
        vocab_group: its ranks hold consecutive slices of both heads, in their order and of any sizes, and the same
            tokens with labels of the whole vocabulary. The gradient of hidden is summed over them.
        sequence_group: its ranks hold the same pairs and heads, each with tokens of its own, some or none. Gradients
            are those of a rank's own tokens: weight's and bias's are to be summed over the group.

    Returns:
        EpsilonDPOOutput. Its loss is differentiable in hidden, weight and bias; the reference gets no gradient. Under
        autocast, hidden states and heads are taken in the autocast dtype. Where nothing at all is scored the loss and
        its gradients are zeros, and so is every vector, β included.

    Raises:
        TypeError, ValueError: name the argument, what came and what is taken.
    """
    checks.check_scalars(beta, epsilon, label_smoothing)
    checks.check_veto(max_entropy, max_kl)
    heads, engine = _heads(
        hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, logit_scale, softcap, ref_logit_scale,
        ref_softcap, engine, max_tile_bytes, cu_seqlens,
    )  # fmt: skip
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(beta, Tensor):
        beta = beta.detach().to(hidden.device, dtype)
    else:  # filled on the device: a copy from the host would wait for it
        beta = torch.full((), beta, dtype=dtype, device=hidden.device)
    loss, r = _SinglePass.apply(
        *heads, beta.reshape(()), epsilon, label_smoothing, max_entropy, max_kl, engine, max_tile_bytes,
        _name(vocab_group), _name(sequence_group),
    )  # fmt: skip
    return output(
        loss, r[plan.LOSS], r[plan.STEP].to(torch.int8), r[plan.BETA],
        tuple(r[plan.CHOSEN_LOGP : plan.CHOSEN_KL]), r[plan.CHOSEN_KL : plan.PAIR_RELAXED_SHIFT],
        r[plan.PAIR_RELAXED_SHIFT : plan.VETOED], r[plan.VETOED].bool(),
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
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> PairStatistics:
    """Per-sequence log-probs that carry gradient, for any other loss, and beside them all statistics of a pair.

    Two passes over the policy's logits (5 products instead of 4), because a general loss is not known before all
    log-probs are. Arguments and errors as for :func:`linear_epsilon_dpo`.
    """
    checks.check_scalars(1.0, epsilon, 0.0)
    heads, engine = _heads(
        hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, logit_scale, softcap, ref_logit_scale,
        ref_softcap, engine, max_tile_bytes, cu_seqlens,
    )  # fmt: skip
    chosen, rejected, results = _TwoPass.apply(
        *heads, epsilon, engine, max_tile_bytes, _name(vocab_group), _name(sequence_group)
    )
    return PairStatistics(chosen, rejected, *results)


def _name(group: ProcessGroup | None) -> str | None:
    return None if group is None else group.group_name


def _heads(
    hidden, weight, labels, ref_hidden, ref_weight, bias, ref_bias, scale, softcap, ref_scale, ref_softcap, engine,
    max_tile_bytes, cu_seqlens,
):  # fmt: skip
    """Checks by shape and dtype, autocast, and the packed form that the plan works on.

    Returns:
        (x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap), the
        leading arguments of both autograd functions, and the engine's name.
    """
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
    x, ref_x = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    ref_weight, ref_bias = ref_weight.detach(), None if ref_bias is None else ref_bias.detach()
    transforms = (float(scale), softcap, float(ref_scale), ref_softcap)
    if engine == "auto":
        # On AMD a barrier does not wait for loads and stores under way, which two of the kernels count on.
        engine = "triton" if x.is_cuda and x.dtype != torch.float64 and not torch.version.hip else "torch"
    elif engine == "triton" and x.dtype == torch.float64:
        raise TypeError("hidden: got torch.float64, which the engine 'triton' has not; takes engine 'torch'")
    return (x, weight, bias, labels.reshape(-1), cu_seqlens.long(), ref_x, ref_weight, ref_bias, *transforms), engine


def _engine(name: str, device: torch.device) -> ModuleType:
    """The module of an engine's tile operations; Triton's kernels are imported when first asked for."""
    if name == "torch":
        return torch_engine
    from .engines import triton_blocks, triton_engine

    if device.type != "cuda" and not triton_blocks.INTERPRETED:
        raise ValueError(f"engine: got 'triton' for tensors on {device}, takes 'torch' or 'auto' there")
    if torch.version.hip:
        # Compiled for gfx942, a barrier comes before the stores it should order have arrived.
        raise ValueError("engine: got 'triton' on an AMD GPU, where its barriers do not order memory; takes 'torch'")
    return triton_engine


def _pass(
    x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap, beta,
    epsilon, engine, max_tile_bytes, vocab_group, sequence_group, keep,
) -> plan.Pass:  # fmt: skip
    """Lays the call out. The numbers of scored tokens are read here, once, before any work."""
    tiles = _engine(engine, x.device)
    sizes, rank = [weight.shape[0]], 0
    if vocab_group is not None:
        sizes, rank = parallel.slices(weight.shape[0], vocab_group, x.device)
    lengths = checks.scored_lengths(labels, cu_seqlens, sum(sizes), beta, sequence_group)
    logit_free = engine == "triton" and (TRAIN_LOGIT_FREE or not keep)
    itemsize = 8 if x.dtype == torch.float64 else 4
    # By the largest slice, because all ranks need the same tiles.
    rows = plan.rows_per_tile(max(sizes), weight.shape[1], itemsize, max_tile_bytes)
    if logit_free and not keep:
        rows = max(1, len(labels))  # there are no logits to find room for
    layout = plan.lay_out(labels, cu_seqlens, lengths, rows, alone=sequence_group is not None)
    if vocab_group is not None:
        labels = parallel.labels_in_slice(labels, sum(sizes[:rank]), sizes[rank])
    # Kernels read biases, and the logit-free one heads, without strides: what has to be copied is copied once a call.
    bias, ref_bias = (None if t is None else t.contiguous() for t in (bias, ref_bias))
    if logit_free:
        same = weight.data_ptr() == ref_weight.data_ptr() and weight.shape == ref_weight.shape
        same = same and weight.stride() == ref_weight.stride()
        weight = weight.contiguous()
        ref_weight = weight if same else ref_weight.contiguous()
    policy, reference = Head(weight, bias, scale, softcap), Head(ref_weight, ref_bias, ref_scale, ref_softcap)
    return plan.Pass(
        x, ref_x, labels, policy, reference, layout, epsilon, tiles, logit_free, keep, vocab_group, sequence_group
    )


def _buffers(run: plan.Pass, needs: list[bool]) -> Gradients:
    """Accumulators in the compute dtype. Where no tile will overwrite them they start, and stay, at zero."""
    make = torch.empty if len(run.layout.order) else torch.zeros
    dtype, device, weight = run.tokens.swept.dtype, run.x.device, run.policy.weight
    return Gradients(
        torch.zeros(run.x.shape, dtype=dtype, device=device) if needs[0] else None,
        make(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        make(weight.shape[:1], dtype=dtype, device=device) if needs[2] else None,
    )


@contextlib.contextmanager
def _autograd_keys():
    """Lets torch.autograd work inside a custom op, whose body runs with autograd's dispatch keys excluded."""
    keys = [
        getattr(torch._C.DispatchKey, k) for k in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
    ]
    was = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key, excluded in zip(keys, was, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _no_autocast(x: Tensor) -> torch.autocast:
    """The dtypes are settled before a pass begins; autocast would round its fp32 products."""
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op("epsdpo_kernels::single_pass", mutates_args=())
def single_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_x: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ref_scale: float,
    ref_softcap: float | None,
    beta: Tensor,
    epsilon: float,
    smoothing: float,
    max_entropy: float | None,
    max_kl: float | None,
    engine: str,
    max_tile_bytes: int | None,
    vocab_group: str | None,
    sequence_group: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The (PAIR, B) results of a pass and the gradients of x, weight, bias in units of β/B; empty where not needed.

    An op, so that torch.compile sees one node and not the tiles.
    """
    with torch.no_grad(), _autograd_keys(), _no_autocast(x):
        run = _pass(
            x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap,
            beta, epsilon, engine, max_tile_bytes, vocab_group, sequence_group, any(needs),
        )  # fmt: skip
        into = _buffers(run, needs)
        results = plan.single_pass(run, plan.Decision(beta, smoothing, max_entropy, max_kl), into)
        if not run.layout.n_pairs:
            results = results.new_zeros(plan.PAIR, len(cu_seqlens) // 2)
        dx, dw, db = (results.new_empty(0) if g is None else g for g in into)
        return results, dx, dw, db


@single_pass.register_fake
def _(x, weight, bias, labels, cu_seqlens, *rest):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shapes = (x.shape, weight.shape, weight.shape[:1])
    gradients = (x.new_empty(s if n else (0,), dtype=dtype) for s, n in zip(shapes, rest[-1], strict=True))
    return x.new_empty(plan.PAIR, (cu_seqlens.shape[0] - 1) // 2, dtype=dtype), *gradients


class _SinglePass(torch.autograd.Function):
    """Loss and gradients in one forward; backward only scales what is there."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap,
        beta, epsilon, smoothing, max_entropy, max_kl, engine, max_tile_bytes, vocab_group, sequence_group,
    ):  # fmt: skip
        needs = list(ctx.needs_input_grad[:3])
        results, *gradients = single_pass(
            x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap,
            beta, epsilon, smoothing, max_entropy, max_kl, engine, max_tile_bytes, vocab_group, sequence_group, needs,
        )  # fmt: skip
        pairs = results.shape[1]
        ctx.save_for_backward(*gradients, beta / max(pairs, 1))
        ctx.needs, ctx.dtype = needs, x.dtype
        loss = results[plan.LOSS].sum() / max(pairs, 1)
        ctx.mark_non_differentiable(results)
        return loss, results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        *buffers, unit = ctx.saved_tensors
        # In units of β/B until here; the factor comes in before the cast, so a loss scaler finds what it needs.
        factor = grad_loss * unit
        # A graph that is not kept gives its buffers away: no second dX and dW.
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        gradients: list[Tensor | None] = []
        for g, needed in zip(buffers, ctx.needs, strict=True):
            if not needed:
                gradients.append(None)
            elif kept or g.dtype != ctx.dtype:
                gradients.append(_scaled(g, factor, ctx.dtype))
            else:
                gradients.append(g.mul_(factor))
        return (*gradients, *[None] * 18)


def _scaled(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """g·factor, rounded once, without a second copy in g's own dtype."""
    if torch.compiler.is_compiling():
        return (g * factor).to(dtype)
    return torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype))


class _TwoPass(torch.autograd.Function):
    """Log-probs in forward; backward projects the policy once more, by the same route, when coefficients are known."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap,
        epsilon, engine, max_tile_bytes, vocab_group, sequence_group,
    ):  # fmt: skip
        run = _pass(
            x, weight, bias, labels, cu_seqlens, ref_x, ref_weight, ref_bias, scale, softcap, ref_scale, ref_softcap,
            torch.ones((), device=x.device), epsilon, engine, max_tile_bytes, vocab_group, sequence_group, False,
        )  # fmt: skip
        with _no_autocast(x):
            for pairs, tiles in run.layout.series:
                for tile in tiles:
                    run.forward(tile)
                run.join(pairs)
        run.release()
        sums = run.tokens.sums
        if not run.layout.n_pairs:
            sums = sums.new_zeros(st.TOKEN, len(cu_seqlens) // 2, 2)
        rows = (
            *(sums[r, :, k] for r in (st.REF_LOGP, st.KL, st.ENTROPY, st.CORRECT) for k in (0, 1)),
            *st.shifts(sums),
        )
        results = torch.stack(rows).to(run.tokens.swept.dtype)
        # The tensors that carry gradient are saved as such, so that a change in place before backward is noticed.
        ctx.save_for_backward(x, weight, bias)
        ctx.run = run
        ctx.mark_non_differentiable(results)
        return (*(sums[st.LOGP].t().to(results.dtype)), results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_chosen, grad_rejected, _):
        run, x = ctx.run, ctx.saved_tensors[0]
        into = _buffers(run, ctx.needs_input_grad[:3])
        accumulate = False
        with _no_autocast(x):
            for _, tiles in run.layout.series:
                for tile in tiles:
                    run.gradient(tile, *run.project(tile), -grad_chosen, -grad_rejected, into, accumulate)
                    accumulate = True
            run.finish(into)
        run.release()
        return (*(None if g is None else g.to(x.dtype) for g in into), *[None] * 14)
