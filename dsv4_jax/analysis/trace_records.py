"""The typed record of a layer: what `trace` saw of its experts, its attention and its residual streams.

Shapes: B rows, S tokens, H heads, k experts per token or chosen entries, T entries, Q queries asked for, n streams.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.config import LayerSpec
from dsv4_jax.errors import UserError


class ExpertTrace(NamedTuple):
    """Where tokens went.

    expert_ids: [B, S, k] int32.
    weights: [B, S, k], their sum being `routed_scaling_factor`.
    entropy: [B, S], of the router's scores over all experts, normalised, in nats.
    """

    expert_ids: jax.Array
    weights: jax.Array
    entropy: jax.Array


class QueryTrace(NamedTuple):
    """Whole distributions of the queries asked for; with `per_head` an axis H stands before the last one.

    window: [B, Q, W], the mass on each of the W tokens up to the query's own, which is the last.
    entries: [B, Q, N], the mass on each entry of `entry_ids`; None in layers without any.
    entry_ids: [B, Q, N], the chosen entries or all T, -1 where unused or not visible.
    index_scores: [B, Q, T] of all entries, -inf where not visible; None in layers that needed no scores.
    """

    window: jax.Array
    entries: jax.Array | None = None
    entry_ids: jax.Array | None = None
    index_scores: jax.Array | None = None


class AttentionTrace(NamedTuple):
    """Where tokens looked.

    window_mass, entry_mass, sink_mass: [B, S, H], the shares of the joint softmax, 1 together.
    chosen: [B, S, k], the entries that the indexer chose, in no order to rely on, -1 unused; None without a choice.
    chosen_scores: [B, S, k], their index scores, -inf where unused.
    chosen_mass: [B, S, k], the attention mass on each, mean of the heads.
    recall: [B, S], in dense attention the share of the mass on compressed entries that the indexer's choice would
        hold; NaN where nothing is visible. None otherwise.
    queries: of the queries asked for.
    """

    window_mass: jax.Array
    entry_mass: jax.Array
    sink_mass: jax.Array
    chosen: jax.Array | None
    chosen_scores: jax.Array | None
    chosen_mass: jax.Array | None
    recall: jax.Array | None
    queries: QueryTrace | None


class MixingTrace(NamedTuple):
    """How the residual streams were read, written and mixed, at two sites: around attention, around the experts.

    pre: [B, S, 2, n], weights of the streams that are read.
    post: [B, S, 2, n], weights of the result on each stream.
    comb: [B, S, 2, n, n], from stream i (first) to stream j.
    row_error, column_error: [B, S, 2], largest distance of a sum from 1.
    gain: [B, S, 2, 2], largest row sum (how much a stream can grow forwards) and column sum (how much a gradient can
        grow backwards) of the product of all comb matrices up to and with this site; 1 is neither growth nor decay.
    """

    pre: jax.Array
    post: jax.Array
    comb: jax.Array
    row_error: jax.Array
    column_error: jax.Array
    gain: jax.Array


class LayerTrace(NamedTuple):
    """One block.

    spec: its kind.
    attention, experts, mixing: see there.
    spans: [B, T, 2] int32, the tokens of the row (with a cache: of the sequence) that entry i stands for, first and one
        past the last. A CSA entry also pools the block before, with other channels. None in layers without entries.
    rounding: by role of the precision policy the relative root mean square of what rounding changed, scalars.
    """

    spec: LayerSpec
    attention: AttentionTrace
    experts: ExpertTrace
    mixing: MixingTrace
    spans: jax.Array | None
    rounding: dict[str, jax.Array]

    def chosen_spans(self) -> jax.Array:
        """The tokens that each chosen entry stands for, [B, S, k, 2]; -1 for unused places."""
        chosen = self.attention.chosen
        if chosen is None or self.spans is None:
            raise UserError(
                f"nothing was chosen in this layer ({self.spec}): its attention saw all entries, or has none"
            )
        found = jax.vmap(lambda spans, index: spans[jnp.maximum(index, 0)])(self.spans, chosen)
        return jnp.where(chosen[..., None] >= 0, found, -1)
