"""The TPU kernels in interpret mode, which simulates memory spaces, DMAs and semaphores and looks for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.errors import UserError
from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.sparse_attention import gather_attention, reference, tpu

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

    primal, pull = jax.vjp(lambda q, keys: stated(q, keys, indices), q, keys)
    d_lse = jnp.where(jnp.isfinite(primal[1]), d_lse, 0.0)
    wanted = *primal, *pull((d_out.astype(primal[0].dtype), d_lse))
    out, lse = tpu.forward(q, keys, indices, SCALE, INTERPRET)
    found = out, lse, *tpu.backward(q, keys, indices, out, lse, d_out, d_lse, SCALE, INTERPRET)
    for name, a, b in zip(("out", "lse", "d_q", "d_keys"), found, wanted, strict=True):
        close(name, a, b, TOLERANCE[dtype])


def stated(q, keys, indices):
    return reference.gather_attention(q.astype(jnp.float32), keys.astype(jnp.float32), indices, SCALE)


def test_the_kernel_of_a_platform_is_in_the_program_compiled_for_it(monkeypatch):
    q, keys, indices = jnp.zeros((1, 8, 8, 128)), jnp.zeros((1, 4, 128)), jnp.zeros((1, 8, 2), jnp.int32)
    loss = lambda q, keys: gather_attention(q, keys, indices, SCALE)[0].sum()  # noqa: E731

    def lowered(platform):
        with platforms.compiling_for(platform):
            return jax.jit(jax.grad(loss, (0, 1))).trace(q, keys).lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu").count("tpu_custom_call") == 2
    assert "custom_call" not in lowered("cpu")
    monkeypatch.setenv("DSV4_KERNELS", "xla")
    assert "tpu_custom_call" not in lowered("tpu")
    monkeypatch.setenv("DSV4_KERNELS", "triton")
    with pytest.raises(UserError, match="DSV4_KERNELS is 'triton': one of auto, xla"):
        lowered("tpu")


def test_operands_of_two_dtypes_are_left_to_xla():
    assert not tpu.supports(jnp.zeros((1, 8, 8, 128), jnp.bfloat16), jnp.zeros((1, 4, 128)))
