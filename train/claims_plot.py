"""The picture of the article's claims: a panel for each number, a row for each kind of model, a dot for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.plot_panels import BLUE, GREEN, INK, ORANGE, PURPLE

ORDERS = ("ratio",)  # models differ in it by orders of magnitude: a logarithmic axis, and a median in place of a bar
PANELS = (
    ("ratio", "Wording / meaning", "small: only the meaning counts", ORANGE),
    ("used", "Experts in use", "share, by the load's entropy", BLUE),
    ("busiest", "Load of the busiest expert", "1: a fair share", PURPLE),
    ("reach", "How far back HCA looks", "half of its mass within .. tokens", GREEN),
)


def draw_claims(found: Mapping[str, Sequence[Mapping[str, float]]], about: Mapping[str, str], path: Path) -> Path:
    """Draws the numbers of `train.claims`; the suffix of `path` is the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.7 + 0.36 * len(found)), layout="constrained")
    for axis, (key, title, unit, colour) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for row, runs in enumerate(found.values()):
            values = [run[key] for run in runs if key in run]
            if values and key in ORDERS:
                axis.plot(np.median(values), row, "|", color=colour, markersize=20, markeredgewidth=5)
            elif values:
                axis.barh(row, np.mean(values), color=colour, alpha=0.55, height=0.62)
            axis.plot(values, [row] * len(values), "o", color=INK, markersize=3.5)
        axis.set(xscale="log") if key in ORDERS else axis.set_xlim(left=0)
        axis.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
        axis.set_xlabel(unit, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _name_rows(figure.axes[0], found, about)
    figure.savefig(path, dpi=160)
    return path


def _name_rows(axis: Any, found: Mapping[str, Any], about: Mapping[str, str]) -> None:
    axis.set_yticks(range(len(found)), [f"{name}  ({about[name]})" for name in found], fontsize=8.5)
    axis.invert_yaxis()
