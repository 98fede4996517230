"""``python -m train.studies.known_optimum``: all methods where the best policy of every β is known in closed form.

A tabular policy answers each of a few prompts with one word, so that its logits are a table. Reference and reward are
drawn; preferences follow Bradley and Terry's model of that reward. What maximises reward − β·KL(policy‖reference) is
π*_β ∝ π_ref·exp(reward/β) (Rafailov et al., 2023, arXiv 2305.18290, equation 4), and all β together trace the best
trade-off of reward against KL that there is. The losses are those of ``python -m train``: a table's row is a hidden
state, and the head is the identity.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from epsdpo_kernels.pair import BETA_UPDATES

from ..methods import METHODS, make_loss
from .common import LOOKS, Mean, grid, mean

# Of the sweep. Plain DPO has more of them, for it is what the others are held against at their own KL.
BETAS = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)
DPO_BETAS = (*BETAS, 0.02, 0.1, 0.35, 0.7, 1.4, 4.0)
# Of DPO held against that curve itself, between its points: what interpolating it makes of nothing.
BETWEEN = (0.14, 0.27, 0.6, 2.8)
# More preferences than the longest run draws; and so few that a run of 400 steps sees each 50 times.
PAIRS = (1 << 15, 512)
STEPS = (100, 200, 400, 800, 1600)
EPSILONS = (0.003, 0.01, 0.03, 0.1)


class Task(NamedTuple):
    """Prompts, words, and what is known of them; float64."""

    ref_logits: Tensor  # (prompts, words)
    reward: Tensor  # (prompts, words)


class Pairs(NamedTuple):
    """Preferences, (n,) int64 each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


class Run(NamedTuple):
    """What a policy is trained by."""

    method: str
    beta: float
    steps: int = 400
    pairs: int = PAIRS[0]
    epsilon: float = 0.01
    beta_update: str = "mean-step"
    z_star: float = 0.4


class Moment(NamedTuple):
    """A run at one step; shares and margin are means over the pairs of the steps since the last one."""

    step: int
    beta: float
    scaled_margin: float  # β·margin, to the reference that the loss has
    kl: float
    reward: float
    relaxed: float
    tightened: float
    logits: Tensor


class End(NamedTuple):
    """Where a run ends, and the best reward that there is at its KL."""

    beta: float
    scaled_margin: float
    kl: float
    reward: float
    best: float
    relaxed_right: float  # share relaxed of the preferences that agree with the reward
    relaxed_wrong: float  # of those that do not

    @property
    def missing(self) -> float:
        return self.best - self.reward


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


def loss_inputs(ref_logits: Tensor, logits: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
    """Tables and pairs as the arguments of :func:`epsdpo_kernels.linear_epsilon_dpo`."""
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    rows = pairs.prompt.repeat(2)
    labels = torch.cat((pairs.chosen, pairs.rejected))[:, None]
    return logits[rows][:, None], head, labels, ref_logits[rows][:, None], head


def train(
    task: Task, pairs: Pairs, run: Run, seed: int, batch: int = 64, lr: float = 0.05, every: int = 20
) -> list[Moment]:
    """Starts at the reference; Adam with a cosine to 0. Gives the run at every twentieth step and at the end."""
    torch.manual_seed(seed)  # β-DPO draws the pairs that it keeps
    g = torch.Generator().manual_seed(seed)
    reference = task.ref_logits.clone()
    logits = reference.clone().requires_grad_()
    loss_fn = make_loss(
        run.method, beta=run.beta, epsilon=run.epsilon, beta_update=run.beta_update, label_smoothing=0.0, veto={},
        beta_dpo={}, lsc_dpo={"z_star": run.z_star},
    )  # fmt: skip
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    moments, since = [], []
    for step in range(1, run.steps + 1):
        drawn = torch.randint(len(pairs.prompt), (batch,), generator=g)
        beta = loss_fn.beta.item()
        out = loss_fn(*loss_inputs(reference, logits, Pairs(*(t[drawn] for t in pairs))))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        loss_fn.update_beta()
        if run.method == "tr-dpo":  # as train.methods.MovingReference, with the trainer's defaults
            reference.lerp_(logits.detach(), 0.6)
        margin = (out.chosen_logps - out.rejected_logps) - (out.ref_chosen_logps - out.ref_rejected_logps)
        since.append([beta * margin.mean().item(), *((out.step == s).double().mean().item() for s in (1, -1))])
        if step % every == 0 or step == run.steps:
            scaled, relaxed, tightened = torch.tensor(since).mean(0).tolist()
            since.clear()
            now = logits.detach().clone()
            moments.append(Moment(step, loss_fn.beta.item(), scaled, *trade_off(task, now), relaxed, tightened, now))
    return moments


def end_of(task: Task, pairs: Pairs, last: Moment) -> End:
    change = last.logits - task.ref_logits
    up = change[pairs.prompt, pairs.chosen] > change[pairs.prompt, pairs.rejected]
    right = task.reward[pairs.prompt, pairs.chosen] > task.reward[pairs.prompt, pairs.rejected]
    # Completions of one word: the step is the margin's sign.
    shares = (up[right].double().mean().item(), up[~right].double().mean().item())
    return End(last.beta, last.scaled_margin, last.kl, last.reward, best_at(task, last.kl)[1], *shares)


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


def sweep(pairs: int) -> dict[str, list[Run]]:
    """The runs of a number of preferences, by method."""
    return {m: [Run(m, beta, pairs=pairs) for beta in (DPO_BETAS if m == "dpo" else BETAS)] for m in METHODS}


def stopped_early(pairs: int) -> list[Run]:
    """DPO of half the steps: less KL by less training, where the others have it by a larger β."""
    return [Run("dpo", beta, steps=200, pairs=pairs) for beta in BETAS]


def between(pairs: int) -> list[Run]:
    return [Run("dpo", beta, pairs=pairs) for beta in BETWEEN]


def over_steps() -> dict[str, list[Run]]:
    """Runs of several lengths from β₀ = 1, by what they are called."""
    named = {"DPO": ("dpo", 0.4), "ε-DPO": ("eps-dpo", 0.4)}
    named |= {f"LSC-DPO, z* = {z}": ("lsc-dpo", z) for z in (0.4, 0.8)}
    return {name: [Run(method, 1.0, steps, z_star=z) for steps in STEPS] for name, (method, z) in named.items()}


def over_epsilon() -> dict[str, list[Run]]:
    """ε-DPO from β₀ = 1, by its β update."""
    return {u: [Run("eps-dpo", 1.0, epsilon=epsilon, beta_update=u) for epsilon in EPSILONS] for u in BETA_UPDATES}


Results = dict[Run, list[End]]  # one entry a seed, in the order of the seeds


def more_than_dpo(results: Results, run: Run) -> Mean:
    """How much more reward a run ends with than DPO of 400 steps at the same KL, of the same preferences and seed.

    What DPO lacks to the best possible is interpolated between its β₀, and is 0 at KL 0. NaN where the run is further
    from the reference than DPO gets, in any seed: the seeds that remain would be a choice.
    """
    found = []
    for seed, end in enumerate(results[run]):
        others = (results[other][seed] for other in sweep(run.pairs)["dpo"])
        curve = [(0.0, 0.0), *sorted((other.kl, other.missing) for other in others)]
        for (low, missing_low), (high, missing_high) in pairwise(curve):
            if low < end.kl <= high:
                share = (end.kl - low) / (high - low)
                found.append(missing_low + share * (missing_high - missing_low) - end.missing)
        if len(found) <= seed:
            found.append(math.nan)
    return mean(found)


def each(results: Results, runs: Sequence[Run], name: str, digits: int = 3) -> list[str]:
    """The mean over seeds of a column of :class:`End`, and half its 95 % interval, for every run."""
    means = (mean([getattr(end, name) for end in results[run]]) for run in runs)
    return [f"{m.value:.{digits}g} ± {m.half_width:.1g}" for m in means]


def geometric(results: Results, runs: Sequence[Run]) -> list[str]:
    """The geometric mean over seeds of β at the end, and the factor that is half its 95 % interval, for every run."""
    means = (mean([math.log(end.beta) for end in results[run]]) for run in runs)
    return [f"{math.exp(m.value):.3g}" + (f" ×÷ {math.exp(m.half_width):.2f}" if m.error > 1e-6 else "") for m in means]


def gains(results: Results, runs: Sequence[Run]) -> list[str]:
    """Thousandths of reward more than DPO at the same KL, for every run."""
    means = (more_than_dpo(results, run) for run in runs)
    return ["beyond" if math.isnan(m.half_width) else f"{1e3 * m.value:+.1f} ± {1e3 * m.half_width:.1f}" for m in means]


def tables(results: Results) -> str:
    """Markdown: the sweep, the steps, and ε."""
    parts: list[str] = []

    def add(title: str, head: str, columns: Sequence[object], rows: dict[str, list[str]]) -> None:
        parts.extend((title, grid([head, *map(str, columns)], [[name, *cells] for name, cells in rows.items()])))

    for pairs in PAIRS:
        rows = {m: [Run(m, beta, pairs=pairs) for beta in BETAS] for m in METHODS}
        heads = [f"β₀ = {beta}" for beta in BETAS]
        of = f"{pairs:,} preferences,"
        add(f"{of} KL at the end (nats):", "method", heads, {m: each(results, r, "kl") for m, r in rows.items()})
        add(
            f"{of} reward more than DPO's at the same KL (thousandths):", "method", heads,
            {m: gains(results, r) for m, r in rows.items() if m != "dpo"}
            | {"dpo, 200 steps": gains(results, stopped_early(pairs))},
        )  # fmt: skip
        moved = {m: geometric(results, r) for m, r in rows.items() if m in ("eps-dpo", "beta-dpo", "lsc-dpo")}
        add(f"{of} β at the end:", "method", heads, moved)
    cells = {label: geometric(results, runs) for label, runs in over_steps().items()}
    add("β at the end, by steps, from β₀ = 1:", "run", STEPS, cells)
    for title, name in (("β·mean margin", "scaled_margin"), ("KL (nats)", "kl")):
        cells = {label: each(results, runs, name) for label, runs in over_steps().items()}
        add(f"{title} at the end, by steps, from β₀ = 1:", "run", STEPS, cells)
    heads = [f"ε = {epsilon}" for epsilon in EPSILONS]
    cells = {update: geometric(results, runs) for update, runs in over_epsilon().items()}
    add("ε-DPO, β at the end, from β₀ = 1:", "`beta_update`", heads, cells)
    cells = {update: each(results, runs, "kl") for update, runs in over_epsilon().items()}
    add("ε-DPO, KL (nats) at the end, from β₀ = 1:", "`beta_update`", heads, cells)
    cells = {update: gains(results, runs) for update, runs in over_epsilon().items()}
    title = "ε-DPO, reward more than DPO's at the same KL (thousandths), from β₀ = 1:"
    add(title, "`beta_update`", heads, cells)
    cells = {f"{pairs:,} preferences": gains(results, between(pairs)) for pairs in PAIRS}
    heads = [f"β₀ = {beta}" for beta in BETWEEN]
    add("DPO between the points of its own curve, reward more than there (thousandths):", "data", heads, cells)
    cells = {
        f"{label}, {side}": each(results, [Run(method, 1.0, pairs=pairs) for pairs in PAIRS], name)
        for label, method in (("ε-DPO", "eps-dpo"), ("DPO", "dpo"))
        for side, name in (("right", "relaxed_right"), ("wrong", "relaxed_wrong"))
    }
    heads = [f"{pairs:,} preferences" for pairs in PAIRS]
    title = "Share of positive margins at the end, from β₀ = 1; right preferences agree with the reward:"
    add(title, "run, preferences", heads, cells)
    missed = ", ".join(f"{two_word_gap(epsilon):.1e} at ε = {epsilon}" for epsilon in (0.1, 0.01, 0.001))
    parts.append(f"Completions of two words, relaxed word by word, miss the optimum of β/(1+ε) by {missed} (nats).")
    return "\n\n".join(parts) + "\n"


def picture(results: Results, path: Path) -> None:
    """KL by β₀, and reward more than DPO's at the same KL, for many preferences and for few."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for method, runs in sweep(PAIRS[0]).items():
        colour, marker = LOOKS[method]
        kl = {run.beta: mean([end.kl for end in results[run]]).value for run in runs}
        panels[0].plot(*zip(*sorted(kl.items()), strict=True), color=colour, marker=marker, label=method)
    for axes, pairs in zip(panels[1:], PAIRS, strict=True):
        axes.axhline(0, color=LOOKS["dpo"][0], label="dpo, 400 steps")
        shown = {m: (runs, LOOKS[m], "-") for m, runs in sweep(pairs).items() if m not in ("dpo", "tr-dpo")}
        shown["dpo, 200 steps"] = (stopped_early(pairs), LOOKS["dpo"], ":")
        for label, (runs, (colour, marker), line) in shown.items():
            more = [more_than_dpo(results, run) for run in runs]
            axes.errorbar(
                [mean([end.kl for end in results[run]]).value for run in runs], [1e3 * m.value for m in more],
                yerr=[1e3 * m.half_width for m in more], color=colour, marker=marker, linestyle=line, capsize=2,
                elinewidth=0.8, label=label,
            )  # fmt: skip
        axes.set(
            xlabel="KL(policy ‖ reference) at the end, nats", ylabel="reward more than DPO's at that KL, thousandths",
            title=f"{pairs:,} preferences", xlim=(0, None),
        )  # fmt: skip
    panels[0].set(
        xlabel="β₀", ylabel="KL(policy ‖ reference) at the end, nats", xscale="log", yscale="log",
        title=f"Where β₀ leads, {PAIRS[0]:,} preferences",
    )  # fmt: skip
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def picture_of_steps(results: Results, path: Path) -> None:
    """β, β·margin and KL at the end by steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name, runs in over_steps().items():
        colour, marker = LOOKS[runs[0].method]
        look = {"color": colour, "marker": marker, "linestyle": "--" if runs[0].z_star != 0.4 else "-", "capsize": 2}
        logs = [mean([math.log(end.beta) for end in results[run]]) for run in runs]
        middle = [math.exp(m.value) for m in logs]
        ends = [
            [abs(math.exp(m.value + sign * m.half_width) - y) for m, y in zip(logs, middle, strict=True)]
            for sign in (-1, 1)
        ]
        panels[0].errorbar(STEPS, middle, yerr=ends, **look, label=name)
        for axes, column in zip(panels[1:], ("scaled_margin", "kl"), strict=True):
            values = [mean([getattr(end, column) for end in results[run]]) for run in runs]
            axes.errorbar(STEPS, [m.value for m in values], yerr=[m.half_width for m in values], **look, label=name)
    for axes, title in zip(panels, ("β", "β · mean margin", "KL(policy ‖ reference), nats,"), strict=True):
        axes.set(xlabel="steps of the run", xscale="log", title=f"{title} at the end")
        axes.set_xticks(STEPS, map(str, STEPS))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m train.studies.known_optimum", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder of the tables and the pictures")
    parser.add_argument("--seeds", type=int, default=8, help="tasks, each with its own preferences and batches")
    options = parser.parse_args(arguments)
    of_data = (sweep(n) | {"early": stopped_early(n), "between": between(n)} for n in PAIRS)
    groups = [*of_data, over_steps(), over_epsilon()]
    runs = list(dict.fromkeys(run for group in groups for named in group.values() for run in named))
    results: Results = {run: [] for run in runs}
    for seed in range(options.seeds):
        task = make_task(seed=seed)
        preferences = {n: sample(task, n, seed=1000 + seed) for n in PAIRS}
        for i, run in enumerate(runs):
            pairs = preferences[run.pairs]
            results[run].append(end_of(task, pairs, train(task, pairs, run, seed)[-1]))
            if (i + 1) % 25 == 0:
                print(f"seed {seed + 1} of {options.seeds}: {i + 1} of {len(runs)} runs", flush=True)
    text = tables(results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "known_optimum.md").write_text(text, encoding="utf-8")
    picture(results, options.out / "known_optimum.png")
    picture_of_steps(results, options.out / "known_optimum_steps.png")
    print(text)


if __name__ == "__main__":
    main()
