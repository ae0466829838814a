"""The gradient of entries for Blackwell: tiles of 64 entries over the heads of the queries that see them.

The queries of 64 heads and their cotangents are the 128 rows of a product with a tile, as in `gpu_blackwell_backward`.
What comes of it, [128, 64], are factors of the same rows in the gradient of the tile: of queries the gradients of their
scores, of cotangents the weights. So a step is two products, and both read these rows from shared memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.sparse_attention import gpu
from dsv4_jax.kernels.sparse_attention.gpu_backward import by_head
from dsv4_jax.kernels.sparse_attention.gpu_blackwell import COMPUTER, FETCHER, ISSUER, ROWS
from dsv4_jax.kernels.sparse_attention.gpu_blackwell_backward import (
    BLOCK,
    HEADS,
    PART,
    PARTS,
    TCGEN05_T,
    WGMMA_T,
    copy_heads,
    load_parts,
    store_transposed,
    weigh,
)
from dsv4_jax.kernels.sparse_attention.gpu_choice import Chosen, Run
from dsv4_jax.kernels.sparse_attention.gpu_fetch import ENTRIES, TILED
from dsv4_jax.kernels.sparse_attention.gpu_range_backward import parts_of_queries
from dsv4_jax.kernels.sparse_attention.gpu_seen import OneByOne, Together
from dsv4_jax.kernels.sparse_attention.gpu_tiles import OVER_COLUMNS, OVER_ROWS, TILED_FLOATS, load


class Scratch(NamedTuple):
    """What a program has besides its operands and results; `here` says what memory of which kind and size."""

    x: Any  # in shared memory: blocks of 64 heads' queries above their cotangents
    entries: Any
    factors: Any  # of these rows in the gradient, transposed
    exchange: Any
    scores: Any  # from here on in tensor memory
    d_entries: Any  # transposed, block by block
    x_here: Any  # from here on barriers: a block has been copied
    used: Any  # a block
    arrived: Any  # a tile
    left: Any  # a tile: its last scores are there
    scored: Any  # the heads of a step
    weighed: Any  # their factors have been written
    added: Any  # the last product with a tile's factors

    @classmethod
    def here(cls, blocks: int, dtype: Any) -> Scratch:
        """For entries of so many blocks."""
        return cls(
            plgpu.SMEM((blocks, ROWS, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((blocks, ENTRIES, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((ENTRIES, ROWS), dtype, transforms=TILED),
            plgpu.SMEM((ROWS, PART), jnp.float32, transforms=TILED_FLOATS),
            plgpu.TMEM((ROWS, ENTRIES), jnp.float32),
            plgpu.TMEM((ROWS, blocks * ENTRIES), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=blocks),
            plgpu.Barrier(num_barriers=blocks, orders_tensor_core=True),
            *(plgpu.Barrier(orders_tensor_core=True) for _ in range(5)),
        )


def d_rows(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    choice: Chosen,
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradients of each query's entries, as `gpu_backward.d_rows`, but nothing is written for tiles without any."""
    count, tiles, _ = choice.index.shape
    parts = gpu.parts_of(count, tiles)
    found = _add_up(q, d_out, lse, delta, rows, OneByOne(choice, parts), count * parts, count * tiles, scale, interpret)
    return found.reshape(count, tiles * ENTRIES, -1)


def d_entries(
    q: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    rows: jax.Array,
    run: Run,
    seeing: tuple[jax.Array, jax.Array],
    scale: float,
    interpret: Any,
) -> jax.Array:
    """Gradient of the entries of ranges; arguments and result are `gpu_range_backward.d_entries`'s."""
    batch, tiles = seeing[0].shape
    begin, end = parts_of_queries(seeing, len(q))
    parts = begin.shape[1]
    seen = Together(run, begin.reshape(-1), end.reshape(-1), tiles, len(rows) // batch, parts)
    found = _add_up(q, d_out, lse, delta, rows, seen, begin.size, begin.size, scale, interpret)
    return found.reshape(batch, tiles, parts, ENTRIES, -1).sum(2).reshape(batch, tiles * ENTRIES, -1)


def _add_up(q, d_out, lse, delta, rows, seen, programs, tiles, scale, interpret):
    """The gradients of tiles, each over the queries of its program, [tiles, 64, blocks, 128] float32."""
    blocks = q.shape[-1] // BLOCK
    leaves, tree = jax.tree.flatten(seen)
    return plgpu.kernel(
        partial(_d_entries, tree=tree, scale=scale, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((tiles, ENTRIES, blocks, BLOCK), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[*Scratch.here(blocks, q.dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name=f"{seen.name}_d_entries",
    )(*by_head(q, d_out, lse, delta, blocks), rows, *leaves)


def _d_entries(q_ref, d_out_ref, lse_ref, delta_ref, rows_ref, *refs, tree, scale, interpret):
    """A program's tiles of entries, each over all heads of the program's queries, 64 in a step."""
    seen = tree.unflatten(refs[: tree.num_leaves])
    d_entries_ref, *scratch = refs[tree.num_leaves :]
    here = Scratch(*scratch)
    program, me, groups = lax.axis_index("program"), lax.axis_index("warpgroup"), q_ref.shape[1]
    stay = seen.one_query and groups == 1  # the same heads in every step
    begin, end = seen.queries(program)
    tiles, count = seen.tiles(program), jnp.maximum(end - begin, 0) * groups
    place = lambda i: (begin + lax.div(i, groups), lax.rem(i, groups))  # noqa: E731

    @pl.when(me == FETCHER)
    def _():
        plgpu.set_max_registers(96, action="decrease")

        def tile(n, _):
            pl.when(n > 0)(lambda: plgpu.barrier_wait(here.left))
            seen.fetch(program, n, rows_ref, here.entries, interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(here.arrived)
            copy = partial(_copy_heads, q_ref, d_out_ref, place, n * count, count, here)
            pl.when(n == 0)(copy) if stay else copy()
            return _

        lax.fori_loop(0, tiles, tile, None)

    @pl.when(me == ISSUER)
    def _():
        plgpu.set_max_registers(96, action="decrease")
        lax.fori_loop(0, tiles, lambda n, _: _multiply(n, count, stay, here), None)

    @pl.when(me == COMPUTER)
    def _():
        plgpu.set_max_registers(240, action="increase")

        def tile(n, _):
            lax.fori_loop(0, count, partial(step, n), None)
            pl.when(count > 0)(lambda: plgpu.barrier_wait(here.added))
            _write(count, d_entries_ref.at[seen.number(program, n)], here, interpret)
            return _

        def step(n, i, _):
            query, group = place(i)
            lse = load(lse_ref.at[query, group], OVER_COLUMNS, interpret)
            delta = load(delta_ref.at[query, group], OVER_COLUMNS, interpret)
            unseen = [seen.unseen(program, n, query, first, PART, OVER_ROWS, interpret) for first in PARTS]
            plgpu.barrier_wait(here.scored)  # and the product with the last factors is done
            for first, x, added in zip(PARTS, load_parts(here.scores), unseen, strict=True):
                weights, d_scores = weigh(x, added, here.exchange, lse, delta, scale, interpret)
                for row, factors in ((0, d_scores), (HEADS, weights)):
                    to = here.factors.at[pl.ds(first, PART), pl.ds(row, HEADS)]
                    store_transposed(factors, to, WGMMA_T, interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(here.weighed)
            return _

        lax.fori_loop(0, tiles, tile, None)


def _copy_heads(q_ref, d_out_ref, place, before, count, here):
    """The heads of a tile's steps into shared memory, each block when there is room; so many steps were before."""

    def step(i, _):
        query, group = place(i)
        for block in range(here.x.shape[0]):
            pl.when(before + i > 0)(partial(plgpu.barrier_wait, here.used.at[block]))
            columns = query, group, slice(None), block
            copy_heads(q_ref.at[columns], d_out_ref.at[columns], here.x.at[block], here.x_here.at[block])
        return _

    lax.fori_loop(0, count, step, None)


def _multiply(n, count, stay, here):
    """Starts the products of a program's tile `n`: of each step's heads with it, and of these with their factors."""
    blocks = range(here.x.shape[0])
    plgpu.barrier_wait(here.arrived)

    def step(i, _):
        for block in blocks:
            arrive = partial(plgpu.barrier_wait, here.x_here.at[block])
            pl.when(n == 0)(arrive) if stay else arrive()
            plgpu.tcgen05_mma(here.scores, here.x.at[block], here.entries.at[block].T, accumulate=block > 0)
        plgpu.tcgen05_commit_arrive(here.scored)
        pl.when(i == count - 1)(lambda: plgpu.tcgen05_commit_arrive(here.left))
        plgpu.barrier_wait(here.weighed)
        for block in blocks:
            total = here.d_entries.at[:, pl.ds(block * ENTRIES, ENTRIES)]
            plgpu.tcgen05_mma(total, here.x.at[block].T, here.factors.T, accumulate=i > 0)
            if not stay:
                plgpu.tcgen05_commit_arrive(here.used.at[block])
        return _

    lax.fori_loop(0, count, step, None)
    pl.when(count > 0)(lambda: plgpu.tcgen05_commit_arrive(here.added))


def _write(count, d_entries_ref, here, interpret):
    """A tile's gradient; where nobody saw it no product has been written.

    That it has been read from tensor memory is waited for with the scores of the next tile.
    """
    for block in range(here.x.shape[0]):
        x = plgpu.async_load_tmem(here.d_entries.at[:, pl.ds(block * ENTRIES, ENTRIES)])
        store_transposed(jnp.where(count > 0, x, 0.0), d_entries_ref.at[:, block], TCGEN05_T, interpret)
