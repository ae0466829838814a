"""What can be wrong with a recipe, one sentence for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.lora import Lora
from dsv4_jax.quantization.policy import precision_policy
from train import adapted
from train.data.tasks import TaskError

if TYPE_CHECKING:
    from train.recipe import Recipe, Stage


def stage_problems(recipe: Recipe, config: DeepseekV4Config) -> list[str]:
    """Of each stage by itself."""
    return [problem for i, stage in enumerate(recipe.stages) for problem in _of_stage(i, stage, config)]


def _of_stage(index: int, stage: Stage, config: DeepseekV4Config) -> list[str]:
    where, problems = f"stages.{index} ({stage.name})", []
    for name in ("steps", "sequence_length", "batch_size", "microbatches"):
        if getattr(stage, name) < 1:
            problems.append(f"{where}: {name} is {getattr(stage, name)}, at least 1 is needed")
    if stage.microbatches > 0 and stage.batch_size % stage.microbatches:
        problems.append(f"{where}: microbatches {stage.microbatches} must divide batch_size {stage.batch_size}")
    if stage.sequence_length > config.max_position_embeddings:
        longest = config.max_position_embeddings
        problems.append(f"{where}: sequence_length {stage.sequence_length} exceeds max_position_embeddings {longest}")
    if stage.kind == "indexer_warmup" and not config.has_indexer:
        problems.append(f"{where}: the model has no CSA layer (nor mla_sparse), so there is no indexer to warm up")
    return problems


def task_problems(recipe: Recipe, config: DeepseekV4Config) -> list[str]:
    """Tasks that cannot be made, do not fit their rows, or need more words than the model has."""
    choice = recipe.data.task
    if choice is None:
        given = [i for i, stage in enumerate(recipe.stages) if stage.task]
        return [f"stages.{i}.task is set, but data.task names no task" for i in given]
    problems = [] if recipe.cadence.recall_rows else ["cadence.recall_rows is 0: a task needs rows to be evaluated on"]
    for index, stage in enumerate(recipe.stages):
        try:
            for task in (choice.training(stage), choice.heldout(stage)):
                task.check_length(stage.sequence_length)
                if task.vocab_size > config.vocab_size:
                    raise TaskError(f"needs {task.vocab_size} ids, model.vocab_size is {config.vocab_size}")
        except TaskError as error:
            problems.append(f"stages.{index} ({stage.name}): task {choice.name!r}: {error}")
    return problems


def number_problems(recipe: Recipe) -> list[str]:
    """Of numbers, and of words that stand for numbers."""
    problems = []
    if not 0 < recipe.learning_rate.decay_start < 1:
        problems.append(f"learning_rate.decay_start is a share of the run, not {recipe.learning_rate.decay_start}")
    if not 0 <= recipe.data.fim_rate <= 1:
        problems.append(f"data.fim_rate is {recipe.data.fim_rate}; it must lie in [0, 1]")
    if not 0 <= recipe.data.recall_share < 1:
        problems.append(f"data.recall_share is {recipe.data.recall_share}; it must lie in [0, 1)")
    if recipe.data.format == "chat" and (recipe.data.fim_rate or recipe.data.recall_share):
        problems.append("data.format is chat: data.fim_rate and data.recall_share must be 0, they are of text")
    distance, window = recipe.data.recall_distance, recipe.model.config.sliding_window
    if distance < window and recipe.data.task is None:
        problems.append(f"data.recall_distance is {distance}: below the window of {window} it tests nothing")
    if recipe.lora is not None:
        problems += recipe.lora.problems() or _adapter_problems(recipe.lora, recipe.model.config)
        problems += [] if recipe.start_from else ["lora adapts the weights of a run or checkpoint: name it with --from"]
    if recipe.cadence.checkpoint_every < 1 or recipe.cadence.keep < 1:
        problems.append("cadence.checkpoint_every and cadence.keep must be at least 1")
    try:
        precision_policy(recipe.precision.policy, recipe.model.config)
    except UserError as error:
        problems.append(f"precision.policy: {error}")
    return problems + recipe.stability.problems()


def _adapter_problems(lora: Lora, config: DeepseekV4Config) -> list[str]:
    """Matrices that are not there, or too small for the rank."""
    try:
        adapted.shapes(lora, config)
    except UserError as error:
        return [str(error)]
    return []
