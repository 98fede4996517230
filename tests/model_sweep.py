"""``make sweep``: the loss on a tiny random model of every causal class in transformers, right or refused.

Right means that log-probs, loss and the gradients of all weights, in training mode, are those of the same loss from the
model's own logits. Refused means a ValueError or TypeError before the run that says why. A crash or a wrong figure is
neither, and fails the sweep; so does nothing else. Classes that the one small configuration below does not build are
listed with what they miss.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from epsdpo_kernels import EpsilonDPOLoss
from epsdpo_kernels.integrations.checks import check_reference, turn_off_dropout
from epsdpo_kernels.integrations.transformers import check_head, frozen_reference, run_loss_in_forward
from epsdpo_kernels.pair import pair_beta, preference_losses

WORDS = 97
SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
    "max_position_embeddings": 64, "is_decoder": True, "output_router_logits": True, "router_aux_loss_coef": 0.1,
    # under the names of older and of odder classes
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 48,
    "ffn_dim": 48, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "encoder_layers": 2,
    "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "num_layers": 2, "num_heads": 4, "dim_head": 8, "d_inner": 48,
    "embedding_size": 32, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "word_embed_proj_dim": 32, "rotary_dim": 4,
    "kv_channels": 8, "ffn_hidden_size": 48, "hidden_dim": 48, "num_decoder_layers": 2, "num_encoder_layers": 2,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "moe_k": 2,
    "first_k_dense_replace": 1, "num_experts_per_token": 2, "moe_topk": 2, "n_shared_experts": 1,
    # low-rank attention
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # state spaces
    "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_d_ssm": 64, "chunk_size": 8,
    "mamba_chunk_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "lru_width": 32, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "conv_kernel": 4, "expand": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_hidden_size": 32,
}  # fmt: skip
# What single families want otherwise, tried in turn until a model's own forward runs; None leaves a name out.
VARIANTS: tuple[dict[str, object], ...] = (
    {}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4}, {"num_hidden_layers": 8}, {"head_dim": None},
    {"v_head_dim": None}, {"num_experts_per_tok": 1}, {"num_heads": None}, {"num_heads": 8},
    {"num_hidden_layers": None, "num_layers": None}, {"output_router_logits": None, "num_key_value_heads": 4},
)  # fmt: skip
LARGEST = 5_000_000  # parameters: a class that reads none of these names is left out, whatever size it would be


class Outcome(NamedTuple):
    """What became of a class: right, refused, wrong, crash, or not built."""

    kind: str
    why: str = ""


def classes() -> dict[str, tuple[type, type]]:
    """(configuration, model) by the model class's name."""
    found = {}
    for config, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model in models if isinstance(models, tuple) else (models,):
            found[model.__name__] = config, model
    return dict(sorted(found.items()))


def build(config_class: type, model_class: type) -> nn.Module:
    """A model whose logits are far from flat, so that a wrong scale or softcap would not hide in rounding."""
    errors = []
    for variant in VARIANTS:
        try:
            return _build(config_class, model_class, {k: v for k, v in (SMALL | variant).items() if v is not None})
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _build(config_class: type, model_class: type, small: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    config = config_class(**small)
    if config.get_text_config() is not config:
        config = config_class(text_config=small)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} parameters")
    model = model_class(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
        batch = pairs()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return model


def pairs() -> dict[str, Tensor]:
    """Three pairs, padded on the right."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, WORDS, (6, 12), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.roll(-1, 1)
    labels[:, :3] = labels[:, -1] = -100
    for row, end in ((1, 7), (3, 9), (5, 10)):
        mask[row, end:], labels[row, end - 1 :], ids[row, end:] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask, "pair_labels": labels}


def logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Log-probs of the chosen and of the rejected completions from a model's own logits, and its router loss."""
    labels = batch["pair_labels"]
    out = model(**{name: t for name, t in batch.items() if name != "pair_labels"}, use_cache=False)
    picked = out.logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    balance = getattr(out, "aux_loss", None)
    if balance is not None:
        balance = model.config.get_text_config().router_aux_loss_coef * balance
    return list(picked.masked_fill(labels == -100, 0).sum(1).chunk(2)), torch.as_tensor(balance or 0.0)


def measure(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Outcome:
    """What becomes of a model on pairs, by default those above; with others the models are measured as well."""
    given = batch and {name: t for name, t in batch.items() if name != "pair_labels"}
    batch, reference = batch or pairs(), copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    try:
        check_head(model, batch=given)
        check_reference(model, reference, batch=given)
        turn_off_dropout(model, batch=given)
    except (ValueError, TypeError) as error:
        return Outcome("refused", str(error))
    weights = [p for p in model.parameters() if p.requires_grad]
    model.train()
    own, balance = logps(model, batch)
    with torch.no_grad():
        own += logps(reference.eval(), batch)[0]
    run_loss_in_forward(model, frozen_reference(reference), EpsilonDPOLoss())
    out = model(**batch)
    loss = preference_losses(*own, beta=pair_beta(out.step, 0.1, 0.01)).mean() + balance
    found = (out.chosen_logps, out.rejected_logps, out.ref_chosen_logps, out.ref_rejected_logps)
    checks = {
        "log-probs": (torch.cat(found), torch.cat(own).detach(), 1e-5),
        "loss": (out.loss[None].detach(), loss[None].detach(), 1e-4),
        "gradients": (*(flat(value, weights) for value in (out.loss, loss)), 2e-3),
    }
    for name, (ours, theirs, allowed) in checks.items():
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= allowed:
            return Outcome("wrong", f"{name} are off by {error:.2g}")
    return Outcome("right")


def flat(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """The gradients of all weights as one vector."""
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(weights, gradients, strict=True)]
    )


def outcome(config_class: type, model_class: type) -> Outcome:
    try:
        model = build(config_class, model_class)
    except Exception as error:
        return Outcome("not built", f"{type(error).__name__}: {error}")
    try:
        return measure(model)
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model_sweep", description=__doc__)
    parser.add_argument("names", nargs="*", help="of model classes; by default all")
    chosen = parser.parse_args(arguments).names
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    found = {}
    for name, (config_class, model_class) in classes().items():
        if chosen and name not in chosen:
            continue
        found[name] = outcome(config_class, model_class)
        kind, why = found[name]
        print(f"{kind:9s} {name}  {' '.join(why.split())[:300]}", flush=True)
    counts = Counter(one.kind for one in found.values())
    print(f"transformers {transformers.__version__}: {dict(counts)}")
    return 1 if counts["wrong"] or counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
