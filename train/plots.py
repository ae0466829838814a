"""The picture of a run: a few small panels, one question each, drawn from metrics.jsonl."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from train.metrics import read_metrics

Lines = list[dict[str, Any]]
INK, GREY, BLUE, ORANGE = "#22262b", "#8a9099", "#2f6db5", "#d9772b"
GREEN, RED, PURPLE = "#3a8f5c", "#b5433f", "#7a5aa6"
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
    if not any(_has(lines, name) for _, names in _panels({}) for name in names):
        raise ValueError(f"{metrics_path} has no steps to draw yet")
    figure_class, style = _matplotlib()
    with style(_STYLE):
        panels = [draw for draw, names in _panels(dict(baselines or {})) if any(_has(lines, name) for name in names)]
        columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
        rows = math.ceil(len(panels) / columns)
        figure = figure_class(figsize=(4.5 * columns, 0.9 + 3.1 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, draw in zip(axes, panels, strict=False):
            draw(axis, lines)
            _finish(axis, lines)
        for axis in axes[len(panels) :]:
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


def _panels(baselines: dict[str, float]) -> list[tuple[Callable[[Any, Lines], None], tuple[str, ...]]]:
    """Each panel's function and the metrics of which one has to be there."""
    return [
        (_loss, ("loss", "ce")),
        (lambda axis, lines: _heldout(axis, lines, baselines), ("heldout_bpb",)),
        (_answers, ("heldout_answers",)),
        (_retrieval, ("retrieval_accuracy",)),
        (_task, ("task_accuracy",)),
        (_learning_rate, ("lr",)),
        (_gradient, ("grad_norm",)),
        (_updates, ("update_rms_muon", "update_rms_adamw")),
        (_load, ("load_max_over_mean",)),
        (_indexer, ("index_kl", "index_recall")),
        (_speed, ("tokens_per_s",)),
    ]


def _loss(axis: Any, lines: Lines) -> None:
    axis.set_title("Training loss")
    axis.set_ylabel("nats per token")
    for name, label, colour in (("ce", "next token", BLUE), ("mtp", "token after next (MTP)", ORANGE)):
        _noisy(axis, lines, name, label, colour)
    if not _has(lines, "ce"):
        _noisy(axis, lines, "loss", "total", BLUE)
    axis.legend(loc="upper right")


def _answers(axis: Any, lines: Lines) -> None:
    axis.set_title("Held-out conversations")
    axis.set_ylabel("nats per token of the assistant")
    x, y = _series(lines, "heldout_answers")
    axis.plot(x, y, color=BLUE, marker="o", markersize=3.5, clip_on=False, label=f"this model  {y[-1]:.3f}")
    axis.legend(loc="upper right")


def _heldout(axis: Any, lines: Lines, baselines: dict[str, float]) -> None:
    axis.set_title("Held-out text")
    axis.set_ylabel("bits per byte (lower is better)")
    x, y = _series(lines, "heldout_bpb")
    axis.plot(x, y, color=BLUE, marker="o", markersize=3.5, clip_on=False, label=f"this model  {y[-1]:.3f}")
    for (name, value), colour in zip(baselines.items(), (RED, PURPLE, GREEN, GREY) * 9, strict=False):
        axis.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{name}  {value:.3f}")
    axis.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)
    span = [*y, *baselines.values()]
    margin = 0.12 * ((max(span) - min(span)) or 1)
    axis.set_ylim(max(0, min(span) - margin), max(span) + margin)


def _retrieval(axis: Any, lines: Lines) -> None:
    axis.set_title("Retrieval far beyond the window")
    axis.set_ylabel("accuracy")
    x, y = _series(lines, "retrieval_accuracy")
    axis.plot(x, y, color=GREEN, marker="o", markersize=3.5, clip_on=False)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(_percent())


def _task(axis: Any, lines: Lines) -> None:
    axis.set_title("Held-out questions")
    axis.set_ylabel("accuracy")
    shown = {"task_accuracy": ("all", BLUE), "task_far": ("beyond all windows", GREEN)}
    for name, (label, colour) in (shown | {"task_worst_phase": ("of these, worst phase", ORANGE)}).items():
        x, y = _series(lines, name)
        axis.plot(x, y, color=colour, marker="o", markersize=3.5, clip_on=False, label=label)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(_percent())
    axis.legend(loc="lower right")


def _learning_rate(axis: Any, lines: Lines) -> None:
    x, y = _series(lines, "lr")
    exponent = math.floor(math.log10(max(y))) if max(y) > 0 else 0
    axis.set_title(f"Learning rate  $\\times\\,10^{{{exponent}}}$")
    axis.plot(x, y / 10.0**exponent, color=INK)
    axis.set_ylim(0, (max(y) or 1) / 10.0**exponent * 1.08)


def _gradient(axis: Any, lines: Lines) -> None:
    axis.set_title("Gradient norm")
    axis.set_ylabel("before clipping")
    _noisy(axis, lines, "grad_norm", "", PURPLE)
    if min(_series(lines, "grad_norm")[1]) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain_numbers())
        axis.yaxis.set_minor_formatter(_plain_numbers(sparse=True))


def _updates(axis: Any, lines: Lines) -> None:
    axis.set_title("Update size")
    axis.set_ylabel("RMS of the update")
    _noisy(axis, lines, "update_rms_muon", "Muon", BLUE)
    _noisy(axis, lines, "update_rms_adamw", "AdamW", ORANGE)
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right", ncols=2)


def _load(axis: Any, lines: Lines) -> None:
    axis.set_title("Expert load")
    axis.set_ylabel("busiest expert / mean", color=BLUE)
    _noisy(axis, lines, "load_max_over_mean", "", BLUE)
    axis.axhline(1, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
    axis.set_ylim(bottom=0)
    if _has(lines, "dead_experts"):
        dead = _right_axis(axis, "experts without a token", ORANGE)
        x, y = _series(lines, "dead_experts")
        dead.step(x, y, color=ORANGE, linewidth=1.3, where="post")
        dead.set_ylim(0, max(4, max(y) * 1.25))
        dead.yaxis.get_major_locator().set_params(integer=True)


def _indexer(axis: Any, lines: Lines) -> None:
    axis.set_title("Indexer")
    axis.set_ylabel("KL from dense attention (nats)", color=PURPLE)
    _noisy(axis, lines, "index_kl", "", PURPLE)
    axis.set_ylim(bottom=0)
    if _has(lines, "index_recall"):
        recall = _right_axis(axis, "attention mass recalled", GREEN)
        _noisy(recall, lines, "index_recall", "", GREEN)
        recall.set_ylim(0, 1.02)
        recall.yaxis.set_major_formatter(_percent())


def _speed(axis: Any, lines: Lines) -> None:
    axis.set_title("Speed")
    axis.set_ylabel("tokens per second")
    _noisy(axis, lines, "tokens_per_s", "", GREEN)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(_short_numbers())


def _finish(axis: Any, lines: Lines) -> None:
    """The shared horizontal axis, with the stages shaded and, where they change, named above the panel."""
    first, last = lines[0]["step"], lines[-1]["step"]
    axis.set_xlim(first, max(last, first + 1))
    axis.set_xlabel("step")
    axis.xaxis.set_major_formatter(_short_numbers())
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
    tokens = _series(lines, "tokens")[1]
    facts = [f"{lines[-1]['step']:,} steps"] + ([f"{_short(tokens[-1])} tokens"] if len(tokens) else [])
    figure.suptitle("  ·  ".join([*([title] if title else []), *facts]), x=0.008, ha="left", fontsize=12.5, color=INK)


def _noisy(axis: Any, lines: Lines, name: str, label: str, colour: str) -> None:
    """The raw values faint, their running mean over 2% of the run on top."""
    x, y = _series(lines, name)
    if not len(x):
        return
    width = max(1, len(y) // 50)
    if width > 1:
        axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
        ones = np.ones(2 * width + 1)
        y = np.convolve(y, ones, "same") / np.convolve(np.ones_like(y), ones, "same")
    axis.plot(x, y, color=colour, label=label or None)


def _right_axis(axis: Any, label: str, colour: str) -> Any:
    right = axis.twinx()
    right.set_ylabel(label, color=colour)
    right.grid(False)
    right.spines["right"].set_visible(False)
    return right


def _series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric."""
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs], float)


def _has(lines: Lines, name: str) -> bool:
    return len(_series(lines, name)[0]) > 0


def _stages(lines: Lines) -> list[tuple[str, int, int]]:
    """Name, first step and end of each run of lines with one ``stage``."""
    changes: list[tuple[str, int]] = []
    for line in lines:
        name = str(line.get("stage", changes[-1][0] if changes else ""))
        if not changes or changes[-1][0] != name:
            changes.append((name, line["step"]))
    ends = [start for _, start in changes[1:]] + [lines[-1]["step"]]
    return [(name, start, end) for (name, start), end in zip(changes, ends, strict=True)]


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _short_numbers() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: _short(value))


def _plain_numbers(sparse: bool = False) -> Any:
    """Numbers without exponents; on the minor ticks of a logarithmic axis only those that start with 2 or 5."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if not sparse or f"{value:e}"[0] in "25" else "")


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)


def _matplotlib() -> Sequence[Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing curves needs matplotlib: pip install matplotlib, or the notebooks extra of this "
            "package. The numbers themselves are in metrics.jsonl"
        ) from error
    return Figure, rc_context
