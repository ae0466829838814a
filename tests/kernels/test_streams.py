"""Reading, writing and mapping the residual streams, with gradients, against float64."""

import numpy as np
import oracle
import pytest
from support import check_gradients

from dsv4_jax.kernels.streams import project, read, sinkhorn, write

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_read(n):
    check_gradients(
        read, lambda s, p: np.einsum("bsnd,bsn->bsd", s, p), (RNG.normal(size=(2, 3, n, 5)), RNG.normal(size=(2, 3, n)))
    )


@pytest.mark.parametrize("n", [1, 3, 4])
def test_write_sums_the_first_index_of_comb(n):
    stated = lambda s, y, post, comb: post[..., None] * y[:, None] + np.einsum("tij,tid->tjd", comb, s)  # noqa: E731
    shapes = (7, n, 5), (7, 5), (7, n), (7, n, n)
    check_gradients(write, stated, [RNG.normal(size=shape) for shape in shapes])


def test_project_normalises_the_flattened_streams():
    stated = lambda s, fn: oracle.rms(s.reshape(6, -1), eps=1e-2) @ fn  # noqa: E731
    ours = lambda s, fn: project(s, fn, 1e-2)  # noqa: E731
    check_gradients(ours, stated, (0.2 * RNG.normal(size=(6, 3, 5)), RNG.normal(size=(15, 4))))


@pytest.mark.parametrize(("n", "iters", "scale"), [(4, 20, 3), (2, 1, 1), (3, 4, 10)])
def test_sinkhorn(n, iters, scale):
    ours, stated = (lambda x, f=f: f(x, iters, 1e-6) for f in (sinkhorn, oracle.sinkhorn))
    check_gradients(ours, stated, (scale * RNG.normal(size=(9, n, n)),))


def test_sinkhorn_is_doubly_stochastic_to_about_its_eps():
    a = np.asarray(sinkhorn(np.asarray(2 * RNG.normal(size=(500, 4, 4)), np.float32), 20, 1e-6))
    assert (a > 0).all()
    assert np.abs(a.sum(-2) - 1).max() < 3e-6
    assert np.median(np.abs(a.sum(-1) - 1)) < 3e-6
