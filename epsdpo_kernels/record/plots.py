"""The report's pictures as PNG, from the same numbers as the page's."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager

from .words import words

# Okabe and Ito's colours, which the colour-blind tell apart, and a shape each.
LOOKS = {"relaxed": ("#0072B2", "^"), "kept": ("#707070", "o"), "tightened": ("#B85000", "v")}
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
SHAPES = "osD^"  # of an evaluation's sets
JAPANESE = ("Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "Hiragino Sans", "Yu Gothic", "Meiryo")
JAPANESE_FILE = re.compile("NotoSans(CJK|JP)|ipaexg|ipag|Hiragino|YuGoth|meiryo", re.IGNORECASE)
CURVES = ("reward_margin", "accuracy", "kl_chosen", "kl_rejected", "entropy_chosen", "entropy_rejected")


def draw(runs: list[dict[str, Any]], language: str, out: Path) -> list[Path]:
    """Writes margin.png, beta.png and decisions.png, with the run's number where there are several, and curves.png.

    Returns their paths. Japanese labels need a font that has them; where there is none, the pictures (not the page) are
    in English.
    """
    matplotlib.use("Agg")
    if language == "ja":
        # matplotlib's list of fonts may be older than the fonts.
        for path in filter(JAPANESE_FILE.search, font_manager.findSystemFonts()):
            font_manager.fontManager.addfont(path)
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    found = next((name for name in JAPANESE if name in fonts), None)
    if language == "ja" and found is None:
        print("No font with Japanese was found: the PNG pictures are in English, the page is not.")
    say = words("page", language if found else "en")
    family = [found, "DejaVu Sans"] if found and language == "ja" else ["DejaVu Sans"]
    written = []

    def save(figure, name: str) -> None:
        figure.savefig(out / name, dpi=120)
        plt.close(figure)
        written.append(out / name)

    with plt.rc_context({"font.family": family, "axes.grid": True, "grid.alpha": 0.3, "axes.unicode_minus": False}):
        for i, run in enumerate(runs):
            number = f"-{i + 1}" if len(runs) > 1 else ""
            save(_margin(run, say), f"margin{number}.png")
            save(_beta(run, say), f"beta{number}.png")
            save(_decisions(run, say), f"decisions{number}.png")
        save(_curves(runs, say), "curves.png")
    return written


def _plain(text: str) -> str:
    """A name from outside: a dollar sign would begin mathematics, an underscore at its start hide it in a legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _title(axes, text: str) -> None:
    axes.set_title(_plain(text), loc="left", fontsize=11)


def _margin(run, say):
    figure, axes = plt.subplots(figsize=(7, 5.5), layout="constrained")
    dots = {name: np.array(run["dots"][name], float) for name in ("x", "y", "decision")}
    for (name, (colour, shape)), sign in zip(LOOKS.items(), (1, 0, -1), strict=True):
        own = dots["decision"] == sign
        label = f"{say[name]} ({own.sum():,})"
        axes.scatter(dots["x"][own], dots["y"][own], 14, colour, marker=shape, alpha=0.6, linewidths=0, label=label)
    axes.axline((0, 0), slope=1, color="black", linewidth=1.2, label=say["line"])
    axes.set(xlabel=say["axis_kl"], ylabel=say["axis_margin"])
    _title(axes, f"{say['picture']} · {run['name']}")
    axes.legend(fontsize=9)
    return figure


def _beta(run, say):
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    share = np.array(run["map"]["share"], float).T
    # Greys, from one that is seen on white.
    greys = plt.matplotlib.colors.ListedColormap(plt.get_cmap("Greys")(np.linspace(0.2, 1, 256)))
    share = np.where(share > 0, share, np.nan)
    mesh = axes.pcolormesh(run["map"]["step"], run["map"]["beta"], share, cmap=greys, vmin=0, vmax=1)
    axes.plot(run["series"]["step"], run["series"]["beta"], color="#0072B2", linewidth=2, label=say["running_beta"])
    figure.colorbar(mesh, ax=axes, label=say["share"])
    axes.set(xlabel=say["optimizer_step"], ylabel="β")
    _title(axes, f"{say['pair_beta']} · {run['name']}")
    axes.legend(fontsize=9)
    return figure


def _decisions(run, say):
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    series = run["series"]
    for name, (colour, shape) in LOOKS.items():
        every = max(1, len(series["step"]) // 12)
        axes.plot(series["step"], series[name], color=colour, marker=shape, markevery=every, label=say[name])
    axes.set(xlabel=say["optimizer_step"], ylabel=say["share"], ylim=(-0.03, 1.03))
    _title(axes, f"{say['shares']} · {run['name']}")
    axes.legend(fontsize=9)
    return figure


def _curves(runs, say):
    figure, grid = plt.subplots(3, 2, figsize=(11, 9), layout="constrained")
    for axes, name in zip(grid.flat, CURVES, strict=True):
        for i, run in enumerate(runs):
            colour, line = RUNS[i % len(RUNS)], LINES[i % len(LINES)]
            axes.plot(run["series"]["step"], run["series"][name], line, color=colour, label=_plain(run["name"]))
            for shape, held_out in zip(itertools.cycle(SHAPES), run["evaluation"]):
                label = _plain(held_out["name"]) if len(run["evaluation"]) > 1 else None
                axes.plot(held_out["step"], held_out[name], shape, color=colour, markeredgecolor="white", label=label)
        axes.set(xlabel=say["optimizer_step"])
        _title(axes, say[name])
    grid.flat[0].legend(fontsize=9)
    return figure
