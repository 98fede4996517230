"""EpsilonDPOTrainer in two processes on gloo, by DDP and by FSDP2, against one process: steps, β and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the extra 'trl' is not installed")
pytest.importorskip("peft", reason="the trainer's extra is not installed")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

import trl_runs  # noqa: E402
import trl_worker  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402

ROOT = Path(__file__).parent.parent
FSDP2 = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def launch(processes: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    worker = [str(ROOT / "tests" / "trl_worker.py"), str(folder)]
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def run(
    folder: Path, tiny: Path, processes: int, pairs: int, lora=False, streams=(), masked=(), sees="",
    resume=None, tensor="", shards=1, by_node=False, long=0, given=False, trainings=1, **more,
):  # fmt: skip
    folder.mkdir(exist_ok=True)
    options = trl_runs.options(folder / "run", gradient_accumulation_steps=2 // processes, max_steps=8, epsilon=0.05)
    job = {
        "tiny": str(tiny),
        "options": options | more,
        "pairs": pairs,
        "lora": lora,
        "streams": streams,
        "shards": shards,
        "by_node": by_node,
        "long": long,
        "given": given,
        "trainings": trainings,
        "masked": masked,
        "sees": sees,
        "resume": resume,
        "tensor": tensor,
    }
    (folder / "job.json").write_text(json.dumps(job))
    if processes == 1:
        trl_worker.main(folder)
    else:
        launch(processes, folder)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "weights.safetensors")


def same_record(two: Path, one: Path, limits=(), limits_of_one=(), ranks=(0, 1)) -> None:
    """Every pair once, the repeats of a last batch not at all: what one process writes, but for who computed it."""
    ours, theirs = (
        read(run / "record").to_pandas().sort_values(["split", "step", "row"], ignore_index=True) for run in (two, one)
    )
    for name in ("split", "step", "row", "pair_id", "decision", "chosen_tokens"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    for name in ("beta", "beta_used", "loss"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-5, abs=2e-6), name
    assert set(ours["rank"]) == set(ranks) and set(ours["split"]) == {"train", "eval"}
    for run, expected in ((two, limits), (one, limits_of_one)):
        found = audit(run)
        assert found.ok and [name for name, _ in found.limits] == list(expected), str(found)


def same(two, one, packed=True):
    (ours, our_weights), (theirs, their_weights) = two, one
    assert ours["packed"] == theirs["packed"] == packed
    train = [[e for e in facts["log"] if "loss" in e] for facts in (ours, theirs)]
    assert len(train[0]) == len(train[1]) > 0
    names = ("loss", "kl/beta", "kl/relaxed", "kl/kept", "kl/tightened", "kl/chosen", "rewards/margins", "num_tokens")
    for a, b in zip(*train, strict=True):
        assert [n in a for n in names] == [n in b for n in names]  # of nothing there are no figures
        figures = [[entry[n] for n in names if n in entry] for entry in (a, b)]
        assert figures[0] == pytest.approx(figures[1], rel=5e-4, abs=2e-6), a["step"]
    for name in ("loss", "kl/beta", "kl/relaxed", "rewards/chosen", "logps/rejected"):
        values = [facts["evaluation"][f"eval_{name}"] for facts in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=5e-4, abs=2e-6), name
    assert train[0][-1]["kl/beta"] != pytest.approx(0.1, rel=1e-3)
    assert our_weights.keys() == their_weights.keys()
    for name, p in our_weights.items():
        if name.endswith("k_proj.bias"):  # which all queries add alike: its gradient is rounding
            continue
        torch.testing.assert_close(p, their_weights[name], rtol=1e-3, atol=3e-5, msg=name)


@pytest.mark.parametrize("masked", [(), (0, 1, 3, 5, 7)], ids=["", "masked"])
def test_ddp_is_one_process(tiny, tmp_path, masked):
    """In batches of 3 a rank, 43 pairs leave 1 for two ranks, which accelerate fills up with 5 repeats.

    Where it is masked the first step has nothing to score, and then one rank has nothing for three steps.
    """
    two, one = (run(tmp_path / str(n), tiny, n, 43, masked=masked) for n in (2, 1))
    assert (two[0]["log"][0]["loss"] == 0) == bool(masked)
    same(two, one)
    if not masked:  # of which no pair is in the record, so that the audit misses them
        same_record(tmp_path / "2" / "run", tmp_path / "1" / "run")


def test_a_stream_is_one_process(tiny, tmp_path):
    """Of which nobody knows the length: the repeats that fill its last batch up are known by their places."""
    two = run(tmp_path / "two", tiny, 2, 43, streams=("train", "eval"))
    same(two, run(tmp_path / "one", tiny, 1, 43, train_sampling_strategy="sequential"))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", limits=["stream", "stream"])


def test_a_streamed_evaluation_is_one_process(tiny, tmp_path):
    """Beside training data that are none: every rank makes its batches itself, of which the last has a repeat."""
    more = {"per_device_eval_batch_size": 2, "max_steps": 4}
    two = run(tmp_path / "two", tiny, 2, 19, streams=("eval",), **more)
    same(two, run(tmp_path / "one", tiny, 1, 19, **more))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", limits=["stream"])


def test_streams_in_shards_are_one_process(tiny, tmp_path):
    """Of 6 and 4 pairs and of 4 and 3, which one rank, or worker process, each would have read alone.

    They would come to a pass's end, where all evaluate, at different steps. The run goes on within its third pass.
    """
    more = {
        "streams": ("train", "eval"), "shards": 2, "dataloader_num_workers": 2, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 7,
    }  # fmt: skip
    run(tmp_path / "two", tiny, 2, 10, **more)
    two = run(tmp_path / "two", tiny, 2, 10, resume=str(tmp_path / "two" / "run" / "checkpoint-7"), **more)
    same(two, run(tmp_path / "one", tiny, 1, 10, **more))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", *[["stream"] * 2] * 2)
    rows = read(tmp_path / "two" / "run" / "record").to_pandas().query("split == 'train'")
    assert rows.groupby("step")["epoch"].unique().map(list).tolist() == [[n // 3] for n in range(8)]


def test_a_stream_of_which_the_first_are_dropped(tiny, tmp_path):
    """Rows are not places then: 4 of the training stream's 13 pairs fill max_length, and 4 of the 7 held out."""
    more = {
        "streams": ("train", "eval"), "long": 4, "max_length": 30, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4, "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    run(tmp_path / "two", tiny, 2, 13, **more)
    two = run(tmp_path / "two", tiny, 2, 13, resume=str(tmp_path / "two" / "run" / "checkpoint-5"), **more)
    same(two, run(tmp_path / "one", tiny, 1, 13, **more))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", *[["stream"] * 2] * 2)


def test_a_rank_without_pairs_goes_along(tiny, tmp_path):
    """Of 3 pairs in batches of 3 one rank has none: when it trains again, and when it evaluates beside a record."""
    more = {"logging_steps": 3, "max_steps": 4, "per_device_train_batch_size": 3, "trainings": 2}
    two = run(tmp_path / "two", tiny, 2, 3, **more)
    one = run(tmp_path / "one", tiny, 1, 3, **more | {"gradient_accumulation_steps": 1})
    same(two, one)
    # Of the steps past the last line of the log too.
    assert two[0]["log"][-2]["train_loss"] == pytest.approx(one[0]["log"][-2]["train_loss"], rel=5e-4)
    rows = [read(tmp_path / n / "run" / "record").to_pandas().query("split == 'train'") for n in ("two", "one")]
    assert rows[0]["rank"].tolist() == [0] * 12 and rows[0]["decision"].tolist() == rows[1]["decision"].tolist()
    for name in ("one", "two"):  # of which one has parts of a single rank
        before = read(tmp_path / name / "run" / "record")
        run(tmp_path / name, tiny, 2, 3, **more | {"trainings": 0})
        assert read(tmp_path / name / "run" / "record").equals(before)


@pytest.mark.parametrize("streams", [(), ("train",)], ids=["", "stream"])
def test_cut_batches_are_one_process(tiny, tmp_path, streams):
    """Ranks have different numbers of parts; data that are given, in memory or as a stream, have one name on both."""
    more = {"max_tokens_per_batch": 45, "per_device_train_batch_size": 4}
    two = run(tmp_path / "two", tiny, 2, 43, streams=streams, given=True, **more)
    same(two, run(tmp_path / "one", tiny, 1, 43, train_sampling_strategy="sequential" if streams else "random", **more))
    splits = read(tmp_path / "two" / "run" / "record").to_pandas()["split"].value_counts()
    assert sorted(n for name, n in splits.items() if "@" in name) == [5, 7, 7]


@pytest.mark.parametrize("split", ["train", "eval", "test"])
def test_a_stream_that_is_split_already_is_refused(tiny, tmp_path, split):
    with pytest.raises(
        AssertionError, match=f"{split}_dataset: got a stream that split_dataset_by_node has split, takes a whole one"
    ):
        run(tmp_path, tiny, 2, 19, streams=(split,), shards=4, by_node=True)


@pytest.mark.parametrize("streams", [(), ("train", "eval")], ids=["", "streams"])
def test_images_are_one_process(tiny, tmp_path, streams):
    """Of the 5 repeats that fill the last batches up, which cannot be cut out, nothing counts."""
    pytest.importorskip("PIL")
    more = {"max_length": None, "sees": "Llava", "train_sampling_strategy": "sequential"}
    two = run(tmp_path / "2", tiny, 2, 19, streams=streams, **more)
    one = run(tmp_path / "1", tiny, 1, 19, **more)
    same(two, one, packed=False)
    runs = (tmp_path / str(n) / "run" for n in (2, 1))
    ours, theirs = (
        read(run / "record").to_pandas().sort_values(["split", "step", "row"], ignore_index=True) for run in runs
    )
    for name in ("split", "step", "row", "decision", "chosen_tokens"):
        assert ours[name].tolist() == theirs[name].tolist(), name


def test_a_resumed_run_is_one_process(tiny, tmp_path):
    """In its second epoch's order, and in that epoch's last batch, which is one pair and 5 repeats."""
    more = {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "two", tiny, 2, 19, **more)
    two = run(tmp_path / "two", tiny, 2, 19, resume=str(tmp_path / "two" / "run" / "checkpoint-6"), **more)
    same(two, run(tmp_path / "one", tiny, 1, 19))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run")


def test_nothing_of_a_last_batch_is_left_out(tiny, tmp_path):
    """Where what does not fill all ranks is dropped, and there are no repeats."""
    more = {"dataloader_drop_last": True, "max_steps": 7, "per_device_eval_batch_size": 3}
    same(*(run(tmp_path / str(n), tiny, n, 43, **more) for n in (2, 1)))


def test_tensor_parallelism_is_one_process(tiny, tmp_path):
    """Policy and reference in slices of 12 and 11 words; every rank has all pairs, and one records them."""
    two = run(tmp_path / "two", tiny, 2, 43, tensor="both", gradient_accumulation_steps=2)
    assert any("lm_head" in name for name in two[0]["sharded"])
    same(two, run(tmp_path / "one", tiny, 1, 43))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run", ranks=(0,))


@pytest.mark.parametrize(
    "how, said",
    [
        ({"tensor": "policy"}, "ref_model: got a model that tensor parallelism has split beside one that is whole"),
        ({"tensor": "both", "lora": True}, "peft_config: got an adapter with tp_size=2, takes none"),
        ({"tensor": "both", "resume": "checkpoint-1"}, "resume_from_checkpoint: got .*checkpoint-1 with tensor"),
    ],
    ids=lambda value: "-".join(map(str, value.values()))[:20] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_tensor_parallelism_does_not_go_with(tiny, tmp_path, how, said):
    how = {"gradient_accumulation_steps": 2} | how
    if resume := how.pop("resume", None):
        run(tmp_path, tiny, 2, 43, **how, save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True)
        how["resume"] = str(tmp_path / "run" / resume)
    with pytest.raises(AssertionError, match=said):
        run(tmp_path, tiny, 2, 43, **how)


@pytest.mark.parametrize("lora", [False, True])
def test_fsdp2_is_one_process(tiny, tmp_path, lora):
    two = run(tmp_path / "two", tiny, 2, 43, lora, **FSDP2)
    assert any("lm_head" in name for name in two[0]["sharded"])
    same(two, run(tmp_path / "one", tiny, 1, 43, lora=lora))
    same_record(tmp_path / "two" / "run", tmp_path / "one" / "run")


def test_fsdp2_in_16_bits_rounds_no_figures(tiny, tmp_path):
    """Policy and reference round alike, and β and margins are not bf16's on their way out of the forward."""
    run(tmp_path, tiny, 2, 43, bf16=True, **FSDP2)
    pairs = read(tmp_path / "run" / "record").to_pandas()
    start = pairs[(pairs["step"] == 1) & (pairs["split"] == "train")]
    assert not start["decision"].any() and not start["chosen_kl"].any()
    assert start["beta_used"].tolist() == pytest.approx([0.1] * len(start), rel=1e-7)
