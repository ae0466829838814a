"""The article's claims as an experiment: models trained with a mechanism and without it, and what is measured of both.

Claims: outputs vary less across paraphrases with manifold-constrained hyper-connections (3.3, 6); routing collapses
without its balancing bias, and an adaptive temperature evens it out (3.2); HCA layers integrate what lies far back
(2.2). Also how far adapters move a model that is tuned to something else, the generators of its mHC maps held or not.

A paraphrase on the associative-recall task: the same pairs in other orders among other filler, then the same question.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.analysis.balance import routing_balance
from dsv4_jax.analysis.consistency import consistency, next_token_log_probs
from dsv4_jax.analysis.integration import context_integration
from dsv4_jax.analysis.trace import trace
from dsv4_jax.api import Model, load
from dsv4_jax.config import HCA
from dsv4_jax.lora import Lora
from dsv4_jax.paths import local_path
from train.ablation import variants
from train.ablation_run import ablate
from train.claims_plot import draw_claims
from train.data.tasks.mqar import MultiQueryRecall
from train.loop import train
from train.recipe import LearningRate, Recipe, RecipeError
from train.recipe_json import read_json

PAIRS = ("full", "one-stream", "no-bias", "temperature")
STATEMENTS, WAYS, ROWS = 24, 4, 32
TUNED = {
    "lora-held": Lora(1, 2.0, ("attn", "shared", "experts", "router"), "held"),
    "lora-adapted": Lora(1, 2.0, ("attn", "shared", "experts", "router"), "adapted"),
}
TUNED_ABOUT = {"lora-held": "full, tuned, generators held", "lora-adapted": "full, tuned, generators adapted"}
COLUMNS = {  # name: heading, format
    "far": ("far recall", ".1%"),
    "ratio": ("wording / meaning", ".0e"),
    "used": ("experts in use", ".1%"),
    "busiest": ("busiest expert", ".2f"),
    "reach": ("HCA, half within", ".0f"),
    "row_error": ("mHC row error", ".1e"),
}
NOTES = (
    "far recall: held-out questions of the recipe's task beyond all windows, of tuned models those of the task that "
    "they were tuned to; wording / meaning: divergence of the answers to one statement told in several orders, over "
    "that of different statements (0: only meaning counts); experts in use: exp(entropy of the load) over their "
    "number; busiest expert: its load over a fair share; HCA, half within: tokens back that hold half of its "
    "compressed mass; mHC row error: largest distance of a row sum of the mixing matrices from 1. Mean over seeds "
    "(lowest to highest)."
)


def measure_claims(
    recipe: Recipe, out: str | Path, *, seeds: int = 3, say: Callable[..., None] = print
) -> dict[str, list[dict[str, float]]]:
    """Trains every pair with every seed, tunes the full models, measures all, and writes a table and a picture.

    Finished runs are kept, as by `ablate`, whose folder this is too: claims.md, claims.json and claims.png are added.

    Args:
        recipe: on the task `mqar`, with a sparse last stage.
        out: the folder.
        seeds: models of each kind.
        say: prints a line.

    Returns:
        Of every kind of model the `measured` numbers of each seed.

    Raises:
        RecipeError, ConfigError: before anything is computed or overwritten.
    """
    task, root, known = _task(recipe), local_path(out), variants(recipe)
    names = [name for name in PAIRS if name in known]
    tuned = {(name, seed): _tuned(recipe, root, name, seed) for name in TUNED for seed in _seeds(recipe, seeds)}
    for one in tuned.values():
        one.check()
    ablate(recipe, root, names=names, seeds=seeds, say=say)
    compiled: dict[Any, Any] = {}
    for (name, seed), one in tuned.items():
        if not (_folder(root, name, seed) / "summary.json").is_file():
            say(f"\n{name}, seed {seed}: {one.about}")
            train(one, _folder(root, name, seed), compiled=compiled)
    found: dict[str, list[dict[str, float]]] = {}
    for name in (*names, *TUNED):
        found[name] = [measured(_folder(root, name, seed), task, seed) for seed in _seeds(recipe, seeds)]
        say(f"measured: {name}")
    (root / "claims.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    about = {name: known[name].about for name in names} | TUNED_ABOUT
    text = table(found, about)
    (root / "claims.md").write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\nin {root}: claims.md, claims.json, {draw_claims(found, about, root / 'claims.png').name}")
    return found


def measured(run: Path, task: MultiQueryRecall, seed: int) -> dict[str, float]:
    """The numbers of one trained model; absent where it has nothing of the kind.

    "far" is its own summary's; "ratio", "within", "between" of `consistency`, and "right", the answered share of the
    statements; "used" and "busiest", mean and largest of the layers; "reach", the largest median of the HCA layers;
    "row_error" of the mixing matrices.
    """
    model, length = load(run), read_json(run / "recipe.json")["stages"][-1]["sequence_length"]
    told = [task.retold(length, seed, index, WAYS) for index in range(STATEMENTS)]
    texts = [[row.tolist() for row in rows] for rows, _ in told]
    wording = consistency(model, texts)
    log_probs = next_token_log_probs(model, [row for rows in texts for row in rows])
    right = log_probs.argmax(-1).reshape(STATEMENTS, WAYS) == np.array([[answer] for _, answer in told])
    found = {"ratio": wording.ratio, "within": float(wording.within.mean()), "between": wording.between}
    found |= {"right": float(right.mean())} | _inside(model, task, length, seed)
    summary = read_json(run / "summary.json")
    return found | ({"far": summary["task_far"]} if "task_far" in summary else {})


def _inside(model: Model, task: MultiQueryRecall, length: int, seed: int) -> dict[str, float]:
    rows = np.stack([task.row(length, seed, index, heldout=True).tokens for index in range(ROWS)])
    seen = trace(model, rows, queries=range(length - length // 4, length))
    balance = routing_balance(seen)
    found = {"used": float(balance.used.mean()), "busiest": float(balance.load.max())}
    found["row_error"] = max(float(np.max(layer.mixing.row_error)) for layer in seen.layers)
    if any(spec.attention == HCA for spec in model.config.layers):
        reach = context_integration(seen)
        found["reach"] = max(m for name, m in zip(reach.layers, reach.median, strict=True) if "HCA" in name)
    return found


def table(found: dict[str, list[dict[str, float]]], about: dict[str, str]) -> str:
    """Markdown, a row for each kind of model."""
    lines = [["model", "what differs", *(heading for heading, _ in COLUMNS.values())]]
    for name, runs in found.items():
        lines.append([name, about[name], *(_spread(runs, key, form) for key, (_, form) in COLUMNS.items())])
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*text, "", NOTES])


def _spread(runs: Sequence[dict[str, float]], key: str, form: str) -> str:
    values = [run[key] for run in runs if key in run]
    if not values:
        return "-"
    mean, least, most = (format(float(value), form) for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def _task(recipe: Recipe) -> MultiQueryRecall:
    choice = recipe.data.task
    task = choice.heldout(recipe.stages[-1]) if choice is not None else None
    if not isinstance(task, MultiQueryRecall) or recipe.stages[-1].kind != "sparse":
        raise RecipeError(
            f"recipe {recipe.name!r}: the claims are measured on the task mqar, with a last stage of sparse attention "
            "(dsv4 claims recall)"
        )
    return task


def _tuned(recipe: Recipe, root: Path, name: str, seed: int) -> Recipe:
    """Adapters on the full model of a seed, for rows with twice as many pairs, half as far apart."""
    assert (choice := recipe.data.task) is not None
    last, options = recipe.stages[-1], choice.heldout(recipe.stages[-1])
    assert isinstance(options, MultiQueryRecall)
    pairs = min(2 * options.n_pairs, options.n_keys, options.n_values)
    packed = {"n_pairs": pairs, "spacing": max(2, options.spacing // 2)}
    stage = dataclasses.replace(last, name="tune", task={**(last.task or {}), **packed})
    rate = LearningRate(recipe.learning_rate.peak / 2, recipe.learning_rate.floor, min(10, last.steps // 2), 0.6)
    about, start = TUNED_ABOUT[name], str(_folder(root, "full", seed).resolve())
    changed = dataclasses.replace(recipe, name=f"{recipe.name} {name}", about=about, stages=(stage,), seed=seed)
    return dataclasses.replace(changed, learning_rate=rate, lora=TUNED[name], start_from=start)


def _seeds(recipe: Recipe, count: int) -> range:
    return range(recipe.seed, recipe.seed + count)


def _folder(root: Path, name: str, seed: int) -> Path:
    return root / name / f"seed-{seed}"
