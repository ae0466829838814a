"""What a benchmark of kernels times: one operation, its operands, and how far a result is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    Attributes:
        name: what it is.
        operands: arrays.
        run: of the project, whose backend is the platform's kernel or plain XLA.
        flops: that the operation needs, whoever computes it.
        moved: bytes that it must read and write.
        check: given the result as numpy arrays, the largest error relative to the largest true value, on a part of it.
        dense: the same by masking all entries, or None where nothing is masked.
    """

    name: str
    operands: tuple[Any, ...]
    run: Call
    flops: float
    moved: float
    check: Callable[[Any], float]
    dense: Call | None = None
    tolerance: dict[str, float] = field(default_factory=lambda: {"float32": 1e-4, "bfloat16": 3e-2})


class Draw:
    """Seeded operands."""

    def __init__(self, dtype: Any):
        """Normal values in `dtype`."""
        self.dtype, self.rng = jnp.dtype(dtype), np.random.default_rng(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> jax.Array:
        """Normal values."""
        return jnp.asarray(self.rng.standard_normal(shape, np.float32) * scale, self.dtype)

    def choices(self, rows: int, queries: int, entries: int, k: int) -> jax.Array:
        """Distinct entries of each query, in no order: [rows, queries, min(k, entries)]."""
        k = min(k, entries)
        first = self.rng.integers(0, entries, (rows, queries, 1))
        odd = entries // 2 * 2 - 1 if entries > 2 else 1
        stride = next(s for s in range(max(odd * 5 // 8 | 1, 1), 2 * odd + 2, 2) if np.gcd(s, entries) == 1)
        return jnp.asarray((first + stride * np.arange(k)) % entries, jnp.int32)


def wide(x: Any) -> np.ndarray:
    """In float64."""
    return np.asarray(x, np.float64)


def error(found: Any, wanted: np.ndarray) -> float:
    """The largest, relative to the largest true value."""
    return float(np.abs(wide(found) - wanted).max() / np.abs(wanted).max())
