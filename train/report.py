"""The end of a run: what it learned against `xz -9`, a sample, the recall figure, the curves, where the time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dsv4_jax.inference.generate import generate
from dsv4_jax.inference.requests import GenerateOptions
from dsv4_jax.layer_plan import BASELINE_KINDS
from sharding.distributed import from_first, whole_on_host
from train.data.pipeline import documents_within, xz_bits_per_byte
from train.data.retrieval import RecallTask
from train.data.tasks.rows import TaskSource
from train.data.tokens import TokenStore
from train.metrics import HELDOUT, MetricsWriter, read_metrics
from train.plots import plot_curves
from train.recipe import Recipe
from train.run_data import Source, recall_task
from train.task_plots import draw_task
from train.task_report import MEASURES, describe_task, final_task

if TYPE_CHECKING:
    from train.loop import Evaluators, Run

PROMPT_TOKENS, SAMPLE_TOKENS = 48, 80
FINAL_TOKENS, FINAL_ROWS = 4 << 20, 64  # of a last evaluation, whichever is more, unless the recipe says otherwise
GATHERED_BYTES = 8 << 30  # of parameters that are brought together for the sample


def finish(run: Run, store: Source, params: Any, evaluators: Evaluators) -> dict[str, Any]:
    """Measures, draws and writes everything about the trained parameters; returns the summary."""
    summary: dict[str, Any] = {"steps": run.recipe.steps, "tokens": run.recipe.tokens}
    with run.phase("evaluation"):
        run.say(f"evaluating on held-out {'rows' if isinstance(store, TaskSource) else 'text'} ...")
        if isinstance(store, TaskSource):
            summary |= final_task(run, params, evaluators)
        else:
            summary |= measure(run, store, params, evaluators)
    with run.phase("sample and pictures"):
        if not isinstance(store, TaskSource):
            summary["sample"] = sample_for_all(run, store, run.plan.masters(params))
        if jax.process_index() == 0:
            _log(run, summary)
            _draw(run, summary)
    summary["seconds"] = {name: round(seconds, 1) for name, seconds in run.seconds.items()}
    run.folder.write_json("summary.json", summary)
    run.say(describe_task(run, summary) if isinstance(store, TaskSource) else describe(run, summary))
    return summary


def measure(run: Run, store: TokenStore, params: Any, evaluators: Evaluators) -> dict[str, Any]:
    """Bits per byte beside those of `xz -9`, the indexer's recall, recall beyond the window by distance and phase.

    "heldout_documents" is how many documents these are of, "heldout_of" how many there are.
    """
    recipe, last = run.recipe, run.recipe.stages[-1]
    attention = "sparse" if last.kind == "sparse" else "dense"
    documents, evaluator = final_documents(recipe, store), evaluators.at(last.sequence_length)
    found: dict[str, Any] = evaluator.heldout(params, attention, documents)
    found |= {"heldout_documents": documents, "heldout_of": len(store.heldout_documents)}
    if store.answers is None:
        found["xz_bpb"] = from_first(lambda: xz_bits_per_byte(store.heldout_bytes(documents)))
    if attention == "sparse" and run.config.has_indexer:
        found |= evaluator.index_recall(params, recipe.cadence.eval_documents)
    if recipe.recall_rows:
        task = recall_task(recipe)
        score = evaluator.recall(params, attention, task, 4 * recipe.recall_rows)
        found |= {"retrieval_accuracy": score.accuracy, "retrieval_chance": task.chance(store.tokenizer)["shown"]}
        found["retrieval_by_distance"] = score.by_distance(_edges(task, last.sequence_length))
        found["retrieval_by_phase"] = score.by_phase()
    return found


def final_documents(recipe: Recipe, store: TokenStore) -> int:
    """How many held-out documents the last evaluation scores: it must not grow with the corpus."""
    length, chosen = recipe.stages[-1].sequence_length, recipe.cadence.final_documents
    if chosen is None:
        chosen = documents_within(store, length, max(FINAL_TOKENS // length, FINAL_ROWS))
    return min(chosen, len(store.heldout_documents))


def sample_for_all(run: Run, store: TokenStore, params: Any) -> dict[str, str]:
    """`heldout_sample` in words; of several processes the first one makes it, from the whole parameters.

    Empty when these are too large to be brought together on every host (`dsv4 generate` makes one at any time), and for
    layers that keep no cache.
    """
    if set(run.config.layer_types) & set(BASELINE_KINDS):
        return {}
    if jax.process_count() > 1:
        if sum(x.nbytes for x in jax.tree.leaves(params)) > GATHERED_BYTES:
            return {}
        params = whole_on_host(params)
    prompt, continuation = from_first(lambda: heldout_sample(run, store, params))
    return {"prompt": prompt, "continuation": continuation}


def heldout_sample(run: Run, store: TokenStore, params: Any) -> tuple[str, str]:
    """The beginning of a held-out document, and how the model goes on, as text."""
    document = store.document(int(store.heldout_documents[0]))[:PROMPT_TOKENS]
    room = min(SAMPLE_TOKENS, run.config.max_position_embeddings - len(document))
    options = GenerateOptions(room, temperature=0.8, top_p=0.95, seed=run.recipe.seed % 2**32)
    [[found]] = generate(run.config, params, [document.astype(np.int32)], options, tokenizer=store.tokenizer)
    return store.tokenizer.decode(document[1:].tolist()), found.text


def describe(run: Run, summary: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = ["", measured_line(summary)]
    if "index_recall" in summary:
        lines.append(f"indexer: its choice holds {summary['index_recall']:.1%} of the dense attention's mass")
    if "retrieval_accuracy" in summary:
        far = ", ".join(f"{distance}+: {right:.0%}" for distance, right in summary["retrieval_by_distance"].items())
        lines.append(
            f"recall of names stated at least {run.recipe.data.recall_distance} tokens before (window "
            f"{run.config.sliding_window}): {summary['retrieval_accuracy']:.1%}, chance "
            f"{summary['retrieval_chance']:.1%}; by distance {far}"
        )
    if summary["sample"]:
        prompt, continuation = summary["sample"].values()
        lines += ["", "a held-out beginning | and how the model goes on:", f"{prompt} | {continuation}"]
    total = sum(summary["seconds"].values())
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    lines += ["", f"time: {total:.0f} s in this session ({parts})"]
    lines.append(f"in {run.folder.root}: curves.png, retrieval.png, summary.json, metrics.jsonl, checkpoints/")
    return "\n".join([*lines, f"go on with: dsv4 generate {run.folder.root} --prompt 'def main():'"])


def measured_line(summary: dict[str, Any]) -> str:
    """What it learned, of how much held-out text."""
    scored, there = summary["heldout_documents"], summary["heldout_of"]
    which = "" if scored == there else f" (the first {scored:,} of {there:,} documents)"
    if "heldout_answers" in summary:
        return f"held-out conversations{which}: {summary['heldout_answers']:.3f} nats per token of the assistant"
    bpb, xz = summary["heldout_bpb"], summary["xz_bpb"]
    better = f"{'the model is better' if bpb < xz else 'xz is better'} by {abs(1 - bpb / xz):.0%}"
    return f"held-out text{which}: {bpb:.3f} bits per byte; xz -9 on the same text: {xz:.3f} ({better})"


def _edges(task: RecallTask, length: int) -> list[int]:
    """Lower edges of distance bins, doubling from the task's least distance on."""
    edges = [task.min_distance]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return edges


def _log(run: Run, summary: dict[str, Any]) -> None:
    """The last evaluation as a line of the log, once."""
    names = (*HELDOUT, "index_recall", "retrieval_accuracy", *MEASURES)
    found = {name: summary[name] for name in names if name in summary}
    lines = read_metrics(run.folder.metrics)
    if not any(line["step"] == run.recipe.steps and set(HELDOUT) & set(line) for line in lines):
        with MetricsWriter(run.folder.root, resume_step=run.recipe.steps) as writer:
            writer.write(run.recipe.steps, found)


def _draw(run: Run, summary: dict[str, Any]) -> None:
    root, baselines = run.folder.root, {"xz -9": summary["xz_bpb"]} if "xz_bpb" in summary else {}
    plot_curves(root / "metrics.jsonl", root / "curves.png", baselines=baselines, title=run.recipe.name)
    if "retrieval_by_distance" in summary:
        draw_recall(summary, run.config.sliding_window, root / "retrieval.png")
    if "task_accuracy" in summary:
        draw_task(summary, run.config.sliding_window, root / "task.png")


def draw_recall(summary: dict[str, Any], window: int, path: Any) -> None:
    """Accuracy by distance as bars, with the chance line and the window named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    bars = summary["retrieval_by_distance"]
    drawn = axis.bar([f"{distance}+" for distance in bars], list(bars.values()), color="#3a8f5c", width=0.6)
    axis.bar_label(drawn, fmt=lambda value: f"{value:.0%}")
    chance = summary["retrieval_chance"]
    axis.axhline(chance, color="#b5433f", linestyle="--", label=f"guessing among the values shown  {chance:.0%}")
    axis.set(xlabel=f"tokens since the pair was stated (window: {window})", ylabel="accuracy", ylim=(0, 1.08))
    axis.set_title("Recall beyond the window", loc="left", fontweight="bold", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=160)
