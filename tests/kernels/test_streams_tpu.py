"""The TPU kernels of the residual streams: in interpret mode against `streams`, compiled for what they move."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.kernels import platforms, streams
from dsv4_jax.kernels import streams_tpu as tpu

INTERPRET = pltpu.InterpretParams()
TOKENS, WIDTH, EPS = (3, 16), 256, 1e-6
RNG = np.random.default_rng(0)


def drawn(*shape, dtype="float32"):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def close(found, wanted, dtype):
    wanted = jax.tree.leaves(wanted)
    for a, b in zip(jax.tree.leaves(found), wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = np.abs(np.asarray(b, np.float32)).max()
        tolerance = 2e-6 if a.dtype == jnp.float32 and dtype == "float32" else 1e-2
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(("n", "dtype"), [(4, "float32"), (4, "bfloat16"), (3, "float32")])
def test_reads_writes_and_projections_with_their_gradients(n, dtype):
    """The functions that XLA runs are held against float64 in test_streams."""
    x, d_new = drawn(*TOKENS, n, WIDTH, dtype=dtype), drawn(*TOKENS, n, WIDTH, dtype=dtype)
    y, pre, post = drawn(*TOKENS, WIDTH, dtype=dtype), drawn(*TOKENS, n), drawn(*TOKENS, n)
    comb, fn = drawn(*TOKENS, n, n), drawn(n * WIDTH, (2 + n) * n)
    close(tpu.read(x, pre, INTERPRET), streams.read(x, pre), dtype)
    close(tpu.read_gradients(x, pre, y, INTERPRET), jax.vjp(streams.read, x, pre)[1](y), dtype)
    close(tpu.write(x, y, post, comb, INTERPRET), streams.write(x, y, post, comb), dtype)
    found = tpu.write_gradients(x, y, post, comb, d_new, INTERPRET)
    close(found, jax.vjp(streams.write, x, y, post, comb)[1](d_new), dtype)
    mix, saved = streams._project_fwd(x, fn, EPS)
    close(tpu.project(x, fn, EPS, INTERPRET), (mix, saved[2]), dtype)
    d_scaled, along = drawn(*mix.shape), drawn(*TOKENS, 1)
    flat = np.asarray(x, np.float64).reshape(-1, n * WIDTH)
    rows = np.asarray(d_scaled, np.float64).reshape(len(flat), -1)
    d_x = (rows @ np.asarray(fn, np.float64).T - np.asarray(along).reshape(-1, 1) * flat).reshape(x.shape)
    wanted = jnp.asarray(d_x, dtype), jnp.asarray(flat.T @ rows, jnp.float32)
    close(tpu.project_gradients(x, fn, d_scaled, along, INTERPRET), wanted, dtype)


def test_no_step_races_with_another():
    watched = pltpu.InterpretParams(detect_races=True)
    x, fn = drawn(32, 2, 128), drawn(256, 8)
    d_x, d_fn = tpu.project_gradients(x, fn, drawn(32, 8), drawn(32, 1), watched)
    assert np.isfinite(d_x).all() and np.isfinite(d_fn).all()


def test_kernels_are_in_programs_for_tpus_where_the_shapes_allow():
    def lowered(platform, tokens, width):
        def loss(x, pre, y, post, comb, fn):
            mixed = streams.project(x, fn, EPS).sum() + streams.read(x, pre).sum()
            return mixed + (streams.write(x, y, post, comb) ** 2).sum()

        shapes = (tokens, 2, width), (tokens, 2), (tokens, width), (tokens, 2), (tokens, 2, 2), (2 * width, 8)
        with platforms.compiling_for(platform):
            traced = jax.jit(jax.grad(loss, tuple(range(6)))).trace(
                *(jax.ShapeDtypeStruct(s, "float32") for s in shapes)
            )
            return traced.lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu", 32, 128).count("tpu_custom_call") == 5  # what reading gives is not needed
    assert "custom_call" not in lowered("tpu", 32, 96)
    assert "custom_call" not in lowered("tpu", 24, 128)
    assert "tpu_custom_call" not in lowered("cpu", 32, 128)


@pytest.mark.aot
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the extra aot")
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_array_goes_through_memory_once(target):
    """Of V4-Pro. In numbers of two bytes per token and D; the streams are four, and lie side by side."""
    from sharding.targets import parse_target, prepare

    prepare()
    machine, tokens, n, width = parse_target(target), 4096, 4, 7168
    here = jax.sharding.SingleDeviceSharding(machine.devices()[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)  # noqa: E731
    numbers = lambda *shape: array(tokens, *shape, dtype=jnp.float32)  # noqa: E731
    wide, apart = array(tokens, n * width), lambda x: x.reshape(tokens, n, width)
    y, fn = array(tokens, width), array(n * width, 24, dtype=jnp.float32)
    flat = lambda found: jax.tree.map(lambda x: x.reshape(tokens, -1) if x.shape[1:] == (n, width) else x, found)  # noqa: E731
    programs = {
        "read": (tpu.read, (wide, numbers(n)), 5),
        "read_gradients": (tpu.read_gradients, (wide, numbers(n), y), 9),
        "write": (tpu.write, (wide, y, numbers(n), numbers(n, n)), 9),
        "write_gradients": (tpu.write_gradients, (wide, y, numbers(n), numbers(n, n), wide), 14),
        "project": (lambda x, fn: tpu.project(x, fn, EPS), (wide, fn), 4),
        "project_gradients": (tpu.project_gradients, (wide, fn, numbers(24), numbers(1)), 8),
    }
    for name, (function, arguments, ideal) in programs.items():

        def run(*given, function=function):
            return flat(function(*(apart(x) if x.shape == wide.shape else x for x in given)))

        compiled = jax.jit(run).lower(*arguments).compile(compiler_options=machine.compiler_options or None)
        moved = compiled.cost_analysis()["bytes accessed"] / (2 * tokens * width)
        print(f"{target} {name}: {moved:.1f}, ideal {ideal}")
        assert moved < 1.1 * ideal, name
        assert compiled.memory_analysis().temp_size_in_bytes < 5 << 20, name
