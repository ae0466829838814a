"""Walking over queries in chunks, so that scores never exceed a fixed amount of memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Elements of the largest temporary of one chunk. Small enough for a CPU's outer caches and any accelerator's memory,
# large enough that the loop's own cost disappears.
SCORE_ELEMENTS = 1 << 22


def chunk_length(length: int, elements_per_query: int, multiple: int = 1, most: int | None = None) -> int:
    """Queries per chunk: as many as keep `elements_per_query * chunk` within `most`, at least `multiple`.

    `most` is SCORE_ELEMENTS unless given.
    """
    fit = max((most or SCORE_ELEMENTS) // max(elements_per_query, 1), 1)
    chunk = min(max(fit // multiple, 1) * multiple, -(-length // multiple) * multiple)
    count = -(-length // chunk)
    return -(-length // (count * multiple)) * multiple  # even out, so that the last chunk is not mostly padding


def split(tree: Any, chunk: int, fill: Any = 0) -> Any:
    """Each leaf [B, S, ...] -> [S'/chunk, B, chunk, ...], padded at the end with `fill`."""

    def one(x: jax.Array) -> jax.Array:
        pad = -x.shape[1] % chunk
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join(tree: Any, length: int) -> Any:
    """The inverse of `split`: [N, B, chunk, ...] -> [B, S, ...]."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(one, tree)


def materialise(x: jax.Array) -> jax.Array:
    """x, computed once and kept: XLA may not fuse its computation into each of its readers and repeat it there.

    Inside custom gradients only: it has no derivative of its own. XLA's CPU compiler drops optimisation barriers before
    it fuses; there a loop that never runs stands in for one.
    """
    return jax.lax.platform_dependent(x, cpu=_idle_loop, default=jax.lax.optimization_barrier)


def _idle_loop(x: jax.Array) -> jax.Array:
    """x behind a loop that is entered only for a NaN in the first place, and then changes nothing."""
    first = x[(0,) * x.ndim]
    same = lambda x: jnp.where(x == x, x, jnp.nan).astype(x.dtype)  # noqa: E731
    leave = lambda s: (jnp.zeros_like(s[0]), same(s[1]))  # noqa: E731
    return jax.lax.while_loop(lambda s: s[0], leave, (first != first, x))[1]
