"""Rows whose tokens are on several ranks against whole rows: the exchange, models, and both trainers in one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("trl", reason="the extra 'trl' is not installed")

from accelerate import ParallelismConfig  # noqa: E402

from epsdpo_kernels.integrations.batches import PackedBatches  # noqa: E402
from epsdpo_kernels.integrations.sequence import SharedRows, sequence_ranks  # noqa: E402
from runs import flags  # noqa: E402
from test_distributed import assert_same_run, cut, launch, sharded  # noqa: E402
from test_trl_distributed import FSDP2, run, same, same_record  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.options import TrainingArguments  # noqa: E402

ROOT = Path(__file__).parent.parent


def test_shared_rows_are_whole_rows(tmp_path):
    subjects = ("attended", "models", "measured", "differ")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4",
        str(ROOT / "tests" / "sequence_worker.py"), str(tmp_path), *subjects,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(4):
        worst = json.loads((tmp_path / f"{rank}.json").read_text())
        assert worst.keys() == set(subjects) and max(worst.values()) < 1e-10, (rank, worst)


def shared(ranks: int) -> str:
    return f'--parallelism_config={{"sp_size": {ranks}}}'


@pytest.mark.parametrize("processes, ranks, how, more", [
    (4, 4, "ddp", {"gradient_checkpointing": True, "include_num_input_tokens_seen": True}),
    (4, 2, "ddp", {"eval_fraction": 0.25, "per_device_eval_batch_size": 3, "cache_reference": "cache"}),
    (4, 2, "fsdp", {"lora_r": 4, "max_tokens_per_batch": 35}),
], ids=["a row on four", "two by two, evaluated, cached", "two by two, sharded, lora"])  # fmt: skip
def test_a_run_is_one_process(tiny, tmp_path, processes, ranks, how, more):
    """43 pairs leave 1 for the last batches of 3, so that a second batch is a blank of one token."""
    more |= {"dataset": cut(tiny, tmp_path, 43)}
    if "cache_reference" in more:
        more["cache_reference"] = tmp_path / "cache"
    batches = processes // ranks
    main(flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2))
    ours = flags(tiny, tmp_path / "two", **more, gradient_accumulation_steps=2 // batches)
    ours += [shared(ranks), *(sharded(tmp_path) if how == "fsdp" else [])]
    (tmp_path / "flags.json").write_text(json.dumps(ours))
    launch(processes, how, tmp_path)
    trained = 43 - round(43 * more.get("eval_fraction", 0))
    assert_same_run(tmp_path / "two", tmp_path / "one", -(-trained // 6), ranks=set(range(batches)))
    if batches == 1:
        states = [json.loads((tmp_path / run / "trainer_state.json").read_text()) for run in ("two", "one")]
        for name in ("num_input_tokens_seen", "total_flos"):
            assert states[0][name] == states[1][name] > 0, name


def test_a_shared_run_goes_on_from_its_checkpoint(tiny, tmp_path):
    more = {"dataset": cut(tiny, tmp_path, 43), "save_strategy": "steps", "save_steps": 3}
    main(flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2))
    two = [*flags(tiny, tmp_path / "two", **more, gradient_accumulation_steps=2), shared(2), *sharded(tmp_path)]
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "fsdp", tmp_path)
    # As a stop between the first checkpoint and the next would leave it.
    for entry in (tmp_path / "two").iterdir():
        if entry.name not in ("checkpoint-3", "record", "run.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (tmp_path / "flags.json").write_text(json.dumps([*two, "--resume_from_checkpoint=last"]))
    launch(2, "fsdp", tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one", 8, ranks={0})


@pytest.mark.parametrize("processes, how", [(4, {}), (2, FSDP2)], ids=["two by two", "sharded"])
def test_trl_is_one_process(tiny, tmp_path, processes, how):
    batches = processes // 2
    more = how | {"gradient_accumulation_steps": 2 // batches, "parallelism_config": {"sp_size": 2}}
    two = run(tmp_path / "two", tiny, processes, 43, per_device_eval_batch_size=3, **more)
    one = run(tmp_path / "one", tiny, 1, 43, per_device_eval_batch_size=3)
    same(two, one)
    assert bool(two[0]["sharded"]) == bool(how)
    if batches == 1:  # with more, accelerate repeats pairs, and transformers' loss of an evaluation counts them
        assert two[0]["evaluation"]["eval_loss"] == pytest.approx(one[0]["evaluation"]["eval_loss"], rel=1e-6)
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", ranks=range(batches))


@pytest.mark.parametrize("sizes, launched, said", [
    ({"sp_size": 3}, {}, "got sp_size=3, dp_replicate_size=1 and dp_shard_size=1 in 4 processes, takes sizes whose"),
    ({"sp_size": 2, "dp_shard_size": 4}, {}, "got sp_size=2, dp_replicate_size=1 and dp_shard_size=4 in 4 processes"),
    ({"sp_size": 2, "dp_replicate_size": 2}, {"fsdp": True}, "got dp_replicate_size=2 with FSDP, takes dp_shard_size"),
    ({"sp_size": 2, "tp_size": 2}, {}, "got sp_size=2 with tp_size=2, takes one of both"),
    ({"sp_size": 2}, {"deepspeed": True}, "got sp_size=2 with DeepSpeed, takes DDP and FSDP2"),
])  # fmt: skip
def test_sizes_that_do_not_fit(sizes, launched, said):
    trainer = SharedRows()
    trainer.accelerator = SimpleNamespace(num_processes=4)
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = launched.get("fsdp"), launched.get("deepspeed")
    with pytest.raises(ValueError, match=f"parallelism_config: {said}"):
        trainer._share_rows(ParallelismConfig(**sizes))


def test_what_is_asked_for(monkeypatch, tmp_path):
    """By `accelerate launch`, and by an option of `python -m train`."""
    given = [None, ParallelismConfig(sp_size=2), '{"sp_size": 2}', {"sp_size": 2}]
    runs = [TrainingArguments(tmp_path, report_to="none", use_cpu=True, parallelism_config=one) for one in given]
    assert [sequence_ranks(args) for args in runs] == [1, 2, 2, 2]
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    assert [sequence_ranks(args) for args in runs] == [4, 2, 2, 2]
    for wrong in ("2", '{"sp": 2}', "{", '{"sp_size": 0}'):
        with pytest.raises(ValueError, match="parallelism_config: got .*, takes accelerate's sizes by name: "):
            TrainingArguments(tmp_path, report_to="none", use_cpu=True, parallelism_config=wrong)


@pytest.mark.parametrize("by_batch, said", [
    (False, "got sp_size=2, takes rows that can be packed: packed is False"),
    (True, "got sp_size with a loss whose β is a batch's, takes none"),
])  # fmt: skip
def test_rows_that_cannot_be_shared(by_batch, said):
    trainer = PackedBatches()
    trainer.sequence_group, trainer.by_batch = SimpleNamespace(size=lambda: 2), by_batch
    trainer.train_dataset, trainer.eval_dataset = [{}], None
    trainer.args = SimpleNamespace(dataloader_drop_last=False, train_batch_size=1, eval_batch_size=1, world_size=2)
    trainer.get_tp_size = lambda: 1
    with pytest.raises(ValueError, match=f"parallelism_config: {said}"):
        trainer.set_layout([], packed=False, max_tokens=None)
