"""Which rows of a batch are a process's own: those of its devices, wherever the mesh puts them.

On a TPU slice a mesh follows the wiring, and the rows of one host's devices do not lie together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def rows_of(devices: Collection[Any], sharding: NamedSharding, rows: int) -> tuple[int, ...]:
    """The numbers of the rows of an array [rows, ..] that some devices hold, in order, each once.

    Args:
        devices: of the sharding's mesh.
        sharding: of the array; how it cuts other dimensions does not matter.
        rows: of the array; a multiple of the parts that they are cut into.
    """
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    places = by_row.devices_indices_map((rows,))
    return tuple(sorted({row for device in devices for row in range(*places[device][0].indices(rows))}))


def place_among(own: Sequence[int], part: slice, rows: int) -> slice:
    """Where consecutive rows of a whole array of `rows` rows stand in an array of the `own` ones, of which they are."""
    start, stop, _ = part.indices(rows)
    first = int(np.searchsorted(own, start))  # they are consecutive there too, since `own` is in order
    return slice(first, first + stop - start)
