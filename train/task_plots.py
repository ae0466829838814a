"""Pictures of a synthetic task: accuracy by distance, and by phase with the worst beside the mean."""

from __future__ import annotations

from typing import Any

from train.plot_panels import BLUE, GREEN, GREY, ORANGE, RED


def draw_task(summary: dict[str, Any], window: int, path: Any) -> None:
    """Two panels from a run's summary: bars by distance, and by phase of the far questions, with the chance line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, summary["task_by_distance"], summary["task_chance"], "{}+")
    left.set_xlabel(f"distance in tokens (window {window}, all windows together {summary['window_reach']})")
    left.set_title("By distance", loc="left", fontweight="bold", fontsize=11)
    if phases := summary.get("task_by_phase"):
        _bars(right, phases, summary["task_chance"], "{}")
        right.axhline(summary["task_far"], color=BLUE, linewidth=1.2, label=f"mean  {summary['task_far']:.0%}")
        worst = summary["task_worst_phase"]
        right.axhline(worst, color=ORANGE, linewidth=1.2, linestyle=":", label=f"worst  {worst:.0%}")
        right.set_xlabel("place of the needle modulo the compression ratio")
        right.set_title(f"Beyond {summary['far']} tokens, by phase", loc="left", fontweight="bold", fontsize=11)
    else:
        right.remove()
    for axis in figure.axes:
        axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.savefig(path, dpi=160)


def _bars(axis: Any, values: dict[int, float], chance: float, form: str) -> None:
    from matplotlib.ticker import PercentFormatter

    drawn = axis.bar(range(len(values)), list(values.values()), color=GREEN, width=0.6)
    axis.set_xticks(range(len(values)), [form.format(name) for name in values])
    axis.bar_label(drawn, fmt=lambda value: f"{value:.0%}", fontsize=8.5)
    axis.axhline(chance, color=RED, linestyle="--", linewidth=1.2, label=f"chance  {chance:.0%}")
    axis.set(ylabel="accuracy", ylim=(0, 1.1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.tick_params(colors=GREY, labelcolor="black")
