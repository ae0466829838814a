"""Where an export takes its matrices from: a parameter tree in memory, or another checkpoint, read as it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.decoding import read_part
from dsv4_jax.checkpoint.files import DTYPES, CheckpointError, Reader
from dsv4_jax.checkpoint.matching import Source
from dsv4_jax.checkpoint.names import Place
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.quantization.formats import SCALE
from dsv4_jax.shapes import is_table, keeps_float32


class Parts(Protocol):
    """Matrices of a model by leaf and index."""

    def get(self, place: Place) -> np.ndarray:
        """What lies at a place, in the orientation of the leaf."""
        ...

    def dtype(self, place: Place) -> np.dtype:
        """The dtype of what `get` returns."""
        ...

    def scales(self, places: list[Place], tile: tuple[int, int]) -> np.ndarray | None:
        """The power-of-two scales that the stored matrix made of `places` has now, if it has them for such tiles."""
        ...


def as_dtype(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The numbers in `dtype`.

    Raises:
        CheckpointError: when one is too large for it.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(converted)
    if lost.any():
        raise CheckpointError(f"{name} holds {array[lost][0]}, which is too large for {dtype}: choose another dtype")
    return converted


class TreeParts:
    """A parameter tree of numpy or JAX arrays; only the asked-for parts leave the device."""

    def __init__(self, leaves: Mapping[str, Any], dtype: np.dtype | None = None):
        """`leaves` by path; `dtype` of the floats, None keeps theirs."""
        self._leaves, self._dtype = leaves, dtype

    def get(self, place: Place) -> np.ndarray:
        """See `Parts`."""
        return as_dtype(np.asarray(self._leaves[place.leaf][place.index]), self.dtype(place), place.leaf)

    def dtype(self, place: Place) -> np.dtype:
        """See `Parts`."""
        kept = self._dtype is None or is_table(place.leaf) or keeps_float32(place.leaf)
        return np.dtype(self._leaves[place.leaf].dtype if kept else self._dtype)

    def scales(self, places: list[Place], tile: tuple[int, int]) -> None:
        """A tree holds numbers and no scales."""
        return None


class FolderParts:
    """A checkpoint folder, whose matrices are read when they are asked for; one is in memory at a time."""

    def __init__(self, reader: Reader, sources: list[Source], config: DeepseekV4Config, dtype: Any = None):
        """`dtype` of the floats; None keeps what is stored, and `config.torch_dtype` for what is quantised."""
        self._reader, self._dtype, self._quantised = reader, dtype, jnp.dtype(config.torch_dtype)
        self._sources = {(place.leaf, place.index): (s, place) for s in sources for place in s.stored.places}

    def get(self, place: Place) -> np.ndarray:
        """See `Parts`."""
        source, origin = self._sources[place.leaf, place.index]
        whole, dtype = tuple(map(range, origin.shape)), self.dtype(place)
        if is_table(place.leaf):
            return read_part(self._reader, source, origin, whole, dtype)
        # bfloat16 holds whatever FP8 and FP4 with their scales do; float16 may not.
        quantised = np.dtype(np.float32) if dtype == np.float16 else dtype
        stored = DTYPES[source.entry.dtype] if source.format == "plain" else quantised
        return as_dtype(read_part(self._reader, source, origin, whole, stored), dtype, place.leaf)

    def dtype(self, place: Place) -> np.dtype:
        """See `Parts`."""
        source, _ = self._sources[place.leaf, place.index]
        if is_table(place.leaf):
            return np.dtype(np.int32)
        if keeps_float32(place.leaf):
            return np.dtype(np.float32)
        stored = DTYPES[source.entry.dtype] if source.format == "plain" else self._quantised
        return np.dtype(self._dtype or stored)

    def scales(self, places: list[Place], tile: tuple[int, int]) -> np.ndarray | None:
        """See `Parts`. A matrix that is cut or joined on the way keeps its scales where the cuts lie between tiles."""
        found = [self._sources[place.leaf, place.index] for place in places]
        if any(s.scale is None or s.scale.dtype == "F32" or s.tile != tile for s, _ in found):
            return None
        runs = [[found[0]]]  # of rows that lie in one stored matrix, one behind the other as they will
        for i in range(1, len(places)):
            (source, origin), (last_source, last) = found[i], found[i - 1]
            same_matrix = source is last_source and origin.matrix == last.matrix
            if same_matrix and origin.row - last.row == places[i].row - places[i - 1].row:
                runs[-1].append(found[i])
            else:
                runs.append([found[i]])
        for run in runs:
            rows = sum(origin.shape[-1] for _, origin in run)
            begins_a_tile = run[0][1].row % tile[0] == 0
            ends_a_tile = rows % tile[0] == 0 or run is runs[-1]
            if not (begins_a_tile and ends_a_tile):
                return None
        return np.concatenate([self._scale_rows(run, tile[0]) for run in runs])

    def _scale_rows(self, run: list[tuple[Source, Place]], per: int) -> np.ndarray:
        """Scales of consecutive rows of one stored matrix."""
        (source, first), (_, last) = run[0], run[-1]
        scale = source.scale
        assert scale is not None
        top = first.matrix * scale.shape[-2]
        rows = range(top + first.row // per, top - (-(last.row + last.shape[-1]) // per))
        return self._reader.read(scale, rows, range(scale.shape[-1])).view(SCALE)
