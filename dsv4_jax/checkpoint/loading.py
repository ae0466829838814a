"""From the files to the devices, leaf by leaf: each process reads the bytes that its devices hold, and no others.

A small shard is put together on the host and sent whole. A large one, a stack of experts, grows on its device: one
stored matrix after the other is sent as it is stored, quantised or not, decoded there and written in its place. So the
host holds `STAGING` bytes or one stored matrix, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.decoding import Coding, check_values, read_part, read_raw
from dsv4_jax.checkpoint.files import DTYPES, CheckpointError, Reader, listed
from dsv4_jax.checkpoint.matching import Source, places_by_leaf
from dsv4_jax.checkpoint.names import Part, Place
from dsv4_jax.checkpoint.packing import load_packed, packing_of
from dsv4_jax.checkpoint.shards import STAGING, Devices, distinct_parts, join, within
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.shapes import Shape, flatten, is_table, keeps_float32, nest, tree_shapes

Shardings = jax.sharding.Sharding | Mapping[str, Any] | Callable[[str, Shape], jax.sharding.Sharding]


def load_tree(
    reader: Reader,
    sources: list[Source],
    config: DeepseekV4Config,
    shardings: Shardings | None,
    dtype: Any,
    packed: bool = False,
) -> dict[str, Any]:
    """The parameter tree that `sources` hold.

    Args:
        reader: counts what it reads.
        sources: what `match` found.
        config: the architecture.
        shardings: see `load_params`; None for numpy arrays on the host.
        dtype: of the floats, or None to keep each one's own.
        packed: leave what is quantised as it is, see `load_params`.

    Raises:
        CheckpointError: for scales or tables with impossible values, before memory is filled; for other shardings than
            the tree has leaves.
    """
    shapes, found = tree_shapes(config), places_by_leaf(sources)
    dtypes = {leaf: _leaf_dtype(leaf, found[leaf], config, dtype) for leaf in shapes}
    sharding_of = {} if shardings is None else _sharding_of(shardings, shapes)
    wanted = {leaf: distinct_parts(shape, sharding_of.get(leaf)) for leaf, shape in shapes.items()}
    for leaf, parts in wanted.items():
        for part in parts:
            for source, place, inner in within(found[leaf], part):
                check_values(reader, source, place, inner, config.n_routed_experts)
    leaves: dict[str, Any] = {}
    for leaf, shape in shapes.items():
        if packed and (packing := packing_of(found[leaf], shape, sharding_of.get(leaf))):
            leaves[leaf] = load_packed(reader, found[leaf], packing, shape, dtypes[leaf], sharding_of.get(leaf))
            continue
        shards = [
            _load_shard(reader, found[leaf], part, dtypes[leaf], devices) for part, devices in wanted[leaf].items()
        ]
        leaves[leaf] = shards[0][0] if shardings is None else join(shape, sharding_of[leaf], shards)
    return nest(leaves)


def _leaf_dtype(leaf: str, found: list[tuple[Source, Place]], config: DeepseekV4Config, dtype: Any) -> np.dtype:
    """A stack of unequal float dtypes becomes float32, which holds them all."""
    if is_table(leaf):
        return np.dtype(np.int32)
    if keeps_float32(leaf):
        return np.dtype(np.float32)
    if dtype is not None:
        return np.dtype(dtype)
    kinds = {jnp.dtype(config.torch_dtype) if s.format != "plain" else DTYPES[s.entry.dtype] for s, _ in found}
    return next(iter(kinds)) if len(kinds) == 1 else np.dtype(np.float32)


def _sharding_of(shardings: Shardings, shapes: dict[str, Shape]) -> dict[str, jax.sharding.Sharding]:
    """One sharding per leaf, from one for all, a tree of them, or a function of path and shape."""
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(shapes, shardings)
    if isinstance(shardings, Mapping):
        leaves = flatten(dict(shardings))
        if different := set(leaves) ^ set(shapes):
            raise CheckpointError(f"the tree of shardings and the parameters differ in leaves: {listed(different)}")
        return leaves
    return {leaf: shardings(leaf, shape) for leaf, shape in shapes.items()}


def _load_shard(
    reader: Reader,
    found: list[tuple[Source, Place]],
    part: Part,
    dtype: np.dtype,
    devices: Devices,
) -> list[Any]:
    """One part of a leaf on each of `devices`; on the host when there are none."""
    shape = tuple(map(len, part))
    if devices and int(np.prod(shape)) * dtype.itemsize > STAGING:
        return _grow_on_devices(reader, found, part, jnp.dtype(dtype), devices)
    block = np.empty(shape, dtype)
    for source, place, inner in within(found, part):
        at = tuple(i - cut.start for i, cut in zip(place.index, part, strict=False))
        block[at] = read_part(reader, source, place, inner, dtype)
    return [jax.device_put(block, device) for device in devices] or [block]


def _grow_on_devices(
    reader: Reader, found: list[tuple[Source, Place]], part: Part, dtype: Any, devices: Devices
) -> list[jax.Array]:
    shape = tuple(map(len, part))
    buffers = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for source, place, inner in within(found, part):
        raw, scales, coding = read_raw(reader, source, place, inner)
        at = [i - cut.start for i, cut in zip(place.index, part, strict=False)]
        start = np.array(at + [0] * (len(shape) - len(at)), np.int32)
        buffers = [_write(buffer, raw, scales, start, coding=coding, lead=len(at)) for buffer in buffers]
        jax.block_until_ready(buffers)  # otherwise matrices that wait for their device pile up on the host
    return buffers


@partial(jax.jit, donate_argnums=0, static_argnames=("coding", "lead"))
def _write(
    buffer: jax.Array, raw: jax.Array, scales: jax.Array | None, start: jax.Array, *, coding: Coding, lead: int
) -> jax.Array:
    """`buffer` with the decoded piece at `start`; the piece fills all axes behind the first `lead`."""
    piece = coding.decode(raw, scales, buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, piece.reshape((1,) * lead + buffer.shape[lead:]), tuple(start))
