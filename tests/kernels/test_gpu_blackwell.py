"""The kernel for Blackwell in interpret mode, with tensor memory; that its programs compile for a B200."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackwell import compiled
from hopper import arrays, bf16, close, int32, spilled
from test_gpu_kernels import SCALE, operands, stated

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart
from dsv4_jax.kernels.sparse_attention import bands, gpu, gpu_range, paged, reference
from dsv4_jax.quantization.storage import Fp8WithRope, Plain
from tests.sharding.devices import on_devices


@pytest.mark.parametrize(
    ("width", "heads", "processors", "parts"),
    [
        (128, 128, 1, 1),
        (128, 64, 1, 1),
        pytest.param(128, 256, 24, 3, marks=pytest.mark.slow),
    ],
)
def test_chosen_entries_whole_and_in_parts(width, heads, processors, parts, tensor_memory, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    q, entries, indices = operands(np.random.default_rng(parts), 2, 1, width, 160, 150, heads)
    assert gpu.parts_of(gpu.programs_of(q), 3) == parts
    out, lse = gpu.forward(q, entries, indices, SCALE, tensor_memory)
    for name, a, b in zip(("out", "lse"), (out, lse), stated(q, entries, indices), strict=True):
        close(name, a, b)
    assert not np.asarray(out[0, 0], np.float32).any()


def attended(heads, parameters):
    """What the kernel gives at the width of the release, and what is stated."""
    gpu.is_blackwell, gpu.PROCESSORS = lambda: True, 1
    given = operands(np.random.default_rng(heads), 1, 2, 512, 160, 150, heads)
    return [np.asarray(x, np.float32) for x in (*gpu.forward(*given, SCALE, parameters), *stated(*given))]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [64, 128])
def test_the_released_shapes(heads, tensor_memory):
    """Where JAX has threads enough: on few cores those that wait for a barrier keep it from computing wide arrays."""
    out, lse, *wanted = on_devices(8, attended, heads, tensor_memory)
    for name, a, b in zip(("out", "lse"), (out, lse), wanted, strict=True):
        close(name, a, b)


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_scores_that_differ_by_many_powers_of_two(order, tensor_memory, monkeypatch):
    """The output is made smaller when scores have risen, by little or by much."""
    monkeypatch.setattr(gpu, "PROCESSORS", 1)  # for all five tiles
    q, entries, _ = operands(np.random.default_rng(3), 1, 1, 128, 320, 320, 128)
    first = jnp.repeat(jnp.asarray([0, 0.05, 0.12, 0.13, 1], jnp.bfloat16), 64)
    entries = entries.at[..., 0].set(first[::order])
    q = q.at[..., 0].set(1000)
    indices = jnp.arange(320)[None, None]
    for name, a, b in zip(
        ("out", "lse"),
        gpu.forward(q, entries, indices, SCALE, tensor_memory),
        stated(q, entries, indices),
        strict=True,
    ):
        close(name, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [Plain(128, "bfloat16"), Fp8WithRope(128, 64)], ids=["bfloat16", "fp8"])
def test_entries_of_a_cache_as_they_are_stored(storage, tensor_memory):
    q, entries, indices = operands(np.random.default_rng(1), 1, 2, 128, 12, 10)
    nan = lambda x: jnp.full_like(x, jnp.iinfo(x.dtype).max)  # noqa: E731
    store = {name: nan(x) for name, x in storage.zeros((2, 5, 4)).items()}
    pages = Pages(store, jnp.int32(1), jnp.asarray([[3, 0, 4]], jnp.int32), ByPart(storage, 4))
    pages = pages.write(jnp.arange(12)[None], entries)
    found = gpu.forward_pages(q, pages, indices, SCALE, tensor_memory)
    for name, a, b in zip(("out", "lse"), found, paged.gather_attention(q, pages, indices, SCALE), strict=True):
        close(name, a, b)


def test_ranges_of_entries(tensor_memory):
    q, entries, _ = operands(np.random.default_rng(2), 1, 3, 128, 150, 1)
    bounds = jnp.asarray([[[5, 5], [0, 150], [40, 110]]], jnp.int32)
    found = gpu_range.forward(q, entries, bounds, SCALE, bands.Band(64), tensor_memory)
    exact = (x.astype(jnp.float32) for x in (q, entries))
    wanted = reference.range_attention(*exact, bounds[..., 0], bounds[..., 1], SCALE)
    for name, a, b in zip(("out", "lse"), found, wanted, strict=True):
        close(name, a, b)


@pytest.mark.parametrize(
    ("choice", "capability", "expected"),
    [("blackwell", "10.0", True), ("auto", "10.0", False), ("blackwell", "9.0", False)],
)
def test_only_on_blackwell_and_only_when_asked_for(choice, capability, expected, monkeypatch):
    monkeypatch.setenv("DSV4_KERNELS", choice)
    assert not platforms.is_blackwell()  # here is no GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert platforms.is_blackwell() == expected


def chosen(length, heads, count):
    shapes = bf16(1, length, heads, 512), bf16(1, 4096, 512), int32(1, length, count)
    return lambda *x: gpu.forward(*x, SCALE), arrays("b200", *shapes)


def cached(storage, ranges):
    pool = jax.eval_shape(lambda: storage.zeros((2, 4096, 32)))
    pages = Pages(pool, int32(), int32(8, 512), ByPart(storage, 32))
    forward, choice = (gpu_range.forward_pages, int32(8, 1)) if ranges else (gpu.forward_pages, int32(8, 1, 1024))
    return lambda *x: forward(*x, SCALE), arrays("b200", bf16(8, 1, 128, 512), pages, choice)


# In processes of their own: the compiler of kernels keeps to the first architecture that a process compiles for.
@pytest.mark.aot
@pytest.mark.parametrize(("length", "heads"), [(64, 128), (64, 64), (1, 128)], ids=["pro", "flash", "decode"])
def test_the_kernel_compiles_for_blackwell(length, heads):
    kernels, _, _, printed = on_devices(1, compiled, chosen, length, heads, 1024)
    assert kernels == 1 and "for 'sm_100a'" in printed
    assert max(spilled(printed), default=0) <= 64


@pytest.mark.aot
@pytest.mark.parametrize("storage", [Plain(512, "bfloat16"), Fp8WithRope(512, 64)], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("ranges", [False, True], ids=["chosen", "range"])
def test_entries_of_a_cache_are_read_where_they_lie(storage, ranges):
    kernels, temporary, arguments, printed = on_devices(1, compiled, cached, storage, ranges)
    assert kernels == 1 and 8 * temporary < arguments
    assert max(spilled(printed), default=0) <= 64


@pytest.mark.aot
def test_products_read_tiles_as_they_are_copied():
    """By the descriptors in the PTX: blocks of 8 entries x 128 bytes, along an entry's 256 columns first."""
    *_, text = on_devices(1, compiled, chosen, 5, 128, 70)
    block, row_of_blocks = 1024 // 16, 4 * 1024 // 16  # addresses are in units of 16 bytes
    swizzled = 2 << 61 - 32 | row_of_blocks  # from 8 entries to the next ones
    assert set(re.findall(r"mov.b64 [ab]_desc, {[ab]_desc_low, (\d+)}", text)) == {str(swizzled)}
    starts = [int(x) for x in re.findall(r"add.s32 b_desc_low, \S+, (\d+)", text)]
    keys = [column * block + k * 2 for column in range(4) for k in range(4)]  # 16 columns are 32 bytes
    values = [(block << 16) + k * 2 * row_of_blocks for k in range(4)]  # 64 columns to the next ones; 16 entries
    assert starts == 4 * keys + values  # both halves, of the first tile and of others
    scores = 128 >> 4 << 24 | 64 >> 3 << 17 | 1 << 10 | 1 << 7 | 1 << 4  # BF16 to float32
    outputs = 128 >> 4 << 24 | 256 >> 3 << 17 | 1 << 16 | 1 << 10 | 1 << 7 | 1 << 4  # entries are rows of the operand
    assert str(scores) in text and str(outputs) in text
