"""DeepSpeed's ZeRO in two processes on gloo against one process without it: decisions, β, losses and weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("deepspeed", reason="the extra 'zero' is not installed: make test-zero")


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
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
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
    trl.same(two, one, resumed=True)
    trl.same_record(tmp_path / "two" / "run", tmp_path / "one" / "run")
    for name, p in one[1].items():
        assert ((two[1][name] - p).norm() / p.norm()).item() < 1e-5, name
