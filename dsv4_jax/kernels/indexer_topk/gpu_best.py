"""The places of a query's best numbers on a GPU: found by counting, nothing is sorted (see `gpu.py`).

A program is one warpgroup and has one query. Its numbers lie in shared memory, as integers of the same order, and PTX
takes their best from there (`gpu_best_ptx.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv4_jax.kernels.indexer_topk.gpu_best_ptx import TALLY, THREADS, UNSEEN, choose_ptx

PAIRS = 2 * THREADS  # numbers that a warpgroup writes together


def best(numbers: jax.Array, lo: jax.Array, hi: jax.Array, k: int, interpret: Any) -> jax.Array:
    """Where the k largest of each row's numbers lo <= i < hi are; of equal ones the earlier is taken, -inf never.

    Args:
        numbers: [N, n] float32; n a multiple of `gpu.WHOLE`, at most `gpu.MOST`.
        lo: int32 [N].
        hi: int32 [N].
        k: how many.
        interpret: see `gpu.index_topk`.

    Returns:
        int32 [N, k] in rising order, then -1 where there are fewer.
    """
    rows, count = numbers.shape
    wide = -(-k // PAIRS) * PAIRS
    chosen = plgpu.kernel(
        partial(_best, k=k, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((rows, wide), jnp.int32),
        grid=(rows,),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((count,), jnp.int32),
            plgpu.SMEM((TALLY,), jnp.int32),
            plgpu.SMEM((wide,), jnp.int32),
        ],
        interpret=interpret or None,
        kernel_name="index_best",
    )(numbers, lo, hi)
    return chosen[:, :k]


def _best(numbers_ref, lo_ref, hi_ref, out_ref, ordered_ref, tally_ref, chosen_ref, *, k, interpret):
    """One query."""
    query = lax.axis_index("program")
    numbers = numbers_ref[query]
    index = plgpu.broadcasted_iota(
        jnp.int32, numbers.shape, 0, layout=None if interpret else plgpu.Layout.WG_STRIDED(numbers.shape, 2)
    )
    seen = (index >= lo_ref[query]) & (index < hi_ref[query])
    ordered_ref[...] = _ordered(jnp.where(seen, numbers, -jnp.inf))
    tally_ref[...] = jnp.zeros(tally_ref.shape, jnp.int32)
    chosen_ref[...] = jnp.full(chosen_ref.shape, -1, jnp.int32)
    plgpu.commit_smem()
    if interpret:
        _choose(ordered_ref, chosen_ref, k)
    else:
        _assemble(choose_ptx(numbers.shape[0], k), (ordered_ref, tally_ref, chosen_ref))
    plgpu.commit_smem()
    out_ref[query] = chosen_ref[...]


def _ordered(numbers: jax.Array) -> jax.Array:
    """Float32 as int32 of the same order: both zeros are 0, -inf is UNSEEN."""
    bits = lax.bitcast_convert_type(numbers, jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _choose(ordered: Any, chosen: Any, k: int) -> None:
    """What the PTX does: places of the k largest numbers that are seen, of equal ones the first, in rising order."""
    numbers = ordered[...]
    least = jnp.maximum(jnp.sort(numbers)[-k], UNSEEN + 1)
    above, equal = numbers > least, numbers == least
    taken = above | equal & (jnp.cumsum(equal) <= k - above.sum())
    to = jnp.where(taken, jnp.cumsum(taken) - 1, chosen.shape[0])
    chosen[...] = chosen[...].at[to].set(jnp.arange(numbers.shape[0], dtype=jnp.int32), mode="drop")


def _assemble(text: str, refs: tuple[Any, ...]) -> None:
    """The PTX of one thread; its operands are the thread's number, then addresses."""

    @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
    def run(_: Any, *refs: Any) -> None:
        operands = [mosaic.thread_idx(), *map(mosaic.memref_ptr, refs)]
        constraints = ",".join(["r"] * len(operands) + ["~{memory}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)

    run(*refs)
