"""The GPU kernels of the grouped matmul in interpret mode, against one gathered matrix per row; compiled for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.kernels.grouped_matmul import gpu, make_groups, product, reference, tpu, xla
from dsv4_jax.kernels.platforms import compiling_for

EXPERTS, TILE = 3, 64
RNG = np.random.default_rng(0)
FEW, MANY = np.full(3, 1), np.array([0] * 70 + [2] * 20 + [3] * 5)  # expert 3 is none


def operands(ids, inner, outer):
    """(rows laid out by groups, with zeros in padding rows; float32 weights; groups; a gradient of the result)."""
    groups = make_groups(jnp.asarray(ids, jnp.int32)[:, None], EXPERTS, TILE)
    filled = (groups.pair_of < ids.size)[:, None]
    draw = lambda width: jnp.where(filled, RNG.standard_normal((len(filled), width)), 0).astype(jnp.bfloat16)  # noqa: E731
    return draw(inner), jnp.asarray(RNG.standard_normal((EXPERTS, inner, outer)), jnp.float32), groups, draw(outer)


def in_float32(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def close(found, wanted, tolerance):
    wanted = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("ids", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_rows_are_multiplied_with_the_matrix_of_their_expert(ids, interpreter):
    """More pieces than slots; tiles that are not used are zero."""
    rows, weights, groups, _ = operands(ids, 4 * gpu.STEP, 256)
    found = gpu.forward(rows, weights, groups, interpret=interpreter)
    close(found, reference.grouped_matmul(in_float32(rows), in_float32(weights), groups), 4e-3)
    assert not np.asarray(found, np.float32)[int(groups.tiles_used) * TILE :].any()


@pytest.mark.slow
def test_gradients_of_rows_and_weights(interpreter):
    """Experts without rows have a gradient of zeros."""
    rows, weights, groups, d_out = operands(MANY, 256, 320)
    stated = lambda rows, weights: reference.grouped_matmul(rows, weights, groups)  # noqa: E731
    d_rows, _ = jax.vjp(stated, in_float32(rows), in_float32(weights))[1](in_float32(d_out))
    close(gpu.forward(d_out, weights, groups, transposed=True, interpret=interpreter), d_rows, 4e-3)
    rows, weights, groups, d_out = operands(MANY, 128, 256)
    _, d_weights = jax.vjp(stated, in_float32(rows), in_float32(weights))[1](in_float32(d_out))
    found = gpu.weight_gradient(rows, d_out, weights, groups, interpreter)
    close(found, d_weights, 1e-5)
    assert found.dtype == jnp.float32 and not np.asarray(found)[1].any()


def test_only_what_the_kernel_can_multiply_and_only_on_hopper(monkeypatch):
    rows, weights, groups, _ = operands(FEW, 128, 256)
    assert not gpu.supports(rows, weights, groups)  # here is no GPU
    with compiling_for("cuda"):
        assert not gpu.supports(rows, weights, groups)  # of which kind is not said
    monkeypatch.setattr(gpu, "are_hopper", lambda: True)
    assert gpu.supports(rows, weights, groups) and gpu.supports_gradient(rows, weights, groups)
    assert not gpu.supports(rows.astype(jnp.float32), weights, groups)
    assert not gpu.supports(rows, weights[:, :, :128], groups)
    assert not gpu.supports(rows, weights, make_groups(jnp.asarray(FEW)[:, None], EXPERTS, 8))
    assert not gpu.supports_gradient(rows, weights[:, :64], groups)
    assert gpu.supports(rows, weights.swapaxes(1, 2), groups, transposed=True)
    asked = {}
    monkeypatch.setattr(product, "by_platform", lambda *_, **backends: asked.update(backends))
    product.weight_gradient(rows, rows, weights, groups)
    assert asked["gpu"] is gpu.weight_gradient and asked["tpu"] is tpu.weight_gradient
    assert asked["xla"] is xla.weight_gradient


@pytest.mark.aot
@pytest.mark.parametrize("tile", [64, 128])
def test_the_kernels_compile_for_hopper_and_copy_only_the_masters(tile):
    from sharding.targets import parse_target

    target, experts, inner, outer = parse_target("h200:1x1"), 8, 1024, 512
    here = jax.sharding.SingleDeviceSharding(target.devices()[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)  # noqa: E731
    ids = jax.ShapeDtypeStruct((2048, 2), jnp.int32)
    groups = jax.eval_shape(lambda ids: make_groups(ids, experts, tile), ids)
    groups = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), groups)
    rows, d_out = (array(groups.pair_of.shape[0], width) for width in (inner, outer))
    masters = array(experts, inner, outer, dtype=jnp.float32)
    in_bf16 = 2 * experts * inner * outer
    programs = {
        "forward": (gpu.forward, (rows, masters, groups), in_bf16),
        "rows": (lambda *x: gpu.forward(*x, transposed=True), (d_out, masters, groups), in_bf16),
        "weights": (gpu.weight_gradient, (rows, d_out, masters, groups), 0),
    }
    for name, (function, arguments, copied) in programs.items():
        compiled = jax.jit(lambda *x, f=function: f(*x)).lower(*arguments).compile(target.compiler_options)
        assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1, name
        assert compiled.memory_analysis().temp_size_in_bytes < copied + (1 << 16), name
