"""Weights that FSDP2 or DeepSpeed's ZeRO-3 has split over ranks, whole where the loss or a check needs them; and slices
of the vocabulary, which tensor parallelism has made and the loss takes as they are.

The former two gather a module's weights around that module's own forward, and the loss runs no head's. What is held on
to in DeepSpeed, all of it here: what a split parameter has (``ds_id``, ``ds_shape``, ``ds_tensor``, ``all_gather``,
``partition``), and that a module whose hooks gather has a ``ds_id`` too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Shard

TENSOR = ("tp",)  # transformers' name of the ranks that share a model's layers


def is_split(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split weights of a model: in loading it, or when its engine was made."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def gathers_itself(model: nn.Module) -> bool:
    """Whether a model's weights are whole while its own forward runs, and not otherwise: FSDP2, ZeRO-3's engine."""
    dtensors = (p for p in model.parameters() if isinstance(p, DTensor))
    return hasattr(model, "ds_id") or any(p.device_mesh.mesh_dim_names != TENSOR for p in dtensors)


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also where this rank holds a part."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def whole_head(head: nn.Linear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) of a head, its weight (V, H) and bias (V,) whole; one gather a call.

    The gradient of what was split comes back as FSDP's and ZeRO's do: averaged over the ranks, to the parameter itself.

    Args:
        head: where its weights are another dtype than ``hidden``, autocast is on.
        hidden: (…, H), to be used in the place of what is given.
    """
    # Not head.weight, which DeepSpeed within a forward would gather, and keep to the end of backward.
    own = dict(head.named_parameters(recurse=False))
    if not is_split(head):
        weight, bias = (_full_tensor(own[name], hidden.dtype) if name in own else None for name in ("weight", "bias"))
        assert weight is not None
        return hidden, weight, bias

    def forward(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        return *inputs, *(_Alias.apply(own[name]) if name in own else None for name in ("weight", "bias"))

    with another_forward(head, forward):
        if torch.is_grad_enabled() and any(p.requires_grad for p in own.values()):
            # ZeRO gathers once more to take the gradient in, and lets go when that of hidden is through.
            return head(hidden)
        return hidden, *head()


def vocab_group(head: nn.Linear) -> ProcessGroup | None:
    """The ranks of which each holds a slice of a head's vocabulary, in their order, None where it is not split so.

    Raises:
        ValueError: the head is split otherwise by tensor parallelism.
    """
    weight: Any = dict(head.named_parameters(recurse=False))["weight"]
    if not isinstance(weight, DTensor) or weight.device_mesh.mesh_dim_names != TENSOR:
        return None
    if weight.placements != (Shard(0),):
        raise ValueError(
            f"model: tp_plan splits the head's weight as {weight.placements}, takes (Shard(dim=0),): its vocabulary"
        )
    return weight.device_mesh.get_group()


def own_slice(words: int, group: ProcessGroup) -> slice:
    """Which of a vocabulary's words are this rank's, as DTensor deals them."""
    size = -(-words // group.size())
    return slice(group.rank() * size, (group.rank() + 1) * size)


class _Alias(torch.autograd.Function):
    """A gathered parameter's data, which stay when ZeRO takes them from the parameter."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.data

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@contextlib.contextmanager
def another_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """What a call of the module, hooks and all, runs in the meantime."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _full_tensor(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter that FSDP2 has sharded, gathered in a dtype; any other as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    ranks = parameter.device_mesh.size()
    cast: Any = parameter.to(dtype)
    whole = cast.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


@contextlib.contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Lets a model run, and autograd through it, that ZeRO-3 has split in loading it and has no engine yet.

    As under the engine, a module's weights are whole while it runs: never all of them at once.
    """
    if hasattr(model, "ds_id") or not is_split(model):
        yield
        return
    own = {module: [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")] for module in model.modules()}
    split: dict[nn.Module, list[Any]] = {module: parameters for module, parameters in own.items() if parameters}

    def gather(module, args):
        split[module][0].all_gather(split[module])

    def release(module, args=None, output=None):
        split[module][0].partition(split[module])

    def pack(tensor: Tensor) -> Any:
        source: Any = tensor if tensor._base is None else tensor._base
        if not hasattr(source, "ds_id"):
            return tensor
        return source, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, *view = packed
        source.all_gather()
        whole = source.data
        source.partition()
        return whole.as_strided(*view)

    with contextlib.ExitStack() as stack:
        for module in split:
            stack.callback(release, module)
            stack.enter_context(module.register_forward_pre_hook(gather))
            stack.enter_context(module.register_forward_hook(release))
        stack.enter_context(saved_tensors_hooks(pack, unpack))
        yield


def keep_figures(accelerator: Any) -> None:
    """FSDP would round what the loss gives in fp32, β and log-probs, to its dtype when the policy's forward returns.

    To be called before the policy is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_reference(model: nn.Module, accelerator: Any) -> Any:
    """Makes a model that does not train run as DeepSpeed or FSDP2 runs the policy: in its dtype, split as it is.

    Of DeepSpeed's configuration all is left out that belongs to training.

    Returns:
        What is to be kept as long as the model runs, DeepSpeed's engine; the model itself is to be called.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils import fsdp2_prepare_model

        prepared = fsdp2_prepare_model(accelerator, model)
        prepared.set_reshard_after_forward(True)  # the head too, which accelerate keeps whole for a backward
        return prepared
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0  # there is nothing else to split
    return deepspeed.initialize(model=model, config=config)[0]
