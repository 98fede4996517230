"""Several processes on gloo against one: the same steps, the same β, the same weights."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from cases import relative_error  # noqa: E402
from distributed_worker import policy  # noqa: E402
from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from train.__main__ import main, refuse_under_deepspeed  # noqa: E402
from train.options import PairOptions  # noqa: E402

ROOT = Path(__file__).parent.parent


def launch(processes: int, case: str, folder: Path, **more: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(ROOT / "tests" / "distributed_worker.py"), case, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def log_of(run: Path, holds: str = "loss") -> list[dict]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if holds in entry]


def cut(tiny: Path, folder: Path, pairs: int) -> Path:
    """A file with the first pairs of the tiny data set."""
    lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)[:pairs]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def sharded(folder: Path) -> list[str]:
    """The flags of FSDP2."""
    (folder / "fsdp.json").write_text(json.dumps({"version": 2}))
    return ["--fsdp=full_shard", f"--fsdp_config={folder / 'fsdp.json'}"]


def assert_same_run(two: Path, one: Path, steps: int, ranks: Collection[int] = (0, 1)) -> None:
    """Decisions and β pair by pair, losses, and the weights in the end."""
    ours, theirs = (
        read(run / "record").to_pandas().sort_values(["split", "step", "row"], ignore_index=True) for run in (two, one)
    )
    for name in ("split", "step", "row", "pair_id", "decision"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    assert ours["step"].max() == steps and set(ours["rank"]) == set(ranks)
    for name in ("beta", "beta_used", "loss"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-6, abs=1e-6), name
    # A difference of log-probs of some 20 nats, which fp32 rounds to 2e-6 each.
    assert ours["margin"].tolist() == pytest.approx(theirs["margin"].tolist(), rel=1e-5, abs=1e-5)
    for a, b in zip(log_of(two), log_of(one), strict=True):
        # transformers logs the loss rounded to four digits of its own.
        assert a["loss"] == pytest.approx(b["loss"], abs=1.1e-4)
        assert a["beta/running"] == pytest.approx(b["beta/running"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    held_out = [[entry["eval_loss"] for entry in log_of(run, "eval_loss")] for run in (two, one)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert bool(held_out[0]) == ("eval" in set(ours["split"]))
    weights = load_file(next(one.glob("*model.safetensors")))
    for name, p in load_file(next(two.glob("*model.safetensors"))).items():
        if name in weights:  # a gathered checkpoint spells a tied head out
            assert ((p - weights[name]).norm() / weights[name].norm()).item() < 1e-5, name


@pytest.mark.parametrize(
    "method, pairs", [("eps-dpo", 48), ("eps-dpo", 43), ("eps-dpo", 38), ("beta-dpo", 43), ("lsc-dpo", 43)]
)
def test_ddp_is_one_process(tiny, tmp_path, pairs, method):
    """48 pairs fill every batch of 6; 43 leave 1 for two ranks, so one of them has nothing to score; 38 leave 2."""
    more = {"dataset": cut(tiny, tmp_path, pairs), "method": method, "num_train_epochs": 2, "eval_fraction": 0.0}
    if method == "lsc-dpo":
        more |= {"beta": 1.0, "lsc_tau_start": 0.499}  # so that β moves soon
    # One process takes the two ranks' micro-batches one after the other.
    one = flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2)
    two = flags(tiny, tmp_path / "two", **more, gradient_accumulation_steps=1)
    if method == "beta-dpo":  # whose β is the whole batch's: one process has to see it at once
        one = flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=1, per_device_train_batch_size=6)
    main(one)
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "ddp", tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one", 2 * -(-pairs // 6))
    assert len({entry["beta/running"] for entry in log_of(tmp_path / "two")}) > 5


def test_ranks_stop_together(tiny, tmp_path):
    """Where one of them has a loss that is not finite; each has written what led to it."""
    given = flags(tiny, tmp_path / "run", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4)
    (tmp_path / "flags.json").write_text(json.dumps(given))
    launch(2, "broken on one", tmp_path)
    first, second = ((tmp_path / f"error-{rank}.txt").read_text() for rank in range(2))
    assert first == second
    rows = read(tmp_path / "run" / "record").to_pandas().query("step == 3")
    bad = sorted(rows[rows["loss"].isna()]["row"])
    assert len(rows) == 4 and set(rows["rank"]) == {0, 1} and set(rows[rows["loss"].isna()]["rank"]) == {0}
    assert f"step 3: the loss of the pairs at rows {bad} of the data is not finite" in first


@pytest.mark.parametrize("pairs, tied, more", [
    (43, False, {"gradient_accumulation_steps": 1}),
    (43, True, {"gradient_accumulation_steps": 2}),
    (31, False, {"gradient_accumulation_steps": 1, "lora_r": 4, "eval_fraction": 0.23}),
    # Ranks would cut unlike, and FSDP's wait for each other in every forward.
    (43, False, {"gradient_accumulation_steps": 1, "max_tokens_per_batch": 35, "eval_fraction": 0.23}),
], ids=["uneven", "tied, accumulated", "lora, evaluated", "bounded by tokens"])  # fmt: skip
def test_fsdp_is_one_process(tiny, tmp_path, pairs, tied, more):
    """accelerate's FSDP2 shards backbone and head."""
    model = tiny
    if tied:
        model = shutil.copytree(tiny, tmp_path / "tied")
        config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=True)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    more |= {"model": model, "dataset": cut(tiny, tmp_path, pairs), "per_device_eval_batch_size": 3}
    accumulated = 2 * more["gradient_accumulation_steps"]
    main(flags(tiny, tmp_path / "one", **more | {"gradient_accumulation_steps": accumulated}))
    (tmp_path / "flags.json").write_text(json.dumps([*flags(tiny, tmp_path / "two", **more), *sharded(tmp_path)]))
    launch(2, "fsdp", tmp_path)
    trained = pairs - round(pairs * more.get("eval_fraction", 0))
    assert_same_run(tmp_path / "two", tmp_path / "one", -(-trained // (3 * accumulated)))


def test_a_sharded_run_goes_on_from_its_checkpoint(tiny, tmp_path):
    """Weights, optimizer, schedule, β, record and the order of its second epoch: as if it had never been stopped."""
    more = {"dataset": cut(tiny, tmp_path, 19), "save_strategy": "steps", "save_steps": 6, "num_train_epochs": 2}
    main(flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2))
    two = [*flags(tiny, tmp_path / "two", **more, gradient_accumulation_steps=1), *sharded(tmp_path)]
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "fsdp", tmp_path)
    # As a stop between the first checkpoint and the next would leave it.
    for entry in (tmp_path / "two").iterdir():
        if entry.name not in ("checkpoint-6", "record", "run.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (tmp_path / "flags.json").write_text(json.dumps([*two, "--resume_from_checkpoint=last"]))
    launch(2, "fsdp", tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one", 8)


# As `accelerate launch --use_parallelism_config --parallelism_config_tp_size 2` says it.
TENSOR = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}


@pytest.mark.parametrize("method, tied", [("eps-dpo", False), ("eps-dpo", True), ("lsc-dpo", False)])
def test_tensor_parallelism_is_one_process(tiny, tmp_path, method, tied):
    """Layers and 23 words in two slices of 12 and 11; both ranks have all pairs, and one records them."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=tied)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    more = {"model": model, "dataset": cut(tiny, tmp_path, 43), "eval_fraction": 0.25, "method": method}
    if method == "lsc-dpo":
        more |= {"beta": 1.0, "lsc_tau_start": 0.499}
    main(flags(tiny, tmp_path / "one", **more))
    (tmp_path / "flags.json").write_text(json.dumps(flags(tiny, tmp_path / "two", **more)))
    launch(2, "tensor", tmp_path, **TENSOR)
    assert_same_run(tmp_path / "two", tmp_path / "one", 6, ranks=(0,))
    assert len({entry["beta/running"] for entry in log_of(tmp_path / "two")}) > 2


@pytest.mark.parametrize("wrap", ["ddp", "by the root", "head apart"])
@pytest.mark.parametrize("blank", [False, True], ids=["both score", "one has nothing to score"])
def test_gradients_are_one_process(tiny, tmp_path, wrap, blank):
    g = torch.Generator().manual_seed(2)
    batches = []
    for scored in (True, not blank):
        ids = torch.randint(3, 20, (6, 9), generator=g)
        labels = ids.roll(-1, 1)
        labels[:, :3] = labels[:, -1] = -100
        if not scored:
            labels[:] = -100
        batches.append({
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pair_labels": labels, "row": torch.arange(3),
        })  # fmt: skip
    for rank, batch in enumerate(batches):
        save_file(batch, tmp_path / f"batch-{rank}.safetensors")
    pairs = 3 if blank else 6
    (tmp_path / "facts.json").write_text(json.dumps({"model": str(tiny), "wrap": wrap, "pairs": pairs}))
    launch(2, "gradients", tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    model, loss_fn = policy(tiny)
    outs = [model(**batch) for batch in batches]
    sum(out.loss * 3 / pairs for out in outs[: pairs // 3]).backward()
    loss_fn.update_beta()
    assert found["step"].tolist() == [s for out in outs for s in out.step.tolist()] and found["step"].any()
    assert found["beta"] == loss_fn.beta != 0.1
    for name, p in model.named_parameters():
        assert relative_error(found[name], p.grad) < 1e-5, name


def test_what_is_not_sharded_is_refused(tiny, tmp_path):
    """The trainer asked for FSDP where accelerate would replicate, and a reference that reads whole weights."""
    with pytest.raises(ValueError, match="fsdp: tr-dpo mixes whole weights"):
        main([*flags(tiny, tmp_path / "moving", method="tr-dpo"), "--fsdp"])
    (tmp_path / "flags.json").write_text(json.dumps([*flags(tiny, tmp_path / "ddp"), "--fsdp"]))
    with pytest.raises(AssertionError, match="fsdp: accelerate makes MULTI_CPU of it here, takes several GPUs"):
        launch(2, "ddp", tmp_path)


@pytest.mark.parametrize("stage, dtype, options, said", [
    (1, None, {"method": "tr-dpo"}, "deepspeed: tr-dpo mixes whole weights"),
    (3, None, {"cache_reference": "folder"}, "cache_reference: got DeepSpeed with ZeRO-3"),
    (2, torch.bfloat16, {"cache_reference": "folder"}, "cache_reference: got DeepSpeed with ZeRO-3 or in 16 bits"),
    (2, None, {"cache_reference": "folder"}, None),
    (3, torch.bfloat16, {}, None),
])  # fmt: skip
def test_what_deepspeed_would_get_wrong_is_refused(stage, dtype, options, said):
    options = PairOptions("model", "data", **options)
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), autocast_dtype=dtype)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        refuse_under_deepspeed(options, args)


def test_micro_batches_do_not_matter(tiny, tmp_path):
    """The same eight pairs as 1 × 8, 2 × 4 and 8 × 1: the same steps and the same β, also of a short last window."""
    logs = []
    for size in (8, 4, 1):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_train_epochs": 2}
        run = tmp_path / str(size)
        main(flags(tiny, run, dataset=cut(tiny, tmp_path, 45), **more))
        logs.append(log_of(run))
    for entries in zip(*logs, strict=True):
        for name in ("loss", "beta/running", "beta/relaxed", "beta/tightened", "rewards/margins"):
            assert [e[name] for e in entries] == pytest.approx([entries[0][name]] * 3, rel=2e-4, abs=2e-6), name


def test_what_fsdp_computes_in_16_bits(tiny, tmp_path):
    """Policy and reference round alike, and the loss's figures are not rounded on their way out of the forward."""
    more = {"dataset": cut(tiny, tmp_path, 43), "bf16": True, "max_steps": 4, "gradient_accumulation_steps": 1}
    (tmp_path / "flags.json").write_text(json.dumps([*flags(tiny, tmp_path / "two", **more), *sharded(tmp_path)]))
    launch(2, "fsdp", tmp_path)
    pairs = read(tmp_path / "two" / "record").to_pandas()
    start, later = pairs[pairs["step"] <= 2], pairs[pairs["step"] > 2]  # the first step of a warm-up moves nothing
    assert not start["decision"].any() and not start["chosen_kl"].any() and later["chosen_kl"].all()
    figures = torch.tensor(later["beta_used"].tolist() + later["margin"].tolist())
    assert (figures != figures.bfloat16().float()).any()
