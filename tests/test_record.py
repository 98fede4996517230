"""The record: what is appended is what is read, whole parts only, and a resumed record has no gap and no double."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="the trainer's extra is not installed")
pq = pytest.importorskip("pyarrow.parquet")

from epsdpo_kernels.record import SCHEMA, Recorder, parts, read  # noqa: E402

ROOT = Path(__file__).parent.parent


def batch(step: int, micro: int = 0, pairs: int = 2, **columns) -> dict:
    """A micro-batch in which every number says where it came from."""
    numbers = np.arange(pairs) + 100 * step + 10 * micro
    values = {}
    for field in SCHEMA:
        if pa.types.is_floating(field.type):
            values[field.name] = numbers + np.float32(0.25)
        elif pa.types.is_integer(field.type):
            values[field.name] = numbers
    values |= {"step": step, "micro": micro, "split": "train", "method": "eps-dpo", "vetoed": False}
    values |= {"decision": np.resize([1, 0, -1], pairs), "pair_id": [f"{n:016x}" for n in numbers]}
    del values["rank"]
    return values | columns


def test_what_is_appended_is_read(tmp_path):
    recorder = Recorder(tmp_path, rank=3)
    recorder.append(batch(1, label=np.array(["a", None], object)))
    recorder.append(batch(1, 1, pairs=3, vetoed=np.array([False, True, False])))
    recorder.append(batch(2, split="eval"))
    recorder.close()
    table = read(tmp_path)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == [100, 101, 110, 111, 112, 200, 201]
    assert [row["label"] for row in rows] == ["a"] + [None] * 6
    assert [row["vetoed"] for row in rows] == [False, False, False, True, False, False, False]
    assert [row["decision"] for row in rows] == [1, 0, 1, 0, -1, 1, 0]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["eval"] * 2
    assert {row["rank"] for row in rows} == {3}
    assert [row["margin"] for row in rows] == [100.25, 101.25, 110.25, 111.25, 112.25, 200.25, 201.25]
    assert rows[2]["pair_id"] == f"{110:016x}"


def test_order_over_ranks_parts_and_splits(tmp_path):
    recorders = [Recorder(tmp_path, rank) for rank in (1, 0)]
    for step in (1, 2):
        for recorder in recorders:
            recorder.append(batch(step, 0))
            recorder.append(batch(step, 1, split="eval"))
            recorder.flush()
    rows = read(tmp_path).to_pylist()
    keys = [(row["split"] == "eval", row["step"], row["micro"], row["rank"], row["row"]) for row in rows]
    assert len(keys) == 16 and keys == sorted(keys)


def test_the_caller_may_reuse_its_arrays(tmp_path):
    recorder, values = Recorder(tmp_path), batch(1)
    recorder.append(values)
    values["margin"][:] = -1
    recorder.close()
    assert read(tmp_path)["margin"].to_pylist() == [100.25, 101.25]


def test_parts_close_at_the_end_of_steps(tmp_path):
    by_steps, by_rows = Recorder(tmp_path / "steps"), Recorder(tmp_path / "rows", rows_per_part=5)
    for step in range(1, 402):
        by_steps.append(batch(step))
    assert [pq.read_metadata(part).num_rows for part in parts(tmp_path / "steps")] == [400, 400]
    for step in range(1, 5):
        for micro in range(3):
            by_rows.append(batch(step, micro))
    names = [part.name for part in parts(tmp_path / "rows")]
    assert names == [f"part-000-{step:08d}-{step - 1:04d}.parquet" for step in (1, 2, 3)]
    assert [pq.read_metadata(part).num_rows for part in parts(tmp_path / "rows")] == [6, 6, 6]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"margins": 1.0}, "margins"),
        ({"margin": np.zeros(3)}, "one length"),
        ({"policy_step": np.array([4, -1])}, "policy_step holds -1 in row 1, takes an integer from 0"),
        ({"beta": np.inf}, "beta holds inf in row 0, takes a positive finite number"),
        ({"row": np.array([None, -3], object)}, "row holds -3 in row 1, takes an integer from 0, or null"),
        ({"step": np.array([5, 1])}, r"step: got \[5, 1\], takes one"),
        ({"split": np.array(["train", "eval"])}, r"split: got \['train', 'eval'\], takes one"),
    ],
)
def test_refusals(tmp_path, columns, named):
    recorder = Recorder(tmp_path)
    recorder.append(batch(1))
    with pytest.raises(ValueError, match=named):
        recorder.append(batch(1) | columns)
    recorder.close()  # what was refused has left nothing
    assert read(tmp_path)["row"].to_pylist() == [100, 101]


def test_no_pairs_leave_nothing(tmp_path):
    recorder = Recorder(tmp_path)
    none = {"pair_id": np.array([], object)}
    recorder.append(batch(1, pairs=0, **none))
    recorder.close()
    assert not parts(tmp_path)
    recorder.append(batch(2, pairs=0, **none) | {"step": np.array([], int)})
    recorder.append(batch(1))
    recorder.close()
    assert read(tmp_path)["row"].to_pylist() == [100, 101]


def test_a_missing_column_is_named(tmp_path):
    values = batch(1)
    del values["beta_used"]
    with pytest.raises(ValueError, match="beta_used"):
        Recorder(tmp_path).append(values)


def test_a_rank_has_an_end_from_its_start(tmp_path):
    recorder, end = Recorder(tmp_path, rank=2), tmp_path / "end-002.json"
    assert json.loads(end.read_text()) == {"part": "", "sha256": "", "closed": False}
    recorder.close()
    assert json.loads(end.read_text()) == {"part": "", "sha256": "", "closed": True}
    recorder.append(batch(1))
    recorder.close()
    Recorder(tmp_path, rank=2, resume_step=0)
    assert json.loads(end.read_text()) == {"part": "", "sha256": "", "closed": False} and not parts(tmp_path)


def test_a_record_is_not_overwritten(tmp_path):
    first = Recorder(tmp_path)
    first.append(batch(1))
    first.close()
    with pytest.raises(FileExistsError, match="resume_step"):
        Recorder(tmp_path)
    Recorder(tmp_path, rank=1)
    anew = Recorder(tmp_path, resume_step=-1)
    anew.append(batch(7))
    anew.close()
    assert read(tmp_path)["step"].to_pylist() == [7, 7]


@pytest.mark.parametrize("first", [1, 2])
def test_two_recorders_of_one_rank_do_not_overwrite_each_other(tmp_path, first):
    """Both were opened before there was a part to see: the second to write is refused, and the first's rows stay."""
    one, other = Recorder(tmp_path), Recorder(tmp_path)
    one.append(batch(1))
    one.close()
    other.append(batch(first))
    with pytest.raises(FileExistsError, match="rank 0 from another recorder"):
        other.close()
    one.append(batch(3))
    one.close()
    assert read(tmp_path)["row"].to_pylist() == [100, 101, 300, 301]


@pytest.mark.parametrize("resume_step", [0, 3, 4, 6])
def test_resume_has_no_gap_and_no_double(tmp_path, resume_step):
    first = Recorder(tmp_path, rows_per_part=4)
    other = Recorder(tmp_path, rank=1)
    for step in range(1, 7):
        first.append(batch(step))
        other.append(batch(step))
    first.close()
    other.close()
    (tmp_path / ".part-000-00000005-0009.parquet.tmp").write_bytes(b"half a part")
    again = Recorder(tmp_path, resume_step=resume_step)
    for step in range(resume_step + 1, 9):
        again.append(batch(step))
    again.close()
    rows = read(tmp_path).to_pylist()
    assert [row["row"] for row in rows if row["rank"] == 0] == [100 * s + i for s in range(1, 9) for i in (0, 1)]
    assert [row["row"] for row in rows if row["rank"] == 1] == [100 * s + i for s in range(1, 7) for i in (0, 1)]
    assert not list(tmp_path.glob(".*"))
    names = [path.name for path in tmp_path.iterdir()]
    assert all(re.fullmatch(r"part-00[01]-\d{8}-\d{4}\.parquet|end-00[01]\.json", name) for name in names)
    for rank in (0, 1):
        before = ""
        for number, part in enumerate(part for part in parts(tmp_path) if f"part-00{rank}" in part.name):
            assert part.name.endswith(f"-{number:04d}.parquet")
            assert pq.read_schema(part).metadata[b"sha256_before"].decode() == before
            before = subprocess.run(["sha256sum", part], capture_output=True, text=True, check=True).stdout[:64]
        end = json.loads((tmp_path / f"end-00{rank}.json").read_text())
        assert end == {"part": part.name, "sha256": before, "closed": True}


@pytest.mark.parametrize("there", [0, 6])
def test_a_resumed_recorder_takes_what_comes_after_its_checkpoint(tmp_path, there):
    """Whether or not the record has the steps before it; an evaluation may come at the checkpoint's own step."""
    first = Recorder(tmp_path)
    for step in range(1, there + 1):
        first.append(batch(step))
    first.close()
    again = Recorder(tmp_path, resume_step=6)
    for step, split, least in ((2, "train", 7), (6, "train", 7), (5, "eval", 6)):
        with pytest.raises(ValueError, match=f"step: got {step} after 6, takes steps of '{split}' from {least}"):
            again.append(batch(step, split=split))
    again.append(batch(6, split="eval"))
    with pytest.raises(ValueError, match="step: got 6 after 6, takes steps of 'train' from 7"):
        again.append(batch(6))
    again.append(batch(7))
    with pytest.raises(ValueError, match="step: got 6 after 7, takes steps of 'eval' from 7"):
        again.append(batch(6, split="eval"))
    again.close()
    found = [(row["split"], row["step"]) for row in read(tmp_path).to_pylist()[::2]]
    assert found == [*(("train", step) for step in range(1, there + 1)), ("train", 7), ("eval", 6)]


def test_a_recorder_resumed_at_the_start_takes_all(tmp_path):
    recorder = Recorder(tmp_path, resume_step=0)
    recorder.append(batch(0, split="eval"))
    recorder.append(batch(1))
    recorder.close()
    assert read(tmp_path)["step"].to_pylist() == [1, 1, 0, 0]


def test_a_part_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    recorder.append(batch(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            recorder.flush()
        assert parts(tmp_path) == []
    recorder.flush()  # what could not be written is still there
    assert read(tmp_path)["row"].to_pylist() == [100, 101]


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no part"):
        read(tmp_path)
    recorder = Recorder(tmp_path)
    recorder.append(batch(1))
    recorder.close()
    (whole,) = parts(tmp_path)
    other = tmp_path / "part-001-00000001-0000.parquet"
    # Resumed, too: nothing of what can't be read is removed.
    for reader in (read, lambda folder: Recorder(folder, rank=1, resume_step=0)):
        pq.write_table(pq.read_table(whole).drop_columns(["beta_used"]), other)
        with pytest.raises(ValueError, match="part-001.*beta_used"):
            reader(tmp_path)
        other.write_bytes(whole.read_bytes()[:500])
        with pytest.raises(ValueError, match="part-001.*: can't be read"):
            reader(tmp_path)
    assert other.read_bytes() == whole.read_bytes()[:500]


def test_cost(tmp_path):
    """A step of seconds pays well under 2 % for this; the bound is loose, so that a busy machine passes."""
    recorder = Recorder(tmp_path)
    start = time.perf_counter()
    for step in range(1, 201):
        recorder.append(batch(step, pairs=8))
    append = (time.perf_counter() - start) / 200
    start = time.perf_counter()
    recorder.flush()
    flush = time.perf_counter() - start
    size = sum(part.stat().st_size for part in parts(tmp_path)) / 1600
    print(f"append of 8 pairs {append * 1e6:.0f} µs, flush of 1600 {flush * 1e3:.1f} ms, {size:.0f} bytes a pair")
    assert append < 5e-3 and flush < 1


def test_every_column_is_documented():
    for field in SCHEMA:
        assert field.metadata[b"description"], field.name
    words = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, "-m", "epsdpo_kernels.record"], cwd=ROOT, capture_output=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert printed.stdout.decode() == words, "run: python -m epsdpo_kernels.record > docs/record.md"
    assert not printed.stderr.decode()
