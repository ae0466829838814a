"""`dsv4 train`: run a recipe, or go on with one that was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from dsv4_jax.errors import UserError
from sharding.processes import Processes

if TYPE_CHECKING:
    from train.recipe import Recipe

DESCRIPTION = """Train a model by a recipe. Repeat the same command to resume an interrupted run.

Examples:
  dsv4 train nano
  dsv4 train nano --data path/to/texts --out runs/mine
  dsv4 train mini --data hf:roneneldan/TinyStories
  dsv4 train nano --set learning_rate.peak=2e-3 --set stages.sparse.steps=200
  dsv4 train --recipe my-recipe.json
  dsv4 train nano --from runs/nano --out runs/v4 --set precision.policy=v4
  dsv4 train mini --strategy expert-fsdp --mesh expert=4,fsdp=2
  dsv4 launch -n 2 -- train nano
  dsv4 train mini --show

Several processes, on one machine or many, are one job: start the same command in each (docs/pods.md)."""


@dataclass(frozen=True)
class Train:
    """Arguments of `dsv4 train`."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A recipe: nano, recall, mini, small, flash, pro."""
    recipe: str | None = None
    """A recipe file instead: .json (whole, or with "base" and what differs from it), or .py with RECIPE."""
    out: str | None = None
    """The run folder; runs/NAME by default. A folder with this very run is resumed."""
    data: str | None = None
    """The text: python, prose, or a file, folder or glob (.txt .md .py .jsonl .parquet, a saved Hugging Face set), or
    hf:NAME, hf:NAME@CONFIGURATION:SPLIT for a dataset of the hub with a field "text"."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Begin with the weights and the tokenizer of this run or folder of safetensors; optimizer, schedule and order of
    the data begin anew. It must have the recipe's architecture (or --set model.preset=FOLDER)."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one setting, NAME=VALUE by dotted name; can be repeated. Stages go by number or name."""
    cache: str | None = None
    """Where token files and compiled programs are kept; the user's cache folder by default."""
    mesh: str | None = None
    """Devices by axis, as in "data=2,fsdp=4"; -1 stands for the rest. By default all devices on the strategy's own
    axis, on that of experts as many as divide them."""
    strategy: str | None = None
    """How work and weights lie on the mesh: data, fsdp, expert-fsdp, long-context. fsdp on several devices."""
    show: bool = False
    """Print the resolved recipe as JSON, check it, and stop; with --mesh or --strategy also how it lies on devices, of
    which --cpu-devices says how many there will be."""
    processes: tyro.conf.OmitArgPrefixes[Processes] = Processes()
    """The job that this process belongs to."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments` and train."""
    asked = tyro.cli(Train, args=list(arguments), prog="dsv4 train", description=DESCRIPTION)
    if (asked.name is None) == (asked.recipe is None):
        raise UserError("name one recipe (dsv4 train nano) or one file (dsv4 train --recipe FILE)")
    from train.recipe import find_recipe
    from train.starting import settings_from

    settings = settings_from(asked.start_from) if asked.start_from else []
    settings += [*asked.set, *([f"data.corpus={asked.data}"] if asked.data else [])]
    recipe = find_recipe(asked.name or asked.recipe or "", settings)
    if asked.show:
        return show(asked, recipe)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from sharding.distributed import job

    with job(asked.processes, "train"):
        run(asked, recipe)


def run(asked: Train, recipe: Recipe) -> None:
    """Train, in this process or as one of several."""
    from train.checkpointing import CheckpointError
    from train.fitting import training_strategy
    from train.loop import train, use_compilation_cache
    from train.placement import place

    if asked.strategy:
        training_strategy(asked.strategy)
    use_compilation_cache(asked.cache)
    out = asked.out or f"runs/{recipe.name}"
    try:
        train(recipe, out, cache=asked.cache, partition=place(asked.mesh, asked.strategy, recipe.check()))
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(left_in(out)) from None


def left_in(out: str) -> str:
    """What a run that ends early has saved in its folder `out`."""
    from train.checkpointing import Checkpoints
    from train.run_folder import RunFolder

    steps = Checkpoints(RunFolder(out).checkpoints).steps
    return f"The same command goes on from step {steps[-1]:,} in {out}" if steps else "Nothing was saved yet"


def show(asked: Train, recipe: Recipe) -> None:
    """Print the recipe with every setting, checked."""
    from train.fitting import check_on_paper
    from train.recipe import recipe_to_json

    recipe.check()
    devices, placed = asked.processes.cpu_devices, ""
    if asked.mesh or asked.strategy or devices:
        placed = check_on_paper(recipe, asked.mesh, asked.strategy, devices)
    print(json.dumps(recipe_to_json(recipe), indent=2))
    print(f"{recipe.steps:,} steps, {recipe.tokens:,} tokens")
    if placed:
        print(placed)
