"""``epsdpo report RUN [RUN …]``: one HTML file that shows what was decided for every pair, and PNGs of it.

The file needs no network and nothing beside it. All text of the data set, of run names and of settings is hostile
until shown otherwise: control and direction marks are spelt out here, the page sets text as text alone, and its content
security policy lets nothing run but the page's own script.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from . import figures
from .audit import Audit, Columns, audit, columns
from .shown import visible
from .words import LANGUAGES, words

VISITS = 16_000  # that the page carries, over all runs
TEXT_CUT, TEXT_BUDGET = 2000, 3_000_000  # characters: of a text, and of all of them over all runs
PAGE = Path(__file__).parent


def embed(value: Any) -> str:
    """JSON that is safe inside a script element, and that any UTF-8 file can hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda mark: f"\\u{ord(mark[0]):04x}", text)


def inside(text: Any) -> str:
    """A name from outside within a sentence: cut, visible, and isolated from the sentence's direction."""
    return f"\u2068{visible(text, 80)}\u2069"


def percent(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def describe(found: Audit, name: str, language: str, visits: int, texts: int) -> dict[str, Any]:
    """Everything that the page and the pictures show of a run: at most so many visits, and characters of texts.

    Raises:
        ValueError: the record has no row of training; or, with ``texts``, the data set can't be read.
    """
    rows = columns(found.table)
    train = figures.split(rows, "train")
    held_out = {name: figures.split(rows, name) for name in sorted(set(rows["split"]) - {"train"})}
    if not len(train["step"]):
        raise ValueError(f"run: the record of {found.run} holds no step of training")
    options = found.facts["options"]
    decides = options["method"] == "eps-dpo" and options["epsilon"] > 0
    pairs = figures.by_pair(train)
    most, changes = figures.most(pairs), figures.flips(train, pairs)
    named = np.array([finding.row for finding in found.findings if finding.row is not None], np.int64)
    wanted = figures.carried(pairs, visits, named)
    place = {int(i): k for k, i in enumerate(wanted)}
    order = np.concatenate([pairs["order"][pairs["start"][i] : pairs["start"][i + 1]] for i in wanted])
    alarms = figures.alarms(train, decides)
    alarms["audit"] = {"state": "fine" if found.ok else "look", "n": sum(found.counts.values())}
    categories = figures.labels(train)
    drawn = figures.dots(train)
    drawn["pair"] = [place.get(one, -1) for one in drawn["pair"]]
    curves = figures.series(train)
    notes = words("notes", language)
    joined, joined_notes = _join(found, pairs, wanted, language, texts) if texts else (None, [notes["no_texts"]])
    dots = notes["dots_all" if len(drawn["x"]) == drawn["of"] else "dots_some"]
    dots = dots.format(n=f"{len(drawn['x']):,}", of=f"{drawn['of']:,}")
    table = notes["pairs_all" if len(wanted) == len(pairs["row"]) else "pairs_some"]
    table = table.format(n=f"{len(wanted):,}", of=f"{len(pairs['row']):,}")
    counted = notes["counted"].format(rows=f"{len(found.table):,}", steps=f"{found.steps:,}", parts=f"{found.parts:,}")
    told = [
        notes["record_only"],
        notes["training_only"],
        dots,
        table,
        *([notes["binned"].format(n=curves["steps_a_point"])] if curves["steps_a_point"] > 1 else []),
        *joined_notes,
    ]
    return {
        "name": visible(name, 120),
        "method": visible(options["method"], 40),
        "summary": _summary(found, train, pairs, alarms, changes, decides, language),
        "alarms": _alarms(alarms, language),
        "audit": {
            "ok": found.ok,
            "text": counted,
            "findings": _findings(found),
            "digest": found.digest,
            "limits": [visible(line, 400) for line in found.unchecked(language)],
        },
        "series": curves,
        "evaluation": [{"name": visible(name, 64)} | _evaluation(own) for name, own in held_out.items()],
        "map": figures.beta_map(train),
        "dots": drawn,
        "flips": changes,
        "most": {name: [place[int(i)] for i in places[:12] if int(i) in place] for name, places in most.items()},
        "labels": [one | {"label": visible(one["label"], 64)} for one in categories[: figures.CATEGORIES]],
        "categories": len(categories),
        "pairs": {
            "id": [visible(one or "–", 64) for one in pairs["id"][wanted]],
            "label": [None if one is None else visible(one, 64) for one in pairs["label"][wanted]],
            "row": [row if row >= 0 else None for row in pairs["row"][wanted].tolist()],
            **{n: pairs[n][wanted].tolist() for n in ("visits", "decision", "flips", "vetoed", *figures.SIGNS)},
            **{n: figures.rounded(pairs[n][wanted]) for n in ("margin", "kl_difference", "lean")},
            "of": len(pairs["row"]),
        },
        "visits": {name: figures.rounded(train[name][order]) for name in figures.HISTORY},
        "texts": joined,
        "notes": told,
        "dots_note": dots,
        "table_note": table,
        "settings": _settings(found.facts),
    }


def _summary(
    found: Audit, train: Columns, pairs: Columns, alarms: dict, changes: dict, decides: bool, language: str
) -> list[str]:
    say, alarm_names = words("summary", language), words("alarms", language)
    first, last = float(train["beta"][0]), float(train["beta"][-1])
    # What would round to no change is none.
    moved = "same" if abs(last / first - 1) < 5e-4 else "lower" if last < first else "higher"
    late = figures.ending(train, 0.1)
    measured = late & np.isfinite(train["margin"])
    n = f"{len(train['step']):,}"
    shares = {name: percent(float((train["decision"] == sign).mean())) for name, sign in figures.SIGNS.items()}
    lines = [
        say["size" if changes["known"] else "size_only"].format(
            rows=n, pairs=f"{len(pairs['row']):,}", steps=f"{len(np.unique(train['step'])):,}",
            epochs=f"{len(train['step']) / len(pairs['row']):.3g}",
        ),
        say["shares"].format(**shares) if decides else say["no_decisions"].format(method=inside(train["method"][0])),
        say[f"beta_{moved}"].format(first=f"{first:.4g}", last=f"{last:.4g}", change=percent(abs(last / first - 1))),
        say["learnt"].format(
            accuracy=percent(float((train["margin"][measured] > 0).mean())) if measured.any() else "–",
            margin=_figure(float(train["margin"][measured].astype(np.float64).mean()) if measured.any() else math.nan),
        ),
        say["kl"].format(kl=_figure(figures.kl_per_token(train, late))),
    ]  # fmt: skip
    if train["vetoed"].any():
        lines.append(say["vetoed"].format(n=f"{int(train['vetoed'].sum()):,}"))
    if changes["seen_again"] and decides:
        lines.append(say["flips"].format(flipped=f"{changes['flipped']:,}", pairs=f"{changes['seen_again']:,}"))
    look = [alarm_names[name] for name, alarm in alarms.items() if alarm["state"] == "look"]
    joint = "、" if language == "ja" else "; "
    lines.append(say["look"].format(names=joint.join(look)) if look else say["nothing"])
    checked = {"rows": f"{len(found.table):,}", "n": f"{sum(found.counts.values()):,}"}
    lines.append(say["audit_ok" if found.ok else "audit_bad"].format(**checked))
    return lines


def _alarms(alarms: dict[str, dict[str, Any]], language: str) -> list[dict[str, str]]:
    say, page = words("alarms", language), words("page", language)
    bounds: dict[str, dict[str, Any]] = {
        "drift": {"factor": f"{figures.DRIFT:g}"},
        "takeover": {"share": percent(figures.TAKEOVER)},
        "runaway": {
            "bound": figures.RUNAWAY, "low": figures.RUNAWAY_LOW, "factor": f"{figures.RUNAWAY_FACTOR:g}",
        },
        "label": {"least": figures.LABEL_LEAST, "points": figures.LABEL_POINTS, "errors": figures.LABEL_ERRORS},
        "reference": {"errors": figures.REFERENCE_ERRORS},
        "finite": {}, "audit": {},
    }  # fmt: skip
    lines = []
    for name, alarm in alarms.items():
        found = {key: value for key, value in alarm.items() if key != "state"}
        for key, value in found.items():
            if name in ("takeover", "label", "reference") and key in ("value", "others"):
                found[key] = percent(value)
            elif isinstance(value, float):
                found[key] = _figure(value)
        if name == "takeover":
            found["name"] = page[found["name"]]
        elif name == "label":
            found["name"] = inside(found["name"])
        none = alarm["state"] == "none" or name == "finite" and not alarm["n"]
        measured = "" if none else say[f"{name}_measured"].format(**found)
        lines.append(
            {
                "name": say[name], "rule": say[f"{name}_rule"].format(**bounds[name]), "state": alarm["state"],
                "measured": measured,
            }
        )  # fmt: skip
    return lines


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _findings(found: Audit) -> list[dict[str, Any]]:
    shown = [vars(finding) for finding in found.findings[:200]]
    return [{k: visible(v, 200) if isinstance(v, str) else v for k, v in one.items()} for one in shown]


def _evaluation(rows: Columns) -> dict[str, list]:
    """The measures of each evaluation, at its policy's step; one that was evaluated twice counts once, averaged."""
    steps, group = np.unique(rows["policy_step"], return_inverse=True)
    means = {name: np.bincount(group, values) / np.bincount(group) for name, values in figures.measures(rows).items()}
    return {"step": steps.tolist()} | {name: figures.rounded(values) for name, values in means.items()}


def _settings(facts: dict[str, Any]) -> list[list[str]]:
    told = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
            "learning_rate", "lr_scheduler_type", "warmup_steps", "seed", "bf16", "fp16")  # fmt: skip
    arguments = facts.get("training_arguments", {})
    found = {"epsdpo_kernels": facts.get("version"), "torch": facts.get("torch")}
    found |= facts["options"] | {name: arguments.get(name) for name in told}
    return [[visible(k, 64), visible(v, 200)] for k, v in found.items() if v is not None]


def _join(
    found: Audit, pairs: Columns, wanted: np.ndarray, language: str, budget: int
) -> tuple[dict[str, Any], list[str]]:
    """Texts of pairs by their place in the page, up to the budget, and what there is to say of it."""
    from .texts import find

    options, notes = found.facts["options"], words("notes", language)
    source, split = options.get("dataset"), options.get("dataset_split") or "train"
    if not source:
        return {}, [notes["no_source"]]
    places = {name: place for place, i in enumerate(wanted) if (name := str(pairs["id"][i]))}
    texts = {}
    for name, pair in find(source, split, places):
        texts[places[name]] = [visible(text, TEXT_CUT, notes["cut"]) for text in pair.text().values()]
    joined, spent = {}, 0
    for place in sorted(texts):  # the telling ones come first
        spent += sum(map(len, texts[place]))
        if spent > budget:
            break
        joined[str(place)] = texts[place]
    name = source if isinstance(source, str) else ", ".join(Path(one).name for one in source)
    told = [notes["texts"].format(source=inside(name), n=f"{len(joined):,}", cut=f"{TEXT_CUT:,}")]
    left_out = {"texts_changed": len(places) - len(texts), "texts_no_id": len(wanted) - len(places)}
    return joined, told + [notes[why].format(n=f"{n:,}") for why, n in left_out.items() if n]


def page(runs: list[dict[str, Any]], language: str) -> str:
    """The HTML file."""
    style, script, body = ((PAGE / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("css", "js", "html"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    title = words("page", language)["title"] + ": " + ", ".join(run["name"] for run in runs)
    value = {"words": {s: words(s, language) for s in ("page", "history", "findings")}, "runs": runs}
    filled = {
        "language": language, "policy": html.escape(policy), "title": html.escape(title), "style": style,
        "script": script, "data": embed(value),
    }  # fmt: skip
    # In one pass, so that nothing that was filled in is taken for a place to fill in.
    return re.sub(r"\[\[(\w+)\]\]", lambda place: filled[place[1]], body)


def report(runs: list[Path], out: Path | None = None, language: str = "en", texts: bool = False) -> Path:
    """Writes report.html and the pictures of runs; the path of the former.

    Args:
        runs: folders with run.json and record/.
        out: folder to write to; by default ``report`` in the first run.

    Raises:
        FileNotFoundError: a folder that holds no record. ValueError: one without a step of training, or that can't be
            read, or no texts. OSError: ``out`` can't be written to. ModuleNotFoundError: matplotlib is missing.
    """
    from . import plots

    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    room = VISITS // len(runs), TEXT_BUDGET // len(runs) if texts else 0
    described = [describe(audit(run), name, language, *room) for run, name in zip(runs, names, strict=True)]
    out = out or runs[0] / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(page(described, language), encoding="utf-8", newline="\n")
        plots.draw(described, language, out)
    except OSError as problem:
        raise OSError(f"out: {out} can't be written to, takes a folder with room in it ({problem})") from problem
    return out / "report.html"


def add_command(commands: Any) -> None:
    parser = commands.add_parser("report", help="draw what a run's record says")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with record/ and run.json")
    parser.add_argument("--out", type=Path, help="folder to write to; by default report/ in the first run")
    parser.add_argument("--lang", default="en", choices=LANGUAGES, help="language of the labels")
    parser.add_argument("--texts", action="store_true", help="join in the texts of the data set")
    parser.set_defaults(run_command=_command)


def _command(given: argparse.Namespace) -> int:
    written = report(given.runs, given.out, given.lang, given.texts)
    print(f"{written} ({written.stat().st_size / 1e6:.1f} MB) and the same pictures as PNG beside it")
    return 0
