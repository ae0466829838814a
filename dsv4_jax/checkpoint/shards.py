"""Which parts of an array this process's devices hold, what of a checkpoint fills them, and arrays made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from dsv4_jax.checkpoint.matching import Source
from dsv4_jax.checkpoint.names import Part, Place
from dsv4_jax.shapes import Shape

Devices = list[Any]  # of jax.Device
STAGING = 256 << 20  # bytes of a shard up to which it is put together on the host


def distinct_parts(shape: Shape, sharding: jax.sharding.Sharding | None) -> dict[Part, Devices]:
    """The parts of a leaf that devices of this process hold, with these devices; without devices, the whole."""
    if sharding is None:
        return {tuple(map(range, shape)): []}
    parts: dict[Part, Devices] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(range(*cut.indices(size)) for cut, size in zip(index or (), shape, strict=True))
        parts.setdefault(part, []).append(device)
    return parts


def within(found: list[tuple[Source, Place]], part: Part) -> Iterator[tuple[Source, Place, Part]]:
    """What fills `part` of the leaf: places, with the part of them that lies inside."""
    for source, place in found:
        lead = len(place.index)
        if all(i in cut for i, cut in zip(place.index, part[:lead], strict=True)):
            yield source, place, part[lead:]


def join(shape: Shape, sharding: jax.sharding.Sharding, shards: list[list[jax.Array]]) -> jax.Array:
    """One array from what lies on each device, part by part."""
    arrays = [array for shard in shards for array in shard]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
