"""The audit: a record that holds together is OK, and every way in which one does not is named where it is."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pa = pytest.importorskip("pyarrow", reason="the trainer's extra is not installed")
pq = pytest.importorskip("pyarrow.parquet")

from epsdpo_kernels.__main__ import main  # noqa: E402
from epsdpo_kernels.record import parts, read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from records import write_run  # noqa: E402
from runs import flags  # noqa: E402

ROOT = Path(__file__).parent.parent


def alter(run: Path, place: int, **values) -> dict:
    """Writes other values into a row of the first part; the row as it was."""
    part = parts(run / "record")[0]
    table = pq.read_table(part)
    was = table.slice(place, 1).to_pylist()[0]
    for name, value in values.items():
        column = table[name].to_pylist()
        column[place] = value
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(column, table.schema.field(name).type))
    pq.write_table(table, part)
    return was


def keep(run: Path, mask) -> None:
    """Keeps the rows of the first part for which ``mask(row)`` is true."""
    part = parts(run / "record")[0]
    table = pq.read_table(part)
    pq.write_table(table.filter(pa.array([mask(row) for row in table.to_pylist()])), part)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranks": 3, "pairs": 41},
        {"veto": ["entropy=2.5", "kl=5"]},
        {"method": "dpo"},
        {"beta_update": "mean-beta", "label_smoothing": 0.1},
        {"beta_update": "none", "epsilon": 0.3, "eval_pairs": 0},
    ],
)
def test_what_holds_together_is_ok(tmp_path, options):
    found = audit(write_run(tmp_path, **options))
    assert found.ok, str(found)
    rows = len(read(tmp_path / "record"))
    assert str(found).startswith(f"OK, {rows} rows, ") and rows >= 80
    if "veto" in options:
        assert sum(found.table["vetoed"].to_pylist()) > 3


def test_an_altered_decision_is_named(tmp_path, capsys):
    write_run(tmp_path)
    was = alter(tmp_path, 17, decision=0)
    assert was["decision"] != 0, "another row, please"
    assert main(["audit", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    (finding,) = audit(tmp_path).findings
    assert (finding.kind, finding.column, finding.place, finding.row) == ("value", "decision", 17, was["row"])
    assert finding.part == "part-000-00000001-0000.parquet" and finding.step == was["step"]
    assert finding.pair_id == was["pair_id"] and finding.follows == str(was["decision"]) and finding.holds == "0"
    assert "NOT OK, 1 finding" in printed and f"row {was['row']}, pair {was['pair_id']}" in printed
    alter(tmp_path, 17, decision=was["decision"])
    assert main(["audit", str(tmp_path)]) == 0 and "OK, 92 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "change", "named"),
    [
        ("beta", lambda v: v * 1.00001, {"beta"}),
        ("beta_used", lambda v: v * 1.00001, {"beta_used"}),
        ("margin", lambda v: v + 0.01, {"margin"}),
        ("loss", lambda v: v + 0.001, {"loss"}),
        ("coefficient", lambda v: v * 1.01, {"coefficient"}),
        ("chosen_logp", lambda v: v + 0.01, {"margin", "loss", "coefficient"}),
        ("relaxed_shift", lambda v: -v, {"decision", "beta", "beta_used", "loss", "coefficient"}),
        ("vetoed", lambda v: True, {"vetoed"}),
        ("epsilon", lambda v: 0.06, {"epsilon"}),
        ("label_smoothing", lambda v: 0.1, {"label_smoothing"}),
        ("method", lambda v: "dpo", {"method"}),
        ("loss", lambda v: float("nan"), {"loss"}),
    ],
)
def test_every_altered_figure_is_named(tmp_path, column, change, named):
    write_run(tmp_path)
    place = next(i for i, row in enumerate(read(tmp_path / "record").to_pylist()) if i > 30 and row["decision"] == -1)
    was = pq.read_table(parts(tmp_path / "record")[0]).slice(place, 1).to_pylist()[0]
    alter(tmp_path, place, **{column: change(was[column])})
    found = audit(tmp_path)
    here = [finding for finding in found.findings if finding.place == place]
    assert {finding.column for finding in here} | {f.column for f in found.findings} >= named
    assert {finding.column for finding in here} == named - ({"beta"} if column == "relaxed_shift" else set())
    if column != "relaxed_shift":  # a shift moves the decision, and with it the running β of every later step
        assert len(here) == len(found.findings)


def test_a_veto_must_follow_from_its_bounds(tmp_path):
    write_run(tmp_path, veto=["entropy=2.5", "kl=5"])
    rows = pq.read_table(parts(tmp_path / "record")[0]).to_pylist()
    place = next(i for i, row in enumerate(rows) if row["vetoed"])
    assert rows[place]["chosen_entropy"] > 2.5 or rows[place]["chosen_kl"] + rows[place]["rejected_kl"] > 5
    alter(tmp_path, place, vetoed=False)
    assert [(f.column, f.place, f.holds, f.follows) for f in audit(tmp_path).findings] == [
        ("vetoed", place, "False", "True")
    ]
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["options"]["veto"] = []  # with no bounds, nothing may withhold a relaxation
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert {f.column for f in audit(tmp_path).findings} >= {"vetoed", "decision"}


def test_what_is_missing_and_what_is_twice(tmp_path):
    def fresh(name, **more):
        return write_run(tmp_path / name, **more)

    run = fresh("steps")
    keep(run, lambda row: row["step"] not in (4, 5) or row["split"] == "eval")
    found = audit(run)
    assert found.counts["gap"] == 1 and found.findings[0].follows == "4–5" and found.counts["missing"] == 8
    assert "value" not in found.counts  # the β after a gap can't be worked out, and nothing is claimed

    run = fresh("part", rows_per_part=8)
    parts(run / "record")[3].unlink()
    assert {"gap", "missing"} == set(audit(run).counts)

    run = fresh("row")
    gone = read(run / "record").to_pylist()[6]
    keep(run, lambda row: (row["step"], row["row"]) != (gone["step"], gone["row"]))
    found = audit(run)
    assert found.counts["short"] == 1 and found.counts["missing"] == 1
    assert next(f for f in found.findings if f.kind == "short").step == gone["step"]

    run = fresh("double")
    was = alter(run, 21, row=7, pair_id=f"{7:016x}")
    found = audit(run)
    twice = next(f for f in found.findings if f.kind == "double")
    assert (twice.row, twice.column) == (7, "row") and found.counts["missing"] == 1 and was["row"] != 7

    run = fresh("id")
    alter(run, 60, pair_id="another")
    assert [(f.kind, f.column, f.holds) for f in audit(run).findings] == [("id", "pair_id", "another")]

    run = fresh("rank", ranks=2)
    last = parts(run / "record")[-1]
    table = pq.read_table(last)
    pq.write_table(table.filter(table["step"].to_numpy() < 8), last)
    found = audit(run)
    assert found.counts["rank"] == 1 and found.findings[-1].kind != "gap"
    assert next(f for f in found.findings if f.kind == "rank").follows == "8–10"

    run = fresh("end")
    (run / "checkpoint-23").mkdir()
    (run / "checkpoint-23" / "trainer_state.json").write_text('{"global_step": 23}')
    (run / "checkpoint-99").mkdir()
    (run / "checkpoint-99" / "trainer_state.json").write_text('{"global_step": 9')
    (finding,) = audit(run).findings
    assert (finding.kind, finding.holds, finding.follows) == ("end", "20", "23")

    run = fresh("evaluation")
    keep(run, lambda row: (row["split"], row["step"], row["row"]) != ("eval", 10, 42))
    (finding,) = audit(run).findings
    assert (finding.kind, finding.step, finding.holds) == ("missing", 10, "5")

    run = fresh("micro")
    part = parts(run / "record")[0]
    alter(run, 12, micro=2)
    found = audit(run)
    assert (
        found.counts == {"gap": 1}
        and found.findings[0].column == "micro, rank 0"
        and found.findings[0].part == part.name
    )


def test_a_part_that_cannot_be_read_is_named(tmp_path):
    run = write_run(tmp_path / "a", rows_per_part=8)
    cut, alien, broken = parts(run / "record")[2:5]
    cut.write_bytes(cut.read_bytes()[:300])
    pq.write_table(pq.read_table(alien).drop_columns(["margin"]), alien)
    # Text that is no UTF-8, which nothing but a full look at the column tells.
    table = pq.read_table(broken)
    bytes_ = pa.array([b"\xff\xfe<script>"] * len(table), pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(table), bytes_.buffers())
    at = table.schema.get_field_index("label")
    pq.write_table(table.set_column(at, table.schema.field(at), column), broken)
    found = audit(run)
    assert [f.part for f in found.findings if f.kind == "unreadable"] == [cut.name, alien.name, broken.name]
    assert "gap" in found.counts and "value" not in found.counts
    with pytest.raises(FileNotFoundError, match="run.json"):
        audit(tmp_path)
    for part in parts(run / "record"):
        part.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="can be read"):
        audit(run)


def test_many_findings_are_counted_and_few_are_shown(tmp_path):
    write_run(tmp_path, pairs=200)
    facts = json.loads((tmp_path / "run.json").read_text())
    facts["options"]["epsilon"] = 0.01
    (tmp_path / "run.json").write_text(json.dumps(facts))
    found = audit(tmp_path)
    assert found.counts["value"] > 400 and len(found.findings) < 400
    assert f"are shown of: {found.counts['value']:,} value" in str(found) and len(str(found).splitlines()) == 52


@pytest.mark.parametrize("method", ["beta-dpo", "tr-dpo", "lsc-dpo"])
def test_runs_of_other_methods(tiny, tmp_path, method):
    from train.__main__ import main as train

    train(flags(tiny, tmp_path, method=method, eval_fraction=0.25, eval_strategy="steps", eval_steps=2))
    found = audit(tmp_path)
    assert found.ok, str(found)
    assert len(found.table) == 36 + 12 * 4  # three evaluations on the way, one at the end, after the same step
    place = 20
    was = alter(tmp_path, place, decision=1)
    named = [(f.column, f.row) for f in audit(tmp_path).findings]
    assert named == [("decision", was["row"])]
    alter(tmp_path, place, decision=was["decision"], beta_used=was["beta_used"] * 1.001 + 1e-6)
    assert ("beta_used", was["row"]) in [(f.column, f.row) for f in audit(tmp_path).findings]


def test_lsc_dpos_beta_follows_from_the_margins_of_the_step_before(tiny, tmp_path):
    from train.__main__ import main as train

    train(flags(tiny, tmp_path, method="lsc-dpo", beta=1.0, learning_rate=3e-3, num_train_epochs=2, eval_fraction=0.25))
    found = audit(tmp_path)
    assert found.ok, str(found)
    rows = read(tmp_path / "record").to_pandas()
    betas = rows.query("split == 'train'").groupby("step")["beta"].first()
    margins = rows.query("split == 'train'").groupby("step")["margin"].mean()
    z = betas * margins
    assert (z > 0.21).sum() > 3
    for step in betas.index[:-1]:
        follows = betas[step] * (math.exp(-0.1 * (z[step] - 0.4)) if z[step] > math.log(0.55 / 0.45) else 1)
        assert betas[step + 1] == pytest.approx(follows, rel=1e-5)

    part = pq.read_table(parts(tmp_path / "record")[0]).to_pylist()
    place = next(i for i, row in enumerate(part) if z[row["step"]] > 0.3 and row["step"] > 6)
    alter(tmp_path, place, chosen_logp=part[place]["chosen_logp"] + 1)
    found = audit(tmp_path).findings
    assert {f.column for f in found if f.place == place} == {"margin", "loss", "coefficient"}
    # The next step's β no longer follows, nor what it makes; the steps after it follow from the β that it holds.
    assert {f.step for f in found if f.place != place} == {part[place]["step"] + 1}
    assert sum(f.column == "beta" for f in found) == 3 * 2


KILLED = """
import os, signal, sys
from train.__main__ import main
rename, written = os.replace, []
def replace(source, target):
    if "part-" in str(target):
        written.append(target)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_a_part_and_resumed(tiny, tmp_path):
    arguments = flags(tiny, tmp_path, save_strategy="steps", save_steps=2, num_train_epochs=2, save_total_limit=2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "record").glob(".part-*.tmp"))) == 1 and len(parts(tmp_path / "record")) == 2
    assert audit(tmp_path).ok  # what is there holds together: it reaches to the last complete checkpoint

    from train.__main__ import main as train

    train([*arguments, "--resume_from_checkpoint=last"])
    found = audit(tmp_path)
    assert found.ok, str(found)
    assert len(found.table) == 96 and found.table["step"].to_numpy().max() == 16


def test_a_large_record_takes_seconds(tmp_path):
    write_run(tmp_path, pairs=100_000, batch=2000)
    start = time.perf_counter()
    found = audit(tmp_path)
    assert found.ok and len(found.table) == 200_012
    assert time.perf_counter() - start < 30


def test_cost_of_the_record(tmp_path):
    """`pytest -s` prints what a step of 8 pairs pays; the bound takes a step of a second, and a busy machine."""
    from epsdpo_kernels import EpsilonDPOOutput
    from epsdpo_kernels.record import Recorder
    from train.trainer import PairRecord

    pairs = {"row": list(range(8)), "pair_id": [f"{n:016x}" for n in range(8)]}
    record = PairRecord(Recorder(tmp_path), "eps-dpo", 0.05, 0.0, {"train": pairs}, None)
    out = EpsilonDPOOutput(*(torch.randn(8) for _ in EpsilonDPOOutput._fields))
    out = out._replace(step=torch.ones(8, dtype=torch.int8))
    row, tokens, beta = torch.arange(8), torch.full((2, 8), 100), torch.tensor(0.1)
    start, processor = time.perf_counter(), time.process_time()
    for step in range(200):
        record.append("train", SimpleNamespace(global_step=step, epoch=0.0), row, tokens, beta, out)
    record.flush()
    cost, processor = (time.perf_counter() - start) / 200, (time.process_time() - processor) / 200
    print(f"\nthe record costs {cost * 1e3:.2f} ms a step of 8 pairs: {cost / 8:.3%} of a step of 8 s")
    assert len(read(tmp_path)) == 1600 and cost > 0
    assert processor < 0.02
