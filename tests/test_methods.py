"""β-DPO, TR-DPO and LSC-DPO against their formulas, and every method through the trainer."""

import copy
import math

import pytest
import torch

from cases import make_case, relative_error

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from epsdpo_kernels import epsilon_dpo_reference  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.methods import METHODS, BetaDPOLoss, LSCDPOLoss, MovingReference, make_loss  # noqa: E402


def margins_of(out):
    return (out.chosen_logps - out.rejected_logps) - (out.ref_chosen_logps - out.ref_rejected_logps)


def test_beta_dpo_is_its_formula():
    loss_fn = BetaDPOLoss(0.2, alpha=0.6, keep=0.8)
    mean = std = 0.0
    for seed in range(3):
        case = make_case(10, drift=0.3, seed=seed)
        args, _ = case.arguments(grad=("hidden", "weight"))
        torch.manual_seed(seed)
        out = loss_fn(*args)
        gradients = torch.autograd.grad(out.loss, args[:2])
        kept = out.beta > 0
        assert kept.sum() == 8 and (out.losses[~kept] == 0).all() and (out.step == 0).all()
        truth_args, _ = case.arguments(grad=("hidden", "weight"))
        m = margins_of(epsilon_dpo_reference(*truth_args, epsilon=0.0)).detach()
        mean = 0.9 * mean + 0.1 * m.mean().item()
        std = 0.9 * std + 0.1 * m.std(correction=0).item()
        torch.manual_seed(seed)
        drawn = torch.multinomial(torch.exp(-0.5 * ((m - mean) / std) ** 2), 8, replacement=False)
        assert sorted(drawn.tolist()) == kept.nonzero()[:, 0].tolist()
        beta = max(1e-3, 0.2 * (1 + 0.6 * (m[kept].mean().item() - mean)))
        assert loss_fn.beta.item() == pytest.approx(beta, rel=1e-5)
        kept_rows = torch.cat((kept, kept))
        kept_args = [t[kept_rows] if i in (0, 2, 3) else t for i, t in enumerate(truth_args)]
        truth = epsilon_dpo_reference(*kept_args, beta=beta, epsilon=0.0)
        assert relative_error(out.loss, truth.loss) < 1e-6
        for g, e in zip(gradients, torch.autograd.grad(truth.loss, truth_args[:2]), strict=True):
            assert relative_error(g, e) < 1e-5


def test_beta_dpo_compiled_has_the_same_averages():
    """A compiler has lost what is added to a 0-dimensional float64 buffer."""
    losses = BetaDPOLoss(0.2), BetaDPOLoss(0.2)
    calls = losses[0], torch.compile(losses[1], backend="aot_eager")
    for seed in range(3):
        args, _ = make_case(6, drift=0.3, seed=seed).arguments(torch.float32)
        for call in calls:
            torch.manual_seed(seed)
            call(*args)
    states = [loss_fn.state_dict() for loss_fn in losses]
    assert states[0]["margin_std"] > 0 and states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_beta_dpo_in_evaluation_moves_nothing():
    loss_fn = BetaDPOLoss(0.2)
    loss_fn(*make_case(6, drift=0.3).arguments()[0])
    before = copy.deepcopy(loss_fn.state_dict())
    out = loss_fn.eval()(*make_case(4, drift=0.3, seed=9).arguments()[0])
    assert all(torch.equal(v, before[k]) for k, v in loss_fn.state_dict().items())
    assert (out.beta == before["beta"]).all() and torch.allclose(out.loss, out.losses.mean())


def test_beta_dpo_at_the_reference_keeps_its_share():
    """All margins 0, so the spread is 0 and no weight can be formed."""
    case = make_case(5)
    case = case._replace(hidden=case.ref_hidden, weight=case.ref_weight)
    out = BetaDPOLoss(0.2)(*case.arguments()[0])
    assert (out.beta > 0).sum() == 4 and out.loss.isfinite()


def test_lsc_dpo_is_its_formula_whatever_the_micro_batches():
    """The loss is DPO's at the β of the step before; β then follows the mean margin of all pairs of the step."""
    whole, cut = LSCDPOLoss(0.3, eta=0.5), LSCDPOLoss(0.3, eta=0.5)
    beta, moved = 0.3, 0
    for seed in range(4):
        args, _ = make_case(9, drift=0.5, seed=seed).arguments(grad=("hidden", "weight"))
        # Chosen above rejected, so that there is something to control.
        better = margins_of(epsilon_dpo_reference(*args, epsilon=0.0)).detach() > 0
        rows = torch.arange(18).view(2, 9)
        rows = torch.where(better, rows, rows.flip(0)).flatten()
        args = [t[rows] if i in (0, 2, 3) else t for i, t in enumerate(args)]
        truth = epsilon_dpo_reference(*args, beta=beta, epsilon=0.0)
        out = whole(*args)
        assert relative_error(out.loss, truth.loss) < 1e-6 and torch.allclose(out.beta.double(), out.beta * 0 + beta)
        gradients = zip(*(torch.autograd.grad(o.loss, (args[0], args[1])) for o in (out, truth)), strict=True)
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in gradients)
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            some = torch.arange(18).view(2, 9)[:, part].flatten()
            cut(*(t[some] if i in (0, 2, 3) else t for i, t in enumerate(args)))
        z = beta * margins_of(truth).mean().item()
        if 1 / (1 + math.exp(z)) < 0.45:
            beta, moved = beta * math.exp(-0.5 * (z - 0.4)), moved + 1
        whole.update_beta(), cut.update_beta()
        assert whole.beta.item() == pytest.approx(beta, rel=1e-6) == cut.beta.item()
    assert moved > 1
    assert set(whole.state_dict()) == {"beta", "_extra_state"}


def test_lsc_dpo_in_evaluation_and_with_nothing_scored_moves_nothing():
    loss_fn = LSCDPOLoss(2.0, tau_start=0.99)  # moved by anything
    args, _ = make_case(6, drift=0.5).arguments()
    loss_fn.eval()(*args)
    loss_fn.update_beta()
    assert loss_fn.beta.item() == 2.0
    loss_fn.train()(*args[:2], torch.full_like(args[2], -100), *args[3:])
    loss_fn.update_beta()
    assert loss_fn.beta.item() == 2.0
    loss_fn(*args)
    loss_fn.update_beta()
    assert loss_fn.beta.item() != 2.0
    loss_fn = LSCDPOLoss(2.0, eta=1e9, tau_start=0.99)
    better = margins_of(epsilon_dpo_reference(*args, epsilon=0.0)).mean() > 0
    rows = torch.arange(12) if better else torch.arange(12).roll(6)
    loss_fn(*(t[rows] if i in (0, 2, 3) else t for i, t in enumerate(args)))
    with pytest.raises(ValueError, match=r"lsc_eta: 1000000000.0 takes β from 2.0 to 0 at a mean margin of"):
        loss_fn.update_beta()


@pytest.fixture
def tiny_models(tiny):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(tiny, dtype=torch.float32), load(tiny, dtype=torch.float32)


@pytest.mark.parametrize("alpha, steps", [(0.6, 1), (0.3, 2), (1.0, 3)])
def test_the_reference_follows(tiny_models, alpha, steps):
    policy, reference = tiny_models
    expected = [p.detach().clone() for p in reference.parameters()]
    moving = MovingReference(policy, reference, alpha, steps)
    for step in range(1, 7):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1 * step)
        moving.after_step(step)
        if step % steps == 0:
            expected = [
                alpha * p.detach() + (1 - alpha) * e for p, e in zip(policy.parameters(), expected, strict=True)
            ]
    for p, e in zip(reference.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_the_reference_follows_adapters(tiny_models):
    """Mixed as weights: the reference's logits are those of α·(W + ΔW) + (1 − α)·W."""
    peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")
    base, reference = tiny_models
    start = copy.deepcopy(reference)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = peft.get_peft_model(base, lora)
    MovingReference(policy, reference, 0.6, 1).after_step(1)
    merged = policy.merge_and_unload()
    for (name, p), q, r in zip(start.named_parameters(), merged.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(r.detach(), 0.4 * p.detach() + 0.6 * q.detach(), msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora_r", [0, 4])
def test_every_method_trains(tiny, tmp_path, method, lora_r):
    more = {"method": method, "num_train_epochs": 4, "lora_r": lora_r, "epsilon": 0.02}
    trainer = main(flags(tiny, tmp_path, **more, learning_rate=3e-3))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    accuracies = [entry["rewards/accuracies"] for entry in log]
    assert accuracies[0] == 0
    # A reference that follows the policy leaves it little to gain, the less the longer.
    learnt, least = (accuracies[3:7], 0.65) if method == "tr-dpo" else (accuracies[-4:], 0.8)
    assert sum(learnt) / 4 > least
    decided = sum(entry["beta/relaxed"] + entry["beta/tightened"] for entry in log)
    assert (decided > 0) == (method == "eps-dpo")
    if method in ("dpo", "tr-dpo"):
        assert {round(entry["beta/running"], 7) for entry in log} == {0.1}
    else:
        assert len({entry["beta/running"] for entry in log}) > 4


@pytest.mark.parametrize("method", ["tr-dpo", "lsc-dpo"])
def test_a_run_resumes_with_its_reference_and_beta(tiny, tmp_path, method):
    def history(run, **more):
        arguments = flags(
            tiny, tmp_path / run, method=method, num_train_epochs=2, save_steps=5, save_strategy="steps",
            learning_rate=3e-3, beta=1.0, **more,
        )  # fmt: skip
        return [(e["logps/chosen"], e["beta/running"]) for e in main(arguments).state.log_history if "loss" in e]

    whole = history("whole")
    assert history("cut") == whole and len(whole) == 16
    assert history("cut", resume_from_checkpoint=tmp_path / "cut" / "checkpoint-5") == whole
    # It moves before the checkpoint and after it.
    betas = [beta for _, beta in whole]
    assert (betas[4] != 1 and betas[5] != betas[4]) == (method == "lsc-dpo")


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="method: got 'ppo', takes one of"):
        make_loss(
            "ppo", beta=0.1, epsilon=0.1, beta_update="none", label_smoothing=0.0, veto={}, beta_dpo={}, lsc_dpo={}
        )
    with pytest.raises(ValueError, match=r"^beta_dpo_keep: got 0, takes a number in \(0, 1\]"):
        BetaDPOLoss(keep=0)
    with pytest.raises(ValueError, match="^beta_dpo_alpha: got nan, takes a finite number"):
        BetaDPOLoss(alpha=float("nan"))
    with pytest.raises(ValueError, match="lsc_eta: got -1, takes a positive finite number"):
        LSCDPOLoss(eta=-1)
    with pytest.raises(ValueError, match="lsc_z_star: got inf"):
        LSCDPOLoss(z_star=float("inf"))
    with pytest.raises(ValueError, match=r"lsc_tau_start: got 1, takes a number in \(0, 1\)"):
        LSCDPOLoss(tau_start=1)
    with pytest.raises(ValueError, match="sync_alpha: got 2"):
        MovingReference(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 2, 1)
