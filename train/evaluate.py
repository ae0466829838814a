"""What a model has learned: bits per byte of held-out text, recall far beyond the window, mass found by the indexer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.partition import ALONE, Partition
from sharding.distributed import one_at_a_time
from train.data.batches import Batch, filled
from train.data.pipeline import bits_per_byte, heldout_batches
from train.data.retrieval import RecallScore, RecallTask, recall_batches
from train.data.tasks import Task
from train.data.tasks.rows import TaskSource, evaluation_batches
from train.data.tasks.score import TaskScore
from train.data.tokens import TokenStore
from train.losses import LOGIT_ELEMENTS, index_losses, shifted_targets
from train.placement import STEP_READS, Placement

Attention = Literal["dense", "sparse"]
Scores = dict[str, jax.Array]


class Evaluator:
    """Scores parameters on held-out text; compiles once for each kind of attention.

    Args:
        config: the architecture.
        store: the tokenised corpus, with its held-out documents; or a task, of which there is no text.
        seq_len: tokens of a row.
        batch_size: rows of a batch, at least: as many as devices can share evenly (`Placement.full_batch`).
        forward: `model.forward`, possibly with dtype and policy filled in.
        placement: where parameters and batches lie; every process scores every batch.
        rounded: parameters as they are computed with, if the policy rounds them (`StepPlan.rounded`).
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        store: TokenStore | TaskSource,
        seq_len: int,
        batch_size: int,
        forward: Callable[..., model.Output] = model.forward,
        placement: Placement | None = None,
        rounded: Callable[[Any], Any] = lambda params: params,
    ):
        """See the class."""
        self.config, self.store, self.seq_len = config, store, seq_len
        self.placement = placement or Placement(ALONE, config)
        self.batch_size = self.placement.full_batch(batch_size)
        whole: dict[str, Any] = {} if self.placement.whole is None else {"out_shardings": self.placement.whole}
        self._scores = {mode: jax.jit(partial(self._placed_scores, mode), **whole) for mode in ("dense", "sparse")}
        self._forward, self._rounded = forward, rounded

    def heldout(self, params: Any, attention: Attention, documents: int | None = None) -> dict[str, float]:
        """Bits per byte of the (first `documents`) held-out documents, "heldout_bpb"; dense also "index_recall".

        Of conversations it is "heldout_answers" instead, nats per token that the assistant wrote. Recall is the share
        of the dense attention's mass on compressed entries that the indexer's choice would hold.
        """
        assert isinstance(self.store, TokenStore)
        batches = heldout_batches(self.store, self.seq_len, self.batch_size, documents=documents)
        results = [self._run(params, attention, batch) for batch in batches]
        nats = sum(float(result["nats"]) for result in results)
        if self.store.answers is None:
            found = {"heldout_bpb": bits_per_byte(nats, self.store.heldout_size(documents))}
        else:
            found = {"heldout_answers": nats / max(sum(float(result["scored"]) for result in results), 1.0)}
        return found | _index_recall(results)

    def index_recall(self, params: Any, documents: int | None = None) -> dict[str, float]:
        """Only "index_recall": for models that attend sparsely, whose recall is of the dense attention's mass too."""
        found = self.heldout(params, "dense", documents)
        return {name: value for name, value in found.items() if name == "index_recall"}

    def recall(self, params: Any, attention: Attention, task: RecallTask, rows: int) -> RecallScore:
        """The long-range recall task on `rows` documents."""
        assert isinstance(self.store, TokenStore)
        score = RecallScore()
        for batch in recall_batches(self.store, task, self.seq_len, self.batch_size, rows):
            score.add(batch, np.asarray(self._run(params, attention, batch)["predicted"]))
        return score

    def task(
        self, params: Any, attention: Attention, task: Task, rows: int, period: int
    ) -> tuple[TaskScore, dict[str, float]]:
        """A synthetic task on `rows` held-out rows; `period` is that of the phases.

        Also "task_loss", nats per answer, and dense "index_recall".
        """
        score, results = TaskScore(period), []
        for batch in evaluation_batches(task, self.seq_len, self.batch_size, rows):
            asked = batch["answers"].astype(np.int32)
            results.append(self._run(params, attention, batch | {"loss_mask": asked}))
            score.add(batch, np.asarray(results[-1]["predicted"]))
        nats, scored = (sum(float(result[name]) for result in results) for name in ("nats", "scored"))
        return score, _index_recall(results) | {"task_loss": nats / max(scored, 1.0)}

    def _run(self, params: Any, attention: Attention, batch: Batch) -> Scores:
        read = filled({name: batch[name] for name in STEP_READS if name in batch}, self.batch_size)
        return one_at_a_time(self._scores[attention](params, read))

    def _placed_scores(self, attention: Attention, params: Any, batch: dict[str, jax.Array]) -> Scores:
        params = self.placement.computing(self._rounded(params))
        return scores(self.config, self._forward, attention, params, batch, self.placement.partition)


def _index_recall(results: Sequence[Scores]) -> dict[str, float]:
    """Share of the dense attention's mass on entries that the indexers' choices would hold, if it was measured."""
    if not results or "recall" not in results[0]:
        return {}
    seen = max(sum(float(result["seeing"]) for result in results), 1.0)
    return {"index_recall": sum(float(result["recall"]) for result in results) / seen}


def scores(
    config: DeepseekV4Config,
    forward: Callable[..., model.Output],
    attention: Attention,
    params: Any,
    batch: dict[str, jax.Array],
    partition: Partition = ALONE,
) -> Scores:
    """What one batch [B, S] gives.

    Returns:
        "nats": summed next-token cross-entropy within documents, where there is a loss mask of the tokens that it
        marks, and "scored", their number; "predicted" int32 [B, S]: the most likely token after
        each place; in dense attention with CSA layers also "recall" and "seeing", the summed recall of the indexers and
        the number of (layer, token) pairs that it is a sum over, padding left out.
    """
    dense, tokens, segment_ids = attention == "dense", batch["tokens"], batch["segment_ids"]
    out = forward(
        config,
        params,
        tokens,
        segment_ids=segment_ids,
        attention=attention,
        logits=False,
        index_loss=dense,
        partition=partition,
    )
    targets, weights = shifted_targets(tokens, segment_ids, 1, batch.get("loss_mask"))
    nats, predicted = partition.token_values(_nats_and_best, model.output_matrix(params), out.hidden, targets)
    found = {"nats": (nats * weights).sum(), "scored": weights.sum(), "predicted": predicted}
    if indexed := index_losses(out, segment_ids):
        found["recall"] = jnp.stack([jnp.where(loss.counts, loss.recall, 0.0).sum() for loss in indexed]).sum()
        found["seeing"] = jnp.stack([loss.counts.sum() for loss in indexed]).sum()
    return found


def _nats_and_best(matrix: jax.Array, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and most likely token of each of N rows, in chunks: no [N, V] logits are held."""
    narrow = matrix.astype(hidden.dtype)

    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = jnp.dot(row[0], narrow, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits) - logits[row[1]], logits.argmax().astype(jnp.int32)

    chunk = max(1, min(LOGIT_ELEMENTS // matrix.shape[1], hidden.shape[0]))
    return jax.lax.map(one, (hidden, targets), batch_size=chunk)
