"""The trainer on a tiny model: its loss, its metrics, its β, its refusals, and a run that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from epsdpo_kernels import epsilon_dpo_reference  # noqa: E402
from epsdpo_kernels.integrations.checkpoints import last_checkpoint  # noqa: E402
from epsdpo_kernels.integrations.checks import NotFiniteError  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.data import Collator  # noqa: E402
from train.models import add_lora  # noqa: E402
from train.options import PairOptions  # noqa: E402

ROOT = Path(__file__).parent.parent


def by_hand(tiny: Path, trainer) -> list[dict]:
    """The same run as a plain loop with all logits in memory."""
    policy, ref = (transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    total = -(-48 // 6)
    beta, steps = 0.1, []
    batches = list(trainer.get_train_dataloader())
    for start in range(0, len(batches), 2):
        window = batches[start : start + 2]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - len(steps) / total)
        decided = []
        for batch in window:
            ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
            out = epsilon_dpo_reference(
                policy.model(ids, mask).last_hidden_state, policy.lm_head.weight, labels,
                ref.model(ids, mask).last_hidden_state, ref.lm_head.weight, beta=beta, epsilon=0.05,
            )  # fmt: skip
            (out.loss / len(window)).backward()
            decided.append(out)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step = torch.cat([o.step for o in decided]).double()
        steps.append({"loss": torch.stack([o.loss for o in decided]).mean().item(), "beta": beta, "step": step})
        beta /= 1 + 0.05 * step.mean().item()
    steps.append({"beta": beta, "policy": policy})
    return steps


@pytest.mark.parametrize("accepts", [True, False], ids=["", "a model that takes no num_items_in_batch"])
def test_a_run_is_the_loop_written_out(tiny, tmp_path, accepts, monkeypatch):
    # By which transformers before 5.19 decides whether to divide the loss by the number of micro-batches.
    monkeypatch.setattr(transformers.LlamaForCausalLM, "accepts_loss_kwargs", accepts, raising=False)
    more = {"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0}
    trainer = main(flags(tiny, tmp_path, **more))
    truth = by_hand(tiny, trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == len(truth) - 1 == 8
    for entry, step, after in zip(log, truth, truth[1:], strict=False):
        assert entry["loss"] == pytest.approx(step["loss"], abs=2e-5)
        assert entry["beta/running"] == pytest.approx(after["beta"], rel=1e-5)
        for name, sign in (("relaxed", 1), ("kept", 0), ("tightened", -1)):
            assert entry[f"beta/{name}"] == pytest.approx((step["step"] == sign).double().mean().item())
    assert log[-1]["beta/running"] != pytest.approx(0.1, rel=1e-3)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    for ours, theirs in zip(trainer.model.parameters(), truth[-1]["policy"].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_metrics_of_evaluation(tiny, tmp_path):
    trainer = main(flags(tiny, tmp_path, eval_fraction=0.25, max_steps=2, per_device_eval_batch_size=5))
    beta = trainer.loss_fn.beta.clone()
    metrics = trainer.evaluate()
    batch = Collator(0)(list(trainer.eval_dataset))
    ref = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    inputs = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        out = epsilon_dpo_reference(
            trainer.model.model(*inputs).last_hidden_state, trainer.model.lm_head.weight, batch["labels"],
            ref.model(*inputs).last_hidden_state, ref.lm_head.weight, beta=beta, epsilon=0.05,
        )  # fmt: skip
    expected = {
        "rewards/chosen": out.chosen_rewards, "rewards/margins": out.chosen_rewards - out.rejected_rewards,
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).float(), "logps/rejected": out.rejected_logps,
        "kl/chosen": out.chosen_kl, "beta/relaxed": (out.step == 1).float(), "beta/used": out.beta,
        "entropy": (out.chosen_entropy + out.rejected_entropy) / 2,
    }  # fmt: skip
    for name, values in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-6), name
    assert torch.equal(trainer.loss_fn.beta, beta) and trainer.loss_fn.counts.sum() == 0


def test_held_out_pairs_of_another_file_keep_their_ids(tiny, tmp_path):
    """Rows of two files are numbered alike."""
    lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:30]), ("held_out", lines[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    more = {"dataset": tmp_path / "train.jsonl", "eval_dataset": tmp_path / "held_out.jsonl", "max_steps": 5}
    trainer = main(flags(tiny, tmp_path / "run", **more))
    rows = read(tmp_path / "run" / "record").to_pandas()
    for split, data in (("train", trainer.train_dataset.pairs), ("eval", trainer.eval_dataset.pairs)):
        ids = dict(zip(data["row"], data["pair_id"], strict=True))
        ours = rows[rows.split == split]
        assert len(ours) == {"train": 30, "eval": 18}[split]
        assert ours.pair_id.tolist() == [ids[row] for row in ours.row]


def test_a_veto_is_on_record(tiny, tmp_path):
    main([*flags(tiny, tmp_path, eval_fraction=0.25), "--veto", "kl=0.02"])
    rows = read(tmp_path / "record").to_pandas()
    check = np.where((rows.relaxed_shift > 0) & (rows.tightened_shift < 0), 1, 0)
    over = rows.chosen_kl + rows.rejected_kl > 0.02
    assert (rows.vetoed == ((check == 1) & over)).all() and rows.vetoed.sum() > 2
    assert ((check == 1) & ~over).sum() > 2
    assert (rows.decision[rows.vetoed] == 0).all() and (rows.beta_used == rows.beta)[rows.vetoed].all()


def test_a_veto_of_another_name_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="veto: got 'margin=3', takes entropy=NATS and kl=NATS"):
        main([*flags(tiny, tmp_path), "--veto", "margin=3"])


def test_lora_takes_the_base_as_reference(tiny, tmp_path):
    pytest.importorskip("peft", reason="the trainer's extra is not installed")
    trainer = main(flags(tiny, tmp_path, lora_r=4, max_steps=6))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["kl/chosen"] == 0 and log[0]["beta/kept"] == 1  # at the start the policy is the reference
    assert log[-1]["kl/chosen"] > 0
    trained = {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained <= {"lora_A", "lora_B"}


def test_lora_on_all_linear_layers_but_the_head(tiny, tmp_path):
    pytest.importorskip("peft", reason="the trainer's extra is not installed")
    found = []
    for name, more in (("a", {}), ("b", {"lora_target_modules": "all-linear"})):
        trainer = main(flags(tiny, tmp_path / name, lora_r=4, max_steps=1, **more))
        found.append({n.split(".")[-4] for n, p in trainer.model.named_parameters() if p.requires_grad})
    attention, mlp = {f"{x}_proj" for x in "qkvo"}, {f"{x}_proj" for x in ("gate", "up", "down")}
    assert found == [attention | mlp] * 2


@pytest.mark.parametrize(
    "names, said",
    [
        ("q_proj w_proj", "LlamaForCausalLM has no layer w_proj"),
        ("all-linear q_proj", "LlamaForCausalLM has no layer all-linear"),
        ("w_proj", "Target modules {'w_proj'} not found"),
    ],
)
def test_lora_on_a_layer_that_is_not_there_is_refused(tiny, tmp_path, names, said):
    """Also beside one that is there."""
    pytest.importorskip("peft", reason="the trainer's extra is not installed")
    got = names.replace(" ", ", ")
    with pytest.raises(
        ValueError, match=rf"lora_target_modules: got {got}, .* linear ones are down_proj, .*, v_proj\. {said}"
    ):
        main([*flags(tiny, tmp_path, lora_r=4), "--lora_target_modules", *names.split()])


def test_lora_on_experts_by_the_names_of_their_checkpoints(tiny, tmp_path):
    """Where transformers has joined their weights PEFT finds these by other names."""
    pytest.importorskip("peft.utils.transformers_weight_conversion", reason="PEFT does not know of joined weights")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    adapted = add_lora(model, PairOptions("", "", lora_r=4, lora_target_modules=["w1", "w2", "w3", "q_proj"]))
    trained = {
        name.split(".lora_")[0].split("layers.0.")[1] for name, p in adapted.named_parameters() if p.requires_grad
    }
    assert trained == {"self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer"}


def test_a_lora_adapter_on_the_head_is_refused(tiny, tmp_path):
    pytest.importorskip("peft", reason="the trainer's extra is not installed")
    with pytest.raises(ValueError, match="An adapter on the head"):
        main([*flags(tiny, tmp_path, lora_r=4), "--lora_target_modules", "lm_head", "q_proj"])


def test_yaml_and_flags(tiny, tmp_path):
    names = [flag[2:].split("=", 1) for flag in flags(tiny, tmp_path / "a", max_steps=1)]
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in names))
    trainer = main([str(tmp_path / "run.yaml"), "--beta=0.3"])
    assert trainer.state.global_step == 1 and trainer.args.learning_rate == 1e-3
    assert trainer.state.log_history[0]["beta/used"] == pytest.approx(0.3)
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    assert facts["options"]["beta"] == 0.3 and facts["data"]["train"]["kept"] == 48 and facts["ranks"] == 1


def test_not_finite_stops_with_names(tiny, tmp_path):
    trainer = main(flags(tiny, tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1))
    trainer.args.max_steps = 3
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = torch.nan
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NotFiniteError, match=r"step 1: the loss of the pairs at rows \[.*\] of the data is not finite"):
        trainer.train()
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
    # The run that began anew saved nothing, and set aside what the one before had.
    assert last_checkpoint(tmp_path / "a") is None
    assert last_checkpoint(tmp_path / "a" / "earlier-1").name == "checkpoint-1"


@pytest.mark.parametrize("steps", [5, 3])
def test_a_run_that_is_done_makes_no_more_steps(tiny, tmp_path, capsys, steps):
    """Its end is within an epoch, and at or past the last step that is asked for."""
    more = {"save_strategy": "steps", "save_steps": 5}
    main(flags(tiny, tmp_path / "a", max_steps=5, **more))
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.safetensors")}
    assert len(before) > 2
    trainer = main(flags(tiny, tmp_path / "a", max_steps=steps, **more, resume_from_checkpoint="last"))
    assert (
        trainer.state.global_step == 5
        and f"has 5 steps of {steps}: nothing is left to train" in capsys.readouterr().out
    )
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.safetensors")} == before
    assert audit(tmp_path / "a").ok
    trainer = main(flags(tiny, tmp_path / "a", max_steps=6, **more, resume_from_checkpoint="last"))
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("name, value, was", [
    ("learning_rate", 1e-5, 1e-3), ("weight_decay", 0.3, 0.0), ("optim", "sgd", "adamw_torch_fused"),
    ("bf16", True, False), ("lr_scheduler_type", "linear", "cosine"), ("max_grad_norm", 0.5, 1.0),
])  # fmt: skip
def test_steps_are_what_the_checkpoint_was_made_with(tiny, tmp_path, name, value, was):
    """Of optimizer and schedule the checkpoint's would go on, and run.json would hold the others."""
    more = {"save_strategy": "steps", "save_steps": 2}
    main(flags(tiny, tmp_path / "a", max_steps=2, **more))
    record = {path: path.read_bytes() for path in (tmp_path / "a" / "record").iterdir()}
    with pytest.raises(ValueError, match=rf"with other settings \({name} was .*, is "):
        main(flags(tiny, tmp_path / "a", max_steps=4, **more | {name: value}, resume_from_checkpoint="last"))
    assert {path: path.read_bytes() for path in (tmp_path / "a" / "record").iterdir()} == record


@pytest.mark.parametrize("own", [{}, {"lora_r": 4}], ids=["a second model", "the base"])
def test_a_reference_that_has_changed_is_refused(tiny, tmp_path, own):
    model = shutil.copytree(tiny, tmp_path / "model")
    more = {"model": model, "save_strategy": "steps", "save_steps": 2} | own
    main(flags(tiny, tmp_path / "a", max_steps=2, **more))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"with other settings \(frozen_weights was '[0-9a-f]{16}', is '[0-9a-f]{16}'\)"
    ):
        main(flags(tiny, tmp_path / "a", max_steps=4, **more, resume_from_checkpoint="last"))
    with pytest.raises(ValueError, match="output_dir: got .*model, the folder of model, takes another"):
        main(flags(tiny, model, max_steps=2, **more))


def test_weights_in_16_bits(tiny, tmp_path, capsys):
    main(flags(tiny, tmp_path / "a", max_steps=1, dtype="bfloat16"))
    said = "weights: in bfloat16, which keeps 8 bits: a step of learning_rate=0.001 is lost in weights above 0.3."
    assert said in capsys.readouterr().out
    main(flags(tiny, tmp_path / "b", max_steps=1, bf16=True))
    assert "weights: in" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="model: got weights in float16 that train, takes float32"):
        main(flags(tiny, tmp_path / "c", max_steps=1, dtype="float16"))
    with pytest.raises(ValueError, match="fp16: got True on a CPU, takes bf16"):
        main(flags(tiny, tmp_path / "d", max_steps=1, fp16=True))


def test_a_gradient_that_is_not_finite_stops(tiny, tmp_path):
    trainer = main(flags(tiny, tmp_path / "a", max_steps=1))
    trainer.args.max_steps = 2
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NotFiniteError, match="step 1: the losses are finite, and the norm of their gradient is"):
        trainer.train()
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", ["eps-dpo", "tr-dpo"])
def test_the_best_model_comes_with_its_beta_and_reference(tiny, tmp_path, method):
    """Evaluated after training it gives what it gave when it was found."""
    more = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "eval_fraction": 0.25}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "logps/rejected", "greater_is_better": True}
    trainer = main(flags(tiny, tmp_path, method=method, learning_rate=1e-2, **more, **best))
    log = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    assert list(log) == [2, 4, 6] and trainer.state.best_global_step == 2
    now = trainer.evaluate()
    for name in (
        "eval_loss",
        "eval_rewards/margins",
        "eval_kl/chosen",
        *(["eval_beta/running"] * (method == "eps-dpo")),
    ):
        assert now[name] == pytest.approx(log[2][name], rel=1e-6) != pytest.approx(log[6][name], rel=1e-6)
    trainer.record.close()
    found = audit(tmp_path)
    assert found.ok, str(found)
    rows = found.table.to_pandas().query("split == 'eval'")
    assert rows.groupby(["step", "policy_step"]).size().to_dict() == {(2, 2): 12, (4, 4): 12, (6, 2): 12, (6, 6): 12}


def test_a_metric_that_no_evaluation_gives_is_refused(tiny, tmp_path):
    """At the start, with those that one gives."""
    more = {"eval_fraction": 0.25, "max_steps": 1}
    with pytest.raises(ValueError, match="metric_for_best_model: got 'accuracy', takes one of loss, ") as refusal:
        main(flags(tiny, tmp_path / "a", metric_for_best_model="accuracy", **more))
    trainer = main(flags(tiny, tmp_path / "b", metric_for_best_model="eval_rewards/accuracies", **more))
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    logged = {name for name in entry if name.startswith("eval_")}
    timed = {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
    named = str(refusal.value).split(" takes one of ")[1].split(", ")
    assert {f"eval_{name}" for name in named} == logged - timed and len(set(named)) == len(named)


def test_a_second_run_into_a_folder_is_refused(tiny, tmp_path):
    arguments = flags(tiny, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    main(arguments)
    with pytest.raises(ValueError, match="already holds a run"):
        main(arguments)


@pytest.mark.parametrize(
    "asked, said",
    [
        ("nowhere", "got .*nowhere, which is no complete checkpoint: it has no readable trainer_state.json"),
        ("model", "got .*model, which is no complete checkpoint"),
        ("checkpoint-9", "got .*checkpoint-9, which is no complete checkpoint"),
        ("other/checkpoint-1", "got .*other/checkpoint-1 of another run than output_dir"),
    ],
)
def test_what_is_no_checkpoint_is_not_resumed(tiny, tmp_path, asked, said):
    more = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for run in (tmp_path, tmp_path / "other"):
        main(flags(tiny, run, **more))
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9')
    before = read(tmp_path / "record")
    with pytest.raises(ValueError, match=said):
        main(flags(tiny, tmp_path, **more, resume_from_checkpoint=tmp_path / asked))
    assert read(tmp_path / "record").equals(before)


def test_a_checkpoint_by_its_path_whatever_it_is_called(tiny, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 4}
    whole = main(flags(tiny, tmp_path / "run", **more))
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "kept")
    cut = main(flags(tiny, tmp_path / "again", **more, resume_from_checkpoint=f"{tmp_path / 'kept'}/"))
    ours, theirs = (read(tmp_path / name / "record").to_pandas() for name in ("again", "run"))
    assert ours.equals(theirs[theirs.step > 4].reset_index(drop=True))
    for p, q in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_killed_before_its_first_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """The record is there, a checkpoint is not: begun anew it is the run that was never killed, and loses nothing."""
    more = {"save_strategy": "steps", "save_steps": 2}
    main(flags(tiny, tmp_path / "whole", **more))
    arguments, last = flags(tiny, tmp_path / "run", **more), "--resume_from_checkpoint=last"
    for attempt in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, "_save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                main([*arguments, *([last] if attempt > 1 else [])])
        with pytest.raises(ValueError, match="already holds a run .which left no checkpoint.*last to begin it anew"):
            main(arguments)
    capsys.readouterr()
    main([*arguments, last])
    said = "has no complete checkpoint, the run begins anew; what was on record is in "
    assert f"{tmp_path / 'run'} {said}{tmp_path / 'run' / 'earlier-2'}" in capsys.readouterr().out
    whole = read(tmp_path / "whole" / "record")
    assert read(tmp_path / "run" / "record").equals(whole)
    for name in ("earlier-1", "earlier-2"):
        kept = read(tmp_path / "run" / name / "record")
        assert len(kept) == 12 and kept.equals(whole.slice(0, 12))


def test_nothing_to_resume_begins(tiny, tmp_path, capsys):
    """So a job that always says `last` can be started."""
    trainer = main([*flags(tiny, tmp_path / "run", max_steps=1), "--resume_from_checkpoint=last"])
    assert trainer.state.global_step == 1
    assert f"{tmp_path / 'run'} has no complete checkpoint, the run begins anew\n" in capsys.readouterr().out


def test_a_complete_run_without_checkpoints_is_left_alone(tiny, tmp_path):
    arguments = flags(tiny, tmp_path, max_steps=1)
    main(arguments)
    with pytest.raises(ValueError, match="output_dir: .* already holds a run .complete.; give another folder$"):
        main(arguments)
    with pytest.raises(ValueError, match="is complete and left no checkpoint; give another output_dir"):
        main([*arguments, "--resume_from_checkpoint=last"])
    assert (tmp_path / "model.safetensors").exists() and len(read(tmp_path / "record")) == 6


@pytest.mark.parametrize("more", [{"eval_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "epoch"}, {}])
def test_the_last_step_is_evaluated_once(tiny, tmp_path, more):
    more = more | {"eval_fraction": 0.25, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2}
    arguments = flags(tiny, tmp_path, **more)
    trainer = main(arguments)
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == sorted(set(evaluated)) and evaluated[0] == 0 and evaluated[-1] == trainer.state.global_step == 6
    rows = read(tmp_path / "record").to_pandas().query("split == 'eval'")
    assert rows.groupby("step").size().to_dict() == {step: 12 for step in evaluated}
    assert rows.groupby("step").micro.max().tolist() == [1] * len(evaluated)  # 12 pairs in batches of 8
    # Gone on with, from in between and from its end, it is the same record and log.
    before = read(tmp_path / "record")
    for gone in (["checkpoint-6", "trainer_state.json"], []):
        for path in (tmp_path / name for name in gone):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = main([*arguments, "--resume_from_checkpoint=last"])
        assert read(tmp_path / "record").equals(before)
        assert [entry["step"] for entry in again.state.log_history if "eval_loss" in entry] == evaluated


def test_an_epoch_is_evaluated_before_its_checkpoint(tiny, tmp_path):
    """A run that is cut right there has the evaluation, which it would not make again."""
    more = {"eval_fraction": 0.25, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 6}
    whole = main(flags(tiny, tmp_path / "whole", **more, num_train_epochs=2))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-12")
    cut = main([*flags(tiny, tmp_path / "cut", **more, num_train_epochs=2), "--resume_from_checkpoint=last"])
    logs = [[(e["step"], e["eval_loss"]) for e in t.state.log_history if "eval_loss" in e] for t in (whole, cut)]
    assert [step for step, _ in logs[0]] == [6, 12] and logs[0] == logs[1]
    assert read(tmp_path / "cut" / "record").equals(read(tmp_path / "whole" / "record"))


def test_epochs_are_evaluated_after_eval_delay(tiny, tmp_path):
    more = {"eval_fraction": 0.25, "eval_strategy": "epoch", "eval_delay": 2, "num_train_epochs": 3}
    trainer = main(flags(tiny, tmp_path, **more))
    assert [e["epoch"] for e in trainer.state.log_history if "eval_loss" in e] == [2, 3]


def test_what_is_wrong_is_said_in_a_line(tiny, tmp_path):
    command = [sys.executable, "-m", "train", *flags(tiny, tmp_path / "run", model=tmp_path / "nowhere")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "nowhere" in done.stderr


def test_killed_and_resumed(tiny, tmp_path):
    """SIGKILL in the middle, then resumed: the same steps and the same β as a run left alone."""

    def command(run):
        more = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 5, "save_total_limit": 2}
        return [sys.executable, "-m", "train", *flags(tiny, run, **more)]

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while last_checkpoint(tmp_path / "killed") is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = last_checkpoint(tmp_path / "killed")
    assert cut is not None and not (tmp_path / "killed" / "trainer_state.json").exists(), "killed too late"
    # A checkpoint that the kill cut short must be passed over.
    (tmp_path / "killed" / "checkpoint-999").mkdir()
    (tmp_path / "killed" / "checkpoint-999" / "trainer_state.json").write_text('{"global_step": 9')
    subprocess.run(
        [*command(tmp_path / "killed"), "--resume_from_checkpoint=last"], cwd=ROOT, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip

    def history(run):
        log = json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"]
        names = ("loss", "beta/running", "beta/relaxed", "beta/tightened", "kl/chosen", "logps/chosen")
        return [[entry[n] for n in ("step", *names)] for entry in log if "loss" in entry]

    whole, resumed = history("whole"), history("killed")
    assert len(whole) == 40 and whole == resumed
    assert whole[-1][2] != pytest.approx(0.1, rel=1e-3)
    # The record has neither gap nor double, and says the same.
    assert read(tmp_path / "whole" / "record").equals(read(tmp_path / "killed" / "record"))


def test_record_is_what_was_decided(tiny, tmp_path):
    trainer = main(flags(tiny, tmp_path, eval_fraction=0.25, label_smoothing=0.1))
    rows = read(tmp_path / "record").to_pandas()
    train = rows[rows.split == "train"]
    assert len(train) == 36 and train.row.is_unique and len(rows) == 48
    assert train.groupby("step").size().tolist() == [6] * 6
    assert train.groupby("step").micro.nunique().tolist() == [2] * 6
    ids = {row["row"]: row for data in (trainer.train_dataset, trainer.eval_dataset) for row in data.pairs}
    for _, pair in rows.iterrows():
        assert ids[pair.row]["pair_id"] == pair.pair_id
        assert len(ids[pair.row]["chosen_ids"]) == pair.chosen_tokens
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (_, step) in zip(log, train.groupby("step"), strict=True):
        assert step.loss.mean() == pytest.approx(entry["loss"], abs=1e-4)
        assert (step.decision == 1).mean() == pytest.approx(entry["beta/relaxed"])
        assert step.beta_used.values == pytest.approx((step.beta / (1 + 0.05 * step.decision)).values, rel=1e-6)
    z = train.beta_used * train.margin
    slope = 0.9 / (1 + np.exp(z)) - 0.1 / (1 + np.exp(-z))
    assert train.coefficient.values == pytest.approx((train.beta_used * slope).values, rel=1e-4)
