"""The tabular task: relaxed and tightened policies, the single pass's figures, and where training ends."""

import math

import pytest
import torch

from cases import relative_error
from epsdpo_kernels import linear_epsilon_dpo
from train.studies.known_optimum import (
    Pairs,
    best_at,
    loss_inputs,
    main,
    make_task,
    optimal,
    perturbed,
    sample,
    trade_off,
    train,
    two_word_gap,
)


def probabilities(task, beta):
    """π_ref·exp(r/β), normalised as it is written."""
    weights = task.ref_logits.softmax(-1) * torch.exp(task.reward / beta)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("beta, epsilon", [(0.5, 0.01), (0.2, 0.3), (2.0, 0.9)])
def test_relaxed_and_tightened_are_optimal_for_their_beta(beta, epsilon):
    task = make_task()
    logits = optimal(task, beta)
    torch.testing.assert_close(logits.softmax(-1), probabilities(task, beta), rtol=1e-12, atol=0)
    for sign in (1, -1):
        policy = perturbed(logits, task.ref_logits, sign * epsilon).softmax(-1)
        expected = probabilities(task, beta / (1 + sign * epsilon))
        torch.testing.assert_close(policy, expected, rtol=1e-10, atol=0)


def test_the_optimum_is_the_best_there_is():
    """No small change of the policy raises reward − β·KL, and the curve falls with β in both."""
    task, beta = make_task(), 0.7

    def value(logits):
        kl, reward = trade_off(task, logits)
        return reward - beta * kl

    best = value(optimal(task, beta))
    assert best == pytest.approx(beta * (task.ref_logits.softmax(-1) * (task.reward / beta).exp()).sum(-1).log().mean())
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        change = torch.randn(task.reward.shape, generator=g, dtype=torch.float64)
        assert value(optimal(task, beta) + 0.05 * change) < best
    curve = [trade_off(task, optimal(task, b)) for b in (2.0, 1.0, 0.5, 0.25)]
    assert curve == sorted(curve) and best_at(task, curve[2][0]) == (pytest.approx(0.5), pytest.approx(curve[2][1]))


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_the_single_pass_is_the_closed_form(epsilon):
    task, beta = make_task(), 0.5
    pairs = sample(task, 64, seed=3)
    logits = optimal(task, beta)
    out = linear_epsilon_dpo(*loss_inputs(task, logits, pairs), beta=beta, epsilon=epsilon)
    p, q = probabilities(task, beta), task.ref_logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)[pairs.prompt]
    gap = task.reward[pairs.prompt, pairs.chosen] - task.reward[pairs.prompt, pairs.rejected]
    closed = {
        "chosen_logps": p[pairs.prompt, pairs.chosen].log(), "rejected_logps": p[pairs.prompt, pairs.rejected].log(),
        "ref_chosen_logps": q[pairs.prompt, pairs.chosen].log(), "chosen_kl": kl, "rejected_kl": kl,
        # The normaliser cancels in a completion of one word: the shift is ±ε times the margin, (r_w − r_l)/β.
        "relaxed_shift": epsilon * gap / beta, "tightened_shift": -epsilon * gap / beta,
        "chosen_entropy": -(p * p.log()).sum(-1)[pairs.prompt],
    }  # fmt: skip
    for name, expected in closed.items():
        assert relative_error(getattr(out, name), expected) < 1e-10, name
    assert out.step.tolist() == gap.sign().int().tolist()
    # At π*_β the DPO logit is the reward's difference.
    used = beta / (1 + epsilon * gap.sign())
    assert relative_error(out.beta, used) < 1e-10
    assert relative_error(out.losses, -torch.nn.functional.logsigmoid(used * gap / beta)) < 1e-10


def test_preferences_follow_the_reward():
    task = make_task()
    pairs = sample(task, 40000, seed=5)
    gap = task.reward[pairs.prompt, pairs.chosen] - task.reward[pairs.prompt, pairs.rejected]
    assert (pairs.chosen != pairs.rejected).all()
    for low, high in ((0.0, 0.5), (0.5, 1.5), (1.5, 4.0)):
        inside = (gap.abs() > low) & (gap.abs() < high)
        assert (gap[inside] > 0).double().mean().item() == pytest.approx(
            gap[inside].abs().sigmoid().mean().item(), abs=0.02
        )


def test_two_words_are_not_relaxed_exactly():
    """What is relaxed is the word, where the optimum would look ahead: a miss of first order in ε."""
    gaps = [two_word_gap(epsilon) for epsilon in (0.01, 0.001, 0.0001)]
    assert two_word_gap(0.0) < 1e-12 and gaps[0] > 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05) and gaps[1] / gaps[2] == pytest.approx(10, rel=0.05)


def test_dpo_ends_on_the_curve_and_epsilon_dpo_moves_along_it():
    task = make_task(prompts=1, words=8)
    # As many pairs as the weights say, so that the loss is its expectation and nothing is left to chance.
    rows = [(i, j) for i in range(8) for j in range(8) if i != j]
    counts = [round(2000 * torch.sigmoid(task.reward[0, i] - task.reward[0, j]).item()) for i, j in rows]
    words = torch.tensor([pair for pair, n in zip(rows, counts, strict=True) for _ in range(n)])
    pairs = Pairs(torch.zeros(len(words), dtype=torch.int64), *words.T)
    ends = {}
    for beta in (0.5, 2.0):
        run = train(task, pairs, beta=beta, epsilon=0.0, steps=300, seed=0)
        ends[beta] = run[-1]
        assert run[-1].beta == pytest.approx(beta) and run[-1].relaxed == run[-1].tightened == 0
        found, best = best_at(task, run[-1].kl)
        assert found == pytest.approx(beta, rel=0.1)
        assert best - 0.02 < run[-1].reward <= best + 1e-9
    moved = train(task, pairs, beta=2.0, epsilon=0.01, steps=300, seed=0)
    # More than half of the pairs are as the reward says, so β falls, and the policy goes up the curve.
    assert moved[-1].beta < 1.0 and moved[-1].relaxed > moved[-1].tightened > 0
    assert ends[2.0].kl < moved[-1].kl and ends[2.0].reward < moved[-1].reward
    found, best = best_at(task, moved[-1].kl)
    assert best - 0.02 < moved[-1].reward <= best + 1e-9
    for moment in moved[4:]:
        for sign in (1, -1):
            kl, _ = trade_off(task, perturbed(moment.logits, task.ref_logits, sign * 0.01))
            assert math.copysign(1, kl - moment.kl) == sign
    mean = sum(m.relaxed - m.tightened for m in moved) / len(moved)
    assert moved[-1].beta == pytest.approx(2.0 / (1 + 0.01 * mean) ** 300, rel=0.2)


def test_table_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the trainer's extra is not installed")
    main(["--out", str(tmp_path), "--pairs", "500", "--steps", "20", "--seeds", "0"])
    text = (tmp_path / "known_optimum.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:8]]
    assert [row[0] for row in rows[:4]] == [f"DPO, β = {beta}" for beta in (0.25, 0.5, 1.0, 2.0)]
    assert all(float(row[3]) <= float(row[4]) for row in rows)
    assert (tmp_path / "known_optimum.png").stat().st_size > 20_000
