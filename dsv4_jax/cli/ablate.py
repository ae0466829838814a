"""`dsv4 ablate`: train variants of a recipe on a synthetic task, and say which mechanism did it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from dsv4_jax.errors import UserError

DESCRIPTION = """Train variants of a recipe with several seeds: without CSA, without HCA, sliding only, dense, other
top-k, other compression ratios, the article's layer plans, without random document offsets; attention and routing of
other models. Ends with a table and a picture. Repeat the same command to go on; finished runs are kept.

Examples:
  dsv4 ablate recall
  dsv4 ablate recall --list
  dsv4 ablate recall --only full no-csa no-hca sliding-only dense no-offsets --seeds 3
  dsv4 ablate recall --only full sliding-only gqa mla mla-sparse top-2
  dsv4 ablate recall --out runs/long --set stages.dense.steps=2000"""


@dataclass(frozen=True)
class Ablate:
    """Arguments of `dsv4 ablate`."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A recipe on a synthetic task: recall."""
    recipe: str | None = None
    """A recipe file instead, as of `dsv4 train`."""
    only: tuple[str, ...] = ()
    """Variants by name; all by default."""
    seeds: int = 3
    """Runs of each variant."""
    out: str | None = None
    """The folder of all runs; runs/NAME-ablation by default. A folder with this very ablation goes on."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one setting of the recipe, NAME=VALUE by dotted name; can be repeated."""
    cache: str | None = None
    """Where compiled programs are kept; the user's cache folder by default."""
    list: bool = False
    """Print the variants and stop."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments` and run."""
    asked = tyro.cli(Ablate, args=list(arguments), prog="dsv4 ablate", description=DESCRIPTION)
    if (asked.name is None) == (asked.recipe is None):
        raise UserError("name one recipe (dsv4 ablate recall) or one file (dsv4 ablate --recipe FILE)")
    if asked.seeds < 1:
        raise UserError(f"--seeds is {asked.seeds}: at least 1 is needed")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from train.ablation import variants
    from train.ablation_run import ablate
    from train.checkpointing import CheckpointError
    from train.data.manifest import DataMismatchError
    from train.loop import use_compilation_cache
    from train.recipe import find_recipe

    recipe = find_recipe(asked.name or asked.recipe or "", asked.set)
    if asked.list:
        return print("\n".join(f"{variant.name:<14} {variant.about}" for variant in variants(recipe).values()))
    use_compilation_cache(asked.cache)
    out = asked.out or f"runs/{recipe.name}-ablation"
    try:
        ablate(recipe, out, names=asked.only, seeds=asked.seeds)
    except (CheckpointError, DataMismatchError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command goes on from there; runs are in {out}") from None
