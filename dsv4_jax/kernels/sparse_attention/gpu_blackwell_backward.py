"""The gradient of queries for Blackwell, and what it shares with that of entries (`gpu_blackwell_entries.py`).

Both have 64 heads of a query and of its cotangent as the 128 rows of one product with 64 entries: 64 rows alone would
take as long. Its upper half are scores, the lower half gradients of weights. These lie in other lanes of tensor memory,
so they change places through shared memory, 32 entries at a time. Sums are transposed, [columns, heads] or [columns,
entries], so that their products have 128 rows too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention.gpu_backward import by_head
from dsv4_jax.kernels.sparse_attention.gpu_blackwell import (
    COMPUTER,
    FETCHER,
    ISSUER,
    LAYOUT,
    ROWS,
    SLOTS,
    blocks_of,
    fetch_all,
)
from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import (
    OVER_COLUMNS,
    OVER_ROWS,
    TILED_FLOATS,
    exp,
    load,
    over_columns,
    over_rows,
)

HEADS = 64  # of a program
BLOCK = 128  # columns of a query or an entry: the rows of a product whose result is transposed
PART = 32  # entries whose scores change places at once
PARTS = range(0, ENTRIES, PART)
WGMMA_T, TCGEN05_T = plgpu.Layout.WGMMA_TRANSPOSED, plgpu.Layout.TCGEN05_TRANSPOSED


class Scratch(NamedTuple):
    """What a program has besides its operands and results; `here` says what memory of which kind and size."""

    x: Any  # in shared memory: blocks of 64 heads' queries above their cotangents; the other blocks pass through here
    entries: Any  # at last the gradient
    d_scores: Any
    exchange: Any
    x_other: Any  # from here on in tensor memory: the other blocks, at least half of them
    scores: Any
    d_q: Any  # transposed, block by block
    x_here: Any  # from here on barriers: a block has been copied
    arrived: Any  # a tile
    used: Any  # a tile
    x_ready: Any  # all blocks
    scored: Any  # a tile
    read: Any  # the scores of a tile
    weighed: Any  # the gradient of a tile's scores has been written
    added: Any  # a tile's product with it

    @classmethod
    def here(cls, blocks: int, dtype: Any) -> Scratch:
        """For entries of so many blocks."""
        kept = blocks // 2
        ordering = [plgpu.Barrier(orders_tensor_core=True) for _ in range(5)]
        return cls(
            plgpu.SMEM((max(kept, 1), ROWS, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((SLOTS, blocks, ENTRIES, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((ENTRIES, HEADS), dtype, transforms=TILED),
            plgpu.SMEM((ROWS, PART), jnp.float32, transforms=TILED_FLOATS),
            plgpu.TMEM((ROWS, (blocks - kept) * BLOCK), dtype, packed=True),
            plgpu.TMEM((ROWS, ENTRIES), jnp.float32),
            plgpu.TMEM((ROWS, blocks * HEADS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=SLOTS, orders_tensor_core=True),
            *ordering,
        )


def d_queries(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    choice: Chosen | Run,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradient of the queries; arguments and result are `gpu_backward.d_queries`'s."""
    count, heads, width = q.shape
    groups, blocks = heads // HEADS, width // BLOCK
    leaves, tree = jax.tree.flatten(choice)
    d_q = plgpu.kernel(
        partial(_d_queries, tree=tree, groups=groups, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((count, groups, HEADS, blocks, BLOCK), q.dtype),
        grid=(count * groups,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[*Scratch.here(blocks, q.dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name=f"{choice.name}_d_queries",
    )(*by_head(q, d_out, lse, delta, blocks), rows, *leaves)
    return d_q.reshape(q.shape)


def _d_queries(q_ref, d_out_ref, lse_ref, delta_ref, rows_ref, *refs, tree, groups, scale, interpret):
    """64 heads of one query, over its tiles."""
    choice = tree.unflatten(refs[: tree.num_leaves])
    d_q_ref, *scratch = refs[tree.num_leaves :]
    here = Scratch(*scratch)
    program, me = lax.axis_index("program"), lax.axis_index("warpgroup")
    query, group = lax.div(program, groups), lax.rem(program, groups)
    mine = choice.of(query)

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        fetch_all(mine, (rows_ref,), here, interpret)

    @pl.when(me == ISSUER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        _multiply(mine.tiles, here)

    @pl.when(me == COMPUTER)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _load_heads(q_ref.at[query, group], d_out_ref.at[query, group], here, interpret)
        lse = load(lse_ref.at[query, group], OVER_COLUMNS, interpret)
        delta = load(delta_ref.at[query, group], OVER_COLUMNS, interpret)

        def step(i, _):
            unseen = [mine.unseen(i, OVER_ROWS, interpret, first, PART) for first in PARTS]  # while scores are computed
            plgpu.barrier_wait(here.scored)
            parts = zip(load_parts(here.scores), unseen, strict=True)
            plgpu.barrier_arrive(here.read)
            d_scores = [weigh(x, added, here.exchange, lse, delta, scale, interpret)[1] for x, added in parts]
            pl.when(i > 0)(lambda: plgpu.barrier_wait(here.added))
            for first, x in zip(PARTS, d_scores, strict=True):
                store_transposed(x, here.d_scores.at[pl.ds(first, PART)], WGMMA_T, interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(here.weighed)
            return _

        lax.fori_loop(0, mine.tiles, step, None)
        pl.when(mine.tiles > 0)(lambda: plgpu.barrier_wait(here.added))
        _finish(mine.tiles, d_q_ref.at[query, group], here, interpret)


def _multiply(count, here):
    """Starts all products: the scores of the next tile before the gradients of a tile's scores are there."""
    blocks = here.entries.shape[1]
    others = here.x_other.shape[1] // BLOCK
    plgpu.barrier_wait(here.x_ready)

    def score(i):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(here.arrived.at[slot])
        for block in range(blocks):
            kept = block >= others
            x = here.x.at[block - others] if kept else here.x_other.at[:, pl.ds(block * BLOCK, BLOCK)]
            plgpu.tcgen05_mma(here.scores, x, here.entries.at[slot, block].T, accumulate=block > 0)
        plgpu.tcgen05_commit_arrive(here.scored)

    def step(i, _):
        slot = lax.rem(i, SLOTS)
        plgpu.barrier_wait(here.read)
        pl.when(i + 1 < count)(lambda: score(i + 1))
        plgpu.barrier_wait(here.weighed)
        for block in range(blocks):
            total = here.d_q.at[:, pl.ds(block * HEADS, HEADS)]
            plgpu.tcgen05_mma(total, here.entries.at[slot, block].T, here.d_scores, accumulate=i > 0)
        plgpu.tcgen05_commit_arrive(here.used.at[slot])
        plgpu.tcgen05_commit_arrive(here.added)
        return _

    pl.when(count > 0)(lambda: score(0))
    lax.fori_loop(0, count, step, None)


def _load_heads(q_ref, d_out_ref, here, interpret):
    """The blocks of queries and cotangents, the first ones through shared memory into tensor memory."""
    others = here.x_other.shape[1] // BLOCK
    for block in range(here.entries.shape[1]):
        place = here.x.at[max(block - others, 0)]
        copy_heads(q_ref.at[:, block], d_out_ref.at[:, block], place, here.x_here)
        plgpu.barrier_wait(here.x_here)
        if block < others:
            other = here.x_other.at[:, pl.ds(block * BLOCK, BLOCK)]
            for columns in blocks_of(other):
                plgpu.async_store_tmem(other.at[:, columns], load(place.at[:, columns], LAYOUT, interpret))
            plgpu.commit_tmem()
            plgpu.commit_smem()
    plgpu.barrier_arrive(here.x_ready)


def _finish(count, d_q_ref, here, interpret):
    """The gradient, through the place of entries; where there were none no product has been written."""
    for block in range(here.entries.shape[1]):
        x = plgpu.async_load_tmem(here.d_q.at[:, pl.ds(block * HEADS, HEADS)])
        store_transposed(jnp.where(count > 0, x, 0.0), here.entries.at[0, block], TCGEN05_T, interpret)
    plgpu.commit_smem()
    for block in range(here.entries.shape[1]):
        plgpu.copy_smem_to_gmem(here.entries.at[0, block], d_q_ref.at[:, block])
    plgpu.wait_smem_to_gmem(0)


def copy_heads(q_ref: Any, d_out_ref: Any, place: Any, barrier: Any) -> None:
    """Columns of 64 heads' queries, and below them of their cotangents, into `place` [128, columns]: two arrivals."""
    plgpu.copy_gmem_to_smem(q_ref, place.at[pl.ds(0, HEADS)], barrier)
    plgpu.copy_gmem_to_smem(d_out_ref, place.at[pl.ds(HEADS, HEADS)], barrier)


def load_parts(scores: Any) -> list[jax.Array]:
    """The scores and gradients of weights in tensor memory, [128, 32] of each part's entries; they have been read."""
    parts = [plgpu.async_load_tmem(scores.at[:, pl.ds(first, PART)]) for first in PARTS]
    plgpu.wait_load_tmem()
    return parts


def weigh(
    x: jax.Array,
    unseen: jax.Array,
    exchange: Any,
    lse: jax.Array,
    delta: jax.Array,
    scale: float,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Weights of a part's entries, and the gradients of their scores, [64, 32] float32 each.

    Args:
        x: scores above gradients of weights [128, 32].
        unseen: what to add to an entry's scores [32].
        exchange: their place in shared memory.
        lse: of each head [64], as `delta`; see `gpu_backward.d_queries`.
        delta: as there.
        scale: factor of the scores.
        interpret: see `gpu.forward`.
    """
    exchange[...] = x
    scores, d_weights = (load(exchange.at[pl.ds(i, HEADS)], plgpu.Layout.WGMMA, interpret) for i in (0, HEADS))
    weights = exp(scores * scale + over_rows(unseen, scores) - over_columns(lse, scores))
    return weights, weights * (d_weights - over_columns(delta, weights)) * scale


def store_transposed(x: jax.Array, ref: Any, layout: Any, interpret: Any) -> None:
    """x [m, n], in the layout of which `layout` is the transposed one, into `ref` [n, m] of any dtype."""
    x = x.astype(ref.dtype)
    if interpret:
        ref[...] = x.T
    else:
        plgpu.transpose_ref(ref, (1, 0))[...] = plgpu.layout_cast(x, layout)
