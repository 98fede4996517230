"""Inputs that the tests share: ragged pairs near a reference, seeded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from epsdpo_kernels import EpsilonDPOOutput, call

DISCRETE = ("step", "vetoed")


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    bias: Tensor | None
    ref_bias: Tensor | None

    def arguments(self, dtype=None, grad=()) -> tuple[tuple, dict]:
        """Positional and keyword arguments of the loss; ``grad`` names what requires a gradient."""
        fields = {}
        for name, t in self._asdict().items():
            if t is not None and t.is_floating_point():
                t = t.detach().to(dtype or t.dtype, copy=True).requires_grad_(name in grad)
            fields[name] = t
        return tuple(fields.values())[:5], {"bias": fields["bias"], "ref_bias": fields["ref_bias"]}


def make_case(
    pairs=2, length=7, width=6, vocabulary=103, ref_width=None, bias=False, drift=0.05, spread=1.0, seed=0, masked=True
) -> Case:
    """float64 tensors, whose values bf16 holds exactly so that every dtype sees the same inputs.

    ``drift`` is the policy's distance from the reference, ``spread`` about the standard deviation of the logits. Where
    ``masked``, completions have ragged lengths and some have holes.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=g) * std).bfloat16().double()

    ref_hidden = normal(2 * pairs, length, ref_width or width)
    ref_weight = normal(vocabulary, ref_width or width, std=spread / (ref_width or width) ** 0.5)
    if ref_width in (None, width):
        hidden = (ref_hidden + drift * normal(*ref_hidden.shape)).bfloat16().double()
        weight = (ref_weight + drift * normal(*ref_weight.shape, std=ref_weight.std().item())).bfloat16().double()
    else:
        hidden, weight = normal(2 * pairs, length, width), normal(vocabulary, width, std=spread / width**0.5)
    labels = torch.randint(0, vocabulary, (2 * pairs, length), generator=g)
    if masked:
        for row in labels:
            start = int(torch.randint(0, length, (), generator=g))
            row[:start] = -100
            hole = int(torch.randint(0, length, (), generator=g))
            if start < hole < length - 1:
                row[hole] = -100
    biases = (normal(vocabulary), normal(vocabulary)) if bias else (None, None)
    return Case(hidden, weight, labels, ref_hidden, ref_weight, *biases)


def problems():
    """A hypothesis strategy of (case, options of the loss): what every engine must get right, small enough for each."""
    from hypothesis import strategies as st  # not on every machine that has a GPU

    sizes = st.fixed_dictionaries(
        {
            "pairs": st.integers(1, 3),
            "length": st.integers(1, 6),
            "width": st.sampled_from([1, 3, 16, 40]),
            "ref_width": st.sampled_from([None, None, 5, 33]),
            "vocabulary": st.sampled_from([2, 17, 64, 65, 130, 259]),
            "bias": st.booleans(),
            "drift": st.sampled_from([0.0, 0.05, 1.0]),
            "spread": st.sampled_from([0.3, 1.0, 4.0]),
            "seed": st.integers(0, 10_000),
        }
    )
    options = st.fixed_dictionaries(
        {
            "epsilon": st.sampled_from([0.0, 0.01, 0.1]),
            "beta": st.sampled_from([0.01, 0.1, 1.3]),
            "logit_scale": st.sampled_from([1.0, 0.6, -1.5]),
            "softcap": st.sampled_from([None, None, 4.0]),
            "ref_logit_scale": st.sampled_from(["policy", "policy", 0.8]),
            "ref_softcap": st.sampled_from(["policy", None, 3.0]),
            "label_smoothing": st.sampled_from([0.0, 0.2]),
            "max_tile_bytes": st.sampled_from([None, 20_000, 1]),
        }
    )

    def build(size, options, peak, forbidden, shared):
        case = make_case(**size)
        if shared and case.weight.shape == case.ref_weight.shape:
            case = case._replace(ref_weight=case.weight)
        if peak:
            plant_peaks(case)
        # A cap makes −inf a number again: a word that the reference alone forbids is infinitely far from it.
        if forbidden and size["bias"] and not (options["softcap"] and options["ref_softcap"] is None):
            forbid_words(case)
        return case, options

    return st.builds(build, sizes, options, st.booleans(), st.booleans(), st.booleans())


def plant_peaks(case: Case) -> None:
    """Makes the policy nearly certain of the label of each row's last token, and of some other word at its first."""
    for row in range(len(case.labels)):
        for token, word in ((0, row % len(case.weight)), (-1, case.labels[row, -1].clamp_min(0))):
            direction = case.weight[word]
            largest = (case.weight @ direction).abs().max().clamp_min(1e-6)
            case.hidden[row, token] = (direction * 30 / largest).bfloat16().double()


def plant_first(case: Case) -> Case:
    """Every other label becomes the word that the policy ranks first (logits scaled by a positive number)."""
    logits = case.hidden @ case.weight.T + (0 if case.bias is None else case.bias)
    labels = case.labels.clone()
    labels[..., ::2] = torch.where(labels == -100, labels, logits.argmax(-1))[..., ::2]
    return case._replace(labels=labels)


def forbid_words(case: Case) -> None:
    """−inf in the policy's bias for up to three words that are no labels, and for one of them in the reference's."""
    free = [v for v in range(len(case.weight)) if v not in case.labels.unique().tolist()][:3]
    if len(free) < len(case.weight) - 1:
        case.bias[free] = -torch.inf
        case.ref_bias[free[:1]] = -torch.inf


def pack(case: Case) -> tuple[Case, Tensor]:
    """The same completions one after the other, each cut to its last scored token, and their cu_seqlens."""
    ends = [int((row != -100).nonzero().max()) + 1 for row in case.labels]
    cu_seqlens = torch.tensor([0, *ends]).cumsum(0).int()
    flat = {n: torch.cat([t[i, :e] for i, e in enumerate(ends)]) for n, t in case._asdict().items() if n in PADDED}
    return case._replace(**flat), cu_seqlens


PADDED = ("hidden", "labels", "ref_hidden")


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)).item()


def field_error(got: EpsilonDPOOutput, truth: EpsilonDPOOutput, name: str) -> float:
    """Largest error of a field over the largest value of what it is made from.

    Rewards and KL are differences of log-probs, so no better than their rounding: they are judged by the log-probs'
    size. How near a single one comes by luck, in this code or another, says nothing; :func:`rms_ratios` tells.
    """
    value = getattr(truth, name).double()
    size = value.abs().max()
    side, _, what = name.partition("_")
    if what in ("rewards", "kl"):
        logps = getattr(truth, f"{side}_logps").abs().max()
        size = torch.maximum(size, logps * truth.beta.max() if what == "rewards" else logps)
    return ((getattr(got, name).double() - value).abs().max() / size.clamp_min(1e-30)).item()


def rms_ratios(got: EpsilonDPOOutput, naive: EpsilonDPOOutput, truth: EpsilonDPOOutput) -> dict[str, float]:
    """Errors of each field, root mean square over the pairs, in units of the naive code's in the same dtype.

    Only of pairs that all decided alike, because rewards and losses follow from the step. Give it hundreds of pairs of
    one token each: what fp32 rounds off then adds up neither with length nor by chance.
    """
    alike = (got.step == truth.step) & (naive.step == truth.step)
    assert alike.double().mean() > 0.95

    def rms(output: EpsilonDPOOutput, name: str) -> Tensor:
        return (getattr(output, name).double() - getattr(truth, name))[alike].square().mean().sqrt()

    fields = [n for n in got._fields if n not in (*DISCRETE, "loss") and not n.endswith("token_accuracy")]
    return {name: (rms(got, name) / rms(naive, name)).item() for name in fields}


def worst_error(got: EpsilonDPOOutput, truth: EpsilonDPOOutput) -> float:
    """Largest relative error over all continuous fields."""
    return max(relative_error(g, t) for n, g, t in zip(got._fields, got, truth, strict=True) if n not in DISCRETE)


def flat_call(case: Case, engine: str) -> tuple:
    """A call on a case in fp32, as an op takes it, with what is not the default."""
    (x, weight, labels, ref_x, ref_weight), biases = case.arguments(torch.float32)
    policy, reference = call.heads((weight, biases["bias"]), (ref_weight, biases["ref_bias"]), (1.0, 1.0), (None, 3.0))
    return call.flatten(
        call.bind_inputs(x, policy, ref_x, reference, labels, None),
        call.bind_settings(0.1, 0.01, 0.0, None, 40.0, x),
        call.bind_execution(engine, None, None, None, x),
    )
