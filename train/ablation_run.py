"""All runs of an ablation, one after another and each resumable; then its table and its picture."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.config_checks import nearest
from dsv4_jax.paths import local_path
from train.ablation import Variant, variants
from train.ablation_costs import costs_of
from train.ablation_plot import draw_ablation
from train.data.tasks.score import window_reach
from train.loop import train
from train.recipe import Recipe, RecipeError, recipe_to_json
from train.recipe_json import read_json
from train.run_folder import RunFolder, differences, fixed

Result = dict[str, Any]
"""Of a variant: "variant", "about", the `Costs` that it has, "runs" (the summaries of its seeds)."""


def ablate(
    recipe: Recipe, out: str | Path, *, names: Sequence[str] = (), seeds: int = 3, say: Callable[..., None] = print
) -> list[Result]:
    """Trains every variant with every seed, and writes table.md, ablation.json and ablation.png into `out`.

    All variants see the same rows of a seed. What is finished is kept: the same command goes on where it was cut off,
    and more variants or seeds can be asked for later. All first seeds come before all second ones.

    Args:
        recipe: a recipe on a synthetic task.
        out: the folder; runs lie in VARIANT/seed-N.
        names: variants; all by default.
        seeds: runs of each variant, with seeds recipe.seed, recipe.seed + 1, ...
        say: prints a line.

    Returns:
        One result a variant, in the order of the table.

    Raises:
        RecipeError, ConfigError: for unknown variants, recipes that cannot run, and a folder of other settings; before
            anything is computed or overwritten.
    """
    base = _with_far(recipe)
    chosen, root = _chosen(base, names), local_path(out)
    jobs = [(variant, seed) for seed in range(recipe.seed, recipe.seed + seeds) for variant in chosen]
    recipes = {(v.name, seed): _named(v, v.change(dataclasses.replace(base, seed=seed))) for v, seed in jobs}
    _check(base, recipes, root)
    began, done, compiled = time.perf_counter(), 0, {}
    left = [job for job in jobs if not _finished(root, *job)]
    say(f"{len(jobs)} runs in {root}: {len(jobs) - len(left)} are finished")
    for variant, seed in left:
        say(f"\n[{len(jobs) - len(left) + done + 1} of {len(jobs)}] {variant.name}, seed {seed}: {variant.about}")
        train(recipes[variant.name, seed], _folder(root, variant, seed), compiled=compiled)
        done += 1
        spent = time.perf_counter() - began
        say(f"{spent / 60:.0f} minutes so far, about {spent / done * (len(left) - done) / 60:.0f} left")
        write_report(base, _results(root, chosen, seeds, recipes), root)
    results = _results(root, chosen, seeds, recipes)
    say("\n" + write_report(base, results, root))
    return results


def write_report(recipe: Recipe, results: Sequence[Result], root: Path) -> str:
    """Writes table.md, ablation.png and results.json of the runs that are finished; returns the table."""
    text = table(results)
    (root / "table.md").write_text(text + "\n", encoding="utf-8")
    (root / "results.json").write_text(json.dumps(list(results), indent=1), encoding="utf-8")
    draw_ablation(results, recipe.model.config.sliding_window, root / "ablation.png")
    return text


def table(results: Sequence[Result]) -> str:
    """Markdown: mean over seeds, lowest to highest in brackets; the worst phase is each run's own."""
    length = results[0]["length"]
    costs = ["parameters", "FLOPs/token", "cache bytes/token", f"cache of {length} tokens"]
    rows = [["variant", "what differs", *costs, "loss", "all", "far", "worst phase", "seeds"]]
    for result in results:
        runs = result["runs"]
        costs = [f"{result[name]:,.0f}" for name in ("parameters", "flops", "cache_token", "cache_row")]
        cells = [_spread(runs, name) for name in ("task_accuracy", "task_far", "task_worst_phase")]
        loss = _spread(runs, "task_loss", ".3f")
        rows.append([result["variant"], result["about"], *costs, loss, *cells, str(len(runs))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    first = results[0]["runs"][0]
    notes = f"far: beyond {first['far']} tokens; chance {first['task_chance']:.1%}; loss: held-out nats per answer"
    notes += f"; FLOPs: of token {length}, forward; cache in BF16"
    return "\n".join([*lines, "", notes])


def _spread(runs: Sequence[dict[str, Any]], name: str, form: str = ".1%") -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return "none asked"
    mean, least, most = (format(float(value), form) for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def _chosen(recipe: Recipe, names: Sequence[str]) -> list[Variant]:
    if recipe.data.task is None:
        raise RecipeError(f"recipe {recipe.name!r} trains on a text: an ablation needs data.task")
    known = variants(recipe)
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no variant {name!r}{nearest(name, known)}: variants are {', '.join(known)}")
    return [variant for name, variant in known.items() if not names or name in names]


def _with_far(recipe: Recipe) -> Recipe:
    """Every variant counts the same questions as far: those beyond the windows of the recipe's own layers."""
    if (choice := recipe.data.task) is None:
        return recipe
    choice = dataclasses.replace(choice, far=choice.far or window_reach(recipe.model.config))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, task=choice))


def _named(variant: Variant, recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, name=f"{recipe.name} {variant.name}", about=variant.about)


def _check(base: Recipe, recipes: dict[tuple[str, int], Recipe], root: Path) -> None:
    """Every recipe can run, and the folder is new or holds this ablation; then says in it which one it holds."""
    for recipe in recipes.values():
        recipe.check()
    record, new = root / "ablation.json", recipe_to_json(base)
    if record.is_file():
        if changed := sorted(differences(fixed(read_json(record)), fixed(new))):
            raise RecipeError(f"{root} holds an ablation of another recipe:\n  " + "\n  ".join(changed))
    elif root.exists() and any(root.iterdir()):
        raise RecipeError(f"{root} holds files but no ablation.json: give another --out")
    for (name, seed), recipe in recipes.items():
        RunFolder(root / name / f"seed-{seed}").check(recipe)
    root.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(new, indent=1), encoding="utf-8")


def _folder(root: Path, variant: Variant, seed: int) -> Path:
    return root / variant.name / f"seed-{seed}"


def _finished(root: Path, variant: Variant, seed: int) -> bool:
    return (_folder(root, variant, seed) / "summary.json").is_file()


def _results(root: Path, chosen: Sequence[Variant], seeds: int, recipes: dict[tuple[str, int], Recipe]) -> list[Result]:
    """Of every variant with a finished run."""
    results = []
    for variant in chosen:
        own = [(seed, recipe) for (name, seed), recipe in recipes.items() if name == variant.name]
        finished = [seed for seed, _ in own if _finished(root, variant, seed)]
        runs = [read_json(_folder(root, variant, seed) / "summary.json") for seed in finished]
        if runs:
            facts = {"variant": variant.name, "about": variant.about, **costs_of(own[0][1])}
            results.append(facts | {"runs": runs})
    return results
