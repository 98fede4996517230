"""What trl.py holds on to in TRL and transformers: a version that lacks any of it is refused by its name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import trl
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

METHODS = {  # and the arguments that they are called with or overridden for
    "__init__": ("model", "ref_model", "args", "peft_config"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_accelerator_and_postprocess": (),
    "get_total_train_batch_size": ("args",),
    "floating_point_ops": ("inputs",),
    "training_step": (),
    "prediction_step": ("model", "inputs", "prediction_loss_only"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "evaluation_loop": ("dataloader", "metric_key_prefix"),
    "log": ("logs", "start_time"),
    "_get_dataloader": ("dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"),
    "_get_train_sampler": ("train_dataset",),
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_set_signature_columns_if_needed": (),
    "_save_checkpoint": ("model", "trial"),
    "_track_num_input_tokens": ("inputs",),
    "_get_grad_norm": ("model", "grad_norm"),  # once before every optimizer step
    "_init_training_state": ("resume_from_checkpoint",),
    "_finalize_training": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_best_model": (),
    "_maybe_log_save_evaluate": (),
    "_get_output_dir": ("trial",),
}
ATTRIBUTES = (
    "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "_metrics", "_total_train_tokens", "_is_vision_dataset",
)  # fmt: skip
OPTIONS = (
    "beta", "label_smoothing", "max_length", "disable_dropout", "sync_ref_model", "precompute_ref_log_probs",
    "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "use_weighting",
)  # fmt: skip


def missing_seams() -> Iterator[str]:
    """Names of what this TRL lacks, or has in another form."""
    for name, arguments in METHODS.items():
        method = getattr(DPOTrainer, name, None)
        if method is None:
            yield f"DPOTrainer.{name}"
            continue
        has = inspect.signature(method).parameters
        yield from (f"DPOTrainer.{name}({argument})" for argument in arguments if argument not in has)
    code = DPOTrainer.__init__.__code__
    yield from (f"DPOTrainer().{name}" for name in ATTRIBUTES if name not in code.co_names)
    if "ref" not in code.co_consts:
        yield "'ref', the name of the copy of a pre-trained adapter"
    options = {field.name for field in dataclasses.fields(DPOConfig)}
    yield from (f"DPOConfig.{name}" for name in OPTIONS if name not in options)
    # Chosen rows first, then rejected ones, padded to the right.
    expected = {
        "input_ids": [[1, 2], [1, 3]], "attention_mask": [[1, 1], [1, 1]], "completion_mask": [[0, 1], [0, 1]],
    }  # fmt: skip
    try:
        collate = dpo_trainer.DataCollatorForPreference(pad_token_id=0)
        batch = collate([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
        found = {name: tensor.tolist() for name, tensor in batch.items()}
    except (AttributeError, KeyError, TypeError):
        found = {}
    yield from (f"{name} of DataCollatorForPreference" for name in expected if found.get(name) != expected[name])


def check_trl() -> None:
    """Raises ImportError where TRL lacks something that :class:`EpsilonDPOTrainer` needs of it, and names it."""
    if missing := list(missing_seams()):
        raise ImportError(
            f"trl: got {trl.__version__}, which lacks {', '.join(missing)}; EpsilonDPOTrainer needs it. It is "
            "tested with 1.16: pip install 'trl==1.16.*'"
        )
