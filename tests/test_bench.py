"""The benchmark measures what it says: operations, rivals' results, memory, ratios, tables."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import cards, fidelity, goals, lengths, measure, roofline, steps, tables, variants
from bench.cases import HEADS, MODES, Case, head_shape, make_inputs
from bench.results import Run, kernels


@pytest.mark.parametrize("mode", MODES)
def test_operations_are_four_three_and_two_products(mode):
    for case in (Case("2003x128", 32, mode=mode), Case("2003x128", 9, pairs=5, masked=0.4, mode=mode)):
        assert case.product == 2 * case.scored * 2003 * 128
        assert measure.count_flops(case) == pytest.approx(case.limit * case.product, rel=0.02)


RIVALS = [v for v in variants.VARIANTS if v not in variants.COMPILED]


@pytest.mark.parametrize("dtype, allowed", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("variant", RIVALS)
def test_every_variant_gives_the_loss_and_gradients_of_float64(variant, dtype, allowed):
    for case in (Case("tiny", 12, pairs=3, masked=0.5, dtype=dtype), Case("tiny-softcap", 7, dtype=dtype)):
        found = measure.outcome(lambda c=case: {"errors": variants.check(variant, make_inputs(c))})
        if found["outcome"] == "unavailable":
            assert re.search("GPU|installed|softcap|capped|same as|torch 2.13", found["reason"])
            continue
        assert found["outcome"] == "ok", found
        assert set(found["errors"]) == {"loss", "hidden", "weight"}
        assert max(found["errors"].values()) < allowed, found


def test_a_wrong_rival_is_found_out(monkeypatch):
    monkeypatch.setitem(variants.CALLS, "trl", lambda inputs: variants.ours(inputs, epsilon=0.0) * 1.01)
    assert variants.check("trl", make_inputs(Case("tiny", 12, pairs=3)))["loss"] > 5e-3


@pytest.fixture
def compiled_shapes(monkeypatch):
    """What reaches the compiler, traced and then run as it is: the sizes of the graphs' inputs."""
    seen = []

    def backend(graph, example):
        seen.append([tuple(t.shape) for t in example if isinstance(t, torch.Tensor)])
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    variants._compiled.cache_clear()
    yield seen
    variants._compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("variant", variants.COMPILED)
def test_no_shape_of_a_process_runs_uncompiled(variant, compiled_shapes):
    """Not the second, nor the ninth, where torch's default gives up; and liger-kernel marks nothing of the inputs."""
    if variant.startswith("liger"):
        pytest.importorskip("liger_kernel")
    for length in range(3, 12):
        inputs = make_inputs(Case(f"{90 + length}x16", length, dtype="float64"))
        compiled_shapes.clear()
        assert max(variants.check(variant, inputs).values()) < 1e-5
        assert any((90 + length, 16) in graph for graph in compiled_shapes), length
    for other in ("liger", *variants.COMPILED):
        found = measure.outcome(lambda other=other: {"errors": variants.check(other, inputs)})
        if found["outcome"] == "unavailable":
            assert "installed" in found["reason"]
        else:
            assert found["outcome"] == "ok" and max(found["errors"].values()) < 1e-5, found


def test_cross_entropies_get_one_gradient_a_token(monkeypatch):
    """Laid out one by one: cut-cross-entropy's backward takes no expanded gradient."""

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, labels):
            ctx.inputs = [t.detach().requires_grad_() for t in (x, weight)]
            with torch.enable_grad():
                logits = ctx.inputs[0] @ ctx.inputs[1].T
                ctx.loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return ctx.loss.detach()

        @staticmethod
        def backward(ctx, grad):
            return *torch.autograd.grad(ctx.loss, ctx.inputs, grad.view(-1)), None

    rival = "cut-cross-entropy"
    monkeypatch.setitem(variants.CALLS, rival, lambda i: variants._cross_entropy_dpo(i, CrossEntropy.apply))
    assert max(variants.check(rival, make_inputs(Case("tiny", 12, pairs=3, masked=0.5))).values()) < 1e-5


def test_bare_products_are_the_products_of_the_call():
    inputs = make_inputs(Case("tiny", 6, pairs=2, masked=0.5))
    products = variants.call(variants.LIMIT, inputs)
    products.g.normal_()
    g = products.g.clone()
    scored = (inputs.labels != -100).flatten()
    x = inputs.hidden.detach().flatten(0, 1)[scored]
    products.logits = torch.empty_like(products.logits)  # in fp32 the logits would overwrite the gradient's stand-in
    products()
    torch.testing.assert_close(products.logits, x @ inputs.weight.detach().t())
    torch.testing.assert_close(products.into.hidden, g @ inputs.weight.detach())
    torch.testing.assert_close(products.into.weight, g.t() @ x)


def test_peak_memory_is_what_a_call_held():
    size = 200 << 20
    peak = measure.peak_bytes(lambda: torch.ones(size // 4).sum(), "cpu")
    assert size * 0.97 < peak < size * 1.1
    held = torch.ones(size // 4)
    assert measure.peak_bytes(lambda: held.sum(), "cpu") < size * 0.1


def test_out_of_memory_is_a_result():
    found = measure.outcome(lambda: {"bytes": measure.peak_bytes(lambda: torch.ones(1 << 45), "cpu")})
    assert found == {"outcome": "out of memory"}
    assert measure.memory("ours", Case("llama3", 1 << 24), "cpu")["outcome"] == "out of memory"


def test_memory_in_a_fresh_process():
    case = Case("16384x64", 512)
    found = measure.memory("materialised", case, "cpu")
    assert found["outcome"] == "ok", found
    logits = 4 * case.total * 16384
    assert 4 * logits < found["bytes"] < 15 * logits
    assert found["gradients"] == 4 * 64 * (16384 + case.total)
    assert 0.01 < found["seconds"] < 60
    assert measure.memory("cut-cross-entropy", case, "cpu")["outcome"] == "unavailable"


def test_lengths_end_where_nothing_fits_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    asked = []

    def memory(variant, case, device):
        asked.append(case.rows)
        fits = {"outcome": "ok", "bytes": case.rows << 20, "seconds": case.rows / 16}
        return fits if case.rows <= 64 else {"outcome": "out of memory"}

    monkeypatch.setattr(measure, "memory", memory)
    path, progress = tmp_path / "cpu-2" / "lengths.json", measure.Progress()
    results = measure.Results(path, "cpu")
    lengths.climb(results, progress, "ours", "tiny", (16, 32))
    lengths.climb(measure.Results(path, "cpu"), progress, "ours", "tiny", (16, 32, 64, 128, 256))
    assert asked == [16, 32, 64, 128]
    lengths.climb(measure.Results(path, "cpu"), progress, "trl", "tiny", (16, 32, 64), longest=3.0)
    assert asked[4:] == [16, 32]
    run = Run(path.parent)
    assert [r["outcome"] for r in run.all(kind="length")] == ["ok"] * 3 + ["out of memory"] + ["ok"] * 2 + ["not tried"]
    assert tables.lengths(run).splitlines()[0::2] == [
        "| tiny, one pair, memory and time | 2 × 16 | 2 × 32 | 2 × 64 | 2 × 128 |",
        "| **ours** | 16 MiB, 1.00 s | 32 MiB, 2.00 s | 64 MiB, 4.00 s | out of memory |",
    ]
    assert tables.lengths(run).endswith("| trl | 16 MiB, 1.00 s | 32 MiB, 2.00 s | not tried: about 4 s |  |")


def test_ratios_are_of_the_same_round():
    found = measure.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert found == {"ratio": 3.0, "least": 2.0, "most": 4.0}
    assert measure.exponent([(1, 3), (2, 12), (4, 48)]) == pytest.approx(2)


def test_variants_take_turns(monkeypatch):
    order = []
    monkeypatch.setitem(variants.CALLS, "trl", lambda i: order.append("trl") or variants.ours(i))
    monkeypatch.setitem(variants.CALLS, "liger", lambda i: (_ for _ in ()).throw(MemoryError()))
    timed = measure.Timed(Case("tiny", 4), ["ours", variants.LIMIT, "trl", "liger"], "cpu")
    for _ in range(3):
        for name in ("ours", variants.LIMIT, "trl", "liger"):
            timed.once(name)
    records = dict(timed.records())
    assert len(order) == 3 and records["liger"] == {"outcome": "out of memory"}
    assert records["trl"]["rounds"] == 3
    per_round = [a / b for a, b in zip(records["trl"]["times"], records["limit"]["times"], strict=True)]
    assert records["trl"]["to_limit"]["ratio"] == sorted(per_round)[1]


def test_results_survive_a_stop_and_not_another_environment(tmp_path):
    first = measure.Results(tmp_path / "r.json", "cpu")
    first.add(kind="a", value=1.23456789)
    again = measure.Results(tmp_path / "r.json", "cpu")
    assert again.find(kind="a")["value"] == 1.23457 and again.find(kind="b") is None
    text = (tmp_path / "r.json").read_text()
    assert not re.search(re.escape(measure.platform.node()) + "|" + re.escape(str(measure.ROOT)), text)
    data = json.loads(text)
    data["environment"]["versions"]["torch"] = "0.1"
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert measure.Results(tmp_path / "r.json", "cpu").data["records"] == []


def test_fidelity_tells_right_from_wrong():
    found = fidelity.decide_all(fidelity.synthetic(0.01, 2, vocabulary=1031), lambda _: None, "test")
    assert found["pairs"] == 20 and found["near"] <= 1
    assert all(found["wrong"][name] == 0 for name in found["wrong"] if name.startswith("ours"))
    assert found["wrong"]["bf16 throughout"] >= 10 and found["wrong"]["bf16 logits, then fp32"] >= 1
    steps = found["steps"]["float64"]
    assert sum(steps.values()) == 20 and min(steps["relaxed"], steps["tightened"]) > 0


# Cards


def test_a_row_on_cards_on_paper():
    """Llama 3's own numbers of parameters; each part by hand at a round size; and the longest row does fit."""
    assert [model.parameters for model in cards.MODELS] == [8_030_261_248, 70_553_706_496]
    model = cards.MODELS[0]
    found = cards.memory(model, cards=16, tokens=16 << 14, full=True)
    assert found.weights == 8 * model.parameters / 16 and found.gradients == 4 * model.parameters / 16
    assert found.optimizer == 8 * model.parameters / 16
    assert found.gathered == 2 * 3 * (218_112_000 + 128256 * 4096)
    # Layers' inputs; q, k, v and out both ways, k and v repeated from 8 to 16 heads, which the layer keeps too.
    per_token = 32 * 2 * 4096 + 8 * 128 * (32 + 16) + 4 * 128 * 8 + cards.kept_by_layer(model)
    assert found.activations == pytest.approx(per_token * ((1 << 14) + 1))
    assert found.loss == (1 << 30) + 4 * ((1 << 13) + 1 + 128256) * 4096
    for full in (True, False):
        tokens = cards.longest(model, 16, full)
        sums = [sum(cards.memory(model, 16, tokens + more, full)) for more in (0, 17)]
        assert sums[0] <= 0.9 * 80e9 < sums[1]
    assert cards.longest(cards.MODELS[1], 8, full=True) is None


def test_what_a_layer_keeps_grows_with_its_width(monkeypatch):
    narrow = cards.kept_by_layer(cards.MODELS[0])
    monkeypatch.setattr(cards, "NARROWER", 4)
    cards.kept_by_layer.cache_clear()
    wide = cards.kept_by_layer(cards.MODELS[0])
    cards.kept_by_layer.cache_clear()
    assert narrow == pytest.approx(wide, rel=0.01) and narrow > 2 * 10 * 4096


# Roofline


DEVICE = roofline.CPU("test", flops=1e12, bandwidth=1e11, exponentials=1e11, tanhs=1e11, others=1e12)


def test_roofline_counts_the_products():
    """With memory and elementwise work for nothing, a call is its products and costs what they do."""
    free = replace(DEVICE, bandwidth=1e30, exponentials=1e30, tanhs=1e30, others=1e30)
    for mode in MODES:
        case = Case("llama3", 700, pairs=2, mode=mode)
        assert sum(roofline.stages(case, free).values()) == pytest.approx(case.limit * case.product / 1e12)
        assert roofline.predicted_ratio(case, free) == pytest.approx(1)


def test_roofline_of_small_tiles_is_dw_traffic():
    case, rows = Case("llama3", 1024), 16
    vocabulary, width, _ = head_shape("llama3")
    found = roofline.stages(case, DEVICE, max_tile_bytes=8 * rows * vocabulary)
    tiles = case.scored // rows
    traffic = (8 * (tiles - 1) + 4) * vocabulary * width + 4 * case.scored * (vocabulary + width)
    assert rows < roofline.balanced_rows(DEVICE)
    assert found["dW"] == pytest.approx(traffic / 1e11, rel=1e-6)


def test_a_products_stores_hide_in_part():
    """Half of the shorter of operations and stores is exposed, loads never are."""
    device = replace(DEVICE, hidden_stores=0.5)
    assert roofline.product(DEVICE, 2e12, loaded=1e10, stored=5e10) == pytest.approx(2)
    assert roofline.product(device, 2e12, loaded=1e10, stored=5e10) == pytest.approx(2 + 0.25)
    assert roofline.product(device, 2e12, loaded=1e11, stored=4e11) == pytest.approx(5 + 1)


def test_a_gpus_stages_are_issued_instructions_or_memory(monkeypatch):
    gpu = replace(roofline.GPUS[0], flops=1e30, issued=1e9, exponentials=1e30, bandwidth=1e30)
    monkeypatch.setattr(roofline, "compiled", lambda arch, kernel, softcap: roofline.Kernel(64, 2))
    case = Case("llama3", 700, pairs=2, dtype="bfloat16")
    cells = case.scored * 128256
    found = roofline.stages(case, gpu)
    assert found["sweep"] == found["gradient"] == pytest.approx(cells * 64 / 32 / 1e9)
    found = roofline.stages(case, replace(gpu, bandwidth=1e6))
    assert found["sweep"] == pytest.approx(8 * cells / 1e6) and found["gradient"] == pytest.approx(6 * cells / 1e6)
    found = roofline.stages(case, replace(gpu, exponentials=1e6))
    assert found["sweep"] == pytest.approx(2 * cells / 1e6)
    for device in roofline.GPUS:  # a long pair's dW is read and written every few tiles
        one, rows = Case("llama3", 4096, dtype="bfloat16"), roofline.rows_of(case, device)
        free = replace(device, flops=1e30, bandwidth=1.0)
        tiles = math.ceil(one.scored / rows.tile)
        products = math.ceil(tiles / (rows.group // math.ceil(one.scored / tiles)))
        accumulated = (8 * products - 4) * 128256 * 4096
        assert roofline.stages(one, free)["dW"] == pytest.approx(accumulated + 2 * one.scored * (128256 + 4096))


def test_counts_are_of_the_committed_machine_code():
    for gpu in roofline.GPUS:
        for kernel in ("sweep", "gradient", "project"):
            counts = [k["instructions"] for k in kernels(arch=gpu.arch, kernel=kernel, variant="plain", dtype="bf16")]
            found = roofline.compiled(gpu.arch, kernel, None)
            assert found.instructions == max(counts) and len(counts) == 2, "both Tritons"
            assert roofline.compiled(gpu.arch, kernel, 30.0).exponentials == 3 * found.exponentials


def test_scoring_takes_the_route_that_is_faster():
    """By the prediction for every card, where a GPU has measured 131 rows."""
    triton_blocks = pytest.importorskip("epsdpo_kernels.engines.triton_blocks")
    cards = {gpu.name: roofline.few_rows(gpu) for gpu in (*roofline.GPUS, *roofline.CARDS.values())}
    assert 128 >= triton_blocks.FEW_ROWS > max(cards.values()) > 100
    for head in ("llama3", "gemma2", "32768x128"):
        case = Case(head, 1024, mode="score", dtype="bfloat16")
        assert "sweep" in roofline.stages(case, roofline.GPUS[0])
        tiny = roofline.stages(case, roofline.GPUS[0], max_tile_bytes=16 << 20)
        assert set(tiny) == {"head and sweep in one"}, "where memory asks for it"


def test_sharded_heads():
    model = roofline.LARGE[0]
    one, split = roofline.sharded(model, 8192), roofline.sharded(model, 8192, tensor=8, sequence=4)
    assert one.logits == 4 * 2 * 8192 * model.vocabulary and split.logits == pytest.approx(one.logits / 32)
    assert split.gradient == pytest.approx(one.gradient / 8)
    assert one.share == pytest.approx(split.share) and 0.01 < one.share < 0.03
    assert one.statistics == one.hidden_gradient == 0 < split.statistics


def test_what_is_said_of_large_heads():
    """Which logits are larger than tiles and dW: the words under the table, of ranks without TP."""
    whole = {model.name: roofline.sharded(model, 8192) for model in roofline.LARGE}
    larger = [name for name, one in whole.items() if one.logits > one.tiles + one.gradient]
    assert larger == ["Llama-3.1-70B", "Qwen2.5-72B"]
    assert whole["Llama-3.1-405B"].logits == whole["Llama-3.1-405B"].gradient
    assert "larger than the two tiles and dW together at 70B and 72B, and as large as dW at 405B" in prose(
        "roofline.md"
    )


def test_what_is_said_of_the_fused_kernel():
    """Operations of both models' products over its measured time, and over the bytes that its blocks load."""
    path = measure.RESULTS / "nvidia-h100-80gb-hbm3" / "stages.json"
    (found,) = (r for r in json.loads(path.read_text())["records"] if r["head"] == "llama3")
    seconds = found["stages"]["head and sweep in one, logits not kept"]
    operations = 2 * 2 * found["tile_rows"] * 128256 * 4096
    rows, words = 128, 64
    a_byte = 2 * rows * words / (2 * (rows + words))
    said = f"{a_byte:.0f} operations for each byte that they take from L2, so its {seconds * 1e3:.1f} ms, "
    said += f"{operations / seconds / 1e12:.0f} TFLOP/s, are {operations / seconds / a_byte / 1e12:.1f} TB/s from there"
    assert said in prose("tuning.md")


def prose(name: str) -> str:
    return " ".join((measure.ROOT / "docs" / name).read_text(encoding="utf-8").split())


# Tables


def test_no_table_is_stale():
    """The tables and pictures of docs are what the committed results say."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.tables", "--check"], cwd=measure.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def made_up(tmp_path, seconds=1.0) -> Run:
    """Results of a run that never was: ours at `seconds` against a limit of 1 s."""
    folder = tmp_path / "cpu-2"
    results = measure.Results(folder / "speed.json", "cpu")
    for case in (Case("llama3", 512), Case("smollm2", 512), Case("smollm2", 1024), Case("smollm2", 1024, masked=0.5)):
        for variant, time in (("ours", seconds), ("limit", 1.0), ("trl", 2.0), ("liger", 3.0), ("materialised", 4.0)):
            results.add(
                kind="time", variant=variant, **case.as_dict(), outcome="ok", flops=1e9, **measure.summary([time]),
                to_limit=measure.ratio([time], [1.0]), to_ours=measure.ratio([time], [seconds]),
            )  # fmt: skip
            if variant != variants.LIMIT:
                results.add(
                    kind="memory", variant=variant, **case.as_dict(), outcome="ok", bytes=int(time * 2**28),
                    inputs=2**20, gradients=2**20,
                )  # fmt: skip
    return Run(folder)


def test_goals_say_met_and_missed(tmp_path):
    rows = {goal: verdict for goal, _, verdict in goals.goal_rows(made_up(tmp_path / "a", 1.05))}
    assert list(rows.values()).count("met") == 8, rows
    assert list(rows.values()).count("not measured") == 2, rows
    slow = {goal: (figure, verdict) for goal, figure, verdict in goals.goal_rows(made_up(tmp_path / "b", 2.5))}
    missed = [goal for goal, (_, verdict) in slow.items() if verdict == "**missed**"]
    assert len(missed) == 7, slow
    figure, verdict = slow[goals.TRL]
    assert figure.startswith("it takes 0.80 to 0.80 × our time") and verdict == "**missed**"
    assert "**missed**" in tables.goals(made_up(tmp_path / "c", 2.5))


def test_speed_table_has_every_figure(tmp_path):
    lines = tables.speed(made_up(tmp_path)).splitlines()
    assert len(lines) == 2 + 4 * 5
    assert lines[3] == "| llama3, 1 pair of 2 × 512 | **ours** | ε-DPO | 1.00 s | 1.00 | 1 | 256 MiB | 128.50 |"
    assert "plain DPO | 2.00 s | 2.00 |" in lines[5]


def test_a_stale_table_and_a_missing_marker_are_found():
    text = "a\n<!-- bench:one -->\nold\n<!-- /bench:one -->\nb\n"
    fresh, wrong = tables.stale(text, {"one": "new"}, "F")
    assert fresh == text.replace("old", "new") and wrong == ["F: the table one is not what the results say"]
    assert tables.stale(fresh, {"one": "new"}, "F") == (fresh, [])
    same, wrong = tables.stale(text, {"two": "new"}, "F")
    assert same == text and "missing" in wrong[0]


def test_pictures_are_drawn_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    run = made_up(tmp_path)
    monkeypatch.setattr(tables, "runs", lambda: [run])
    ((name, (data, draw)),) = tables.pictures().items()
    assert name == "speed.png" and data["limit"] == 1.0 and ("trl", 2.0, 512.0) in data["points"]
    import matplotlib.pyplot as plt

    draw(data)
    plt.savefig(tmp_path / name, metadata={"digest": tables.digest(data)})
    plt.close()
    assert tables.png_digest(tmp_path / name) == tables.digest(data)


# Programs


def test_no_case_times_a_variant_twice_a_round():
    from bench import test_speed

    for case, rivals, _ in test_speed.CASES:
        names = ["ours", variants.LIMIT, *rivals]
        assert len(names) == len(set(names)), case.name


def test_cpu_program_times_in_turn(benchmark, tmp_path, monkeypatch):
    """`make bench` on a case small enough for a test: every record is there, and pytest-benchmark has the ratios."""
    from types import SimpleNamespace

    from bench import test_speed

    benchmark.disabled = False  # xdist switches it off: figures could not be trusted
    case = Case("tiny", 16)
    monkeypatch.setattr(test_speed, "CASES", [(case, ["trl", "cut-cross-entropy"], [])])
    results = measure.Results(tmp_path / "speed.json", "cpu")
    another = results.add(kind="time", variant="ours", **Case("tiny", 17).as_dict())
    results.add(kind="time", variant="torch", **case.as_dict())
    request = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: 1.0))
    test_speed.test_case(0, benchmark, results, 1e10, measure.Progress(), request)
    # What was measured of this case before is gone, what of another stays.
    assert results.data["records"].pop(0) == another
    times = {r["variant"]: r for r in results.data["records"] if r["kind"] == "time"}
    assert times["ours"]["rounds"] == times["limit"]["rounds"] == times["trl"]["rounds"] == 3
    assert times.keys() == {"ours", "limit", "trl", "cut-cross-entropy"}
    assert times["cut-cross-entropy"]["outcome"] == "unavailable"
    assert benchmark.extra_info["ours"] == pytest.approx(times["ours"]["to_limit"]["ratio"], abs=1e-3)
    assert {r["variant"] for r in results.data["records"] if r["kind"] == "check"} == {
        "ours",
        "trl",
        "cut-cross-entropy",
    }


def test_heads_are_those_of_the_models():
    assert HEADS["llama3"] == (128256, 4096, None) and HEADS["gemma2"] == (256000, 2304, 30.0)
    assert head_shape("16384x256") == (16384, 256, None)
    case = Case("smollm2", 100, pairs=3, masked=0.25)
    assert (case.scored, case.total, case.name) == (450, 600, "smollm2-train-3x100-masked25-float32")
    inputs = make_inputs(Case("tiny", 8, pairs=2, masked=0.5, mode="frozen"))
    assert inputs.hidden.requires_grad and not inputs.weight.requires_grad
    assert (inputs.labels != -100).sum() == 16 and not torch.equal(inputs.weight, inputs.ref_weight)


def made_up_steps(folder) -> Run:
    """Rounds in which a packed step takes 1 s, a padded one 2 s and TRL's 2.5 s."""
    rounds = [
        {"kind": "step", "case": case, "round": i, "tokens": {"padded": 300, "packed": 100},
         "seconds": {"trl": 2.5 + i / 10, "padded": 2.0, "packed": 1.0}}
        for case in steps.CASES for i in range(3)
    ]  # fmt: skip
    memory = [
        {"kind": "step memory", "case": "hh", "variant": v, "outcome": "ok", "bytes": b << 20, "process": 2 * b << 20}
        for v, b in (("trl", 1000), ("padded", 800), ("packed", 500))
    ]
    longest = [
        {"kind": "longest", "variant": v, "length": n, "outcome": "ok", "bytes": 1, "process": 9 << 30, "seconds": 60.0}
        for v, n in (("trl", 4096), ("padded", 4096), ("packed", 8192))
    ] + [{"kind": "longest", "variant": "trl", "length": 5120, "outcome": "out of memory"}]
    folder.mkdir()
    environment = {"cpu": "CPU", "threads": 2, "versions": {"torch": "2"}}
    data = {"environment": environment, "records": rounds + memory + longest}
    (folder / "steps.json").write_text(json.dumps(data), encoding="utf-8")
    return Run(folder)


def test_tables_of_whole_steps(tmp_path):
    run = made_up_steps(tmp_path / "cpu-9")
    page = tables.steps(run)
    assert "| hh, 4 pairs | TRL, plain DPO | 300 | 2.60 s | 2.60 (2.50–2.70) | 1,000 MiB | 2,000 MiB |" in page
    assert "| hh, 4 pairs | **ours, packed** | 100 | 1.00 s | 1.00 | 500 MiB | 1,000 MiB |" in page
    assert "| TRL, plain DPO | 4,096 | 9,216 MiB | 60.00 s | 5,120: out of memory |" in page
    verdicts = {goal: (figure, verdict) for goal, figure, verdict in goals.whole_step_rows(run)}
    assert verdicts["hh: ≥ 2.0 × faster than TRL's plain DPO"] == ("2.600 (2.500–2.700)", "met")
    assert verdicts["hh: peak memory of the step ≤ 0.6 × TRL's"] == ("0.500", "met")


def test_whole_steps_are_measured(tiny, tmp_path, monkeypatch):
    """Every trainer takes the same batches, and trains on them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)

    def tiny_model():
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tokenizer

    monkeypatch.setattr(steps, "model_and_tokenizer", tiny_model)
    monkeypatch.setattr(steps, "CASES", {"hh": (4, 2), "nothing to save": (2, 3)})
    monkeypatch.setattr(steps, "warm_up", lambda pairs: steps.cut_pairs([5, 6, 7], (3, 2, 2), pairs))
    rounds = list(steps.time_case(str(tiny / "pairs.jsonl"), "hh", 0))
    assert [r["round"] for r in rounds] == [0, 1]
    assert all(r["tokens"]["packed"] < r["tokens"]["padded"] for r in rounds)
    assert all(set(r["seconds"]) == set(steps.VARIANTS) and min(r["seconds"].values()) > 0 for r in rounds)
    (last,) = steps.time_case(str(tiny / "pairs.jsonl"), "nothing to save", 2)
    assert last["tokens"] == {"padded": 2 * 2 * 161, "packed": 2 * 321}
    model, tokenizer = tiny_model()
    before = [p.clone() for p in model.parameters()]
    after = []
    for variant in steps.VARIANTS:
        trainer = steps.make_trainer(variant, model, tokenizer)
        steps.step(trainer, steps.make_pairs(str(tiny / "pairs.jsonl"), tokenizer, "hh", 4))
        after.append([p.detach().clone() for p in trainer.model.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    # Adam's first step is the sign of a gradient, so equal gradients move weights alike.
    for other in after[1:]:
        moved = [(a != b).float().mean() for a, b in zip(after[0], before, strict=True)]
        assert max(moved) > 0.5
        same = [(a - b).abs().lt(1e-7).float().mean() for a, b in zip(after[0], other, strict=True)]
        assert min(same) > 0.9
    assert steps.memory_of(str(tiny / "pairs.jsonl"), "packed", "hh")["outcome"] == "ok"
