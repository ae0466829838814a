"""`dsv4 claims`: train models with a mechanism and without it, and measure what the article claims of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dsv4_jax.errors import UserError

DESCRIPTION = """What the article claims of mHC, of the router's bias, of an adaptive routing temperature and of HCA,
measured on models that are trained with each and without it; and how far adapters move a model, with the generators of
its mHC maps held or adapted. Ends with a table and a picture. Repeat the same command to go on; finished runs are kept.

Examples:
  dsv4 claims
  dsv4 claims recall --seeds 1
  dsv4 claims recall --out runs/wider --set model.hidden_size=128"""


@dataclass(frozen=True)
class Claims:
    """Arguments of `dsv4 claims`."""

    name: Annotated[str, tyro.conf.Positional] = "recall"
    """A recipe on the task mqar, or a recipe file, as of `dsv4 train`."""
    seeds: int = 3
    """Models of each kind."""
    out: str | None = None
    """The folder of all runs; runs/NAME-claims by default. A folder with these very runs goes on."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one setting of the recipe, NAME=VALUE by dotted name; can be repeated."""
    cache: str | None = None
    """Where compiled programs are kept; the user's cache folder by default."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments` and run."""
    asked = tyro.cli(Claims, args=list(arguments), prog="dsv4 claims", description=DESCRIPTION)
    if asked.seeds < 1:
        raise UserError(f"--seeds is {asked.seeds}: at least 1 is needed")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from train.checkpointing import CheckpointError
    from train.claims import measure_claims
    from train.data.manifest import DataMismatchError
    from train.loop import use_compilation_cache
    from train.recipe import find_recipe

    recipe = find_recipe(asked.name, asked.set)
    use_compilation_cache(asked.cache)
    out = asked.out or f"runs/{recipe.name}-claims"
    try:
        measure_claims(recipe, out, seeds=asked.seeds)
    except (CheckpointError, DataMismatchError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command goes on from there; runs are in {out}") from None
