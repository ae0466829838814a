"""The TPU kernels of the grouped matmul in interpret mode, against one gathered matrix per row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from packing import pack, with_every_code

from dsv4_jax.kernels import platforms
from dsv4_jax.kernels.grouped_matmul import grouped_matmul, make_groups, reference, tpu
from dsv4_jax.kernels.packed_matmul import as_experts

INTERPRET = pltpu.InterpretParams()
EXPERTS, TILE = 4, 8
RNG = np.random.default_rng(0)
IDS = {
    "two experts without rows": np.where(np.arange(19) % 3 == 0, 1, 2),
    "one expert with all": np.full(11, 3),
    "some pairs without an expert": np.array([0, 4, 0, 4, 4, 3, 3, 1]),
    "nobody": np.full(3, 4),
}


def operands(ids, inner, outer, dtype="float32"):
    """(rows laid out by groups, with zeros in padding rows; float32 weights; groups; a gradient of the result)."""
    groups = make_groups(jnp.asarray(ids, jnp.int32)[:, None], EXPERTS, TILE)
    filled = (groups.pair_of < ids.size)[:, None]
    rows = jnp.where(filled, RNG.standard_normal((len(filled), inner)), 0).astype(dtype)
    d_out = jnp.where(filled, RNG.standard_normal((len(filled), outer)), 0).astype(dtype)
    return rows, jnp.asarray(RNG.standard_normal((EXPERTS, inner, outer)), jnp.float32), groups, d_out


def close(found, wanted, dtype):
    wanted = np.asarray(wanted, np.float64)
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(wanted).max(initial=1)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in IDS), (next(iter(IDS)), "bfloat16")])
def test_products_and_both_gradients_equal_the_reference(name, dtype):
    rows, weights, groups, d_out = operands(IDS[name], 128, 256, dtype)
    in_float32 = lambda x: x.astype(dtype).astype(jnp.float32)  # noqa: E731
    stated = lambda rows, weights: reference.grouped_matmul(rows, weights, groups)  # noqa: E731
    out, pull = jax.vjp(stated, in_float32(rows), in_float32(weights))
    d_rows, d_weights = pull(in_float32(d_out))
    close(tpu.forward(rows, weights, groups, interpret=INTERPRET), out, dtype)
    close(tpu.forward(d_out, weights, groups, transposed=True, interpret=INTERPRET), d_rows, dtype)
    found = tpu.weight_gradient(rows, d_out, weights, groups, interpret=INTERPRET)
    close(found, d_weights, "float32")
    unused = ~np.isin(np.arange(EXPERTS), IDS[name])
    assert found.dtype == weights.dtype and not np.asarray(found)[unused].any()


@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_packed_experts_are_undone_in_the_kernel(format):
    """Among the values is every code of the format."""
    rows, numbers, groups, _ = operands(IDS["two experts without rows"], 256, 128)
    packed = with_every_code(pack(numbers, format))
    assert tpu.supports(rows, packed, groups) and not tpu.supports(rows, packed, groups, transposed=True)
    wanted = reference.grouped_matmul(rows, packed.astype(jnp.float32), groups)
    close(tpu.forward(rows, packed, groups, interpret=INTERPRET), wanted, "float32")
    found = as_experts(rows[:3], packed[1], partial(tpu.forward, interpret=INTERPRET))
    close(found, rows[:3] @ packed[1].astype(jnp.float32), "float32")


def test_no_step_races_with_another():
    rows, weights, groups, d_out = operands(IDS["two experts without rows"], 128, 128, "bfloat16")
    watched = pltpu.InterpretParams(detect_races=True)
    assert np.isfinite(np.asarray(tpu.forward(rows, weights, groups, interpret=watched), np.float32)).all()
    assert np.isfinite(tpu.weight_gradient(rows, d_out, weights, groups, interpret=watched)).all()


def test_blocks_divide_their_axis_into_whole_lanes():
    for size in (128, 384, 1408, 2048, 3072, 4096, 7168):
        for most in (1, 128, 500, 1024, 1 << 20):
            block = tpu._block(size, most)
            assert size % block == 0 and block % 128 == 0 and block <= max(most, 128)


@pytest.mark.parametrize("seed", range(3))
def test_every_tile_is_visited_once_and_every_expert_at_least_once(seed):
    ids = np.random.default_rng(seed).integers(0, 9, (13, 2))
    groups = make_groups(jnp.asarray(ids, jnp.int32), 8, 4)
    tiles, experts, live = (np.asarray(x) for x in tpu._visits(groups, 8))
    used = int(groups.tiles_used)
    assert sorted(tiles[live == 1]) == list(range(used))
    np.testing.assert_array_equal(experts[live == 1], groups.expert_of_tile[tiles[live == 1]])
    assert set(experts) == set(range(8)) and (np.diff(experts) >= 0).all()


def test_the_kernels_are_in_the_program_compiled_for_tpus_where_the_shapes_allow():
    def lowered(platform, width):
        rows, weights, groups, _ = operands(IDS["nobody"], width, 128)
        loss = lambda rows, weights: grouped_matmul(rows, weights, groups).sum()  # noqa: E731
        with platforms.compiling_for(platform):
            traced = jax.jit(jax.grad(loss, (0, 1))).trace(rows, weights)
            return traced.lower(lowering_platforms=(platform,)).as_text()

    assert lowered("tpu", 128).count("tpu_custom_call") == 2  # the product itself is not needed
    assert "custom_call" not in lowered("tpu", 96)
    assert "custom_call" not in lowered("cpu", 128)
