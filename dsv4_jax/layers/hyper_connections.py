"""Manifold-constrained hyper-connections: n residual streams, mixed by doubly stochastic maps (report 2.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels.streams import project, read, sinkhorn, write
from dsv4_jax.layers.parameters import normal, parameter
from dsv4_jax.partition import ALONE, Partition


class Maps(NamedTuple):
    """How one site reads and writes the streams, float32.

    pre [B, S, n] weighs the streams that are read, post [B, S, n] the result that is written, and
    comb [B, S, n, n] carries stream i over to stream j with weight comb[i, j].
    """

    pre: jax.Array
    post: jax.Array
    comb: jax.Array


class HyperConnection(nnx.Module):
    """One mHC site: maps from the streams, then `enter` before a sublayer and `leave` after it."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs):
        """Parameters fn [nD, (2+n)n], base [(2+n)n], scale [3]; they start near an ordinary residual connection."""
        n, self.iters = config.hc_mult, config.hc_sinkhorn_iters
        self.n, self.hc_eps, self.norm_eps = n, config.hc_eps, config.rms_norm_eps
        width = n * config.hidden_size
        self.fn = parameter(normal(rngs, (width, (2 + n) * n), config), ("streams_embed", "hc"), "muon", "hc")
        # pre sums to 1, post is 1 and comb is nearly the identity while the input-dependent part is still small.
        comb = jnp.where(jnp.eye(n, dtype=bool), 0.0, -8.0)
        base = jnp.concatenate([jnp.full(n, _logit(1 / n)), jnp.zeros(n), comb.reshape(-1)])
        self.base = parameter(base, ("hc",), "adamw", "hc")
        self.scale = parameter(jnp.full(3, 0.01), ("hc",), "adamw", "hc")

    def __call__(self, streams: jax.Array, partition: Partition = ALONE) -> Maps:
        """The maps for streams [B, S, n, D]."""
        n = self.n
        mix = partition.token_values(lambda fn, x: project(x, fn, self.norm_eps), self.fn[...], streams)
        pre, post, comb = jnp.split(mix, [n, 2 * n], axis=-1)
        base_pre, base_post, base_comb = jnp.split(self.base[...], [n, 2 * n])
        scale = self.scale[...]
        pre = jax.nn.sigmoid(pre * scale[0] + base_pre) + self.hc_eps
        post = 2 * jax.nn.sigmoid(post * scale[1] + base_post)
        comb = (comb * scale[2] + base_comb).reshape(*comb.shape[:-1], n, n)
        return Maps(pre, post, sinkhorn(comb, self.iters, self.hc_eps))


# `partition.token_values(f, whole, *arrays)` calls f(whole, *arrays) with arrays [N, ..], the tokens of all rows in one
# axis, and gives the result as [B, S, ..]. On a mesh each device does so with its own tokens.
def enter(streams: jax.Array, pre: jax.Array, partition: Partition = ALONE) -> jax.Array:
    """What a sublayer reads, [B, S, D]."""
    return partition.token_values(lambda _, *tokens: read(*tokens), None, streams, pre)


def leave(streams: jax.Array, y: jax.Array, maps: Maps, partition: Partition = ALONE) -> jax.Array:
    """The streams behind a sublayer with the result y [B, S, D]."""
    return partition.token_values(lambda _, *tokens: write(*tokens), None, streams, y, maps.post, maps.comb)


class HyperHead(nnx.Module):
    """Collapses the streams to one before the final norm."""

    def __init__(self, config: DeepseekV4Config, rngs: nnx.Rngs):
        """Parameters fn [nD, n], base [n], scale [1]; they start at the mean of the streams."""
        n = config.hc_mult
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = parameter(normal(rngs, (n * config.hidden_size, n), config), ("streams_embed", "hc"), "muon", "hc")
        self.base = parameter(jnp.full(n, _logit(1 / n)), ("hc",), "adamw", "hc")
        self.scale = parameter(jnp.full(1, 0.01), ("hc",), "adamw", "hc")

    def __call__(self, streams: jax.Array, partition: Partition = ALONE) -> jax.Array:
        """[B, S, n, D] -> [B, S, D]."""
        mix = partition.token_values(lambda fn, x: project(x, fn, self.norm_eps), self.fn[...], streams)
        return enter(streams, jax.nn.sigmoid(mix * self.scale[...] + self.base[...]) + self.hc_eps, partition)


def stochastic_errors(comb: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest distance of a row sum and of a column sum of comb [.., n, n] from 1."""
    return jnp.abs(comb.sum(-1) - 1).max(), jnp.abs(comb.sum(-2) - 1).max()


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if p < 1 else 8.0
