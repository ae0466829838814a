"""Compressors: m tokens become one key-value entry (report 2.3.1 and 2.3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.layers.kv_cache import Tail
from dsv4_jax.layers.layout import NOBODY, Blocks, Neighbours
from dsv4_jax.layers.norm import dense, rms_norm
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.layers.rotary import rotate


class Compressor(nnx.Module):
    """Pools blocks of `ratio` tokens, channel by channel, with softmax gates; CSA's blocks overlap the previous one."""

    def __init__(self, config: DeepseekV4Config, ratio: int, width: int, overlap: bool, role: str, rngs: nnx.Rngs):
        """Parameters wkv, wgate [D, c*width], ape [m, c*width], norm [width]; c = 2 with overlap, else 1."""
        channels = width * (2 if overlap else 1)
        self.ratio, self.width, self.overlap, self.eps = ratio, width, overlap, config.rms_norm_eps
        shape, axes = (config.hidden_size, channels), ("embed", "kv")
        self.wkv = parameter(normal(rngs, shape, config), axes, "muon", role)
        self.wgate = parameter(normal(rngs, shape, config), axes, "muon", role)
        self.ape = parameter(normal(rngs, (ratio, channels), config), ("block", "kv"), "adamw", role)
        self.norm = parameter(jnp.ones(width), ("kv",), "adamw", role)

    def __call__(self, x: jax.Array, blocks: Blocks, neighbours: Neighbours = NOBODY) -> jax.Array:
        """Entries [B, T, width] of x [B, S, D], normalised and rotated, in x's dtype; float32 until the norm."""
        reach = self.ratio * self.overlap  # whole blocks reach one block back, others into the block that they end
        reach += 0 if blocks.tokens is None else self.ratio - 1
        return self._pool(neighbours.before(self._project(x), reach), blocks, x.dtype)

    def extend(self, x: jax.Array, tail: Tail, blocks: Blocks) -> tuple[jax.Array, Tail]:
        """The entries of tokens that follow a tail, and the rows of both."""
        rows = tail.followed_by(*self._project(x))
        shape = (*blocks.starts_document.shape, self.width)
        if blocks.places is None or x.shape[1] >= self.ratio:
            return self._pool(rows, blocks, x.dtype), rows
        # Of a few new tokens most complete no block: a decode step pools one time in `ratio`.
        pool = lambda: self._pool(rows, blocks, x.dtype)  # noqa: E731
        nothing = lambda: jnp.zeros(shape, x.dtype)  # noqa: E731
        return jax.lax.cond((blocks.places >= 0).any(), pool, nothing), rows

    def _project(self, x: jax.Array) -> Tail:
        return Tail(dense(x, self.wkv[...], jnp.float32), dense(x, self.wgate[...], jnp.float32))

    def _pool(self, rows: Tail, blocks: Blocks, dtype: jnp.dtype) -> jax.Array:
        values = blocks.gather(rows.values, self.ratio)
        scores = blocks.gather(rows.scores, self.ratio) + self.ape[...]
        if self.overlap:
            values, scores = self._with_previous(values, scores, blocks.starts_document)
        pooled = (jax.nn.softmax(scores, axis=2) * values).sum(2)
        return rotate(rms_norm(pooled, self.norm[...], self.eps), blocks.rope).astype(dtype)

    def _with_previous(self, values: jax.Array, scores: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of block i: block i-1's first half of the channels, then its own second half; [B, T, 2m, width]."""
        width, count = self.width, starts.shape[1]
        absent, own = starts[..., None, None], slice(values.shape[1] - count, None)
        previous = jnp.where(absent, 0.0, _previous(values[..., :width], count))
        values = jnp.concatenate([previous, values[:, own, :, width:]], 2)
        previous = jnp.where(absent, -jnp.inf, _previous(scores[..., :width], count))
        return values, jnp.concatenate([previous, scores[:, own, :, width:]], 2)


def _previous(x: jax.Array, count: int) -> jax.Array:
    """The blocks before the last `count` ones; before the first of all there is nothing."""
    if x.shape[1] == count:
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))
    return x[:, :count]
