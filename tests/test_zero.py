"""DeepSpeed's ZeRO in two processes on gloo against one process without it: decisions, β, losses and weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-zero")


from epsdpo_kernels.record import read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from runs import flags  # noqa: E402
from test_distributed import assert_same_run, cut, launch, log_of  # noqa: E402
from train.__main__ import main  # noqa: E402


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def zero(folder: Path, stage: int, **more) -> dict:
    """Flags of DeepSpeed. Every weight is split, however small; none is kept to be used again."""
    config = {
        "zero_optimization": {
            "stage": stage, "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
        },
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    } | more  # fmt: skip
    (folder / "zero.json").write_text(json.dumps(config))
    # accelerate does not look for DeepSpeed where it is told to use the CPU.
    return {"deepspeed": folder / "zero.json", "use_cpu": False}


def tied(tiny: Path, folder: Path) -> Path:
    """The tiny model with its embeddings as its head."""
    model = shutil.copytree(tiny, folder / "tied")
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    return model


@pytest.mark.parametrize("stage, is_tied, more", [
    (1, False, {"max_tokens_per_batch": 35}),
    (2, True, {}),
    (3, False, {"gradient_checkpointing": True, "eval_fraction": 0.25, "eval_on_start": True}),
    (3, True, {"gradient_accumulation_steps": 2, "max_tokens_per_batch": 35}),
    (3, True, {"lora_r": 4, "gradient_checkpointing": True}),
], ids=["1", "2, tied", "3, checkpointed", "3, tied, accumulated", "3, tied, lora, checkpointed"])  # fmt: skip
def test_zero_is_one_process(tiny, tmp_path, stage, is_tied, more):
    """43 pairs leave 1 for two ranks, so one of them has nothing to score; bounds by tokens cut ranks unlike."""
    more = {"gradient_accumulation_steps": 1, "dataset": cut(tiny, tmp_path, 43)} | more
    if is_tied:
        more["model"] = tied(tiny, tmp_path)
    accumulated = 2 * more["gradient_accumulation_steps"]
    main(flags(tiny, tmp_path / "one", **more | {"gradient_accumulation_steps": accumulated}))
    two = flags(tiny, tmp_path / "two", **more | zero(tmp_path, stage))
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "zero", tmp_path)
    trained = 43 - round(43 * more.get("eval_fraction", 0))
    assert_same_run(tmp_path / "two", tmp_path / "one", -(-trained // (3 * accumulated)))
    assert log_of(tmp_path / "two")[-1]["beta/running"] != pytest.approx(0.1, rel=1e-3)
    assert audit(tmp_path / "two").ok, str(audit(tmp_path / "two"))


def test_a_run_goes_on_from_its_checkpoint(tiny, tmp_path):
    """Weights, DeepSpeed's own optimizer with the schedule that it keeps, β; at the end the best checkpoint's."""
    more = {
        "dataset": cut(tiny, tmp_path, 43), "eval_fraction": 0.1, "save_strategy": "steps", "eval_strategy": "steps",
        "save_steps": 3, "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True,
    }  # fmt: skip
    main(flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2))
    names = ("lr", "betas", "eps", "weight_decay")
    adam = {"type": "AdamW", "params": {"torch_adam": True} | dict.fromkeys(names, "auto")}
    two = flags(tiny, tmp_path / "two", **more | zero(tmp_path, 3, optimizer=adam), gradient_accumulation_steps=1)
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "zero", tmp_path)
    # As a stop between the first checkpoint and the next would leave it.
    for entry in (tmp_path / "two").iterdir():
        if entry.name not in ("checkpoint-3", "record", "run.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (tmp_path / "flags.json").write_text(json.dumps([*two, "--resume_from_checkpoint=last"]))
    launch(2, "zero", tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one", 7)
    assert audit(tmp_path / "two").ok, str(audit(tmp_path / "two"))
    states = [json.loads((tmp_path / run / "trainer_state.json").read_text()) for run in ("one", "two")]
    assert all(state["best_model_checkpoint"].endswith("checkpoint-3") for state in states)


def test_the_reference_is_rounded_as_the_policy(tiny, tmp_path):
    """Which DeepSpeed casts to bf16: until it has moved, the two are the same to the last bit."""
    how = zero(tmp_path, 2, bf16={"enabled": "auto"}) | {"bf16": True, "max_steps": 4}
    (tmp_path / "flags.json").write_text(json.dumps(flags(tiny, tmp_path / "two", **how)))
    launch(2, "zero", tmp_path)
    pairs = read(tmp_path / "two" / "record").to_pandas()
    start, later = pairs[pairs["step"] <= 2], pairs[pairs["step"] > 2]  # the first step of a warm-up moves nothing
    assert not start["decision"].any() and not start["chosen_kl"].any() and later["chosen_kl"].all()


@pytest.mark.parametrize("stage, bf16, said", [(3, False, "Nothing of this step"), (2, True, "DeepSpeed has applied")])
def test_a_gradient_that_is_not_finite_stops_the_run(tiny, tmp_path, stage, bf16, said):
    """After DeepSpeed's step, which it leaves out or makes, and before a checkpoint of what came of it."""
    how = zero(tmp_path, stage, bf16={"enabled": "auto", "check_grad_overflow": False})
    more = how | {"bf16": bf16, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "flags.json").write_text(json.dumps(flags(tiny, tmp_path / "two", **more)))
    launch(2, "broken", tmp_path)
    error = (tmp_path / "error.txt").read_text()
    assert error.startswith("step 2: the losses are finite, and the norm of their gradient is inf. " + said)
    assert [folder.name for folder in (tmp_path / "two").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("stage, lora", [(2, False), (3, False), (3, True)])
def test_trl_is_one_process(tiny, tmp_path, stage, lora):
    """TRL prepares the reference, which it loads in pieces with ZeRO-3; a run that goes on from its checkpoint."""
    pytest.importorskip("trl", reason="the extra 'trl' is not installed")
    import test_trl_distributed as trl

    options = zero(tmp_path, stage) | {"save_strategy": "steps", "save_steps": 3}
    options["deepspeed"] = json.loads(options["deepspeed"].read_text())
    trl.run(tmp_path / "two", tiny, 2, 43, lora, **options)
    two = trl.run(tmp_path / "two", tiny, 2, 43, lora, resume=str(tmp_path / "two" / "run" / "checkpoint-3"), **options)
    assert any("lm_head" in name for name in two[0]["sharded"]) == (stage == 3)
    one = trl.run(tmp_path / "one", tiny, 1, 43, lora)
    trl.same(two, one)
    trl.same_record(tmp_path / "two" / "run", tmp_path / "one" / "run")
    for name, p in one[1].items():
        assert ((two[1][name] - p).norm() / p.norm()).item() < 1e-5, name
