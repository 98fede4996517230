"""What measures on a GPU, as far as a CPU can show it: its parts, their order, what they keep and where."""

import json
import os
import re
import subprocess
import sys

import pytest

from bench import compare, goals, gpu, measure, steps, tables, variants
from bench.cases import Case, make_inputs
from bench.results import Run
from epsdpo_kernels import plan
from epsdpo_kernels.engines import triton_engine

TINY = ["--device", "cpu", "--tiny", "--quick"]


def records(folder, part) -> list[dict]:
    return json.loads((folder / measure.device_name("cpu") / f"{part}.json").read_text())["records"]


def test_gpu_program_runs_and_resumes(tmp_path, monkeypatch):
    """The GPU's program on a CPU with tiny shapes, its kernels interpreted: what it does first must not be to fail."""
    gradient = triton_engine.gradient

    def of_swept_tokens(a, tile, tokens, *rest):
        assert (tokens.swept[1] >= 1).all(), "a sum relative to its own maximum"
        gradient(a, tile, tokens, *rest)

    monkeypatch.setattr(triton_engine, "gradient", of_swept_tokens)
    parts = {
        "smoke": {"smoke"}, "device": {"device"}, "stages": {"stages"}, "tiles": {"tiles"}, "routes": {"routes"},
        "exact": {"check", "synthetic", "repeated"}, "long": {"length"},
    }  # fmt: skip
    command = [*TINY, "--out", str(tmp_path), "--part", *parts]
    gpu.main(command)
    found = {part: records(tmp_path, part) for part in parts}
    assert {part: {r["kind"] for r in each} for part, each in found.items()} == parts
    assert not [r for each in found.values() for r in each if r["outcome"] == "failed"]
    assert {r["outcome"] for r in found["smoke"]} == {"ok"} and len(found["smoke"]) == 2 * 4 + 3 * 2 * 2 + 1
    assert found["exact"][0]["different"] == 0
    assert set(found["stages"][0]["stages"]) == {
        "policy product", "reference product", "sweep", "decide", "gradient", "dX", "dW", "head and sweep in one",
        "head and sweep in one, logits not kept",
    }  # fmt: skip
    (tiles,) = found["tiles"]
    assert set(tiles["found"]) == {"limit", "ours", *variants.BUDGETS, *variants.WAITING}
    assert all(r["rounds"] == 3 and r["to_limit"]["ratio"] > 0 for r in tiles["found"].values())
    assert [r["rows"] for r in found["long"] if r["variant"] == "ours"] == [16, 32]
    gpu.main(command)
    assert {part: records(tmp_path, part) for part in parts} == found


def test_gpu_program_keeps_what_it_has_when_time_is_up(tmp_path, capfd, monkeypatch):
    clock = iter(range(10**6))
    command = [*TINY, "--out", str(tmp_path), "--part", "device", "exact"]
    with monkeypatch.context() as patch:
        patch.setattr(measure.Progress, "elapsed", property(lambda _: next(clock)))
        gpu.main([*command, "--seconds", "30"])
    assert "time is up" in capfd.readouterr().err
    kept = records(tmp_path, "device") + records(tmp_path, "exact")
    assert 4 < len(kept) < 20
    gpu.main(command)
    everything = records(tmp_path, "device") + records(tmp_path, "exact")
    assert everything[: len(kept)] == kept and len(everything) > len(kept)
    assert "done" in capfd.readouterr().err


def test_gpu_program_leaves_another_cards_results_alone(tmp_path, monkeypatch):
    command = [*TINY, "--out", str(tmp_path), "--part", "device"]
    gpu.main(command)
    before = records(tmp_path, "device")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "device_name", lambda device: "another-card")
        gpu.main(command)
        assert records(tmp_path, "device") != before
    assert records(tmp_path, "device") == before
    assert {path.name for path in tmp_path.iterdir()} == {"another-card", measure.device_name("cpu")}


def test_gpu_program_measures_cases(tmp_path, monkeypatch):
    results = measure.Results(tmp_path / "gpu.json", "cpu")
    session = gpu.Session("cpu", results, measure.Progress(), 1e9, quick=True, tiny=True)
    gpu.measure_case(session, Case("tiny", 16, dtype="bfloat16"), ["trl", "cut-cross-entropy"], rounds=2)
    times = {r["variant"]: r for r in results.data["records"] if r["kind"] == "time"}
    assert times["ours"]["rounds"] == 2 and times["ours"]["to_limit"]["ratio"] > 1
    assert results.find(kind="memory", variant="cut-cross-entropy")["outcome"] == "unavailable"
    pytest.importorskip("transformers")
    gpu.training(session)
    trained = [r for r in results.data["records"] if r["kind"] == "training"]
    assert [r["loss"] for r in trained] == ["ours", "materialised"]
    assert all(r["outcome"] == "ok" and r["tokens_per_second"] > 0 for r in trained), trained
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
    gpu.steps(session)
    stepped, memory = ([r for r in results.data["records"] if r["kind"] == k] for k in ("step", "step memory"))
    assert [(r["model"], r["case"], r["pairs"], r["round"]) for r in stepped] == [("tiny", "hh", 2, i) for i in (0, 1)]
    assert stepped[0]["tokens"]["packed"] == sum(map(sum, json.loads(steps.HH_LENGTHS.read_text())[:2]))
    assert all(min(r["seconds"].values()) > 0 for r in stepped)
    assert [(r["variant"], r["outcome"]) for r in memory] == [(v, "ok") for v in steps.VARIANTS]


def test_gpu_program_names_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    results = measure.Results(tmp_path / "steps.json", "cpu")
    gpu.steps(gpu.Session("cpu", results, measure.Progress(), 1e9, quick=True, tiny=True))
    (record,) = results.data["records"]
    assert record["outcome"] == "unavailable" and record["reason"].startswith("trl: ")


def test_parts_for_a_gpu_go_on_after_one_that_fails(tmp_path):
    """Without a GPU the tests are skipped, and the program says that there is none."""
    command = ["bash", "bench/gpu.sh", str(tmp_path / "out"), "device=30", "tests=90", "nothing"]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.findall(r"^(\w+) +exit status +(\d+)", done.stdout, re.MULTILINE) == [
        ("device", "2"), ("tests", "0"), ("nothing", "2"),
    ]  # fmt: skip
    assert "no GPU here" in done.stdout and "invalid choice: 'nothing'" in done.stdout
    assert (tmp_path / "out" / "log").read_text() == done.stdout
    assert 'skipped="' in (tmp_path / "out" / "tests.xml").read_text()


def test_tables_of_a_gpu(tmp_path):
    """Goals met by figures that just meet them, steps by model, lengths by head."""
    folder = tmp_path / "card"
    main, longest = Case("llama3", 4096, dtype="bfloat16"), Case("llama3", 131072, dtype="bfloat16")
    times = {"ours": 1.15, variants.LIMIT: 1.0, "trl": 2.3, "liger compiled": 1.92, "ours at ε = 0": 1.13}
    records = [
        {"kind": "time", "variant": v, **main.as_dict(), "outcome": "ok", **measure.summary([t]), "flops": 1e9,
         "to_limit": measure.ratio([t], [1.0]), "to_ours": measure.ratio([t], [1.15])} for v, t in times.items()
    ] + [
        {"kind": "memory", "variant": "ours", **main.as_dict(), "outcome": "ok", "bytes": (2 * 2 << 30) + (3 << 29),
         "gradients": 2 << 30, "inputs": 1 << 30},
        {"kind": "repeated", "outcome": "ok", "different": 0},
        {"kind": "length", "variant": "ours", **longest.as_dict(), "outcome": "ok", "bytes": 9 << 30, "seconds": 1.8},
        {"kind": "length", "variant": "trl", **Case("smollm2", 512).as_dict(), "outcome": "out of memory"},
    ] + [
        {"kind": "step", "model": model, "case": "hh", "pairs": 16, "round": 0, "outcome": "ok",
         "tokens": {"padded": 300, "packed": 100}, "seconds": {"trl": slower, "padded": 1.2, "packed": 1.0}}
        for model, slower in (("SmolLM2-135M", 1.6), ("Llama-3.2-1B", 1.4))
    ] + [
        {"kind": "step", "model": "Llama-3.2-1B", "case": "long prompts", "pairs": 8, "outcome": "out of memory"},
    ]  # fmt: skip
    folder.mkdir()
    data = {"environment": {"device": "card", "versions": {"torch": "2"}}, "records": records}
    (folder / "speed.json").write_text(json.dumps(data), encoding="utf-8")
    run = Run(folder)
    verdicts = [(figure, verdict) for _, figure, verdict in goals.goal_rows(run)]
    assert [verdict for _, verdict in verdicts] == ["met"] * 6 + ["not measured", "met", "met", "**missed**"]
    assert ("1,536 MiB", "met") in verdicts and ("1.400", "**missed**") in verdicts
    assert "| SmolLM2-135M, hh, 16 pairs | TRL, plain DPO | 300 | 1.60 s |" in tables.steps(run)
    assert "long prompts" not in tables.steps(run)
    llama, smollm = tables.lengths(run).split("\n\n")
    assert llama.endswith("| **ours** | 9,216 MiB, 1.80 s |") and smollm.endswith("| trl | out of memory |")
    assert "| llama3, 1 pair of 2 × 4096 (bfloat16) | **ours** |" in tables.speed(run)


@pytest.mark.parametrize(("took", "figure", "verdict"), [(0.98, "0.980", "**missed**"), (0.981, "0.981", "met")])
def test_a_figure_beside_its_goal_says_why(tmp_path, took, figure, verdict):
    """1 / 1.02 is 0.9804: what would round to the goal may miss it."""
    main, folder = Case("llama3", 4096, dtype="bfloat16"), tmp_path / "card"
    record = {"kind": "time", "variant": "trl", **main.as_dict(), "to_ours": measure.ratio([took], [1.0])}
    folder.mkdir()
    (folder / "speed.json").write_text(json.dumps({"records": [record]}))
    goal, *found = goals.rival_takes(Run(folder), main, "trl", 1 / 1.02)
    assert "0.98 × our time" in goal and found == [figure, verdict]


def test_a_number_is_set_for_a_call_and_set_back(monkeypatch):
    seen, rows = [], plan.rows_per_tile
    monkeypatch.setattr(
        plan, "rows_per_tile", lambda *args, **options: seen.append(plan.WAITING) or rows(*args, **options)
    )
    before = plan.WAITING
    for name in variants.WAITING:
        assert variants.check(name, make_inputs(Case("tiny", 12)))["weight"] < 1e-5
    assert seen == [1, 2, 8] and plan.WAITING == before


def test_a_folder_is_compared_as_a_revision_is(tmp_path):
    (tmp_path / "epsdpo_kernels").mkdir()
    assert compare.check_out(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ValueError, match="BASE: got 'no-such-revision'"):
        compare.check_out("no-such-revision")
