"""Random operands of the kernels' benchmark."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
