"""What an index score is made of."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.pages import Pages


class PagedOperands(NamedTuple):
    """The operands with a cache: queries [B, S, Hi, di], the pages of all keys, weights [B, S, Hi]."""

    queries: jax.Array
    pages: Pages
    weights: jax.Array


class IndexOperands(NamedTuple):
    """queries [B, S, Hi, di], keys [B, T, di], weights [B, S, Hi] (scales included, float32)."""

    queries: jax.Array
    keys: jax.Array
    weights: jax.Array

    def scores(self) -> jax.Array:
        """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])`: [B, S, T] float32 (keys may also be [B, S, T, di])."""
        keys = "bqnd" if self.keys.ndim == 4 else "bnd"
        products = jnp.einsum(f"bqhd,{keys}->bqhn", self.queries, self.keys, preferred_element_type=jnp.float32)
        return jnp.einsum("bqhn,bqh->bqn", jax.nn.relu(products), self.weights, precision=jax.lax.Precision.HIGHEST)
