"""What can be wrong with a recipe, one sentence for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.lora import Lora
from dsv4_jax.quantization.policy import precision_policy
from train import adapted
from train.data.tasks import TaskError

if TYPE_CHECKING:
    from train.recipe import Recipe, Stage

# Where every number lies: "[" and "]" are bounds that it may have, "(" and ")" bounds that it may not. Nothing may be
# infinite. What is None is not there: it has no bounds.
RANGES = {
    "seed": "[0, 1e18]",
    "optimizer.momentum": "[0, 1)",
    "optimizer.update_rms": "(0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.adam_b1": "[0, 1)",
    "optimizer.adam_b2": "[0, 1)",
    "optimizer.adam_eps": "(0, inf)",
    "optimizer.clip_norm": "(0, inf)",
    "learning_rate.peak": "(0, inf)",
    "learning_rate.floor": "[0, inf)",
    "learning_rate.warmup_steps": "[0, inf)",
    "learning_rate.decay_start": "(0, 1)",
    "losses.mtp": "[0, inf)",
    "losses.mtp_decayed": "[0, inf)",
    "losses.balance": "[0, inf)",
    "losses.index": "[0, inf)",
    "losses.bias_speed": "[0, inf)",
    "precision.unroll": "[0, inf)",
    "lora.alpha": "(0, inf)",
    "data.fim_rate": "[0, 1]",
    "data.recall_share": "[0, 1)",
    "data.recall_pairs": "[1, inf)",
    "data.recall_distance": "[1, inf)",
    "data.task.phases": "[1, inf)",
    "data.task.far": "[0, inf)",
    "cadence.checkpoint_every": "[1, inf)",
    "cadence.keep": "[1, inf)",
    "cadence.eval_every": "[0, inf)",
    "cadence.eval_documents": "[1, inf)",
    "cadence.final_documents": "[1, inf)",
    "cadence.eval_batch_size": "[1, inf)",
    "cadence.recall_rows": "[0, inf)",
    "cadence.data_timeout": "[0, inf)",
    "stability.skipped_in_a_row": "[1, inf)",
    "stability.spike_threshold": "[0, inf)",
    "stability.spike_window": "[4, inf)",
    "stability.spike_steps": "[1, inf)",
    "stability.rollback_steps": "[1, inf)",
    "stability.anticipatory_steps": "[0, inf)",
    "stability.anticipatory_delay": "[0, inf)",
}
STAGE_RANGES = {
    "steps": "[1, inf)",
    "sequence_length": "[2, inf)",  # a token and its target
    "batch_size": "[1, inf)",
    "microbatches": "[1, inf)",
}


def range_problems(recipe: Recipe) -> Iterator[str]:
    """Numbers of the recipe, and of its stages, that lie outside of their range."""
    for name, interval in RANGES.items():
        yield from _outside(name, _value(recipe, name), interval)
    for i, stage in enumerate(recipe.stages):
        for name, interval in STAGE_RANGES.items():
            yield from _outside(f"stages.{i} ({stage.name}): {name}", getattr(stage, name), interval)


def _value(node: Any, path: str) -> Any:
    """The setting of a dotted name; None where a part of the recipe is not there."""
    for name in path.split("."):
        node = None if node is None else getattr(node, name)
    return node


def _outside(name: str, value: float | None, interval: str) -> Iterator[str]:
    if value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    if above and (value <= high if interval[-1] == "]" else value < high):
        return
    needed = f"it must lie in {interval}"
    if not abs(value) < math.inf:
        needed = "a finite number is needed"
    elif high == math.inf:
        needed = f"{'at least' if interval[0] == '[' else 'more than'} {low:g} is needed"
    yield f"{name} is {value}, {needed}"


def stage_problems(recipe: Recipe, config: DeepseekV4Config) -> list[str]:
    """Of each stage by itself."""
    return [problem for i, stage in enumerate(recipe.stages) for problem in _of_stage(i, stage, config)]


def _of_stage(index: int, stage: Stage, config: DeepseekV4Config) -> list[str]:
    where, problems = f"stages.{index} ({stage.name})", []
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


def setting_problems(recipe: Recipe, config: DeepseekV4Config) -> list[str]:
    """Of settings that do not go together, and of words that stand for numbers."""
    problems = []
    if recipe.data.format == "chat" and (recipe.data.fim_rate or recipe.data.recall_share):
        problems.append("data.format is chat: data.fim_rate and data.recall_share must be 0, they are of text")
    distance, window = recipe.data.recall_distance, config.sliding_window
    if distance < window and recipe.data.task is None:
        problems.append(f"data.recall_distance is {distance}: below the window of {window} it tests nothing")
    if recipe.lora is not None:
        problems += recipe.lora.problems() or _adapter_problems(recipe, recipe.lora, config)
        problems += [] if recipe.start_from else ["lora adapts the weights of a run or checkpoint: name it with --from"]
    try:
        precision_policy(recipe.precision.policy, config)
    except UserError as error:
        problems.append(f"precision.policy: {error}")
    return problems


def _adapter_problems(recipe: Recipe, lora: Lora, config: DeepseekV4Config) -> list[str]:
    """Matrices that are not there, or too small for the rank; stages that no adapter trains in."""
    try:
        adapted.shapes(lora, config)
    except UserError as error:
        return [str(error)]
    trained = jax.tree.leaves(adapted.facts(lora, config)["lora"])
    if not config.has_indexer or any(fact.role == "indexer" for fact in trained):
        return []
    return [
        f"stages.{i} ({stage.name}): it trains the indexers alone, and lora has no adapters on them: leave it out with "
        f"--set stages.{stage.name}=null, or add 'indexer' to lora.targets"
        for i, stage in enumerate(recipe.stages)
        if stage.kind == "indexer_warmup"
    ]
