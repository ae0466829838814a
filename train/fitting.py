"""Whether a run can be spread over a mesh, for all of its stages and before anything starts; on paper too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

from jax.sharding import AbstractMesh, Mesh

from dsv4_jax.errors import UserError
from sharding.mesh import AXES, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import STRATEGIES, Strategy, default_meshes, find_strategy
from train.placement import Placement
from train.recipe import Recipe, RecipeError, Stage

FOR_INFERENCE = ("expert-tensor", "expert-data")


def training_strategy(name: str) -> Strategy:
    """A strategy by name. Raises UserError for one that is none, or for inference alone."""
    strategy = find_strategy(name)
    if name in FOR_INFERENCE:
        others = ", ".join(other for other in STRATEGIES if other not in FOR_INFERENCE)
        raise UserError(f"strategy {name!r} is for inference; a run is trained with {others}")
    return strategy


def check_stages(recipe: Recipe, placement: Placement) -> None:
    """Whether the model and the batches of all stages can be spread over the mesh.

    Raises:
        RecipeError: with every stage that cannot, its settings, and what would do.
        UserError: when the model cannot.
    """
    if (found := placement.mesh_partition) is None:
        return
    problems = [line for stage in recipe.stages for line in _of_stage(stage, found.strategy, found.mesh)]
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} does not fit the mesh:\n  " + "\n  ".join(problems))
    placement.check(0, 0)


def check_on_paper(recipe: Recipe, mesh: str | None, strategy: str | None, devices: int | None) -> str:
    """As `check_stages`, for devices that need not be here.

    Args:
        recipe: the run.
        mesh: of the command line; by default the strategy's own.
        strategy: of the command line; by default "fsdp".
        devices: how many; by default as many as the mesh has.

    Returns:
        What was checked, in words.
    """
    chosen, config = training_strategy(strategy or "fsdp"), recipe.check()
    if devices is None:
        if mesh is None or "-1" in mesh:
            return "How it lies on devices was not checked: say how many with --cpu-devices"
        devices = math.prod(int(size) for part in mesh.split(",") if (size := part.partition("=")[2]).isdigit())
    sizes = parse_mesh(mesh or default_meshes(config, chosen, devices)[0], devices)
    abstract = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    check_stages(recipe, Placement(MeshPartition(cast(Any, abstract), chosen), config, recipe.lora))
    return f"fits {devices} devices, {_named(abstract, AXES) or 'one'}, strategy {chosen.name}"


def _of_stage(stage: Stage, strategy: Strategy, mesh: Mesh) -> Iterator[str]:
    """What of a stage does not divide over the mesh."""
    where = f"stages.{stage.name}"
    over = {name: strategy.activations.get(name, ()) for name in ("batch", "seq")}
    parts = {name: math.prod(mesh.shape[axis] for axis in axes) for name, axes in over.items()}
    rows = stage.batch_size // stage.microbatches
    if rows % parts["batch"]:
        yield (
            f"{where}: batch_size {stage.batch_size} / microbatches {stage.microbatches} = {rows} rows, which "
            f"{parts['batch']} devices ({_named(mesh, over['batch'])}) cannot share; {_would_do(stage, parts['batch'])}"
        )
    if stage.sequence_length % parts["seq"]:
        yield (
            f"{where}: sequence_length {stage.sequence_length}, which {parts['seq']} devices "
            f"({_named(mesh, over['seq'])}) cannot share"
        )


def _would_do(stage: Stage, parts: int) -> str:
    """The nearest settings whose rows divide: fewer microbatches of the same batch, or else a larger batch."""
    for microbatches in range(stage.microbatches, 0, -1):
        if stage.batch_size % (microbatches * parts) == 0:
            rows = stage.batch_size // microbatches
            return f"--set stages.{stage.name}.microbatches={microbatches} gives {rows}"
    batch = math.ceil(stage.batch_size / parts) * parts
    fewer = f"--set stages.{stage.name}.microbatches=1 " if stage.microbatches > 1 else ""
    return f"{fewer}--set stages.{stage.name}.batch_size={batch} gives {batch}"


def _named(mesh: Any, axes: tuple[str, ...]) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
