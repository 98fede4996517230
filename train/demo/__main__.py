"""``make demo``: trains SmolLM2-135M-Instruct with ε-DPO on a CPU in minutes, and says in a table what happened."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from transformers import PrinterCallback, TrainerCallback

from epsdpo_kernels.record.audit import audit
from epsdpo_kernels.record.report import report

from ..__main__ import build, checkpoint_to_resume
from ..options import parse

# Enough to see the preference learnt and β move; a serious run takes a smaller learning rate and more pairs.
SETTINGS = {
    "model": "smollm2-135m",
    "dataset": str(Path(__file__).parent / "pairs.jsonl"),
    "eval_fraction": 0.12,
    "max_length": 128,
    "beta": 0.1,
    "epsilon": 0.05,
    "learning_rate": 5e-6,
    "per_device_train_batch_size": 8,
    "max_steps": 20,
    "warmup_steps": 3,
    "save_strategy": "no",
    "use_cpu": True,
    "label_column": "topic",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def main() -> None:
    output_dir = f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    options, args = parse([*(f"--{k}={v}" for k, v in (SETTINGS | {"output_dir": output_dir}).items()), *sys.argv[1:]])
    print(f"ε-DPO on {options.model}, {args.max_steps} steps of {args.per_device_train_batch_size} pairs, on the CPU.")
    checkpoint_to_resume(args)
    trainer = build(options, args)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StepLines)
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()
    trainer.record.close()
    trainer.save_state()
    print(table(trainer.state.log_history, before, after, seconds))
    print(f"\naudit: {audit(Path(args.output_dir))}")
    print(f"Everything of this run is in {args.output_dir}; a report to look at: {report([Path(args.output_dir)])}")


class StepLines(TrainerCallback):
    """A line a step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(
                f"step {state.global_step:3d} of {state.max_steps}  loss {logs['loss']:.4f}  margin "
                f"{logs['rewards/margins']:+.4f}  KL {(logs['kl/chosen'] + logs['kl/rejected']) / 2:.3f}  relaxed "
                f"{logs['beta/relaxed']:4.0%}  tightened {logs['beta/tightened']:4.0%}  β {logs['beta/running']:.5f}",
                flush=True,
            )


def table(log: list[dict], before: dict, after: dict, seconds: float) -> str:
    """What the run did, from its log and the held-out figures on both sides of it."""
    steps = [entry for entry in log if "loss" in entry]
    shares = {
        name: sum(step[f"beta/{name}"] for step in steps) / len(steps) for name in ("relaxed", "kept", "tightened")
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held_out = {
        "held-out reward accuracy": "rewards/accuracies",
        "held-out reward margin": "rewards/margins",
        "held-out loss": "loss",
        "KL from the reference, chosen (nats)": "kl/chosen",
        "KL from the reference, rejected (nats)": "kl/rejected",
        "β": "beta/running",
    }
    lines = [f"{'':40s} {'before':>9s} {'after':>9s}"]
    lines += [f"{name:40s} {before['eval_' + key]:9.4f} {after['eval_' + key]:9.4f}" for name, key in held_out.items()]
    lines.append("")
    lines.append(
        "decisions: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + " of training pairs"
    )
    lines.append(f"{seconds / len(steps):.1f} s a step, {peak / 2**30:.2f} GiB peak memory of the process")
    lines.append(
        "(At the start policy and reference are one, so every reward is exactly 0 and no answer is preferred.)"
    )
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
