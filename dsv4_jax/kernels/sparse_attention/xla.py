"""Attention branches in plain XLA: queries in chunks, scores recomputed in the backward pass, true gathers.

The largest temporary of a chunk is bounded by `chunks.SCORE_ELEMENTS`; what is kept for the backward pass is the
inputs, the output and the log-sum-exp.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split

Branch = tuple[jax.Array, jax.Array]  # output [B, S, H, K], log-sum-exp [B, S, H]


def window_attention(
    q: jax.Array,
    kv: jax.Array,
    segment_ids: jax.Array | None,
    window: int,
    scale: float,
    positions: jax.Array | None = None,
) -> Branch:
    """Each query of q [B, S, H, K] attends the last `window` tokens of its own document, itself included.

    Args:
        q: queries [B, S, H, K].
        kv: one entry per token [B, S, K]; with `positions` the W entries of earlier tokens come first, [B, W + S, K].
        segment_ids: [B, S] documents as runs of equal ids, or None for one document a row.
        window: W.
        scale: factor of the scores.
        positions: [B, S] of the queries in their documents, in place of `segment_ids`: of the earlier entries a query
            sees as many as its document has earlier tokens.

    Returns:
        Output [B, S, H, K] and log-sum-exp [B, S, H] float32.
    """
    batch, length, heads, _ = q.shape
    block = min(window, length)
    # Blocks of W queries see their own block and the one before: the band costs twice its area at any length.
    blocks = split(q, block)  # [N, B, W, H, K]
    earlier = block if positions is None else window
    distance = jnp.arange(block)[:, None] + earlier - jnp.arange(earlier + block)
    band = (distance >= 0) & (distance < window)
    if positions is None:
        ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
        keys, query_ids = _own_and_previous(split(kv, block)), split(ids, block, fill=-1)  # [N, B, 2W, K]
        facts = (query_ids, _own_and_previous(query_ids, fill=-2))
        same_document = lambda query_ids, key_ids: query_ids[..., None] == key_ids[..., None, :]  # noqa: E731
    else:
        keys, facts = _with_earlier(kv, block, window), (split(positions, block, fill=-1),)
        same_document = lambda position: distance <= position[..., None]  # noqa: E731

    def one(args: tuple[jax.Array, ...]) -> Branch:
        q, keys, *facts = args
        return _attend(q, keys, band & same_document(*facts), scale)

    at_once = chunk_length(blocks.shape[0], batch * block * heads * (earlier + block))
    return join(jax.lax.map(one, (blocks, keys, *facts), batch_size=at_once), length)


def forward(q: jax.Array, entries: jax.Array, choice: jax.Array, scale: float, gathered: bool) -> Branch:
    """Query t of q [B, S, H, K] attends entries of [B, T, K]; see `entries.py` for `choice`.

    Of the chosen entries only those of a chunk of queries are ever gathered: [B, chunk, k, K].
    """
    # The barrier ties bounds to the queries. By themselves they are the same in every layer of a scan, and its
    # differentiation would compute their masks, queries x entries x heads, before the loop and keep them.
    q, choice = jax.lax.optimization_barrier((q, choice))

    def one(args: tuple[jax.Array, jax.Array]) -> Branch:
        keys, visible = _chosen(entries, args[1], gathered)
        return attend_keys(args[0], keys, visible, scale)

    chunk = _entries_chunk(q, entries, choice, gathered)
    chunks = (split(q, chunk), split(choice, chunk, fill=-1))
    return join(jax.lax.map(one, chunks), q.shape[1])


def backward(
    q: jax.Array,
    entries: jax.Array,
    choice: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    scale: float,
    gathered: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and entries, in their dtypes, from what `forward` was given and returned."""
    chunk = _entries_chunk(q, entries, choice, gathered)

    # The entries' gradient is one accumulator, scattered into in place: a fixed order, and no copy per chunk.
    def one(d_entries, args):
        q, choice, *rest = args
        keys, visible = _chosen(entries, choice, gathered)
        dq, d_keys = _backward(q, keys, visible, scale, *rest)
        if gathered:
            scatter = jax.vmap(lambda total, index, d: total.at[index].add(d, mode="drop"))
            index = jnp.where(visible, choice, entries.shape[1])
            return scatter(d_entries, index, d_keys), dq
        return d_entries + d_keys, dq

    chunks = split((q, choice, out, lse, d_out, d_lse), chunk)
    d_entries, dq = jax.lax.scan(one, jnp.zeros(entries.shape, jnp.float32), chunks)
    return join(dq, q.shape[1]), d_entries.astype(entries.dtype)


def _entries_chunk(q: jax.Array, entries: jax.Array, choice: jax.Array, gathered: bool) -> int:
    batch, length, heads, width = q.shape
    per_query = choice.shape[-1] * max(heads, width) if gathered else entries.shape[1] * heads
    return chunk_length(length, batch * per_query)


def _chosen(entries: jax.Array, choice: jax.Array, gathered: bool) -> tuple[jax.Array, jax.Array]:
    """Keys ([B, Q, k, K] gathered, or all [B, T, K]) and which of them each query sees [B, Q, N]."""
    if gathered:
        keys = jax.vmap(lambda row, index: row[index])(entries, jnp.maximum(choice, 0))
        return keys, choice >= 0
    index = jnp.arange(entries.shape[1])
    return entries, (index >= choice[..., :1]) & (index < choice[..., 1:])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: jax.Array, keys: jax.Array, visible: jax.Array, scale: float) -> Branch:
    return attend_keys(q, keys, visible, scale)


def _attend_fwd(q, keys, visible, scale):
    out, lse = attend_keys(q, keys, visible, scale)
    return (out, lse), (q, keys, visible, out, lse)


def _attend_bwd(scale, saved, cotangents):
    q, keys, visible, out, lse = saved
    dq, d_keys = _backward(q, keys, visible, scale, out, lse, *cotangents)
    return dq, d_keys.astype(keys.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend_keys(q: jax.Array, keys: jax.Array, visible: jax.Array, scale: float) -> Branch:
    """Softmax attention of q [B, Q, H, K] over keys [B, N, K] (or [B, Q, N, K]) where `visible` [B, Q, N]."""
    scores = jnp.where(visible[..., None, :], _dot(q, keys, "k") * scale, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = _dot(weights.astype(keys.dtype), keys, "n") / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return out.astype(q.dtype), (top + jnp.log(total))[..., 0]


def _backward(q, keys, visible, scale, out, lse, d_out, d_lse) -> tuple[jax.Array, jax.Array]:
    """Gradients of q, in its dtype, and of the keys, in float32, from the saved output and log-sum-exp."""
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]
    weights = jnp.where(visible[..., None, :], jnp.exp(_dot(q, keys, "k") * scale - lse), 0.0)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    d_scores = (weights * (_dot(d_out, keys, "k") - delta[..., None]) * scale).astype(keys.dtype)
    dq = _dot(d_scores, keys, "n").astype(q.dtype)
    d_keys = _dot_heads(d_scores, q, keys.ndim) + _dot_heads(weights.astype(d_out.dtype), d_out, keys.ndim)
    return dq, d_keys


def _dot(a: jax.Array, keys: jax.Array, over: str) -> jax.Array:
    """Contract a [B, Q, H, k or n] with shared keys "bnk" or each query's own keys "bqnk"."""
    own = "bqnk" if keys.ndim == 4 else "bnk"
    spec = f"bqhk,{own}->bqhn" if over == "k" else f"bqhn,{own}->bqhk"
    return jnp.einsum(spec, a, keys, preferred_element_type=jnp.float32)


def _dot_heads(a: jax.Array, b: jax.Array, keys_ndim: int) -> jax.Array:
    """Contract a [B, Q, H, N] with b [B, Q, H, K] over heads, and over queries too when they share the keys."""
    own = "bqnk" if keys_ndim == 4 else "bnk"
    return jnp.einsum(f"bqhn,bqhk->{own}", a, b, preferred_element_type=jnp.float32)


def _with_earlier(rows: jax.Array, block: int, window: int) -> jax.Array:
    """Rows [B, W + S, ...], W of them earlier, as [N, B, W + block, ...]: what each block of queries may see."""
    if block < window:
        return rows[None]  # one block, shorter than the window
    parts = split(rows, window)
    return jnp.concatenate([parts[:-1], parts[1:]], axis=2)


def _own_and_previous(blocks: jax.Array, fill: int = 0) -> jax.Array:
    """[N, B, W, ...] -> [N, B, 2W, ...]: each block behind the block before it."""
    before = jnp.concatenate([jnp.full_like(blocks[:1], fill), blocks[:-1]])
    return jnp.concatenate([before, blocks], axis=2)
