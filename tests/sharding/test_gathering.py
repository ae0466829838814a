"""Weights made whole under `shard_map`: what every device gets, and what becomes of their gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from jax.sharding import PartitionSpec
from support import TINY

from dsv4_jax import model, weights
from sharding.gathering import whole
from sharding.mesh import make_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy

CASES = {
    "one axis": PartitionSpec("fsdp"),
    "two axes of a dimension": PartitionSpec(None, ("fsdp", "expert")),
    "two dimensions": PartitionSpec("expert", "fsdp"),
    "not spread": PartitionSpec(),
}


def gathered_and_gradients(lies, dtype):
    """Of a weight [16, 24] that eight devices multiply with a row each: whole, its gradient, and the same apart."""
    mesh, every = make_mesh({"fsdp": 4, "expert": 2}), PartitionSpec(("fsdp", "expert"))
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    weight, rows, d_out = draw(0, 16, 24), draw(1, 8, 1, 16).astype(dtype), draw(2, 8, 1, 24).astype(dtype)

    def product(part, rows):
        full = whole(part, lies, dtype)
        return jnp.einsum("dni,io->dno", rows, full.astype(dtype)), full[None]

    mapped = jax.shard_map(product, mesh=mesh, in_specs=(lies, every), out_specs=(every, every), check_vma=False)
    (_, full), backward = jax.vjp(jax.jit(mapped), weight, rows)
    gradient = backward((d_out, jnp.zeros_like(full)))[0]
    of_each = np.array([np.asarray(x, float).T @ np.asarray(d, float) for x, d in zip(rows, d_out, strict=True)])
    rounded = np.array(jnp.asarray(of_each, dtype), float).sum(0)
    return [np.asarray(x, np.float32) for x in (weight.astype(full.dtype), full, gradient, rounded)]


def all_cases(dtype):
    return {name: gathered_and_gradients(lies, jnp.dtype(dtype)) for name, lies in CASES.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_device_gets_the_whole_weight_and_its_gradient_is_the_sum(dtype):
    """A float32 sum of what each device rounds once to `dtype`: 1e-6 of the largest."""
    for name, (weight, full, gradient, wanted) in on_devices(8, all_cases, dtype).items():
        assert full.shape == (8, 16, 24) and all((one == weight).all() for one in full), name
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=name)


def gathers(dtype):
    """Result types of a small model's explicit gathers, in its gradient before it is compiled."""
    config = TINY.replace(q_lora_rank=16, n_routed_experts=8, num_nextn_predict_layers=0)
    mesh, strategy = make_mesh({"fsdp": 4, "expert": 2}), find_strategy("expert-fsdp")
    partition, tokens = MeshPartition(mesh, strategy), jnp.zeros((8, 24), jnp.int32)

    def loss(params):
        return model.forward(config, params, tokens, dtype=dtype, partition=partition).hidden.sum()

    params = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    text = jax.jit(jax.grad(loss, allow_int=True)).lower(params).as_text()
    results = re.findall(r"\"stablehlo\.(all_gather|reduce_scatter)\"\(.*?-> tensor<([\dx]*)x(\w+)>", text, re.DOTALL)
    return sorted({(kind, element) for kind, _, element in results}), len(results)


def test_weights_travel_in_the_dtype_of_the_product_and_gradients_in_float32():
    (narrow, count), (wide, same) = (on_devices(8, gathers, dtype) for dtype in ("bfloat16", "float32"))
    assert narrow == [("all_gather", "bf16"), ("reduce_scatter", "f32")]
    assert wide == [("all_gather", "f32"), ("reduce_scatter", "f32")]
    # Of every layer the experts' three matrices and attention's five, two and two of a compressor, an indexer's two.
    assert count == same > 0
