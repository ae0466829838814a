"""Index scores of few queries over packed keys in a cache's pages on a GPU (see `gpu_paged.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv4_jax.kernels.indexer_topk.gpu import ROWS
from dsv4_jax.kernels.indexer_topk.gpu_keys import reordered, undone
from dsv4_jax.kernels.indexer_topk.gpu_paged import WIDTH, shares
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention.gpu_fetch import TILED
from dsv4_jax.kernels.sparse_attention.gpu_tiles import OVER_ROWS, load, over_rows, product, transposed
from dsv4_jax.quantization.formats import FP4_BLOCK

SLOTS = 8  # tiles of keys in shared memory: with four programs on a processor more than memory takes to answer


def scores(
    queries: jax.Array,
    weights: jax.Array,
    pages: Pages,
    tables: jax.Array,
    seen: jax.Array,
    wide: int,
    interpret: Any,
) -> jax.Array:
    """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])` of each sequence's first keys, in whole tiles of ROWS.

    Args:
        queries: BF16 [B, S, Hi, 128].
        weights: [B, S, Hi].
        pages: the keys of all sequences, of which these are some.
        tables: their block numbers [B, N].
        seen: how many keys are wanted, int32 [B].
        wide: columns of the result.
        interpret: see `gpu_paged.index_topk`.

    Returns:
        [B, S, wide] float32; nothing is written behind the tiles.
    """
    (batch, length, heads, _), per_block = queries.shape, pages.per_block
    starts, share = shares(seen)
    shapes = {"packed": (per_block, WIDTH // 2), "scales": (per_block * WIDTH // FP4_BLOCK,)}
    packed, scales = (pages.store[name].reshape(-1, *shape) for name, shape in shapes.items())
    return plgpu.kernel(
        partial(_scores, total=pages.store["packed"].shape[1], interpret=interpret),
        out_type=jax.ShapeDtypeStruct((batch, length, wide), jnp.float32),
        grid=(share.shape[1],),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((length * heads, WIDTH), jnp.bfloat16, transforms=TILED),
            *(plgpu.SMEM((SLOTS, ROWS // per_block, *shape), jnp.uint8) for shape in shapes.values()),
            plgpu.SMEM((length, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_arrivals=2 * ROWS // per_block, num_barriers=SLOTS),
        ],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret or None,
        kernel_name="paged_index_scores",
    )(
        reordered(queries).reshape(batch, -1, WIDTH),
        weights.astype(jnp.float32),
        packed,
        scales,
        pages.layer.reshape(1),
        tables,
        seen,
        starts,
        share,
    )


def _scores(
    q_ref, weights_ref, packed_ref, scales_ref, layer_ref, tables_ref, seen_ref, starts_ref, share_ref, out_ref,
    q, packed, scales, sums, q_here, arrived, *, total, interpret,
):  # fmt: skip
    """Some tiles of keys of some sequences.

    A program is one warpgroup, which also asks for the tiles to come. Several programs share a processor: while one
    undoes keys, another one multiplies.
    """
    begin, end, first, last = (share_ref[i, lax.axis_index("program")] for i in range(4))
    (blocks, per_block), length = packed.shape[1:3], sums.shape[0]

    def of_sequence(b, _):
        start = starts_ref[b]
        low, high = jnp.maximum(begin, start) - start, jnp.minimum(end, starts_ref[b + 1]) - start
        pl.when(low < high)(lambda: _walk(b, low, high))
        return _

    def _walk(b, low, high):
        seen_block = lax.div(seen_ref[b] - 1, per_block)

        def fetch(i, _):
            slot = lax.rem(i - low, SLOTS)
            for j in range(blocks):
                block = layer_ref[0] * total + tables_ref[b, jnp.minimum(i * blocks + j, seen_block)]
                for source, place in ((packed_ref, packed), (scales_ref, scales)):
                    plgpu.copy_gmem_to_smem(source.at[block], place.at[slot, j], arrived.at[slot])
            return _

        def step(i, _):
            slot = lax.rem(i - low, SLOTS)
            plgpu.barrier_wait(arrived.at[slot])
            keys = undone(packed.at[slot], scales.at[slot], interpret)
            found = [_added_up(product(keys, transposed(heads, interpret), interpret), w) for heads, w in each]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for t, score in enumerate(found):
                sums[t] = score
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, out_ref.at[b, :, pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)])
            pl.when(i + SLOTS < high)(lambda: fetch(i + SLOTS, None))  # all threads have read the slot
            return _

        plgpu.copy_gmem_to_smem(q_ref.at[b], q, q_here)
        lax.fori_loop(low, jnp.minimum(low + SLOTS, high), fetch, None)
        halves = [0.5 * load(weights_ref.at[b, t], OVER_ROWS, interpret) for t in range(length)]
        each = [(q.at[pl.ds(t * len(half), len(half))], half) for t, half in enumerate(halves)]
        plgpu.barrier_wait(q_here)
        lax.fori_loop(low, high, step, None)

    lax.fori_loop(first, last, of_sequence, None)
    plgpu.wait_smem_to_gmem(0)


def _added_up(products: jax.Array, halves: jax.Array) -> jax.Array:
    """The heads [64, Hi] weighted, with half their weights, and added up."""
    # x + |x| is twice the larger of x and 0, bit for bit, and adding is twice as fast.
    return ((products + jnp.abs(products)) * over_rows(halves, products)).sum(axis=1)
