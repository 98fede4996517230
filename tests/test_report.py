"""The report: its numbers against numbers worked out by hand, hostile text, size, both languages, and the pictures."""

import json
import re
import string
import sys
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="the trainer's extra is not installed")
pytest.importorskip("matplotlib", reason="the trainer's extra is not installed")
regex = pytest.importorskip("regex")  # comes with transformers

from epsdpo_kernels.__main__ import main  # noqa: E402
from epsdpo_kernels.record import figures  # noqa: E402
from epsdpo_kernels.record import report as report_module  # noqa: E402
from epsdpo_kernels.record.audit import audit, columns  # noqa: E402
from epsdpo_kernels.record.report import embed, report, visible  # noqa: E402
from epsdpo_kernels.record.words import WORDS, words  # noqa: E402
from records import write_run  # noqa: E402
from test_audit import alter  # noqa: E402

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\u202egnp.exe\u2066 abc \u200f\u2028 end",
    "nul \x00 bell \x07 escape \x1b[31m",
    "half a pair \ud800 and \udfff",
    "&lt;b&gt; &amp; ]]> <!-- -->",
    "[[data]] {n} $x^2$ {{}}",
)


def data_of(page: Path) -> dict:
    """The JSON in a page, taken out as a browser takes it: up to the first end of a script element."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S | re.I)[1])


def training(run: Path) -> dict:
    return figures.split(columns(audit(run).table), "train")


def test_numbers(tmp_path):
    rows = training(write_run(tmp_path, pairs=50, epochs=3, labels=["a", "b", "c"]))
    frame = audit(tmp_path).table.to_pandas().query("split == 'train'")
    curves = figures.series(rows)
    width = curves["steps_a_point"]
    by_point = frame.groupby((frame.step - 1) // width)
    assert width == 1 and curves["step"] == list(range(1, 40))
    for name, values in {
        "relaxed": by_point.decision.apply(lambda d: (d == 1).mean()),
        "accuracy": by_point.margin.apply(lambda m: (m > 0).mean()),
        "reward_margin": by_point.apply(lambda g: (g.margin * g.beta_used).mean()),
        "kl_chosen": by_point.apply(lambda g: (g.chosen_kl / g.chosen_tokens).mean()),
        "entropy_rejected": by_point.rejected_entropy.mean(),
        "beta": by_point.beta.mean(),
    }.items():
        assert curves[name] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-7), name

    pairs = figures.by_pair(rows)
    visits = frame.sort_values("step").groupby("row")
    assert pairs["row"].tolist() == list(range(50)) and set(pairs["visits"]) == {3}
    assert pairs["relaxed"].tolist() == visits.decision.apply(lambda d: (d == 1).sum()).tolist()
    assert pairs["flips"].tolist() == visits.decision.apply(lambda d: (d.diff().dropna() != 0).sum()).tolist()
    lean = (frame.margin - (frame.chosen_kl - frame.rejected_kl)).groupby(frame.row).mean()
    assert pairs["lean"] == pytest.approx(lean.values, rel=1e-4, abs=1e-5)
    assert pairs["margin"].tolist() == visits.margin.last().tolist()
    changes = figures.flips(rows, pairs)
    follows = [(a, b) for _, d in visits.decision for a, b in zip(d, d[1:], strict=False)]
    assert changes["matrix"] == [[follows.count((a, b)) for b in (1, 0, -1)] for a in (1, 0, -1)]
    assert changes["flipped"] == (pairs["flips"] > 0).sum() and changes["seen_again"] == 50

    most = figures.most(pairs)
    net = pairs["relaxed"] - pairs["tightened"]
    assert net[most["relaxed"][0]] == net.max() and net[most["tightened"][0]] == net.min()
    assert (net[most["relaxed"]] > 0).all() and (np.diff(net[most["relaxed"]]) <= 0).all()
    shares = {one["label"]: one for one in figures.labels(rows)}
    of_b = frame[frame.label == "b"].decision
    assert shares["b"]["n"] == len(of_b) and shares["b"]["tightened"] == pytest.approx((of_b == -1).mean())
    spread = figures.beta_map(rows)
    assert np.sum(spread["share"], 1) == pytest.approx(1, abs=0.01) and len(spread["share"]) == 39
    level = np.searchsorted(spread["beta"], frame[frame.step == 5].beta_used.values) - 1
    assert sorted(np.flatnonzero(spread["share"][4])) == sorted(set(level))


def test_what_is_not_finite_is_nowhere_fine(tmp_path):
    """As in the record of a run that was stopped by it: its last step is NaN."""
    rows = training(write_run(tmp_path, pairs=40, epochs=1))
    assert figures.alarms(rows, True)["finite"] == {"state": "fine", "n": 0, "step": "–"}
    last = rows["step"] == rows["step"].max()
    columns = ("loss", "margin", "chosen_logp", "rejected_logp", "ref_chosen_logp", "chosen_kl", "rejected_kl")
    broken = rows | {name: np.where(last, np.nan, rows[name]).astype(np.float32) for name in columns}
    found = figures.alarms(broken, True)
    assert found["finite"] == {"state": "look", "n": 4, "step": int(rows["step"].max())}
    assert found["runaway"]["state"] == "look" and np.isnan(found["runaway"]["value"])
    assert figures.series(broken)["accuracy"][-1] is None and figures.series(rows)["accuracy"][-1] is not None
    for language in ("en", "ja"):
        (line,) = (
            a for a in report_module._alarms(found, language) if a["name"] == words("alarms", language)["finite"]
        )
        assert (
            line["state"] == "look"
            and "4" in line["measured"]
            and "nan" not in str(report_module._alarms(found, language))
        )


def test_a_pair_of_many_visits_is_carried_however_many(tmp_path):
    pairs = figures.by_pair(training(write_run(tmp_path, pairs=4, epochs=30)))
    assert figures.carried(pairs, 10, np.array([], int)).tolist() == [figures.most(pairs)["flips"][0]]


def test_alarms_follow_their_rules(tmp_path):
    rows = training(write_run(tmp_path, pairs=400, epochs=1, labels=["a", "b"]))
    n = len(rows["step"])
    assert figures.alarms(rows, True)["runaway"]["state"] == "fine"

    def with_(**changed) -> dict:
        return figures.alarms(rows | changed, True)

    assert with_(beta=np.linspace(0.1, 0.21, n))["drift"]["state"] == "look"
    assert with_(beta=np.linspace(0.1, 0.19, n))["drift"]["state"] == "fine"
    assert with_(beta=np.linspace(0.1, 0.049, n))["drift"]["state"] == "look"
    late = np.arange(n) >= n * 0.7
    taken = with_(decision=np.where(late, -1, rows["decision"]))["takeover"]
    assert taken == {"state": "look", "name": "tightened", "value": 1.0}
    assert figures.alarms(rows, False)["takeover"]["state"] == "none"
    last = np.arange(n) >= n * 0.9
    kl = np.where(last, 10, 1) * 0.01 * rows["chosen_tokens"], np.where(last, 10, 1) * 0.01 * rows["rejected_tokens"]
    away = with_(chosen_kl=kl[0], rejected_kl=kl[1])["runaway"]
    assert away["state"] == "look" and away["value"] == pytest.approx(0.1) and away["middle"] == pytest.approx(0.01)
    assert with_(chosen_kl=kl[0] * 0.4, rejected_kl=kl[1] * 0.4)["runaway"]["state"] == "fine"
    is_a = rows["label"] == "a"
    uneven = with_(decision=np.where(is_a & (np.arange(n) % 10 < 8), 1, -1))["label"]
    assert uneven["state"] == "look" and uneven["name"] == "a" and uneven["others"] == 0
    assert with_(label=np.full(n, None, object))["label"]["state"] == "none"
    higher = rows["ref_chosen_logp"] + np.where(np.arange(n) % 10 < 6, 1, -1)
    assert with_(ref_rejected_logp=higher)["reference"] == {"state": "look", "value": 0.6, "pairs": 400}
    even = rows["ref_chosen_logp"] + np.where(np.arange(n) % 2, 1, -1)
    assert with_(ref_rejected_logp=even)["reference"]["state"] == "fine"
    some = np.where(np.arange(n) % 4 < 2, even, np.nan)
    few = with_(ref_rejected_logp=some)["reference"]
    assert few["state"] == "fine" and few["pairs"] < 400 and few["value"] == pytest.approx(0.5, abs=0.1)
    none = with_(ref_rejected_logp=np.full(n, np.nan))["reference"]
    assert none["state"] == "none" and none["pairs"] == 0


def test_page_and_pictures(tmp_path, capsys):
    run = write_run(tmp_path / "one", pairs=60, labels=["x", "y"])
    was = alter(run, 17, decision=0)
    assert was["decision"] != 0
    main(["report", str(run), "--out", str(tmp_path / "out")])
    assert "report.html" in capsys.readouterr().out
    found = data_of(tmp_path / "out" / "report.html")
    (shown,) = found["runs"]
    assert any(f["row"] == was["row"] and f["column"] == "decision" for f in shown["audit"]["findings"])
    assert shown["alarms"][-1]["state"] == "look" and "1 finding" in shown["alarms"][-1]["measured"]
    assert "does not agree with itself" in shown["summary"][-1] and "Needs a look" in shown["summary"][-2]
    assert "on 60 pairs in 30 steps" in shown["summary"][0] and ": 120 rows of" in shown["summary"][0]
    # A pair's visits are those of the record.
    place = shown["pairs"]["row"].index(was["row"])
    start = sum(shown["pairs"]["visits"][:place])
    steps = [shown["visits"]["step"][start + k] for k in range(shown["pairs"]["visits"][place])]
    mine = audit(run).table.to_pandas().query(f"row == {was['row']} and split == 'train'")
    assert steps == mine.step.tolist() and len(steps) == 2
    assert shown["visits"]["margin"][start : start + 2] == pytest.approx(mine.margin.tolist(), rel=1e-3)
    for name in ("margin", "beta", "decisions", "curves"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src &#x27;none&#x27;" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", text)


def test_several_runs_and_methods(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", method="dpo", eval_pairs=0)]
    page = report(runs, tmp_path / "out", "ja")
    first, second = data_of(page)["runs"]
    assert first["name"] != second["name"] and second["evaluation"] == []
    assert [alarm["state"] for alarm in second["alarms"]][2] == "none"
    assert '<html lang="ja">' in page.read_text(encoding="utf-8")
    assert {path.name for path in page.parent.iterdir()} >= {"margin-1.png", "margin-2.png", "curves.png"}
    assert re.search("[ぁ-ん]", first["summary"][0]) and re.search("[ぁ-ん]", first["alarms"][0]["rule"])


def test_large_records_are_sampled_and_say_so(tmp_path):
    run = write_run(tmp_path / "run", pairs=100_000, epochs=2, batch=2000, labels=[f"l{i}" for i in range(40)])
    was = alter(run, 17, margin=99.0)
    page = report([run], tmp_path / "out")
    assert page.stat().st_size < 10e6
    (shown,) = data_of(page)["runs"]
    assert len(shown["dots"]["x"]) == 4000 and "4,000 of 200,000 decisions" in shown["dots_note"]
    assert len(shown["pairs"]["id"]) == 8000 and "8,000 of 100,000 pairs" in shown["table_note"]
    assert was["row"] in shown["pairs"]["row"]  # the audit names it
    assert len(shown["series"]["step"]) <= figures.POINTS and len(shown["labels"]) == 20 and shown["categories"] == 40
    assert np.mean(np.array(shown["dots"]["decision"]) == 1) == pytest.approx(
        (training(run)["decision"] == 1).mean(), abs=0.04
    )


def test_hostile_text(tmp_path, monkeypatch):
    """Ids, labels, settings and texts that attack: nothing leaves its JSON string, and nothing in it is hidden."""
    source = tmp_path / "pairs.jsonl"
    texts = [t for t in HOSTILE if not re.search("[\ud800-\udfff]", t)]
    bodies = [*texts, "x" * 100_000 + "<script>"]
    lines = [json.dumps({"prompt": f"p{i} {t}", "chosen": t, "rejected": t + "!"}) for i, t in enumerate(bodies)]
    source.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}\n')
    from train.data import Pair

    rows = [json.loads(line) for line in lines]
    ids = [Pair(**row).id() for row in rows] + ["f" * 16]
    ids[0] = "0" * 16  # the data set has changed since
    run = write_run(
        tmp_path / "<script>alert(3)</script>".replace("/", "∕"), pairs=len(bodies), batch=2, eval_pairs=1, ids=ids,
        labels=[*texts, "plain"], dataset=str(source), model=HOSTILE[1] + HOSTILE[4],
    )  # fmt: skip
    page = report([run], tmp_path / "out", texts=True)
    text = page.read_bytes().decode("utf-8")  # strictly
    assert text.lower().count("<script") == 2 and text.lower().count("</script") == 2
    assert not re.search("[\u2028\u2029\u202a-\u202e\x00\x07\x1b]", text)
    (shown,) = data_of(page)["runs"]
    of = {row: shown["texts"].get(str(place)) for place, row in enumerate(shown["pairs"]["row"])}
    assert len(shown["texts"]) == len(bodies) - 1 and of[0] is None
    assert any("1 pairs are not in the data set with the texts" in line for line in shown["notes"])
    prompt, chosen, rejected = of[1]
    assert chosen == HOSTILE[1] and rejected == HOSTILE[1] + "!" and prompt == f"p1 {HOSTILE[1]}"
    assert of[2][1] == "⟨U+202E⟩gnp.exe⟨U+2066⟩ abc ⟨U+200F⟩⟨U+2028⟩ end"
    long = of[len(bodies) - 1][1]
    assert len(long) < 2100 and long.startswith("x" * 2000 + " … 98,008 more")
    assert HOSTILE[0] in shown["pairs"]["label"]
    assert any(HOSTILE[1] + "half a pair ⟨U+D800⟩ and ⟨U+DFFF⟩" == value for _, value in shown["settings"])

    # Without --texts, none of them is in the file.
    page = report([run], tmp_path / "without")
    (shown,) = data_of(page)["runs"]
    assert shown["texts"] is None and "xxxxxxxx" not in page.read_text(encoding="utf-8")
    monkeypatch.setattr(report_module, "TEXT_BUDGET", 100)
    (shown,) = data_of(report([run], tmp_path / "few", texts=True))["runs"]
    assert 0 < len(shown["texts"]) < 3


def data_set(path: Path, pairs: int) -> list[str]:
    """Writes a file of pairs; their ids."""
    from epsdpo_kernels.record.sources import pair_of

    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [pair_of(row).id() for row in rows]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_pairs_without_an_id_are_told_from_pairs_that_are_gone(tmp_path, language):
    ids = data_set(source := tmp_path / "pairs.jsonl", 6)
    notes = words("notes", language)
    for name, own, found, gone, unknown in (
        ("some", [None, None, "0" * 16, *ids[3:]], 3, 1, 2), ("none", [None] * 6, 0, 0, 6), ("all", ids, 6, 0, 0),
    ):  # fmt: skip
        run = write_run(tmp_path / name, pairs=6, eval_pairs=0, ids=own, dataset=str(source))
        (shown,) = data_of(report([run], language=language, texts=True))["runs"]
        assert len(shown["texts"]) == found
        for note, n in (("texts_changed", gone), ("texts_no_id", unknown)):
            assert (notes[note].format(n=n) in shown["notes"]) == (n > 0), (name, note)
            assert sum(notes[note].split("}")[1] in line for line in shown["notes"]) == (n > 0), (name, note)


def test_the_budget_is_of_the_texts_of_all_runs(tmp_path, monkeypatch):
    ids = data_set(source := tmp_path / "pairs.jsonl", 40)
    runs = [write_run(tmp_path / name, eval_pairs=0, ids=ids, dataset=str(source)) for name in ("one", "two", "three")]
    monkeypatch.setattr(report_module, "TEXT_BUDGET", 90)
    for several in (runs[:1], runs):
        shown = data_of(report(several, tmp_path / "out", texts=True))["runs"]
        sizes = [sum(map(len, texts)) for run in shown for texts in run["texts"].values()]
        assert 90 - 8 * len(several) < sum(sizes) <= 90 and all(run["texts"] for run in shown)


def test_what_no_font_draws_is_spelt_out():
    """All of Unicode's Default_Ignorable_Code_Point and its noncharacters, as another library has them."""
    assert visible("ad\u3164min\u034f\u115f") == "ad⟨U+3164⟩min⟨U+034F⟩⟨U+115F⟩"
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    hidden = regex.findall(r"[\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\p{Bidi_Control}]", every)
    assert len(hidden) > 4000 and [mark for mark in hidden if visible(mark) == mark] == []
    drawn = regex.findall(r"[\p{L}\p{M}\p{N}\p{P}\p{S}--\p{Default_Ignorable_Code_Point}]", every, regex.VERSION1)
    assert len(drawn) > 100_000 and visible("".join(drawn)) == "".join(drawn)


def test_visible_and_embed():
    assert visible("a\r\nb\tc") == "a\nb\tc"
    assert visible("".join(map(chr, (0x85, 0xFEFF, 0xE0041, 0xFDD0, 0xD83D)))) == (
        "⟨U+0085⟩⟨U+FEFF⟩⟨U+E0041⟩⟨U+FDD0⟩⟨U+D83D⟩"
    )
    assert visible("日本語 👍 العربية") == "日本語 👍 العربية"
    assert visible("abcdef", 3, " +{n}") == "abc +3" and visible("abc", 3) == "abc"
    for text in HOSTILE:
        inside = embed({"t": text})
        assert json.loads(inside)["t"] == text and not re.search("[<>&\u2028\ud800-\udfff]", inside)
        inside.encode("utf-8")
    with pytest.raises(ValueError):
        embed(float("nan"))


def test_both_languages_are_whole():
    for section, names in WORDS.items():
        for name, (english, japanese) in names.items():
            places = [
                {place for _, place, *_ in string.Formatter().parse(text) if place} for text in (english, japanese)
            ]
            assert places[0] == places[1], (section, name)
            assert english and japanese, (section, name)
            if english.isascii() and len(english) > 3 and name != "takeover_measured":
                assert re.search("[ぁ-んァ-ヶ一-龠]", japanese), (section, name)
    script = (ROOT / "epsdpo_kernels" / "record" / "page.js").read_text(encoding="utf-8")
    for name in re.findall(r"\bW\.(\w+)", script):
        assert name in WORDS["page"], name
    assert set(WORDS["history"]) == set(figures.HISTORY)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json"):
        report([tmp_path])
    run = write_run(tmp_path / "run", pairs=4, epochs=1)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        report([run], texts=True)
    assert not (run / "report").exists()


def test_where_there_is_no_room_to_write(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", pairs=4, epochs=1)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "report"):
        assert main(["report", str(run), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: out: {out} can't be written to, takes a folder")
    assert (tmp_path / "file").read_text() == "mine"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.endswith("with room in it ([Errno 28] No space left on device)\n")


def test_texts_that_are_not_to_be_had(tmp_path, monkeypatch, capsys):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'some/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    run = write_run(tmp_path, pairs=4, epochs=1, dataset="some/name")
    assert main(["report", str(run), "--texts"]) == 2
    assert capsys.readouterr().err == "error: Couldn't reach 'some/name' on the Hub\n"


@pytest.mark.parametrize(("missing", "module"), [("matplotlib", "plots"), ("datasets", "texts")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys, missing, module):
    run = write_run(tmp_path, pairs=4, epochs=1)
    monkeypatch.delattr(f"epsdpo_kernels.record.{module}", raising=False)
    monkeypatch.delitem(sys.modules, f"epsdpo_kernels.record.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["report", str(run), "--texts"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line and line.endswith("; pip install 'epsdpo_kernels[record]'")
    assert not (run / "report").exists()


@pytest.mark.parametrize("name", ["[[data]]", "[[script]]", "[[style]] [[title]]", "[[policy]]", "[[language]]"])
def test_a_name_is_no_place_to_fill_in(tmp_path, name):
    """The page is filled in one pass: what was filled in is text."""
    page = report([write_run(tmp_path / name, pairs=4, epochs=1)])
    text = page.read_text(encoding="utf-8")
    assert f"<title>Decision record: {name}</title>" in text and data_of(page)["runs"][0]["name"] == name
    style, script = ((ROOT / "epsdpo_kernels" / "record" / f"page.{one}").read_text("utf-8") for one in ("css", "js"))
    assert f"<style>{style}</style>" in text and f"<script>{script}</script>" in text


def test_every_name_is_in_the_legend(tmp_path):
    """Also one that begins with an underscore, which matplotlib leaves out; a dollar sign is no mathematics."""
    from matplotlib import pyplot

    from epsdpo_kernels.record import plots

    names = ["_a", "$x^2$"]
    runs = [write_run(tmp_path / name, pairs=4, epochs=1, eval_sets=("_e", "eval_b")) for name in names]
    shown = [report_module.describe(audit(run), run.name, "en", 100, 0) for run in runs]
    figure = plots._curves(shown, words("page", "en"))
    texts = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    pyplot.close(figure)
    assert texts == ["_a", "_e", "eval_b", r"\$x^2\$", "_e", "eval_b"]


def test_histogram_in_tensorboard(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from runs import flags
    from train.__main__ import main as train

    train(flags(tiny, tmp_path, report_to="tensorboard", logging_steps=2, max_steps=4))
    (events,) = tmp_path.glob("runs/*/events*")
    board = EventAccumulator(str(events), {"histograms": 0, "scalars": 0}).Reload()
    frame = audit(tmp_path).table.to_pandas()
    points = board.Histograms("train/beta/pairs")
    assert [point.step for point in points] == [2, 4]
    for point in points:
        used = frame[frame.step.between(point.step - 1, point.step)].beta_used
        value = point.histogram_value
        assert value.num == len(used) == 12
        assert value.sum == pytest.approx(used.sum(), rel=1e-5)
        assert (value.min, value.max) == pytest.approx((used.min(), used.max()), rel=1e-5)
    assert "train/beta/used" in board.Tags()["scalars"]


def test_a_log_before_training_is_in_the_runs_own_folder(tiny, tmp_path, monkeypatch):
    """As make demo does: the held-out figures on both sides of a training, in one board."""
    from runs import flags
    from train.__main__ import build
    from train.options import parse

    monkeypatch.chdir(tmp_path)
    more = {"report_to": "tensorboard", "max_steps": 2, "eval_fraction": 0.25}
    trainer = build(*parse(flags(tiny, tmp_path / "run", **more)))
    trainer.evaluate()
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert list(folder.glob("events*"))


def test_the_demo_ends_with_its_report(tiny, tmp_path, monkeypatch, capsys):
    from train.demo import __main__ as demo

    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"topic": "one"}) + "\n" for row in rows))
    run = tmp_path / "run"
    more = {"model": tiny, "dataset": tmp_path / "pairs.jsonl", "output_dir": run, "max_steps": 3, "report_to": "none"}
    monkeypatch.setattr("sys.argv", ["demo", *(f"--{name}={value}" for name, value in more.items())])
    demo.main()
    *_, verdict, unchecked, last = capsys.readouterr().out.strip().splitlines()
    # 24 pairs of training, and 6 held out before and after.
    assert verdict == "audit: OK, 36 rows, 3 training steps, 1 part" and "24 of 42 pairs" in unchecked
    assert last.endswith(str(run / "report" / "report.html"))
    (shown,) = data_of(run / "report" / "report.html")["runs"]
    assert shown["labels"][0]["n"] == 24 and [one["step"] for one in shown["evaluation"]] == [[0, 3]]
