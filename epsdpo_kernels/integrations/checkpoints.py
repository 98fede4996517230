"""A run's checkpoints: which is whole, whether a run may go on from it, and what becomes of those of a run before."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..record.run import STATE, free_folder, state_step
from .sequence import sequence_ranks

# What of a run's arguments decides which pairs are in which step, and what a step does: the optimizer's and the
# schedule's part comes out of the checkpoint, whatever is asked for then.
KEPT = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "dataloader_drop_last", "seed",
    "data_seed", "train_sampling_strategy",
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16",
)  # fmt: skip
SETTINGS = "settings"  # in the metadata of a checkpoint's β
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers by their bytes
# What of an adapter's configuration says where it is from, and not what it does.
ELSEWHERE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")


def checkpoint_step(folder: str | os.PathLike) -> int | None:
    """Optimizer steps in a complete checkpoint; None where a kill cut it short, or it is something else."""
    return state_step(Path(folder, STATE))


def _checkpoints(run: str | os.PathLike) -> dict[Path, int | None]:
    return {folder: checkpoint_step(folder) for folder in sorted(Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))}


def last_checkpoint(run: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run; one that a kill cut short is passed over."""
    whole = {step: folder for folder, step in _checkpoints(run).items() if step is not None}
    return whole[max(whole)] if whole else None


def checkpoint_of(asked: str | os.PathLike | None, run: str | os.PathLike) -> Path | None:
    """The complete checkpoint that is asked for by its folder, or with None the last one of a run, None without any.

    Warns of those that are passed over.

    Raises:
        ValueError: the folder is no complete checkpoint.
    """
    if asked is not None:
        if checkpoint_step(asked) is None:
            raise ValueError(
                f"resume_from_checkpoint: got {asked}, which is no complete checkpoint: it has no readable {STATE}. "
                "Takes the folder of one, or the word for a run's last one (python -m train: last, TRL: True)"
            )
        return Path(asked)
    if cut := [folder.name for folder, step in _checkpoints(run).items() if step is None]:
        warnings.warn(
            f"resume_from_checkpoint: {', '.join(cut)} in {run}, cut short by a kill, passed over", stacklevel=2
        )
    return last_checkpoint(run)


def run_settings(args: Any, data: Mapping[str, Any], ids: str, **own: Any) -> dict[str, Any]:
    """What a run has to keep when it goes on from a checkpoint: its loss, its pairs, their order, and its steps.

    Args:
        args: transformers' arguments.
        data: data sets by name; None, and what has no column of ids, is left out. A stream is known by its beginning.
        ids: the column of them that holds the pairs' ids.
        own: everything else.
    """
    found = own | {name: getattr(args, name, None) for name in KEPT} | {"sp_size": sequence_ranks(args)}
    for name, one in data.items():
        if isinstance(one, datasets.IterableDataset):
            found[name] = f"a stream of {one.num_shards} shards that begins with {beginning(one, ids)}"
        elif ids in (getattr(one, "column_names", None) or ()):
            found[name] = _digest(one, ids)
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def adapter_settings(model: Any, argument: str = "peft_config") -> dict[str, Any]:
    """A PEFT model's adapter in use, by its configuration's fields under ``argument``; of another model, that it has
    none."""
    # transformers' own adapters, which a reference may have, count as its weights.
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return {argument: None}
    fields = {f"{argument}.{name}": value for name, value in config.to_dict().items() if name not in ELSEWHERE}
    return {argument: type(config).__name__} | fields


def frozen_weights(*models: Any) -> str:
    """A checksum of the weights that no step changes, the reference's among them, of the first rank; the same for all.

    Sums of whole numbers, which no order or device rounds. What FSDP or ZeRO has split is left out, and the adapter in
    use, which checkpoints hold.
    """
    total = 0
    for model in models:
        active = getattr(model, "active_adapter", None)
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad or p.is_meta or isinstance(p, DTensor) or active in name.split("."):
                continue
            bits = p.detach().reshape(-1).view(_BITS[p.dtype.itemsize])
            total += (i + 1) * sum(int(part.sum(dtype=torch.int64)) for part in bits.split(1 << 24))
    return broadcast_object_list([f"{total % 2**64:016x}"])[0]


def check_output(output_dir: str, **models: str | None) -> None:
    """Raises ValueError where a run would write its model over one that it is made of, its reference."""
    for name, path in models.items():
        if path and Path(path).is_dir() and Path(path).resolve() == Path(output_dir).resolve():
            raise ValueError(
                f"output_dir: got {output_dir}, the folder of {name}, takes another: the trained model would be "
                "written over the one that is the reference"
            )


def _digest(dataset: Any, column: str) -> str:
    """Of a data set's pairs in their order."""
    found = hashlib.blake2b(digest_size=8)
    for table in dataset.select_columns([column]).with_format("arrow").iter(4096):
        found.update(json.dumps(table[column].to_pylist()).encode())
    return f"{len(dataset)} pairs, {found.hexdigest()}"


def beginning(stream: datasets.IterableDataset, column: str, pairs: int = 16) -> str:
    """Of a stream's first pairs; of what comes later nobody knows before it is read."""
    first = json.dumps([row.get(column) for row in itertools.islice(stream, pairs)]).encode()
    return hashlib.blake2b(first, digest_size=8).hexdigest()


def as_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as metadata of the file that holds a checkpoint's β."""
    return {SETTINGS: json.dumps(settings)}


def check_settings(state: Path, settings: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises ValueError where the checkpoint with this file was made by a run of other settings, naming them, or by
    another version of this package, whose file holds other tensors than those of ``names``."""
    if not state.is_file():
        return  # what is missing is said elsewhere
    with safe_open(state, "pt") as file:
        theirs, held = json.loads((file.metadata() or {}).get(SETTINGS, "{}")), set(file.keys())
    other = [name for name in settings if name in theirs and settings[name] != theirs[name]]
    if other:
        differences = "; ".join(f"{name} was {theirs[name]!r}, is {settings[name]!r}" for name in other)
        raise ValueError(
            f"resume_from_checkpoint: got {state.parent} of a run with other settings ({differences}), takes one with "
            "the same: what is on record before it and after it would not be one run. To start a new run from its "
            "weights, give it as model"
        )
    if held != set(names):
        raise ValueError(
            f"resume_from_checkpoint: got {state.parent}, whose {state.name} holds {', '.join(sorted(held))}, takes "
            f"one that holds {', '.join(sorted(names))}: another version of epsdpo_kernels wrote it, with which it can "
            "be resumed. To start a new run from its weights, give it as model"
        )


def set_later_aside(run: str | os.PathLike, step: int, own: str) -> Path | None:
    """Moves what a run's folder holds of steps past ``step``, where it begins now, into its first free ``earlier-N``.

    Those are of a run that was given up, and a resume would take them for the newest. None where there are none.

    Args:
        own: the file by which a checkpoint is known to be ours.
    """
    run = Path(run)
    later = [
        folder
        for folder, done in _checkpoints(run).items()
        if done is not None and done > step and (folder / own).is_file()
    ]
    if not later:
        return None
    if (checkpoint_step(run) or 0) > step:
        later.append(run / STATE)
    aside = free_folder(run)
    for path in later:
        os.replace(path, aside / path.name)
    names = ", ".join(path.name for path in later)
    warnings.warn(f"output_dir: {run} held {names} of steps past {step}, which are now in {aside}", stacklevel=2)
    return aside
