"""Top-k on a TPU for the few queries of a sequence that decodes: all eight places of a vector register have one query.

As in `tpu.py`, whose queries share keys. Here a step of the grid has a single query. Of a tile of 1,024 keys each place
takes 128, so that none is idle: the scores of 262,144 entries are 1 MiB, and a pass that counts goes over them once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.indexer_topk import tpu
from dsv4_jax.kernels.indexer_topk import tpu_best as best
from dsv4_jax.kernels.indexer_topk.operands import EXACT, IndexOperands, Search
from dsv4_jax.kernels.indexer_topk.tpu import TILE
from dsv4_jax.kernels.indexer_topk.tpu_best import LANES, QUERIES, UNSEEN, Lies

FEW = 8  # queries of a sequence, each of which reads its keys
ROWS_OF_GROUP = LANES  # rows of scores whose chosen ones are collected together
GROUP = ROWS_OF_GROUP * QUERIES * LANES  # entries of one
ONE = Lies(True)


def supports(operands: IndexOperands) -> bool:
    """Whether the kernel takes these operands: few queries, and what `tpu.supports`."""
    return operands.queries.shape[1] <= FEW and tpu.supports(operands)


def index_topk(
    operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int, search: Search = EXACT, interpret: Any = False
) -> jax.Array:
    """The k best entries lo <= i < hi of each query, ties to the earlier one; see `xla.index_topk`.

    Args:
        operands: that `supports` takes.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.
        search: exact also where it need not be.
        interpret: False on a TPU; `pltpu.InterpretParams()` elsewhere.

    Returns:
        int32 [B, S, min(k, T)]: those of each place in the order of their positions, place after place, then -1.
    """
    (batch, length), entries = lo.shape, operands.keys.shape[1]
    k = min(k, entries)
    queries, keys, weights = tpu.padded(operands, 1)
    *_, heads, width = queries.shape
    pieces, held = -(-k // LANES), -(-entries // GROUP) * ROWS_OF_GROUP
    bounds = jnp.stack([lo, jnp.minimum(hi, entries)], -1).astype(jnp.int32)[:, :, None]
    by_query = lambda *last, **memory: pl.BlockSpec((1, 1, *last), lambda b, t: (b, t, *(0 for _ in last)), **memory)  # noqa: E731
    chosen = pl.pallas_call(
        functools.partial(_choose, k=k, bf16=search.bf16),
        grid=(batch, length),
        in_specs=[
            by_query(1, 2, memory_space=pltpu.SMEM),
            by_query(heads, width),
            by_query(1, heads),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=by_query(pieces, QUERIES, LANES),
        out_shape=jax.ShapeDtypeStruct((batch, length, pieces, QUERIES, LANES), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((2, TILE, width), keys.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((held * QUERIES, LANES), jnp.int32),
            pltpu.VMEM((2, QUERIES, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tpu.VMEM_BYTES
        ),
        interpret=interpret,
        name="index_topk_few",
    )(bounds, queries, weights[:, :, None], keys)
    return chosen[:, :, :, 0].reshape(batch, length, -1)[:, :, :k]


def _choose(bounds_ref, q_ref, weights_ref, keys_ref, out_ref, tiles, arrived, scores_ref, limits_ref, *, k, bf16):
    """One query of one row."""
    lo, hi = bounds_ref[0, 0, 0, 0], bounds_ref[0, 0, 0, 1]
    groups = jax.lax.div(lo, GROUP), best.reaching(hi, GROUP)
    out_ref[...] = jnp.full(out_ref.shape, -1, jnp.int32)
    blocks = best.forget(*groups, scores_ref)
    _score(lo, hi, q_ref, weights_ref, keys_ref, tiles, arrived, scores_ref, bf16)
    limits_ref[0], limits_ref[1] = best.limits(scores_ref, *blocks, k, ONE)
    collect = functools.partial(
        best.collect_chosen, scores_ref=scores_ref, limits_ref=limits_ref, out_ref=out_ref, lies=ONE
    )
    jax.lax.fori_loop(0, QUERIES, lambda place, taken: collect(place, taken, *groups), 0)


def _score(lo, hi, q_ref, weights_ref, keys_ref, tiles, arrived, scores_ref, bf16) -> None:
    """Ordered scores of the tiles of keys with entries lo <= i < hi, a row of scores each."""
    heads = q_ref.shape[2]
    weights = jnp.broadcast_to(weights_ref[0, 0].reshape(heads, 1), (heads, LANES))

    def score(i, products):
        parts = [products[:, p * LANES : (p + 1) * LANES] for p in range(QUERIES)]
        scores = jnp.concatenate([(jnp.maximum(x, 0.0) * weights).sum(0, keepdims=True) for x in parts], axis=0)
        place, lane = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        index = ONE.position(i, place, lane)
        known = jnp.where((index >= lo) & (index < hi), best.ordered(scores, bf16), UNSEEN)
        scores_ref[best.chunks(i)] = known

    start, stop = jax.lax.div(lo, TILE), best.reaching(hi, TILE)
    tpu.each_tile(score, start, stop, q_ref[0, 0], keys_ref, tiles, arrived)
