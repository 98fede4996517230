"""Heads of real model classes, small and random: what the loss is given is what the model's own forward computes."""

import copy
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")

import model_sweep  # noqa: E402
from epsdpo_kernels import EpsilonDPOLoss, linear_epsilon_dpo  # noqa: E402
from epsdpo_kernels.integrations.checks import check_reference  # noqa: E402
from epsdpo_kernels.integrations.transformers import (  # noqa: E402
    check_head,
    frozen_reference,
    head_inputs,
    run_loss_in_forward,
)
from epsdpo_kernels.pair import pair_beta, preference_losses  # noqa: E402

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "Llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "Llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "Qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "Qwen3 tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", {"sliding_window": 4}),
    # With transformers 5.17's default attention Gemma-2 leaves out the softcap of its scores.
    "Gemma2": ("Gemma2Config", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
                                "attn_implementation": "eager"}),
    "Gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "Cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "Granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "Phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "FalconH1": ("FalconH1Config", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 8,
                                    "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                     "output_router_logits": True, "router_aux_loss_coef": 0.1}),
}  # fmt: skip


def build(name: str, dtype=torch.float32, more=None):
    config_class, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SMALL | own | (more or {})))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            # Initial heads are so flat that a wrong scale or softcap would hide in rounding.
            p.add_(torch.randn_like(p) * 0.2 if p.dim() == 2 else torch.randn_like(p) * 0.05)
    return model.to(dtype).eval()


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 97, (4, 10), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.roll(-1, 1)
    labels[:, :3] = labels[:, -1] = -100
    for row, end in ((1, 7), (2, 8)):
        mask[row, end:], labels[row, end - 1 :], ids[row, end:] = 0, -100, 0
    return ids, mask, labels


@pytest.mark.parametrize("name", MODELS)
def test_loss_follows_from_the_models_own_logits(name):
    policy = build(name)
    reference = build(name)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    check_head(policy)
    if name.endswith(" tied"):
        assert policy.lm_head.weight is policy.model.embed_tokens.weight
    ids, mask, labels = batch()
    ours, ref = head_inputs(policy, ids, mask), head_inputs(reference, ids, mask)
    out = linear_epsilon_dpo(
        ours.hidden, ours.weight, labels, ref.hidden, ref.weight, bias=ours.bias, ref_bias=ref.bias,
        logit_scale=ours.logit_scale, softcap=ours.softcap,
    )  # fmt: skip
    own = policy(input_ids=ids, attention_mask=mask)
    theirs = []
    for logits in (own.logits, reference(input_ids=ids, attention_mask=mask).logits.detach()):
        logps = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        theirs += logps.masked_fill(labels == -100, 0).sum(1).chunk(2)
    torch.testing.assert_close(out.chosen_logps, theirs[0].detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.ref_rejected_logps, theirs[3], rtol=1e-5, atol=1e-4)
    loss = preference_losses(*theirs, beta=pair_beta(out.step, 0.1, 0.01)).mean()
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    weights = [p for n, p in policy.named_parameters() if p.requires_grad]
    got = torch.autograd.grad(out.loss, weights, allow_unused=True)
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=2e-3, atol=1e-5)
    if "router_aux_loss_coef" in MODELS[name][1]:
        coefficient = MODELS[name][1]["router_aux_loss_coef"]
        torch.testing.assert_close(ours.router_loss, coefficient * own.aux_loss)
        assert ours.router_loss > 0
    else:
        assert ours.router_loss is None


def test_the_table_names_them_all():
    """docs/models.md: a row a configuration, with what its head has and how that is read."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    rows = {row[0]: row for row in rows if row[0] in MODELS}
    assert list(rows) == list(MODELS)
    for name, (_, tied, scale, softcap, bias, router) in rows.items():
        model = build(name)
        embeddings = model.get_input_embeddings().weight
        assert (tied == "yes") == (model.get_output_embeddings().weight is embeddings), name
        found = head_inputs(model, *batch()[:2])
        assert (bias == "yes") == (found.bias is not None), name
        assert (scale != "–") == (found.logit_scale != 1), name
        assert (softcap != "–") == (found.softcap is not None), name
        assert (router == "yes") == (found.router_loss is not None), name


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights(name):
    model = build(name, torch.bfloat16)
    check_head(model)
    ids, mask, _ = batch()
    ours, own = head_inputs(model, ids, mask), model(input_ids=ids, attention_mask=mask).logits
    assert ours.hidden.dtype == ours.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ours.logits()[mask.bool()], own[mask.bool()], rtol=2e-2, atol=6e-2)


def test_a_head_of_its_own_is_refused():
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match="do not follow from its hidden states"):
        check_head(Doubled(config))


def test_a_head_that_is_no_linear_layer_is_refused():
    model = build("Llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="takes a plain torch.nn.Linear"):
        check_head(model)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="model: got Linear, takes a transformers PreTrainedModel"):
        check_head(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name, kind, why",
    [
        ("Llama4ForCausalLM", "right", ""),
        ("RecurrentGemmaForCausalLM", "right", ""),
        ("InklingForCausalLM", "right", ""),
        ("FalconForCausalLM", "right", ""),
        ("GptOssForCausalLM", "right", ""),
        ("ElectraForCausalLM", "refused", "do not follow from its hidden states"),
        ("BertLMHeadModel", "refused", "do not follow from its hidden states"),
    ],
)
def test_the_sweep(name, kind, why):
    """A few of what `make sweep` goes over: log-probs, loss and gradients of the model's own logits, or a reason."""
    found = model_sweep.outcome(*model_sweep.classes()[name])
    assert found.kind == kind and why in found.why


def test_the_sweep_tells_right_from_wrong(monkeypatch):
    """What the sweep would say if nothing was measured before: a wrong figure, and a crash."""
    monkeypatch.setattr(model_sweep, "check_head", lambda model, **_: None)
    monkeypatch.setattr(model_sweep, "check_reference", lambda *models, **_: None)
    for name, kind in (("BertLMHeadModel", "wrong"), ("RemBertForCausalLM", "crash")):
        assert model_sweep.outcome(*model_sweep.classes()[name]).kind == kind


def test_a_mixture_of_experts_that_keeps_its_counts_elsewhere():
    """In a composed model they are in the configuration of its text part."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = SMALL | MODELS["Qwen3-MoE"][1] | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=5, video_token_id=6)
    ).eval()
    ids, mask, _ = batch()
    ids = ids.clamp_min(10)
    own, ours = model(input_ids=ids, attention_mask=mask), head_inputs(model, ids, mask)
    if own.aux_loss is None:  # as in transformers 5.17, which looks for the switch among the arguments alone
        with pytest.raises(ValueError, match="router loss of Qwen3VLMoeForConditionalGeneration is None by its own"):
            check_head(model)
        return
    check_head(model)
    torch.testing.assert_close(ours.logits(), own.logits)
    torch.testing.assert_close(ours.router_loss, 0.1 * own.aux_loss)


def test_what_a_measurement_raises_is_a_refusal():
    class Failing(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise StopIteration

    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match="model: the head of Failing cannot be measured.* fails with StopIteration"):
        check_head(Failing(config))
    with pytest.raises(ValueError, match="ref_model: the head of Failing cannot be measured"):
        check_reference(build("Llama"), Failing(config))


def test_a_softcap_that_nobody_reads_is_noticed_near_zero():
    """Fresh heads give logits so small that tanh changes none of them."""

    class Capped(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            return out

    torch.manual_seed(0)
    model = Capped(transformers.LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    ids, mask, _ = batch()
    torch.testing.assert_close(head_inputs(model, ids, mask).logits(), model(input_ids=ids, attention_mask=mask).logits)
    with pytest.raises(ValueError, match="do not follow from its hidden states"):
        check_head(model)


@pytest.mark.parametrize("where", ["activations", "a weight"])
def test_not_finite_is_said_as_such(where):
    model = build("Llama").half()
    with torch.no_grad():
        if where == "activations":
            model.model.norm.weight.mul_(5e4)
        else:
            model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    why = (
        "take bfloat16 or float32"
        if where == "activations"
        else "its weights are not, model.layers.1.mlp.up_proj.weight"
    )
    with pytest.raises(ValueError, match=f"the logits of LlamaForCausalLM are not finite in torch.float16: {why}"):
        check_head(model)


@pytest.mark.parametrize(
    "policy, reference",
    [
        (("Gemma2", {"final_logit_softcapping": 3.0}), ("Gemma2", {"final_logit_softcapping": None})),
        (("Gemma2", {"final_logit_softcapping": None}), ("Gemma2", {"final_logit_softcapping": 3.0})),
        (("Cohere", {"logit_scale": 0.25}), ("Cohere", {"logit_scale": 1.0})),
        (("Cohere", {"logit_scale": 1.0}), ("Cohere", {"logit_scale": 0.25})),
    ],
)
def test_a_reference_with_transforms_of_its_own(policy, reference):
    """None of a configuration is none, not the other model's."""
    models = [build(name, more=more) for name, more in (policy, reference)]
    ids, mask, labels = batch()
    run_loss_in_forward(models[0], frozen_reference(models[1]), EpsilonDPOLoss())
    out = models[0](input_ids=ids, attention_mask=mask, pair_labels=labels)
    logits = models[1](input_ids=ids, attention_mask=mask).logits
    logps = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    expected = logps.masked_fill(labels == -100, 0).sum(1)
    torch.testing.assert_close(
        torch.cat((out.ref_chosen_logps, out.ref_rejected_logps)), expected, rtol=1e-4, atol=1e-3
    )


MIXED = {
    "norms in fp32": lambda name: "norm" in name,
    "head in fp32": lambda name: name == "lm_head",
    "all but linear layers in fp32": lambda name: not name.endswith("proj"),
    "head in bf16": lambda name: name and name != "lm_head",
}


@pytest.mark.parametrize("mixed", MIXED)
def test_mixed_dtypes_under_autocast(mixed):
    """Weights of two dtypes, as scripts for quantized training leave them: autocast computes the same from all."""
    model = build("Llama").bfloat16()
    plain = copy.deepcopy(model).float()
    for name, module in model.named_modules():
        if not list(module.children()) and MIXED[mixed](name):
            module.float()
    check_head(model, torch.bfloat16)
    ids, mask, labels = batch()
    losses = []
    for one in (model, plain):
        reference = copy.deepcopy(one)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
        run_loss_in_forward(one, frozen_reference(reference), EpsilonDPOLoss())
        with torch.autocast("cpu", torch.bfloat16):
            out = one(input_ids=ids, attention_mask=mask, pair_labels=labels)
        out.loss.backward()
        losses.append(out)
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(losses[0].chosen_logps, losses[1].chosen_logps, rtol=2e-2, atol=2e-1)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < 0.1


def test_mixed_dtypes_without_autocast_are_refused():
    model = build("Llama").bfloat16()
    model.lm_head.float()
    with pytest.raises(ValueError, match="Its weights are bfloat16 and float32: that takes autocast, bf16=True"):
        check_head(model)
