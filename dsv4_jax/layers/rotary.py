"""Rotary position embedding: adjacent pairs, on the last dims of a vector, with YaRN for compressed layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """Cosines and sines of `position * frequency`; each [.., R/2] float32."""

    cos: jax.Array
    sin: jax.Array

    def inverse(self) -> Rotation:
        """The rotation by minus the angle."""
        return Rotation(self.cos, -self.sin)


def frequencies(theta: float, dims: int, yarn: Mapping[str, Any] | None) -> np.ndarray:
    """Angular frequency of each pair, [R/2] float32; `yarn` interpolates the slow ones (attention is not rescaled)."""
    freqs = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if yarn is not None:
        original = yarn["original_max_position_embeddings"]
        turns_at = lambda beta: dims * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))  # noqa: E731
        low = max(math.floor(turns_at(yarn["beta_fast"])), 0)
        high = min(math.ceil(turns_at(yarn["beta_slow"])), dims - 1)
        high += 0.001 if low == high else 0.0
        ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
        freqs = freqs / yarn["factor"] * ramp + freqs * (1 - ramp)
    return freqs.astype(np.float32)


def rotation(positions: jax.Array, freqs: np.ndarray) -> Rotation:
    """The rotation at integer `positions` [..]."""
    angles = positions[..., None].astype(jnp.float32) * freqs
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate the last R dims of x [.., K] in adjacent pairs; `by` broadcasts against x's leading axes."""
    dims = 2 * by.cos.shape[-1]
    pairs = x[..., -dims:].astype(jnp.float32).reshape(*x.shape[:-1], dims // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * by.cos - odd * by.sin, odd * by.cos + even * by.sin], axis=-1)
    return jnp.concatenate([x[..., :-dims], turned.reshape(*x.shape[:-1], dims).astype(x.dtype)], axis=-1)
