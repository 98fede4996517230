"""What a run expects to need of memory, before its first step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..plan import tile_budget
from .packing import IGNORE, pack, to
from .sharding import local
from .transformers import causal_lm, evaluating, head_inputs, lm_head

# What an optimizer keeps of a parameter, by transformers' names: (numbers, bits of each, None for the parameter's own).
# Adafactor keeps rows and columns of a matrix. Others are not foreseen.
OPTIMIZER_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adagrad": (1, None), "rmsprop": (1, None),
    "sgd": (0, None), "adafactor": (0, None), "adamw_bnb_8bit": (2, 8), "adamw_8bit": (2, 8),
    "adamw_torch_8bit": (2, 8), "adamw_torch_4bit": (2, 4), "lion_32bit": (1, 32), "lion_8bit": (1, 8),
}  # fmt: skip
GIB = 2**30


class Expected(NamedTuple):
    """Bytes, by what they are for; what the optimizer keeps is None where that is not known."""

    weights: int
    gradients: int
    optimizer: int | None
    activations: int
    loss: int

    def __str__(self) -> str:
        total = sum(size or 0 for size in self)
        parts = [f"{name} {'?' if size is None else f'{size / GIB:.2f}'}" for name, size in self._asdict().items()]
        more = " and what the optimizer keeps" if self.optimizer is None else ""
        return f"memory: about {total / GIB:.2f} GiB{more} are needed ({', '.join(parts)})"


def expected_memory(
    policy: nn.Module,
    reference: nn.Module | None,
    *,
    tokens: int,
    scored: int,
    optimizer: str,
    packed: bool = False,
    checkpointing: bool = False,
    shards: int = 1,
) -> Expected:
    """Of one rank, at the end of the forward of its longest micro-batch, where gradients of one before are there.

    Activations are measured, on short rows, by what autograd keeps, weights that autocast has cast with them; they grow
    with tokens as long as the attention is a fused one. What allocators and communication keep beside is not in it,
    and not what an optimizer makes while it steps.

    Args:
        policy: a causal language model, within PEFT or not, not wrapped.
        reference: a second model, or None where the policy is its own.
        tokens: of the longest micro-batch, padding included.
        scored: of them, how many the loss reads.
        optimizer: transformers' name of it.
        packed: whether they are in packed rows.
        checkpointing: whether layers run again in the backward, instead of keeping what they made.
        shards: ranks that share weights, gradients and the optimizer's states.
    """
    weights, trained, numbers = {}, {}, {}
    for p in (p for model in (policy, reference) if model is not None for p in model.parameters()):
        own = local(p)
        weights[own.data_ptr()] = own.numel() * own.element_size()
        if p.requires_grad:
            trained[own.data_ptr()] = own.numel() * own.element_size()
            numbers[own.data_ptr()] = own.numel()
    model = causal_lm(policy)
    head, config = local(lm_head(model).weight), model.config.get_text_config()
    fixed, kept = kept_of_forward(policy, packed)
    if checkpointing:
        layers = config.num_hidden_layers
        kept = kept_with_checkpointing(kept / layers, layers, config.hidden_size * head.element_size())
    states = None
    if optimizer in OPTIMIZER_STATES:
        count, bits = OPTIMIZER_STATES[optimizer]
        states = count * (sum(trained.values()) if bits is None else sum(numbers.values()) * bits // 8) // shards
    return Expected(
        sum(weights.values()) // shards, sum(trained.values()) // shards, states, int(fixed + kept * tokens),
        loss_memory(scored, len(head), head.shape[1], head.requires_grad, head.device.type != "cpu"),
    )  # fmt: skip


def kept_with_checkpointing(layer: float, layers: int, state: float) -> float:
    """Bytes a token: each layer's input, and while a layer is run again all that it keeps."""
    return layer + layers * state


def loss_memory(scored: int, vocabulary: int, width: int, trains_head: bool, on_gpu: bool) -> int:
    """Bytes of a call of the loss: tiles, dX and, of a head that trains, dW."""
    tiles = min(8 * scored * vocabulary, tile_budget(vocabulary, width, on_gpu))
    return tiles + 4 * (scored * width + vocabulary * width * trains_head)


def kept_of_forward(model: nn.Module, packed: bool = False) -> tuple[float, float]:
    """Bytes that autograd keeps of a forward whatever its length, and for each token, parameters aside.

    From a row of two lengths; ``packed``, one that holds a pair whose prompt is as long as each of its completions.
    The former are copies of weights, which autocast has cast.
    """
    own = {local(p).untyped_storage().data_ptr() for p in model.parameters()}

    def kept(length: int) -> tuple[int, int]:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided:  # an adapter's sparse weights, which do not grow with tokens
                return tensor
            storage = local(tensor).untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        device = causal_lm(model).device
        ids = torch.ones(1 + packed, length, dtype=torch.int64, device=device)
        mask: Any = torch.ones_like(ids)
        if packed:
            labels = ids.index_fill(1, torch.arange(length // 2, device=device), IGNORE)
            mask = to(pack(ids, mask, labels), device)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = head_inputs(model, ids, mask).hidden
        del hidden
        return sum(found.values()), mask.segments.tokens if packed else length

    longest = 128
    if places := getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None):
        longest = min(longest, places)
    with evaluating(model):
        (long, tokens), (short, fewer) = kept(longest), kept(longest // 2)
    token = (long - short) / (tokens - fewer)
    return max(long - tokens * token, 0.0), token
