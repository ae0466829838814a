"""Index scores of few queries over packed keys in a cache's pages on a GPU (see `gpu_paged.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.indexer_topk.gpu import PROGRAMS, ROWS
from dsv4_jax.kernels.indexer_topk.gpu_keys import fetch, reordered, undone
from dsv4_jax.kernels.indexer_topk.gpu_paged import WIDTH
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention.gpu_fetch import TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import OVER_ROWS, load, over_rows, product, transposed

SLOTS = 8  # tiles of keys in shared memory: with four programs on a processor more than memory takes to answer


def scores(
    queries: jax.Array,
    weights: jax.Array,
    tables: jax.Array,
    seen: jax.Array,
    pages: Pages,
    wide: int,
    interpret: Any,
) -> jax.Array:
    """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])` of each sequence's first keys, in whole tiles of ROWS.

    Args:
        queries: BF16 [B, S, Hi, 128].
        weights: [B, S, Hi].
        tables: block numbers of the sequences [B, N].
        seen: how many keys are wanted, int32 [B].
        pages: the keys of all sequences, of which these are some.
        wide: columns of the result.
        interpret: see `gpu_paged.index_topk`.

    Returns:
        [B, S, wide] float32; nothing is written behind the tiles.
    """
    (batch, length, heads, _), total = queries.shape, pages.store["packed"].shape[1]
    ends = jnp.cumsum(-(-seen // ROWS), dtype=jnp.int32)
    stored = [pages.store[name].reshape(-1, *pages.store[name].shape[2:]) for name in ("packed", "scales")]
    return plgpu.kernel(
        partial(_scores, total=total, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((batch, length, wide), jnp.float32),
        grid=(PROGRAMS,),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((length * heads, WIDTH), jnp.bfloat16, transforms=TILED),
            *(plgpu.SMEM((SLOTS, ROWS, x.shape[-1]), jnp.uint8) for x in stored),
            plgpu.Barrier(num_barriers=1),
        ],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="paged_index_scores",
    )(
        reordered(queries).reshape(batch, -1, WIDTH),
        weights.astype(jnp.float32),
        *stored,
        pages.layer.reshape(1),
        tables,
        seen,
        ends,
    )


def _scores(
    q_ref, weights_ref, packed_ref, scales_ref, layer_ref, tables_ref, seen_ref, ends_ref, out_ref,
    q, packed, scales, q_here, *, total, interpret,
):  # fmt: skip
    """Some tiles of keys of some sequences, whose tiles are counted one sequence after the other, up to `ends_ref`.

    A program is one warpgroup, which also asks for the tiles to come. Several programs share a processor: while one
    undoes keys, another one multiplies.
    """
    program, tiles = lax.axis_index("program"), ends_ref[ends_ref.shape[0] - 1]
    begin, end = (lax.div((program + i) * tiles, PROGRAMS) for i in (0, 1))
    length, per_block = weights_ref.shape[1], packed_ref.shape[1]

    def of_sequence(b, _):
        count = lax.div(seen_ref[b] + (ROWS - 1), ROWS)
        start = ends_ref[b] - count
        low, high = jnp.maximum(begin - start, 0), jnp.minimum(end - start, count)
        pl.when(low < high)(lambda: walk(b, low, high))
        return _

    def walk(b, low, high):
        last_block, layer = lax.div(seen_ref[b] - 1, per_block), layer_ref[0] * total

        def slot_of(i):
            slot = lax.rem(i - low, SLOTS)
            return packed.at[slot], scales.at[slot]

        def ask(i, _):
            columns = i * (ROWS // per_block), last_block
            fetch((packed_ref, scales_ref), tables_ref.at[b], layer, columns, i < high, slot_of(i), interpret)
            return _

        def step(i, _):
            keys = undone(slot_of(i), SLOTS - 1, interpret)
            ask(i + SLOTS, None)
            here = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
            for t, (heads, weights) in enumerate(each):
                products = product(keys, transposed(heads, interpret), interpret)
                out_ref[b, t, here] = _added_up(products, weights)
            return _

        plgpu.copy_gmem_to_smem(q_ref.at[b], q, q_here)
        lax.fori_loop(low, low + SLOTS, ask, None)
        halves = [0.5 * load(weights_ref.at[b, t], OVER_ROWS, interpret) for t in range(length)]
        each = [(q.at[pl.ds(t * len(half), len(half))], half) for t, half in enumerate(halves)]
        plgpu.barrier_wait(q_here)
        lax.fori_loop(low, high, step, None)

    @pl.when(begin < end)
    def _():
        first = lax.while_loop(lambda b: ends_ref[b] <= begin, lambda b: b + 1, 0)
        last = lax.while_loop(lambda b: ends_ref[b] < end, lambda b: b + 1, first)
        lax.fori_loop(first, last + 1, of_sequence, None)


def _added_up(products: jax.Array, halves: jax.Array) -> jax.Array:
    """The heads [64, Hi] weighted, with half their weights, and added up."""
    # x + |x| is twice the larger of x and 0, bit for bit, and adding is twice as fast.
    return ((products + jnp.abs(products)) * over_rows(halves, products)).sum(axis=1)
