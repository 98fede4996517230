"""The single pass as an op, so that torch.compile sees one node and no tiles; and the two passes of other losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

from . import engines, plan
from .call import SCHEMA, Execution, Inputs, Settings, flatten, restore
from .head import Gradients
from .statistics import TOKEN, TokenStatistics, shifts


def op_name(name: str) -> str:
    return f"epsdpo_kernels::{name}"


def _no_autocast(x: Tensor) -> torch.autocast:
    """The dtypes are settled before a pass begins; autocast would round its fp32 products."""
    return torch.autocast(x.device.type, enabled=False)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that cannot be differentiated. ``anchor`` requires one, so that asking for it comes here."""

    @staticmethod
    def forward(ctx, gradient, anchor):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("loss: got a second derivative to take, takes first ones")


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward whose gradients refuse to be differentiated.

    torch's once_differentiable sees to that only where what comes in requires a gradient: of a penalty on the gradient
    itself, nothing would be left.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *incoming):
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled():  # it is where create_graph was asked for
            return gradients
        return tuple(
            None if g is None else _FirstDerivative.apply(g, g.new_empty(0).requires_grad_()) for g in gradients
        )

    return wrapped


def single_pass_body(*flat: Any) -> tuple[Tensor, ...]:
    """Loss and gradients of a call in one forward; backward only scales what is there.

    Args:
        flat: a call as ``SCHEMA`` has it, and whether gradients of hidden, weight and bias are needed.

    Returns:
        The () loss; the (PAIR, B) results; the gradients of hidden, weight and bias in the compute dtype, empty where
        not needed; and the () unit that they are in.
    """
    (inputs, settings, execution), needs = restore(flat), flat[-1]
    with torch.no_grad(), _no_autocast(inputs.hidden):
        run = plan.Pass(inputs, settings, execution, needs)
        into = run.accumulators()
        results, unit = plan.single_pass(run, settings, into)
        loss = plan.PairResults(*results).losses.sum() / max(inputs.pairs, 1)
        return loss, results, *(results.new_empty(0) if g is None else g for g in into), unit


# It reads lengths back to the host, which no CUDA graph can hold.
single_pass = torch.library.custom_op(
    op_name("single_pass"),
    single_pass_body,
    mutates_args=(),
    schema=f"({SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)


@single_pass.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    (inputs, _, _), needs = restore(flat), flat[-1]
    hidden, weight = inputs.hidden, inputs.policy.weight
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    sizes = ((), (plan.PAIR, inputs.pairs), *(s if n else (0,) for s, n in zip(shapes, needs, strict=True)), ())
    loss, results, dx, dw, db, unit = (hidden.new_empty(size, dtype=inputs.dtype) for size in sizes)
    return loss, results, dx, dw, db, unit


# An op of its own, because a compiler that traces backward must not look into a kernel.
scaled = torch.library.custom_op(
    op_name("scaled"),
    lambda g, factor, dtype, engine: engines.tile_operations(engine, g).scaled(g, factor, dtype),
    mutates_args=(),
    schema="(Tensor g, Tensor factor, ScalarType dtype, str engine) -> Tensor",
)
scaled.register_fake(lambda g, factor, dtype, engine: torch.empty_like(g, dtype=dtype))


def _keep_gradients(ctx, inputs, output) -> None:
    _, results, *gradients, unit = output
    ctx.save_for_backward(*gradients, unit)
    ctx.mark_non_differentiable(results, *gradients, unit)
    ctx.set_materialize_grads(False)
    (bound, _, execution), ctx.needs, ctx.arguments = restore(inputs), inputs[-1], len(inputs)
    ctx.engine, ctx.dtype = execution.engine, bound.hidden.dtype


@once
def _scale_gradients(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * ctx.arguments
    *buffers, unit = ctx.saved_tensors
    # The factor comes in before the cast, so that a loss scaler finds what it needs.
    factor = grad_loss * unit
    # A graph that is not kept gives its buffers away: no second dX and dW. No public call tells; ctx would have to.
    kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    gradients: list[Tensor | None] = []
    for g, needed in zip(buffers, ctx.needs, strict=True):
        if not needed:
            gradients.append(None)
        elif kept or g.dtype != ctx.dtype:
            gradients.append(scaled(g, factor, ctx.dtype, ctx.engine))
        else:
            gradients.append(g.mul_(factor))
    return (*gradients, *[None] * (ctx.arguments - 3))


single_pass.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def epsilon_dpo(inputs: Inputs, settings: Settings, execution: Execution) -> tuple[Tensor, Tensor]:
    """The () differentiable loss and the (PAIR, B) results of a call."""
    loss, results, *_ = single_pass(*flatten(inputs, settings, execution), _needs(inputs))
    return loss, results


def pair_stats(inputs: Inputs, settings: Settings, execution: Execution) -> tuple[Tensor, Tensor, Tensor]:
    """The (B,) log-probs of chosen and rejected, which carry gradient, and the other rows of PairStatistics."""
    call, policy = (inputs, settings, execution, _needs(inputs)), inputs.policy
    apply = TwoPass.apply
    if torch.compiler.is_compiling():  # a compiler would look into the pass; the decorator would load it at import
        apply = torch.compiler.disable(apply)
    return apply(inputs.hidden, policy.weight, policy.bias, call)


def _needs(inputs: Inputs) -> list[bool]:
    """Whether gradients of hidden, weight and bias can be asked for.

    Raises:
        NotImplementedError: one of them carries a forward-mode tangent, which would be lost without a word, or the call
            is within a transform of torch.func, whose tensors the passes cannot read.
    """
    trained = (inputs.hidden, inputs.policy.weight, inputs.policy.bias)
    if not torch.compiler.is_compiling():
        for name, t in zip(("hidden", "weight", "bias"), trained, strict=True):
            if t is not None and unpack_dual(t).tangent is not None:
                raise NotImplementedError(f"{name}: got a tangent of forward-mode autograd, takes backward alone")
        if peek_interpreter_stack() is not None:
            raise NotImplementedError("loss: got a call within a transform of torch.func, takes backward of autograd")
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained]


class TwoPass(torch.autograd.Function):
    """Log-probs in forward; backward projects the policy once more when coefficients are known."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call):
        """What :func:`pair_stats` gives."""
        inputs, settings, execution, needs = call
        run = plan.Pass(inputs, settings, execution, needs, again=True)
        with _no_autocast(hidden):
            for series in run.layout.series:
                for tile in series.tiles:
                    if len(tile):
                        run.forward(tile.rows)
                    if not series.long:
                        run.join(tile.pairs)
                if series.long:
                    run.join(series.pairs)
        run.release()
        sums, count = run.tokens.sums, run.tokens.count
        if not run.layout.n_pairs:
            sums, count = sums.new_zeros(TOKEN, inputs.pairs, 2), sums.new_zeros(inputs.pairs, 2)
        of = TokenStatistics(*sums)
        rows = (side for part in (of.ref_logp, of.kl, of.entropy, of.correct, count) for side in part.unbind(1))
        results = torch.stack((*rows, *shifts(sums))).to(inputs.dtype)
        # The tensors that carry gradient are saved as such, so that a change in place before backward is noticed, and
        # hidden states are freed, or kept elsewhere, as those of any other op.
        ctx.save_for_backward(hidden, weight, bias)
        del run.x, run.ref_x
        ctx.run = run
        ctx.mark_non_differentiable(results)
        return (*of.logp.t().to(results.dtype), results)

    @staticmethod
    @once
    def backward(ctx, grad_chosen, grad_rejected, _):
        run, hidden = ctx.run, ctx.saved_tensors[0]
        run.x = hidden
        into: Gradients = run.accumulators()
        accumulate = False
        coefficient = torch.stack((-grad_chosen, -grad_rejected), 1).flatten().to(run.tokens.swept.dtype)
        with _no_autocast(hidden):
            for group in (group for series in run.layout.series for group in series.groups):
                waiting = 0
                for tile in (tile for tile in group if len(tile)):
                    g = run.gradient(tile.rows, run.project(tile.rows), coefficient, waiting)
                    waiting += len(tile)
                if waiting:
                    run.backward(group, g, into, accumulate)
                    accumulate = True
            run.finish(into)
        run.release()
        del run.x
        return (*(None if g is None else g.to(hidden.dtype) for g in into), None)
