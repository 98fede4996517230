"""Models that see images, and EpsilonDPOTrainer on them, against their own logits and TRL's own DPO."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import model_sweep  # noqa: E402
import trl_runs  # noqa: E402
import vision  # noqa: E402
from epsdpo_kernels import epsilon_dpo_reference  # noqa: E402
from epsdpo_kernels.integrations.checks import check_causal  # noqa: E402
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402

EPSILON = 0.05


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


@pytest.mark.parametrize("name", vision.MODELS)
def test_loss_follows_from_the_models_own_logits(name):
    """Log-probs, loss and gradients of all weights, the vision tower's too."""
    model, batch = vision.build(name), vision.batch(name)
    found = model_sweep.measure(model, batch)
    assert found.kind == "right", found.why
    # The images do matter: without them the model says something else.
    pixels = batch["pixel_values"]
    gradient = torch.autograd.grad(
        torch.stack(model_sweep.logps(model, batch | {"pixel_values": pixels.requires_grad_()})[0]).sum(), pixels
    )[0]
    assert gradient.abs().amax() > 1e-4


def test_a_backbone_without_its_images_would_be_noticed(monkeypatch):
    from epsdpo_kernels.integrations import transformers as ours

    run = ours._run_backbone
    monkeypatch.setattr(ours, "_run_backbone", lambda *models, pixel_values, **inputs: run(*models, **inputs))
    found = model_sweep.measure(vision.build("Llava"), vision.batch("Llava"))
    assert found.kind == "refused" and "do not follow from its hidden states" in found.why


def fresh(tiny, name):
    """A model that knows the tokenizer's token for an image."""
    tokenizer = vision.processor(name, tiny).tokenizer
    return vision.build(name, tokenizer.convert_tokens_to_ids("<image>"))


def make(tiny, run, name, trainer=EpsilonDPOTrainer, config=EpsilonDPOConfig, count=9, model=None, **more):
    extra = {k: more.pop(k) for k in ("eval_dataset", "peft_config") if k in more}
    model = model or fresh(tiny, name)
    if "peft_config" not in extra:
        extra["ref_model"] = copy.deepcopy(model)
    options = trl_runs.options(run, max_length=None, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    return trainer(
        model=model, args=config(**options | {"max_steps": 4} | more), processing_class=vision.processor(name, tiny),
        train_dataset=vision.pairs(name, trl_runs.pairs(tiny), count), **extra,
    )  # fmt: skip


def entries(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def same_weights(ours, theirs):
    theirs = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        if not key.endswith("k_proj.bias"):  # which all queries add alike: its gradient is rounding
            torch.testing.assert_close(p, theirs[key], rtol=1e-3, atol=3e-5, msg=key)


@pytest.mark.parametrize("name", vision.PROCESSORS)
def test_epsilon_0_is_trls_own_dpo(tiny, tmp_path, name):
    """On pictures that the collator reads: one, two or none a pair."""
    ours = make(tiny, tmp_path / "ours", name, count=8, epsilon=0.0)
    theirs = make(tiny, tmp_path / "theirs", name, trl.DPOTrainer, trl.DPOConfig, count=8)
    for trainer in (ours, theirs):
        trainer.train()
    for a, b in zip(entries(ours), entries(theirs), strict=True):
        # Not those over tokens: TRL averages micro-batches' means, of as many pairs but not of as many tokens.
        for figure in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert a[figure] == pytest.approx(b[figure], rel=1e-3, abs=2e-5), figure
    same_weights(ours.model, theirs.model)
    assert entries(ours)[-1]["kl/chosen"] > 0


@pytest.mark.parametrize("name, lora", [("Llava", False), ("Qwen2.5-VL", True)])
def test_steps_are_the_loop_written_out(tiny, tmp_path, capsys, name, lora):
    """9 pairs, the last window of one; every decision in the record, by its row."""
    peft = pytest.importorskip("peft")
    more = {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    held_out = vision.pairs(name, trl_runs.pairs(tiny), 5)
    trainer = make(tiny, tmp_path, name, epsilon=EPSILON, max_steps=6, eval_dataset=held_out, **more)
    assert "rows: padded. a prompt's images are read in each of its rows" in capsys.readouterr().out
    policy, reference = copy.deepcopy(trainer.model), fresh(tiny, name)
    if lora:
        policy.forward = None
    loader = trainer.get_train_dataloader()
    batches = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches += [list(loader)]
    windows = [epoch[i : i + 2] for epoch in batches for i in range(0, len(epoch), 2)]
    assert [sum(len(b["input_ids"]) for b in window) // 2 for window in windows] == [4, 4, 1] * 2
    trainer.train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    beta, rows = 0.1, read(tmp_path / "record").to_pandas().query("split == 'train'")
    for number, (entry, window) in enumerate(zip(entries(trainer), windows, strict=True), 1):
        outs, pairs, seen = [], sum(len(b["input_ids"]) for b in window) // 2, []
        for batch in window:
            own = {k: v for k, v in batch.items() if k not in ("completion_mask", "epsdpo_row", "epsdpo_pair_id")}
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100).roll(-1, 1)
            labels[:, -1] = -100
            sides = []
            for model in (policy.get_base_model() if lora else policy, reference):
                sides += [model.model(**own).last_hidden_state, model.lm_head.weight]
            out = epsilon_dpo_reference(
                *sides[:2], labels, *(t.detach() for t in sides[2:]), beta=beta, epsilon=EPSILON
            )
            (out.losses.numel() * out.loss / pairs).backward()
            outs.append(out)
            seen += batch["epsdpo_row"].chunk(2)[0].tolist()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step = torch.cat([out.step for out in outs]).double()
        assert entry["loss"] == pytest.approx(torch.cat([out.losses for out in outs]).mean().item(), abs=2e-5)
        ours = rows.query(f"step == {number}").sort_values("row")
        assert ours["row"].tolist() == sorted(seen)
        order = sorted(range(pairs), key=seen.__getitem__)
        assert ours["decision"].tolist() == step[order].long().tolist()
        beta /= 1 + EPSILON * step.mean().item()
        assert entry["kl/beta"] == pytest.approx(beta, rel=1e-5)
    assert beta != pytest.approx(0.1, rel=1e-3)
    same_weights(trainer.model, policy)
    assert trainer.evaluate()["eval_kl/chosen"] > 0
    found = audit(tmp_path)
    assert found.ok, str(found)
    assert rows["pair_id"].isna().all()  # an id is that of texts


def test_what_an_image_leaves_nothing_of_counts_for_nothing(tiny, tmp_path):
    """Of answers beyond max_length nothing is scored: as if the pairs were not there."""
    trainer = make(tiny, tmp_path, "Llava", count=6, max_steps=3, max_length=13, epsilon=EPSILON)
    blank, all_pairs = 0, 0
    for batch in trainer.get_train_dataloader():
        scored = batch["completion_mask"][:, 1:].any(1).view(2, -1).all(0)
        blank, all_pairs = blank + int((~scored).sum()), all_pairs + len(scored)
    assert all_pairs == 6 and 0 < blank < 6
    trainer.train()
    rows = read(tmp_path / "record").to_pandas()
    assert len(rows.query("epoch < 1")) == 6 - blank
    with pytest.raises(ValueError, match="max_length: got 6, which cuts an image's tokens off"):
        make(tiny, tmp_path / "short", "Llava", count=6, max_length=6).train()


def test_a_run_is_resumed(tiny, tmp_path):
    """Its checkpoint has the weights under other names than the model, as Llava is published."""
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "epsilon": EPSILON}
    whole = make(tiny, tmp_path, "Llava", **more)
    whole.train()
    cut = make(tiny, tmp_path, "Llava", **more)
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = ("step", "loss", "kl/beta", "logps/chosen")
    assert [[e[n] for n in names] for e in entries(cut)] == [[e[n] for n in names] for e in entries(whole)]
    assert audit(tmp_path).ok


def test_an_answer_that_sees_itself_is_refused():
    """Of PaliGemma's prompts all tokens see each other, and an answer that comes without its type is one."""
    batch = vision.batch("PaliGemma")
    del batch["pair_labels"]
    check_causal(vision.build("PaliGemma"), batch)
    with pytest.raises(ValueError, match="a token of PaliGemmaForConditionalGeneration sees those after it"):
        check_causal(vision.build("PaliGemma"), batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])})


def test_batches_of_images_are_not_cut(tiny, tmp_path):
    with pytest.raises(ValueError, match="max_tokens_per_batch: got 100 with images"):
        make(tiny, tmp_path, "Llava", max_tokens_per_batch=100)
