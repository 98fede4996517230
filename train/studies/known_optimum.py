"""``python -m train.studies.known_optimum``: DPO and ε-DPO where the best policy of every β is known in closed form.

A tabular policy answers each of a few prompts with one word, so that its logits are a table. Reference and reward are
drawn; preferences follow Bradley and Terry's model of that reward. What maximises reward − β·KL(policy‖reference) is
π*_β ∝ π_ref·exp(reward/β) (Rafailov et al., 2023, arXiv 2305.18290, equation 4), and all β together trace the best
trade-off of reward against KL that there is. The loss is the package's own: a table's row is a hidden state, and the
head is the identity.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epsdpo_kernels import EpsilonDPOLoss

BETAS = (0.25, 0.5, 1.0, 2.0)


class Task(NamedTuple):
    """Prompts, words, and what is known of them; float64."""

    ref_logits: Tensor  # (prompts, words)
    reward: Tensor  # (prompts, words)


class Pairs(NamedTuple):
    """Preferences, (n,) int64 each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


class Moment(NamedTuple):
    """A run at one step; shares are those of the step's pairs."""

    step: int
    beta: float
    kl: float
    reward: float
    relaxed: float
    tightened: float
    logits: Tensor


def make_task(prompts: int = 4, words: int = 32, seed: int = 0) -> Task:
    g = torch.Generator().manual_seed(seed)
    return Task(*(torch.randn(prompts, words, generator=g, dtype=torch.float64) for _ in range(2)))


def sample(task: Task, n: int, seed: int) -> Pairs:
    """Two different words of equal chance each; the first is preferred with probability σ(reward − other's reward)."""
    g = torch.Generator().manual_seed(seed)
    prompts, words = task.reward.shape
    prompt = torch.randint(prompts, (n,), generator=g)
    first = torch.randint(words, (n,), generator=g)
    second = (first + torch.randint(1, words, (n,), generator=g)) % words
    gap = task.reward[prompt, first] - task.reward[prompt, second]
    won = torch.rand(n, generator=g, dtype=torch.float64) < gap.sigmoid()
    return Pairs(prompt, torch.where(won, first, second), torch.where(won, second, first))


def optimal(task: Task, beta: float) -> Tensor:
    """Logits of π*_β: (prompts, words)."""
    return task.ref_logits + task.reward / beta


def perturbed(logits: Tensor, ref_logits: Tensor, epsilon: float) -> Tensor:
    """Logits of the relaxed policy, (1+ε)a − εb; of the tightened one where ε is negative."""
    return (1 + epsilon) * logits - epsilon * ref_logits


def trade_off(task: Task, logits: Tensor) -> tuple[float, float]:
    """(KL from the reference in nats, expected reward), means over prompts."""
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - task.ref_logits.log_softmax(-1))).sum(-1)
    return kl.mean().item(), (logp.exp() * task.reward).sum(-1).mean().item()


def best_at(task: Task, kl: float) -> tuple[float, float]:
    """(β, reward) of the optimal policy that is this far from the reference, by bisection."""
    low, high = -12.0, 12.0  # of log β
    for _ in range(100):
        middle = (low + high) / 2
        if trade_off(task, optimal(task, math.exp(middle)))[0] > kl:
            low = middle
        else:
            high = middle
    return math.exp(low), trade_off(task, optimal(task, math.exp(low)))[1]


def loss_inputs(task: Task, logits: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
    """Tables and pairs as the arguments of :func:`epsdpo_kernels.linear_epsilon_dpo`."""
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    rows = pairs.prompt.repeat(2)
    labels = torch.cat((pairs.chosen, pairs.rejected))[:, None]
    return logits[rows][:, None], head, labels, task.ref_logits[rows][:, None], head


def train(
    task: Task, pairs: Pairs, *, beta: float, epsilon: float, steps: int, seed: int, batch: int = 128, lr: float = 0.05
) -> list[Moment]:
    """Starts at the reference; Adam with a cosine to 0. Gives the run at every twentieth step and at the end."""
    g = torch.Generator().manual_seed(seed)
    logits = task.ref_logits.clone().requires_grad_()
    loss_fn = EpsilonDPOLoss(beta, epsilon, "mean-step" if epsilon else "none")
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = []
    for step in range(1, steps + 1):
        drawn = torch.randint(len(pairs.prompt), (batch,), generator=g)
        out = loss_fn(*loss_inputs(task, logits, Pairs(*(t[drawn] for t in pairs))))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        loss_fn.update_beta()
        if step % 20 == 0 or step == steps:
            relaxed, tightened = ((out.step == s).double().mean().item() for s in (1, -1))
            now = logits.detach().clone()
            run.append(Moment(step, loss_fn.beta.item(), *trade_off(task, now), relaxed, tightened, now))
    return run


def two_word_gap(epsilon: float, beta: float = 0.5, words: int = 8, seed: int = 0) -> float:
    """Largest difference in log-probability, over all completions of two words, between the policy that is relaxed word
    by word at π*_β and π* of β/(1+ε). It is 0 for one word."""
    g = torch.Generator().manual_seed(seed)
    ref, reward = (torch.randn(words, words, generator=g, dtype=torch.float64) for _ in range(2))
    ref_first = torch.randn(words, generator=g, dtype=torch.float64)

    def two_steps(beta: float) -> tuple[Tensor, Tensor]:
        """Logits of π*'s first word (words,) and of its second, given the first (words, words)."""
        second = ref.log_softmax(-1) + reward / beta
        return ref_first + second.logsumexp(-1), second

    def whole(first: Tensor, second: Tensor) -> Tensor:
        return first.log_softmax(-1)[:, None] + second.log_softmax(-1)

    first, second = two_steps(beta)
    relaxed = whole(perturbed(first, ref_first, epsilon), perturbed(second, ref.log_softmax(-1), epsilon))
    return (relaxed - whole(*two_steps(beta / (1 + epsilon)))).abs().max().item()


def table(task: Task, pairs: Pairs, runs: list[tuple[str, list[Moment]]]) -> str:
    """Markdown, a row a run: where it ends, and the best that is possible there."""
    lines = [
        "| run | β at the end | KL | reward | best reward at that KL | β of that optimum | relaxed | tightened | "
        "relaxed where the label agrees with the reward | where it is flipped |",
        "| --- |" + " --- |" * 9,
    ]
    right = task.reward[pairs.prompt, pairs.chosen] > task.reward[pairs.prompt, pairs.rejected]
    for name, run in runs:
        end = run[-1]
        beta, best = best_at(task, end.kl)
        margin = (end.logits - task.ref_logits)[pairs.prompt.repeat(2), torch.cat((pairs.chosen, pairs.rejected))]
        up = margin.chunk(2)[0] > margin.chunk(2)[1]  # completions of one word: the step is the margin's sign
        cells = "– | – | – | –"
        if name.startswith("ε"):
            shares = (up.double().mean(), (~up).double().mean(), up[right].double().mean(), up[~right].double().mean())
            cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(
            f"| {name} | {end.beta:.3f} | {end.kl:.3f} | {end.reward:.4f} | {best:.4f} | {beta:.3f} | {cells} |"
        )
    return "\n".join(lines)


def picture(task: Task, runs: list[tuple[str, list[Moment]]], epsilon: float, path: Path) -> None:
    """Left: reward against KL, with the relaxed and tightened policies of some moments. Right: β and decisions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    curve = [trade_off(task, optimal(task, math.exp(x / 20))) for x in range(-28, 60)]
    left.plot(*zip(*curve, strict=True), color="#999999", linewidth=5, alpha=0.4, label="optimum, all β")
    shares = right.twinx()
    first = next(name for name, _ in runs if not name.startswith("DPO"))
    for name, run in runs:
        x, y = [moment.kl for moment in run], [moment.reward for moment in run]
        if name.startswith("DPO"):
            left.plot(x[-1], y[-1], "s", color="black", label="DPO" if name == runs[0][0] else None)
            left.annotate(name.removeprefix("DPO, "), (x[-1], y[-1]), (6, -12), textcoords="offset points", fontsize=8)
            continue
        label = "ε-DPO" if name == first else None
        left.plot(x, y, color="#0072B2", alpha=0.7, label=label)
        left.plot(x[-1], y[-1], "o", color="#0072B2")
        right.plot([m.step for m in run], [m.beta for m in run], color="#0072B2", label=label and "β")
        for what, line in (("relaxed", "-"), ("tightened", ":")):
            values = [getattr(moment, what) for moment in run]
            shares.plot([m.step for m in run], values, line, color="#D55E00", alpha=0.6, label=label and what)
        if name.endswith("seed 0"):
            for moment in run[len(run) // 2 :: max(1, len(run) // 2 - 1)]:
                for sign, colour in ((1, "#D55E00"), (-1, "#009E73")):
                    # ε itself would be too short an arrow to be seen.
                    tip = trade_off(task, perturbed(moment.logits, task.ref_logits, sign * 20 * epsilon))
                    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 2}
                    left.annotate("", tip, (moment.kl, moment.reward), arrowprops=arrow)
    left.plot([], [], color="#D55E00", label="relaxed policy (20ε)")
    left.plot([], [], color="#009E73", label="tightened policy (20ε)")
    left.set(
        xlabel="KL(policy ‖ reference), nats", ylabel="expected reward", title="The trade-off, and who lands where"
    )
    right.set(xlabel="step", ylabel="running β", title="ε-DPO's β and decisions", yscale="log")
    shares.set(ylabel="share of the step's pairs", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    lines = [line for line in (*right.lines, *shares.lines) if not str(line.get_label()).startswith("_")]
    right.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.studies.known_optimum", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the table and the picture")
    parser.add_argument("--pairs", type=int, default=1 << 15)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    task = make_task()
    pairs = sample(task, options.pairs, seed=1)
    runs = []
    for beta in BETAS:
        runs.append((f"DPO, β = {beta}", train(task, pairs, beta=beta, epsilon=0.0, steps=options.steps, seed=0)))
        print(runs[-1][0], flush=True)
    for beta in (2.0, 1.0):
        for seed in options.seeds:
            name = f"ε-DPO from β = {beta}, seed {seed}"
            runs.append((name, train(task, pairs, beta=beta, epsilon=options.epsilon, steps=options.steps, seed=seed)))
            print(name, flush=True)
    text = table(task, pairs, runs)
    gaps = ", ".join(f"{two_word_gap(epsilon):.1e} at ε = {epsilon}" for epsilon in (0.1, 0.01, 0.001))
    text += f"\n\nCompletions of two words, relaxed word by word, miss the optimum of β/(1+ε) by {gaps} (nats).\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "known_optimum.md").write_text(text, encoding="utf-8")
    picture(task, runs, options.epsilon, options.out / "known_optimum.png")
    print(text)


if __name__ == "__main__":
    main()
