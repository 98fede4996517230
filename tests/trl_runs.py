"""Short runs of TRL's trainers on the tiny model, offline."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference


def pairs(folder: Path, count: int | None = None) -> Dataset:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()[:count]]
    # The tokenizer splits at spaces, and TRL joins prompt and completion without one.
    return Dataset.from_list([row | {name: " " + row[name] for name in ("chosen", "rejected")} for row in rows])


def model(folder: Path, split=None):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=split)


def options(run: Path, **more) -> dict:
    """Arguments of DPOConfig: 12 pairs an optimizer step, in 4 micro-batches."""
    return {
        "output_dir": str(run), "max_length": 16, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "seed": 3,
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 10, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "weight_decay": 0.0,
    } | more  # fmt: skip


class Masked:
    """TRL's collator, but in the micro-batches of these numbers, counted over all ranks, there is nothing to score."""

    def __init__(self, numbers: Collection[int], rank: int = 0, ranks: int = 1):
        self.numbers, self.rank, self.ranks = numbers, rank, ranks
        self.count, self.collator = 0, DataCollatorForPreference(0, 16)

    def __call__(self, examples):
        batch, number = self.collator(examples), self.count * self.ranks + self.rank
        self.count += 1
        return batch | {"completion_mask": batch["completion_mask"] * (number not in self.numbers)}


class PaddedLeft:
    """TRL's collator, but with rows' padding before them, or ``between`` their prompts and completions."""

    def __init__(self, between: bool = False):
        self.between, self.collator = between, DataCollatorForPreference(0, 16)

    def __call__(self, examples):
        batch = self.collator(examples)
        mask, completion = batch["attention_mask"], batch["completion_mask"]
        kind = 2 * completion + (1 - mask) if self.between else mask
        order = kind.argsort(dim=1, stable=True)
        return {name: t.gather(1, order) for name, t in batch.items()}
