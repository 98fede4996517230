"""EpsilonDPOTrainer against a loop written out, against TRL's own DPO, and what it refuses."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")
peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")
transformers = pytest.importorskip("transformers")

import accelerate  # noqa: E402
import datasets  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

import trl_runs  # noqa: E402
from epsdpo_kernels import epsilon_dpo_reference  # noqa: E402
from epsdpo_kernels.integrations import checks, seams  # noqa: E402
from epsdpo_kernels.integrations.checks import NotFiniteError  # noqa: E402
from epsdpo_kernels.integrations.recording import NO_ROW, PAIR_ID, ROW  # noqa: E402
from epsdpo_kernels.integrations.transformers import lm_head  # noqa: E402
from epsdpo_kernels.integrations.trl import (  # noqa: E402
    REFUSED,
    EpsilonDPOConfig,
    EpsilonDPOTrainer,
    _has_completions,
    _refuse_launch,
)
from epsdpo_kernels.record import read  # noqa: E402

ROOT = Path(__file__).parent.parent
EPSILON = 0.05


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def make(tiny, run, model=None, count=None, trainer=EpsilonDPOTrainer, config=EpsilonDPOConfig, **more):
    arguments = ("peft_config", "ref_model", "eval_dataset", "compute_metrics", "data_collator", "train_dataset")
    extra = {k: more.pop(k) for k in arguments if k in more}
    if config is EpsilonDPOConfig:
        more.setdefault("epsilon", EPSILON)
    args = config(**trl_runs.options(run, **more))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    if model is None:
        model = trl_runs.model(tiny)
    extra.setdefault("train_dataset", trl_runs.pairs(tiny, count))
    return trainer(model=model, args=args, processing_class=tokenizer, **extra)


def entries(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batch_tensors(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(batch["completion_mask"][:, 1:] == 1, ids[:, 1:], -100)
    return ids, mask, labels


def side(model, ids, mask):
    """(hidden states, head) of a model, PEFT or not."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return base.model(ids, mask).last_hidden_state, base.lm_head.weight


def by_hand(trainer, policy, reference, accumulation=4, steps=10, beta=0.1, smoothing=0.0, update="mean-step"):
    """The run as a plain loop with all logits in memory; ``reference`` gives (hidden states, head)."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    # The order of the data is the trainer's; it draws the same one again in every epoch.
    epochs = -(-steps // -(-len(trainer.get_train_dataloader()) // accumulation))
    windows = []
    loader = trainer.get_train_dataloader()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        batches = list(loader)
        windows += [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    history = []
    for window in windows[:steps]:
        decided = []
        window = [batch for batch in window if batch["completion_mask"].any()]
        pairs = sum(len(batch["input_ids"]) for batch in window) // 2
        if not window:
            for p in policy.parameters():
                p.grad = torch.zeros_like(p)
            history.append({"loss": 0.0, "beta": beta})
        for batch in window:
            ids, mask, labels = batch_tensors(batch)
            with torch.no_grad():
                ref = reference(ids, mask)
            out = epsilon_dpo_reference(
                *side(policy, ids, mask), labels, *ref, beta=beta, epsilon=EPSILON, label_smoothing=smoothing
            )
            (out.losses.numel() * out.loss / pairs).backward()
            decided.append(out)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not window:
            continue
        step = torch.cat([o.step for o in decided]).double()
        history.append(
            {"loss": torch.cat([o.losses for o in decided]).mean().item(), "used": beta, "step": step,
             "kl": torch.cat([o.chosen_kl for o in decided]).mean().item()}
        )  # fmt: skip
        if update == "mean-step":
            beta /= 1 + EPSILON * step.mean().item()
        else:
            beta *= (1 / (1 + EPSILON * step)).mean().item()
        history[-1]["beta"] = beta
    return history


def same_run(trainer, truth, policy, atol=2e-5):
    log = entries(trainer)
    assert len(log) == len(truth)
    for entry, step in zip(log, truth, strict=True):
        assert entry["loss"] == pytest.approx(step["loss"], abs=2e-5)
        assert entry["kl/beta"] == pytest.approx(step["beta"], rel=1e-5)
        assert entry["kl/chosen"] == pytest.approx(step["kl"], rel=1e-3, abs=1e-5)
        for name, sign in (("relaxed", 1), ("kept", 0), ("tightened", -1)):
            assert entry[f"kl/{name}"] == pytest.approx((step["step"] == sign).double().mean().item())
    assert log[-1]["kl/beta"] != pytest.approx(0.1, rel=1e-3)
    ours = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("smoothing, update", [(0.0, "mean-step"), (0.1, "mean-beta")])
def test_ten_steps_are_the_loop_written_out(tiny, tmp_path, smoothing, update):
    trainer = make(tiny, tmp_path, label_smoothing=smoothing, beta_update=update)
    trainer.train()
    policy, ref = trl_runs.model(tiny), trl_runs.model(tiny)
    truth = by_hand(trainer, policy, lambda *x: side(ref, *x), smoothing=smoothing, update=update)
    same_run(trainer, truth, policy)


def test_a_short_last_window(tiny, tmp_path):
    """44 pairs in micro-batches of 3: windows of 12, 12, 12 and 8 pairs, the last micro-batch of 2."""
    trainer = make(tiny, tmp_path, count=44, max_steps=8)
    trainer.train()
    policy, ref = trl_runs.model(tiny), trl_runs.model(tiny)
    truth = by_hand(trainer, policy, lambda *x: side(ref, *x), steps=8)
    assert [len(step["step"]) for step in truth[:4]] == [12, 12, 12, 8]
    same_run(trainer, truth, policy)


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def test_peft_takes_the_base_as_reference(tiny, tmp_path):
    trainer = make(tiny, tmp_path, peft_config=peft.LoraConfig(**LORA))
    assert trainer.ref_model is None
    policy, ref = copy.deepcopy(trainer.model), trl_runs.model(tiny)
    trainer.train()
    policy.forward = None
    same_run(trainer, by_hand(trainer, policy, lambda *x: side(ref, *x)), policy)


def test_a_pretrained_adapter_starts_from_itself(tiny, tmp_path):
    torch.manual_seed(5)
    lora = peft.LoraConfig(**LORA, init_lora_weights=False)
    start = peft.get_peft_model(trl_runs.model(tiny), lora)
    policy, ref = copy.deepcopy(start), copy.deepcopy(start)
    trainer = make(tiny, tmp_path, model=start)
    trainer.train()
    assert trainer.model.active_adapter == "default"
    assert entries(trainer)[0]["kl/chosen"] == 0  # the policy is its reference
    truth = by_hand(trainer, policy, lambda *x: side(ref, *x))
    same_run(trainer, truth, policy)


@pytest.mark.parametrize("pretrained", [True, False], ids=["its copy as reference", "the base as reference"])
def test_weights_of_an_adapter_that_are_frozen_stay(tiny, tmp_path, pretrained):
    """PEFT lets every weight of an adapter train that it switches on again, as it is after each of the reference's."""
    lora = peft.LoraConfig(**LORA, init_lora_weights=False)
    if pretrained:
        model = peft.get_peft_model(trl_runs.model(tiny), lora)
        frozen = freeze(model, "lora_A")
        trainer = make(tiny, tmp_path, model=model, max_steps=2)
    else:
        trainer = make(tiny, tmp_path, peft_config=lora, max_steps=2)
        frozen = freeze(trainer.model, "lora_A")
    weights = dict(trainer.model.named_parameters())
    trained = {name for name, p in weights.items() if p.requires_grad}
    assert trained == {name.replace("lora_A", "lora_B") for name in frozen}
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.train()
    assert {name for name, p in weights.items() if p.requires_grad} == trained
    assert {name for name, p in weights.items() if not p.detach().equal(before[name])} == trained


def freeze(model, part: str) -> set[str]:
    """Names of the active adapter's weights of a kind, which do not train any more."""
    found = {name: p for name, p in model.named_parameters() if f"{part}.default" in name}
    for p in found.values():
        p.requires_grad_(False)
    return set(found)


def test_an_adapter_that_would_have_no_copy_as_reference_is_refused(tiny, tmp_path):
    def adapted(**name):
        return peft.get_peft_model(trl_runs.model(tiny), peft.LoraConfig(**LORA), **name)

    stacked = adapted()
    stacked.add_adapter("two", peft.LoraConfig(**LORA))
    stacked.base_model.set_adapter(["default", "two"])
    before = adapted()
    before.add_adapter("ref", peft.LoraConfig(**LORA))
    frozen = adapted()
    frozen.requires_grad_(False)
    for model, said in (
        (stacked, r"model: got the active adapters \['default', 'two'\], takes 'default' alone"),
        (adapted(adapter_name="sft"), r"model: got the active adapters \['sft'\], takes 'default' alone"),
        (before, "model: got an adapter named 'ref', takes none"),
        (frozen, "of which nothing trains, takes weights with requires_grad"),
    ):
        with pytest.raises(ValueError, match=said):
            make(tiny, tmp_path, model=model)
    assert stacked.active_adapters == ["default", "two"]
    make(tiny, tmp_path, model=stacked, ref_model=trl_runs.model(tiny))  # whose reference is another model
    assert stacked.active_adapters == ["default", "two"]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [None, {}, {"modules_to_save": ["lm_head"]}], ids=["", "lora", "lora and head"])
def test_epsilon_0_is_trls_own_dpo(tiny, tmp_path, lora, packed):
    """PEFT trains a copy of a head that is to be saved; the original is the reference's."""
    more = {"eval_dataset": trl_runs.pairs(tiny, 10), "eval_strategy": "steps", "eval_steps": 5}
    more |= {} if lora is None else {"peft_config": peft.LoraConfig(**LORA, **lora)}
    ours = make(tiny, tmp_path / "ours", epsilon=0.0, packed=packed, **more)
    theirs = make(tiny, tmp_path / "theirs", trainer=trl.DPOTrainer, config=trl.DPOConfig, **more)
    for trainer in (ours, theirs):
        trainer.train()
    assert len(entries(ours)) == 10
    logs = [[e for e in t.state.log_history if "loss" in e or "eval_loss" in e] for t in (ours, theirs)]
    for a, b in zip(*logs, strict=True):
        timings = ("runtime", "per_second")
        names = [name for name in b if not name.endswith(timings)]
        assert {"mean_token_accuracy", "logits/chosen", "entropy", "num_tokens", "rewards/margins"} <= {
            name.removeprefix("eval_") for name in names
        }
        for name in names:
            # TRL averages the ten evaluation pairs' batches (8 and 2), and micro-batches' means over tokens; here pairs
            # and tokens weigh alike.
            of_tokens = name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
            if (not name.startswith("eval_") and not of_tokens) or name == "eval_loss":
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name
            else:
                assert name in a
        extra = {f"kl/{n}" for n in ("beta", "relaxed", "kept", "tightened", "chosen", "rejected")} | {"margins"}
        extra |= {"tokens", "tokens_per_second", "padding_saved"} if "loss" in a else set()
        assert {name.removeprefix("eval_") for name in set(a) - set(b)} == extra
    parameters = zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True)
    for (name, p), q in parameters:
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)
    assert ours.loss_fn.beta.item() == pytest.approx(0.1)
    if lora:
        head = ours.model.get_output_embeddings()
        assert torch.equal(head.original_module.weight, trl_runs.model(tiny).lm_head.weight)
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_means_over_tokens_do_not_know_of_micro_batches(tiny, tmp_path, packed):
    """In four micro-batches a step, and these cut, they are what TRL logs of all twelve pairs as one."""
    more = {"max_steps": 3}
    ours = make(tiny, tmp_path, epsilon=0.0, packed=packed, max_tokens_per_batch=40, **more)
    more |= {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    theirs = make(tiny, tmp_path, trainer=trl.DPOTrainer, config=trl.DPOConfig, **more)
    for trainer in (ours, theirs):
        trainer.train()
    for a, b in zip(entries(ours), entries(theirs), strict=True):
        for name in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3}


def random_model(family, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


def test_a_mixture_of_experts_keeps_its_balance(tiny, tmp_path):
    """TRL weighs the router's loss in by default; the reference is a second model, as from_pretrained would give it."""
    start, logs = random_model("Mixtral", **EXPERTS), []
    for name, trainer, more in (
        # Packed, a prompt's tokens count once.
        ("ours", EpsilonDPOTrainer, {"epsilon": 0.0, "packed": False}),
        ("theirs", trl.DPOTrainer, {"config": trl.DPOConfig}),
    ):
        models = {"model": copy.deepcopy(start), "ref_model": copy.deepcopy(start)}
        run = make(tiny, tmp_path / name, trainer=trainer, max_steps=4, **models, **more)
        run.train()
        logs.append(entries(run))
    for a, b in zip(*logs, strict=True):
        for name in ("loss", "aux_loss", "rewards/margins", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name
    assert logs[0][0]["aux_loss"] > 0.1 and logs[0][0]["loss"] > math.log(2) + 0.03


def test_evaluation(tiny, tmp_path):
    """Metrics are means over pairs, and nothing moves."""
    held_out = trl_runs.pairs(tiny, 7)
    trainer = make(tiny, tmp_path, max_steps=3, per_device_eval_batch_size=4)
    trainer.train()
    beta = trainer.loss_fn.beta.clone()
    metrics = trainer.evaluate(held_out)
    rows = list(trainer._prepare_dataset(held_out, trainer.processing_class, trainer.args, "eval"))
    ids, mask, labels = batch_tensors(DataCollatorForPreference(0, 16)(rows))
    ref = trl_runs.model(tiny)
    with torch.no_grad():
        out = epsilon_dpo_reference(
            *side(trainer.model, ids, mask), labels, *side(ref, ids, mask), beta=beta, epsilon=EPSILON
        )
        logits = trainer.model(ids, mask).logits
    scored = labels != -100
    chosen = torch.arange(14) < 7
    right = (logits.argmax(-1) == labels)[chosen][scored[chosen]].double().mean().item()
    expected = {
        "loss": out.loss, "rewards/chosen": out.chosen_rewards.mean(), "logps/rejected": out.rejected_logps.mean(),
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).double().mean(),
        "kl/rejected": out.rejected_kl.mean(), "kl/relaxed": (out.step == 1).double().mean(), "kl/beta": beta,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), name
    assert 0 < right < 1
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right)  # of all tokens; the last batch has 3 pairs
    assert torch.equal(trainer.loss_fn.beta, beta) and trainer.loss_fn.counts.sum() == 0


def test_resumed_with_its_beta(tiny, tmp_path):
    more = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    whole = make(tiny, tmp_path / "run", **more)
    whole.train()
    cut = make(tiny, tmp_path / "run", **more)
    cut.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    names = ("step", "loss", "kl/beta", "kl/relaxed", "kl/tightened", "logps/chosen")
    assert [[e[n] for n in names] for e in entries(cut)] == [[e[n] for n in names] for e in entries(whole)]
    assert entries(whole)[3]["kl/beta"] != pytest.approx(0.1, rel=1e-3)
    for p, q in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_tokens_are_counted_over_a_resume(tiny, tmp_path):
    """Also those between the last line of the log and the checkpoint."""
    more = {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4}
    whole, cut = (make(tiny, tmp_path, **more) for _ in range(2))
    whole.train()
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    loader, tokens = whole.get_train_dataloader(), []
    for epoch in range(2):  # of 4 steps
        loader.set_epoch(epoch)
        tokens += [int(batch["attention_mask"].sum()) for batch in loader]
    for trainer in (whole, cut):
        assert [entry["num_tokens"] for entry in entries(trainer)] == [sum(tokens[:12]), sum(tokens[:24])]


@pytest.mark.parametrize("more", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 1}, {"lora": True}], ids=str)
def test_the_best_model_comes_with_its_beta_and_reference(tiny, tmp_path, more):
    """β falls, so the first evaluation is the best by it, and later steps have moved everything."""
    more = dict(more)
    if more.pop("lora", False):
        more["peft_config"] = peft.LoraConfig(**LORA)
    trainer = make(
        tiny, tmp_path, eval_dataset=trl_runs.pairs(tiny, 10), max_steps=6, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_kl/beta",
        greater_is_better=True, **more,
    )  # fmt: skip
    trainer.train()
    held_out = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_global_step == held_out[0]["step"] == 2
    again = trainer.evaluate()
    names = [name for name in again if not name.endswith(("runtime", "per_second", "num_tokens", "epoch"))]
    assert {"eval_loss", "eval_kl/beta", "eval_kl/chosen", "eval_rewards/margins"} <= set(names)
    for name in names:
        assert again[name] == pytest.approx(held_out[0][name], rel=1e-6, abs=1e-9), name
    assert again["eval_kl/beta"] != pytest.approx(held_out[-1]["eval_kl/beta"], rel=1e-3)


def test_a_prediction_leaves_nothing_in_the_next_evaluation(tiny, tmp_path):
    sets = {"few": trl_runs.pairs(tiny, 5), "others": trl_runs.pairs(tiny, 12)}
    trainer = make(tiny, tmp_path, eval_dataset=sets, max_steps=2)
    trainer.train()
    few, others = trainer.eval_dataset.values()
    first = trainer.evaluate(few)
    predicted = trainer.predict(others).metrics["test_loss"]
    again = trainer.evaluate(few)
    assert predicted == pytest.approx(trainer.evaluate(others)["eval_loss"], rel=1e-6)
    assert predicted != pytest.approx(first["eval_loss"], rel=1e-3)
    for name, value in first.items():
        if not name.endswith(("runtime", "per_second")):
            assert again[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("family, more", [("Llama", {}), ("Mixtral", EXPERTS), ("Gemma2", {"head_dim": 8})])
def test_a_metric_that_no_evaluation_gives_is_refused(tiny, tmp_path, family, more):
    """When the trainer is made, with those that one gives: of experts also aux_loss, of capped logits none."""
    held_out = trl_runs.pairs(tiny, 6)
    model = random_model(family, attn_implementation="eager", **more)

    def made(metric, eval_dataset=held_out, **more):
        models = {"model": copy.deepcopy(model), "ref_model": copy.deepcopy(model)}
        return make(tiny, tmp_path, eval_dataset=eval_dataset, metric_for_best_model=metric, **models, **more)

    with pytest.raises(ValueError, match="metric_for_best_model: got 'accuracy', takes one of loss, ") as refusal:
        made("accuracy")
    timed = {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")}
    logged = {name for name in made("eval_rewards/accuracies").evaluate() if name.startswith("eval_")}
    named = str(refusal.value).split(" takes one of ")[1].split(", ")
    assert {f"eval_{name}" for name in named} == logged - timed and len(set(named)) == len(named)
    assert ("aux_loss" in named, "logits/chosen" in named) == (family == "Mixtral", family != "Gemma2")
    two = {"a": held_out, "b": held_out}
    for metric in ("loss", "rewards/margins"):  # which TRL would take from the last set
        with pytest.raises(ValueError, match=f"got '{metric}', takes one of a_loss, b_loss, kl/beta, num_tokens$"):
            made(metric, two)
    made("eval_b_loss", two)
    made("rewards/margins", {"a": held_out})
    made("words", compute_metrics=lambda prediction: {"words": 0})


def test_pairs_that_would_all_be_dropped_are_refused(tiny, tmp_path):
    for more, said in (
        ({"count": 2}, "2 pairs in train_dataset"),
        ({"eval_dataset": {"few": trl_runs.pairs(tiny, 7)}}, r"7 pairs in eval_dataset\['few'\], .* takes at least 8"),
    ):
        with pytest.raises(ValueError, match=f"dataloader_drop_last: got True with {said}"):
            make(tiny, tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8, **more)
    trainer = make(tiny, tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8)
    with pytest.raises(ValueError, match="dataloader_drop_last: got True with 7 pairs in eval_dataset, .* at least 8"):
        trainer.evaluate(trl_runs.pairs(tiny, 7))
    with pytest.raises(ValueError, match="dataloader_drop_last: got True with 7 pairs in test_dataset, .* at least 8"):
        trainer.predict(trl_runs.pairs(tiny, 7))


@pytest.mark.parametrize("more", [{"sync_ref_model": True, "ref_model_sync_steps": 2}, {"lora": True}], ids=str)
def test_compiled_is_uncompiled(tiny, tmp_path, more):
    """Its losses, β, evaluation and weights; and a checkpoint of a compiled run serves one that is not."""
    more = dict(more)
    if more.pop("lora", False):
        more["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    more |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"pad_to_multiple_of": 16}  # few shapes to compile for

    def run(name, resume=None, **compiled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make(tiny, tmp_path / name, count=24, eval_dataset=trl_runs.pairs(tiny, 3), **more, **compiled)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, trainer.evaluate()

    plain, expected = run("plain")
    compiled = run("compiled", torch_compile=True, torch_compile_backend="aot_eager")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    resumed = run("compiled", resume=str(tmp_path / "compiled" / "checkpoint-2"))
    assert plain.loss_fn.beta.item() != pytest.approx(0.1, rel=1e-3)
    for trainer, evaluation in (compiled, resumed):
        for ours, theirs in zip(entries(trainer), entries(plain), strict=True):
            for name in ("loss", "kl/beta", "kl/chosen", "rewards/margins", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name
        for name in ("eval_loss", "eval_kl/beta", "eval_kl/rejected", "eval_logps/chosen"):
            assert evaluation[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
        for p, q in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_without_beta_is_refused(tiny, tmp_path):
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make(tiny, tmp_path, trainer=trl.DPOTrainer, config=trl.DPOConfig, **more).train()
    with pytest.raises(ValueError, match="the running β would be lost"):
        make(tiny, tmp_path, **more).train(resume_from_checkpoint=True)


def test_the_reference_is_synced_and_resumed(tiny, tmp_path):
    more = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
    }
    whole = make(tiny, tmp_path / "run", **more)
    start = [p.clone() for p in whole.ref_model.parameters()]
    whole.train()
    assert not all(torch.equal(p, q) for p, q in zip(start, whole.ref_model.parameters(), strict=True))
    cut = make(tiny, tmp_path / "run", **more)
    cut.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [e["kl/chosen"] for e in entries(cut)] == [e["kl/chosen"] for e in entries(whole)]
    # The reference follows: with an unmoved one the KL would be larger.
    fixed = make(tiny, tmp_path / "fixed", max_steps=6)
    fixed.train()
    assert entries(whole)[-1]["kl/chosen"] < 0.9 * entries(fixed)[-1]["kl/chosen"]


def test_a_plain_dpo_config_and_none(tiny, tmp_path, monkeypatch):
    trainer = make(tiny, tmp_path, config=trl.DPOConfig, beta=0.3, max_steps=1)
    assert (trainer.loss_fn.beta.item(), trainer.loss_fn.epsilon) == (pytest.approx(0.3), 0.01)
    assert trainer.loss_fn.beta_update == "mean-step"
    # Without arguments TRL makes its own, whose bf16 needs a device that has it.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    trainer = EpsilonDPOTrainer(str(tiny), train_dataset=trl_runs.pairs(tiny), processing_class=tokenizer)
    assert trainer.loss_fn.beta.item() == pytest.approx(0.1)


def test_defaults_of_trl_and_generate(tiny, tmp_path):
    """bf16 autocast and gradient checkpointing, which TRL turns on by itself; and the model still generates."""
    trainer = make(tiny, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=3)
    trainer.train()
    assert all(math.isfinite(e["loss"]) for e in entries(trainer)) and entries(trainer)[0]["kl/kept"] == 1
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    out = trainer.model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        assert out[0, 3] == trainer.model(ids).logits[0, -1].argmax()


def test_compute_metrics_gets_logits(tiny, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"words": prediction.predictions.shape[-1]}

    trainer = make(tiny, tmp_path, compute_metrics=compute_metrics, max_steps=1)
    metrics = trainer.evaluate(trl_runs.pairs(tiny, 4))
    assert metrics["eval_words"] == lm_head(trainer.model).out_features
    batch = next(iter(trainer.get_eval_dataloader(trainer._prepare_dataset(
        trl_runs.pairs(tiny, 4), trainer.processing_class, trainer.args, "eval"
    ))))  # fmt: skip
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"][:4], batch["attention_mask"][:4]).logits
    torch.testing.assert_close(torch.as_tensor(seen[0]), logits)


SETTINGS = [
    ({"precompute_ref_log_probs": True}, r"precompute_ref_log_probs: got True.*--cache_reference"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size: got True, takes False: pairs of a step"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: got True, takes False"),
    ({"bf16_full_eval": True}, "bf16_full_eval: got True, takes False: the check would read the rounding"),
    ({"fp16_full_eval": True}, "fp16_full_eval: got True"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, takes 0.0.*set label_smoothing"),
    ({"debug": "underflow_overflow"}, "debug: got .*, takes ..: its hooks"),
    ({"loss_type": ["ipo"]}, "loss_type: got .'ipo'."),
    ({"loss_type": ["sigmoid", "sft"]}, "loss_type"),
    ({"loss_weights": [0.5]}, "loss_weights"),
    ({"ld_alpha": 0.5}, "ld_alpha: got 0.5, takes None"),
    ({"f_divergence_type": "forward_kl"}, "f_divergence_type: got 'forward_kl'"),
    ({"use_weighting": True}, "use_weighting"),
    ({"epsilon": 1.5}, "epsilon: got 1.5"),
    ({"beta": -1.0}, "beta"),
    ({"label_smoothing": 0.5}, "label_smoothing"),
    ({"beta_update": "often"}, "beta_update: got 'often'"),
    ({"activation_offloading": True}, "activation_offloading: got True on a CPU, takes False"),
    ({"fp16": True}, "fp16: got True on a CPU, takes bf16"),
]


@pytest.mark.parametrize("more, said", SETTINGS)
def test_refused_settings(tiny, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        make(tiny, tmp_path, **more)


MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")


def verdicts(heading: str) -> dict[str, str]:
    """The table below a line of docs/migrating.md: what becomes of each name in its first column."""
    lines = MIGRATING.split(heading)[1].split("| --- ", 1)[1].splitlines()[1:]
    rows = [line.split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    named = [(name, verdict) for names, verdict, *_ in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(dict(named)) == len(named), "a name stands in two rows"
    return dict(named)


def test_every_field_of_the_config_has_its_verdict():
    found = verdicts("### Every field of `DPOConfig`")
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert found.keys() == fields
    assert set(found.values()) <= {"honoured", "refused", "honoured in part", "irrelevant"}
    refused = {name for name, verdict in found.items() if verdict == "refused"}
    assert refused == set(REFUSED)
    assert refused <= {name for more, _ in SETTINGS for name in more}
    added = {field.name for field in dataclasses.fields(EpsilonDPOConfig)} - fields
    assert verdicts("| `EpsilonDPOConfig` adds | |").keys() == added


def test_every_argument_of_the_trainer_has_its_verdict():
    found = verdicts("### The arguments of `DPOTrainer`")
    assert found.keys() == set(inspect.signature(trl.DPOTrainer.__init__).parameters) - {"self"}
    assert set(found.values()) <= {"honoured", "honoured in part"}


def test_refused_models(tiny, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        make(tiny, tmp_path, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    strange = trl_runs.model(tiny)
    plain = strange.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    strange.forward = forward
    with pytest.raises(ValueError, match="cannot be fused"):
        make(tiny, tmp_path, model=strange)


def launched(
    fsdp=None, parallelism=None, zero_stage=None, autotp=0, sync=False, best=False, processes=2, strategy="random",
    **batches,
):  # fmt: skip
    """As much of a trainer as says how it was launched: launching it so takes GPUs."""
    config = {"zero_optimization": {"stage": zero_stage}}
    if autotp:
        config["tensor_parallel"] = {"autotp_size": autotp}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage, deepspeed_config=config))
    accelerator = SimpleNamespace(
        parallelism_config=parallelism, is_fsdp2=fsdp == 2, state=state, num_processes=processes
    )
    batches = SimpleNamespace(**{"split_batches": False, "dispatch_batches": False, "even_batches": True} | batches)
    return SimpleNamespace(
        accelerator=accelerator, is_deepspeed_enabled=zero_stage is not None, is_fsdp_enabled=fsdp is not None,
        args=SimpleNamespace(
            sync_ref_model=sync, accelerator_config=batches, load_best_model_at_end=best, n_gpu=1,
            train_sampling_strategy=strategy,
        ),
        model=transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
            )
        ),
    )  # fmt: skip


TENSOR = accelerate.ParallelismConfig(tp_size=2)


@pytest.mark.parametrize(
    "how, said",
    [
        ({"parallelism": TENSOR}, "model: got a head that is whole, with tp_size=2"),
        ({"parallelism": TENSOR, "fsdp": 2}, "parallelism_config: got tp_size=2 with data parallelism, FSDP or Deep"),
        (
            {"parallelism": accelerate.ParallelismConfig(tp_size=2, dp_shard_size=2)},
            "parallelism_config: got tp_size=2",
        ),
        ({"parallelism": accelerate.ParallelismConfig(cp_size=2)}, "parallelism_config: got cp_size=2, takes sp_size"),
        ({"zero_stage": 1, "autotp": 2}, "deepspeed: got autotp_size=2, takes ZeRO alone"),
        ({"fsdp": 1}, "fsdp: got version 1, takes version 2"),
        ({"fsdp": 2, "sync": True}, "sync_ref_model: got True with FSDP"),
        ({"zero_stage": 3, "sync": True}, "sync_ref_model: got True with FSDP, ZeRO-3 or"),
        ({"dispatch_batches": True}, "accelerator_config: got .*dispatch_batches=True"),
        ({"even_batches": False}, "accelerator_config: .* even_batches=False in several processes, takes .*True"),
        ({"split_batches": True}, "accelerator_config: got split_batches=True, .* per_device_train_batch_size"),
        ({"strategy": "batch_rebalance"}, "train_sampling_strategy: got 'batch_rebalance' in several processes"),
        ({"strategy": "batch_rebalance", "processes": 1}, None),
        ({"dispatch_batches": True, "even_batches": False, "processes": 1}, None),
        ({}, None),
        ({"parallelism": accelerate.ParallelismConfig(dp_replicate_size=2)}, None),
        ({"zero_stage": 2, "sync": True}, None),
        ({"zero_stage": 3}, None),
        ({"fsdp": 2}, None),
    ],
)
def test_refused_launches(how, said):
    if said is None:
        _refuse_launch(launched(**how))
    else:
        with pytest.raises(ValueError, match=said):
            _refuse_launch(launched(**how))


@pytest.mark.parametrize(
    "zero, said",
    [
        (None, "got stage None"), ({}, "got stage None of zero_optimization, takes 1, 2 or 3"),
        ({"stage": 0}, "got stage 0"),
        ({"stage": 3, "stage3_module_granularity_threshold": 9}, "got stage3_module_granularity_threshold=9 .*takes 0"),
        ({"stage": 3, "stage3_module_granularity_threshold": 0}, None),
        ({"stage": 2, "stage3_module_granularity_threshold": 9}, None),  # which is ZeRO-3's alone
    ],
)  # fmt: skip
def test_refused_settings_of_deepspeed(tiny, tmp_path, zero, said):
    """Before TRL makes its engines, which fail with errors that name none of them."""
    config = {} if zero is None else {"zero_optimization": zero}
    args = EpsilonDPOConfig(**trl_runs.options(tmp_path))
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    if said is None:
        checks.check_deepspeed(config)
    else:
        with pytest.raises(ValueError, match=f"deepspeed: .*{said}"):
            EpsilonDPOTrainer(trl_runs.model(tiny), args=args, train_dataset=trl_runs.pairs(tiny))


@pytest.mark.parametrize("name, argument", [("load_best_model_at_end", "best"), ("sync_ref_model", "sync")])
def test_what_a_split_model_does_not_go_with(monkeypatch, name, argument):
    monkeypatch.setattr(checks, "vocab_group", lambda head: "a group")
    _refuse_launch(launched(parallelism=TENSOR))
    with pytest.raises(ValueError, match=f"{name}: got True with .*(tp_size=2|tensor parallelism)"):
        _refuse_launch(launched(parallelism=TENSOR, **{argument: True}))


def test_refused_batches(tiny, tmp_path):
    trainer = make(tiny, tmp_path)
    batch = next(iter(trainer.get_train_dataloader())) | {"token_type_ids": torch.zeros(1)}
    with pytest.raises(ValueError, match="got a batch with .'token_type_ids'., takes input_ids, attention_mask, comp"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("between", [False, True], ids=["before rows", "between prompt and completion"])
@pytest.mark.parametrize("kind", ["learned positions", "virtual tokens", "packed"])
def test_a_collator_may_pad_where_it_likes(tiny, tmp_path, kind, between):
    """Learned positions count from a row's first place, and virtual tokens come before it."""
    more = {"packed": kind == "packed", "max_steps": 2}
    model = None
    if kind == "virtual tokens":
        more["peft_config"] = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind == "learned positions":
        config = transformers.GPT2Config(vocab_size=23, n_embd=32, n_head=4, n_layer=2, n_positions=24)
        model = transformers.GPT2LMHeadModel(config)
        more["ref_model"] = copy.deepcopy(model)
    runs = []
    for name, collator in (("right", None), ("left", trl_runs.PaddedLeft(between))):
        own = copy.deepcopy(more)
        runs.append(make(tiny, tmp_path / name, copy.deepcopy(model), 24, data_collator=collator, **own))
        torch.manual_seed(0)
        with torch.no_grad():
            for p in runs[-1].model.parameters():
                p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0)
        runs[-1].train()
        assert runs[-1].packed == more["packed"]
    for right, left in zip(*map(entries, runs), strict=True):
        for figure in ("loss", "logps/chosen", "logps/rejected", "kl/chosen", "num_tokens", "mean_token_accuracy"):
            assert left[figure] == pytest.approx(right[figure], rel=1e-5, abs=1e-5), figure
    assert abs(entries(runs[0])[0]["kl/chosen"]) > 1e-3


def test_what_a_collator_has_to_give(tiny, tmp_path):
    whole = trl_runs.PaddedLeft()
    for change, said in (
        (
            lambda batch: {name: t for name, t in batch.items() if name != "attention_mask"},
            "takes input_ids, attention",
        ),
        (lambda batch: batch | {"completion_mask": batch["completion_mask"][:, 1:]}, "of one shape .2B, T."),
        (
            lambda batch: batch | {"completion_mask": 1 - batch["attention_mask"]},
            "completion_mask of 1 where attention",
        ),
    ):
        trainer = make(
            tiny, tmp_path, count=24, data_collator=lambda rows, change=change: change(whole(rows)), packed=False
        )
        with pytest.raises(ValueError, match=f"data_collator: got .*{said}"):
            trainer.train()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: got 0, takes a positive number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0, takes a positive number"),
        ({"max_length": -1}, "max_length: got -1, takes an integer from 2"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps: got 0, takes a positive number"),
        ({"ref_model_mixup_alpha": 2.0}, "ref_model_mixup_alpha: got 2.0, takes a number in"),
        ({"torch_compile_backend": "none-such"}, "torch_compile_backend: got 'none-such', takes one of"),
        (
            {"parallelism_config": accelerate.ParallelismConfig(tp_size=2)},
            "got sizes of 2 processes together in a run of 1",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(tiny, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        make(tiny, tmp_path, **more)


@pytest.mark.parametrize("masked", [(1, 6), (0, 1, 2, 3), (7,)])
def test_what_has_nothing_to_score_counts_for_nothing(tiny, tmp_path, masked):
    """Micro-batches of a window, a whole window: as if the pairs were not there."""
    collator = trl_runs.Masked(masked)
    trainer = make(tiny, tmp_path, count=24, data_collator=collator, max_steps=3)
    trainer.train()
    policy, ref = trl_runs.model(tiny), trl_runs.model(tiny)
    collator.count = 0
    truth = by_hand(trainer, policy, lambda *x: side(ref, *x), steps=3)
    for entry, step in zip(entries(trainer), truth, strict=True):
        assert entry["loss"] == pytest.approx(step["loss"], abs=2e-5)
        assert entry["kl/beta"] == pytest.approx(step["beta"], rel=1e-5)
        # Of nothing there are no figures.
        assert ("kl/chosen" in entry) == ("kl" in step)
    assert (truth[0]["loss"] == 0) == (len(masked) == 4) and truth[2]["beta"] != pytest.approx(0.1, rel=1e-3)
    for (name, p), q in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("max_length", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_can_be_scored_is_known_before(max_length, mode):
    """By what the collator makes of a pair: whether it is kept, dropped because of its length, or refused."""
    collator = DataCollatorForPreference(0, max_length, mode)
    fates = {True: 0, False: 0, None: 0}
    for prompt, chosen, rejected in ((p, c, r) for p in range(5) for c in range(4) for r in range(4)):
        ids = {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}
        scored = collator([ids])["completion_mask"][:, 1:].sum(1).tolist() if prompt + chosen + rejected else [0, 0]
        try:
            kept = _has_completions(*ids.values(), 7, max_length, mode, "train", "")
        except ValueError as error:
            kept = None
            side = "chosen" if "its chosen" in str(error) else "rejected"
            assert scored[
                side == "rejected"
            ] == 0 and f"row 7: its {side} completion has {len(ids[f'{side}_ids'])} " in str(error)
        assert kept is not True or min(scored) > 0
        # Dropped is what a long prompt leaves nothing of.
        assert kept is not False or (mode == "keep_start" and prompt >= max_length and scored == [0, 0])
        fates[kept] += 1
    assert fates[True] > 0 or max_length == 1
    assert fates[None] > 0


def conversations(*answers: tuple[str, str]) -> datasets.Dataset:
    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", "the sky is"), "chosen": said("assistant", a), "rejected": said("assistant", b)}
        for a, b in answers
    ]
    rows[0]["prompt"] = said("user", "the sky is " * 9)  # longer than max_length, so it is dropped
    return datasets.Dataset.from_list(rows)


LONG = datasets.Dataset.from_list([{"prompt": "the sky is blue and so are you", "chosen": " yes", "rejected": " no"}])
NO_PAIRS = {
    "nothing": (lambda d: {"train_dataset": d.select([])}, "train_dataset: got no pair, takes"),
    "an empty stream": (
        lambda d: {"train_dataset": datasets.IterableDataset.from_generator(lambda: iter(()))},
        "train_dataset: got no pair, takes",
    ),
    "all dropped": (
        lambda d: {"train_dataset": LONG}, "train_dataset: got no pair that max_length=6 leaves a completion, takes",
    ),
    "all dropped of a stream": (
        lambda d: {"train_dataset": LONG.to_iterable_dataset()},
        "train_dataset: got no pair that max_length=6 leaves a completion, takes",
    ),
    "nothing held out": (lambda d: {"eval_dataset": d.select([])}, "eval_dataset: got no pair, takes at least one"),
    "nothing held out under a name": (
        lambda d: {"eval_dataset": {"a": d, "b": d.select([])}}, r"eval_dataset\['b'\]: got no pair, takes",
    ),
    "all held out dropped": (
        lambda d: {"eval_dataset": {"a": d, "b": LONG}}, r"eval_dataset\['b'\]: got no pair that max_length=6 leaves",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_PAIRS)
def test_data_of_nothing_are_refused(tiny, tmp_path, kind):
    data, said = NO_PAIRS[kind]
    with pytest.raises(ValueError, match=f"^{said}"):
        make(tiny, tmp_path, max_length=6, max_steps=1, **data(trl_runs.pairs(tiny, 8)))


def test_an_evaluation_of_nothing_is_refused(tiny, tmp_path):
    data = trl_runs.pairs(tiny, 8)
    trainer = make(tiny, tmp_path, max_steps=1, eval_dataset={"a": data, "b": data})
    none = data.select([])
    for given, name in ((none, "eval_dataset"), ({"c": data, "d": none}, r"eval_dataset\['d'\]")):
        with pytest.raises(ValueError, match=f"^{name}: got no pair, takes at least one"):
            trainer.evaluate(given)
    assert math.isfinite(trainer.evaluate()["eval_b_loss"])


def test_fewer_pairs_than_a_batch_are_a_short_one(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=-1, num_train_epochs=1, count=1)
    trainer.train()
    assert trainer.state.global_step == 1 and read(tmp_path / "record").to_pydict()["row"] == [0]


@pytest.mark.parametrize("where", ["train", "eval", "evaluate", "stream"])
def test_a_pair_with_an_empty_completion_is_named_when_the_data_are_prepared(tiny, tmp_path, where):
    """Of a chat template that ends no turn; of a stream, when it is read."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    good = conversations(("blue", "green"), ("blue", "red"), ("red", "blue"), ("green", "blue"))
    bad = conversations(("blue", "green"), ("blue", "red"), ("red", ""), ("green", "blue"))
    args = EpsilonDPOConfig(**trl_runs.options(tmp_path, max_steps=1, gradient_accumulation_steps=1))
    split = {"stream": "train", "evaluate": "eval"}.get(where, where)
    said = f"{split} dataset, row 2: its rejected completion has 0 tokens after a prompt of 3"
    with pytest.raises(ValueError, match=said):
        trainer = EpsilonDPOTrainer(
            model=trl_runs.model(tiny), args=args, processing_class=tokenizer,
            train_dataset={"train": bad, "stream": bad.to_iterable_dataset()}.get(where, good),
            eval_dataset=bad if where == "eval" else good,
        )  # fmt: skip
        assert where in ("evaluate", "stream")
        trainer.evaluate(bad) if where == "evaluate" else trainer.train()


def test_not_finite_stops_before_the_step_and_names_the_pairs(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[trainer.processing_class.convert_tokens_to_ids("sure")] = torch.nan
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(
        NotFiniteError, match=r"step 1: the loss of the pairs at rows \[.+\] of the data is not"
    ) as found:
        trainer.train()
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
    named = json.loads(re.search(r"\[.+\]", str(found.value))[0])
    columns = read(tmp_path / "record").to_pydict()
    assert named == sorted(row for row, loss in zip(columns["row"], columns["loss"], strict=True) if loss != loss)
    assert all("sure" in " ".join(trl_runs.pairs(tiny)[row].values()) for row in named)


def test_pairs_without_rows_are_named_by_ids_or_places(tiny, tmp_path):
    trainer = make(tiny, tmp_path)
    ids_of_three = {"input_ids": torch.zeros(6, 2, dtype=torch.int64)}
    rows, ids = torch.tensor([4, 5, 6] * 2), torch.tensor([7, -1, 9] * 2)
    for row, pair_id, said in (
        (rows, ids, "at rows [5, 6] of the data"),
        (rows.where(rows != 6, NO_ROW), ids, "with the ids ffffffffffffffff, 0000000000000009"),
        (rows.where(rows != 6, NO_ROW), ids.where(ids != 9, 0), "[1, 2] of a micro-batch of 3"),
    ):
        assert trainer.named(ids_of_three | {ROW: row, PAIR_ID: pair_id}, torch.tensor([False, True, True])) == said
    assert trainer.named(ids_of_three, torch.tensor([True, False, False])) == "[0] of a micro-batch of 3"


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny, tmp_path, factor, max_grad_norm):
    """Every loss is finite; in the third step one gradient is not."""
    trainer = make(tiny, tmp_path, max_steps=4, max_grad_norm=max_grad_norm)
    norm = trainer.model.model.norm.weight
    norm.register_hook(lambda gradient: gradient * (factor if trainer.state.global_step == 2 else 1))
    with pytest.raises(NotFiniteError, match="step 3: the losses are finite, and the norm of their gradient is"):
        trainer.train()
    until = make(tiny, tmp_path, max_steps=2, max_grad_norm=max_grad_norm)
    until.train()
    for p, q in zip(trainer.model.parameters(), until.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert trainer.loss_fn.beta == until.loss_fn.beta != pytest.approx(0.1, rel=1e-3)


def test_a_loss_scaler_leaves_steps_out_by_itself(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=3)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.model.model.norm.weight.register_hook(
        lambda gradient: gradient * (math.inf if trainer.state.global_step == 0 else 1)
    )
    trainer.train()
    plain = make(tiny, tmp_path, max_steps=3)
    plain.train()
    assert scaler.get_scale() == 2.0
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    log = entries(trainer)
    # The second step is the first one's.
    assert not math.isfinite(log[0]["grad_norm"]) and log[0]["loss"] == pytest.approx(
        entries(plain)[0]["loss"], abs=1e-6
    )
    assert log[1]["kl/chosen"] == 0 and log[2]["kl/chosen"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_is_done_makes_no_more_steps(tiny, tmp_path, stream):
    data = trl_runs.pairs(tiny)
    data = data.to_iterable_dataset() if stream else data
    run = {"train_dataset": data, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    make(tiny, tmp_path, **run).train()
    trainer = make(tiny, tmp_path, **run)
    trainer.train(resume_from_checkpoint=True)
    done = make(tiny, tmp_path / "again", **run | {"save_strategy": "no"})
    done.train()
    assert trainer.state.global_step == 3 and trainer.loss_fn.beta == done.loss_fn.beta
    for p, q in zip(trainer.model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("own", [True, False], ids=["an adapter's base", "a second model"])
def test_a_run_goes_on_with_its_own_reference_and_steps(tiny, tmp_path, own):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    adapter = {"peft_config": peft.LoraConfig(**LORA)} if own else {}
    make(tiny, tmp_path, **run, **adapter).train()
    other = trl_runs.model(tiny)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 4] += 1
    models = adapter | {"model": other} if own else {"ref_model": other}
    with pytest.raises(ValueError, match=r"other settings \(frozen_weights was '[0-9a-f]{16}', is '[0-9a-f]{16}'\)"):
        make(tiny, tmp_path, **run, **models).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate was 0.001, is 0.002\)"):
        make(tiny, tmp_path, **run, **adapter, learning_rate=2e-3).train(resume_from_checkpoint=True)
    make(tiny, tmp_path, **run | {"max_steps": 3}, **adapter).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="output_dir: got .*, the folder of model, takes another"):
        make(tiny, tiny, max_steps=1)


def test_the_card_cites_the_method(tiny, tmp_path):
    trainer = make(tiny, tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    title = "KL Penalty Control via Perturbation for Direct Preference Optimization"
    assert f"trained with ε-DPO, a method introduced in [{title}](https://huggingface.co/papers/2502.13177)" in card
    cited = card.split("Cite ε-DPO as:")[1]
    assert f"title         = {{{{{title}}}}}" in cited and "Lee, Sangkyu" in cited and "arXiv:2502.13177" in cited
    assert "epsilon-dpo" in card.split("---")[1]


def test_what_datasets_keeps_is_of_the_code_that_made_it(tiny, tmp_path, monkeypatch):
    """`datasets` knows a function by its name: the pairs that an older version would drop are not found again."""
    folder = tmp_path / "data"
    trl_runs.pairs(tiny).save_to_disk(folder)
    data = datasets.load_from_disk(folder)  # results are kept beside its files
    kept = [len(make(tiny, tmp_path / "a", train_dataset=data, max_length=length).train_dataset) for length in (4, 64)]
    assert kept[0] < kept[1] == 48
    module = inspect.getmodule(EpsilonDPOTrainer)
    other = tmp_path / "trl.py"
    other.write_text(Path(module.__file__).read_text(encoding="utf-8") + "# another version", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(other))
    monkeypatch.setattr(module, "_has_completions", lambda *_, **__: True)
    monkeypatch.setattr(module._has_completions, "__module__", module.__name__)
    monkeypatch.setattr(module._has_completions, "__qualname__", "_has_completions")
    assert len(make(tiny, tmp_path / "b", train_dataset=data, max_length=4).train_dataset) == 48


def test_every_method_that_is_overridden_is_a_seam():
    """One that TRL or transformers have given another name would never be called."""
    above = EpsilonDPOTrainer.__mro__[: EpsilonDPOTrainer.__mro__.index(trl.DPOTrainer)]
    own = {name for cls in above for name, value in vars(cls).items() if callable(value)}
    overridden = {name for name in own if callable(getattr(trl.DPOTrainer, name, None)) and not name.startswith("__")}
    assert overridden - set(seams.METHODS) == {"train", "evaluate", "predict"}


def test_a_trl_without_a_seam_is_refused_by_its_name(monkeypatch):
    seams.check_trl()

    class Another(trl.DPOTrainer):
        def __init__(self, model, ref_model=None, args=None, peft_config=None):
            self.ref_model, self.aux_loss_enabled, self._metrics, self._total_train_tokens = None, False, {}, 0
            self.router_aux_loss_coef, self._is_vision_dataset, self.name = 0.0, False, "reference"

        def compute_loss(self, model, inputs, return_outputs=False):
            return None

        _save_checkpoint = None

    def rejected_first(pad_token_id):
        return lambda rows: {
            "input_ids": torch.tensor([[1, 3], [1, 2]]), "attention_mask": torch.ones(2, 2, dtype=torch.long),
        }  # fmt: skip

    monkeypatch.setattr(seams, "DPOTrainer", Another)
    monkeypatch.setattr(seams.dpo_trainer, "DataCollatorForPreference", rejected_first)
    assert list(seams.missing_seams()) == [
        "DPOTrainer.compute_loss(num_items_in_batch)", "DPOTrainer._save_checkpoint",
        "'ref', the name of the copy of a pre-trained adapter", "input_ids of DataCollatorForPreference",
        "completion_mask of DataCollatorForPreference",
    ]  # fmt: skip
    with pytest.raises(ImportError, match=rf"trl: got {trl.__version__}, which lacks .*_save_checkpoint, 'ref'"):
        seams.check_trl()


EXAMPLE = """
import runpy, sys, trl
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer
trl.DPOTrainer, trl.DPOConfig = EpsilonDPOTrainer, EpsilonDPOConfig
trl.trainer.base_trainer.send_telemetry = lambda *_, **__: None
runpy.run_module("trl.scripts.dpo", run_name="__main__")
"""


@pytest.mark.parametrize("lora", [False, True])
def test_trls_own_example(tiny, tmp_path, lora):
    """trl/scripts/dpo.py as TRL ships it, with the two names swapped and its own flags, on local files."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        trl_runs.pairs(tiny).to_json(tmp_path / "data" / f"{split}.jsonl")
    flags = {
        "dataset_name": tmp_path / "data", "model_name_or_path": tiny, "learning_rate": 1e-3, "num_train_epochs": 1,
        "per_device_train_batch_size": 2, "max_steps": 4, "gradient_accumulation_steps": 8, "eval_strategy": "steps",
        "eval_steps": 2, "output_dir": tmp_path / "run", "report_to": "none", "use_cpu": True, "epsilon": 0.05,
        "logging_steps": 1, "dtype": "float32", "bf16": False,
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    arguments += ["--no_remove_unused_columns"]
    arguments += ["--use_peft", "--lora_r", "32", "--lora_alpha", "16"] if lora else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (state,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    train, held_out = ([e for e in log if name in e] for name in ("loss", "eval_loss"))
    assert len(train) == 4 and len(held_out) == 2
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and train[0]["kl/kept"] == 1
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["kl/beta"] != pytest.approx(0.1, rel=1e-4)
    assert held_out[-1]["eval_kl/chosen"] > 0
