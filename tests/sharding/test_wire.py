"""What a precision policy has rounded travels in FP8, and arrives with the bits that it would have had in BF16."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from jax.sharding import NamedSharding, PartitionSpec
from support import TINY, random_params

from dsv4_jax.config import CSA
from dsv4_jax.kernels.platforms import compiling_for
from dsv4_jax.quantization.rounding import Rounding, bf16
from sharding import wire
from sharding.mesh import make_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy
from train.losses import OBJECTIVES
from train.optimizer import OptimizerConfig
from train.schedule import warmup_constant_cosine
from train.step import Precision, StepPlan, batch_gradients

ROUNDINGS = {
    "FP8 matrix": Rounding("fp8", (128, 128)),
    "FP8 tokens": Rounding("fp8", (1, 128)),
    "FP4 matrix": Rounding("fp4", (32, 1)),
    "FP4 tokens": Rounding("fp4", (1, 32)),
}
CONFIG = TINY.replace(
    hidden_size=512, num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,), num_hash_layers=0,
    num_nextn_predict_layers=0, n_routed_experts=8, q_lora_rank=16,
)  # fmt: skip


def drawn(rounding, dtype, shape=(256, 384)):
    """Rounded numbers of every size: some rows and columns are far larger or zero, one tile is infinite, one NaN."""
    rng = np.random.default_rng(0)
    powers = rng.integers(-40, 40, (shape[0], 1)) + rng.integers(-9, 9, shape[1])
    x = rng.normal(size=shape) * np.exp2(powers) * (rng.random((shape[0], 1)) > 0.2)
    x[3, 5], x[200, 300] = np.inf, np.nan
    return rounding(jnp.asarray(x, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounded_numbers_are_the_same_after_their_travel(name, dtype):
    x = drawn(ROUNDINGS[name], dtype)
    tile = wire.tile_of(ROUNDINGS[name])
    for part in (x, x[:128], x[128:, 128:256], x[48:64], x[:, 96:128]):  # whole tiles, or a piece of each
        again = wire._numbers(*wire._bytes(part, tile), tile, part.dtype)
        np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(part, np.float32))
    if tile[0] == 1:
        rows = wire.rows_as_bytes(x, tile)
        assert rows.dtype == jnp.uint8 and rows.shape == (256, 384 + 384 // tile[1])
        again = wire.rows_of_bytes(rows, 384, tile, x.dtype)
        np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(x, np.float32))


def test_only_what_is_known_to_be_rounded_travels_so_and_not_to_tpus():
    assert wire.tile_of(None) is None and wire.tile_of(bf16) is None
    assert wire.tile_of(Rounding("fp8", (1, 64), plain=8)) is None
    assert wire.tile_of(ROUNDINGS["FP8 tokens"]) == (1, 128)
    with compiling_for("tpu"):
        assert wire.tile_of(ROUNDINGS["FP8 tokens"]) is None
    assert wire.keeps_tiles((128, 100), 0, (128, 128)) and wire.keeps_tiles((3, 100, 256), 0, (128, 128))
    assert wire.keeps_tiles((64, 128), 0, (128, 128)) and wire.keeps_tiles((2, 256, 16), 2, (128, 128))
    assert not wire.keeps_tiles((48, 128), 0, (128, 128)) and not wire.keeps_tiles((2, 256, 200), 2, (128, 128))
    assert wire.keeps_tiles((2, 96, 7), 2, (32, 1)) and not wire.keeps_tiles((2, 48, 8), 1, (32, 1))


def gathered():
    """By rounding and dimension: whether every device of four has just what a gather in BF16 gives."""
    mesh, found = make_mesh({"fsdp": 2, "expert": 2}), {}
    for name, rounding in ROUNDINGS.items():
        x = drawn(rounding, "bfloat16", (512, 512))
        x = jnp.where(jnp.isfinite(x), x, 0)
        if "matrix" in name:
            x = jnp.stack([x, 2 * x, x / 4, -x])
        for dimension in range(x.ndim):
            lies = PartitionSpec(*(None,) * dimension, ("fsdp", "expert"))

            def run(part, rounding=rounding, dimension=dimension):
                axes = ("fsdp", "expert")
                ours = wire.gather_rounded(part, axes, dimension, rounding.tile, part.dtype)
                return (ours == jax.lax.all_gather(part, axes, axis=dimension, tiled=True)).all()[None]

            every = PartitionSpec(("fsdp", "expert"))
            mapped = jax.shard_map(run, mesh=mesh, in_specs=lies, out_specs=every, check_vma=False)
            same = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, lies)))
            found[name, dimension] = same.shape == (4,) and bool(same.all())
    return found


def test_gathers_give_every_device_the_same_bits():
    found = on_devices(4, gathered)
    assert len(found) == 10 and all(found.values()), found


def trained(policy):
    """Gradients of a model on eight devices, with and without FP8 on its way; and which collectives bring bytes."""
    rng = np.random.default_rng(1)
    data = {"tokens": rng.integers(0, CONFIG.vocab_size, (8, 24)).astype(np.int32)}
    data["segment_ids"] = np.ones_like(data["tokens"])
    partition = MeshPartition(make_mesh({"fsdp": 4, "expert": 2}), find_strategy("expert-fsdp"))
    schedule = warmup_constant_cosine(1e-3, 1e-4, 0, 5, 10)
    plan = StepPlan(CONFIG, schedule, 5, OptimizerConfig(), precision=Precision(policy=policy), partition=partition)
    params = random_params(CONFIG)
    params = jax.device_put(params, plan.placement.state(params))
    step = lambda params, batch: batch_gradients(plan, OBJECTIVES["sparse"], 1, params, batch, 0.3)  # noqa: E731
    run = jax.jit(step).lower(params, plan.placement.to_devices(data, 8))
    bytes_by = re.findall(r"stablehlo\.(all_gather|all_to_all)\"\(.*?-> tensor<[\dx]*xui8>", run.as_text(), re.DOTALL)
    ours = jax.device_get(run.compile()(params, plan.placement.to_devices(data, 8)))
    wire.compiled_for = lambda: "tpu"
    jax.clear_caches()
    plain = jax.jit(step)(params, plan.placement.to_devices(data, 8))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), ours, jax.device_get(plain))
    return jax.tree.leaves(same), sorted(set(bytes_by)), float(ours[1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["v4", "fp8"])
def test_a_step_with_rounding_has_the_same_bits_whatever_travels(policy):
    same, kinds, loss = on_devices(8, trained, policy)
    assert all(same) and np.isfinite(loss)
    assert kinds == ["all_gather", "all_to_all"]
