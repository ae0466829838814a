"""Every row times its expert's matrix, one gathered matrix per row: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.grouped_matmul.groups import Groups


def grouped_matmul(rows: jax.Array, weights: jax.Array, groups: Groups) -> jax.Array:
    """rows [R, I], weights [E, I, O] -> [R, O]."""
    return jnp.einsum("ri,rio->ro", rows, weights[jnp.repeat(groups.expert_of_tile, groups.tile)])
