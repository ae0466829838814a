"""The text of a run: its token store, and the batches of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from train.data.pipeline import BatchConfig, Rows, TrainBatches
from train.data.retrieval import RecallTask
from train.data.tokens import TokenStore, prepare
from train.placement import Placement
from train.recipe import Recipe, RecipeError


def open_store(recipe: Recipe, config: DeepseekV4Config, cache: str | Path | None) -> TokenStore:
    """The tokenised corpus of a recipe.

    Raises:
        RecipeError: when the vocabulary does not fit the model, or fill-in-the-middle.
    """
    store = prepare(recipe.data.corpus, recipe.data.tokenizer, vocab_size=config.vocab_size, cache=cache)
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


def describe(store: TokenStore) -> str:
    """One line about a tokenised corpus."""
    held = store.heldout_documents
    return (
        f"{store.manifest.corpus}, {len(store.tokens):,} tokens of a vocabulary of {store.tokenizer.vocab_size:,} in "
        f"{len(store.heldout):,} documents, {len(held)} of them held out ({store.document_bytes[held].sum():,} bytes)"
    )


def recall_task(recipe: Recipe) -> RecallTask:
    """The long-range recall task of a recipe."""
    return RecallTask(n_pairs=recipe.data.recall_pairs, min_distance=recipe.data.recall_distance)


def check_recall(recipe: Recipe, store: TokenStore) -> None:
    """Makes one recall document for each row length, so that an impossible task is found at once."""
    if not (recipe.data.recall_share or recipe.cadence.recall_rows):
        return
    for stage in recipe.stages:
        try:
            recall_task(recipe).document(store, stage.sequence_length, (0,))
        except ValueError as error:
            raise RecipeError(f"the recall task does not fit stage {stage.name!r}: {error}") from error


SHUFFLE_ROWS = 1 << 16
"""Rows shuffled together, at most: a small corpus whole, a large one in stretches of thousands of documents."""


def batch_configs(recipe: Recipe, store: TokenStore) -> list[BatchConfig]:
    """The batches of every stage; each begins in the text where the one before it ended."""
    data, configs, start = recipe.data, [], 0
    tokens = int(store.lengths[store.train_documents].sum())
    for stage in recipe.stages:
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
                shuffle_rows=min(SHUFFLE_ROWS, max(1, tokens // stage.sequence_length)),
            )
        )
        start = Rows(store, configs[-1]).offset(stage.steps * stage.batch_size)
    return configs


def stage_batches(
    recipe: Recipe, store: TokenStore, index: int, done: int, host: dict[str, Any], placement: Placement
) -> TrainBatches:
    """The batches of stage `index` from its step `done` on; of each the rows that this process's devices hold."""
    config = batch_configs(recipe, store)[index]
    batches = TrainBatches(store, config, *placement.part(config.batch_size))
    if done:
        batches.set_state(host["data"])
    return batches
