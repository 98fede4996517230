"""PEFT's prompt learning, whose virtual tokens come in above the backbone."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from epsdpo_kernels import EpsilonDPOLoss  # noqa: E402
from epsdpo_kernels.integrations.attention import pack_rows  # noqa: E402
from epsdpo_kernels.integrations.checks import check_reference, turn_off_dropout  # noqa: E402
from epsdpo_kernels.integrations.transformers import (  # noqa: E402
    check_head,
    copy_adapter,
    positions,
    run_loss_in_forward,
    without_adapter,
)
from epsdpo_kernels.pair import pair_beta, preference_losses  # noqa: E402
from runs import flags  # noqa: E402
from test_models import batch, build  # noqa: E402
from train.__main__ import main  # noqa: E402

KINDS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix projected": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


def prompted(model, kind, seed=3):
    torch.manual_seed(seed)
    policy = peft.get_peft_model(model, copy.deepcopy(KINDS[kind]))
    with torch.no_grad():
        for p in policy.prompt_encoder.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return policy


def logps(logits, labels):
    picked = logits[:, -labels.shape[1] :].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return list(picked.masked_fill(labels == -100, 0).sum(1).chunk(2))


@pytest.mark.parametrize("copied", [False, True], ids=["from the base", "from itself"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_follows_from_the_models_own_logits(kind, name, copied):
    """The reference is the base without virtual tokens, or with those that the model came with."""
    base = build(name)
    policy = prompted(copy.deepcopy(base), kind)
    if copied:
        start = copy.deepcopy(policy)
        copy_adapter(policy)
        with torch.no_grad():
            for p in policy.prompt_encoder["default"].parameters():
                p.add_(0.1 * torch.randn_like(p))
    check_head(policy)
    check_reference(policy, None)
    turn_off_dropout(policy)
    ids, mask, labels = batch()
    weights = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert weights and all("prompt_encoder.default" in n for n in weights)
    theirs = logps(policy(input_ids=ids, attention_mask=mask).logits, labels)
    with torch.no_grad():
        theirs += logps((start if copied else base)(input_ids=ids, attention_mask=mask).logits, labels)
    forward = vars(policy.get_base_model()).get("forward")
    run_loss_in_forward(policy, without_adapter(policy), EpsilonDPOLoss())
    out = policy(input_ids=ids, attention_mask=mask, pair_labels=labels)
    found = (out.chosen_logps, out.rejected_logps, out.ref_chosen_logps, out.ref_rejected_logps)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-4)
    loss = preference_losses(*theirs, beta=pair_beta(out.step, 0.1, 0.01)).mean()
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    got, expected = (torch.autograd.grad(value, list(weights.values())) for value in (out.loss, loss))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=2e-3, atol=1e-5)
    assert max(g.abs().max() for g in got) > 1e-3
    assert vars(policy.get_base_model()).get("forward") is forward


def test_rows_are_padded_and_it_says_why():
    reason = pack_rows([prompted(build("Llama"), "prompt tuning")])
    assert reason == "prompt learning puts virtual tokens before every row's own"


def test_virtual_tokens_in_a_folder_are_for_inference(tiny, tmp_path):
    prompted(transformers.AutoModelForCausalLM.from_pretrained(tiny), "prompt tuning").save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="model: got virtual tokens .PromptTuningConfig. in .*sft, which PEFT"):
        main(flags(tiny, tmp_path / "run", model=tmp_path / "sft"))


trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")

import trl_runs  # noqa: E402
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def trl_trainer(tiny, run, kind=None, trainer=EpsilonDPOTrainer, config=EpsilonDPOConfig, model=None, **more):
    options = trl_runs.options(run, learning_rate=1e-2, **more)
    return trainer(
        model or trl_runs.model(tiny), args=config(**options), train_dataset=trl_runs.pairs(tiny),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
        peft_config=kind and copy.deepcopy(KINDS[kind]),
    )  # fmt: skip


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
@pytest.mark.parametrize("kind", KINDS)
def test_trl_epsilon_0_is_trls_own_dpo(tiny, tmp_path, kind, loaded):
    runs = []
    for name, trainer, config, more in (
        ("ours", EpsilonDPOTrainer, EpsilonDPOConfig, {"epsilon": 0.0}),
        ("theirs", trl.DPOTrainer, trl.DPOConfig, {}),
    ):
        model = prompted(trl_runs.model(tiny), kind) if loaded else None
        runs.append(
            trl_trainer(tiny, tmp_path / name, None if loaded else kind, trainer, config, model, max_steps=4, **more)
        )
        runs[-1].train()
    for a, b in zip(*map(entries, runs), strict=True):
        for figure in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert a[figure] == pytest.approx(b[figure], rel=1e-3, abs=2e-5), figure
    assert entries(runs[0])[-1]["kl/chosen"] > 0
    assert (entries(runs[0])[0]["kl/chosen"] == 0) == loaded  # or the virtual tokens are new, and the base has none
    ours, theirs = (dict(run.model.prompt_encoder["default"].named_parameters()) for run in runs)
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-3, atol=3e-5, msg=name)


def test_trl_virtual_tokens_are_resumed(tiny, tmp_path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trl_trainer(tiny, tmp_path, "prompt tuning", **more)
    whole.train()
    cut = trl_trainer(tiny, tmp_path, "prompt tuning", **more)
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = ("step", "loss", "kl/beta", "logps/chosen")
    assert [[e[n] for n in names] for e in entries(cut)] == [[e[n] for n in names] for e in entries(whole)]


def test_what_would_train_another_model_is_refused(tiny, tmp_path):
    """transformers drops a prefix from layers that it runs again; PEFT saves what an encoder puts out."""
    with pytest.raises(ValueError, match="gradient_checkpointing: got True with PrefixTuningConfig"):
        trl_trainer(tiny, tmp_path, "prefix tuning", gradient_checkpointing=True)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
            "save_steps": 2}  # fmt: skip
    with pytest.raises(ValueError, match="load_best_model_at_end: got True with PromptEncoderConfig"):
        EpsilonDPOTrainer(
            trl_runs.model(tiny), args=EpsilonDPOConfig(**trl_runs.options(tmp_path, **best)),
            train_dataset=trl_runs.pairs(tiny), eval_dataset=trl_runs.pairs(tiny, 4),
            processing_class=transformers.AutoTokenizer.from_pretrained(tiny), peft_config=KINDS["p-tuning"],
        )  # fmt: skip
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trl_trainer(tiny, tmp_path, "p-tuning", **more).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint: got .* of PromptEncoderConfig, which takes none"):
        trl_trainer(tiny, tmp_path, "p-tuning", **more).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "config, said",
    [
        (peft.PromptTuningConfig(num_virtual_tokens=0, task_type="CAUSAL_LM"), "num_virtual_tokens=0 of PromptTuning"),
        (peft.PrefixTuningConfig(num_virtual_tokens=-1, task_type="CAUSAL_LM"), "num_virtual_tokens=-1 of Prefix"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM"), "num_virtual_tokens=None of PromptEncoderConfig, takes"),
        (peft.AdaptionPromptConfig(adapter_len=0, task_type="CAUSAL_LM"), "adapter_len=0 of AdaptionPromptConfig"),
        (peft.VeraConfig(r=0, task_type="CAUSAL_LM"), "r=0 of VeraConfig, takes a positive number"),
        (peft.PromptTuningConfig(num_virtual_tokens=3), "task_type=None of PromptTuningConfig, takes 'CAUSAL_LM'"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), "task_type='SEQ_CLS' of Prefix"),
    ],
)  # fmt: skip
def test_adapters_of_nothing_are_refused(tiny, tmp_path, config, said):
    with pytest.raises(ValueError, match=f"peft_config: got {said}"):
        EpsilonDPOTrainer(
            trl_runs.model(tiny), args=EpsilonDPOConfig(**trl_runs.options(tmp_path)),
            train_dataset=trl_runs.pairs(tiny), peft_config=config,
            processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
        )  # fmt: skip


def test_a_model_of_which_nothing_trains_is_refused():
    none = peft.PromptTuningConfig(num_virtual_tokens=0, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="model: got PeftModelForCausalLM of which nothing trains"):
        check_reference(peft.get_peft_model(build("Llama"), none), None)
    # On an embedding as elsewhere; tokens of its own need not be among those that it is measured with.
    for target in ("embed_tokens", "q_proj"):
        lora = peft.LoraConfig(r=2, lora_alpha=0, target_modules=[target], task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="model: got an adapter whose weights get no gradient, .*lora_alpha. o"):
            check_head(peft.get_peft_model(build("Llama"), lora))
    tokens = peft.TrainableTokensConfig(token_indices=[90], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    check_head(peft.get_peft_model(build("Llama"), tokens))


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_virtual_tokens_take_positions(tiny, tmp_path, kind):
    def gpt2(positions):
        config = transformers.GPT2Config(vocab_size=23, n_embd=32, n_head=4, n_layer=2, n_positions=positions)
        return transformers.GPT2LMHeadModel(config)

    trainer = trl_trainer(tiny, tmp_path, kind, model=gpt2(19), max_steps=1)
    assert max(len(batch["input_ids"][0]) for batch in trainer.get_train_dataloader()) == 16
    trainer.train()
    assert positions(trainer.model) == 16 and positions(trainer.model.get_base_model()) == 19
    with pytest.raises(ValueError, match="16 tokens, takes up to 15, the positions of GPT2LMHeadModel beside 3"):
        trl_trainer(tiny, tmp_path, kind, model=gpt2(18), max_steps=1)
