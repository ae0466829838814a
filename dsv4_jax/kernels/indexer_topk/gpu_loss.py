"""What the indexer's loss takes over chosen entries, on NVIDIA GPUs with warpgroup products (Hopper).

Attention mass and index scores are both sums over heads of a function of products, `f(q_h . e_i)`: one kernel has both,
each with its own queries, rows and function (`gpu_chosen.py`). Another kernel has the gradients of the scores
(`gpu_chosen_backward.py`).

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import join, split
from dsv4_jax.kernels.indexer_topk.operands import IndexOperands
from dsv4_jax.kernels.platforms import is_hopper
from dsv4_jax.kernels.sparse_attention.gpu import ROWS, WIDEST, in_tiles

INDEX_WIDTH = 128  # columns of an index key
# Queries of a sequence, whose keys' gradients, [k, di] float32 each, exist at once. Attention has a quarter as many, of
# rows four times as wide. So many programs keep a GPU busy.
BACKWARD_QUERIES = 256


def supports(operands: IndexOperands, q: jax.Array, entries: jax.Array) -> bool:
    """Whether the kernels take these operands and the program is compiled for a GPU that has their instructions."""
    (*_, heads, width), index_shape = q.shape, operands.queries.shape[2:]
    shaped = heads % ROWS == 0 and width % INDEX_WIDTH == 0 and width <= WIDEST and index_shape == (ROWS, INDEX_WIDTH)
    dtypes = {x.dtype for x in (operands.queries, operands.keys, q, entries)}
    return shaped and dtypes == {jnp.dtype(jnp.bfloat16)} and is_hopper()


def forward(
    operands: IndexOperands,
    q: jax.Array,
    entries: jax.Array,
    lse: jax.Array,
    choice: jax.Array,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention mass and index scores of chosen entries, as `xla_loss.forward`, for what `supports` takes.

    `interpret`: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.
    """
    from dsv4_jax.kernels.indexer_topk.gpu_chosen import masses, scores

    tiles, used = in_tiles(_flat(_rows_of(choice, entries.shape[1])), 1)
    mass = masses(_flat(q), _rows(entries), _flat(lse), tiles, used, scale, interpret)
    score = scores(_flat(operands.queries), _rows(operands.keys), _flat(operands.weights), tiles, used, interpret)
    both = (x[:, : choice.shape[-1]].reshape(choice.shape) for x in (mass, score))
    mass, score = (jnp.where(choice >= 0, x, 0.0) for x in both)  # what no tile wrote, too
    return mass, score


def backward(
    operands: IndexOperands, choice: jax.Array, d_scores: jax.Array, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the operands from the cotangent of the scores that `forward` returned.

    Gradients of keys come as rows, one for each choice, and are added up in the order of queries.

    Args:
        operands: as of `forward`.
        choice: as of `forward`.
        d_scores: [B, S, k] float32; what it has at unused places has no effect.
        interpret: as of `forward`.

    Returns:
        Gradients of queries, keys and weights, in their shapes and dtypes.
    """
    from dsv4_jax.kernels.indexer_topk.gpu_chosen_backward import gradients
    from dsv4_jax.kernels.sparse_attention.gpu_backward import sum_by_row

    queries, keys, weights = operands
    rows, length = _rows(keys), queries.shape[1]

    def one(d_keys: jax.Array, args: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        queries, weights, d_scores, index = map(_flat, args)
        tiles, used = in_tiles(index, 1)
        d_scores = jnp.pad(d_scores, ((0, 0), (0, tiles.size // len(tiles) - index.shape[1]))).reshape(tiles.shape)
        found = gradients(queries, rows, weights, tiles, used, d_scores, interpret)
        d_keys = sum_by_row(found.rows.reshape(-1, rows.shape[1]), tiles.reshape(-1), d_keys, interpret)
        return d_keys, (found.queries.reshape(args[0].shape), found.weights.reshape(args[1].shape))

    chunk = min(BACKWARD_QUERIES, length)
    by_query = split((queries, weights, jnp.where(choice >= 0, d_scores, 0.0)), chunk)
    index = split(_rows_of(choice, keys.shape[1]), chunk, fill=-1)
    d_keys, by_query = jax.lax.scan(one, jnp.zeros(rows.shape, jnp.float32), (*by_query, index))
    d_queries, d_weights = join(by_query, length)
    return d_queries, d_keys.reshape(keys.shape).astype(keys.dtype), d_weights.astype(weights.dtype)


def _flat(x: jax.Array) -> jax.Array:
    """[B, S, ..] as [B * S, ..]."""
    return x.reshape(-1, *x.shape[2:])


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, n] as [B * T, n]."""
    return x.reshape(-1, x.shape[-1])


def _rows_of(choice: jax.Array, entries: int) -> jax.Array:
    """The choice [B, S, k] among `entries` of each sequence as rows of all sequences' [B, S, k], -1 where unused."""
    first = jnp.arange(len(choice), dtype=jnp.int32)[:, None, None] * entries
    return jnp.where(choice >= 0, choice + first, -1)
