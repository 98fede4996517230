"""What both trainers see to before a run, on each of them: dropout, the reference, adapters, whole checkpoints."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from epsdpo_kernels.integrations.checks import check_launch, check_reference, turn_off_dropout  # noqa: E402
from epsdpo_kernels.integrations.transformers import (  # noqa: E402
    as_reference,
    check_head,
    copy_adapter,
    head_inputs,
    lm_head,
)
from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import build, main  # noqa: E402
from train.models import load_model  # noqa: E402
from train.options import parse  # noqa: E402

WORDS = 23
SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | more)))


def electra():
    """A model whose head has layers of its own."""
    torch.manual_seed(0)
    config = transformers.ElectraConfig(
        vocab_size=WORDS, embedding_size=32, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, is_decoder=True
    )
    return transformers.ElectraForCausalLM(config)


def states(model, training):
    model.train(training)
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        return head_inputs(model, ids, torch.ones_like(ids)).hidden


def logps(model, batch):
    """(2B,) log-probs of the scored tokens from a model's own logits."""
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    picked = logits.double().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0).sum(1)


# Each kind of randomness: as a module, of a function's argument, of a configuration that the forward reads, of whole
# layers, of a router's inputs, of an adapter.
NOISY = {
    "layers": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64)),
    "attention": lambda: llama(attention_dropout=0.3),
    "read from the configuration": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS, hidden_dropout=0.3)),
    "layerdrop": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS,
        word_embed_proj_dim=32, dropout=0.0, layerdrop=0.5, max_position_embeddings=64)),
    "a router's inputs": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SMALL, num_local_experts=4, router_jitter_noise=0.2)),
    "an adapter's": lambda: adapted(llama(), lora_dropout=0.3, init_lora_weights=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_dropout_is_turned_off(kind):
    model = NOISY[kind]()
    before = states(model, training=False)
    torch.manual_seed(1)
    assert any(not torch.allclose(states(model, training=True), before) for _ in range(8))
    rng = torch.get_rng_state()
    turn_off_dropout(model)
    assert torch.equal(torch.get_rng_state(), rng)
    for training in (False, True, True, True, True):
        torch.testing.assert_close(states(model, training), before)
    # What a checkpoint's configuration says changes only where the forward reads it.
    config = model.config.to_dict()
    assert config.get("attn_pdrop", 0.1) == 0.1 and config.get("attention_dropout") in (None, 0.0, 0.3)


TARGETS = LORA["target_modules"]
NOISY_ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**LORA, lora_dropout=0.5),
    "dora": lambda: peft.LoraConfig(**LORA, lora_dropout=0.5, use_dora=True),
    "loha, ranks": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, rank_dropout=0.5),
    "loha, modules": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, module_dropout=0.5),
    "lokr, modules": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, module_dropout=0.5),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS, boft_dropout=0.5),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=TARGETS, vera_dropout=0.5),
}


@pytest.mark.parametrize("kind", NOISY_ADAPTERS)
def test_dropout_of_an_adapter_that_does_nothing_yet_is_turned_off(kind):
    """Its noise is seen once it has trained."""
    model = peft.get_peft_model(llama(), NOISY_ADAPTERS[kind]())
    noisy, start = copy.deepcopy(model), {name: p.clone() for name, p in model.named_parameters()}
    turn_off_dropout(model)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    for one in (model, noisy):
        perturb(one)
    expected = states(model, training=False)
    assert any(not torch.allclose(states(noisy, training=True), expected) for _ in range(8))
    for _ in range(8):
        torch.testing.assert_close(states(model, training=True), expected)


def test_an_adapter_that_samples_in_training_is_refused():
    model = peft.get_peft_model(llama(), peft.PveraConfig(r=4, target_modules=TARGETS))
    start = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="the forward of LlamaForCausalLM in training is not that of evaluation"):
        turn_off_dropout(model)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("token", [6, 22])  # the few tokens that a model is measured with have the first
def test_an_adapter_that_would_not_train_is_refused(token):
    """Activated LoRA, which acts where PEFT's own forward has found its tokens."""
    model = adapted(llama(), alora_invocation_tokens=[token])
    with pytest.raises(ValueError, match="model: got an adapter whose weights get no gradient, on 4 layers, .*q_proj"):
        check_head(model)


def test_an_adapter_that_pefts_own_forward_changes_is_refused():
    """Also where that changes nothing yet."""
    model = adapted(llama())
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    check_head(model)
    model.base_model.register_forward_pre_hook(lambda *_: [layer.scale_layer(3.0) for layer in layers] and None)
    model.base_model.register_forward_hook(lambda *_: [layer.unscale_layer(3.0) for layer in layers] and None)
    with pytest.raises(ValueError, match="the logits of LlamaForCausalLM do not follow from its hidden states"):
        check_head(model)


TRAINING = {
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[22]),
    "layers that PEFT does not wrap": lambda: peft.AdaptionPromptConfig(
        adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    "an expert that no token comes to": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "unused"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINING)
def test_adapters_that_train_are_taken_as_they_are(kind):
    model = llama()
    model.model.layers[0].unused = torch.nn.Linear(32, 32)
    model = peft.get_peft_model(model, TRAINING[kind]())
    start = {name: p.clone() for name, p in model.named_parameters()}
    check_head(model)
    turn_off_dropout(model)
    check_reference(model, None)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_forward_that_stays_random_is_refused():
    class Noisy(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if self.training:
                out.last_hidden_state = out.last_hidden_state + 0.1 * torch.randn_like(out.last_hidden_state)
            return out

    model = llama()
    model.model.__class__ = Noisy
    with pytest.raises(ValueError, match="the forward of LlamaForCausalLM in training is not that of evaluation"):
        turn_off_dropout(model)


def test_a_forward_that_becomes_another_is_refused():
    """Where what is called noise has a part in evaluation too, the policy would no longer be its reference."""

    class Scaled(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state * (1 + self.router_jitter_noise)
            return out

    model = llama()
    model.model.__class__, model.model.router_jitter_noise = Scaled, 0.5
    with pytest.raises(ValueError, match="is not that of evaluation"):
        turn_off_dropout(model)


def adapted(model, **more):
    return peft.get_peft_model(model, peft.LoraConfig(**(LORA | more)))


def training(model, name):
    model.get_base_model().get_parameter(name).requires_grad_(True)
    return model


MOVING = {
    "all biases": (lambda: adapted(llama(attention_bias=True), bias="all"), "bias"),
    "biases of adapted layers": (lambda: adapted(llama(attention_bias=True), bias="lora_only"), "bias"),
    "a norm": (lambda: training(adapted(llama()), "model.norm.weight"), "model.norm.weight"),
    "tied embeddings": (
        lambda: training(adapted(llama(tie_word_embeddings=True)), "model.embed_tokens.weight"), "embed_tokens.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MOVING)
def test_a_reference_that_would_move_is_refused(kind):
    make, name = MOVING[kind]
    with pytest.raises(ValueError, match=f"training would move the reference, which shares .*{name}"):
        check_reference(make(), None)


STAYING = {
    "lora": lambda: adapted(llama(attention_bias=True)),
    "an embedding's copy": lambda: adapted(llama(), modules_to_save=["embed_tokens"]),
    "the head's copy": lambda: adapted(llama(), modules_to_save=["lm_head"]),
    "norms by an adapter": lambda: peft.get_peft_model(llama(), peft.LNTuningConfig(target_modules=["norm"])),
    "tied, the embedding's copy": lambda: adapted(llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"]),
    "an adapter on embeddings": lambda: adapted(llama(), target_modules=["q_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("kind", STAYING)
def test_a_reference_stays_where_it_is(kind):
    """Every weight that trains moves: the reference's logits do not, and the policy's follow its own forward."""
    model = STAYING[kind]()
    check_reference(model, None)
    before, start = (states_of(model, reference) for reference in (True, False))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    check_head(model)
    assert torch.equal(states_of(model, True), before) and not torch.equal(states_of(model, False), start)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)


def states_of(model, reference):
    ids = torch.arange(2, 22).view(2, 10)
    with as_reference(model) if reference else torch.no_grad():
        return head_inputs(model, ids, torch.ones_like(ids)).logits().detach()


def test_the_copy_of_a_head_is_read_where_it_trains():
    model = STAYING["the head's copy"]()
    inner = model.get_base_model()
    with torch.no_grad():
        lm_head(inner).weight.mul_(2)
    assert lm_head(inner).weight.requires_grad and lm_head(inner) is inner.lm_head.modules_to_save["default"]
    with as_reference(model):
        assert lm_head(inner) is inner.lm_head.original_module
        check_head(model)
    check_head(model)


def test_an_adapter_that_changes_its_base_is_refused():
    """The model without it is then not the one that training starts from."""
    start = states(llama(), training=False)
    model = adapted(llama(), init_lora_weights="pissa")
    torch.testing.assert_close(states(model, training=False), start, rtol=1e-4, atol=1e-4)
    with as_reference(model):
        assert ((states(model, training=False) - start).norm() / start.norm()).item() > 0.01
    with pytest.raises(ValueError, match="peft_config: got init_lora_weights='pissa' .adapter default., which changes"):
        check_reference(model, None)
    check_reference(model, llama())


def test_a_policy_of_which_nothing_trains_is_refused():
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM of which nothing trains"):
        check_reference(llama().requires_grad_(False), llama())


def test_a_second_model_that_shares_weights_is_refused():
    policy, reference = llama(), llama()
    check_reference(policy, reference)
    reference.model.layers[1].mlp.up_proj.weight = policy.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match="ref_model: training would move the reference, which shares model.layers.1"):
        check_reference(policy, reference)
    policy.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    check_reference(policy, reference)


def test_a_second_model_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="ref_model: got a vocabulary of 29, takes the policy's, 23"):
        check_reference(llama(), llama(vocab_size=29))


def norms(model, dtype):
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(dtype)
    return model


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4))


OTHER_DTYPES = {
    "all": (None, llama, lambda: llama().bfloat16(), "model.embed_tokens.weight and 21 more"),
    "all, under autocast": (torch.bfloat16, llama, lambda: llama().bfloat16(), "model.embed_tokens.weight and 21 more"),
    "norms": (
        torch.bfloat16, lambda: norms(llama().bfloat16(), torch.float32), lambda: llama().bfloat16(),
        "model.layers.0.input_layernorm.weight and 4 more",
    ),
    "beneath an adapter": (
        None, lambda: adapted(llama()), lambda: llama().bfloat16(), "model.embed_tokens.weight and 21 more",
    ),
    "another architecture": (None, llama, lambda: gpt2().bfloat16(), "its head"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_DTYPES)
def test_a_reference_in_another_dtype_is_refused(kind):
    """Its shifts from the same weights would be rounding, 0 beside it; autocast casts products alone."""
    autocast, policy, reference, names = OTHER_DTYPES[kind]
    message = f"ref_model: got bfloat16 for {names}, takes the policy's dtype, float32"
    with pytest.raises(ValueError, match=message):
        check_reference(policy(), reference(), autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_in_the_policys_dtype_is_taken(dtype):
    """Also where PEFT keeps an adapter in float32 over a base in 16 bits, which is its default."""
    policy = adapted(llama().to(dtype))
    assert all(p.dtype == torch.float32 for n, p in policy.named_parameters() if "lora" in n)
    check_reference(policy, llama().to(dtype))
    check_reference(policy, None)
    check_reference(llama(), llama().bfloat16(), cast=True)


ADAPTERS = {
    "linear layers": LORA | {"lora_dropout": 0.2},
    "embeddings too": LORA | {"target_modules": ["q_proj", "embed_tokens"]},
    "the head whole": LORA | {"modules_to_save": ["lm_head"]},
    "dora": LORA | {"use_dora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_copy_of_an_adapter_is_whole(kind):
    """Also where TRL's own copy leaves something out, and where "ref" is there already."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(**ADAPTERS[kind])).eval()
    base = states_of(model, False)
    for _ in range(2):
        perturb(model)
        copy_adapter(model)
        assert torch.equal(states_of(model, True), states_of(model, False))
        assert not torch.equal(states_of(model, True), base)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(".ref" in name for name in trained)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_copy_of_an_adapter_computes_in_its_dtype(kind):
    """PEFT would make it float32, also of one that was cast, as TRL casts those over 4-bit layers."""
    base = llama().bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(**ADAPTERS[kind]), autocast_adapter_dtype=False).eval()
    perturb(model)
    copy_adapter(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(states_of(model, True), states_of(model, False))


def perturb(model):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=g))


def test_an_adapter_that_cannot_have_a_copy_is_refused():
    model = adapted(llama(attention_bias=True), bias="all")
    with pytest.raises(ValueError, match="model: its adapter cannot have a copy beside it as the reference"):
        copy_adapter(model)


# Both trainers.


@pytest.fixture
def sft(tiny, tmp_path):
    """A folder with an adapter of the tiny model, and the model that it makes."""

    def make(kind="linear layers"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS[kind]))
        perturb(model)
        model.save_pretrained(tmp_path / "sft")
        return tmp_path / "sft", model.merge_and_unload()

    return make


def collated(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def by_row(run, column):
    rows = read(run / "record").to_pandas()
    return torch.tensor(rows.sort_values("row")[column].to_numpy())


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("more", [{}, {"lora_r": 4}, {"cache": True}], ids=["goes on", "lora on top", "cached"])
def test_an_sft_adapter_is_kept(tiny, tmp_path, sft, kind, more):
    """The policy starts from it, and is its own reference, whatever trains."""
    folder, merged = sft(kind)
    more = {"cache_reference": tmp_path / "cache"} if "cache" in more else more
    trainer = main(flags(tiny, tmp_path / "run", model=folder, **more))
    start = logps(merged, collated(trainer))
    run = tmp_path / "run"
    ours = torch.cat((by_row(run, "ref_chosen_logp"), by_row(run, "ref_rejected_logp")))
    torch.testing.assert_close(ours.double(), start, rtol=1e-4, atol=1e-4)
    first = read(run / "record").to_pandas().query("step == 1")
    assert len(first) == 6 and (first.margin == 0).all() and trainer.state.log_history[-2]["kl/chosen"] > 0
    # What is saved is the policy, loaded by its folder.
    torch.testing.assert_close(
        logps(load_model(str(run), "float32")[0], collated(trainer)), logps(trainer.model, collated(trainer))
    )


def test_an_sft_adapter_is_resumed(tiny, tmp_path, sft):
    folder, _ = sft()
    more = {"model": folder, "save_strategy": "steps", "save_steps": 4}
    whole = main(flags(tiny, tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("trainer_state.json", "checkpoint-8"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cut = main([*flags(tiny, tmp_path / "cut", **more), "--resume_from_checkpoint=last"])
    assert read(tmp_path / "cut" / "record").equals(read(tmp_path / "whole" / "record"))
    for p, q in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def mixture(folder, tiny):
    """A folder with a mixture of experts, whose checkpoints have each expert's weights under names of their own."""
    config = transformers.MixtralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_mixture_of_experts_is_resumed(tiny, tmp_path):
    more = {"model": mixture(tmp_path / "moe", tiny), "save_strategy": "steps", "save_steps": 4, "packed": False}
    whole = main(flags(tiny, tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    cut = main([*flags(tiny, tmp_path / "cut", **more), "--resume_from_checkpoint=last"])
    assert read(tmp_path / "cut" / "record").equals(read(tmp_path / "whole" / "record"))
    for p, q in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_cache_knows_an_adapters_scale(tiny, tmp_path, sft):
    """Which is in no weight: with the same weights, another alpha is another reference."""
    folder, _ = sft()
    more = {"cache_reference": tmp_path / "cache", "model": folder}
    main(flags(tiny, tmp_path / "run", **more))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(ValueError, match=r"These differ: model \([0-9a-f]{32}; here [0-9a-f]{32}\)"):
        main(flags(tiny, tmp_path / "again", **more))


def test_an_sft_adapter_under_a_moving_reference(tiny, tmp_path, sft):
    folder, merged = sft()
    with pytest.raises(ValueError, match="method: tr-dpo mixes whole weights"):
        main(flags(tiny, tmp_path / "run", model=folder, method="tr-dpo"))
    main(flags(tiny, tmp_path / "run", model=folder, method="tr-dpo", lora_r=4, max_steps=1))


def test_an_adapter_that_names_no_base_or_another_is_refused(tiny, tmp_path, sft):
    folder, _ = sft()
    llama(hidden_size=16).save_pretrained(tmp_path / "other")
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(str(tiny), str(tmp_path / "other")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    with pytest.raises(ValueError, match="model: the adapter in .*sft does not fit its base, .*other"):
        load_model(str(folder), "float32")
    config.write_text(text.replace(f'"{tiny}"', "null"))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_model(str(folder), "float32")


@pytest.mark.parametrize("more", [{}, {"lora_r": 4}, {"cache": True}])
def test_a_given_reference_may_have_an_adapter(tiny, tmp_path, sft, more):
    folder, merged = sft()
    more = {"cache_reference": tmp_path / "cache"} if "cache" in more else more
    trainer = main(flags(tiny, tmp_path / "run", ref_model=folder, **more))
    ours = torch.cat([by_row(tmp_path / "run", f"ref_{side}_logp") for side in ("chosen", "rejected")])
    torch.testing.assert_close(ours.double(), logps(merged, collated(trainer)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"lora_r": 4}, {"cache": True}])
def test_a_given_reference_is_the_reference(tiny, tmp_path, more):
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    shutil.copytree(tiny, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    more = {"cache_reference": tmp_path / "cache"} if "cache" in more else more
    trainer = main(flags(tiny, tmp_path / "run", ref_model=tmp_path / "other", **more))
    ours = torch.cat([by_row(tmp_path / "run", f"ref_{side}_logp") for side in ("chosen", "rejected")])
    torch.testing.assert_close(ours.double(), logps(other, collated(trainer)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_reference_that_is_not_what_it_seems_is_refused(tiny, tmp_path, cached):
    """It is measured as the policy is."""
    shutil.copytree(tiny, tmp_path / "other")
    more = {"ref_model": tmp_path / "other"} | ({"cache_reference": tmp_path / "cache"} if cached else {})
    for model, said in (
        (electra(), "ref_model: the logits of ElectraForCausalLM do not follow"),
        (llama(vocab_size=29), "ref_model: got a vocabulary of 29, takes the policy's"),
    ):
        model.save_pretrained(tmp_path / "other")
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.raises(ValueError, match=said):
            main(flags(tiny, tmp_path / "run", **more))


@pytest.mark.parametrize("on", [False, True])
def test_nothing_moves_at_a_learning_rate_of_0(tiny, tmp_path, on):
    """With the model's own dropout of 0.1, and the reference without it in any case."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64)
    torch.manual_seed(0)
    shutil.copytree(tiny, tmp_path / "gpt2")
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    trainer = main(flags(tiny, tmp_path / "run", model=tmp_path / "gpt2", learning_rate=0, dropout=on))
    rows = read(tmp_path / "run" / "record").to_pandas()
    assert (rows.margin == 0).all() != on and (rows.decision == 0).all() != on
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", dtype=torch.float32)
    ours = by_row(tmp_path / "run", "ref_chosen_logp").double()
    torch.testing.assert_close(ours, logps(start, collated(trainer))[: len(ours)], rtol=1e-4, atol=1e-4)
    assert start.config.attn_pdrop == trainer.model.config.attn_pdrop == 0.1


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "loss.safetensors"])
def test_a_checkpoint_that_is_not_whole_is_refused(tiny, tmp_path, missing):
    arguments = flags(tiny, tmp_path, save_strategy="steps", save_steps=4)
    main(arguments)
    (tmp_path / "checkpoint-8" / missing).unlink()
    with pytest.raises(
        ValueError, match=f"resume_from_checkpoint: got .*checkpoint-8 without {missing}, takes a whole"
    ):
        main([*arguments, "--resume_from_checkpoint=last"])


def test_a_checkpoint_of_another_method_is_refused(tiny, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": "last"}
    main(flags(tiny, tmp_path, **more, method="beta-dpo"))
    with pytest.raises(
        ValueError, match="got .*checkpoint-8 of a run with other settings .method was 'beta-dpo', is 'eps-dpo'"
    ):
        main(flags(tiny, tmp_path, **more))


def test_a_checkpoint_of_weights_alone_is_refused(tiny, tmp_path):
    """And what is on record past it stays."""
    arguments = flags(tiny, tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    main(arguments)
    shutil.rmtree(tmp_path / "checkpoint-8")
    kept = {path: path.read_bytes() for path in (tmp_path / "run.json", *(tmp_path / "record").iterdir())}
    assert set(read(tmp_path / "record")["step"].to_pylist()) == set(range(1, 9))
    with pytest.raises(
        ValueError, match="optimizer and learning rate would start over. save_only_model leaves them out"
    ):
        main([*arguments, "--resume_from_checkpoint=last"])
    assert {path: path.read_bytes() for path in (tmp_path / "run.json", *(tmp_path / "record").iterdir())} == kept


@pytest.mark.parametrize("zero", [{}, {"stage": 0}])
def test_deepspeed_without_zero_is_refused(zero):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    accelerator = SimpleNamespace(parallelism_config=None, state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=True, is_fsdp_enabled=False)
    with pytest.raises(ValueError, match="deepspeed: got stage (0|None) of zero_optimization, takes 1, 2 or 3"):
        check_launch(trainer)


def test_several_gpus_in_one_process_are_refused(tiny, tmp_path):
    """transformers would wrap the model in DataParallel, which halves rows: chosen here, rejected there."""
    options, args = parse(flags(tiny, tmp_path))
    args._n_gpu = 2
    with pytest.raises(
        ValueError, match="CUDA_VISIBLE_DEVICES: got 2 GPUs in one process.* torchrun --nproc_per_node 2"
    ):
        build(options, args)


trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")

import trl_runs  # noqa: E402
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def trl_trainer(tiny, run, model, **more):
    own = {name: more.pop(name) for name in ("peft_config", "ref_model") if name in more}
    return EpsilonDPOTrainer(
        model, args=EpsilonDPOConfig(**trl_runs.options(run, **more)), train_dataset=trl_runs.pairs(tiny),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny), **own,
    )  # fmt: skip


def of_trl(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("on", [False, True])
def test_trl_nothing_moves_at_a_learning_rate_of_0(tiny, tmp_path, on):
    """With a dropout that TRL's own switch does not reach, and an adapter's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attention_dropout=0.3)
    lora = peft.LoraConfig(**LORA, lora_dropout=0.3)
    trainer = trl_trainer(
        tiny, tmp_path, model, peft_config=lora, learning_rate=0.0, disable_dropout=not on, max_steps=4
    )
    trainer.train()
    assert all(entry["kl/chosen"] == 0 and entry["kl/kept"] == 1 for entry in of_trl(trainer)) != on


def test_trl_several_gpus_in_one_process_are_refused(tiny, tmp_path, monkeypatch):
    """By TRL itself."""
    monkeypatch.setattr(EpsilonDPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        trl_trainer(tiny, tmp_path, trl_runs.model(tiny))


def test_trl_references_are_measured(tiny, tmp_path):
    with pytest.raises(ValueError, match="ref_model: the logits of ElectraForCausalLM do not follow"):
        trl_trainer(tiny, tmp_path, trl_runs.model(tiny), ref_model=electra())
    with pytest.raises(ValueError, match="ref_model: got a vocabulary of 29"):
        trl_trainer(tiny, tmp_path, trl_runs.model(tiny), ref_model=llama(vocab_size=29))
    biases = peft.LoraConfig(**LORA, bias="all")
    with pytest.raises(ValueError, match="ref_model: training would move the reference, which shares .*bias"):
        trl_trainer(tiny, tmp_path, llama(attention_bias=True), peft_config=biases)
    # A model of its own stays.
    models = {"model": llama(attention_bias=True), "ref_model": llama(attention_bias=True)}
    own = trl_trainer(tiny, tmp_path, **models, peft_config=biases, max_steps=2)
    own.train()
    assert of_trl(own)[0]["kl/chosen"] == 0


def test_trl_an_adapter_that_would_not_train_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="model: got an adapter whose weights get no gradient"):
        trl_trainer(
            tiny, tmp_path, trl_runs.model(tiny), peft_config=peft.LoraConfig(**LORA, alora_invocation_tokens=[6])
        )


def test_trl_a_mixture_of_experts_is_resumed(tiny, tmp_path):
    folder, logs = mixture(tmp_path / "moe", tiny), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        models = [transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]
        trainer = trl_trainer(
            tiny,
            tmp_path,
            models[0],
            ref_model=models[1],
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            packed=False,
        )
        trainer.train(resume_from_checkpoint=resume)
        logs.append([[entry[n] for n in ("step", "loss", "kl/beta", "logps/chosen")] for entry in of_trl(trainer)])
    assert logs[0] == logs[1]


def test_trl_mixed_dtypes_train(tiny, tmp_path):
    """16-bit weights with norms in fp32, under bf16 autocast, beside all of them in fp32."""
    logs = []
    for mixed in (True, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tiny, dtype=torch.bfloat16 if mixed else torch.float32
        )
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()
        own = copy.deepcopy(model)
        if mixed:  # TRL would load its own in one dtype
            with pytest.raises(ValueError, match="ref_model: got bfloat16 for .*norm.weight"):
                trl_trainer(tiny, tmp_path, copy.deepcopy(model), bf16=True)
        trainer = trl_trainer(tiny, tmp_path / str(mixed), model, ref_model=own, bf16=True, max_steps=4)
        trainer.train()
        logs.append(of_trl(trainer))
    assert logs[0][0]["kl/kept"] == 1
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=5e-3)


def test_trl_an_adapter_on_embeddings_starts_from_itself(tiny, tmp_path, sft):
    folder, _ = sft("embeddings too")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=torch.float32)
    trainer = trl_trainer(tiny, tmp_path, model, max_steps=3)
    trainer.train()
    assert of_trl(trainer)[0]["kl/chosen"] == 0 and of_trl(trainer)[-1]["kl/chosen"] > 0


@pytest.mark.parametrize("by", ["name", "model"])
def test_trl_an_adapter_that_transformers_has_loaded(tiny, tmp_path, sft, by):
    """Its reference would be the base without it; a reference that is given may well be such a model."""
    folder, merged = sft()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(ValueError, match="model: got an adapter that transformers loads into the layers"):
        trl_trainer(tiny, tmp_path, str(folder) if by == "name" else loaded)
    trainer = trl_trainer(tiny, tmp_path, merged.requires_grad_(True), ref_model=loaded, max_steps=1)
    trainer.train()
    assert of_trl(trainer)[0]["kl/chosen"] == pytest.approx(0, abs=1e-6)


def test_trl_a_checkpoint_of_weights_alone_is_refused(tiny, tmp_path):
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trl_trainer(tiny, tmp_path, trl_runs.model(tiny), **more).train()
    with pytest.raises(ValueError, match="got .*checkpoint-1 without rng_state.pth, optimizer.pt, scheduler.pt"):
        trainer = trl_trainer(tiny, tmp_path, trl_runs.model(tiny), **more)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
