"""The data of a run: the token store of a text, or a synthetic task; and the batches of each stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from train.data.batches import RowBatches
from train.data.pipeline import BatchConfig, Rows, TrainBatches
from train.data.retrieval import RecallTask
from train.data.tasks.rows import TaskRows, TaskSource, task_batches
from train.data.tokens import TokenStore, prepare
from train.placement import Placement
from train.recipe import Recipe, RecipeError

Source = TokenStore | TaskSource


def open_source(recipe: Recipe, config: DeepseekV4Config, cache: str | Path | None) -> Source:
    """Where the rows of a recipe come from. Raises RecipeError, as `open_store`."""
    if (choice := recipe.data.task) is not None:
        return TaskSource(choice.name, choice.answers_only)
    return open_store(recipe, config, cache)


def masks_loss(recipe: Recipe) -> bool:
    """Whether batches have a "loss_mask"."""
    return recipe.data.format == "chat" or recipe.data.task is not None and recipe.data.task.answers_only


def open_store(recipe: Recipe, config: DeepseekV4Config, cache: str | Path | None) -> TokenStore:
    """The tokenised corpus of a recipe.

    Raises:
        RecipeError: when the vocabulary does not fit the model, or fill-in-the-middle.
    """
    data = recipe.data
    store = prepare(data.corpus, data.tokenizer, vocab_size=config.vocab_size, cache=cache, format=data.format)
    if store.tokenizer.vocab_size > config.vocab_size:
        raise RecipeError(
            f"the tokenizer has {store.tokenizer.vocab_size} entries, the model's vocab_size is {config.vocab_size}: "
            f"set model.vocab_size={store.tokenizer.vocab_size}, or choose another data.tokenizer"
        )
    lacking = {FIM_BEGIN, FIM_HOLE, FIM_END} - set(store.tokenizer.specials)
    if recipe.data.fim_rate and lacking:
        raise RecipeError(
            f"data.fim_rate is {recipe.data.fim_rate}, and the vocabulary has no {', '.join(sorted(lacking))}: set it "
            "to 0, or choose another data.tokenizer"
        )
    return store


def describe(store: Source) -> str:
    """One line about a tokenised corpus or a task."""
    if isinstance(store, TaskSource):
        return f"task {store.name}, the loss on {'the answers alone' if store.answers_only else 'every token'}"
    held = store.heldout_documents
    return (
        f"{store.manifest.corpus}, {len(store.tokens):,} tokens of a vocabulary of {store.tokenizer.vocab_size:,} in "
        f"{len(store.heldout):,} documents, {len(held)} of them held out ({store.document_bytes[held].sum():,} bytes)"
    )


MANY_PASSES = 10
"""Passes over a text above which a run warns: more of them mostly teach a model to repeat it."""


def describe_passes(recipe: Recipe, store: Source) -> list[str]:
    """How often a run reads its text, and a warning where that is often; nothing for a task, which never ends."""
    if isinstance(store, TaskSource):
        return []
    text = int(store.lengths[store.train_documents].sum())
    passes = recipe.tokens * (1 - recipe.data.recall_share) / text
    shown = f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"
    lines = [f"{recipe.tokens:,} tokens asked for, {text:,} in the text to train on: {shown} passes over the text"]
    if passes > MANY_PASSES:
        instead = "name a larger text with --data, or train fewer steps"
        lines += [f"warning: {shown} passes over one text are many: {instead}"]
    return lines


def recall_task(recipe: Recipe) -> RecallTask:
    """The long-range recall task of a recipe."""
    return RecallTask(n_pairs=recipe.data.recall_pairs, min_distance=recipe.data.recall_distance)


def check_recall(recipe: Recipe, store: Source) -> None:
    """Makes one recall document for each row length of a text, so that an impossible task is found at once."""
    if isinstance(store, TaskSource) or not (recipe.data.recall_share or recipe.recall_rows):
        return
    for stage in recipe.stages:
        try:
            recall_task(recipe).document(store, stage.sequence_length, (0,))
        except ValueError as error:
            raise RecipeError(f"the recall task does not fit stage {stage.name!r}: {error}") from error


SHUFFLE_ROWS = 1 << 16
"""Rows shuffled together, at most: a small corpus whole, a large one in stretches of thousands of documents.

Stretches of a large corpus are shares of what a stage reads: the next stage begins behind a stretch, and what the last
one had left would not be read in this epoch.
"""


def batch_configs(recipe: Recipe, store: TokenStore) -> list[BatchConfig]:
    """The batches of every stage; each begins in the text where the one before it ended."""
    data, configs, start = recipe.data, [], 0
    tokens = int(store.lengths[store.train_documents].sum())
    for stage in recipe.stages:
        stretch = max(1, tokens // stage.sequence_length)
        if stretch > SHUFFLE_ROWS:
            rows = stage.steps * stage.batch_size
            read = rows - int(rows * data.recall_share) + 1  # of text, at most
            stretch = math.ceil(read / math.ceil(read / SHUFFLE_ROWS))
        configs.append(
            BatchConfig(
                stage.sequence_length,
                stage.batch_size,
                seed=recipe.seed,
                packing=data.packing,
                fim_rate=data.fim_rate,
                recall=recall_task(recipe) if data.recall_share else None,
                mixture=data.recall_share,
                start=start,
                shuffle_rows=stretch,
            )
        )
        start = Rows(store, configs[-1]).offset(stage.steps * stage.batch_size)
    return configs


def task_rows(recipe: Recipe) -> list[TaskRows]:
    """The rows of every stage of a task; each begins at the number where the one before it ended."""
    assert (choice := recipe.data.task) is not None
    rows, start = [], 0
    for stage in recipe.stages:
        task = choice.training(stage)
        rows.append(TaskRows(task, stage.sequence_length, recipe.seed, start, choice.answers_only))
        start += stage.steps * stage.batch_size
    return rows


def stage_batches(
    recipe: Recipe, store: Source, index: int, done: int, host: dict[str, Any], placement: Placement
) -> RowBatches:
    """The batches of stage `index` from its step `done` on; of each the rows that this process's devices hold."""
    size = recipe.stages[index].batch_size
    own = placement.own_rows(size)
    if isinstance(store, TaskSource):
        batches: RowBatches = task_batches(store, task_rows(recipe)[index], size, own)
    else:
        batches = TrainBatches(store, batch_configs(recipe, store)[index], own)
    if done:
        batches.set_state(host["data"])
    return batches
