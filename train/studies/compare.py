"""``python -m train.studies.compare``: the methods side by side on one model and data set, in a table and a picture.

Every run is a ``python -m train`` of its own, so that memory and time are its own; a run that is there is not made
again, and one that was cut short goes on. Each final policy is then measured against the ORIGINAL reference, also
where the method's own reference has moved. Short runs beside them show what the same batch, cut into other
micro-batches, decides.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from epsdpo_kernels import linear_pair_stats, record
from epsdpo_kernels.integrations.transformers import head_inputs

from .. import data
from ..__main__ import load_model
from ..methods import METHODS

FINAL = "against_original.json"
# What a comparison calls eps-dpo with a veto.
VETO = "eps-dpo-veto"
# The same eight pairs a step: pairs a micro-batch × micro-batches.
MICRO_BATCHES = ((8, 1), (4, 2), (1, 8))


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m train.studies.compare", description=__doc__, epilog="All other flags go to `python -m train`."
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs, the table and the picture")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--veto", nargs="+", metavar="BOUND", help=f"also runs eps-dpo with this veto, as {VETO}")
    parser.add_argument(
        "--micro-steps", type=int, default=12, help="steps of the runs that compare micro-batches; 0 leaves them out"
    )
    options, flags = parser.parse_known_args(arguments)
    if options.veto:
        options.methods.append(VETO)
    return options, flags


def train(run: Path, method: str, seed: int, flags: list[str], veto: list[str] | None = None) -> None:
    """One run, unless it is done already."""
    if (run / "trainer_state.json").exists():
        print(f"{run}: done before", flush=True)
        return
    resume = ["--resume_from_checkpoint=last"] if any(run.glob("checkpoint-*/trainer_state.json")) else []
    method_flags = [f"--method={method}"] if method != VETO else ["--method=eps-dpo", "--veto", *(veto or ())]
    command = [
        sys.executable, "-m", "train", *method_flags, f"--seed={seed}", f"--output_dir={run}", "--disable_tqdm=true",
        *flags, *resume,
    ]  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    print(f"{run}: {'resumed' if resume else 'started'}", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with open(run / "output.txt", "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    # The largest child so far: exact for this run where it is larger than those before it, a bound where not.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    (run / "peak.json").write_text(json.dumps({"bytes": peak * 1024, "bound_only": peak == before}))


@torch.no_grad()
def against_original(run: Path) -> dict[str, float]:
    """Held-out figures of a run's final policy against the model it started from, forward and reverse KL exact.

    Margins are without β, so that methods whose β differ can be compared.
    """
    if (run / FINAL).exists():
        return json.loads((run / FINAL).read_text())
    facts = json.loads((run / "run.json").read_text())
    options, arguments = facts["options"], facts["training_arguments"]
    original, tokenizer = load_model(options["model"], options["dtype"])
    policy, _ = load_model(str(run), options["dtype"])
    original.eval(), policy.eval()
    pairs, _ = data.load_pairs(
        options["eval_dataset"] or options["dataset"], tokenizer, max_length=options["max_length"],
        max_prompt_length=options["max_prompt_length"],
        split=options["eval_split"] if options["eval_dataset"] else options["dataset_split"],
    )  # fmt: skip
    if not options["eval_dataset"]:
        pairs = pairs.train_test_split(options["eval_fraction"], seed=arguments["seed"])["test"]
    collator = data.Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    rows: list[tuple] = []
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
        tokens = (labels != -100).sum(1).chunk(2)
        rows += zip(*(t.tolist() for t in (margin, forward.chosen_kl, reverse.chosen_kl, *tokens)), strict=True)
    margins, kl, reverse_kl, chosen_tokens, _ = map(torch.tensor, zip(*rows, strict=True))
    found = {
        "pairs": len(rows),
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "kl_per_token": (kl.sum() / chosen_tokens.sum()).item(),
        "reverse_kl_per_token": (reverse_kl.sum() / chosen_tokens.sum()).item(),
    }
    (run / FINAL).write_text(json.dumps(found, indent=1))
    return found


def collect(out: Path, methods: list[str], seeds: list[int]) -> list[dict]:
    """One entry a run: what it logged, and its figures against the original reference."""
    runs = []
    for method in methods:
        for seed in seeds:
            run = out / f"{method}-{seed}"
            log = json.loads((run / "trainer_state.json").read_text())["log_history"]
            steps = [entry for entry in log if "loss" in entry]
            seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry) / len(steps)
            peak = json.loads((run / "peak.json").read_text())
            final = against_original(run)
            runs.append({"method": method, "seed": seed, "steps": steps, "seconds": seconds, "peak": peak} | final)
    return runs


def table(runs: list[dict]) -> str:
    """Markdown, a row a run."""
    head = (
        "| method | seed | held-out accuracy | margin (nats) | KL policy‖original (nats/token) | KL original‖policy | "
        "β at the end | relaxed | tightened | s/step | peak GiB |"
    )
    lines = [head, "| --- |" + " --- |" * 10]
    for run in runs:
        steps, last = run["steps"], run["steps"][-1]
        relaxed, tightened = (sum(s[f"beta/{n}"] for s in steps) / len(steps) for n in ("relaxed", "tightened"))
        bound = "≤ " if run["peak"]["bound_only"] else ""
        lines.append(
            f"| {run['method']} | {run['seed']} | {run['accuracy']:.3f} | {run['margin']:.3f} | "
            f"{run['kl_per_token']:.5f} | {run['reverse_kl_per_token']:.5f} | {last['beta/running']:.4f} | "
            f"{relaxed:.0%} | {tightened:.0%} | {run['seconds']:.1f} | {bound}{run['peak']['bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def train_micro(out: Path, seed: int, steps: int, flags: list[str]) -> None:
    """The runs of :func:`micro_table`."""
    for method in ("eps-dpo", "beta-dpo"):
        for size, count in MICRO_BATCHES:
            own = [
                f"--max_steps={steps}", f"--per_device_train_batch_size={size}",
                f"--gradient_accumulation_steps={count}", "--save_strategy=no", "--eval_strategy=no",
                "--eval_fraction=0",
            ]  # fmt: skip
            train(out / "micro-batches" / f"{method}-{count}x{size}", method, seed, [*flags, *own])


def micro_table(out: Path) -> str:
    """Markdown, a row a run: decisions, β and margins of every pair against those of the whole batch at once."""
    lines = [
        "| method | micro-batches × pairs | pairs | decided otherwise | largest change of a β used | β at the end |",
        "| --- |" + " --- |" * 5,
    ]
    for method in ("eps-dpo", "beta-dpo"):
        whole = None
        for size, count in MICRO_BATCHES:
            run = out / "micro-batches" / f"{method}-{count}x{size}"
            pairs = record.read(run / "record").to_pandas().query("split == 'train'")
            pairs = pairs.sort_values(["step", "row"], ignore_index=True)
            whole = pairs if whole is None else whole
            if not pairs[["step", "row"]].equals(whole[["step", "row"]]):
                raise ValueError(f"{run}: its steps are of other pairs than the first run's; remove the folder")
            otherwise = (pairs["decision"] != whole["decision"]).sum()
            # β-DPO leaves pairs out at random, with a β of 0.
            used = (pairs["beta_used"] > 0) & (whole["beta_used"] > 0)
            change = (pairs["beta_used"] / whole["beta_used"] - 1).abs()[used].max()
            log = json.loads((run / "trainer_state.json").read_text())["log_history"]
            beta = [entry["beta/running"] for entry in log if "loss" in entry][-1]
            lines.append(f"| {method} | {count} × {size} | {len(pairs)} | {otherwise} | {change:.2%} | {beta:.5f} |")
    return "\n".join(lines)


def picture(runs: list[dict], path: Path) -> None:
    """Margin against KL from the original, and β and decisions over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's colours, which the colour-blind tell apart, and a marker each.
    colours = (("#0072B2", "o"), ("#000000", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"))
    looks = dict(zip((*METHODS, VETO), colours, strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for run in runs:
        colour, marker = looks[run["method"]]
        name = run["method"] if run["seed"] == runs[0]["seed"] else None
        x = range(1, len(run["steps"]) + 1)
        left.plot(run["kl_per_token"], run["margin"], marker, color=colour, label=name, markersize=8)
        middle.plot(x, [s["beta/running"] for s in run["steps"]], color=colour, label=name, alpha=0.8)
        if run["method"] == "eps-dpo":
            for what, line in (("relaxed", "-"), ("tightened", ":")):
                label = f"{what}, seed {run['seed']}"
                alpha = 0.9 if run["seed"] == runs[0]["seed"] else 0.4
                right.plot(x, [s[f"beta/{what}"] for s in run["steps"]], line, color=colour, alpha=alpha, label=label)
    left.set(
        xlabel="KL(policy ‖ original), nats a token",
        ylabel="held-out margin, nats",
        title="What was gained, at what KL",
    )
    middle.set(xlabel="optimizer step", ylabel="running β", title="β")
    right.set(
        xlabel="optimizer step", ylabel="share of the step's pairs", title="ε-DPO's decisions", ylim=(-0.02, 1.02)
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options, flags = parse(arguments)
    for seed in options.seeds:
        for method in options.methods:
            train(options.out / f"{method}-{seed}", method, seed, flags, options.veto)
    if options.micro_steps:
        train_micro(options.out, options.seeds[0], options.micro_steps, flags)
    runs = collect(options.out, options.methods, options.seeds)
    text = table(runs)
    if options.micro_steps:
        text += "\n\nThe same eight pairs a step, in micro-batches:\n\n" + micro_table(options.out)
    (options.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    picture(runs, options.out / "comparison.png")
    print(text)
    print(f"\nwritten to {options.out / 'comparison.md'} and {options.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
