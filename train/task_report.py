"""What a model has learned of a synthetic task: accuracy over all, by distance, by phase, beyond all windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.data.tasks.score import distance_edges, window_reach
from train.evaluate import Attention, Evaluator
from train.recipe import Stage

if TYPE_CHECKING:
    from train.loop import Evaluators, Run

MEASURES = (
    "task_accuracy", "task_loss", "task_far", "task_worst_phase", "task_by_distance", "task_by_phase", "index_recall"
)  # fmt: skip


def measure_task(
    run: Run, params: Any, evaluator: Evaluator, stage: Stage, rows: int, attention: Attention | None = None
) -> dict[str, Any]:
    """The task at the length and with the attention of a stage.

    Returns:
        "task_accuracy", "task_loss"; "task_far" of the far questions, "task_by_phase" and "task_worst_phase" of the
        same; "task_by_distance" by lower edge; in dense attention "index_recall". What no question measures is absent.
    """
    assert (choice := run.recipe.data.task) is not None
    attention = attention or ("sparse" if stage.kind == "sparse" else "dense")
    score, found = evaluator.task(params, attention, choice.heldout(stage), rows, choice.phases)
    far = far_distance(run)
    by_phase = score.by_phase(far)
    found |= {"task_accuracy": score.accuracy, "task_far": score.beyond(far)}
    found |= {"task_worst_phase": min(by_phase.values()) if by_phase else None, "task_by_phase": by_phase}
    found |= {
        "task_by_distance": score.by_distance(distance_edges(run.config.sliding_window, far, stage.sequence_length))
    }
    return {name: value for name, value in found.items() if value not in (None, {})}


def far_distance(run: Run) -> int:
    """The distance beyond which a question counts as far."""
    assert (choice := run.recipe.data.task) is not None
    return choice.far or window_reach(run.config)


def final_task(run: Run, params: Any, evaluators: Evaluators) -> dict[str, Any]:
    """The last evaluation, on four times as many rows; behind sparse attention also with dense, under "dense"."""
    assert (choice := run.recipe.data.task) is not None
    stage, rows = run.recipe.stages[-1], 4 * run.recipe.cadence.recall_rows
    evaluator = evaluators.at(stage.sequence_length)
    found = measure_task(run, params, evaluator, stage, rows)
    found["task_chance"] = choice.heldout(stage).chance.line
    found |= {"far": far_distance(run), "window_reach": window_reach(run.config)}
    if stage.kind == "sparse" and run.config.has_indexer:
        dense = measure_task(run, params, evaluator, stage, rows, "dense")
        found["index_recall"] = dense.pop("index_recall")
        found["dense"] = dense
    return found


def describe_task(run: Run, summary: dict[str, Any]) -> str:
    """The summary for a person."""
    assert (choice := run.recipe.data.task) is not None
    share, chance = summary["task_accuracy"], summary["task_chance"]
    lines = ["", f"{choice.name}: {share:.1%} of held-out questions answered, chance {chance:.1%}"]
    distances = ", ".join(f"{edge}+: {right:.0%}" for edge, right in summary["task_by_distance"].items())
    lines.append(f"by distance (window {run.config.sliding_window}): {distances}")
    if "task_far" in summary:
        reach = f"beyond {summary['far']} tokens (all windows together reach {summary['window_reach']})"
        lines.append(f"{reach}: {describe_far(summary)}")
    if "dense" in summary and "task_far" in summary["dense"]:
        lines.append(f"the same parameters with dense attention: {describe_far(summary['dense'])}")
    if "index_recall" in summary:
        lines.append(f"indexer: its choice holds {summary['index_recall']:.1%} of the dense attention's mass")
    total = sum(summary["seconds"].values())
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    lines += ["", f"time: {total:.0f} s in this session ({parts})"]
    return "\n".join([*lines, f"in {run.folder.root}: curves.png, task.png, summary.json, metrics.jsonl, checkpoints/"])


def describe_far(found: dict[str, Any]) -> str:
    """`93.1%; by phase 0: 94%, 1: 95%, ..., worst 91.0%`."""
    phases = ", ".join(f"{phase}: {right:.0%}" for phase, right in found["task_by_phase"].items())
    return f"{found['task_far']:.1%}; by phase {phases}, worst {found['task_worst_phase']:.1%}"
