"""What a run expects to need of memory, before its first step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..plan import tile_budget
from .sharding import local
from .transformers import causal_lm, head_inputs, lm_head

# Numbers of a parameter's dtype that an optimizer keeps for each of them; others are not foreseen.
OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "adafactor": 0}
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
        return f"memory: about {total / GIB:.2f} GiB are needed ({', '.join(parts)})"


def expected_memory(
    policy: nn.Module,
    reference: nn.Module | None,
    *,
    tokens: int,
    scored: int,
    optimizer: str,
    shards: int = 1,
) -> Expected:
    """Of one rank, at the end of the forward of its longest micro-batch.

    Activations are measured, on short rows, by what autograd keeps; they grow with tokens as long as the attention is a
    fused one. What allocators keep beside is not in it.

    Args:
        policy: a causal language model, within PEFT or not, not wrapped.
        reference: a second model, or None where the policy is its own.
        tokens: of the longest micro-batch, padding included.
        scored: of them, how many the loss reads.
        optimizer: transformers' name of it.
        shards: ranks that share weights, gradients and the optimizer's states.
    """
    weights, trained = {}, {}
    for p in (p for model in (policy, reference) if model is not None for p in model.parameters()):
        own = local(p)
        weights[own.data_ptr()] = own.numel() * own.element_size()
        if p.requires_grad:
            trained[own.data_ptr()] = own.numel() * own.element_size()
    model = causal_lm(policy)
    head, config = local(lm_head(model).weight), model.config.get_text_config()
    kept = kept_by_token(policy)
    if getattr(model, "is_gradient_checkpointing", False):
        layers = config.num_hidden_layers
        kept = kept_with_checkpointing(kept / layers, layers, config.hidden_size * head.element_size())
    states = OPTIMIZER_STATES.get(optimizer)
    return Expected(
        sum(weights.values()) // shards, sum(trained.values()) // shards,
        None if states is None else states * sum(trained.values()) // shards, int(kept * tokens),
        loss_memory(scored, len(head), head.shape[1], head.requires_grad, head.device.type != "cpu"),
    )  # fmt: skip


def kept_with_checkpointing(layer: float, layers: int, state: float) -> float:
    """Bytes a token: each layer's input, and while a layer is run again all that it keeps."""
    return layer + layers * state


def loss_memory(scored: int, vocabulary: int, width: int, trains_head: bool, on_gpu: bool) -> int:
    """Bytes of a call of the loss: tiles, dX and, of a head that trains, dW."""
    tiles = min(8 * scored * vocabulary, tile_budget(vocabulary, width, on_gpu))
    return tiles + 4 * (scored * width + vocabulary * width * trains_head)


def kept_by_token(model: nn.Module) -> float:
    """Bytes that autograd keeps of a forward for each token, parameters aside: the slope between two lengths."""
    own = {local(p).untyped_storage().data_ptr() for p in model.parameters()}

    def kept(length: int) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.layout is not torch.strided:  # an adapter's sparse weights, which do not grow with tokens
                return tensor
            storage = local(tensor).untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.ones(1, length, dtype=torch.int64, device=causal_lm(model).device)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = head_inputs(model, ids, torch.ones_like(ids)).hidden
        del hidden
        return sum(found.values())

    training, longest = model.training, 128
    if places := getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None):
        longest = min(longest, places)
    model.eval()
    try:
        return (kept(longest) - kept(longest // 2)) / (longest - longest // 2)
    finally:
        model.train(training)
