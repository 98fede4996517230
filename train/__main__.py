"""``python -m train``: reads pairs, builds policy and reference, trains, and leaves a folder that can be audited."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import math
import sys
from pathlib import Path

import datasets
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from transformers.utils.peft_utils import find_adapter_config_file

from epsdpo_kernels.integrations.batches import check_fits, check_rows_alone
from epsdpo_kernels.integrations.checkpoints import (
    adapter_settings,
    check_output,
    check_settings,
    checkpoint_of,
    checkpoint_step,
    frozen_weights,
    last_checkpoint,
    run_settings,
)
from epsdpo_kernels.integrations.checks import NotFiniteError, check_dtypes, check_vocabulary
from epsdpo_kernels.integrations.recording import RecordElsewhere
from epsdpo_kernels.integrations.sequence import sequence_ranks, tensor_ranks
from epsdpo_kernels.integrations.transformers import Reference, check_head
from epsdpo_kernels.record import Record, parts, set_aside

from . import cache, data
from .cache import CachedReference, FirstStep
from .methods import make_loss
from .models import add_lora, load_model, make_policy, make_reference
from .options import PairOptions, TrainingArguments, parse, veto_bounds
from .trainer import LOSS_STATE, EvaluateWithStep, PairTrainer, evaluated

# Options that a run may change when it goes on from a checkpoint; data count by their pairs.
FREE = (
    "cache_reference", "dataset", "dataset_split", "eval_dataset", "eval_fraction", "eval_split", "label_column",
    "max_tokens_per_batch", "packed",
)  # fmt: skip


def load_data(options: PairOptions, tokenizer, seed: int):
    """(train, held out or None, reports) by the options; prints what was dropped and truncated."""

    def load(argument: str, source: str, split: str):
        try:
            pairs, report = data.load_pairs(
                source, tokenizer, split=split, max_length=options.max_length,
                max_prompt_length=options.max_prompt_length, prerendered=options.prerendered,
            )  # fmt: skip
        except (ValueError, FileNotFoundError) as error:
            if not str(error).startswith("source:"):
                raise
            raise type(error)(str(error).replace("source", argument, 1)) from error
        label, carried = options.label_column, report.columns["carried"]
        if label is not None and label not in carried:
            there = ", ".join(f"{name!r:.64}" for name in carried) or "none"
            raise ValueError(
                f"label_column: got {label!r}, takes a column of short strings, integers or booleans, of which "
                f"{argument} ({source}) has: {there}"
            )
        return pairs, report

    pairs, report = load("dataset", options.dataset, options.dataset_split)
    reports = {"train": report}
    held_out = None
    if options.eval_dataset:
        held_out, reports["eval"] = load("eval_dataset", options.eval_dataset, options.eval_split)
    elif options.eval_fraction:
        if math.ceil(options.eval_fraction * len(pairs)) == len(pairs):
            raise ValueError(
                f"eval_fraction: got {options.eval_fraction} of {len(pairs)} pairs, takes a share that leaves at least "
                "one to train on"
            )
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
            check_head(reference, args.autocast_dtype, argument="ref_model")
            check_dtypes(model, reference)
            for name, one in (("dataset", pairs), ("eval_dataset", held_out)):
                if one is not None:
                    check_fits(one, reference, name)
                    check_rows_alone(one, reference, name, "cache_reference")
            cache.write(
                folder, reference.to(args.device), everything,
                batch_size=args.per_device_eval_batch_size, progress_bar=not args.disable_tqdm,
                autocast=args.autocast_dtype,
            )  # fmt: skip
    cached = CachedReference(folder, everything, args.device)
    check_vocabulary(model, len(cached.weight))
    return cached


def build(options: PairOptions, args: TrainingArguments, resume: Path | None = None) -> PairTrainer:
    """Everything of a run, ready to train; ``resume`` is the checkpoint that it will go on from."""
    if args.fsdp and options.method == "tr-dpo":
        raise ValueError("fsdp: tr-dpo mixes whole weights into its reference, takes a policy that is not sharded")
    check_output(args.output_dir, model=options.model, ref_model=options.ref_model)
    refuse_under_deepspeed(options, args)
    refuse_under_tensor_parallelism(options, args)
    if options.cache_reference and options.method == "tr-dpo":
        raise ValueError("cache_reference: tr-dpo's reference follows the policy, takes no cache")
    if args.do_eval and not (options.eval_dataset or options.eval_fraction):
        raise ValueError("do_eval, eval_strategy: got an evaluation to make, takes eval_dataset or eval_fraction too")
    transformers.set_seed(args.seed)
    model, tokenizer = make_policy(options, args, new=resume is None)
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    # The others find what the first has tokenised in the cache.
    with args.main_process_first(desc="the data"):
        pairs, held_out, reports = load_data(options, tokenizer, args.seed)
    cached = None
    if options.cache_reference:
        cached = cached_reference(options.cache_reference, options, args, model, pairs, held_out)
    base = model
    if options.lora_r:
        # A reference that moves is a whole model, without what comes into the policy's layers.
        base = copy.deepcopy(model) if options.method == "tr-dpo" else model
        model = add_lora(model, options)
        check_head(model, args.autocast_dtype)
    ref_model = moving = None
    reference: Reference
    if cached:
        reference = cached
        cached.policy = None if options.ref_model else model
    else:
        reference, ref_model, moving = make_reference(options, args, model, base)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    loss_fn = make_loss(
        options.method, beta=options.beta, epsilon=options.epsilon, beta_update=options.beta_update,
        label_smoothing=options.label_smoothing, veto=veto_bounds(options.veto),
        beta_dpo={"alpha": options.beta_dpo_alpha, "keep": options.beta_dpo_keep},
        lsc_dpo={"z_star": options.lsc_z_star, "eta": options.lsc_eta, "tau_start": options.lsc_tau_start},
    )  # fmt: skip
    own = {name: value for name, value in vars(options).items() if name not in FREE}
    own["frozen_weights"] = frozen_weights(*(one for one in (model, ref_model) if one is not None))
    settings = run_settings(
        args, {"dataset": pairs, "eval_dataset": held_out}, "pair_id", **own, **adapter_settings(model)
    )
    if resume:
        check_settings(resume / LOSS_STATE, settings, loss_fn.state_dict())
    done = checkpoint_step(resume) if resume else None
    # What began at the start was evaluated there.
    args.eval_on_start = args.eval_on_start and not resume
    row_ranks = sequence_ranks(args) * tensor_ranks(args)
    rank, copy_of_it = divmod(args.process_index, row_ranks)
    open_record = RecordElsewhere if copy_of_it else functools.partial(
        Record, args.output_dir, loss_fn, options=dataclasses.asdict(options), pairs={"train": pairs, "eval": held_out},
        facts={
            "transformers": transformers.__version__, "training_arguments": args.to_sanitized_dict(), "data": reports,
            "ranks": args.world_size // row_ranks,
        },
        label=options.label_column, rank=rank, resume_step=done,
    )  # fmt: skip
    trainer = PairTrainer(
        model, args, reference=reference, loss_fn=loss_fn, moving_reference=moving, ref_model=ref_model,
        open_record=open_record,
        packed=options.packed, max_tokens=options.max_tokens_per_batch, settings=settings,
        train_dataset=pairs, eval_dataset=held_out,
        data_collator=data.Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        processing_class=tokenizer,
    )  # fmt: skip
    if cached:
        trainer.add_callback(FirstStep(cached))
    return trainer


def refuse_under_tensor_parallelism(options: PairOptions, args: TrainingArguments) -> None:
    if tensor_ranks(args) == 1:
        return
    if options.method == "tr-dpo":
        raise ValueError("parallelism_config: tr-dpo mixes whole weights into its reference, takes no tp_size")
    if options.cache_reference:
        raise ValueError("cache_reference: got tp_size, takes none: one rank writes the cache, with a whole model")
    if options.lora_r or find_adapter_config_file(options.model):
        raise ValueError(
            "lora_r, model: got an adapter with tp_size, takes none: PEFT's layers fail in training where transformers "
            "has split the model's"
        )


def refuse_under_deepspeed(options: PairOptions, args: TrainingArguments) -> None:
    if args.deepspeed_plugin is None:
        return
    if options.method == "tr-dpo":
        raise ValueError("deepspeed: tr-dpo mixes whole weights into its reference, takes a policy of torch's own")
    if options.cache_reference and (args.deepspeed_plugin.zero_stage == 3 or args.autocast_dtype):
        raise ValueError(
            "cache_reference: got DeepSpeed with ZeRO-3 or in 16 bits, takes ZeRO-1 and ZeRO-2 in float32: one rank "
            "writes the cache, under autocast, and the check would read how a policy that DeepSpeed casts rounds"
        )


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """Where to go on from; None to begin, with the record of an attempt that left no checkpoint set aside.

    Raises:
        ValueError: the folder holds a run and no word was given on resuming it, or what is to be resumed is no
            checkpoint, or another run's.
    """
    asked, run = args.resume_from_checkpoint, Path(args.output_dir)
    last, record = last_checkpoint(run), parts(run / "record")
    complete = last is None and (run / "trainer_state.json").exists()
    if asked in (None, False, "false", "False"):
        if last or record:
            how = f"up to {last.name}" if last else "complete" if complete else "which left no checkpoint"
            anew = "go on with it" if last else "begin it anew, with its record set aside"
            raise ValueError(
                f"output_dir: {run} already holds a run ({how}); give another folder"
                + ("" if complete else f", or --resume_from_checkpoint last to {anew}")
            )
        return None
    word = asked in ("last", True, "true", "True")
    checkpoint = checkpoint_of(None if word else asked, run)
    if not word and (last or record) and Path(asked).resolve().parent != run.resolve():
        raise ValueError(
            f"resume_from_checkpoint: got {asked} of another run than output_dir, {run}, whose record it would "
            "cut; give another output_dir"
        )
    if checkpoint:
        return checkpoint
    if complete:
        raise ValueError(
            f"resume_from_checkpoint: got {asked}, but the run in {run} is complete and left no checkpoint; give "
            "another output_dir"
        )
    begin_anew(args)
    return None


def begin_anew(args: TrainingArguments) -> None:
    """Sets the record of an attempt aside, if there is one, and says that the run begins anew."""
    with args.main_process_first(local=args.save_on_each_node, desc="setting a record aside"):
        if not args.should_save:
            return
        aside = set_aside(args.output_dir)
        there = f"; what was on record is in {aside}" if aside else ""
        print(
            f"resume_from_checkpoint: {args.output_dir} has no complete checkpoint, the run begins anew{there}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> PairTrainer:
    options, args = parse(arguments)
    checkpoint = checkpoint_to_resume(args)
    trainer = build(options, args, checkpoint)
    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluateWithStep())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is not None and not evaluated(trainer.state):
        trainer.evaluate()  # no step was left of a run that had no held-out pairs
    trainer.record.close()
    trainer.save_model()
    trainer.save_state()
    return trainer


def leave_process_group() -> None:
    """Ends this process's part in its groups, if there are any, once all that holds them (DDP's reducer) is gone."""
    if torch.distributed.is_initialized():
        AcceleratorState().device_mesh = None
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
        leave_process_group()
    except (ValueError, TypeError, OSError, ImportError, NotFiniteError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; --resume_from_checkpoint last goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
