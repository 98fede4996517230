"""What is measured against what: every variant maps the same inputs to a loss and fills the same gradients.

ε-DPO: this package, the bare products it can't go below, the same loss with its logits in memory, and the same loss put
together from a general log-prob kernel. Plain DPO, which is less work: the kernels of TRL, Liger-Kernel,
cut-cross-entropy and torch, called as their own trainers and docs call them; Liger's class twice, for it compiles its
loss by default ("liger compiled") and that is not to be had everywhere ("liger").
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epsdpo_kernels import call as bound_call
from epsdpo_kernels import engines, epsilon_dpo_reference, linear_epsilon_dpo, plan
from epsdpo_kernels.head import Gradients, Head
from epsdpo_kernels.pair import pair_beta, perturbation_step, preference_losses

from .cases import Case, Inputs

BETA, EPSILON = 0.1, 0.01
TRL_WORDS = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
# Rows of the bare products are cut so that their one buffer stays below this, as any implementation would have to.
LIMIT_BYTES = 4 << 30
Call = Callable[[Inputs], Tensor]


class Unavailable(RuntimeError):
    """Why a variant has no result here, in words for a table."""


def ours(inputs: Inputs, epsilon: float = EPSILON, **options) -> Tensor:
    out = linear_epsilon_dpo(*inputs[:5], beta=BETA, epsilon=epsilon, softcap=inputs.softcap, **options)
    return out.loss


def ours_with(module: Any, name: str, value: Any, inputs: Inputs, **options) -> Tensor:
    """``ours`` with a number of a module of the package's set to another."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        return ours(inputs, **options)
    finally:
        setattr(module, name, before)


def ours_by_route(logit_free: bool, inputs: Inputs) -> Tensor:
    """One of the Triton engine's two forward routes: head and sweep in one kernel, or library products and a sweep."""
    if not inputs.hidden.is_cuda:
        raise Unavailable("needs a GPU")
    return ours_with(engines, "LOGIT_FREE", logit_free, inputs)


def bound(inputs: Inputs, engine: str = "auto", max_tile_bytes: int | None = None) -> tuple[Any, Any, Any]:
    """The same call as ``ours``, bound, for who looks below the public function."""
    softcap, hidden = inputs.softcap, inputs.hidden
    policy, reference = bound_call.heads(
        (inputs.weight, None), (inputs.ref_weight, None), (1.0, bound_call.POLICY), (softcap, bound_call.POLICY)
    )
    return (
        bound_call.bind_inputs(hidden, policy, inputs.ref_hidden, reference, inputs.labels, None),
        bound_call.bind_settings(BETA, EPSILON, 0.0, None, None, hidden),
        bound_call.bind_execution(engine, max_tile_bytes, None, None, hidden),
    )


class Products:
    """The bare matrix products of the single pass, with its dtypes and accumulation, and nothing else.

    Two projections, then dX and dW from a matrix that stands for the gradient, as far as the mode asks for them, by the
    routines of the pass. All memory is there before: nothing is allocated, no other tensor is read.
    """

    def __init__(self, inputs: Inputs):
        scored = (inputs.labels != -100).flatten()
        self.x = inputs.hidden.detach().flatten(0, 1)[scored]
        self.ref_x = inputs.ref_hidden.flatten(0, 1)[scored]
        self.policy = Head(inputs.weight.detach(), None, 1.0, None)
        self.reference = Head(inputs.ref_weight, None, 1.0, None)
        vocabulary, dtype = len(inputs.weight), torch.float64 if self.x.dtype == torch.float64 else torch.float32
        self.rows = min(len(self.x), max(1, LIMIT_BYTES // (4 * vocabulary)))
        self.logits = self.x.new_empty(self.rows, vocabulary, dtype=dtype)
        # Numbers, because a GPU multiplies zeros faster. In the compute dtype the logits themselves stand for it.
        sixteen_bits = self.policy.gradient_dtype != dtype
        self.g = torch.rand_like(self.logits, dtype=self.policy.gradient_dtype) if sixteen_bits else self.logits
        self.index = torch.arange(len(self.x), device=self.x.device)
        self.into = Gradients(
            torch.zeros_like(self.x, dtype=dtype) if inputs.hidden.requires_grad else None,
            torch.zeros_like(inputs.weight, dtype=dtype) if inputs.weight.requires_grad else None,
            None,
        )

    def __call__(self) -> None:
        with torch.no_grad():
            for start in range(0, len(self.x), self.rows):
                part = slice(start, start + self.rows)
                x, ref_x = self.x[part], self.ref_x[part]
                logits, g = self.logits[: len(x)], self.g[: len(x)]
                self.reference.project(ref_x, logits)
                self.policy.project(x, logits)
                if any(into is not None for into in self.into):
                    self.policy.backward(g, x, self.index[part], self.into, accumulate=start > 0)


def materialised(inputs: Inputs) -> Tensor:
    """All logits in memory, in fp32 whatever the inputs are."""
    single = [t if t.dtype == torch.float64 else t.float() for t in (inputs.hidden, inputs.weight)]
    ref = [t if t.dtype == torch.float64 else t.float() for t in (inputs.ref_hidden, inputs.ref_weight)]
    args = (*single, inputs.labels, *ref)
    return epsilon_dpo_reference(*args, beta=BETA, epsilon=EPSILON, softcap=inputs.softcap).loss  # type: ignore[misc]


def authors(inputs: Inputs) -> Tensor:
    """All logits in memory, in the model's dtype: what the method's own implementation does."""
    if inputs.hidden.dtype == torch.float32:
        raise Unavailable("the same as materialised in fp32")
    return epsilon_dpo_reference(*inputs[:5], beta=BETA, epsilon=EPSILON, softcap=inputs.softcap).loss


def _each_shape_compiled() -> AbstractContextManager:
    """Every shape of a process is compiled for itself.

    By default the second would be compiled for all that follow, and after eight torch would go on uncompiled with no
    more than a warning: here that is an error, of the process's hundredth shape.
    """
    return torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=100, fail_on_recompile_limit_hit=True
    )


@functools.cache
def _compiled():
    return torch.compile(epsilon_dpo_reference)


def materialised_compiled(inputs: Inputs) -> Tensor:
    """All logits in memory, in the inputs' dtype, by torch.compile."""
    with _each_shape_compiled():
        return _compiled()(*inputs[:5], beta=BETA, epsilon=EPSILON, softcap=inputs.softcap).loss


class TiledLogProb(torch.autograd.Function):
    """A general log-prob kernel, tiled over tokens: log softmax(x·Wᵀ)[label], its logits formed again in backward."""

    ROWS = 256

    @staticmethod
    def logits(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            z = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            z = (x @ weight.t()).float() if x.dtype != torch.float64 else x @ weight.t()
        return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)

    @staticmethod
    def forward(ctx, x, weight, labels, softcap):
        ctx.save_for_backward(x, weight, labels)
        ctx.softcap = softcap
        parts = []
        for rows, index in zip(x.split(TiledLogProb.ROWS), labels.split(TiledLogProb.ROWS), strict=True):
            z = TiledLogProb.logits(rows, weight, softcap)
            parts.append(z.gather(1, index[:, None])[:, 0] - z.logsumexp(1))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        x, weight, labels = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), TiledLogProb.ROWS):
            part = slice(start, start + TiledLogProb.ROWS)
            z = TiledLogProb.logits(x[part], weight, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (z / ctx.softcap).square()
            g = z.softmax(1).mul_(-grad[part, None])
            g.scatter_add_(1, labels[part, None], grad[part, None].to(g.dtype))
            if slope is not None:
                g.mul_(slope)
            g = g.to(x.dtype)
            if dx is not None:
                torch.mm(g, weight, out=dx[part])
            if dw is not None:
                if g.dtype == wide:
                    dw.addmm_(g.t(), x[part])
                elif g.is_cuda:
                    torch.addmm(dw, g.t(), x[part], out_dtype=wide, out=dw)
                else:
                    dw += g.t() @ x[part]
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def composed(inputs: Inputs) -> Tensor:
    """ε-DPO from a general log-prob kernel: policy 4 G, reference 1 G, two mixtures of twice the width 2 G each."""
    logps, ref_logps, shifts = composed_parts(inputs)
    beta = pair_beta(perturbation_step(*shifts), BETA, EPSILON)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref_logps.chunk(2)
    return preference_losses(chosen, rejected, ref_chosen, ref_rejected, beta).mean()


def composed_parts(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(2B,) log-probs of policy and reference, and the two (B,) shifts.

    The perturbed logits (1 ± ε)·a ∓ ε·b are one product, [(1 ± ε)·h, ∓ε·h_ref]·[W, W_ref]ᵀ.
    """
    if inputs.softcap is not None:
        raise Unavailable("a mixture of capped logits is not one product")
    scored = inputs.labels != -100
    labels = inputs.labels[scored]
    x, ref_x = inputs.hidden[scored], inputs.ref_hidden[scored]

    def sequences(x: Tensor, weight: Tensor) -> Tensor:
        return _sums(TiledLogProb.apply(x, weight, labels, None), scored)

    logps = sequences(x, inputs.weight)
    with torch.no_grad():
        ref_logps = sequences(ref_x, inputs.ref_weight)
        both = torch.cat((inputs.weight, inputs.ref_weight), 1)
        z = _ratio(logps)
        mixtures = (torch.cat(((1 + e) * x, -e * ref_x), 1) for e in (EPSILON, -EPSILON))
        shifts = [_ratio(sequences(mixture, both)) - z for mixture in mixtures]
    return logps, ref_logps, shifts


def _sums(per_token: Tensor, scored: Tensor) -> Tensor:
    """Log-probs of the scored tokens in order -> (2B,) sums."""
    full = per_token.new_zeros(scored.shape).masked_scatter(scored, per_token)
    return full.sum(1)


def _ratio(logps: Tensor) -> Tensor:
    chosen, rejected = logps.chunk(2)
    return chosen - rejected


def _plain_dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), ref_logps.chunk(2)
    return -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def _peer(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"{name} is not installed")


def trl(inputs: Inputs) -> Tensor:
    """TRL's DPO with its chunked log-prob kernel, as its patched forward calls it.

    Only on devices with Triton does it leave out the tokens that are not scored. The statistics that the trainer logs
    beside them are left out here: log-probs alone are asked for.
    """
    _peer("trl")
    from trl.kernels import ChunkedLogProbFunction

    scored = inputs.labels != -100

    def sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.is_cuda:
            x, labels = hidden[scored], inputs.labels[scored]
        else:
            x, labels = hidden.reshape(-1, hidden.shape[-1]), inputs.labels.clamp(min=0).reshape(-1)
        logps = ChunkedLogProbFunction.apply(x, weight, None, labels, 1.0, TRL_WORDS, inputs.softcap, 1.0, ())[0]
        return _sums(logps, scored) if hidden.is_cuda else logps.view(scored.shape).masked_fill(~scored, 0).sum(1)

    with torch.no_grad():
        ref_logps = sequences(inputs.ref_hidden, inputs.ref_weight)
    return _plain_dpo(sequences(inputs.hidden, inputs.weight), ref_logps)


def liger(inputs: Inputs, compiled: bool = False) -> Tensor:
    _peer("liger_kernel")
    if inputs.softcap is not None:
        raise Unavailable("has no softcap")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled)
    # It marks the length of its labels as dynamic; a view takes the mark, so that others compile for the case as it is.
    labels = inputs.labels.detach()
    with _each_shape_compiled() if compiled else nullcontext():
        loss, _ = loss_fn(
            inputs.weight, inputs.hidden, labels, ref_input=inputs.ref_hidden, ref_weight=inputs.ref_weight
        )
    return loss


def _cross_entropy_dpo(inputs: Inputs, cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Plain DPO from the cross-entropies of hidden states (2B·T, H), a head and labels (2B·T,), zero where not scored.

    All are flat because the gradient of each, a sequence's, is then laid out one by one, as cut-cross-entropy's
    backward takes it; through (2B, T) it would come as one number a sequence, expanded.
    """

    def sequences(hidden: Tensor, weight: Tensor) -> Tensor:
        per_token = cross_entropy(hidden.flatten(0, 1), weight, inputs.labels.flatten())
        return -per_token.view(inputs.labels.shape).sum(1)

    with torch.no_grad():
        ref_logps = sequences(inputs.ref_hidden, inputs.ref_weight)
    return _plain_dpo(sequences(inputs.hidden, inputs.weight), ref_logps)


def cce(inputs: Inputs) -> Tensor:
    _peer("cut_cross_entropy")
    if not inputs.hidden.is_cuda:
        raise Unavailable("needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return _cross_entropy_dpo(inputs, functools.partial(linear_cross_entropy, softcap=inputs.softcap, reduction="none"))


def torch_cross_entropy(inputs: Inputs) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("needs torch 2.13")
    if inputs.softcap is not None:
        raise Unavailable("has no softcap")
    options = torch.nn.LinearCrossEntropyOptions()
    return _cross_entropy_dpo(
        inputs, functools.partial(F.linear_cross_entropy, reduction="none", ignore_index=-100, options=options)
    )


# In the order of the tables. ε-DPO first, then plain DPO.
EPSILON_DPO: dict[str, Call] = {
    "ours": ours,
    "ours logit-free": functools.partial(ours_by_route, True),
    "materialised": materialised,
    "materialised compiled": materialised_compiled,
    "authors": authors,
    "composed": composed,
}
PLAIN_DPO: dict[str, Call] = {
    "ours at ε = 0": functools.partial(ours, epsilon=0.0),
    "trl": trl,
    "liger": liger,
    "liger compiled": functools.partial(liger, compiled=True),
    "cut-cross-entropy": cce,
    "torch": torch_cross_entropy,
}
# For memory against tokens and vocabulary: a budget that every size of these uses up.
SMALL_TILES = "ours in 16 MiB tiles"
VARIANTS = EPSILON_DPO | PLAIN_DPO
# Both routes and the plan's numbers, one against the other on one machine.
ROUTES: dict[str, Call] = {
    "ours logit-free": VARIANTS["ours logit-free"],
    "ours by products": functools.partial(ours_by_route, False),
}
BUDGETS: dict[str, Call] = {
    f"ours in {gib} GiB": functools.partial(ours, max_tile_bytes=int(gib * 2**30)) for gib in (0.5, 1, 2, 4)
}
WAITING: dict[str, Call] = {
    f"ours, {n} tiles to a product": functools.partial(ours_with, plan, "WAITING", n) for n in (1, 2, 8)
}
CALLS = VARIANTS | ROUTES | BUDGETS | WAITING | {SMALL_TILES: functools.partial(ours, max_tile_bytes=16 << 20)}
LIMIT = "limit"
COMPILED = ("materialised compiled", "liger compiled")


def products(variant: str, case: Case) -> float:
    """Products of the head's size that a variant takes, in units of G; a guess of its time, for progress and rounds."""
    train, frozen = case.limit >= 3, case.mode == "frozen"
    of_policy = {4: 4.0, 3: 3.0, 2: 1.0}[case.limit] if train else 1.0  # two passes recompute the logits
    everything = case.total / case.scored
    if variant.startswith("ours") or variant == LIMIT:
        return case.limit
    if variant in ("materialised", "materialised compiled", "authors"):
        return 2.0 * case.limit * everything
    if variant == "composed":
        return of_policy + 5
    if variant == "trl":
        return (of_policy + 1) * everything
    if variant.startswith("liger"):
        return (case.limit + (1 if frozen else 0)) * everything * 1.3
    if variant == "torch":
        return 30.0  # measured at SmolLM2's shape; more where the head is wider
    return of_policy + 1.5


def call(variant: str, inputs: Inputs) -> Callable[[], Tensor | None]:
    """A function of no arguments that runs the variant, forward and backward, on fresh gradients.

    Raises:
        Unavailable: the variant can't run on these inputs, with the reason.
    """
    if variant == LIMIT:
        return Products(inputs)
    function = CALLS[variant]
    wanted = inputs.hidden.requires_grad

    def run() -> Tensor:
        inputs.hidden.grad = inputs.weight.grad = None
        with torch.set_grad_enabled(wanted):
            loss = function(inputs)
        if wanted:
            loss.backward()
        return loss

    return run


def check(variant: str, inputs: Inputs) -> dict[str, float]:
    """Relative errors of a variant's loss and gradients against float64 of the same inputs."""
    loss = call(variant, inputs)()
    assert loss is not None
    got = [loss.detach().double(), inputs.hidden.grad, inputs.weight.grad]
    hidden, weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (inputs.hidden, inputs.weight))
    double = Inputs(
        hidden, weight, inputs.labels, inputs.ref_hidden.double(), inputs.ref_weight.double(), inputs.softcap
    )
    # ε-DPO is judged by its own β; a step that rounding decides wrongly shows in fidelity, not here.
    out = epsilon_dpo_reference(
        *double[:5], beta=BETA, epsilon=0.0 if variant in PLAIN_DPO else EPSILON, softcap=inputs.softcap
    )
    if out.loss.requires_grad:
        out.loss.backward()
    truth = [out.loss.detach(), double.hidden.grad, double.weight.grad]
    errors = {}
    for name, g, t in zip(("loss", "hidden", "weight"), got, truth, strict=True):
        if t is not None:
            assert g is not None, f"{variant} leaves {name} without a gradient"
            errors[name] = float((g.double() - t).abs().max() / t.abs().max())
    return errors
