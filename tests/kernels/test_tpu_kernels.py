"""The TPU kernels in interpret mode, which simulates memory spaces, DMAs and semaphores and looks for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels.sparse_attention import reference, tpu

SCALE = 0.4
INTERPRET = pltpu.InterpretParams(detect_races=True)
# Relative to the largest value. BF16: outputs and weights are rounded to 8 bits on both ways, in another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def close(name, found, wanted, tolerance):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(found), finite, err_msg=name)
    largest = np.abs(wanted[finite]).max(initial=1e-6)
    assert np.abs(found - wanted)[finite].max(initial=0) <= tolerance * largest, name


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 17),
    heads=st.sampled_from([1, 8, 16]),
    width=st.sampled_from([16, 128, 256, 512]),
    entries=st.integers(1, 40),
    count=st.integers(1, 24),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_chosen_entries_and_their_gradients(batch, length, heads, width, entries, count, dtype, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / width**0.25, dtype)  # noqa: E731
    q, keys = draw(batch, length, heads, width), draw(batch, entries, width)
    count = min(count, entries)
    order = np.argsort(rng.random((batch, length, entries)), -1)[..., :count]
    unused = np.arange(count) >= rng.integers(0, count + 1, (batch, length, 1))
    indices = jnp.asarray(np.where(unused, -1, order), jnp.int32)
    d_out, d_lse = draw(*q.shape), jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)

    def run(attend):
        primal, pull = jax.vjp(lambda q, keys: attend(q, keys, indices, SCALE), q, keys)
        d_lse_seen = jnp.where(jnp.isfinite(primal[1]), d_lse, 0.0)
        return *primal, *pull((d_out.astype(primal[0].dtype), d_lse_seen))

    def stated(q, keys, indices, scale):
        wide = q.astype(jnp.float32), keys.astype(jnp.float32)
        return reference.gather_attention(*wide, indices, scale)

    found = run(lambda *args: tpu.gather_attention(*args, INTERPRET))
    for name, a, b in zip(("out", "lse", "d_q", "d_keys"), found, run(stated), strict=True):
        close(name, a, b, TOLERANCE[dtype])


def test_operands_of_two_dtypes_are_refused():
    q, keys = jnp.zeros((1, 8, 8, 128), jnp.bfloat16), jnp.zeros((1, 4, 128))
    with pytest.raises(ValueError, match="queries are bfloat16 and entries float32"):
        tpu.gather_attention(q, keys, jnp.zeros((1, 8, 2), jnp.int32), SCALE, INTERPRET)
