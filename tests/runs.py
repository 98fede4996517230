"""Command lines of short runs on the tiny model."""

from pathlib import Path


def flags(tiny: Path, run: Path, **more) -> list[str]:
    options = {
        "model": tiny, "dataset": tiny / "pairs.jsonl", "output_dir": run, "max_length": 16, "learning_rate": 1e-3,
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "epsilon": 0.05,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 3, "disable_tqdm": True,
    } | more  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]
