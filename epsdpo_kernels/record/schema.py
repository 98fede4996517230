"""What run.json and the columns of a part may hold, checked once, where they are written and read.

A record may have been altered, cut short or written by other code. What passes here is of the kind, and within the
bounds, that audit and report work with; whether it follows from the rest is theirs to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..module import BETA_UPDATES

METHODS = ("eps-dpo", "dpo", "tr-dpo", "beta-dpo", "lsc-dpo")
SIGNALS = ("entropy", "kl")  # that a veto reads
LARGEST = float(np.finfo(np.float32).max)
MISSING = object()
# By name: whether a value fits, and what is taken, in words.
Takes = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _bound(value: Any) -> bool:
    name, _, bound = value.partition("=")
    try:
        return name in SIGNALS and _number(float(bound))
    except ValueError:
        return False


POSITIVE: Takes = (lambda v: _number(v) and v > 0, "a positive finite number")
OPTIONS: dict[str, Takes] = {
    "method": (lambda v: v in METHODS, f"one of {', '.join(METHODS)}"),
    "beta": POSITIVE,
    "epsilon": (lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "beta_update": (lambda v: v in BETA_UPDATES, f"one of {', '.join(BETA_UPDATES)}"),
    "label_smoothing": (lambda v: _number(v) and 0 <= v < 0.5, "a number in [0, 0.5)"),
}
OF_METHODS: dict[str, dict[str, Takes]] = {
    "beta-dpo": {"beta_dpo_alpha": (_number, "a finite number")},
    "lsc-dpo": {
        "lsc_z_star": POSITIVE, "lsc_eta": POSITIVE,
        "lsc_tau_start": (lambda v: _number(v) and 0 < v < 1, "a number in (0, 1)"),
    },
}  # fmt: skip


def _eta(z_star: float, tau_start: float) -> Takes:
    """The η of lsc-dpo by which no step multiplies β by more than e⁸⁰, with which a float32 can do."""
    furthest = z_star - math.log(1 / tau_start - 1)  # z* − z, where z is the least at which β moves
    return lambda v: v * furthest <= 80, f"at most {80 / max(furthest, 1e-30):.3g} with these z* and τ_start"


# What need not be there, and may be null.
MORE_OPTIONS: dict[str, Takes] = {
    "veto": (lambda v: _strings(v) and all(map(_bound, v)), "a list of entropy=NATS and kl=NATS"),
    "dataset": (lambda v: isinstance(v, str) or _strings(v), "a file or hub name, or a list of files"),
    "dataset_split": (lambda v: isinstance(v, str), "a name"),
}
# What need not be there.
FACTS: dict[str, Takes] = {
    "pairs": (lambda v: isinstance(v, dict) and all(map(_count, v.values())), "an object with a number by split"),
    "streams": (_strings, "a list of splits"),
    "ranks": (lambda v: _count(v) and 0 < v < 2**15, "a number of processes, from 1"),
    "begins_after": (_count, "a number of steps"),
    "states_of_others": (_strings, "a list of files"),
    "training_arguments": (lambda v: isinstance(v, dict), "an object"),
}
ARGUMENTS: dict[str, Takes] = {f"per_device_{of}_batch_size": (_count, "a number of pairs") for of in ("train", "eval")}
COLUMNS: dict[str, Takes] = {
    "step": (lambda v: (v >= 0) & (v < 2**31), "an integer from 0, below 2^31"),
    "policy_step": (lambda v: (v >= 0) & (v < 2**31), "an integer from 0, below 2^31"),
    "micro": (lambda v: v >= 0, "an integer from 0"),
    "epoch": (lambda v: np.isnan(v) | (v >= 0) & (v < 2**53), "a finite number from 0"),
    "row": (lambda v: v >= 0, "an integer from 0, or null"),
    "chosen_tokens": (lambda v: v >= 0, "an integer from 0"),
    "rejected_tokens": (lambda v: v >= 0, "an integer from 0"),
    "decision": (lambda v: np.abs(v.astype(int)) <= 1, "−1, 0 or 1"),
    "beta": (lambda v: (v > 0) & np.isfinite(v), "a positive finite number"),
    "beta_used": (lambda v: (v >= 0) & np.isfinite(v), "a finite number from 0"),
}


def read_facts(run: Path) -> dict[str, Any]:
    """The run.json of a run.

    Raises:
        FileNotFoundError: there is none. ValueError: it can't be read, or :func:`check_facts` refuses it.
    """
    path = Path(run) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} holds no run.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: can't be read as JSON ({problem})") from None
    check_facts(facts, str(path))
    return facts


def check_facts(facts: Any, where: str) -> None:
    """ValueError where the facts of a run are not what run.json takes; it names the place in ``where``."""
    _check(where, {"run.json": facts}, {"run.json": (lambda v: isinstance(v, dict), "an object")})
    _check(where, facts, {"options": (lambda v: isinstance(v, dict), "an object")})
    _check(where, facts, FACTS, needed=False)
    _check(where, facts.get("training_arguments", {}), ARGUMENTS, "training_arguments.", needed=False)
    options = facts["options"]
    _check(where, options, OPTIONS, "options.")
    _check(where, options, OF_METHODS.get(options["method"], {}), "options.")
    if options["method"] == "lsc-dpo":
        _check(where, options, {"lsc_eta": _eta(options["lsc_z_star"], options["lsc_tau_start"])}, "options.")
    given = {name: value for name, value in options.items() if value is not None}
    _check(where, given, MORE_OPTIONS, "options.", needed=False)


def _check(where: str, values: dict[str, Any], takes: dict[str, Takes], under: str = "", needed: bool = True) -> None:
    for name, (fits, taken) in takes.items():
        value = values.get(name, MISSING)
        if (value is not MISSING or needed) and not fits(value):
            got = "nothing" if value is MISSING else f"{value!r:.80}"
            raise ValueError(f"{where}: {under}{name}: got {got}, takes {taken}")


def check_columns(table: pa.Table, rank: int) -> None:
    """ValueError where a column of a part of ``rank`` holds what no run writes; it names column and row."""
    takes = COLUMNS | {"rank": (lambda v: v == rank, f"{rank}, as the part's name says")}
    for name, (fits, taken) in takes.items():
        column = table[name]
        values = (pc.fill_null(column, 0) if column.null_count else column).to_numpy()
        if len(bad := np.flatnonzero(~fits(values))):
            raise ValueError(f"{name} holds {values[bad[0]]} in row {bad[0]}, takes {taken}")
