"""The panels of a run's picture: each draws one question's answer from the lines of metrics.jsonl on one axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Lines = list[dict[str, Any]]
INK, GREY, BLUE, ORANGE = "#22262b", "#8a9099", "#2f6db5", "#d9772b"
GREEN, RED, PURPLE = "#3a8f5c", "#b5433f", "#7a5aa6"


def panels(baselines: dict[str, float]) -> list[tuple[Callable[[Any, Lines], None], tuple[str, ...]]]:
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
    if not has(lines, "ce"):
        _noisy(axis, lines, "loss", "total", BLUE)
    axis.legend(loc="upper right")


def _answers(axis: Any, lines: Lines) -> None:
    axis.set_title("Held-out conversations")
    axis.set_ylabel("nats per token of the assistant")
    x, y = series(lines, "heldout_answers")
    axis.plot(x, y, color=BLUE, marker="o", markersize=3.5, clip_on=False, label=f"this model  {y[-1]:.3f}")
    axis.legend(loc="upper right")


def _heldout(axis: Any, lines: Lines, baselines: dict[str, float]) -> None:
    axis.set_title("Held-out text")
    axis.set_ylabel("bits per byte (lower is better)")
    x, y = series(lines, "heldout_bpb")
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
    x, y = series(lines, "retrieval_accuracy")
    axis.plot(x, y, color=GREEN, marker="o", markersize=3.5, clip_on=False)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(_percent())


def _task(axis: Any, lines: Lines) -> None:
    axis.set_title("Held-out questions")
    axis.set_ylabel("accuracy")
    shown = {"task_accuracy": ("all", BLUE), "task_far": ("beyond all windows", GREEN)}
    for name, (label, colour) in (shown | {"task_worst_phase": ("of these, worst phase", ORANGE)}).items():
        x, y = series(lines, name)
        axis.plot(x, y, color=colour, marker="o", markersize=3.5, clip_on=False, label=label)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(_percent())
    axis.legend(loc="lower right")


def _learning_rate(axis: Any, lines: Lines) -> None:
    x, y = series(lines, "lr")
    exponent = math.floor(math.log10(max(y))) if max(y) > 0 else 0
    axis.set_title(f"Learning rate  $\\times\\,10^{{{exponent}}}$")
    axis.plot(x, y / 10.0**exponent, color=INK)
    axis.set_ylim(0, (max(y) or 1) / 10.0**exponent * 1.08)


def _gradient(axis: Any, lines: Lines) -> None:
    axis.set_title("Gradient norm")
    axis.set_ylabel("before clipping")
    _noisy(axis, lines, "grad_norm", "", PURPLE)
    if min(series(lines, "grad_norm")[1]) > 0:
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
    if has(lines, "dead_experts"):
        dead = _right_axis(axis, "experts without a token", ORANGE)
        x, y = series(lines, "dead_experts")
        dead.step(x, y, color=ORANGE, linewidth=1.3, where="post")
        dead.set_ylim(0, max(4, max(y) * 1.25))
        dead.yaxis.get_major_locator().set_params(integer=True)


def _indexer(axis: Any, lines: Lines) -> None:
    axis.set_title("Indexer")
    axis.set_ylabel("KL from dense attention (nats)", color=PURPLE)
    _noisy(axis, lines, "index_kl", "", PURPLE)
    axis.set_ylim(bottom=0)
    if has(lines, "index_recall"):
        recall = _right_axis(axis, "attention mass recalled", GREEN)
        _noisy(recall, lines, "index_recall", "", GREEN)
        recall.set_ylim(0, 1.02)
        recall.yaxis.set_major_formatter(_percent())


def _speed(axis: Any, lines: Lines) -> None:
    axis.set_title("Speed")
    axis.set_ylabel("tokens per second")
    _noisy(axis, lines, "tokens_per_s", "", GREEN)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(short_numbers())


def _noisy(axis: Any, lines: Lines, name: str, label: str, colour: str) -> None:
    """The raw values faint, their running mean over 2% of the run on top."""
    x, y = series(lines, name)
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


def series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric."""
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs], float)


def has(lines: Lines, name: str) -> bool:
    """Whether there is a finite value of a metric."""
    return len(series(lines, name)[0]) > 0


def short(value: float) -> str:
    """Such as 1.5M, to three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def short_numbers() -> Any:
    """Ticks written by `short`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: short(value))


def _plain_numbers(sparse: bool = False) -> Any:
    """Numbers without exponents; on the minor ticks of a logarithmic axis only those that start with 2 or 5."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if not sparse or f"{value:e}"[0] in "25" else "")


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)
