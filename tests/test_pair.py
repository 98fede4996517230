"""The mathematics of a pair, against numbers worked out by hand."""

import math

import pytest
import torch

from epsdpo_kernels.pair import (
    losses_and_coefficients,
    lsc_dpo,
    pair_beta,
    perturbation_step,
    preference_losses,
    withhold_relaxation,
)


def test_step_is_strict_on_both_sides():
    relaxed = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 1.0, torch.nan, torch.inf])
    tightened = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, -1.0, -1.0])
    assert perturbation_step(relaxed, tightened).tolist() == [1, -1, 0, 0, 0, 0, 0, 0, 0]
    assert perturbation_step(relaxed, tightened).dtype == torch.int8


def test_a_veto_withholds_relaxation_alone():
    step = torch.tensor([1, 1, 1, 1, 0, -1], dtype=torch.int8)
    entropy = torch.tensor([1.0, 3.0, 1.0, 2.0, 3.0, 3.0])
    kl = torch.tensor([5.0, 5.0, 11.0, 10.0, 11.0, 11.0])
    for bounds, expected in {
        (None, None): [1, 1, 1, 1, 0, -1],
        (2.0, None): [1, 0, 1, 1, 0, -1],
        (None, 10.0): [1, 1, 0, 1, 0, -1],
        (2.0, 10.0): [1, 0, 0, 1, 0, -1],
    }.items():
        got = withhold_relaxation(step, entropy, kl, *bounds)
        assert got.tolist() == expected and got.dtype == torch.int8


def test_beta_is_smaller_where_relaxed():
    step = torch.tensor([1, 0, -1], dtype=torch.int8)
    got = pair_beta(step, torch.tensor(0.1, dtype=torch.float64), 0.25)
    assert got.tolist() == [0.1 / 1.25, 0.1, 0.1 / 0.75]
    assert pair_beta(step, 0.1, 0.25).dtype == torch.float32


def test_loss_of_a_hand_worked_pair():
    logps = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -14.0, -11.0, -12.0)]
    beta = torch.tensor([0.2], dtype=torch.float64)
    logit = 0.2 * ((-10 + 14) - (-11 + 12))
    sigmoid = 1 / (1 + math.exp(-logit))
    plain = preference_losses(*logps, beta)
    smooth = preference_losses(*logps, beta, label_smoothing=0.1)
    assert plain.item() == pytest.approx(-math.log(sigmoid), rel=1e-14)
    assert smooth.item() == pytest.approx(-0.9 * math.log(sigmoid) - 0.1 * math.log(1 - sigmoid), rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_coefficient_is_the_whole_gradient(smoothing):
    torch.manual_seed(0)
    logps = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    beta = torch.rand(5, dtype=torch.float64) + 0.1
    losses, coefficient = losses_and_coefficients(tuple(logps), beta, smoothing)
    gradients = torch.autograd.grad(preference_losses(*logps, beta, smoothing).sum(), logps)
    for gradient, sign in zip(gradients, (-1, 1, 1, -1), strict=True):
        torch.testing.assert_close(gradient, sign * coefficient, rtol=1e-14, atol=0)
    assert not losses.requires_grad and not coefficient.requires_grad


def test_no_gradient_through_beta():
    beta = torch.tensor([0.1], requires_grad=True)
    loss = preference_losses(*(torch.zeros(1, requires_grad=True) for _ in range(4)), beta).sum()
    assert torch.autograd.grad(loss, beta, allow_unused=True) == (None,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_has_no_loss(bad):
    logps = [torch.tensor([bad if i == 0 else -1.0, -2.0]) for i in range(4)]
    losses = preference_losses(*logps, torch.tensor([0.1, 0.1]))
    assert losses.isnan().tolist() == [True, False]


LSC = {"z_star": 0.4, "eta": 0.1, "tau_start": 0.45}


def test_lsc_beta_of_hand_worked_steps():
    # σ(−z) < 0.45 is z > ln(0.55 / 0.45) = 0.20067.
    assert lsc_dpo(0.1, 10.0, **LSC) == pytest.approx(0.1 * 0.9417645336, rel=1e-9)  # z = 1: e^−0.06
    assert lsc_dpo(0.03, 10.0, **LSC) == pytest.approx(0.03 * 1.0100501671, rel=1e-9)  # z = 0.3: e^0.01, β rises
    assert lsc_dpo(0.1, 4.0, **LSC) == pytest.approx(0.1, rel=1e-15)  # z = z*
    for z in (0.2006, 0.0, -30.0, math.nan):
        assert lsc_dpo(0.1, 10 * z, **LSC) == 0.1
    assert lsc_dpo(0.1, 2.007, **LSC) > 0.1


def test_lsc_beta_has_a_fixed_point_for_a_margin_that_stays():
    for start in (0.03, 2.0):
        beta, gaps = start, []
        for _ in range(600):
            beta = lsc_dpo(beta, 8.0, **LSC)
            gaps.append(math.log(beta * 8.0 / 0.4))
        assert beta == pytest.approx(0.4 / 8.0, rel=1e-9)
        near = next(i for i, gap in enumerate(gaps) if 0 < abs(gap) < 1e-3)
        assert gaps[near + 1] / gaps[near] == pytest.approx(1 - 0.1 * 0.4, rel=1e-3)  # their proposition 1
    beta = 0.051
    for _ in range(200):  # η·z* = 2.4
        beta = lsc_dpo(beta, 8.0, 0.4, 6.0, 0.45)
    assert abs(beta / 0.05 - 1) > 0.2
    assert lsc_dpo(0.01, 8.0, **LSC) == 0.01  # below the start, β does not rise either
