"""The GPU kernel for packed experts: against the reference, its PTX thread by thread, and compiled for Hopper."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from grouped_costs import abstract_packed
from packing import pack, with_every_code
from ptx import Machine

from dsv4_jax.kernels import packed_matmul
from dsv4_jax.kernels.grouped_matmul import gpu, gpu_undo, make_groups, product, reference
from dsv4_jax.kernels.packed_matmul import as_experts
from dsv4_jax.quantization.packed import Packed

EXPERTS = 3
RNG = np.random.default_rng(0)
FEW, MANY = np.array([1, 1, 3, 2]), np.array([0] * 70 + [2] * 20 + [3] * 5)  # expert 3 is none
KINDS = [("fp8", 128), ("fp8", 32), ("fp4", 32)]  # and how many inputs share a scale


def operands(format, ids, tile, inner, outer):
    """(rows laid out by groups, with zeros in padding rows; packed weights; groups): small whole numbers."""
    groups = make_groups(jnp.asarray(ids, jnp.int32)[:, None], EXPERTS, tile)
    filled = (groups.pair_of < ids.size)[:, None]
    rows = jnp.where(filled, RNG.integers(-3, 4, (len(filled), inner)), 0).astype(jnp.bfloat16)
    weights = jnp.asarray(RNG.integers(-15, 16, (EXPERTS, inner, outer)), jnp.float32)
    return rows, with_every_code(pack(weights, format)), groups


def close(found, wanted):
    """To the rounding of BF16, in which results leave; sums are float32 in another order."""
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("format", "ids", "tile", "inner", "outer"),
    [
        ("fp8", FEW, 8, 320, 256),
        ("fp4", FEW, 8, 320, 256),
        pytest.param("fp8", MANY, 64, 128, 512, marks=pytest.mark.slow),
        pytest.param("fp4", MANY, 128, 192, 256, marks=pytest.mark.slow),
    ],
)
def test_rows_are_multiplied_with_the_packed_matrix_of_their_expert(format, ids, tile, inner, outer, interpreter):
    """An expert without rows, a pair without an expert, unused tiles, which are zero, and every code of the format.

    Sums of whole numbers are exact in float32, so results are the reference's to the bit, but for the column of codes.
    """
    rows, packed, groups = operands(format, ids, tile, inner, outer)
    found = gpu.forward(rows, packed, groups, interpret=interpreter)
    assert found.dtype == rows.dtype and not np.asarray(found, np.float32)[int(groups.tiles_used) * tile :].any()
    wanted = reference.grouped_matmul(rows.astype(jnp.float32), packed.astype(jnp.float32), groups)
    close(found, wanted)
    np.testing.assert_array_equal(found[:, 1:], wanted[:, 1:].astype(found.dtype))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_matrix_alone_in_float32_whole_and_in_parts(parts, interpreter):
    rows, packed, _ = operands("fp4", FEW, 8, 128, 256)
    found = as_experts(rows[:3], packed[1], partial(gpu.forward, interpret=interpreter), parts)
    wanted = rows[:3].astype(jnp.float32) @ packed[1].astype(jnp.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_parts_fill_the_gpu_once_and_are_long_enough():
    matrix = lambda inner, outer: jax.eval_shape(lambda: pack(jnp.ones((inner, outer)), "fp8"))  # noqa: E731
    assert [gpu.parts_of(matrix(4096, 2048), tiles) for tiles in (1, 2, 4, 99)] == [16, 8, 4, 1]
    assert gpu.parts_of(matrix(7168, 3072), 1) == 7 and gpu.parts_of(matrix(320, 256), 1) == 1


def as_copied(values):
    """Bytes [n, 128] as they lie in shared memory: the 16 at place p of row r at place p ^ (r % 8)."""
    blocks = values.reshape(-1, 8, 8, 16)
    rows, places = np.mgrid[:8, :8]
    return blocks[:, rows, places ^ rows].reshape(-1)


def undone_by_threads(format, groups):
    """(the BF16 numbers that threads have, as the left operand [128, 64] of a product; what they stand for)."""
    rng = np.random.default_rng(groups)
    values = rng.integers(0, 256, (64 if format == "fp8" else 32, 128), np.uint8)
    scales = rng.integers(100, 150, (groups, 128), np.uint8)
    shared = np.concatenate([as_copied(values), scales.reshape(-1)])
    outputs = [0] * gpu_undo.OPERANDS
    machine = Machine([], shared, [*outputs, 0, values.size, Machine.thread])
    machine.run(gpu_undo.undo_ptx(format, groups))
    assert machine.bank_conflicts == 0
    pairs = np.stack([machine.registers[f"${i}"] for i in range(len(outputs))], 1).astype(np.uint32)
    # warp, row, quad | half, eight, row + 8, pair
    numbers = pairs.view(ml_dtypes.bfloat16).reshape(4, 8, 4, 2, 8, 2, 2)
    operand = numbers.transpose(3, 0, 5, 1, 4, 2, 6).reshape(128, 64)
    stated = Packed(values, scales, format, (64 // groups, 1), "bfloat16").astype(ml_dtypes.bfloat16)
    return operand, stated.T


def written_by_threads(format, result, dtype):
    """[128, n] float32, as a product leaves it in registers, written as [n, 128] into rows of 256."""
    count = result.shape[1]
    parts = result.reshape(2, 4, 2, 8, count // 8, 4, 2)  # half, warp, row + 8, row | eight, quad, pair
    array = np.zeros((count, 256), dtype)
    for eight in range(count // 8):
        order = [(half, low, pair) for half in (0, 1) for low in (0, 1) for pair in (0, 1)]
        numbers = [parts[half, :, low, :, eight, :, pair].reshape(-1) for half, low, pair in order]
        text = gpu_undo.write_ptx(format, 8 * eight, array.shape[1], array.itemsize)
        machine = Machine([array], 0, [None, Machine.thread, *numbers]).run(text)
        array = machine.arrays[0].view(dtype).reshape(array.shape)
    assert not array[:, 128:].astype(np.float32).any()
    return array[:, :128]


@pytest.mark.parametrize(("format", "group"), KINDS)
def test_threads_undo_every_number_exactly_and_write_columns_in_their_order(format, group):
    """Rows of the left operand are columns in an order of the kernel's own, the same on both ways."""
    layout = gpu_undo.NUMBERS.layout.to_mgpu()
    assert [size for size in layout.registers_shape((128, 64)) if size > 1] == [2, 8, 2]  # half, eight, row + 8
    operand, stated = undone_by_threads(format, 64 // min(group, 64))
    for dtype in (np.float32, ml_dtypes.bfloat16):
        columns = written_by_threads(format, operand.astype(np.float32), dtype)
        np.testing.assert_array_equal(columns.T.astype(np.float32), stated.astype(np.float32))


def test_only_what_the_kernel_can_undo_and_only_on_hopper(monkeypatch):
    rows, packed, groups = operands("fp8", FEW, 8, 128, 256)
    assert not gpu.supports(rows, packed, groups)  # here is no GPU
    monkeypatch.setattr(gpu, "are_hopper", lambda: True)
    assert gpu.supports(rows, packed, groups) and gpu.supports_packed(rows, packed[0])
    assert gpu.supports(rows, pack(jnp.ones((3, 64, 256)), "fp4"), groups)
    assert not gpu.supports(rows, packed, groups, transposed=True)
    assert not gpu.supports(rows.astype(jnp.float32), packed, groups)
    assert not gpu.supports(rows, packed.columns(0, 128), groups)
    assert not gpu.supports(rows, pack(jnp.ones((3, 96, 256)), "fp8"), groups)
    in_float32 = Packed(packed.values, packed.scales.astype(jnp.float32), "fp8", packed.tile, "bfloat16")
    assert not gpu.supports(rows, in_float32, groups)
    assert not gpu.supports(rows, packed, make_groups(jnp.asarray(FEW)[:, None], EXPERTS, 256))


def test_products_with_packed_matrices_ask_for_the_kernel(monkeypatch):
    rows, packed, groups = operands("fp8", FEW, 8, 512, 256)
    monkeypatch.setattr(gpu, "are_hopper", lambda: True)
    asked = []
    for module in (product, packed_matmul):
        monkeypatch.setattr(module, "by_platform", lambda x, *_, gpu, **others: asked.append(gpu) or x)
    product.multiply(rows, packed, groups)
    packed_matmul.packed_dot(rows, packed[0])
    assert asked[0].func is gpu.forward
    assert asked[1].keywords == {"forward": gpu.forward, "parts": 2}


def abstract(chip):
    """(the machine, a function from shape and dtype to an array on it)."""
    from sharding.targets import parse_target

    target = parse_target(f"{chip}:1x1")
    here = jax.sharding.SingleDeviceSharding(target.devices()[0])
    return target, lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)


@pytest.mark.aot
@pytest.mark.parametrize("format", ["fp8", "fp4"])
@pytest.mark.parametrize("tile", [8, 128], ids=["decode", "prefill"])
def test_the_kernel_compiles_for_hopper_without_undone_weights_and_spills(format, tile, monkeypatch, capfd):
    # It says nothing of a kernel that it has compiled before: as many pairs as in no other test.
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    ids = jax.ShapeDtypeStruct((1920, 2), jnp.int32)
    for target, array in map(abstract, ("h100", "h200")):
        packed = abstract_packed(array, format)
        groups = jax.eval_shape(partial(make_groups, experts=len(packed), tile=tile), ids)
        groups = jax.tree.map(lambda x, array=array: array(*x.shape, dtype=x.dtype), groups)
        rows = array(groups.pair_of.shape[0], packed.shape[1])
        compiled = jax.jit(lambda *x: gpu.forward(*x)).lower(rows, packed, groups).compile(target.compiler_options)
        assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1
        assert compiled.memory_analysis().temp_size_in_bytes < packed.values.size / 64  # FP8 scales of every column
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", "".join(capfd.readouterr()))
    assert spilled and set(spilled) == {("0", "0")}


@pytest.mark.aot
@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_a_matrix_alone_is_read_where_it_lies(format):
    target, array = abstract("h200")
    packed = abstract_packed(lambda _, *shape, dtype: array(*shape, dtype=dtype), format)
    run = partial(as_experts, forward=gpu.forward, parts=4)
    compiled = jax.jit(run).lower(array(4, packed.shape[0]), packed).compile(target.compiler_options)
    # 16 rows, and results in float32 for each part of their inputs.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 16 * (2 * packed.shape[0] + 4 * 4 * packed.shape[1])
