"""Several processes on gloo against one: the same steps, the same β, the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from safetensors.torch import load_file  # noqa: E402

from runs import flags  # noqa: E402
from train.__main__ import main  # noqa: E402

ROOT = Path(__file__).parent.parent


def launch(processes: int, case: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(ROOT / "tests" / "distributed_worker.py"), case, str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def log_of(run: Path) -> list[dict]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("method, pairs", [("eps-dpo", 48), ("eps-dpo", 43), ("eps-dpo", 38), ("beta-dpo", 43)])
def test_ddp_is_one_process(tiny, tmp_path, pairs, method):
    """48 pairs fill every batch of 6; 43 leave 1 for two ranks, 38 leave 2."""
    lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)[:pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    more = {"dataset": tmp_path / "pairs.jsonl", "method": method, "num_train_epochs": 2, "eval_fraction": 0.0}
    # One process takes the two ranks' micro-batches one after the other.
    one = flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=2)
    two = flags(tiny, tmp_path / "two", **more, gradient_accumulation_steps=1)
    if method == "beta-dpo":  # whose β is the whole batch's: one process has to see it at once
        one = flags(tiny, tmp_path / "one", **more, gradient_accumulation_steps=1, per_device_train_batch_size=6)
    main(one)
    (tmp_path / "flags.json").write_text(json.dumps(two))
    launch(2, "ddp", tmp_path)
    ours, theirs = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert len(ours) == len(theirs) == 2 * -(-pairs // 6)
    names = ["loss", "beta/running", "beta/relaxed", "beta/kept", "beta/tightened", "kl/chosen", "rewards/margins"]
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6), (name, a["step"])
    for (name, p), q in zip(
        load_file(tmp_path / "two" / "model.safetensors").items(),
        load_file(tmp_path / "one" / "model.safetensors").values(),
        strict=True,
    ):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)


def test_micro_batches_do_not_matter(tiny, tmp_path):
    """The same eight pairs as 1 × 8, 2 × 4 and 8 × 1: the same steps and the same β, also of a short last window."""
    logs = []
    for size in (8, 4, 1):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_train_epochs": 2}
        lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)[:45]
        (tmp_path / "pairs.jsonl").write_text("".join(lines))
        run = tmp_path / str(size)
        main(flags(tiny, run, dataset=tmp_path / "pairs.jsonl", **more))
        logs.append(log_of(run))
    for entries in zip(*logs, strict=True):
        for name in ("loss", "beta/running", "beta/relaxed", "beta/tightened", "rewards/margins"):
            assert [e[name] for e in entries] == pytest.approx([entries[0][name]] * 3, rel=2e-4, abs=2e-6), name
