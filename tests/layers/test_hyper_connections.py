"""The maps of a hyper-connection site against float64, and where training starts."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from support import TINY, check_gradients

from dsv4_jax.kernels.streams import read, write
from dsv4_jax.layers.hyper_connections import HyperConnection, HyperHead, stochastic_errors

RNG = np.random.default_rng(0)
N, D = TINY.hc_mult, TINY.hidden_size
PARTS = ("fn", "base", "scale")


def with_values(site, fn, base, scale):
    """The site with other parameters, so that they can be differentiated."""
    graph, state = nnx.split(site)
    for name, value in zip(PARTS, (fn, base, scale), strict=True):
        state[name] = state[name].replace(value)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("part", ["pre", "post", "comb"])
def test_maps_and_their_gradients(part):
    site = HyperConnection(TINY, nnx.Rngs(0))
    args = (2 * RNG.normal(size=(1, 6, N, D)), 0.2 * RNG.normal(size=(N * D, (2 + N) * N)),
            RNG.normal(size=(2 + N) * N), RNG.uniform(0.5, 1.5, 3))  # fmt: skip
    ours = lambda streams, *values: getattr(with_values(site, *values)(streams), part)  # noqa: E731

    def stated(streams, *values):
        maps = oracle.hyper_maps(streams[0], dict(zip(PARTS, values, strict=True)), TINY)
        return maps[("pre", "post", "comb").index(part)][None]

    check_gradients(ours, stated, args)


def test_the_head_read_and_its_gradients():
    head = HyperHead(TINY, nnx.Rngs(0))
    args = (RNG.normal(size=(1, 6, N, D)), 0.2 * RNG.normal(size=(N * D, N)), RNG.normal(size=N), np.array([1.3]))
    ours = lambda streams, *values: with_values(head, *values)(streams)  # noqa: E731
    stated = lambda streams, *values: oracle.hyper_head(streams[0], dict(zip(PARTS, values, strict=True)), TINY)[None]  # noqa: E731
    check_gradients(ours, stated, args)


def test_a_fresh_site_is_nearly_an_ordinary_residual_connection():
    site, head = HyperConnection(TINY, nnx.Rngs(0)), HyperHead(TINY, nnx.Rngs(1))
    x, y = (jnp.asarray(RNG.normal(size=(1, 50, D)), jnp.float32) for _ in range(2))
    streams = jnp.broadcast_to(x[:, :, None], (1, 50, N, D))
    maps = site(streams)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max())  # noqa: E731
    close(read(streams, maps.pre), x)
    written = write(streams, y, maps.post, maps.comb)
    close(written, jnp.broadcast_to((x + y)[:, :, None], written.shape))
    close(head(streams), x)


def test_reported_errors_are_the_largest_row_and_column_errors():
    comb = jnp.asarray([[[0.5, 0.5], [0.6, 0.5]]])
    np.testing.assert_allclose(stochastic_errors(comb), (0.1, 0.1), rtol=1e-5)
    np.testing.assert_allclose(stochastic_errors(jnp.asarray([[[0.7, 0.3], [0.1, 0.9]]])), (0.0, 0.2), atol=1e-6)
