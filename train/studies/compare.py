"""``python -m train.studies.compare``: the methods side by side on one model and data set, in tables and a picture.

Every run is a ``python -m train`` of its own, so that memory and time are its own. What a run has given is in one file
beside its folder, of which alone the tables are made: it goes on, with these files, on another machine. A run that has
one is not made again, one that was cut short goes on from its last checkpoint, and the tables are written anew after
every run: a long comparison can be left in the background, stopped, and started again with the same words. Where they
say anything else that decides a figure, that is refused. Each final policy is measured against the ORIGINAL reference,
also where the method's own reference has moved, and pair by pair, so that methods are compared on the same pairs. Short
runs beside them show what the same batch, cut into other micro-batches, decides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from epsdpo_kernels import linear_pair_stats, record
from epsdpo_kernels.integrations.checkpoints import last_checkpoint
from epsdpo_kernels.integrations.transformers import head_inputs

from .. import data
from ..__main__ import load_data
from ..methods import METHODS
from ..models import load_model
from ..options import PairOptions
from ..options import parse as parse_run
from .common import LOOKS, Mean, grid, mean, plus_minus

# What making a run took.
MADE = "made.json"
# What a run is told that decides none of its figures: where it goes, what it says on the way, what it runs on. The
# reference from a cache is the same reference.
FREE = (
    "output_dir", "resume_from_checkpoint", "cache_reference", "label_column", "report_to", "run_name", "project",
    "disable_tqdm", "log_level", "log_level_replica", "save_total_limit", "save_only_model", "push_to_hub",
    "hub_model_id", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
)  # fmt: skip
# Nor do these, unless the best checkpoint is what a run ends with.
SAVING = ("save_strategy", "save_steps")
# What one method alone reads.
OF_METHODS = {
    "eps-dpo": ("epsilon", "beta_update", "veto"),
    "beta-dpo": ("beta_dpo_alpha", "beta_dpo_keep"),
    "tr-dpo": ("sync_alpha", "sync_steps"),
    "lsc-dpo": ("lsc_z_star", "lsc_eta", "lsc_tau_start"),
}
# What a comparison calls eps-dpo with a veto.
VETO = "eps-dpo-veto"
# Those that also run from the other β₀.
SWEPT = ("dpo", "eps-dpo", "lsc-dpo")
# The same eight pairs a step: pairs a micro-batch × micro-batches.
MICRO_BATCHES = ((8, 1), (4, 2), (1, 8))
# Of a held-out pair: name, title, digits.
MEASURES = (
    ("accuracy", "accuracy", 3),
    ("margin", "margin (nats)", 3),
    ("kl", "KL policy‖original (nats/token)", 5),
    ("reverse_kl", "KL original‖policy", 5),
)


class Run(NamedTuple):
    method: str
    beta: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.beta:g}-{self.seed}"

    def words(self, flags: list[str], veto: list[str] | None = None) -> list[str]:
        """What ``python -m train`` is told, but for the folder."""
        method = [f"--method={self.method}"] if self.method != VETO else ["--method=eps-dpo", "--veto", *(veto or ())]
        return [*flags, f"--beta={self.beta}", *method, f"--seed={self.seed}"]


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m train.studies.compare", description=__doc__, epilog="All other flags go to `python -m train`."
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs, the tables and the picture")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--betas", nargs="+", type=float, default=[0.1],
        help=f"β₀: all methods run from the first, {', '.join(SWEPT)} from the others too",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--veto", nargs="+", metavar="BOUND", help=f"also runs eps-dpo with this veto, as {VETO}")
    parser.add_argument(
        "--micro-steps", type=int, default=12, help="steps of the runs that compare micro-batches; 0 leaves them out"
    )
    parser.add_argument(
        "--idle", action="store_true", help="nothing else runs on the machine: seconds per step go into the table"
    )
    parser.add_argument(
        "--discard-weights", action="store_true", help="removes a run's weights and checkpoints once it is measured"
    )
    options, flags = parser.parse_known_args(arguments)
    if options.veto:
        options.methods.append(VETO)
    return options, flags


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that what is done first can be compared first."""
    return [
        Run(method, beta, seed)
        for seed in options.seeds
        for beta in options.betas
        for method in options.methods
        if beta == options.betas[0] or method in SWEPT
    ]


def settings(options: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Of what a run is told, all that decides its figures."""
    free = {*FREE, *(() if arguments["load_best_model_at_end"] else SAVING)}
    free.update(name for method, names in OF_METHODS.items() if method != options["method"] for name in names)
    return {name: value for name, value in (options | arguments).items() if name not in free}


def check_settings(run: Path, words: list[str]) -> None:
    """Runs that are held against the words of one call are held against each other.

    Raises:
        ValueError: the run that is there, done or begun, was told otherwise.
    """
    if figures_path(run).exists():
        theirs = json.loads(figures_path(run).read_text())["settings"]
    elif is_done(run) or last_checkpoint(run):
        theirs = settings(**told(run))
    else:
        return
    options, args = parse_run(words)
    ours = settings(vars(options), args.to_sanitized_dict())
    # Files of earlier versions, of runs and of transformers, hold fewer settings.
    if other := [name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]]:
        differences = "; ".join(f"{name}: got {ours[name]!r}, takes {theirs[name]!r}" for name in sorted(other))
        raise ValueError(f"{differences}, as {run} was made. Give another --out, or remove that folder and its .json")


def told(run: Path) -> dict[str, dict[str, Any]]:
    facts = json.loads((run / "run.json").read_text())
    return {"options": facts["options"], "arguments": facts["training_arguments"]}


def is_done(run: Path) -> bool:
    return (run / "trainer_state.json").exists()


def train(run: Path, words: list[str]) -> None:
    """One run, unless it is done already.

    Raises:
        subprocess.CalledProcessError: the run failed; its output.txt says why.
    """
    if is_done(run):
        return
    resume = ["--resume_from_checkpoint=last"] if last_checkpoint(run) else []
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "train", *words, f"--output_dir={run}", "--disable_tqdm=true", *resume]
    run.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with open(run / "output.txt", "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    # The largest child so far: exact for this run where it is larger than those before it, a bound where not.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    made = {"bytes": peak * 1024, "bound_only": peak == before, "resumed": bool(resume)}
    (run / MADE).write_text(json.dumps(made))


def figures(out: Path, run: Run) -> dict[str, Any]:
    """What a run that is done has given, from its file, which is written where it is missing.

    ``settings``: see :func:`settings`; ``steps``: the running β and the shares relaxed and tightened, a list of
    steps each; ``seconds`` a step; ``made``: what making it took; and those of :func:`against_original`.
    """
    folder = out / run.name
    path = figures_path(folder)
    if not path.exists():
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        steps = [entry for entry in log if "loss" in entry]
        found = {
            "settings": settings(**told(folder)),
            "steps": {name: [step[f"beta/{name}"] for step in steps] for name in ("running", "relaxed", "tightened")},
            "seconds": next(entry["train_runtime"] for entry in log if "train_runtime" in entry) / len(steps),
            "made": json.loads((folder / MADE).read_text()),
        }
        part = path.with_suffix(".part")  # a kill leaves no half of a file
        part.write_text(json.dumps(found | against_original(folder)) + "\n", encoding="utf-8")
        os.replace(part, path)
    return json.loads(path.read_text(encoding="utf-8"))


def figures_path(run: Path) -> Path:
    return run.parent / f"{run.name}.json"


@torch.no_grad()
def against_original(run: Path) -> dict[str, list]:
    """Held-out figures of a run's final policy against the model it started from, a list of pairs each.

    ``margin`` is without β, so that methods whose β differ can be compared; ``kl`` and ``reverse_kl`` are exact over
    the vocabulary and summed over the ``tokens`` of the chosen completion; ``row`` is the pair's in the data.
    """
    options, arguments = told(run).values()
    original, tokenizer = load_model(options["model"], options["dtype"])
    policy, _ = load_model(str(run), options["dtype"])
    original.eval(), policy.eval()
    with contextlib.redirect_stdout(io.StringIO()):  # it was all said when the run was made
        _, pairs, _ = load_data(PairOptions(**options), tokenizer, arguments["seed"])
    collator = data.Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    found: dict[str, list] = {name: [] for name in ("row", "margin", "kl", "reverse_kl", "tokens")}
    for batch in DataLoader(pairs, batch_size=8, collate_fn=collator):
        ours, theirs = (head_inputs(m, batch["input_ids"], batch["attention_mask"]) for m in (policy, original))
        labels = batch["labels"]
        forward, reverse = (
            linear_pair_stats(
                p.hidden, p.weight, labels, q.hidden, q.weight, bias=p.bias, ref_bias=q.bias,
                logit_scale=p.logit_scale, softcap=p.softcap,
            )
            for p, q in ((ours, theirs), (theirs, ours))
        )  # fmt: skip
        margin = (forward[0] - forward[1]) - (forward[2] - forward[3])
        tokens = (labels != -100).sum(1).chunk(2)[0]
        values = (batch["row"], margin, forward.chosen_kl, reverse.chosen_kl, tokens)
        for column, value in zip(found.values(), values, strict=True):
            column += [float(f"{one:.7g}") if isinstance(one, float) else one for one in value.tolist()]
    return found


def discard_weights(run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for weights in run.glob("*.safetensors"):
        weights.unlink()


def collect(out: Path, runs: list[Run]) -> dict[Run, dict[str, Any]]:
    """The figures of those runs that are done."""
    return {run: figures(out, run) for run in runs if figures_path(out / run.name).exists()}


def per_pair(found: dict[str, Any], measure: str) -> list[float]:
    """A measure of every held-out pair; KL as its share of the mean KL a token."""
    if measure == "accuracy":
        return [float(margin > 0) for margin in found["margin"]]
    if measure == "margin":
        return found["margin"]
    a_pair = sum(found["tokens"]) / len(found["tokens"])
    return [kl / a_pair for kl in found[measure]]


def difference(done: dict[Run, dict[str, Any]], runs: list[Run], measure: str) -> tuple[Mean, float]:
    """(mean over seeds, its standard error over the pairs of all seeds) of how much more than DPO has at the same β₀.

    Every pair is compared with itself. The error over seeds holds what training, data order and held-out pairs do;
    that over pairs what the choice of held-out pairs does.

    Raises:
        ValueError: the two were measured on different pairs.
    """
    of_seeds: list[float] = []
    of_pairs: dict[int, float] = defaultdict(float)
    for run in runs:
        base = run._replace(method="dpo")
        check_same_pairs(done, run, base)
        both = zip(per_pair(done[run], measure), per_pair(done[base], measure), strict=True)
        more = [ours - theirs for ours, theirs in both]
        of_seeds.append(mean(more).value)
        # Seeds hold out some of the same pairs: what a pair does to all of them goes together.
        n = len(more)
        for row, value in zip(done[run]["row"], more, strict=True):
            of_pairs[row] += (value - of_seeds[-1]) / (math.sqrt(n * (n - 1)) or math.nan) / len(runs)
    return mean(of_seeds), math.hypot(*of_pairs.values())


def check_same_pairs(done: dict[Run, dict[str, Any]], run: Run, base: Run) -> None:
    if done[run]["row"] != done[base]["row"]:
        raise ValueError(f"{run.name}: its held-out pairs are not those of {base.name}; remove one of the folders")


def at_equal_kl(done: dict[Run, dict[str, Any]], run: Run) -> tuple[float, float]:
    """(by what share a run's margin is larger than DPO's at the same KL, its standard error over held-out pairs).

    DPO's is interpolated between those of its β₀ of that seed whose KL are next to the run's, as a power of KL. The
    error is the jackknife's, a pair left out of all three runs at once. NaN where DPO has no less or no more KL than
    the run, or a margin is not above 0.

    Raises:
        ValueError: they were measured on different pairs.
    """
    curve = [other for other in done if other.method == "dpo" and other.seed == run.seed]
    for base in curve:
        check_same_pairs(done, run, base)
    kl, margin = _log_means(done[run])
    for low, high in pairwise(sorted((_log_means(done[base]) for base in curve), key=lambda point: point[0][0])):
        if low[0][0] <= kl[0] <= high[0][0]:
            share = (kl - low[0]) / (high[0] - low[0])
            more = (margin - torch.lerp(low[1], high[1], share)).expm1()
            n = len(more) - 1
            return more[0].item(), math.sqrt((n - 1) * more[1:].var(correction=0).item())
    return math.nan, math.nan


def _log_means(found: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """log of the mean KL a token and of the mean margin: of all pairs, then of all but each."""
    kl, tokens, margin = (torch.tensor(found[name], dtype=torch.float64) for name in ("kl", "tokens", "margin"))
    kl, tokens, margin, pairs = (
        torch.cat([values.sum()[None], values.sum() - values])
        for values in (kl, tokens, margin, torch.ones_like(margin))
    )
    return (kl / tokens).log(), (margin / pairs).log()


def groups(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """The runs of one method and β₀, which differ in their seed."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run.method, run.beta), []).append(run)
    return found


def tables(done: dict[Run, dict[str, Any]], idle: bool) -> str:
    """Markdown: a row a run; a row a method and β₀, the means over seeds, then the differences from DPO; a row a run,
    where DPO's runs enclose its KL, the margin at equal KL.
    """
    titles = [title for _, title, _ in MEASURES]
    singly = []
    for run, found in done.items():
        steps, made = found["steps"], found["made"]
        cells = [f"{mean(per_pair(found, name)).value:.{digits}f}" for name, _, digits in MEASURES]
        shares = [f"{mean(steps[name]).value:.0%}" for name in ("relaxed", "tightened")]
        # What a resumed run took is not in its last part's time.
        seconds = f"{found['seconds']:.3g}" if idle and not made["resumed"] else "–"
        peak = f"{'≤ ' if made['bound_only'] else ''}{made['bytes'] / 2**30:.2f}"
        beta = f"{steps['running'][-1]:.4f}"
        singly.append([run.method, f"{run.beta:g}", str(run.seed), *cells, beta, *shares, seconds, peak])
    means, differences = [], []
    for (method, start), own in groups(done).items():
        cells = []
        for name, _, digits in MEASURES:
            value, error, _ = mean([mean(per_pair(done[run], name)).value for run in own])
            cells.append(plus_minus(value, error, digits))
        means.append([method, f"{start:g}", str(len(own)), *cells])
        both = [run for run in own if run._replace(method="dpo") in done]
        if method == "dpo" or not both:
            continue
        cells = []
        for name, _, digits in MEASURES:
            over, error = difference(done, both, name)
            cells.append(f"{plus_minus(over.value, over.error, digits, '+')} ({error:.{digits}f})")
        differences.append([method, f"{start:g}", str(len(both)), *cells])
    equal = []
    for run in done:
        more, error = at_equal_kl(done, run) if run.method != "dpo" else (math.nan, math.nan)
        if not math.isnan(more):
            equal.append([run.method, f"{run.beta:g}", str(run.seed), f"{100 * more:+.1f} ± {100 * error:.1f} %"])
    own_columns = ["β at the end", "relaxed", "tightened", "s/step", "peak GiB"]
    parts = [
        grid(["method", "β₀", "seed", *titles, *own_columns], singly),
        "Means over seeds, ± their standard error:",
        grid(["method", "β₀", "seeds", *titles], means),
        "More than DPO from the same β₀ and seed, pair by pair, ± the standard error over seeds; in brackets that over "
        "the held-out pairs of all seeds:",
        grid(["method", "β₀", "seeds", *titles], differences),
    ]
    if equal:
        parts += [
            "More margin than DPO's at the same KL, interpolated between its β₀, ± the standard error over pairs:",
            grid(["method", "β₀", "seed", "margin"], equal),
        ]
    return "\n\n".join(parts)


def micro_runs(out: Path) -> list[tuple[str, int, int, Path]]:
    """(method, pairs a micro-batch, micro-batches, folder) of the runs of :func:`micro_table`."""
    return [
        (method, size, count, out / "micro-batches" / f"{method}-{count}x{size}")
        for method in ("eps-dpo", "beta-dpo")
        for size, count in MICRO_BATCHES
    ]


def micro_words(options: argparse.Namespace, flags: list[str]) -> dict[Path, list[str]]:
    """What those runs are told, by folder."""
    found = {}
    for method, size, count, run in micro_runs(options.out):
        own = [
            f"--max_steps={options.micro_steps}", f"--per_device_train_batch_size={size}",
            f"--gradient_accumulation_steps={count}", "--save_strategy=no", "--eval_strategy=no", "--eval_fraction=0",
        ]  # fmt: skip
        found[run] = Run(method, options.betas[0], options.seeds[0]).words([*flags, *own])
    return found


def micro_table(out: Path) -> str:
    """Markdown, a row a run: decisions, β and margins of every pair against those of the whole batch at once."""
    rows = []
    whole: Any = None
    for method, size, count, run in micro_runs(out):
        pairs = record.read(run / "record").to_pandas().query("split == 'train'")
        pairs = pairs.sort_values(["step", "row"], ignore_index=True)
        whole = pairs if (size, count) == MICRO_BATCHES[0] else whole
        if not pairs[["step", "row"]].equals(whole[["step", "row"]]):
            raise ValueError(f"{run}: its steps are of other pairs than the first run's; remove the folder")
        otherwise = (pairs["decision"] != whole["decision"]).sum()
        # β-DPO leaves pairs out at random, with a β of 0.
        used = (pairs["beta_used"] > 0) & (whole["beta_used"] > 0)
        change = (pairs["beta_used"] / whole["beta_used"] - 1).abs()[used].max()
        log = json.loads((run / "trainer_state.json").read_text())["log_history"]
        beta = [entry["beta/running"] for entry in log if "loss" in entry][-1]
        cells = (f"{count} × {size}", len(pairs), otherwise, f"{change:.2%}", f"{beta:.5f}")
        rows.append([method, *map(str, cells)])
    heads = ["micro-batches × pairs", "pairs", "decided otherwise", "largest change of a β used", "β at the end"]
    return grid(["method", *heads], rows)


def picture(done: dict[Run, dict[str, Any]], path: Path) -> None:
    """Margin against KL from the original, margin by β₀, and β and ε-DPO's decisions over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((gained, swept), (betas, decisions)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    first, found = next(iter(done)), groups(done)
    for method in dict.fromkeys(method for method, _ in found):
        colour, marker = LOOKS[method]
        look = {"color": colour, "marker": marker, "linewidth": 1, "capsize": 2, "label": method}
        own = sorted((beta, seeds) for (name, beta), seeds in found.items() if name == method)
        margin, kl = (
            [mean([mean(per_pair(done[run], measure)).value for run in seeds]) for _, seeds in own]
            for measure in ("margin", "kl")
        )
        gained.errorbar(
            [m.value for m in kl], [m.value for m in margin], xerr=[m.error for m in kl],
            yerr=[m.error for m in margin], **look,
        )  # fmt: skip
        if len(own) > 1:
            swept.errorbar([beta for beta, _ in own], [m.value for m in margin], [m.error for m in margin], **look)
        if (shown := first._replace(method=method)) not in done:
            continue
        steps = done[shown]["steps"]
        x = range(1, len(steps["running"]) + 1)
        line = "--" if method == "tr-dpo" else "-"  # its β is DPO's
        betas.plot(x, steps["running"], line, color=colour, label=method)
        if method == "eps-dpo":
            for what, line in (("relaxed", "-"), ("tightened", ":")):
                decisions.plot(x, steps[what], line, color=colour, label=what)
    gained.set(xlabel="KL(policy ‖ original), nats a token", ylabel="held-out margin, nats", title="Margin and KL")
    swept.set(xlabel="β₀", ylabel="held-out margin, nats", title="Margin by β₀", xscale="log")
    betas.set(
        xlabel="optimizer step", ylabel="running β", title=f"β from β₀ = {first.beta:g}, seed {first.seed}",
        yscale="log",
    )  # fmt: skip
    decisions.set(
        xlabel="optimizer step", ylabel="share of the step's pairs", title="ε-DPO's decisions in that run",
        ylim=(-0.02, 1.02),
    )  # fmt: skip
    for axes in (gained, swept, betas, decisions):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        else:
            axes.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(options: argparse.Namespace, runs: list[Run]) -> str:
    """The tables of what is done so far, in their file."""
    text = tables(collect(options.out, runs), options.idle)
    if options.micro_steps and all((folder / MADE).exists() for *_, folder in micro_runs(options.out)):
        text += "\n\nThe same eight pairs a step, in micro-batches:\n\n" + micro_table(options.out)
    (options.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(arguments: list[str] | None = None) -> None:
    options, flags = parse(arguments)
    runs, failed, took = plan(options), [], []
    words = {options.out / run.name: run.words(flags, options.veto) for run in runs}
    micro = micro_words(options, flags) if options.micro_steps else {}
    for folder, own in (words | micro).items():
        check_settings(folder, own)
    for i, run in enumerate(runs):
        folder, start = options.out / run.name, time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} run {i + 1} of {len(runs)}, {run.name}: ", end="", flush=True)
        done = figures_path(folder).exists()
        try:
            if not done:
                train(folder, words[folder])
        except subprocess.CalledProcessError as error:
            failed.append(run.name)
            print(f"FAILED with status {error.returncode}, see {folder / 'output.txt'}", flush=True)
            continue
        figures(options.out, run)
        if options.discard_weights:
            discard_weights(folder)
        write(options, runs)
        if done:
            print("done before", flush=True)
            continue
        took.append(time.monotonic() - start)
        left = sum(took) / len(took) * sum(not figures_path(other).exists() for other in words)
        print(f"{took[-1] / 60:.1f} min; those to come, at this rate, {left / 60:.0f} min", flush=True)
    for folder, own in micro.items():
        train(folder, own)
    print(write(options, runs))
    if found := collect(options.out, runs):
        picture(found, options.out / "comparison.png")
        print(f"\nwritten to {options.out / 'comparison.md'} and {options.out / 'comparison.png'}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same words try them again")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
