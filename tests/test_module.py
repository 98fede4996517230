"""The running β."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch

from cases import make_case
from epsdpo_kernels import EpsilonDPOLoss

EPSILON = 0.05


def halves(case):
    args, _ = case.arguments()
    for rows in ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]):
        yield [t[rows] if i in (0, 2, 3) else t for i, t in enumerate(args)]


def test_mean_step_over_a_window_of_micro_batches():
    case = make_case(6, drift=0.3, seed=4)
    loss_fn = EpsilonDPOLoss(0.2, EPSILON)
    outputs = [loss_fn(*args) for args in halves(case)]
    for out in outputs:
        assert out.beta.tolist() == pytest.approx((0.2 / (1 + EPSILON * out.step.double())).tolist(), rel=1e-6)
    step = torch.cat([o.step for o in outputs]).double()
    assert loss_fn.beta.item() == pytest.approx(0.2)  # the whole step uses the old β
    loss_fn.update_beta()
    assert loss_fn.beta.item() == pytest.approx(0.2 / (1 + EPSILON * step.mean().item()), rel=1e-6)
    assert loss_fn.counts.tolist() == [0, 0, 0]


def test_mean_beta_and_none():
    case = make_case(6, drift=0.3, seed=4)
    for update in ("mean-beta", "none"):
        loss_fn = EpsilonDPOLoss(0.2, EPSILON, update)
        betas = torch.cat([loss_fn(*args).beta for args in halves(case)])
        loss_fn.update_beta()
        expected = betas.mean().item() if update == "mean-beta" else 0.2
        assert loss_fn.beta.item() == pytest.approx(expected, rel=1e-6)


def test_a_vetoed_pair_counts_as_kept():
    case = make_case(8, drift=0.3, seed=4)
    free = EpsilonDPOLoss(0.2, EPSILON)(*case.arguments()[0])
    relaxed = free.step == 1
    kl = (free.chosen_kl + free.rejected_kl)[relaxed]
    bound = kl.median().item()
    loss_fn = EpsilonDPOLoss(0.2, EPSILON, max_kl=bound)
    out = loss_fn(*case.arguments()[0])
    vetoed = relaxed & (free.chosen_kl + free.rejected_kl > bound)
    assert 0 < vetoed.sum() < relaxed.sum()
    assert torch.equal(out.vetoed, vetoed) and torch.equal(out.step, torch.where(vetoed, 0, free.step))
    assert torch.allclose(out.beta[vetoed], torch.tensor(0.2, dtype=torch.float64))
    assert loss_fn.counts.tolist() == [(out.step == s).sum() for s in (1, 0, -1)]


def test_evaluation_counts_nothing():
    loss_fn = EpsilonDPOLoss(0.2, EPSILON).eval()
    loss_fn(*make_case(3).arguments()[0])
    assert loss_fn.counts.sum() == 0
    loss_fn.update_beta()
    assert loss_fn.beta.item() == pytest.approx(0.2)


def test_a_micro_batch_without_tokens_does_not_dilute_the_mean():
    case = make_case(3, drift=0.3)
    loss_fn = EpsilonDPOLoss()
    step = loss_fn(*case.arguments()[0]).step
    loss_fn(*case._replace(labels=torch.full_like(case.labels, -100)).arguments()[0])
    assert loss_fn.counts.tolist() == [(step == s).sum() for s in (1, 0, -1)]


def test_state_goes_on():
    args, _ = make_case(3, drift=0.3).arguments()
    first, second = EpsilonDPOLoss(0.2, EPSILON), EpsilonDPOLoss(0.1, EPSILON)
    first(*args)
    second.load_state_dict(first.state_dict())
    for loss_fn in (first, second):
        loss_fn(*args)
        loss_fn.update_beta()
    assert torch.equal(first.beta, second.beta) and first.beta != 0.2


def test_a_cast_module_keeps_beta_in_fp32():
    loss_fn = EpsilonDPOLoss(0.123456789, EPSILON).to(torch.bfloat16)
    assert loss_fn.beta.dtype == torch.float32
    assert loss_fn.beta.item() == pytest.approx(0.123456789, rel=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_does_not_change_when_beta_does(compiled):
    """Compiled as torch.compile does by default: it partitions a graph so that backward forms anew what is cheap."""
    loss_fn = EpsilonDPOLoss(0.2, 0.3)
    args, _ = make_case(3, drift=0.3).arguments(grad=("hidden",))
    call = torch.compile(loss_fn, backend="aot_eager_decomp_partition") if compiled else loss_fn
    out = call(*args)
    before = torch.autograd.grad(out.loss, args[0], retain_graph=True)[0]
    loss_fn.update_beta()
    assert torch.equal(torch.autograd.grad(out.loss, args[0])[0], before)


@pytest.mark.parametrize("assign", [False, True])
def test_meta_leaves_a_place_for_what_is_loaded(assign):
    loss_fn = EpsilonDPOLoss(0.25, EPSILON)
    loss_fn.counts += torch.tensor([3, 0, 1])
    empty = EpsilonDPOLoss(0.1, EPSILON).to("meta")
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(copy.deepcopy(loss_fn.state_dict()), assign=assign)
    assert empty.beta.dtype == torch.float32 and empty.beta.item() == 0.25
    assert empty.counts.tolist() == [3, 0, 1] and empty.counts.dtype == torch.int64
    empty.update_beta()
    assert empty.beta.item() == pytest.approx(0.25 / (1 + EPSILON / 2), rel=1e-6)


@pytest.mark.parametrize(
    "of", [np.float32, torch.tensor, Fraction, np.float64], ids=["numpy, 32", "tensor", "fraction", "numpy"]
)
def test_numbers_of_any_kind(of):
    """Are Python's own in the module: β moves by them."""
    loss_fn = EpsilonDPOLoss(of(0.25), of(0.125), label_smoothing=of(0.0625), max_entropy=of(3.5), max_kl=of(40.0))
    settings = (loss_fn.epsilon, loss_fn.label_smoothing, loss_fn.max_entropy, loss_fn.max_kl)
    assert settings == (0.125, 0.0625, 3.5, 40) and {type(n) for n in settings} == {float}
    loss_fn.counts[0] = 1
    loss_fn.update_beta()
    assert loss_fn.beta.item() == pytest.approx(0.25 / 1.125, rel=1e-6)
    with pytest.raises(ValueError, match="beta: got .*, takes a positive finite number"):
        EpsilonDPOLoss(of(-0.1))
