"""The TPU kernels in interpret mode, which simulates memory spaces, DMAs and semaphores, slowly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import few
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.errors import UserError
from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.sparse_attention import (
    bands,
    gather_attention,
    reference,
    tpu,
    tpu_range,
    tpu_sums,
    window_attention,
)
from dsv4_jax.kernels.sparse_attention import entries as rows

SCALE = 0.4
INTERPRET = pltpu.InterpretParams()
# Relative to the largest value. BF16: outputs and weights are rounded to 8 bits on both ways, in another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def close(name, found, wanted, tolerance):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(found), finite, err_msg=name)
    largest = np.abs(wanted[finite]).max(initial=1e-6)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) <= tolerance * largest, name


@pytest.fixture
def small_steps(monkeypatch, small_fetches):
    """Few queries and rows per step, so that few of them already need several steps, and padding."""
    monkeypatch.setattr(bands, "QUERIES", 2)
    monkeypatch.setattr(rows, "WINDOW_TILE", 4)


def choosing(rng, batch, length, heads, width, entries, count, dtype):
    """Random operands; the queries choose some of `count` distinct entries, the last one of a row none."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / width**0.25, dtype)  # noqa: E731
    order = np.argsort(rng.random((batch, length, entries)), -1)[..., :count]
    unused = np.arange(count) >= rng.integers(0, count + 1, (batch, length, 1))
    unused[:, -1] = True
    indices = jnp.asarray(np.where(unused, -1, order), jnp.int32)
    return draw(batch, length, heads, width), draw(batch, entries, width), indices


def check(forward, backward, stated, q, keys, rng):
    """A kernel's output, log-sum-exp and gradients against the stated mathematics in float32."""
    d_out = jnp.asarray(rng.normal(size=q.shape), q.dtype)
    d_lse = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)
    primal, pull = jax.vjp(lambda q, keys: stated(q.astype(jnp.float32), keys.astype(jnp.float32)), q, keys)
    d_lse = jnp.where(jnp.isfinite(primal[1]), d_lse, 0.0)
    wanted = *primal, *pull((d_out.astype(primal[0].dtype), d_lse))
    out, lse = forward(q, keys)
    found = out, lse, *backward(q, keys, out, lse, d_out, d_lse)
    for name, a, b in zip(("out", "lse", "d_q", "d_keys"), found, wanted, strict=True):
        close(name, a, b, TOLERANCE[str(q.dtype)])
    return found


def check_gather(q, keys, indices, rng, interpret):
    forward = lambda q, keys: tpu.forward(q, keys, indices, SCALE, interpret)  # noqa: E731
    backward = lambda q, keys, *saved: tpu.backward(q, keys, indices, *saved, SCALE, interpret)  # noqa: E731
    return check(forward, backward, lambda *a: reference.gather_attention(*a, indices, SCALE), q, keys, rng)


def check_range(q, keys, bounds, band, stated, rng, interpret):
    forward = lambda q, keys: tpu_range.forward(q, keys, bounds, SCALE, band, interpret)  # noqa: E731
    backward = lambda q, keys, *saved: tpu_range.backward(q, keys, bounds, *saved, SCALE, band, interpret)  # noqa: E731
    return check(forward, backward, stated, q, keys, rng)


@pytest.mark.usefixtures("small_steps")
@few(2)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 3),
    heads=st.sampled_from([1, 8]),
    width=st.sampled_from([16, 384]),
    count=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_chosen_entries_and_their_gradients(batch, length, heads, width, count, dtype, seed):
    rng = np.random.default_rng(seed)
    check_gather(*choosing(rng, batch, length, heads, width, 6, count, dtype), rng, INTERPRET)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("batch", "width", "count"), [(1, 384, 8), (2, 16, 4)])
def test_gradients_of_entries_are_added_up_in_vmem(batch, width, count, monkeypatch, capsys):
    """Two tiles of a query's choice, several steps, a sequence whose queries are in two parts; the same as by rows."""
    operands = choosing(np.random.default_rng(0), batch, 9, 2, width, 11, count, "bfloat16")
    races = pltpu.InterpretParams(detect_races=True)
    with monkeypatch.context() as patch:
        patch.setattr(tpu_sums, "_few_at_a_time", None)
        *_, added = check_gather(*operands, np.random.default_rng(1), races)
    monkeypatch.setattr(tpu_sums, "SUM_BYTES", 0)
    monkeypatch.setattr(tpu_sums, "ROWS_QUERIES", 4)
    *_, scattered = check_gather(*operands, np.random.default_rng(1), INTERPRET)
    close("d_keys", added, scattered, 4e-3)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.usefixtures("small_steps")
def test_no_races_and_equal_bits(capsys):
    rng = np.random.default_rng(1)
    operands = choosing(rng, 1, 4, 8, 128, 5, 3, "float32")
    first, again = (
        check_gather(*operands, np.random.default_rng(2), pltpu.InterpretParams(detect_races=looking))
        for looking in (True, False)
    )
    assert "RACE DETECTED" not in capsys.readouterr().out
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("dtype", "heads"), [("bfloat16", 16), pytest.param("float32", 2, marks=pytest.mark.slow)])
def test_ranges_of_entries_and_their_gradients(dtype, heads):
    rng = np.random.default_rng(0)
    q, keys, _ = choosing(rng, 2, 5, heads, 160, 19, 1, dtype)
    lo, hi = np.sort(rng.integers(0, 20, (2, 2, 5)), axis=0)
    lo[0, 2:4] = hi[0, 2:4] = 7  # a whole tile of queries that sees nothing
    bounds = jnp.stack([jnp.asarray(lo), jnp.asarray(hi)], -1)
    stated = lambda q, keys: reference.range_attention(q, keys, bounds[..., 0], bounds[..., 1], SCALE)  # noqa: E731
    check_range(q, keys, bounds, bands.Band(8), stated, rng, INTERPRET)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("window", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_windows_are_ranges_over_few_tiles(window, capsys):
    rng = np.random.default_rng(window)
    q, keys, _ = choosing(rng, 1, 17, 2, 32, 17, 1, "float32")
    ids = jnp.asarray([[0] * 4 + [1] * 11 + [2] * 2])
    bounds, band = rows.window_bounds(1, 17, ids, window, None), rows.window_band(window)
    assert (band.steps(5), band.visits(9)) == ((2, 7) if window == 3 else (4, 9))
    stated = lambda q, keys: reference.window_attention(q, keys, ids, window, SCALE)  # noqa: E731
    check_range(q, keys, bounds, band, stated, rng, pltpu.InterpretParams(detect_races=window == 3))
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_windows_of_queries_behind_earlier_entries():
    positions = jnp.asarray([[2, 3, 0, 1]])
    bounds = rows.window_bounds(1, 4, None, 3, positions)
    np.testing.assert_array_equal(bounds[0], [[1, 4], [2, 5], [5, 6], [5, 7]])


def test_the_kernel_of_a_platform_is_in_the_program_compiled_for_it(monkeypatch):
    q, keys, indices = jnp.zeros((1, 8, 8, 128)), jnp.zeros((1, 4, 128)), jnp.zeros((1, 8, 2), jnp.int32)
    loss = lambda q, keys: gather_attention(q, keys, indices, SCALE)[0].sum()  # noqa: E731

    def lowered(platform):
        with platforms.compiling_for(platform):
            return jax.jit(jax.grad(loss, (0, 1))).trace(q, keys).lower(lowering_platforms=(platform,)).as_text()

    assert "custom_call" not in lowered("cpu")
    assert lowered("tpu").count("stablehlo.custom_call @tpu_custom_call") == 2  # though the same was traced before
    assert "custom_call" not in lowered("cpu")
    monkeypatch.setenv("DSV4_KERNELS", "xla")
    assert "tpu_custom_call" not in lowered("tpu")
    monkeypatch.setenv("DSV4_KERNELS", "triton")
    with pytest.raises(UserError, match="DSV4_KERNELS is 'triton': one of auto, xla"):
        lowered("tpu")


def test_arrays_that_the_compiler_spreads_are_left_to_it():
    q, keys, indices = jnp.zeros((1, 8, 8, 128)), jnp.zeros((1, 4, 128)), jnp.zeros((1, 8, 2), jnp.int32)

    def loss(q, keys):
        with platforms.partitioned_by_the_compiler():
            branches = gather_attention(q, keys, indices, SCALE), window_attention(q, q[:, :, 0], None, 4, SCALE)
        return sum(out.sum() for out, _ in branches)

    with platforms.compiling_for("tpu"):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(q, keys)
    assert "custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_operands_of_two_dtypes_are_left_to_xla():
    assert not tpu.supports(jnp.zeros((1, 8, 8, 128), jnp.bfloat16), jnp.zeros((1, 4, 128)))
