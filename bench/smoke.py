"""The first minute on a GPU: the products that only CUDA has, each by itself, then every kernel against float64 at the
heads of real models, so that a fault names itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epsdpo_kernels import engines, epsilon_dpo_reference, linear_epsilon_dpo, linear_pair_stats

from .cases import Case, Inputs, make_inputs
from .fidelity import fp32_bound

Check = Callable[[], dict[str, float]]
# Tokens a completion: enough for more than a block of rows, few enough for float64's logits.
HEADS = {"1001x100": 20, "tiny-softcap": 70, "smollm2": 256, "llama3": 64, "gemma2": 32}
DTYPES = ("bfloat16", "float16", "float32")
# Those in fp32 would take most of the minute.
LARGE = ("llama3", "gemma2")


def checks(device: str, tiny: bool) -> Iterator[tuple[str, Check]]:
    """(name, what gives its errors and raises where they are too large)."""
    for vocabulary in (1001, 1031 if tiny else 128256):
        yield from _products(vocabulary, device)
    for head, rows in ({"131x40": 8} if tiny else HEADS).items():
        for dtype in DTYPES:
            if dtype == "float32" and head in LARGE:
                continue
            for mode in ("train", "score"):
                case = Case(head, rows, pairs=2, masked=0.25, mode=mode, dtype=dtype)
                for logit_free in (False, True):
                    name = f"{head}, {dtype}, {mode}, {'logit-free' if logit_free else 'products'}"
                    yield name, partial(_loss, case, device, logit_free)
    yield "statistics of pairs", partial(_statistics, Case("131x40", 8, pairs=2), device)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double() - truth.detach()).norm() / truth.detach().norm())


def within(limit: float, **errors: float) -> dict[str, float]:
    assert all(value <= limit for value in errors.values()), f"errors above {limit}: {errors}"
    return errors


def _products(vocabulary: int, device: str) -> Iterator[tuple[str, Check]]:
    """As head.py calls them: 16-bit factors, fp32 results, a view with rows apart, a result that holds NaN.

    A matrix unit that truncates as it adds loses some digits of fp32 over a long sum.
    """
    # A CPU has no product of 16-bit factors with an fp32 result.
    sixteen = torch.float32 if device == "cpu" else torch.bfloat16
    wide: dict[str, Any] = {} if device == "cpu" else {"out_dtype": torch.float32}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(sixteen)

    weight, x = normal(vocabulary, 256), normal(64, 256)
    logits = torch.empty(64, vocabulary, device=device)
    apart = normal(64, 2 * vocabulary)[:, :vocabulary]
    dw = torch.full((vocabulary, 256), torch.nan, device=device)

    def project() -> dict[str, float]:
        torch.mm(x, weight.t(), out=logits, **wide)
        return within(1e-3, logits=error(logits, x.double() @ weight.double().t()))

    def hidden() -> dict[str, float]:
        return within(1e-3, dx=error(torch.mm(apart, weight, **wide), apart.double() @ weight.double()))

    def accumulated(times: int) -> dict[str, float]:
        torch.addmm(dw, apart.t(), x, beta=int(times > 1), out=dw, **wide)
        return within(1e-3, dw=error(dw, times * (apart.double().t() @ x.double())))

    yield f"mm into fp32, V {vocabulary}", project
    yield f"mm of rows that lie apart, V {vocabulary}", hidden
    yield f"addmm into NaN, V {vocabulary}", partial(accumulated, 1)
    yield f"addmm that adds, V {vocabulary}", partial(accumulated, 2)


def _double(inputs: Inputs) -> Inputs:
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    tensors: list[Tensor] = [getattr(inputs, name) for name in names]
    wide = (t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    return inputs._replace(**dict(zip(names, wide, strict=True)))  # type: ignore[arg-type]


def _loss(case: Case, device: str, logit_free: bool) -> dict[str, float]:
    """Decisions float64's, shifts and gradients near them."""
    inputs = make_inputs(case, device)
    double = _double(inputs)
    truth = epsilon_dpo_reference(*double[:5], softcap=inputs.softcap)
    engines.LOGIT_FREE = logit_free
    try:
        got = linear_epsilon_dpo(*inputs[:5], softcap=inputs.softcap, engine="triton")
    finally:
        engines.LOGIT_FREE = None
    near = torch.minimum(truth.relaxed_shift.abs(), truth.tightened_shift.abs()) < fp32_bound(double)
    wrong = (got.step != truth.step) & ~near
    assert not wrong.any(), f"steps {got.step.tolist()}, in float64 {truth.step.tolist()}"
    errors = within(1e-2, shift=error(got.relaxed_shift, truth.relaxed_shift))
    if case.mode == "train":
        found = torch.autograd.grad(got.loss, (inputs.hidden, inputs.weight))
        expected = torch.autograd.grad(truth.loss, double[:2])
        errors |= within(1e-2, **{n: error(g, t) for n, g, t in zip(("dx", "dw"), found, expected, strict=True)})
    return errors


def _statistics(case: Case, device: str) -> dict[str, float]:
    inputs = make_inputs(case, device)
    hidden, weight, labels, *_ = _double(inputs)
    logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1)
    got = linear_pair_stats(*inputs[:5], engine="triton")
    (dx,) = torch.autograd.grad(got.chosen_logps.sum(), inputs.hidden)
    (expected,) = torch.autograd.grad(logps.chunk(2)[0].sum(), hidden)
    return within(1e-4, logps=error(got.rejected_logps, logps.chunk(2)[1]), dx=error(dx, expected))
