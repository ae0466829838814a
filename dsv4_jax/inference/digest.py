"""A digest of parameters, so that what was computed with others is never taken for one's own."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model


def params_digest(params: model.Params) -> str:
    """A digest of names, shapes and every bit of the parameters; each array is reduced where it lies."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        about = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}"
        digest.update(about.encode() + np.asarray(_bit_sums(leaf)).tobytes())
    return digest.hexdigest()


@jax.jit
def _bit_sums(x: jax.Array) -> jax.Array:
    """Four sums of the array's mixed bits modulo 2^32, uint32 [4]: whole numbers, the same in any order of adding."""
    bits = x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place = place * np.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for seed in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1):
        mixed = (bits + place * np.uint32(seed)) * np.uint32(seed ^ 0x9E3779B1 | 1)
        mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x2C1B3C6D)
        sums.append((mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))
    return jnp.stack(sums)
