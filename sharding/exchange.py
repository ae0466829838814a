"""Rows that go to the devices of an axis and come from them: all-to-all exchanges, under `shard_map`.

TPUs and GPUs exchange the filled part of the buffers only (`jax.lax.ragged_all_to_all`); CPUs have no such exchange and
send them whole. Rows that a precision policy has rounded can go in FP8 (`wire.py`); gradients never do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.platforms import by_platform
from sharding.mesh import EXPERT
from sharding.wire import Tile, rows_as_bytes, rows_of_bytes


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def travel_rows(x: jax.Array, sends: jax.Array, gets: jax.Array, tile: Tile | None) -> jax.Array:
    """Rows [owners * capacity, D], block i for owner i -> block i from owner i.

    The first sends[i] rows of the block for owner i are real, and gets[i] of the one that comes from it. Where the
    backend has ragged exchanges only these travel, and the others arrive as zeros. With a `tile` they travel in FP8;
    gradients never do.
    """
    sent = x if tile is None else rows_as_bytes(x, tile)
    rows: Any = by_platform(sent, sends, gets, xla=_whole_blocks, tpu=_real_rows, gpu=_real_rows)
    return rows if tile is None else rows_of_bytes(rows, x.shape[1], tile, x.dtype)


def _travel_fwd(x: jax.Array, sends: jax.Array, gets: jax.Array, tile: Tile | None):
    return travel_rows(x, sends, gets, tile), (sends, gets)


def _travel_bwd(tile: Tile | None, saved, d_rows: jax.Array):
    del tile
    sends, gets = saved
    return travel_rows(d_rows, gets, sends, None), None, None


travel_rows.defvjp(_travel_fwd, _travel_bwd)


def _whole_blocks(x: jax.Array, sends: jax.Array, gets: jax.Array) -> jax.Array:
    del gets
    return all_to_all(x, sends.size)


def _real_rows(x: jax.Array, sends: jax.Array, gets: jax.Array) -> jax.Array:
    owners = sends.size
    capacity = x.shape[0] // owners
    starts = jnp.arange(owners, dtype=jnp.int32) * capacity
    mine = jnp.broadcast_to(starts[jax.lax.axis_index(EXPERT)], starts.shape)  # where it begins at every owner
    return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), starts, sends, mine, gets, axis_name=EXPERT)


def all_to_all(x: jax.Array, owners: int) -> jax.Array:
    """[owners * capacity, ..], block i for owner i -> block i from owner i."""
    cut = x.reshape(owners, -1, *x.shape[1:])
    return jax.lax.all_to_all(cut, EXPERT, split_axis=0, concat_axis=0).reshape(x.shape)
