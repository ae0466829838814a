"""The picture of an ablation: far accuracy of every variant with seeds and worst phase; costs; accuracy by distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.plot_panels import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED

COSTS = (("parameters", "parameters", GREY), ("flops", "FLOPs/token", BLUE), ("cache_row", "cache of a row", ORANGE))
LINES = (GREEN, BLUE, ORANGE, PURPLE, RED, INK, GREY)


def draw_ablation(results: Sequence[dict[str, Any]], window: int, path: Path) -> None:
    """Draws `ablation_run` results; the suffix of `path` is the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2.4 + 0.3 * len(results)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 1.4, 2))
    first = results[0]["runs"][0]
    _far(left, results, first)
    _costs(middle, results)
    _distances(right, results[: len(LINES)], window, first)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    bars, marks = (axis.get_legend_handles_labels() for axis in (middle, left))
    shown: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "loc": "outside lower left", "ncols": 6}
    figure.legend(marks[0] + bars[0], marks[1] + bars[1], **shown)
    figure.savefig(path, dpi=160)


def _far(axis: Any, results: Sequence[dict[str, Any]], first: dict[str, Any]) -> None:
    """A bar for each mean, a dot for each seed, and the mean of the seeds' worst phases as a mark."""
    from matplotlib.ticker import PercentFormatter

    for row, result in enumerate(results):
        far, worst = (_values(result, name) for name in ("task_far", "task_worst_phase"))
        if not far:
            continue
        axis.barh(row, np.mean(far), color=GREEN, alpha=0.55, height=0.62)
        axis.plot(far, [row] * len(far), "o", color=INK, markersize=3.5, label="a seed" if row == 0 else None)
        label = "worst phase, mean over seeds" if row == 0 else None
        axis.plot(np.mean(worst), row, marker="|", markersize=13, markeredgewidth=2.2, color=ORANGE, ls="", label=label)
    chance = first["task_chance"]
    axis.axvline(chance, color=RED, linestyle="--", linewidth=1.2, label=f"chance  {chance:.0%}")
    axis.set_yticks(range(len(results)), [f"{r['variant']}  ({r['about']})" for r in results], fontsize=8.5)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.02), xlabel="accuracy")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_title(
        f"Questions about more than {first['far']} tokens before", loc="left", fontweight="bold", fontsize=11
    )


def _costs(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """What each variant costs, as multiples of what the first one does."""
    for place, (name, label, colour) in enumerate(COSTS):
        rows = [row + 0.22 * (place - 1) for row in range(len(results))]
        times = [result[name] / results[0][name] for result in results]
        axis.barh(rows, times, color=colour, height=0.2, label=label)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set(xlabel=f"times that of {results[0]['variant']}")
    axis.set_title("Costs", loc="left", fontweight="bold", fontsize=11)


def _distances(axis: Any, results: Sequence[dict[str, Any]], window: int, first: dict[str, Any]) -> None:
    """Mean over seeds by distance, a line for each of the first variants."""
    from matplotlib.ticker import PercentFormatter

    edges = sorted({int(edge) for result in results for run in result["runs"] for edge in run["task_by_distance"]})
    for result, colour in zip(results, LINES, strict=False):
        means = {edge: _values(result, "task_by_distance", str(edge)) for edge in edges}
        x = [place for place, edge in enumerate(edges) if means[edge]]
        y = [np.mean(means[edge]) for edge in edges if means[edge]]
        axis.plot(x, y, marker="o", markersize=4, color=colour, label=result["variant"])
    axis.axhline(first["task_chance"], color=RED, linestyle="--", linewidth=1.2)
    axis.set_xticks(range(len(edges)), [f"{edge}+" for edge in edges])
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set(ylim=(-0.02, 1.05), ylabel="accuracy", xlabel=f"distance in tokens (window {window})")
    axis.set_title("By distance", loc="left", fontweight="bold", fontsize=11)
    axis.legend(frameon=False, fontsize=8)


def _values(result: dict[str, Any], name: str, key: str | None = None) -> list[float]:
    """Of every run that has it."""
    found = [run.get(name) for run in result["runs"]]
    found = [value.get(key) if key is not None and value else value for value in found]
    return [value for value in found if value is not None]
