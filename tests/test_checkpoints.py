"""From which checkpoint a run goes on, and when it may: python -m train and TRL's trainer alike."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
peft = pytest.importorskip("peft", reason="the trainer's extra is not installed")
datasets = pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("trl", reason="the extra 'trl' is not installed")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import trl_runs  # noqa: E402
from epsdpo_kernels.integrations.checkpoints import (  # noqa: E402
    as_metadata,
    check_settings,
    checkpoint_of,
    checkpoint_step,
    run_settings,
)
from epsdpo_kernels.integrations.trl import EpsilonDPOConfig, EpsilonDPOTrainer  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402

EVERY_2 = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def by_train(tiny, run, resume=None, **more):
    """A run of python -m train; ``resume`` is "last" or a folder."""
    if resume:
        more["resume_from_checkpoint"] = resume
    return main(flags(tiny, run, **EVERY_2 | more))


def by_trl(tiny, run, resume=None, data=None, peft_config=None, ref_model=None, **more):
    more = EVERY_2 | {"num_train_epochs": 1, "max_steps": -1, "gradient_accumulation_steps": 2, "epsilon": 0.05} | more
    trainer = EpsilonDPOTrainer(
        trl_runs.model(tiny), ref_model, args=EpsilonDPOConfig(**trl_runs.options(run, **more)),
        train_dataset=data or trl_runs.pairs(tiny), processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    trainer.save_state()
    return trainer


BOTH = pytest.mark.parametrize("train", [by_train, by_trl])


def killed_after(step, monkeypatch, run):
    """Stops a run before the optimizer step that follows."""
    with monkeypatch.context() as patch:
        plain = transformers.Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return plain(self, *args, **kwargs)

        patch.setattr(transformers.Trainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run()


@BOTH
def test_the_last_checkpoint_is_of_the_run_that_goes_on(tiny, tmp_path, monkeypatch, train):
    """Not of one that was given up: begun again at step 2 on another schedule, and killed before its own 4."""
    run, other = tmp_path / "run", {"max_steps": 7}
    train(tiny, run)
    later = [f"checkpoint-{step}" for step in (4, 6, 8)]
    with pytest.warns(UserWarning, match=f"{later[0]}, {later[1]}, {later[2]}, .* of steps past 2, .* in .*earlier-1"):
        killed_after(3, monkeypatch, lambda: train(tiny, run, run / "checkpoint-2", **other))
    assert sorted(path.name for path in (run / "earlier-1").iterdir()) == [*later, "trainer_state.json"]
    found = audit(run)
    assert found.ok and found.steps == 3, str(found)  # what the abandoned run has done is not asked of this one
    trainer = train(tiny, run, "last", **other)
    found = audit(run)
    assert found.ok and found.steps == 7 == trainer.state.global_step, str(found)

    whole = tmp_path / "whole"
    train(tiny, whole)
    train(tiny, whole, whole / "checkpoint-2", **other)
    assert read(run / "record").equals(read(whole / "record"))


def test_trl_a_run_begun_anew_is_not_resumed_as_the_one_before(tiny, tmp_path, monkeypatch):
    by_trl(tiny, tmp_path)
    with pytest.warns(UserWarning, match="of steps past 0"):
        killed_after(3, monkeypatch, lambda: by_trl(tiny, tmp_path, learning_rate=1e-2))
    before = audit(tmp_path / "earlier-1")
    assert before.ok and before.steps == 8 and (tmp_path / "earlier-1" / "checkpoint-8").is_dir()
    assert by_trl(tiny, tmp_path, "last", learning_rate=1e-2).state.global_step == 8
    found = audit(tmp_path)
    assert found.ok and found.steps == 8 and not found.limits, str(found)


def test_trl_checkpoints_of_other_trainers_stay(tiny, tmp_path):
    """A policy's own may be in the folder, and its adapter names it."""
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}')
    by_trl(tiny, tmp_path, max_steps=1)
    assert (tmp_path / "checkpoint-9").is_dir()


OTHER = {
    "epsilon": 0.2, "beta": 0.5, "label_smoothing": 0.3, "beta_update": "mean-beta", "seed": 4,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 12,
}  # fmt: skip


@BOTH
def test_a_run_of_other_settings_is_not_gone_on_with(tiny, tmp_path, train):
    run, first = tmp_path / "run", {"max_steps": 2}
    rows = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)[::-1]
    (tmp_path / "other.jsonl").write_text("".join(rows))
    tried = {name: ({name: value}, f"{name} was .*, is {value!r}") for name, value in OTHER.items()}
    data = {"data": datasets.Dataset.from_list([json.loads(row) for row in rows])}
    if train is by_train:
        first |= {"lora_r": 2}
        data = {"dataset": tmp_path / "other.jsonl"}
        tried["method"] = {"method": "dpo"}, "method was 'eps-dpo', is 'dpo'"
        tried["lora_alpha"] = {"lora_alpha": 8}, "lora_alpha was 32, is 8"
    tried["data"] = data, "dataset was '48 pairs, .*', is '48 pairs, "
    train(tiny, run, **first)
    facts, record = (run / "run.json").read_bytes(), read(run / "record")
    for more, said in tried.values():
        with pytest.raises(ValueError, match=f"got .*checkpoint-2 of a run with other settings .*{said}"):
            train(tiny, run, "last", **first | {"max_steps": 4} | more)
    assert (run / "run.json").read_bytes() == facts
    assert read(run / "record").equals(record) and audit(run).ok


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OTHER_ADAPTERS = {
    "lora_alpha": (LORA | {"lora_alpha": 64}, "peft_config.lora_alpha was 8, is 64"),
    "r": (LORA | {"r": 2}, "peft_config.r was 4, is 2"),
    "target_modules": (
        LORA | {"target_modules": ["q_proj"]},
        r"peft_config.target_modules was \['q_proj', 'v_proj'\], is \['q_proj'\]",
    ),
    "none": (None, "peft_config was 'LoraConfig', is None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_trl_a_run_of_another_adapter_is_not_gone_on_with(tiny, tmp_path, kind):
    """Before anything is loaded: some would go on with other weights, or fail in words of torch's."""
    other, said = OTHER_ADAPTERS[kind]
    by_trl(tiny, tmp_path, max_steps=2, peft_config=peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match=f"got .*checkpoint-2 of a run with other settings .*{said}"):
        by_trl(tiny, tmp_path, "last", max_steps=4, peft_config=other and peft.LoraConfig(**other))
    again = by_trl(tiny, tmp_path, "last", max_steps=4, peft_config=peft.LoraConfig(**LORA))
    assert again.state.global_step == 4


def test_trl_a_run_of_a_reference_with_another_adapter_is_not_gone_on_with(tiny, tmp_path):
    def reference(alpha):
        model = peft.get_peft_model(trl_runs.model(tiny), peft.LoraConfig(**LORA | {"lora_alpha": alpha}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.01)
        return model

    by_trl(tiny, tmp_path, max_steps=2, ref_model=reference(4))
    with pytest.raises(ValueError, match="other settings .ref_model.peft_config.lora_alpha was 4, is 64"):
        by_trl(tiny, tmp_path, "last", max_steps=4, ref_model=reference(64))


def test_an_adapter_that_was_changed_in_its_folder_is_not_gone_on_with(tiny, tmp_path):
    model = peft.get_peft_model(trl_runs.model(tiny), peft.LoraConfig(**LORA))
    model.base_model.name_or_path = model.peft_config["default"].base_model_name_or_path = str(tiny)
    folder = tmp_path / "sft"
    model.save_pretrained(folder)
    by_train(tiny, tmp_path / "run", model=folder, max_steps=2)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 64}))
    with pytest.raises(ValueError, match="other settings .peft_config.lora_alpha was 8, is 64"):
        by_train(tiny, tmp_path / "run", "last", model=folder, max_steps=4)


@BOTH
def test_what_does_not_change_a_pairs_figures_may_change(tiny, tmp_path, train):
    train(tiny, tmp_path, max_steps=2)
    more = {"max_steps": 4, "packed": False, "max_tokens_per_batch": 64, "save_steps": 1}
    assert train(tiny, tmp_path, "last", **more).state.global_step == 4
    found = audit(tmp_path)
    assert found.ok and found.steps == 4, str(found)


def cut(checkpoint, how):
    state = checkpoint / "trainer_state.json"
    if how == "in its last file":
        state.write_text(state.read_text()[:50])
        return
    for path in checkpoint.iterdir():
        if path.name not in ("loss.safetensors", "epsilon_dpo.safetensors"):
            path.unlink()


@BOTH
@pytest.mark.parametrize("how", ["in its last file", "after β"])
def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tiny, tmp_path, train, how):
    run = tmp_path / "run"
    whole = train(tiny, run, max_steps=6)
    record = read(run / "record")
    cut(run / "checkpoint-6", how)
    with pytest.raises(ValueError, match="got .*checkpoint-6, which is no complete checkpoint"):
        train(tiny, run, str(run / "checkpoint-6"), max_steps=6)
    with pytest.warns(UserWarning, match="checkpoint-6 in .*, cut short by a kill, passed over"):
        again = train(tiny, run, "last", max_steps=6)
    assert again.state.global_step == 6 and read(run / "record").equals(record)
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("state", ['{"global_step": 9', '{"global_step": 1e999}', "[" * 100_000, "[9]", "{}"])
def test_a_state_that_counts_no_steps_is_of_no_checkpoint(tmp_path, state):
    (tmp_path / "trainer_state.json").write_text(state)
    assert checkpoint_step(tmp_path) is None
    with pytest.raises(ValueError, match=f"got {tmp_path}, which is no complete checkpoint"):
        checkpoint_of(tmp_path, tmp_path)


def test_trl_without_a_complete_checkpoint_nothing_is_resumed(tiny, tmp_path):
    by_trl(tiny, tmp_path, max_steps=2)
    cut(tmp_path / "checkpoint-2", "after β")
    with pytest.raises(ValueError, match="resume_from_checkpoint: got True, but .* has no complete checkpoint"):
        by_trl(tiny, tmp_path, "last")


@BOTH
def test_a_checkpoint_of_another_version_is_refused(tiny, tmp_path, train):
    """Before anything of it is loaded: its counts were a tensor of another name."""
    train(tiny, tmp_path, max_steps=2)
    [state] = set((tmp_path / "checkpoint-2").glob("*.safetensors")) - {tmp_path / "checkpoint-2" / "model.safetensors"}
    with safe_open(state, "pt") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file({"counts" if name == "_extra_state" else name: held[name] for name in held}, state, metadata)
    with pytest.raises(ValueError, match="checkpoint-2, whose .* holds beta, counts.*, takes one that holds _extra_st"):
        train(tiny, tmp_path, "last", max_steps=4)


def test_ranks_that_share_a_row_are_a_setting(tmp_path, monkeypatch):
    """As many processes with another sp_size are another number of batches."""
    args = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    one = run_settings(args, {}, "pair_id")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    two = run_settings(args, {}, "pair_id")
    assert (one["sp_size"], two["sp_size"]) == (1, 2)
    metadata = as_metadata(one)
    save_file({"beta": torch.ones(())}, tmp_path / "state.safetensors", metadata)
    check_settings(tmp_path / "state.safetensors", one, ["beta"])
    with pytest.raises(ValueError, match="other settings .sp_size was 1, is 2., takes one with the same"):
        check_settings(tmp_path / "state.safetensors", two, ["beta"])
