"""The picture of a run: a few small panels, one question each, drawn from metrics.jsonl."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from train.metrics import read_metrics
from train.plot_panels import GREY, INK, Lines, has, panels, series, short, short_numbers

STAGE_COLOURS = ("#ffffff", "#f6ead8", "#e6eef7", "#e7f2ea", "#f3e8f2")


def plot_curves(
    metrics_path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> pathlib.Path:
    """Draws the curves of a run; panels without data are left out.

    Args:
      metrics_path: a metrics.jsonl of `MetricsWriter`.
      out: picture to write; its suffix (.png, .svg, .pdf) is the format.
      baselines: bits per byte on the same held-out text by name, such as ``{"xz -9": 2.31}``.
      title: above the panels.

    Returns:
      The path of the picture.

    Raises:
      ValueError: the log has no steps.
      ImportError: matplotlib is missing; the message says how to install it.
    """
    lines = read_metrics(metrics_path)
    if not any(has(lines, name) for _, names in panels({}) for name in names):
        raise ValueError(f"{metrics_path} has no steps to draw yet")
    figure_class, style = _matplotlib()
    with style(_STYLE):
        drawn = [draw for draw, names in panels(dict(baselines or {})) if any(has(lines, name) for name in names)]
        columns = min(len(drawn), 4 if len(drawn) in (4, 7, 8) else 3)
        rows = math.ceil(len(drawn) / columns)
        figure = figure_class(figsize=(4.5 * columns, 0.9 + 3.1 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, draw in zip(axes, drawn, strict=False):
            draw(axis, lines)
            _finish(axis, lines)
        for axis in axes[len(drawn) :]:
            axis.remove()
        _head(figure, lines, title)
        figure.savefig(out, dpi=160)
    return pathlib.Path(out)


_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 16,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c6cad0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5c636b",
    "ytick.color": "#5c636b",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dfe2e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "svg.hashsalt": "dsv4",
}


def _finish(axis: Any, lines: Lines) -> None:
    """The shared horizontal axis, with the stages shaded and, where they change, named above the panel."""
    first, last = lines[0]["step"], lines[-1]["step"]
    axis.set_xlim(first, max(last, first + 1))
    axis.set_xlabel("step")
    axis.xaxis.set_major_formatter(short_numbers())
    axis.xaxis.get_major_locator().set_params(nbins=6)
    stages = _stages(lines)
    for number, (name, start, end) in enumerate(stages if len(stages) > 1 else []):
        axis.axvspan(start, end, color=STAGE_COLOURS[number % len(STAGE_COLOURS)], linewidth=0, zorder=-2)
        if number:
            axis.axvline(start, color="#c6cad0", linewidth=0.8, zorder=-1)
        _stage_name(axis, name, start, end, (end - start) / max(1, last - first))


def _stage_name(axis: Any, name: str, start: float, end: float, share: float) -> None:
    """Above the panel; a stage too short for its name gets it only on the learning rate panel, written upwards."""
    if share > 0.016 * len(name) + 0.02:
        axis.text(
            (start + end) / 2,
            1.015,
            name,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=GREY,
        )
    elif axis.get_title(loc="left").startswith("Learning rate"):
        axis.text(
            (start + end) / 2,
            0.04,
            name,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=GREY,
            rotation=90,
        )


def _head(figure: Any, lines: Lines, title: str | None) -> None:
    tokens = series(lines, "tokens")[1]
    facts = [f"{lines[-1]['step']:,} steps"] + ([f"{short(tokens[-1])} tokens"] if len(tokens) else [])
    figure.suptitle("  ·  ".join([*([title] if title else []), *facts]), x=0.008, ha="left", fontsize=12.5, color=INK)


def _stages(lines: Lines) -> list[tuple[str, int, int]]:
    """Name, first step and end of each run of lines with one ``stage``."""
    changes: list[tuple[str, int]] = []
    for line in lines:
        name = str(line.get("stage", changes[-1][0] if changes else ""))
        if not changes or changes[-1][0] != name:
            changes.append((name, line["step"]))
    ends = [start for _, start in changes[1:]] + [lines[-1]["step"]]
    return [(name, start, end) for (name, start), end in zip(changes, ends, strict=True)]


def _matplotlib() -> Sequence[Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing curves needs matplotlib: pip install matplotlib. The numbers themselves are in metrics.jsonl"
        ) from error
    return Figure, rc_context
