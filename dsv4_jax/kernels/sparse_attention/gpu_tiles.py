"""What a warpgroup does with tiles in shared memory on a GPU: products, and loads laid out for them.

Pallas' interpreter knows no layouts of registers and no accumulators that outlive a product. The functions here state
these steps twice, with `interpret` in plain arrays; the kernels are otherwise the same interpreted and compiled.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup's product
TILED_FLOATS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
OVER_COLUMNS, OVER_ROWS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def product(a: Any, b: Any, interpret: Any) -> jax.Array:
    """a [64, n] x b [n, 64] of shared memory, float32."""
    if interpret:
        return _dot(a, b)

    def run(total: Any) -> jax.Array:
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_product(total: jax.Array, a: Any, b: Any, interpret: Any) -> Any:
    """total + a x b: a [64, n] in registers or shared memory, b [n, m] in shared memory."""
    if interpret:
        return total + _dot(a, b)
    return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.WGMMAAccumulatorRef.init(total))


def transposed(ref: Any, interpret: Any) -> Any:
    """A matrix in shared memory, transposed as an operand."""
    return ref[...].T if interpret else plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any, interpret: Any) -> jax.Array:
    """What `ref` holds, in registers laid out as those of a product."""
    if interpret:
        return ref[...]
    whole = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.10 wants an index
    return plgpu.load(ref, *whole, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float, layout: Any, interpret: Any) -> jax.Array:
    """An array of one value, laid out as those of a product."""
    x = jnp.full(shape, value, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, layout)


def iota(count: int, layout: Any, interpret: Any) -> jax.Array:
    """0, 1, .. int32, laid out as a row or a column of a product."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=None if interpret else layout)


def over_columns(x: jax.Array, like: jax.Array) -> jax.Array:
    """One number per row, for each column of `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, [0])


def over_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """One number per column, for each row of `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, [1])


def meet(barrier: Any) -> None:
    """Both computing warpgroups have written, or read, what they did before."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def summed(share: jax.Array, shares: Any, shared: Any, me: Any, interpret: Any) -> jax.Array:
    """The sum of both computing warpgroups' shares of a product; returns when both have read them."""
    shares[me] = share
    meet(shared.at[0])
    total = share + load(shares.at[1 - me], plgpu.Layout.WGMMA, interpret)
    meet(shared.at[1])
    return total


def exp(x: jax.Array) -> jax.Array:
    """As `jnp.exp`, by the instruction for powers of two."""
    return jnp.exp2(x * math.log2(math.e))


def _dot(a: Any, b: Any) -> jax.Array:
    return jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
