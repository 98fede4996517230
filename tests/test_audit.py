"""The audit: a record that holds together is OK, and every way in which one does not is named where it is."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pa = pytest.importorskip("pyarrow", reason="the trainer's extra is not installed")
pq = pytest.importorskip("pyarrow.parquet")

from epsdpo_kernels.__main__ import main  # noqa: E402
from epsdpo_kernels.pair import lsc_dpo  # noqa: E402
from epsdpo_kernels.record import SCHEMA, Recorder, parts, read  # noqa: E402
from epsdpo_kernels.record.audit import audit  # noqa: E402
from epsdpo_kernels.record.recorder import write_end  # noqa: E402
from records import OPTIONS, rechain, write_run  # noqa: E402
from runs import flags  # noqa: E402

ROOT = Path(__file__).parent.parent


def alter(run: Path, place: int, chain: bool = True, **values) -> dict:
    """Writes other values into a row of the first part, and the chain anew, so that rows tell; the row as it was."""
    part = parts(run / "record")[0]
    table = pq.read_table(part)
    was = table.slice(place, 1).to_pylist()[0]
    for name, value in values.items():
        column = table[name].to_pylist()
        column[place] = value
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(column, table.schema.field(name).type))
    pq.write_table(table, part)
    if chain:
        rechain(run)
    return was


def keep(run: Path, mask, chain: bool = True) -> None:
    """Keeps the rows of the first part for which ``mask(row)`` is true, and writes the chain anew."""
    part = parts(run / "record")[0]
    table = pq.read_table(part)
    pq.write_table(table.filter(pa.array([mask(row) for row in table.to_pylist()])), part)
    if chain:
        rechain(run)


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


def test_the_last_batch_dropped_is_no_fault(tmp_path):
    """Two micro-batches a step of 5 pairs, and of 48 pairs the last 3 left out: an epoch ends with a short step."""
    run = write_run(tmp_path, pairs=48, batch=5, accumulation=2, drop_last=True, eval_pairs=0)
    steps = read(run / "record")["step"].to_numpy()
    assert [int((steps == step).sum()) for step in range(1, 11)] == [10, 10, 10, 10, 5] * 2
    assert audit(run).ok, str(audit(run))
    # A batch of 5 is what may be left out, once the epoch is over; a step that is short within it is not.
    keep(run, lambda row: row["step"] != 5)
    assert {(f.kind, f.epoch, f.step, f.holds, f.follows) for f in audit(run).findings} == {
        ("gap", None, 5, "–", "5"), ("missing", 0, None, "40", "44"),
    }  # fmt: skip
    run = write_run(tmp_path / "short", pairs=48, batch=5, accumulation=2, drop_last=True, eval_pairs=0)
    keep(run, lambda row: row["step"] != 10 and (row["step"], row["micro"]) != (9, 1))
    assert [(f.kind, f.step, f.holds, f.follows) for f in audit(run).findings] == [("short", 9, "5", "10")]


def test_the_last_batch_of_an_evaluation_dropped_is_no_fault(tmp_path):
    run = write_run(tmp_path, pairs=48, batch=5, drop_last=True, eval_pairs=9)
    arguments = json.loads((run / "run.json").read_text())["training_arguments"]
    tell(run, training_arguments=arguments | {"per_device_eval_batch_size": 5})
    keep(run, lambda row: row["split"] == "train" or row["row"] < 48 + 5)
    assert audit(run).ok, str(audit(run))
    keep(run, lambda row: row["split"] == "train" or row["row"] < 48 + 4)
    assert {(f.kind, f.column, f.holds, f.follows) for f in audit(run).findings} == {
        ("missing", "eval pairs", "4", "5")
    }


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
        ("policy_step", lambda v: v - 1, {"policy_step"}),
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


@pytest.mark.parametrize("method", ["eps-dpo", "beta-dpo"])
def test_an_evaluation_is_of_the_policy_that_it_names(tmp_path, method):
    """The last step's or an earlier one's, with the β after that step."""
    write_run(tmp_path, **({"method": method, "epsilon": 0.0} if method == "beta-dpo" else {}))
    rows = pq.read_table(parts(tmp_path / "record")[0]).to_pylist()
    place = next(i for i, row in enumerate(rows) if row["split"] == "eval")
    step, held = rows[place]["step"], {row["step"]: row["beta"] for row in rows if row["split"] == "train"}
    alter(tmp_path, place, policy_step=step + 1)
    assert [(f.column, f.holds, f.follows) for f in audit(tmp_path).findings if f.column == "policy_step"] == [
        ("policy_step", str(step + 1), str(step))
    ]
    if method == "eps-dpo":
        alter(tmp_path, place, policy_step=3)
        (finding,) = [f for f in audit(tmp_path).findings if f.column == "beta"]
        assert finding.place == place and float(finding.follows) == pytest.approx(held[4], rel=1e-6)


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
    rechain(run)
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
    rechain(run)
    found = audit(run)
    assert found.counts["rank"] == 1 and found.findings[-1].kind != "gap"
    assert next(f for f in found.findings if f.kind == "rank").follows == "8–10"

    run = fresh("end")
    (run / "checkpoint-23").mkdir()
    (run / "checkpoint-23" / "trainer_state.json").write_text('{"global_step": 23}')
    for n, cut in enumerate(('{"global_step": 9', '{"global_step": 1e999}')):
        (run / f"checkpoint-{99 - n}").mkdir()
        (run / f"checkpoint-{99 - n}" / "trainer_state.json").write_text(cut)
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
    with pytest.raises(ValueError, match="part-000-00000001-0000.parquet: .*no part of the record can be read"):
        audit(run)


OPTION, FACT = "options.", ""
NOTHING = object()


def refused(run: Path, capsys, *named: str) -> None:
    """Audit and report say in one line what is wrong, and write nothing."""
    for command in ("audit", "report"):
        assert main([command, str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and all(name in line for name in named), line
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("place", "value", "taken"),
    [
        *[(OPTION + name, NOTHING, "got nothing, takes") for name in
          ("method", "beta", "epsilon", "beta_update", "label_smoothing")],
        *[(OPTION + "beta", value, "takes a positive finite number") for value in
          (None, float("nan"), float("inf"), 0, -0.1, "0.1", True, 10**400)],
        (OPTION + "epsilon", "0.05", "got '0.05', takes a number in [0, 1)"),
        (OPTION + "method", "x", "takes one of eps-dpo, dpo, tr-dpo, beta-dpo, lsc-dpo"),
        (OPTION + "method", ["eps-dpo"], "takes one of eps-dpo"),
        (OPTION + "beta_update", "mean", "takes one of mean-step, mean-beta, none"),
        (OPTION + "label_smoothing", 0.5, "takes a number in [0, 0.5)"),
        (OPTION + "veto", ["kl=abc"], "got ['kl=abc'], takes a list of entropy=NATS and kl=NATS"),
        (OPTION + "veto", "kl=1", "takes a list of entropy=NATS and kl=NATS"),
        (OPTION + "dataset", 5, "got 5, takes a file or hub name, or a list of files"),
        (OPTION + "dataset", "\x1b[2J" * 99, None),
        (FACT + "options", NOTHING, "got nothing, takes an object"),
        (FACT + "options", [], "got [], takes an object"),
        (FACT + "pairs", [1], "got [1], takes an object with a number by split"),
        (FACT + "pairs", {"train": "\x1b[2J"}, r"got {'train': '\x1b[2J'}, takes an object"),
        (FACT + "streams", None, "got None, takes a list of splits"),
        *[(FACT + "ranks", value, "takes a number of processes, from 1") for value in (0, -1, "2", 2**40)],
        (FACT + "begins_after", "3", "got '3', takes a number of steps"),
        (FACT + "states_of_others", 3, "got 3, takes a list of files"),
        (FACT + "training_arguments", None, "got None, takes an object"),
        ("training_arguments.per_device_train_batch_size", "4", "got '4', takes a number of pairs"),
        ("training_arguments.per_device_eval_batch_size", "2", "got '2', takes a number of pairs"),
    ],
)  # fmt: skip
def test_a_run_json_with_what_no_run_writes(tmp_path, capsys, place, value, taken):
    run = write_run(tmp_path, pairs=4, epochs=1)
    facts = json.loads((run / "run.json").read_text())
    *above, name = place.split(".")
    inner = facts[above[0]] if above else facts
    inner.pop(name, None) if value is NOTHING else inner.update({name: value})
    (run / "run.json").write_text(json.dumps(facts))
    if taken is None:  # any name of a data set will do
        assert audit(run).ok
    else:
        refused(run, capsys, f"{run / 'run.json'}: {place}: ", taken)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *[(text, "can't be read as JSON") for text in ('{"options": ', "", "[" * 100_000)],
        ("[1]", "got [1], takes an object"), ("null", "got None, takes an object"),
    ],
)  # fmt: skip
def test_a_run_json_that_is_none(tmp_path, capsys, text, named):
    run = write_run(tmp_path, pairs=4, epochs=1)
    (run / "run.json").write_text(text)
    refused(run, capsys, str(run / "run.json"), named)


@pytest.mark.parametrize("method", ["beta-dpo", "lsc-dpo"])
def test_what_a_method_needs(tmp_path, capsys, method):
    run = write_run(tmp_path, pairs=4, epochs=1)
    facts = json.loads((run / "run.json").read_text())
    del facts["options"]["beta_dpo_alpha"]
    facts["options"]["method"] = method
    (run / "run.json").write_text(json.dumps(facts))
    refused(run, capsys, f"options.{'beta_dpo_alpha' if method == 'beta-dpo' else 'lsc_z_star'}: got nothing, takes a")


@pytest.mark.parametrize(
    ("column", "value", "taken"),
    [
        ("step", 10**12, "an integer from 0, below 2^31"), ("step", -5, "an integer from 0, below 2^31"),
        ("policy_step", -1, "an integer from 0, below 2^31"),
        ("micro", -2, "an integer from 0"), ("rank", 3, "0, as the part's name says"),
        ("epoch", math.inf, "a finite number from 0"), ("epoch", -5.0, "a finite number from 0"),
        ("row", -7, "an integer from 0, or null"), ("chosen_tokens", -1, "an integer from 0"),
        ("decision", 5, "−1, 0 or 1"), ("decision", -128, "−1, 0 or 1"),
        *[("beta", value, "a positive finite number") for value in (0.0, math.nan, math.inf)],
        *[("beta_used", value, "a finite number from 0") for value in (-0.5, math.nan, math.inf)],
    ],
)  # fmt: skip
def test_a_column_with_what_no_run_writes(tmp_path, capsys, column, value, taken):
    """One part of several is left out and named; where it is the only one there is nothing to check or to draw."""
    run = write_run(tmp_path / "several", pairs=16, epochs=1, rows_per_part=8)
    name = parts(run / "record")[0].name
    alter(run, 3, **{column: value})
    found = audit(run)
    (finding,) = [f for f in found.findings if f.kind == "unreadable"]
    assert finding.part == name and finding.holds == f"{column} holds {value} in row 3, takes {taken}"
    assert main(["report", str(run)]) == 0
    run = write_run(tmp_path / "one", pairs=4, epochs=1)
    alter(run, 3, **{column: value})
    refused(run, capsys, f"{parts(run / 'record')[0]}: {column} holds {value} in row 3, takes {taken}")


def test_a_step_far_from_the_others_is_a_gap(tmp_path):
    run = write_run(tmp_path, pairs=16, epochs=1, eval_pairs=0)
    alter(run, 15, step=2_000_000_000)
    found = audit(run)
    assert [(f.follows, f.step) for f in found.findings if f.kind == "gap"] == [("5–1999999999", 5)]


def chained(run: Path) -> list[tuple]:
    return [(f.part, f.column, f.holds, f.follows) for f in audit(run).findings if f.kind == "chain"]


def tell(run: Path, options: dict | None = None, **facts) -> None:
    """Writes other facts, and options, into run.json; None takes one away."""
    told = json.loads((run / "run.json").read_text()) | facts
    told["options"] |= options or {}
    (run / "run.json").write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


def limits(run: Path) -> dict:
    found = audit(run)
    assert found.ok, str(found)
    return dict(found.limits)


def test_a_rank_that_is_not_there_is_named(tmp_path):
    """All of its files are gone, in a run of one epoch, which was then whole as far as the others tell."""
    run = write_run(tmp_path / "gone", ranks=2, epochs=1, method="dpo")
    assert audit(run).ok and not audit(run).limits
    for path in (run / "record").glob("*-001*"):
        path.unlink()
    found = [(f.kind, f.column, f.holds, f.follows) for f in audit(run).findings]
    assert found == [("rank", "ranks", "–", "rank 1"), ("rank", "step, rank 1", "–", "1–5")]
    # A record of before that was told is read as ever, and what it can't show is said.
    tell(run, ranks=None)
    assert set(limits(run)) == {"no_ranks", "last_epoch"}

    run = write_run(tmp_path / "more", ranks=2)
    tell(run, ranks=1)
    assert [(f.kind, f.holds, f.follows) for f in audit(run).findings] == [("rank", "rank 1", "ranks below 1")]

    # A rank that was there and had no pairs has an end, and is not missed.
    run = write_run(tmp_path / "idle", pairs=4, epochs=1, ranks=2, eval_pairs=0)
    assert not parts(run / "record")[1:] and (run / "record" / "end-001.json").is_file() and not limits(run)


def test_a_last_epoch_that_is_not_whole_is_said(tmp_path):
    run = write_run(tmp_path, epochs=1)
    assert not limits(run)
    tell(run, pairs={"train": 4000, "eval": 6})
    assert limits(run) == {"last_epoch": {"n": "40", "of": "4,000"}}
    assert "not checked: The last epoch holds 40 of 4,000 pairs; whether it was to go on" in str(audit(run))


def test_settings_by_which_pairs_may_come_twice_or_not_at_all_are_said(tmp_path):
    run = write_run(tmp_path)
    alter(run, 21, row=7, pair_id=f"{7:016x}")
    assert audit(run).counts == {"double": 1, "missing": 1}
    arguments = json.loads((run / "run.json").read_text())["training_arguments"]
    tell(run, training_arguments=arguments | {"ignore_data_skip": True})
    assert audit(run).counts == {"missing": 1} and set(dict(audit(run).limits)) == {"ignore_data_skip"}
    del arguments["per_device_train_batch_size"]
    tell(run, training_arguments=arguments | {"ignore_data_skip": True, "dataloader_drop_last": True})
    assert set(limits(run)) == {"ignore_data_skip", "drop_last"}


def test_without_its_end_no_record_is_whole(tmp_path):
    """Also one of a single part, in which something was altered: no kill leaves a part and no end at all."""
    run = write_run(tmp_path)
    alter(run, 3, chain=False, chosen_entropy=9.0)
    (run / "record" / "end-000.json").unlink()
    assert chained(run) == [("", "end", "–", "end-000.json")]


def test_killed_before_the_end_of_its_first_part(tmp_path):
    """The end that is there from the start knows of no part: the one that is there is counted, and said."""
    run = write_run(tmp_path)
    (only,) = parts(run / "record")
    write_end(run / "record" / "end-000.json", "", "", False)
    assert limits(run)["late_part"] == {"part": only.name}
    write_end(run / "record" / "end-000.json", "", "0" * 64, False)
    assert [column for _, column, *_ in chained(run)] == ["end"]


def test_what_a_record_says_stays_in_its_line(tmp_path, capsys):
    """Ids, names and strings of a record that would clear the screen, hide, or print a verdict of their own."""
    hostile = "\x1b[2J\x1b[HOK, 8 rows\nSHA-256 of its end: 00\x1b[8m\u202e"
    run = write_run(tmp_path, pairs=16, ids=[f"{hostile}{n}{'x' * 999}" for n in range(22)], eval_sets=(hostile,))
    alter(run, 3, decision=1, method=hostile)
    keep(run, lambda row: (row["split"], row["step"], row["row"]) != (hostile, 4, 17))
    tell(run, pairs={"train": 16, hostile: 6}, states_of_others=[hostile])
    write_end(run / "record" / "end-000.json", hostile, "0" * 64, True)
    assert main(["audit", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "NOT OK" in lines[0] and not any(line.startswith("OK") for line in lines)
    assert sum(line.startswith("SHA-256") for line in lines) == 1
    assert all(line.startswith("  ") for line in lines[1:-1]) and max(map(len, lines)) < 1000
    printed = "".join(lines)
    assert printed.isprintable() and "⟨U+001B⟩[2J⟨U+001B⟩[HOK, 8 rows⟨U+000A⟩SHA-256" in printed
    assert {"chain", "value", "missing"} <= set(audit(run).counts) and "⟨U+202E⟩" in printed


def test_batches_of_any_size(tmp_path):
    """A step with more pairs than most lacks none; one with fewer is short where the run states its batch size."""
    run = write_run(tmp_path, epochs=1, eval_pairs=0, method="dpo")
    keep(run, lambda row: row["row"] not in (3, 5))
    assert set(audit(run).counts) == {"short"}
    tell(run, training_arguments={}, pairs={"train": 38})
    assert limits(run)["no_batch_size"]["usual"] == "4"
    run = write_run(tmp_path / "more", epochs=1, eval_pairs=0, method="dpo")
    rows = pq.read_table(parts(run / "record")[0]).to_pylist()
    place = next(i for i, row in enumerate(rows) if row["step"] == 10)
    alter(run, place, **{name: rows[0][name] for name in ("step", "policy_step", "beta", "epoch")})
    assert "short" not in audit(run).counts


def short_digest(part: Path) -> str:
    return hashlib.sha256(part.read_bytes()).hexdigest()[:16]


def test_one_altered_number_breaks_the_chain(tmp_path):
    """Also one from which nothing follows: an entropy, which only the model could work out again."""
    write_run(tmp_path, rows_per_part=8)
    first = parts(tmp_path / "record")[0]
    was = short_digest(first)
    alter(tmp_path, 3, chain=False, chosen_entropy=9.0)
    assert chained(tmp_path) == [(first.name, "SHA-256", short_digest(first), was)]
    assert set(audit(tmp_path).counts) == {"chain"}
    rechain(tmp_path)
    assert audit(tmp_path).ok

    # Where a figure does not follow, the row is named too.
    decision = pq.read_table(first)["decision"][3].as_py()
    alter(tmp_path, 3, chain=False, decision=0 if decision else 1)
    assert audit(tmp_path).counts == {"chain": 1, "value": 1}


def test_the_end_vouches_for_the_last_part(tmp_path):
    write_run(tmp_path)
    (only,) = parts(tmp_path / "record")
    was = short_digest(only)
    alter(tmp_path, 3, chain=False, rejected_entropy=9.0)
    assert chained(tmp_path) == [(only.name, "SHA-256", short_digest(only), was)]


def test_a_removed_row_breaks_the_chain(tmp_path):
    write_run(tmp_path, rows_per_part=8)
    first = parts(tmp_path / "record")[0]
    keep(tmp_path, lambda row: row["row"] != pq.read_table(first)["row"][2].as_py(), chain=False)
    assert [part for part, *_ in chained(tmp_path)] == [first.name]
    assert {"chain", "short", "missing"} <= set(audit(tmp_path).counts)


def test_two_swapped_parts_break_the_chain(tmp_path):
    run = write_run(tmp_path / "contents", rows_per_part=8)
    names = [part.name for part in parts(run / "record")]
    one, other = parts(run / "record")[2:4]
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1]), other.write_bytes(data[0])
    # The part before the two, and both: none is what the next one says.
    assert [(part, column) for part, column, *_ in chained(run)] == [(name, "SHA-256") for name in names[1:4]]
    assert set(audit(run).counts) == {"chain"}

    run = write_run(tmp_path / "numbers", rows_per_part=8)
    for part, number in zip(parts(run / "record")[2:4], ("0003", "0002"), strict=True):
        part.rename(part.with_name(f"{part.name[:-12]}{number}.parquet"))
    assert [follows for *_, follows in chained(run)] == ["part 2 of rank 0", "part 3 of rank 0"]


def test_a_removed_part_is_named(tmp_path):
    write_run(tmp_path / "middle", rows_per_part=8)
    gone = parts(tmp_path / "middle" / "record")[3]
    gone.unlink()
    after = parts(tmp_path / "middle" / "record")[3].name
    assert chained(tmp_path / "middle") == [(after, "part", "–", "part 3 of rank 0")]

    # Of the last part neither steps nor pairs need tell: the run may just have ended.
    run = write_run(tmp_path / "last", rows_per_part=8, eval_pairs=0, epochs=1)
    last = parts(run / "record")[-1]
    last.unlink()
    assert chained(run) == [("end-000.json", "part", "–", last.name)]
    assert set(audit(run).counts) == {"chain"}
    (run / "record" / "end-000.json").unlink()
    assert chained(run) == [("", "end", "–", "end-000.json")]

    run = write_run(tmp_path / "first", rows_per_part=8)
    parts(run / "record")[0].unlink()
    assert [(column, follows) for _, column, _, follows in chained(run)] == [("part", "part 0 of rank 0")]

    run = write_run(tmp_path / "ranks", ranks=2, rows_per_part=8)
    last = parts(run / "record")[-1]
    last.unlink()
    assert chained(run) == [("end-001.json", "part", "–", last.name)]


def test_a_kill_between_a_part_and_its_end_is_no_forgery(tmp_path):
    run = write_run(tmp_path, rows_per_part=8)
    *_, before, last = parts(run / "record")
    write_end(run / "record" / "end-000.json", before.name, hashlib.sha256(before.read_bytes()).hexdigest(), False)
    found = audit(run)
    assert found.ok and dict(found.limits)["late_part"] == {"part": last.name} and "open" in dict(found.limits)
    last.unlink()
    assert audit(run).ok and [name for name, _ in audit(run).limits] == ["open"]
    write_end(run / "record" / "end-000.json", before.name, "0" * 64, True)
    assert [column for _, column, *_ in chained(run)] == ["SHA-256"]


def test_an_end_is_of_the_last_part_by_name_and_digest(tmp_path):
    """And one that was closed knows of all parts: one more was added, or the last ones were taken for others."""
    run = write_run(tmp_path, rows_per_part=8)
    first, *_, before, last = parts(run / "record")
    end = run / "record" / "end-000.json"
    of = {part: hashlib.sha256(part.read_bytes()).hexdigest() for part in (first, before, last)}
    for named, held in ((before, before), (before, last)):
        write_end(end, named.name, of[held], True)
        assert chained(run) == [(end.name, "end", last.name, named.name)]
    for named, held in ((before, last), (first, before)):
        write_end(end, named.name, of[held], False)
        assert chained(run) == [(end.name, "end", last.name, named.name)]
    write_end(end, last.name, of[before], False)
    assert chained(run) == [(last.name, "SHA-256", of[last][:16], of[before][:16])]
    write_end(end, last.name, of[last], True)
    assert not limits(run)


def forge(run: Path, step: int, epsilon: float) -> None:
    """The consistent forgery: one decision of a step turned round, and all that follows from it, to the end."""
    from epsdpo_kernels.pair import losses_and_coefficients, pair_beta

    beta, turned = None, False
    for part in parts(run / "record"):
        table = pq.read_table(part)
        rows = table.to_pandas()
        for at in sorted(rows["step"].unique()):
            for split in ("train", "eval"):  # an evaluation comes after its step
                of = (rows["step"] == at) & (rows["split"] == split)
                if not of.any():
                    continue
                if at == step and split == "train" and not turned:
                    place = rows.index[of & (rows["decision"] != 0)][0]
                    for name in ("relaxed_shift", "tightened_shift", "decision"):
                        rows.loc[place, name] *= -1
                    turned = True
                if beta is not None:
                    rows.loc[of, "beta"] = beta
                decision = torch.tensor(rows.loc[of, "decision"].to_numpy())
                used = pair_beta(decision, torch.tensor(rows.loc[of, "beta"].to_numpy()), epsilon)
                names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
                logps = tuple(torch.tensor(rows.loc[of, name].to_numpy()).double() for name in names)
                losses, coefficient = losses_and_coefficients(logps, used.double(), 0.0)
                for name, values in (("beta_used", used), ("loss", losses), ("coefficient", coefficient)):
                    rows.loc[of, name] = values.numpy().astype("float32")
                if turned and split == "train":
                    held = torch.tensor(rows.loc[of, "beta"].to_numpy()[0])
                    beta = held.div_(1 + epsilon * decision.double().mean()).item()
        forged = pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)
        if turned:
            pq.write_table(forged.replace_schema_metadata(table.schema.metadata), part)


def test_a_consistent_forgery_is_seen_unless_the_whole_chain_is_rewritten(tmp_path):
    run = write_run(tmp_path, rows_per_part=8, epsilon=0.05)
    honest, names = audit(run), [part.name for part in parts(run / "record")]
    assert honest.ok and len(names) > 8
    betas = read(run / "record")["beta"].to_numpy()
    forge(run, 9, 0.05)
    assert abs(read(run / "record")["beta"].to_numpy() / betas - 1).max() > 0.01
    found = audit(run)
    # Every figure follows from the others; the bytes are not those that were written.
    assert set(found.counts) == {"chain"}
    altered = [f.part for f in found.findings]
    assert names[4] in altered and altered[-1] == names[-1] and names[0] not in altered
    # What is not proved: who rewrites every part and the end too is seen only by the digest that somebody kept.
    rechain(run)
    forged = audit(run)
    assert forged.ok and forged.digest != honest.digest and len(honest.digest) == 64


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
    assert len(found.table) == 36 + 12 * 3  # three evaluations, the last of them after the last step
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


@pytest.mark.parametrize(
    ("eta", "tau_start", "taken"), [(1e6, 0.99, "at most 16"), (36.0, 0.86, None), (1e6, 0.45, "at most 401")]
)
def test_an_eta_that_no_float_holds_is_refused(tmp_path, capsys, eta, tau_start, taken):
    """A step may multiply β by e^(η·(z* − log(1/τ − 1))) at most, which 1e6 takes beyond any float."""
    run = write_run(tmp_path, pairs=8, epochs=1, method="lsc-dpo", lsc_z_star=0.4, lsc_eta=eta, lsc_tau_start=tau_start)
    if taken:
        refused(run, capsys, f"options.lsc_eta: got {eta}, takes {taken} with these z* and τ_start")
        return
    worst = math.log(1 / tau_start - 1) + 1e-9
    assert 70 < math.log(lsc_dpo(1.0, worst, 0.4, eta, tau_start)) <= 80
    assert audit(run).table is not None


def test_a_long_run_of_beta_dpo(tmp_path):
    """β₀·(1 + α·(margin − M₀)) cancels to a small part of β₀: a rounding of M₀ in any of the batches would show."""
    from epsdpo_kernels.pair import losses_and_coefficients
    from train.methods import BetaDPOLoss

    loss_fn, g = BetaDPOLoss(0.1, alpha=0.6, keep=0.8), torch.Generator().manual_seed(0)
    options = OPTIONS | {"method": "beta-dpo", "beta_dpo_alpha": 0.6, "beta_dpo_keep": 0.8}
    facts = {"options": options, "pairs": {"train": 16}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    recorder, nothing, betas = Recorder(tmp_path / "record"), torch.zeros(16), []
    for step in range(1, 501):
        margins = 30 + 2 * math.sin(step) + torch.randn(16, generator=g)
        before = loss_fn.beta.item()
        kept, _ = loss_fn._decide(margins, torch.ones(16, dtype=torch.bool))
        used = torch.where(kept, loss_fn.beta, 0)
        betas.append(loss_fn.beta.item())
        logps = margins, nothing, nothing, nothing
        losses, coefficient = losses_and_coefficients(tuple(t.double() for t in logps), used.double(), 0.0)
        columns = {name: 0.0 for name in SCHEMA.names if name not in ("rank", "label")}
        recorder.append(columns | {
            "step": step, "policy_step": step - 1, "micro": 0, "epoch": float(step - 1), "split": "train",
            "method": "beta-dpo",
            "pair_id": [f"{n:016x}" for n in range(16)], "row": range(16), "vetoed": False, "beta": before,
            "chosen_logp": margins.numpy(), "margin": margins.numpy(), "beta_used": used.numpy(),
            "loss": torch.where(kept, losses, 0).numpy(), "coefficient": coefficient.numpy(),
        })  # fmt: skip
    recorder.close()
    assert sum(0.0011 < beta < 0.01 for beta in betas) > 10
    found = audit(tmp_path)
    assert found.ok, str(found)


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
    found = audit(tmp_path)  # what is there holds together: it reaches to the last complete checkpoint
    assert found.ok and [name for name, _ in found.limits] == ["open"]
    assert "not checked: The record of rank 0 was not closed" in str(found)

    from train.__main__ import main as train

    train([*arguments, "--resume_from_checkpoint=last"])
    found = audit(tmp_path)
    assert found.ok and not found.limits, str(found)
    assert len(found.table) == 96 and found.table["step"].to_numpy().max() == 16


def test_a_large_record_takes_seconds(tmp_path):
    write_run(tmp_path, pairs=100_000, batch=2000)
    start = time.perf_counter()
    found = audit(tmp_path)
    assert found.ok and len(found.table) == 200_012
    assert time.perf_counter() - start < 30


def test_cost_of_the_record(tmp_path):
    """`pytest -s` prints what a step of 8 pairs pays; the bound takes a step of a second, and a busy machine."""
    from epsdpo_kernels import EpsilonDPOLoss, EpsilonDPOOutput
    from epsdpo_kernels.record import Record

    pairs = {"row": list(range(8)), "pair_id": [f"{n:016x}" for n in range(8)]}
    record = Record(tmp_path, EpsilonDPOLoss(0.1, 0.05), pairs={"train": pairs})
    out = EpsilonDPOOutput(*(torch.randn(8) for _ in EpsilonDPOOutput._fields))
    tokens = {"chosen_tokens": torch.full((8,), 100), "rejected_tokens": torch.full((8,), 100)}
    out = out._replace(step=torch.ones(8, dtype=torch.int8), beta=torch.full((8,), 0.1 / 1.05), **tokens)
    row = torch.arange(8)
    start, processor = time.perf_counter(), time.process_time()
    for step in range(1, 201):
        record.append(out, step=step, row=row, epoch=0.0)
    record.close()
    cost, processor = (time.perf_counter() - start) / 200, (time.process_time() - processor) / 200
    print(f"\nthe record costs {cost * 1e3:.2f} ms a step of 8 pairs: {cost / 8:.3%} of a step of 8 s")
    assert len(read(tmp_path / "record")) == 1600 and cost > 0
    assert processor < 0.02
