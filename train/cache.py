"""The reference without a reference model: its last hidden states, written once, and its head.

ε-DPO reads the reference's whole distribution, so log-probs of the labels would not do. H numbers a scored token do,
where logits would be V. A cache is a folder of

    head.safetensors    weight (V, H), bias (V,) where there is one
    hidden.bin          (N, H), as the model gave them: a pair's chosen tokens, its rejected ones, the next pair's
    checksums.bin       (pairs,) uint32, CRC-32 of each pair's part of hidden.bin
    facts.json          what it was made from, and its shapes; a folder without it is no cache
    progress.json       how many pairs are on disk
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback

from epsdpo_kernels.integrations.packing import Packing
from epsdpo_kernels.integrations.sequence import Share
from epsdpo_kernels.integrations.transformers import HeadInputs, causal_lm, evaluating, head_inputs

from .data import BLANK, Collator

HEAD, HIDDEN, CHECKSUMS, FACTS, PROGRESS = (
    "head.safetensors", "hidden.bin", "checksums.bin", "facts.json", "progress.json"
)  # fmt: skip
BATCHES_BETWEEN_SYNCS = 32


class Place(NamedTuple):
    """Where a pair is in a cache."""

    number: int
    start: int  # of its tokens
    prompt: int  # its length in tokens


def model_hash(model: nn.Module) -> str:
    """Of configurations and weights, 32 hex digits; a model's name and folder do not matter."""
    digest = hashlib.blake2b(digest_size=16)
    # An adapter's scale is in no weight.
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    config = causal_lm(model).config.to_dict() | {f"adapter {name}": own.to_dict() for name, own in adapters.items()}
    for name in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(name, None)
    for name in adapters:
        for elsewhere in ("base_model_name_or_path", "inference_mode", "revision"):
            config[f"adapter {name}"].pop(elsewhere, None)
    digest.update(json.dumps(config, sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def data_hash(pairs: Sequence[dict[str, Any]]) -> str:
    """Of the token ids of all pairs and their order, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(np.array([len(pair["prompt_ids"])]).tobytes() + _key(*_sequences(pair)))
    return digest.hexdigest()


def write(
    folder: str | os.PathLike,
    model: nn.Module,
    pairs: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    progress_bar: bool = True,
) -> None:
    """Makes a cache, goes on with one that was cut short, or finds it complete.

    Args:
        folder: of the cache.
        model: the reference; it runs in evaluation mode on the device where it is.
        pairs: rows of :func:`train.data.load_pairs`, those held out included.
        batch_size: pairs a batch.
        autocast: dtype that training computes in, where that is not the weights'.

    Raises:
        ValueError: the folder holds the cache of another model or data set, or one that was damaged; or the disk has
            no room for it.
    """
    folder = Path(folder)
    head, _ = _states(model, [pairs[0]], autocast)
    facts = {
        "model": model_hash(model), "data": data_hash(pairs), "pairs": len(pairs), "tokens": sum(map(_tokens, pairs)),
        "width": head.hidden.shape[-1], "dtype": str(head.hidden.dtype).removeprefix("torch."),
        "autocast": str(autocast), "logit_scale": head.logit_scale, "softcap": head.softcap,
    }  # fmt: skip
    if (folder / FACTS).exists():
        held = _read_json(folder / FACTS)
        different = [f"{name} ({held[name]}; here {value})" for name, value in facts.items() if held[name] != value]
        if different:
            raise ValueError(
                f"cache_reference: {folder} was written for something else. These differ: {', '.join(different)}. Give "
                "another folder, or remove this one"
            )
        facts = held
    else:
        facts = _begin(folder, facts, head)
    hidden, checksums = _open(folder, facts, "r+")
    done = _read_json(folder / PROGRESS)["pairs"]
    start = sum(_tokens(pairs[i]) for i in range(done))
    with tqdm(total=len(pairs), initial=done, desc="reference", unit="pair", disable=not progress_bar) as bar:
        for count, first in enumerate(range(done, len(pairs), batch_size), 1):
            batch = [pairs[i] for i in range(first, min(first + batch_size, len(pairs)))]
            for number, own in enumerate(_states(model, batch, autocast)[1], first):
                hidden[start : start + len(own)] = own
                checksums[number] = zlib.crc32(own.data)
                start += len(own)
            done = first + len(batch)
            bar.update(len(batch))
            if count % BATCHES_BETWEEN_SYNCS == 0 or done == len(pairs):
                hidden.flush()
                checksums.flush()
                _write_json(folder / PROGRESS, {"pairs": done})


class CachedReference:
    """The reference's side of the loss out of a cache: a :data:`epsdpo_kernels.integrations.transformers.Reference`.

    A pair is found by its token ids, because rows of two data sets may have the same number.

    A forward rounds by the shape of its batch, so cached states differ from those of the training's own batch by some
    units in the last place. That decides a pair only where the policy is the reference still, and every shift is 0.
    There the policy itself is run as the reference, until :class:`FirstStep` has seen it move.

    Args:
        folder: of a cache that :func:`write` completed.
        pairs: those that it was made from.
        device: where head and hidden states are wanted.
        policy: the model that trains if it starts as the reference, within PEFT or not; else None.

    Raises:
        ValueError: the cache is incomplete or damaged. A pair's states are checked when they are read.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        pairs: Sequence[dict[str, Any]],
        device: torch.device | str,
        policy: nn.Module | None = None,
    ):
        self.folder, self.device, self.policy = Path(folder), device, policy
        self.facts = _read_json(self.folder / FACTS)
        self.hidden, self.checksums = _open(self.folder, self.facts, "r")
        if (done := _read_json(self.folder / PROGRESS)["pairs"]) != len(pairs):
            raise ValueError(f"cache_reference: {folder} holds {done} of {len(pairs)} pairs")
        head = {name: tensor.to(device) for name, tensor in load_file(self.folder / HEAD).items()}
        self.weight, self.bias = head["weight"], head.get("bias")
        self.places: dict[bytes, Place] = {}
        start = 0
        for number, pair in enumerate(pairs):
            place = self.places.setdefault(_key(*_sequences(pair)), Place(number, start, len(pair["prompt_ids"])))
            if place.prompt != len(pair["prompt_ids"]):
                raise ValueError(
                    f"cache_reference: the pairs at rows {pairs[place.number]['row']} and {pair['row']} have the same "
                    "tokens and prompts of different length; a cache can't tell them apart"
                )
            start += _tokens(pair)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | Packing, row: Tensor | None) -> HeadInputs:
        if self.policy is not None:
            with evaluating(self.policy):
                return head_inputs(self.policy, input_ids, attention_mask)
        if isinstance(attention_mask, Packing):
            sequences = attention_mask.rows()
        else:
            sequences = [ids[real] for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
        rows = [ids.cpu().numpy() for ids in sequences]
        pairs, dtype = len(rows) // 2, getattr(torch, self.facts["dtype"])
        found = [torch.empty(0, self.facts["width"], dtype=dtype)] * len(rows)
        starts = [0] * len(rows)
        blank = row is not None and (row == BLANK).all()
        for i in range(0 if blank else pairs):
            both = (i, pairs + i)
            number, start, prompt = self.places[_key(rows[i], rows[pairs + i])]
            counts = [len(rows[j]) - prompt for j in both]
            own = np.array(self.hidden[start : start + sum(counts)])
            if zlib.crc32(own.data) != self.checksums[number]:
                raise ValueError(
                    f"cache_reference: in {self.folder} the states of pair {number} are damaged; remove the folder to "
                    "write it anew"
                )
            for j, part in zip(both, torch.from_numpy(own).view(dtype).split(counts), strict=True):
                found[j], starts[j] = part, prompt - 1
        if isinstance(attention_mask, Packing):
            states = torch.cat(found)
            if isinstance(attention_mask, Share):
                states = states[attention_mask.own.to(states.device)]
        else:
            states = torch.zeros(*input_ids.shape, self.facts["width"], dtype=dtype)
            for j, (start, part) in enumerate(zip(starts, found, strict=True)):
                states[j, start : start + len(part)] = part
        return HeadInputs(
            states.to(self.device), self.weight, self.bias, self.facts["logit_scale"], self.facts["softcap"]
        )


class FirstStep(TrainerCallback):
    """Tells a :class:`CachedReference` when the policy is no longer the reference."""

    def __init__(self, reference: CachedReference):
        self.reference = reference

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.reference.policy = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        # A warm-up begins with a learning rate of 0, which moves nothing.
        if any(group["lr"] for group in kwargs["optimizer"].param_groups):
            self.reference.policy = None


def _begin(folder: Path, facts: dict[str, Any], head: HeadInputs) -> dict[str, Any]:
    """The files of a cache in which nothing is written yet, and its facts with the head's hash."""
    size = facts["tokens"] * facts["width"] * head.hidden.element_size()
    print(f"cache_reference: {size:,} bytes of hidden states of {facts['tokens']:,} tokens go to {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"cache_reference: {folder} has room for {free:,} bytes, takes {size:,}")
    tensors = {"weight": head.weight.detach()} | ({} if head.bias is None else {"bias": head.bias.detach()})
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / HEAD)
    for name, length in ((HIDDEN, size), (CHECKSUMS, 4 * facts["pairs"])):
        with open(folder / name, "wb") as file:
            file.truncate(length)
    _write_json(folder / PROGRESS, {"pairs": 0})
    facts = facts | {"head": _file_hash(folder / HEAD), "bytes": size}
    _write_json(folder / FACTS, facts)
    return facts


def _open(folder: Path, facts: dict[str, Any], mode: Any) -> tuple[np.memmap, np.memmap]:
    """hidden.bin as (N, bytes a token) and checksums.bin, after what can be checked without reading them."""
    for name, size in ((HIDDEN, facts["bytes"]), (CHECKSUMS, 4 * facts["pairs"])):
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise ValueError(
                f"cache_reference: {folder / name} is cut short: it has {found:,} bytes, takes {size:,}. Remove the "
                "folder to write it anew"
            )
    if not (folder / HEAD).exists() or _file_hash(folder / HEAD) != facts["head"]:
        raise ValueError(f"cache_reference: {folder / HEAD} is damaged; remove the folder to write it anew")
    shape = (facts["tokens"], facts["bytes"] // facts["tokens"])
    return np.memmap(folder / HIDDEN, np.uint8, mode, shape=shape), np.memmap(folder / CHECKSUMS, np.uint32, mode)


@torch.no_grad()
def _states(
    model: nn.Module, pairs: list[dict[str, Any]], autocast: torch.dtype | None
) -> tuple[HeadInputs, list[np.ndarray]]:
    """The head's inputs of a batch, and each pair's states as (tokens, bytes a token) uint8, chosen then rejected."""
    batch = Collator(0)(pairs)
    device = causal_lm(model).device
    with evaluating(model, autocast):
        head = head_inputs(model, batch["input_ids"].to(device), batch["attention_mask"].to(device))
    hidden = head.hidden.cpu().view(torch.uint8).numpy()
    scored = (batch["labels"] != -100).numpy()
    sides = range(len(pairs)), range(len(pairs), 2 * len(pairs))
    return head, [np.concatenate([hidden[i][scored[i]] for i in both]) for both in zip(*sides, strict=True)]


def _sequences(pair: dict[str, Any]) -> Iterator[np.ndarray]:
    for side in ("chosen_ids", "rejected_ids"):
        yield np.concatenate((pair["prompt_ids"], pair[side]))


def _key(chosen: np.ndarray, rejected: np.ndarray) -> bytes:
    """Of a pair's two token sequences, prompts included."""
    parts = [np.asarray(ids, np.int64).tobytes() for ids in (chosen, rejected)]
    return hashlib.blake2b(len(parts[0]).to_bytes(8, "little") + b"".join(parts), digest_size=16).digest()


def _tokens(pair: dict[str, Any]) -> int:
    return len(pair["chosen_ids"]) + len(pair["rejected_ids"])


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _file_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
