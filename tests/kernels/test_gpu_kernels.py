"""The GPU kernels in interpret mode, which simulates memory spaces and barriers; their PTX, thread by thread."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hopper import CALL, arrays, bf16, close, compile_for, int32, unswizzled
from ptx import Machine

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart
from dsv4_jax.kernels.sparse_attention import gpu, gpu_backward, gpu_fetch, paged, reference
from dsv4_jax.quantization.storage import Fp8WithRope, Plain

SCALE = 0.1


def operands(rng, batch, length, width, entries, count, heads=64):
    """Queries, entries, and distinct choices of a random number each; the first query chooses nothing."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    order = np.argsort(rng.random((batch, length, entries)), -1)[..., :count]
    unused = rng.random(order.shape) < np.linspace(1, 0, batch * length).reshape(batch, length, 1)
    indices = jnp.asarray(np.where(unused, -1, order), jnp.int32)
    return draw(batch, length, heads, width), draw(batch, entries, width), indices


def stated(q, entries, indices):
    return reference.gather_attention(q.astype(jnp.float32), entries.astype(jnp.float32), indices, SCALE)


@pytest.mark.parametrize(
    ("width", "processors", "parts", "heads"), [(128, 1, 1, 24), pytest.param(256, 6, 3, 64, marks=pytest.mark.slow)]
)
def test_chosen_entries_whole_and_in_parts(width, processors, parts, heads, interpreter, monkeypatch):
    monkeypatch.setattr(gpu, "PROCESSORS", processors)
    assert gpu.parts_of(2, 3) == parts
    q, entries, indices = operands(np.random.default_rng(parts), 2, 1, width, 160, 150, heads)
    out, lse = gpu.forward(q, entries, indices, SCALE, interpreter)
    for name, a, b in zip(("out", "lse"), (out, lse), stated(q, entries, indices), strict=True):
        close(name, a, b)
    assert not np.asarray(out[0, 0], np.float32).any()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [128, 24])
def test_gradients_of_queries_and_entries(heads, interpreter):
    rng = np.random.default_rng(5)
    q, entries, indices = operands(rng, 2, 2, 128, 80, 70, heads)
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16)
    d_lse = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32).at[0, 0].set(0)  # which chose nothing
    (out, lse), pull = jax.vjp(lambda *x: stated(*x, indices), q, entries)
    wanted = pull((d_out.astype(jnp.float32), d_lse))
    found = gpu.backward(q, entries, indices, out.astype(q.dtype), lse, d_out, d_lse, SCALE, interpreter)
    for name, a, b in zip(("d_q", "d_entries"), found, wanted, strict=True):
        close(name, a, b)


def test_rows_of_one_number_are_added_in_order(interpreter):
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(11, 128)).astype(np.float32)
    index = np.asarray([3, 0, -1, 3, 2, 0, 3, 4, -1, 0, 3], np.int32)
    wanted = np.ones((5, 128), np.float32)
    for number in range(5):
        run = [rows[i] for i in np.flatnonzero(index == number)]
        wanted[number] += sum(run[1:], run[0]) if run else 0
    found = gpu_backward.sum_by_row(jnp.asarray(rows), jnp.asarray(index), jnp.ones((5, 128)), interpreter)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [Plain(128, "bfloat16"), Fp8WithRope(128, 64)], ids=["bfloat16", "fp8"])
def test_entries_of_a_cache_as_they_are_stored(storage, interpreter):
    q, entries, indices = operands(np.random.default_rng(1), 1, 2, 128, 12, 10)
    nan = lambda x: jnp.full_like(x, jnp.iinfo(x.dtype).max)  # noqa: E731
    store = {name: nan(x) for name, x in storage.zeros((2, 5, 4)).items()}
    pages = Pages(store, jnp.int32(1), jnp.asarray([[3, 0, 4]], jnp.int32), ByPart(storage, 4))
    pages = pages.write(jnp.arange(12)[None], entries)
    found = gpu.forward_pages(q, pages, indices, SCALE, interpreter)
    for name, a, b in zip(("out", "lse"), found, paged.gather_attention(q, pages, indices, SCALE), strict=True):
        close(name, a, b)


@pytest.mark.parametrize("width", [128, 512])
def test_each_thread_copies_its_bytes_of_the_chosen_entries(width):
    rng = np.random.default_rng(width)
    entries = rng.normal(size=(50, width)).astype(ml_dtypes.bfloat16)
    index = rng.integers(-10, 50, 64).astype(np.int32)
    machine = Machine([index, entries], 128 * width, [0, None, Machine.thread, None]).run(gpu_fetch.plain_ptx(width))
    assert (machine.written == 1).all()
    np.testing.assert_array_equal(unswizzled(machine.shared, width), np.where(index[:, None] < 0, 0, entries[index]))


@pytest.mark.parametrize("width", [128, 512])
def test_each_thread_decodes_its_numbers_of_the_chosen_entries(width):
    rng = np.random.default_rng(width)
    storage = Fp8WithRope(width, 64)
    entries = jnp.asarray(rng.normal(size=(50, width)) * np.exp2(rng.integers(-9, 9, (50, 1))), jnp.float32)
    stored = storage.encode(entries)
    index = rng.integers(-10, 50, 64).astype(np.int32)
    arrays = [index, *(np.asarray(stored[name]) for name in ("values", "scales", "rope"))]
    operands = [0, None, Machine.thread, None, None, None]
    machine = Machine(arrays, 128 * width, operands).run(gpu_fetch.fp8_ptx(width - 64))
    decoded = np.asarray(storage.decode(stored, jnp.bfloat16))
    assert (machine.written == 1).all()
    np.testing.assert_array_equal(unswizzled(machine.shared, width), np.where(index[:, None] < 0, 0, decoded[index]))


def test_parts_fill_the_gpu_once_and_are_no_smaller_than_a_tile():
    assert [gpu.parts_of(programs, 16) for programs in (1, 2, 16, 66, 132, 4096)] == [16, 16, 8, 2, 1, 1]
    assert gpu.parts_of(1, 0) == 1


def test_only_what_the_kernel_can_multiply_and_only_on_hopper(monkeypatch):
    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    q, entries = shape(1, 8, 128, 512), shape(1, 99, 512)
    assert not gpu.supports(q, entries)  # here is no GPU
    with platforms.compiling_for("cuda"):
        assert not gpu.supports(q, entries)  # of which kind is not said, nor how many
    monkeypatch.setattr(gpu, "is_hopper", lambda: True)
    assert gpu.supports(q, entries)
    assert gpu.supports(shape(1, 8, 16, 512), entries)  # beside zeros
    assert not gpu.supports(shape(1, 8, 12, 512), entries)
    assert not gpu.supports(shape(1, 8, 64, 576), shape(1, 99, 576))
    assert not gpu.supports(q, jax.ShapeDtypeStruct(entries.shape, jnp.float32))


@pytest.mark.parametrize(
    ("capabilities", "expected"), [(["9.0"], True), (["10.0"], False), (["8.9"], False), (["9.0", "9.0"], False)]
)
def test_one_gpu_with_warpgroup_products(capabilities, expected, monkeypatch):
    gpus = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    assert platforms.is_hopper() == expected


@pytest.mark.aot
@pytest.mark.parametrize("chip", [pytest.param("h100", marks=pytest.mark.slow), "h200"])
@pytest.mark.parametrize(("length", "heads"), [(64, 128), (1, 64)], ids=["prefill", "decode"])
def test_the_kernels_compile_for_hopper(chip, length, heads):
    lse = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    shapes = bf16(1, length, heads, 512), bf16(1, 4096, 512), int32(1, length, 1024), lse
    *given, lse = arrays(chip, *shapes)
    assert compile_for(chip, lambda *x: gpu.forward(*x, SCALE), *given).as_text().count(CALL) == 1
    program = compile_for(chip, lambda *x: gpu.backward(*x, SCALE), *given, given[0], lse, given[0], lse)
    assert program.as_text().count(CALL) == 3


@pytest.mark.aot
@pytest.mark.parametrize("storage", [Plain(512, "bfloat16"), Fp8WithRope(512, 64)], ids=["bfloat16", "fp8"])
def test_entries_of_a_cache_are_read_where_they_lie(storage):
    """No copy of the pool: the program needs little memory beside its arguments, that of the parts of outputs."""
    pool = jax.eval_shape(lambda: storage.zeros((2, 4096, 32)))
    pages = Pages(pool, int32(), int32(8, 512), ByPart(storage, 32))
    q, pages, indices = arrays("h200", bf16(8, 1, 128, 512), pages, int32(8, 1, 1024))
    memory = compile_for("h200", lambda *x: gpu.forward_pages(*x, SCALE), q, pages, indices).memory_analysis()
    assert 8 * memory.temp_size_in_bytes < memory.argument_size_in_bytes
