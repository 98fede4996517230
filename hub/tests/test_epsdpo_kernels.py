"""The kernel against the same loss with all logits in memory, in float64, on the device that there is."""

import pytest
import torch

import epsdpo_kernels


@pytest.mark.kernels_ci
@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_against_float64(epsilon):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    reference = torch.randn(8, 9, 64), torch.randn(301, 64) / 8
    policy = [(t + 0.05 * torch.randn_like(t)).to(device).requires_grad_() for t in reference]
    labels = torch.randint(0, 301, (8, 9))
    labels[:, :3] = -100
    ref_hidden, ref_weight, labels = (t.to(device) for t in (*reference, labels))
    out = epsdpo_kernels.linear_epsilon_dpo(*policy, labels, ref_hidden, ref_weight, epsilon=epsilon)
    wide = [t.detach().double().requires_grad_() for t in policy]
    truth = epsdpo_kernels.epsilon_dpo_reference(
        *wide, labels, ref_hidden.double(), ref_weight.double(), epsilon=epsilon
    )
    assert torch.equal(out.step, truth.step) and bool(truth.step.any()) == (epsilon > 0)
    torch.testing.assert_close(out.losses.double(), truth.losses, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    truth.loss.backward()
    for ours, theirs in zip(policy, wide, strict=True):
        error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 1e-4
