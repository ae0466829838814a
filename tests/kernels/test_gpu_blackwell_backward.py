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
    """The kernels' gradients, which are those of the reference.

    They get the output in float32: of one rounded to BF16 XLA's gradients have errors of 1% too.
    """
    rng = np.random.default_rng(seed)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16)
    (out, lse), pull = jax.vjp(lambda *x: reference(*x, choice), q, keys)
    d_lse = jnp.where(jnp.isfinite(lse), jnp.asarray(rng.normal(size=lse.shape), jnp.float32), 0.0)
    wanted = pull((d_out.astype(jnp.float32), d_lse))
    found = kernels(q, keys, choice, out, lse, d_out, d_lse)
    for name, a, b in zip(("d_q", "d_entries"), found, wanted, strict=True):
        close(name, a, b)
    return [np.asarray(x, np.float32) for x in found]


def check_chosen(parameters, heads, width, batch=1, length=2):
    """Most entries are chosen by every query but the first, which chooses none."""
    backward = lambda *x: gpu.backward(*x, SCALE, parameters)  # noqa: E731
    given = operands(np.random.default_rng(heads), batch, length, width, 160, 150, heads)
    return check(stated, backward, *given, heads)


def check_ranges(parameters, heads, width):
    """The third tile is seen by nobody, and the last query sees nothing."""
    bounds = jnp.asarray([[[0, 70], [3, 66], [5, 5]]], jnp.int32)
    backward = lambda *x: gpu_range.backward(*x, SCALE, RANGE, parameters)  # noqa: E731
    given = test_gpu_range.operands(np.random.default_rng(heads), 1, 3, 140, width, heads)
    _, d_entries = check(test_gpu_range.stated, backward, *given, bounds, heads)
    assert not d_entries[0, 70:].any()


@pytest.mark.parametrize(
    ("heads", "processors"),
    [
        (64, 2),  # a program has all three tiles of a query, for which its heads stay
        pytest.param(128, 4, marks=pytest.mark.slow),  # two tiles, for each of which heads are copied again
    ],
)
def test_gradients_of_chosen_entries(heads, processors, tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    check_chosen(tensor_memory, heads, 128)


@pytest.mark.slow
def test_chunks_of_queries_of_two_rows_are_equal_bits_for_equal_inputs(tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "BACKWARD_QUERIES", 2)
    first, again = (check_chosen(tensor_memory, 64, 128, 2, 3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_of_ranges(tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", 9)  # so that programs share tiles
    check_ranges(tensor_memory, 64, 128)


def check_wide(ranges, heads, width, parameters):
    gpu.is_blackwell, gpu.PROCESSORS = lambda: True, 2
    (check_ranges if ranges else check_chosen)(parameters, heads, width)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "width"), [(64, 512), (128, 512), (24, 384), (128, 256)])
@pytest.mark.parametrize("ranges", [False, True], ids=["chosen", "range"])
def test_wide_gradients(heads, width, ranges, tensor_memory):
    """Where JAX has threads enough; see the forward kernel's test."""
    on_devices(8, check_wide, ranges, heads, width, tensor_memory)


def test_gradients_are_the_kernels(blackwell):
    for band, backend in ((None, gpu), (RANGE, gpu_range)):
        kernels = entries._kernels("backward", bf16(1, 8, 128, 512), bf16(1, 99, 512), SCALE, band, True)
        assert kernels["gpu"].func is backend.backward


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
    """The gradients of what a layer of V4-Flash attends, as a training step takes them."""
    attend, *given = {
        "gather": (entries.gather_attention, SCALE),
        "window": (entries.window_attention, 128, SCALE),
    }[name]
    choice = int32(1, 256, 512) if name == "gather" else int32(1, 256)  # or segments

    def loss(q, kv, choice):
        out, lse = attend(q, kv, choice, *given)
        return out.astype(jnp.float32).sum() + lse.sum()

    def gradient(*x):
        with platforms.compiling_for("cuda", "10.0"):
            return jax.grad(loss, (0, 1))(*x)

    return gradient, arrays("b200", bf16(1, 256, 64, 512), bf16(1, 256, 512), choice)


@pytest.mark.aot
@pytest.mark.parametrize(("name", "expected"), [("gather", 4), ("window", 3)])
def test_the_gradient_of_attention_has_the_kernels_inside(name, expected, monkeypatch):
    monkeypatch.setenv("DSV4_KERNELS", "blackwell")
    kernels, *_, printed = on_devices(1, compiled, trained, name)
    assert kernels == expected and printed.count("for 'sm_100a'") == expected


@pytest.mark.aot
def test_products_read_rows_and_columns_where_they_lie():
    """By the descriptors in the PTX: blocks of 8 rows x 64 columns, two of them beside each other in 128 columns."""
    *_, text = on_devices(1, compiled, backward, False, 5, 128, 70)
    block = 1024 // 16  # addresses are in units of 16 bytes
    swizzled = lambda across: str(2 << 61 - 32 | across * block)  # noqa: E731, from 8 rows to the next ones
    along = [k // 4 * block + k % 4 * 2 for k in range(8)]  # 16 columns are 32 bytes
    down = lambda rows, across: [(block << 16) + k * 2 * across * block for k in range(rows // 16)]  # noqa: E731
    packed = 4 * [0, 8, 16, 24]  # columns of tensor memory have two numbers
    shape = 128 >> 4 << 24 | 64 >> 3 << 17 | 1 << 10 | 1 << 7 | 1 << 4  # BF16 to float32
    for name, rows, columns, kinds, shapes in (
        ("d_queries", 2 * (packed + 2 * along) + 4 * down(64, 2), 8 * along + 4 * down(64, 1), (2, 1), 3 << 15),
        ("d_entries", 4 * along + 4 * down(128, 2), 8 * along, (2,), 1 << 15),  # transposed are both, or one
    ):
        (kernel,) = (
            x for x in text.split(".entry")[1:] if x.split("(")[0].strip().endswith(f"{name}_mosaic_gpu_kernel")
        )
        starts = [[int(x) for x in re.findall(rf"add.s32 {side}_desc_low, \S+, (\d+)", kernel)] for side in "ab"]
        assert starts == [rows, columns]
        found = set(re.findall(r"mov.b64 [ab]_desc, {[ab]_desc_low, (\d+)}", kernel))
        assert found == {swizzled(across) for across in kinds}
        assert str(shape) in kernel and str(shape | shapes) in kernel
