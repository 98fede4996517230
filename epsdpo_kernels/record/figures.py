"""What the report shows, as numbers: pure functions from a record's columns to plain JSON values.

Columns are those of :func:`audit.columns`. All that is drawn, in the page or as PNG, comes from here; what is
sampled or averaged is said in the numbers themselves (``of``, ``steps_a_point``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .audit import Columns

POINTS, PAIRS_A_POINT = 120, 24  # of a curve: at most, and at least where that leaves 20 points
DOTS = 4000  # of the picture
CATEGORIES = 20
# The rules of the alarms; words.py puts them in words.
DRIFT, TAKEOVER = 2.0, 0.9
RUNAWAY, RUNAWAY_LOW, RUNAWAY_FACTOR = 0.5, 0.05, 3.0
LABEL_LEAST, LABEL_POINTS, LABEL_ERRORS = 30, 20, 4
REFERENCE_ERRORS = 2
SIGNS = {"relaxed": 1, "kept": 0, "tightened": -1}
HISTORY = (
    "step", "epoch", "decision", "vetoed", "beta", "beta_used", "margin", "relaxed_shift", "tightened_shift",
    "chosen_kl", "rejected_kl", "loss", "coefficient", "chosen_logp", "rejected_logp", "ref_chosen_logp",
    "ref_rejected_logp", "chosen_entropy", "rejected_entropy", "chosen_tokens", "rejected_tokens",
)  # fmt: skip


def rounded(values: Any, digits: int = 5) -> list:
    """Numbers with so many digits; what is not finite becomes None."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def split(rows: Columns, name: str) -> Columns:
    """The rows of "train" or of an evaluation."""
    own = rows["split"] == name
    return {column: values[own] for column, values in rows.items()}


def pair_numbers(rows: Columns) -> np.ndarray:
    """(N,) one number a pair: by its id; where that isn't known by its row; where neither is, each visit is a pair.

    Numbers are in the order of the pairs' rows. A row alone would not do: in a stream it is another pair's next time.
    """
    row, names = rows["row"], rows["pair_id"].copy()
    for i in np.flatnonzero(names == ""):
        names[i] = f"row {row[i]}" if row[i] >= 0 else f"visit {i}"  # no id has a space in it
    _, number = np.unique(names, return_inverse=True)
    first = np.full(number.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, number, row)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[number]


def measures(rows: Columns) -> Columns:
    """What is drawn of a row, (N,) float64 each."""
    tokens = {side: np.maximum(rows[f"{side}_tokens"], 1) for side in ("chosen", "rejected")}
    beta = np.where(rows["beta_used"] > 0, rows["beta_used"], rows["beta"])  # beta-dpo sets 0 for pairs it leaves out
    found = {name: rows["decision"] == sign for name, sign in SIGNS.items()}
    margin = rows["margin"].astype(np.float64)
    found |= {"beta": rows["beta"], "reward_margin": beta * rows["margin"]}
    found["accuracy"] = np.where(np.isnan(margin), math.nan, margin > 0)
    found |= {f"kl_{side}": rows[f"{side}_kl"] / n for side, n in tokens.items()}
    found |= {f"entropy_{side}": rows[f"{side}_entropy"] for side in tokens}
    return {name: values.astype(np.float64) for name, values in found.items()}


def kl_difference(rows: Columns) -> np.ndarray:
    return rows["chosen_kl"].astype(np.float64) - rows["rejected_kl"]


def series(rows: Columns) -> dict[str, Any]:
    """The measures over steps, at most ``POINTS`` of them; a point is the mean over the pairs of some steps."""
    steps = np.unique(rows["step"])
    smooth = min(math.ceil(PAIRS_A_POINT * len(steps) / len(rows["step"])), len(steps) // 20)
    width = max(1, smooth, math.ceil(len(steps) / POINTS))
    point = np.searchsorted(steps, rows["step"]) // width
    count = np.bincount(point)
    middle = [steps[i : i + width].mean() for i in range(0, len(steps), width)]
    found: dict[str, Any] = {"step": rounded(middle, 9), "steps_a_point": width}
    for name, values in measures(rows).items():
        found[name] = rounded(np.bincount(point, values) / count)
    return found


def beta_map(rows: Columns, columns: int = 72, levels: int = 32) -> dict[str, Any]:
    """How the pairs' β is distributed over steps: share[column][level], each column adding up to 1."""
    steps, beta = rows["step"], rows["beta_used"].astype(np.float64)
    first, last = int(steps.min()) - 0.5, int(steps.max()) + 0.5
    columns = min(columns, int(last - first))
    low, high = float(beta.min()), float(beta.max())
    room = max((high - low) * 0.05, high * 0.01, 1e-9)
    edges = np.linspace(first, last, columns + 1), np.linspace(max(0.0, low - room), high + room, levels + 1)
    counts, _, _ = np.histogram2d(steps, beta, edges)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return {"step": rounded(edges[0], 7), "beta": rounded(edges[1], 6), "share": [rounded(c, 3) for c in share]}


def dots(rows: Columns, seed: int = 0) -> dict[str, Any]:
    """Margin against KL difference, a dot a decision; an even random draw where there are more than ``DOTS``."""
    x, y = kl_difference(rows), rows["margin"].astype(np.float64)
    sound = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    drawn = sound
    if len(sound) > DOTS:
        drawn = np.sort(np.random.default_rng(seed).choice(sound, DOTS, replace=False))
    return {
        "x": rounded(x[drawn], 4), "y": rounded(y[drawn], 4), "decision": rows["decision"][drawn].tolist(),
        "step": rows["step"][drawn].tolist(), "pair": pair_numbers(rows)[drawn].tolist(), "of": len(rows["step"]),
    }  # fmt: skip


def by_pair(rows: Columns) -> Columns:
    """One entry a pair, in the order of :func:`pair_numbers`: what its visits add up to.

    ``order`` and ``start`` lead from a pair to its visits: ``order[start[i] : start[i + 1]]`` are places in ``rows``,
    by step. ``lean`` is the mean of margin − KL difference.
    """
    number = pair_numbers(rows)
    order = np.lexsort([rows["step"], number])
    number = number[order]
    start = np.concatenate([np.flatnonzero(np.concatenate([[True], number[1:] != number[:-1]])), [len(number)]])
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    last, decision = order[start[1:] - 1], rows["decision"][order]
    lean = (rows["margin"].astype(np.float64) - kl_difference(rows))[order]
    changed = np.concatenate([[False], (decision[1:] != decision[:-1]) & (number[1:] == number[:-1])])
    found = {name: np.bincount(group, decision == sign).astype(int) for name, sign in SIGNS.items()}
    return found | {
        "order": order, "start": start, "row": rows["row"][last], "id": rows["pair_id"][last],
        "label": rows["label"][last], "decision": rows["decision"][last], "margin": rows["margin"][last],
        "kl_difference": kl_difference(rows)[last], "visits": np.diff(start),
        "flips": np.bincount(group, changed).astype(int), "lean": np.bincount(group, lean) / np.diff(start),
        "vetoed": np.bincount(group, rows["vetoed"][order]).astype(int),
    }  # fmt: skip


def flips(rows: Columns, pairs: Columns) -> dict[str, Any]:
    """How often a decision follows another at a pair's next visit: matrix[from][to], in the order of ``SIGNS``."""
    decision = rows["decision"][pairs["order"]]
    same = np.ones(len(decision) - 1, bool)
    same[pairs["start"][1:-1] - 1] = False
    places = (1 - decision[:-1][same].astype(int)) * 3 + (1 - decision[1:][same].astype(int))
    matrix = np.bincount(places, minlength=9).reshape(3, 3)
    seen, flipped = pairs["visits"] > 1, pairs["flips"] > 0
    known = bool(((rows["pair_id"] != "") | (rows["row"] >= 0)).all())
    return {
        "matrix": matrix.tolist(), "seen_again": int(seen.sum()), "flipped": int(flipped.sum()), "known": known,
    }  # fmt: skip


def most(pairs: Columns) -> dict[str, np.ndarray]:
    """Places of pairs: the most changed, most relaxed and most tightened first; none that never was."""
    net = pairs["relaxed"] - pairs["tightened"]
    lean = np.nan_to_num(pairs["lean"])
    order = {
        "flips": np.lexsort([-np.abs(lean), -pairs["flips"]]),
        "relaxed": np.lexsort([-lean, -net]),
        "tightened": np.lexsort([lean, net]),
    }
    there = {"flips": pairs["flips"] > 0, "relaxed": net > 0, "tightened": net < 0}
    return {name: places[there[name][places]] for name, places in order.items()}


def carried(pairs: Columns, limit: int, named: np.ndarray, seed: int = 0) -> np.ndarray:
    """Places of the pairs whose visits, at most ``limit`` in all, the page carries: the telling ones, then any."""
    rest = np.random.default_rng(seed).permutation(len(pairs["row"]))
    by_name = np.flatnonzero(np.isin(pairs["row"], named))
    first = np.concatenate([by_name, *(places[:200] for places in most(pairs).values()), rest])
    _, index = np.unique(first, return_index=True)
    wanted = first[np.sort(index)]
    within = np.cumsum(pairs["visits"][wanted]) <= limit
    within[:1] = True  # a page without any would show nothing
    return wanted[within]


def labels(rows: Columns) -> list[dict[str, Any]]:
    """Decisions by category, the largest first; empty where the record has none."""
    there = np.array([label is not None for label in rows["label"]], bool)
    names, group = np.unique(rows["label"][there].astype(str), return_inverse=True)
    found: list[dict[str, Any]] = [
        {"label": str(name), "n": int(n)}
        for name, n in zip(names, np.bincount(group, minlength=len(names)), strict=True)
    ]
    for sign, number in SIGNS.items():
        counts = np.bincount(group, rows["decision"][there] == number, minlength=len(names))
        for one, count in zip(found, counts, strict=True):
            one[sign] = float(count) / one["n"]
    return sorted(found, key=lambda one: -one["n"])


def ending(rows: Columns, share: float, middle: bool = False) -> np.ndarray:
    """(N,) which rows are of the last share of the steps, or of so many in the middle."""
    steps = np.unique(rows["step"])
    n = max(1, round(len(steps) * share))
    first = (len(steps) - n) // 2 if middle else len(steps) - n
    return (rows["step"] >= steps[first]) & (rows["step"] <= steps[first + n - 1])


def kl_per_token(rows: Columns, which: np.ndarray) -> float:
    """KL from the reference, nats a token, over both answers of the rows."""
    kl = rows["chosen_kl"][which].astype(np.float64) + rows["rejected_kl"][which]
    return float(kl.sum() / max(1, (rows["chosen_tokens"][which] + rows["rejected_tokens"][which]).sum()))


def finite(rows: Columns) -> np.ndarray:
    """(N,) which rows hold finite numbers only."""
    numbers = (values for values in rows.values() if values.dtype.kind == "f" and values is not rows["epoch"])
    return np.logical_and.reduce([np.isfinite(values) for values in numbers])


def alarms(rows: Columns, decides: bool) -> dict[str, dict[str, Any]]:
    """By name, whether the rule is met ("look"), not ("fine") or does not apply ("none"), and what was measured.

    What is not a number is no reason to call anything fine.

    Args:
        rows: of training.
        decides: whether the method sets a penalty pair by pair.
    """
    found: dict[str, dict[str, Any]] = {}

    def state(alarm: str, met: bool | None, /, **measured) -> None:
        found[alarm] = {"state": "none" if met is None else "look" if met else "fine", **measured}

    bad = ~finite(rows)
    state("finite", bool(bad.any()), n=int(bad.sum()), step=int(rows["step"][bad][0]) if bad.any() else "–")
    drift = float(rows["beta"][-1]) / float(rows["beta"][0])
    state("drift", max(drift, 1 / drift) > DRIFT if drift > 0 else True, value=drift)
    late = rows["decision"][ending(rows, 0.25)]
    name, share = max(((n, float((late == s).mean())) for n, s in SIGNS.items()), key=lambda one: one[1])
    state("takeover", share > TAKEOVER if decides else None, name=name, value=share)
    end, middle = kl_per_token(rows, ending(rows, 0.1)), kl_per_token(rows, ending(rows, 0.1, middle=True))
    near = end <= RUNAWAY and (end <= RUNAWAY_LOW or end <= RUNAWAY_FACTOR * middle)
    state("runaway", not near, value=end, middle=middle)
    worst: dict[str, Any] = {"name": "", "value": 0.0, "others": 0.0, "gap": -math.inf, "met": False}
    categories = labels(rows)
    total, relaxed = sum(one["n"] for one in categories), sum(one["n"] * one["relaxed"] for one in categories)
    for one in categories:
        rest = total - one["n"]
        if one["n"] < LABEL_LEAST or not rest:
            continue
        others = (relaxed - one["n"] * one["relaxed"]) / rest
        error = math.sqrt(relaxed / total * (1 - relaxed / total) * (1 / one["n"] + 1 / rest))
        gap = one["relaxed"] - others
        met = gap * 100 >= LABEL_POINTS and gap > LABEL_ERRORS * error
        if (met, gap) > (worst["met"], worst["gap"]):
            worst = {"name": one["label"], "value": one["relaxed"], "others": others, "gap": gap, "met": met}
    state(
        "label",
        worst["met"] if worst["name"] and decides else None,
        **{k: worst[k] for k in ("name", "value", "others")},
    )
    _, once = np.unique(pair_numbers(rows), return_index=True)
    better = (rows["ref_chosen_logp"].astype(np.float64) - rows["ref_rejected_logp"])[once]
    better = better[~np.isnan(better)]
    n, share = len(better), float((better < 0).mean()) if len(better) else math.nan
    state("reference", share - 0.5 > REFERENCE_ERRORS * 0.5 / math.sqrt(n) if n else None, value=share, pairs=n)
    return found
