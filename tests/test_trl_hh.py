"""A run of TRL on real pairs, killed twice and resumed: one whole record, and the decisions of python -m train."""

import json

import pytest

pytest.importorskip("trl", reason="the extra 'trl' is not installed")

import hh  # noqa: E402
from epsdpo_kernels.record import parts, read, sources  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from runs import flags  # noqa: E402


def test_killed_twice_and_whole(hh_run):
    found = audit(hh_run)
    assert found.ok and not found.limits and found.steps == hh.STEPS, str(found)
    rows = read(hh_run / "record").to_pandas()
    assert rows["step"].tolist() == [1 + i // 4 for i in range(120)]
    assert rows["row"].tolist() == list(range(120))  # each once, in the order that the data were given in
    assert len(parts(hh_run / "record")) == 6  # one a checkpoint, those of the killed runs gone
    texts = [json.loads(line) for line in (hh_run.parent / "pairs.jsonl").read_text().splitlines()]
    assert set(rows["pair_id"]) == {sources.pair_of(row).id() for row in texts}


def test_decisions_are_those_of_python_m_train(hh_run, tmp_path):
    from train.__main__ import main

    options = hh.SAME | {"dataset": hh_run.parent / "pairs.jsonl", "num_train_epochs": 1, "max_prompt_length": 200}
    main(flags(hh_run.parent, tmp_path, **options))
    ours, theirs = (
        read(run / "record").to_pandas().sort_values(["step", "pair_id"], ignore_index=True)
        for run in (hh_run, tmp_path)
    )
    for name in ("step", "pair_id", "decision", "chosen_tokens", "rejected_tokens"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    assert len(ours) == 120 and set(ours["decision"]) > {1} and ours["beta"].iloc[-1] != pytest.approx(0.1, rel=0.05)
    assert ours["beta"].tolist() == pytest.approx(theirs["beta"].tolist(), rel=1e-6)
    for name in ("margin", "loss", "chosen_kl"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-4, abs=1e-4), name
