"""Rotary embedding against complex multiplication, YaRN against its formula, and RMS normalisation."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from support import check_gradients

from dsv4_jax.layers.norm import dense, rms_norm
from dsv4_jax.layers.rotary import frequencies, rotate, rotation

RNG = np.random.default_rng(0)
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def test_rotation_is_a_complex_multiplication_of_adjacent_pairs_of_the_last_dims():
    positions, freqs = np.arange(0, 70, 7), frequencies(100.0, 6, None)
    stated = lambda x: oracle.rope(x, positions[:, None] * np.asarray(freqs, np.float64))  # noqa: E731
    check_gradients(lambda x: rotate(x, rotation(jnp.asarray(positions), freqs)), stated, (RNG.normal(size=(10, 11)),))


def test_rotation_leaves_the_leading_dims_and_every_length_alone():
    x = jnp.asarray(RNG.normal(size=(5, 10)), jnp.float32)
    y = rotate(x, rotation(jnp.arange(5), frequencies(1e4, 4, None)))
    np.testing.assert_array_equal(y[:, :6], x[:, :6])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-6)


def test_the_inverse_undoes_it_and_products_depend_on_distance_only():
    q, k = (jnp.asarray(RNG.normal(size=(1, 8)), jnp.float32) for _ in range(2))
    by = lambda position: rotation(jnp.asarray([position]), frequencies(1e4, 8, None))  # noqa: E731
    np.testing.assert_allclose(rotate(rotate(q, by(37)), by(37).inverse()), q, atol=1e-6)
    product = lambda a, b: (rotate(q, by(a)) * rotate(k, by(b))).sum()  # noqa: E731
    np.testing.assert_allclose(product(9, 4), product(109, 104), rtol=2e-5)


@pytest.mark.parametrize("theta", [1e4, 1.6e5])
@pytest.mark.parametrize("yarn", [None, YARN, {**YARN, "original_max_position_embeddings": 64, "beta_fast": 33}])
@pytest.mark.parametrize("dims", [8, 64])
def test_frequencies_follow_the_formula(theta, dims, yarn):
    np.testing.assert_allclose(frequencies(theta, dims, yarn), oracle.frequencies(theta, dims, yarn), rtol=1e-6)


def test_yarn_at_v4s_own_numbers():
    # correction(32) = 64 ln(65536 / 64 pi) / (2 ln 160000) = 15.45, correction(1) = 24.7: pairs up to 15 keep their
    # frequency, pairs from 25 are divided by 16.
    plain, yarn = frequencies(1.6e5, 64, None), frequencies(1.6e5, 64, YARN)
    np.testing.assert_allclose(yarn[:16], plain[:16], rtol=1e-6)
    np.testing.assert_allclose(yarn[25:], plain[25:] / 16, rtol=1e-6)
    assert ((yarn < plain) & (yarn > plain / 16))[16:25].all()


def test_rms_norm_with_and_without_a_weight():
    x, weight = RNG.normal(size=(3, 4, 6)), RNG.normal(size=6)
    check_gradients(lambda x, w: rms_norm(x, w, 1e-2), lambda x, w: oracle.rms(x, w, 1e-2), (x, weight))
    check_gradients(lambda x: rms_norm(x, None, 1e-2), lambda x: oracle.rms(x, eps=1e-2), (x,))


def test_rms_norm_is_computed_in_float32_and_cast_once():
    x = jnp.asarray(300 * RNG.normal(size=(2, 512)), jnp.bfloat16)
    weight = jnp.asarray(1 + 0.1 * RNG.normal(size=512), jnp.float32)
    expected = oracle.rms(np.asarray(x, np.float64), np.asarray(weight, np.float64))
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2**-8)


def test_dense_accumulates_in_float32():
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1))
    assert dense(x, w).dtype == jnp.bfloat16
    assert dense(x, w, jnp.float32)[0, 0] == 4096.0
