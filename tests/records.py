"""Records made up, but consistent: of any size, in the time it takes to write them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from epsdpo_kernels import EpsilonDPOLoss
from epsdpo_kernels.pair import losses_and_coefficients, pair_beta, perturbation_step
from epsdpo_kernels.record import Recorder, parts
from epsdpo_kernels.record.recorder import numbers, write_end, write_part

OPTIONS = {
    "model": "made-up", "dataset": "nowhere.jsonl", "dataset_split": "train", "eval_dataset": None,
    "eval_split": "test", "method": "eps-dpo", "beta": 0.1, "epsilon": 0.05, "beta_update": "mean-step",
    "label_smoothing": 0.0, "beta_dpo_alpha": 0.6, "beta_dpo_keep": 0.8,
}  # fmt: skip


def rechain(run: Path) -> None:
    """What the best of forgers does: every part's digest and number, and the ends, as if the run had written them."""
    own: dict[int, list[Path]] = {}
    for part in parts(run / "record"):
        own.setdefault(numbers(part)[0], []).append(part)
    for rank, found in own.items():
        before = ""
        for number, part in enumerate(found):
            part = part.rename(part.with_name(f"{part.name[:-12]}{number:04d}.parquet"))
            before = write_part(pq.read_table(part), part, before)
        write_end(run / "record" / f"end-{rank:03d}.json", part.name, before, True)


def write_run(
    run: Path, pairs: int = 40, epochs: int = 2, batch: int = 4, ranks: int = 1, seed: int = 0, eval_pairs: int = 6,
    labels: list[str] | None = None, ids: list[str] | None = None, rows_per_part: int = 16384,
    eval_sets: tuple[str, ...] = ("eval",), accumulation: int = 1, drop_last: bool = False, **options,
) -> Path:  # fmt: skip
    """Writes run.json and record/ of a run that never was, with figures that fit each other; the run's folder.

    A step has ``accumulation`` micro-batches; ``drop_last`` leaves out the pairs that do not fill every rank's batch.
    ``options`` replace those of ``OPTIONS``; ``veto`` withholds relaxations as the audit expects it.
    """
    options = OPTIONS | options
    epsilon = options["epsilon"] if options["method"] == "eps-dpo" else 0.0
    update = options["beta_update"] if epsilon else "none"
    loss_fn = EpsilonDPOLoss(options["beta"], epsilon, update, options["label_smoothing"])
    bounds = {name: float(bound) for name, _, bound in (v.partition("=") for v in options.get("veto", []))}
    run.mkdir(parents=True, exist_ok=True)
    facts = {
        "version": "0", "options": options, "ranks": ranks,
        "pairs": {"train": pairs} | dict.fromkeys(eval_sets, eval_pairs),
        "training_arguments": {"per_device_train_batch_size": batch, "seed": seed, "num_train_epochs": epochs,
                               "dataloader_drop_last": drop_last},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    recorders = [Recorder(run / "record", rank, rows_per_part) for rank in range(ranks)]
    rng = np.random.default_rng(seed)
    ids = ids or [f"{n:016x}" for n in range(pairs + eval_pairs)]
    whole = pairs - pairs % (batch * ranks) if drop_last else pairs
    starts = range(0, whole, batch * ranks)
    steps = epochs * -(-len(starts) // accumulation)
    leaning = rng.normal(0, 1, pairs + eval_pairs)
    tokens = rng.integers(8, 120, (2, pairs + eval_pairs))
    ref = -tokens * rng.uniform(1.5, 3, (2, pairs + eval_pairs))

    def append(rank: int, split: str, step: int, micro: int, epoch: float, row: np.ndarray) -> None:
        n, trained = len(row), min(1.0, 3 * step / steps)
        f = np.float32
        kl = f(np.abs(rng.normal(0.02, 0.01, (2, n))) * tokens[:, row] * trained)
        gain = (leaning[row] + rng.normal(0, 0.5, n) + 0.6) * 2 * trained + (kl[0] - kl[1])
        ref_chosen, ref_rejected = f(ref[:, row])
        chosen, rejected = f(ref_chosen + gain / 2), f(ref_rejected - gain / 2)
        margin = (chosen - rejected) - (ref_chosen - ref_rejected)
        lean = margin - (kl[0] - kl[1])
        band = f(rng.normal(0, 0.1, n)) * f(epsilon)
        shifts = f(epsilon) * lean + band, -f(epsilon) * lean + band
        entropy = f(rng.uniform(1, 3, (2, n)))
        decision = perturbation_step(torch.from_numpy(shifts[0]), torch.from_numpy(shifts[1])).numpy()
        above = entropy[0] > bounds.get("entropy", np.inf)
        vetoed = (decision == 1) & (above | (kl.sum(0) > bounds.get("kl", np.inf)))
        decision = np.where(vetoed, 0, decision).astype(np.int8)
        beta = loss_fn.beta.clone()
        used = pair_beta(torch.from_numpy(decision), beta, epsilon)
        logps = tuple(map(torch.from_numpy, (chosen, rejected, ref_chosen, ref_rejected)))
        losses, coefficient = losses_and_coefficients(logps, used, options["label_smoothing"])
        if split == "train":
            loss_fn.counts += torch.tensor([int((decision == sign).sum()) for sign in (1, 0, -1)])
        recorders[rank].append({
            "step": step, "policy_step": step - (split == "train"), "micro": micro,
            "epoch": epoch, "split": split, "method": options["method"],
            "pair_id": [ids[r] for r in row], "row": row, "chosen_tokens": tokens[0, row],
            "rejected_tokens": tokens[1, row], "chosen_logp": chosen, "rejected_logp": rejected,
            "ref_chosen_logp": ref_chosen, "ref_rejected_logp": ref_rejected, "margin": margin,
            "relaxed_shift": shifts[0], "tightened_shift": shifts[1], "decision": decision, "vetoed": vetoed,
            "epsilon": epsilon, "beta": beta.item(), "beta_used": used.numpy(), "loss": losses.numpy(),
            "label_smoothing": options["label_smoothing"], "coefficient": coefficient.numpy(), "chosen_kl": kl[0],
            "rejected_kl": kl[1], "chosen_entropy": entropy[0], "rejected_entropy": entropy[1],
            "label": [labels[r % len(labels)] if labels else None for r in row],
        })  # fmt: skip

    step, held_out = 0, np.arange(pairs, pairs + eval_pairs)
    for epoch in range(epochs):
        order = rng.permutation(pairs)
        for k, start in enumerate(starts):
            micro = k % accumulation
            step += micro == 0
            for rank in range(ranks):
                row = order[start + rank * batch : start + (rank + 1) * batch]
                if len(row):
                    append(rank, "train", step, micro, epoch + (k - micro) / len(starts), row)
            if micro == accumulation - 1 or k == len(starts) - 1:
                loss_fn.update_beta()
        if eval_pairs:
            for name in eval_sets:
                append(0, name, step, 0, epoch + 1.0, held_out)
    for recorder in recorders:
        recorder.close()
    return run
