"""What a new run begins with: the weights of another run, or of a checkpoint folder, as float32 masters.

Nothing else is taken over: the optimizer, the schedule and the order of the data begin anew, so the weights may have
been trained under another precision policy, by another recipe or by another program.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.paths import local_path
from dsv4_jax.shapes import tree_shapes
from dsv4_jax.tokenizer import Tokenizer, load_tokenizer
from train.checkpointing import load_params
from train.recipe import Recipe, RecipeError
from train.step import StepPlan

STORAGE = ("torch_dtype", "expert_dtype", "quantization_config")  # how weights are stored says nothing of what they are


def settings_from(folder: str) -> list[str]:
    """The settings of a run that begins with the weights in `folder`: where they are, and the vocabulary they know.

    Raises:
        RecipeError: when there is no such folder.
    """
    place = local_path(folder).resolve()
    if not place.is_dir():
        raise RecipeError(f"there is no folder {place} to begin from: give a run, or a folder of safetensors")
    tokenizer = tokenizer_file(place)
    return [f"start_from={place}", *([f"data.tokenizer={tokenizer}"] if tokenizer else [])]


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer in a model's folder, or in the run's folder around its checkpoints."""
    found = (place / "tokenizer.json" for place in (folder, folder.parent))
    return next((file for file in found if file.is_file()), None)


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises RecipeError when the weights that a run begins with were trained on other token ids than it reads."""
    file = tokenizer_file(Path(recipe.start_from)) if recipe.start_from else None
    if file is not None and load_tokenizer(file).digest != tokenizer.digest:
        raise RecipeError(
            f"the weights in {recipe.start_from} know another vocabulary than data.tokenizer={recipe.data.tokenizer}: "
            f"set data.tokenizer={file}"
        )


def starting_weights(folder: str | Path, plan: StepPlan) -> tuple[Any, list[str]]:
    """The masters of a run that begins from `folder`, and what is set otherwise there: `field: there, here`.

    Args:
        folder: a run of `dsv4 train` (its newest good checkpoint), its `checkpoints`, or a folder of safetensors, plain
            or quantised.
        plan: of the new run; the arrays lie as its state does.

    Raises:
        RecipeError: when the parameters there are not those of the plan's architecture.
        UserError: when there is no model, or it is damaged.
    """
    folder, wanted, differences = Path(folder), plan.abstract_state().params, []
    wanted = wanted if plan.lora is None else wanted["base"]

    def check(found: DeepseekV4Config) -> None:
        differences[:] = require_same_parameters(found, plan.config, folder)

    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        from dsv4_jax import checkpoint

        check(config := checkpoint.read_config(folder))
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda leaf: leaf.sharding or alone, wanted)
        return checkpoint.load_params(folder, config, places, jnp.float32), differences

    def targets(raw: dict[str, Any]) -> Any:
        check(config_from_json(raw))
        return wanted

    run = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    try:
        return load_params(run, abstract_params=targets)[1], differences
    except FileNotFoundError as error:
        raise RecipeError(f"{folder} holds neither safetensors nor a training checkpoint: {error}") from error


def require_same_parameters(found: DeepseekV4Config, config: DeepseekV4Config, folder: Path) -> list[str]:
    """The settings in which two architectures with the same parameters differ.

    Raises:
        RecipeError: when the parameters differ; with the settings that make them differ.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name not in STORAGE]
    differing = [name for name in names if getattr(found, name) != getattr(config, name)]
    lines = [f"{name}: {getattr(found, name)} there, {getattr(config, name)} here" for name in differing]
    if tree_shapes(found) != tree_shapes(config):
        raise RecipeError(
            f"{folder} holds another architecture than the recipe's:\n  "
            + "\n  ".join(lines)
            + f"\nTake over its architecture with --set model.preset={folder}"
        )
    return lines
