"""The gradients by kernels for Blackwell in interpret mode, with tensor memory; that they compile for a B200."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gpu_range
from blackwell import compiled
from hopper import arrays, bf16, close, int32, spilled
from test_gpu_kernels import SCALE, operands, stated

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.sparse_attention import entries, gpu, gpu_range
from dsv4_jax.kernels.sparse_attention.bands import RANGE
from tests.sharding.devices import on_devices


def check(reference, kernels, q, keys, choice, seed):
    """The kernels' gradients, which are those of the reference."""
    rng = np.random.default_rng(seed)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16)
    (out, lse), pull = jax.vjp(lambda *x: reference(*x, choice), q, keys)
    d_lse = jnp.where(jnp.isfinite(lse), jnp.asarray(rng.normal(size=lse.shape), jnp.float32), 0.0)
    wanted = pull((d_out.astype(jnp.float32), d_lse))
    found = kernels(q, keys, choice, out.astype(q.dtype), lse, d_out, d_lse)
    for name, a, b in zip(("d_q", "d_entries"), found, wanted, strict=True):
        close(name, a, b)
    return [np.asarray(x, np.float32) for x in found]


def check_chosen(parameters, heads, width, batch=1, length=2, seed=0):
    """Most entries are chosen by every query but the first, which chooses none."""
    backward = lambda *x: gpu.backward(*x, SCALE, parameters)  # noqa: E731
    given = operands(np.random.default_rng(seed), batch, length, width, 160, 150, heads)
    return check(stated, backward, *given, seed)


def check_ranges(parameters, heads, width, bounds, count):
    backward = lambda *x: gpu_range.backward(*x, SCALE, RANGE, parameters)  # noqa: E731
    given = test_gpu_range.operands(np.random.default_rng(heads), 1, len(bounds), count, width, heads)
    return check(test_gpu_range.stated, backward, *given, jnp.asarray([bounds], jnp.int32), heads)


@pytest.mark.parametrize(
    ("heads", "width", "processors"),
    [
        (64, 128, 2),  # three tiles of a query by one program, heads stay
        pytest.param(128, 128, 4, marks=pytest.mark.slow),  # two tiles, heads are copied again
        pytest.param(24, 384, 1, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_chosen_entries(heads, width, processors, tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    check_chosen(tensor_memory, heads, width)


@pytest.mark.slow
def test_chunks_of_queries_of_two_rows_are_equal_bits_for_equal_inputs(tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "BACKWARD_QUERIES", 2)
    first, again = (check_chosen(tensor_memory, 64, 128, 2, 3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


BOUNDS = [[0, 70], [3, 66], [5, 5]]  # the third tile of 140 entries is seen by nobody


@pytest.mark.parametrize(
    ("heads", "width", "processors"), [(64, 128, 1), pytest.param(128, 256, 9, marks=pytest.mark.slow)]
)
def test_gradients_of_ranges(heads, width, processors, tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    _, d_entries = check_ranges(tensor_memory, heads, width, BOUNDS, 140)
    assert not d_entries[0, 70:].any()


def released(heads, ranges, parameters):
    gpu.is_blackwell, gpu.PROCESSORS = lambda: True, 2
    if ranges:
        check_ranges(parameters, heads, 512, BOUNDS[:2], 70)
    else:
        check_chosen(parameters, heads, 512)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("ranges", [False, True], ids=["chosen", "range"])
def test_the_released_shapes(heads, ranges, tensor_memory):
    """Where JAX has threads enough; see the forward kernel's test."""
    on_devices(8, released, heads, ranges, tensor_memory)


def test_gradients_are_the_kernels(blackwell):
    of = lambda band: entries._kernels("backward", bf16(1, 8, 128, 512), bf16(1, 99, 512), SCALE, band, True)  # noqa: E731
    assert of(None)["gpu"].func is gpu.backward and of(RANGE)["gpu"].func is gpu_range.backward


def backward(ranges, length, heads, count):
    lse = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    q, kv, choice = bf16(1, length, heads, 512), bf16(1, 4096, 512), int32(1, length, 2 if ranges else count)
    function = (lambda *x: gpu_range.backward(*x, SCALE, RANGE)) if ranges else (lambda *x: gpu.backward(*x, SCALE))
    return function, arrays("b200", q, kv, choice, q, lse, q, lse)


# In processes of their own: the compiler of kernels keeps to the first architecture that a process compiles for.
@pytest.mark.aot
@pytest.mark.parametrize(("heads", "count"), [(128, 1024), (64, 512)], ids=["pro", "flash"])
@pytest.mark.parametrize("ranges", [False, True], ids=["chosen", "range"])
def test_the_kernels_compile_for_blackwell(heads, count, ranges):
    kernels, _, _, printed = on_devices(1, compiled, backward, ranges, 256, heads, count)
    assert kernels == (2 if ranges else 3) and printed.count("for 'sm_100a'") == kernels
    assert max(spilled(printed), default=0) == 0


def trained(name):
    """The gradient of what a layer of V4-Flash attends, as a training step takes it."""
    with_kernels = {"gather": entries.gather_attention, "window": entries.window_attention}[name]
    choice, given = (int32(1, 256, 512), (SCALE,)) if name == "gather" else (int32(1, 256), (128, SCALE))

    def loss(q, kv, choice):
        out, lse = with_kernels(q, kv, choice, *given)
        return out.astype(jnp.float32).sum() + lse.sum()

    def gradient(*x):
        with platforms.compiling_for("cuda", "10.0"):
            return jax.grad(loss, (0, 1))(*x)

    return gradient, arrays("b200", bf16(1, 256, 64, 512), bf16(1, 256, 512), choice)


@pytest.mark.aot
@pytest.mark.parametrize(("name", "expected"), [("gather", 4), ("window", 4)])
def test_the_gradient_of_attention_has_the_kernels_inside(name, expected, monkeypatch):
    monkeypatch.setenv("DSV4_KERNELS", "blackwell")
    kernels, *_, printed = on_devices(1, compiled, trained, name)
    assert kernels == expected and printed.count("for 'sm_100a'") == expected


@pytest.mark.aot
def test_products_read_rows_columns_and_their_transposes():
    """By the descriptors in the PTX: blocks of 8 rows x 64 columns, 1 KiB; two blocks side by side in 128 columns."""
    *_, text = on_devices(1, compiled, backward, False, 5, 128, 70)
    block = 1024 // 16  # addresses are in units of 16 bytes
    along = [64 // 64 * block * (k // 4) + k % 4 * 2 for k in range(8)]  # 16 columns are 32 bytes
    down = lambda across: [(block << 16) + k * 2 * across * block for k in range(8)]  # noqa: E731
    print(text)
    assert along and down and re
