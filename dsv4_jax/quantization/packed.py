"""Matrices that stay packed in memory: FP8 or FP4 numbers with their scales, where otherwise an array of floats stands.

A `Packed` is a pytree of two arrays, so parameters that hold some are stacked, scanned, sliced and sharded as before.
Products undo a few columns, or one expert, at a time (`kernels.packed_matmul`, `kernels.grouped_matmul`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.quantization.formats import FP8, e2m1_numbers, expand, power_of_two

PackedFormat = Literal["fp8", "fp4"]


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["format", "tile", "dtype"])
@dataclass(frozen=True, eq=False)
class Packed:
    """Matrices [.., in, out].

    Attributes:
        values: uint8. FP8: bits of e4m3, [.., in, out]. FP4: [.., in / 2, out], even inputs in the low four bits.
        scales: one per tile, [.., ceil(in / rows), ceil(out / columns)]: uint8 b, which means 2^(b - 127), or float32.
        format: "fp8" or "fp4".
        tile: rows and columns that share a scale.
        dtype: the name of the dtype that the numbers have when they are taken out whole; bfloat16 holds them exactly.
    """

    values: Any
    scales: Any
    format: PackedFormat
    tile: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        *lead, rows, columns = self.values.shape
        return (*lead, rows * (2 if self.format == "fp4" else 1), columns)

    @property
    def ndim(self) -> int:
        """Axes of the matrices."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: Any) -> Packed:
        """The matrices at an index of the leading axes; `...` is itself."""
        if index is Ellipsis:
            return self
        if len(index if isinstance(index, tuple) else (index,)) > self.ndim - 2:
            raise IndexError(f"a packed {self.shape} has {self.ndim - 2} axes of matrices, and {index} asks for more")
        return self._with(self.values[index], self.scales[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The numbers on the host."""
        here = self._with(np.asarray(self.values), np.asarray(self.scales))
        return here.astype(np.dtype(dtype or self.dtype))

    def columns(self, start: jax.Array | int, size: int) -> Packed:
        """Columns `start` .. `start + size`; `start` is a multiple of the tile's columns."""
        per = self.tile[1]
        cut = partial(jax.lax.dynamic_slice_in_dim, axis=self.ndim - 1)
        return self._with(cut(self.values, start, size), cut(self.scales, start // per, -(-size // per)))

    def astype(self, dtype: Any) -> Any:
        """The numbers, [.., in, out], of the kind that lies here, numpy or JAX; exact in bfloat16 and wider."""
        fp8, scales = self.format == "fp8", self.scales
        numbers = self.values.view(FP8).astype(np.float32) if fp8 else _fp4_numbers(self.values)
        factors = power_of_two(scales.astype(np.int32) - 127) if scales.dtype == np.uint8 else scales
        return (numbers * expand(factors, self.shape, self.tile, (0, 0))).astype(dtype)

    def _with(self, values: Any, scales: Any) -> Packed:
        return Packed(values, scales, self.format, self.tile, self.dtype)


def _fp4_numbers(values: Any) -> Any:
    """[.., in / 2, out] -> float32 [.., in, out]."""
    *lead, rows, columns = values.shape
    stack: Any = np.stack if isinstance(values, np.ndarray) else jnp.stack
    codes = stack([values & 15, values >> 4], axis=-2)
    return e2m1_numbers(codes).reshape(*lead, 2 * rows, columns)


def packed_arrays(tree: Any) -> list[Packed]:
    """Every `Packed` in a tree of parameters."""
    is_packed = lambda leaf: isinstance(leaf, Packed)  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(leaf)]
