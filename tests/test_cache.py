"""Training from cached hidden states of the reference: the same run, and nothing taken for what it is not."""

import json
import shutil

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")
pytest.importorskip("datasets", reason="the trainer's extra is not installed")

from safetensors.torch import load_file  # noqa: E402

from epsdpo_kernels.record import read  # noqa: E402
from runs import flags  # noqa: E402
from test_distributed import launch  # noqa: E402
from train import __main__ as command  # noqa: E402
from train import cache, models  # noqa: E402
from train.data import Collator, load_pairs  # noqa: E402


@pytest.fixture(scope="module")
def reference(tiny):
    """The tiny model and its pairs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    pairs, _ = load_pairs(tiny / "pairs.jsonl", transformers.AutoTokenizer.from_pretrained(tiny), max_length=16)
    return model, list(pairs)


@pytest.fixture
def written(reference, tmp_path):
    cache.write(tmp_path / "cache", *reference, batch_size=5, progress_bar=False)
    return tmp_path / "cache"


def assert_same_run(ours, theirs, loss=1e-6, logps=1e-5, weights=1e-6):
    """Decisions and β of every pair; figures to the rounding of a batch of another shape, by these tolerances."""
    a, b = (
        read(run / "record").to_pandas().sort_values(["split", "step", "row"], ignore_index=True)
        for run in (ours, theirs)
    )
    for name in ("split", "step", "row", "decision", "beta", "beta_used"):
        assert a[name].tolist() == b[name].tolist(), name
    assert a["decision"].any() and a["step"].max() > 5
    assert a["loss"].tolist() == pytest.approx(b["loss"].tolist(), rel=loss)
    for name in ("margin", "ref_chosen_logp", "chosen_kl"):
        assert a[name].tolist() == pytest.approx(b[name].tolist(), rel=logps, abs=logps), name
    expected = load_file(next(theirs.glob("*model.safetensors")))
    for name, p in load_file(next(ours.glob("*model.safetensors"))).items():
        assert ((p - expected[name]).norm() / expected[name].norm()).item() < weights, name


@pytest.mark.parametrize("more", [
    {"eval_dataset": "held.jsonl"}, {"lora_r": 4}, {"ref_model": "other"}, {"bf16": True},
], ids=["evaluated on rows of the same numbers", "lora", "another reference", "autocast"])  # fmt: skip
def test_a_cached_run_is_the_uncached_run(tiny, tmp_path, capsys, monkeypatch, more):
    more = dict(more)
    if "eval_dataset" in more:
        lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "held.jsonl").write_text("".join(reversed(lines[:20])))
        more["eval_dataset"] = tmp_path / "held.jsonl"
    if "ref_model" in more:
        shutil.copytree(tiny, tmp_path / "other")
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(tmp_path / "other")
        more["ref_model"] = tmp_path / "other"
    command.main(flags(tiny, tmp_path / "uncached", **more))
    capsys.readouterr()
    command.main(flags(tiny, tmp_path / "cached", **more, cache_reference=tmp_path / "cache"))
    size = (tmp_path / "cache" / "hidden.bin").stat().st_size
    assert f"cache_reference: {size:,} bytes of hidden states" in capsys.readouterr().out
    # bf16 rounds at 4e-3 where fp32 does at 6e-8.
    rounding = {"loss": 1e-3, "logps": 2e-2, "weights": 1e-3} if "bf16" in more else {}
    assert_same_run(tmp_path / "cached", tmp_path / "uncached", **rounding)
    # A second run finds it complete, under the other spelling, and no second model is made for it.
    monkeypatch.setattr(cache, "_states", only_the_head(cache._states))
    monkeypatch.setattr(models, "frozen_reference", None)
    again = flags(tiny, tmp_path / "again", **more) + ["--cache-reference", str(tmp_path / "cache")]
    trainer = command.main(again)
    assert_same_run(tmp_path / "again", tmp_path / "cached")
    assert trainer.state.log_history[0]["kl/chosen"] == 0 or "ref_model" in more


def only_the_head(states):
    def checked(model, pairs, autocast):
        assert len(pairs) == 1, "a complete cache was written again"
        return states(model, pairs, autocast)

    return checked


def test_states_are_the_models(reference, written):
    """Every scored position, of pairs in another order and other batches."""
    model, pairs = reference
    lookup = cache.CachedReference(written, pairs, "cpu")
    batch = Collator(0)([pairs[i] for i in (41, 3, 17)])
    found = lookup(batch["input_ids"], batch["attention_mask"], batch["row"])
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    scored = batch["labels"] != -100
    torch.testing.assert_close(found.hidden[scored], hidden[scored], rtol=1e-5, atol=1e-5)
    assert (found.hidden[~scored] == 0).all() and torch.equal(found.weight, model.lm_head.weight)
    blank = Collator(0)([{"row": -1}])
    assert lookup(blank["input_ids"], blank["attention_mask"], blank["row"]).hidden.shape == (2, 1, 32)


def test_an_interrupted_cache_goes_on(reference, written, tmp_path, monkeypatch):
    """Cut short twice; bytes for bytes what one go writes, and what was done is not done again."""
    states, calls = cache._states, []

    def dies(model, pairs, autocast):
        calls.append(len(pairs))
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        return states(model, pairs, autocast)

    monkeypatch.setattr(cache, "BATCHES_BETWEEN_SYNCS", 1)
    monkeypatch.setattr(cache, "_states", dies)
    held = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cache.write(tmp_path / "cut", *reference, batch_size=5, progress_bar=False)
        held.append(json.loads((tmp_path / "cut" / "progress.json").read_text())["pairs"])
        with pytest.raises(ValueError, match=rf"cache_reference: .*cut holds {held[-1]} of 48 pairs"):
            cache.CachedReference(tmp_path / "cut", reference[1], "cpu")
    assert held == [15, 30]
    monkeypatch.setattr(cache, "_states", states)
    cache.write(tmp_path / "cut", *reference, batch_size=5, progress_bar=False)
    for name in ("hidden.bin", "checksums.bin", "head.safetensors", "facts.json", "progress.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (written / name).read_bytes(), name


def test_a_model_trains_on_where_its_cache_failed(reference, tmp_path, monkeypatch):
    model, pairs = reference
    modes = []

    def dies(model, *inputs):
        modes.append(model.training)
        raise MemoryError

    monkeypatch.setattr(cache, "head_inputs", dies)
    model.train()
    try:
        with pytest.raises(MemoryError):
            cache.write(tmp_path / "cache", model, pairs, batch_size=5)
        assert model.training and modes == [False]
    finally:
        model.eval()


def test_another_model_or_data_set_is_refused(reference, written, tmp_path):
    model, pairs = reference
    fewer = pairs[:-1] + [pairs[-1] | {"chosen_ids": pairs[-1]["chosen_ids"][:-1]}]
    with pytest.raises(ValueError, match=r"These differ: data \([0-9a-f]{32}; here [0-9a-f]{32}\), tokens"):
        cache.write(written, model, fewer, batch_size=5)
    weight = model.lm_head.weight
    with torch.no_grad():
        before, weight[3, 3] = weight[3, 3].clone(), weight[3, 3] + 1e-6
    try:
        with pytest.raises(ValueError, match=r"These differ: model \([0-9a-f]{32}; here [0-9a-f]{32}\)\."):
            cache.write(written, model, pairs, batch_size=5)
    finally:
        with torch.no_grad():
            weight[3, 3] = before
    cache.write(written, model, pairs, batch_size=5)


def test_damage_is_noticed(reference, written):
    _, pairs = reference
    whole = (written / "hidden.bin").read_bytes()
    (written / "hidden.bin").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"hidden.bin is cut short: it has [\d,]+ bytes, takes [\d,]+"):
        cache.CachedReference(written, pairs, "cpu")
    broken = np.frombuffer(whole, np.uint8).copy()
    broken[-100] ^= 1
    (written / "hidden.bin").write_bytes(broken.tobytes())
    lookup = cache.CachedReference(written, pairs, "cpu")
    for i, fails in ((0, False), (47, True)):
        batch = Collator(0)([pairs[i]])
        if not fails:
            assert lookup(batch["input_ids"], batch["attention_mask"], batch["row"]).hidden.any()
            continue
        with pytest.raises(ValueError, match="the states of pair 47 are damaged"):
            lookup(batch["input_ids"], batch["attention_mask"], batch["row"])
    head = bytearray((written / "head.safetensors").read_bytes())
    head[-1] ^= 1
    (written / "head.safetensors").write_bytes(head)
    with pytest.raises(ValueError, match="head.safetensors is damaged"):
        cache.CachedReference(written, pairs, "cpu")


def test_a_full_disk_is_noticed_before(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"has room for 1,000 bytes, takes [\d,]+"):
        cache.write(tmp_path / "cache", *reference, batch_size=5)
    assert not (tmp_path / "cache" / "hidden.bin").exists()


def test_a_moving_reference_takes_no_cache(tiny, tmp_path):
    with pytest.raises(ValueError, match="cache_reference: tr-dpo's reference follows the policy"):
        command.main(flags(tiny, tmp_path, method="tr-dpo", cache_reference=tmp_path / "cache"))


def test_two_ranks_share_one_cache(tiny, tmp_path):
    more = {"cache_reference": tmp_path / "cache", "gradient_accumulation_steps": 1}
    command.main(flags(tiny, tmp_path / "one", gradient_accumulation_steps=2))
    (tmp_path / "flags.json").write_text(json.dumps(flags(tiny, tmp_path / "two", **more)))
    launch(2, "ddp", tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one")
