"""A whole training run as data: model, data, stages, optimizer, losses, precision and how often to look and save."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optax

from dsv4_jax.config import ConfigError, DeepseekV4Config
from dsv4_jax.config_checks import nearest
from dsv4_jax.errors import UserError
from dsv4_jax.lora import Lora
from train.losses import LossWeights
from train.optimizer import OptimizerConfig
from train.recipe_checks import range_problems, setting_problems, stage_problems, task_problems
from train.recipe_json import read_json, recipe_from_json, recipe_to_json, set_values
from train.recipe_parts import Cadence, DataChoice, LearningRate, ModelChoice, Stage, TaskChoice
from train.schedule import warmup_constant_cosine
from train.stability import Stability
from train.step import Precision

__all__ = [
    "Cadence", "DataChoice", "LearningRate", "ModelChoice", "Recipe", "RecipeError", "Stage", "TaskChoice",
    "find_recipe", "recipe_from_json", "recipe_to_json", "set_values",
]  # fmt: skip

RECIPES = ("nano", "recall", "mini", "small", "flash", "pro")


class RecipeError(UserError):
    """A recipe that cannot be run; the message names the setting and what would be right."""


@dataclass(frozen=True)
class Recipe:
    """A run. `check` says what is wrong with it before anything long starts.

    Attributes:
        name: also the default run folder, `runs/NAME`.
        about: expected time and result.
        model: architecture.
        data: text.
        stages: in order.
        optimizer: numbers of Muon and AdamW.
        learning_rate: the schedule.
        losses: weights of the losses.
        precision: compute dtype, rematerialisation, rounding to FP8 and FP4.
        start_from: a run or a folder of safetensors whose weights the masters begin with (`train.starting`); fresh ones
            by default.
        lora: adapters that train in place of the parameters, on the weights of `start_from`.
        cadence: checkpoints and evaluations.
        stability: what to do about loss spikes and steps that are not finite.
        seed: of parameters and data.
    """

    name: str
    about: str
    model: ModelChoice
    data: DataChoice
    stages: tuple[Stage, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    learning_rate: LearningRate = LearningRate()
    losses: LossWeights = LossWeights()
    precision: Precision = Precision()
    start_from: str | None = None
    lora: Lora | None = None
    cadence: Cadence = Cadence()
    stability: Stability = Stability()
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def recall_rows(self) -> int:
        """Recall documents of an evaluation; there are none of conversations."""
        return self.cadence.recall_rows if self.data.format == "text" else 0

    @property
    def decay_start(self) -> int:
        """The step at which the cosine begins."""
        return round(self.learning_rate.decay_start * self.steps)

    def schedule(self) -> optax.Schedule:
        """Learning rate by step. Raises ValueError when its phases overlap."""
        rate = self.learning_rate
        return warmup_constant_cosine(rate.peak, rate.floor, rate.warmup_steps, self.decay_start, self.steps)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage that does step `step`, counted from 0; its first step)."""
        first = 0
        for index, stage in enumerate(self.stages):
            if step < first + stage.steps:
                return index, first
            first += stage.steps
        raise ValueError(f"the run has {self.steps} steps; there is no step {step}")

    def check(self) -> DeepseekV4Config:
        """The model's configuration, if everything fits together.

        Raises:
            RecipeError, ConfigError: with every setting that is wrong.
        """
        config = self.model.config
        problems = [*range_problems(self), *stage_problems(self, config)]
        problems += [] if self.stages else ["stages is empty: a run needs at least one"]
        names = [stage.name for stage in self.stages]
        problems += [f"two stages are called {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
        problems += setting_problems(self, config) + task_problems(self, config)
        if not problems:
            try:
                self.schedule()
            except ValueError as error:
                problems.append(f"learning_rate: {error}")
        if problems:
            raise RecipeError(f"recipe {self.name!r} cannot run:\n  " + "\n  ".join(problems))
        return config


def find_recipe(source: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe called `source` or in the file `source`, with `settings` (`"stages.0.steps=100"`) applied.

    A file is a .json, whole or with a `"base"` recipe that it changes, or a .py that defines `RECIPE`.

    Raises:
        RecipeError, FileNotFoundError: unknown name, file or setting, with the nearest known one.
    """
    try:
        recipe = _found(str(source))
        return set_values(recipe, settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _found(source: str) -> Recipe:
    if source in RECIPES:
        return importlib.import_module(f"train.recipes.{source}").RECIPE
    if not source.endswith((".json", ".py")):
        raise RecipeError(
            f"there is no recipe {source!r}{nearest(source, RECIPES)}: recipes are {', '.join(RECIPES)}, "
            "or a .json or .py file with --recipe"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no recipe file {source}")
    if source.endswith(".py"):
        recipe = runpy.run_path(source).get("RECIPE")
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"{source} does not define RECIPE = Recipe(...)")
        return recipe
    data = read_json(Path(source))
    base = data.pop("base", None)
    return recipe_from_json(Recipe, data, base=None if base is None else _found(base))
