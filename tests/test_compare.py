"""The comparison, end to end on the tiny model."""

import json
import os
import shutil
import time

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")
pytest.importorskip("matplotlib", reason="the trainer's extra is not installed")

from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from train.data import Collator, load_pairs  # noqa: E402
from train.studies import compare  # noqa: E402


def test_compare(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(__file__)))
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    passed_on = [
        f for f in flags(tiny, tmp_path, eval_fraction=0.25) if not f.startswith(("--output", "--seed", "--disab"))
    ]
    arguments = [
        "--out",
        str(tmp_path),
        "--methods",
        "dpo",
        "eps-dpo",
        "--seeds",
        "5",
        "--micro-steps",
        "6",
        *passed_on,
    ]
    compare.main(arguments)
    assert "written to" in capsys.readouterr().out
    runs = compare.collect(tmp_path, ["dpo", "eps-dpo"], [5])
    text = (tmp_path / "comparison.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines()]
    assert len(rows) == 15 and f"{runs[1]['margin']:.3f}" in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

    # The held-out figures, worked out again with all logits.
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, original = load(tmp_path / "eps-dpo-5", dtype=torch.float32), load(tiny, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    pairs, _ = load_pairs(tiny / "pairs.jsonl", tokenizer, max_length=16)
    batch = Collator(0)(list(pairs.train_test_split(0.25, seed=5)["test"]))
    labels = batch["labels"]
    with torch.no_grad():
        p, q = (m(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1) for m in (policy, original))
    ratio = (p - q).gather(-1, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels == -100, 0).sum(1)
    margins = ratio[:12] - ratio[12:]
    assert runs[1]["pairs"] == 12
    assert runs[1]["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert runs[1]["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    chosen = labels[:12] != -100
    for name, (x, y) in {"kl_per_token": (p, q), "reverse_kl_per_token": (q, p)}.items():
        kl = (x.exp() * (x - y)).sum(-1)[:12][chosen].mean().item()
        assert runs[1][name] == pytest.approx(kl, rel=1e-3)

    # The batch in micro-batches: six steps of eight pairs, decided alike for ε-DPO; β-DPO's β is another.
    micro = rows[-6:]
    assert [row[1] for row in micro] == ["1 × 8", "2 × 4", "8 × 1"] * 2
    beta = [float(row[-1].strip(" |")) for row in micro]
    assert [row[0] for row in micro] == ["| eps-dpo"] * 3 + ["| beta-dpo"] * 3
    assert [row[2:5] for row in micro[:3]] == [["48", "0", "0.00%"]] * 3 and beta[0] == beta[1] == beta[2] != 0.1
    assert all(float(row[4].strip("%")) > 0 for row in micro[4:]) and len(set(beta[3:])) == 3
    decided = [
        read(tmp_path / "micro-batches" / f"eps-dpo-{count}x{size}" / "record").to_pandas().query("split == 'train'")
        for size, count in compare.MICRO_BATCHES
    ]
    steps = [run.set_index(["step", "row"])["decision"].sort_index() for run in decided]
    assert steps[0].equals(steps[1]) and steps[0].equals(steps[2]) and steps[0].any()

    # A run of other pairs under the same name is no comparison.
    broken = tmp_path / "micro-batches" / "eps-dpo-2x4"
    broken.rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "dpo-5", broken)
    with pytest.raises(ValueError, match="its steps are of other pairs than the first run's"):
        compare.micro_table(tmp_path)
    shutil.rmtree(broken)
    (tmp_path / "kept").rename(broken)

    # Nothing is run a second time.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("trainer_state.json")}
    start = time.perf_counter()
    compare.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in before} == before and time.perf_counter() - start < 20
    assert json.loads((tmp_path / "dpo-5" / "peak.json").read_text())["bytes"] > 2**27
