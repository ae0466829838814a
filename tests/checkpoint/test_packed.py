"""Matrices that stay packed: the checkpoint's bytes in memory, the same numbers, no dequantised copy beside them."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_release import EVEN, SMALL, make_release, stored_as, write_folder

import dsv4_jax as dsv4
from dsv4_jax import weights
from dsv4_jax.checkpoint import load_checkpoint, packing, save
from dsv4_jax.checkpoint.storage import inventory, total_bytes
from dsv4_jax.config import CSA
from dsv4_jax.kernels.grouped_matmul import grouped_matmul, make_groups
from dsv4_jax.layers.norm import dense, dense_by_group
from dsv4_jax.presets import preset
from dsv4_jax.quantization.formats import quantise_fp4, quantise_fp8_tiles
from dsv4_jax.quantization.packed import Packed, packed_arrays
from dsv4_jax.quantization.policy import precision_policy
from dsv4_jax.shapes import flatten, is_table

sys.path.append(str(Path(__file__).parents[1] / "sharding"))
RNG = np.random.default_rng(0)
TWO = SMALL.replace(num_hidden_layers=2, layer_types=(CSA, CSA), compress_ratios=(4, 4, 0), num_hash_layers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("packed") / "fp4", TWO, make_release(TWO)[0])


def a_matrix(format, *shape, tile=(128, 128)):
    """(random matrices [.., in, out] as Packed, the same in float32)."""
    x = RNG.standard_normal(shape).astype(np.float32).swapaxes(-1, -2)
    values, scales = quantise_fp8_tiles(x, tile[::-1]) if format == "fp8" else quantise_fp4(x)
    tile = tile if format == "fp8" else (32, 1)
    parts = (jnp.asarray(part.view(np.uint8).swapaxes(-1, -2)) for part in (values, scales))
    packed = Packed(*parts, format, tile, "bfloat16")
    return packed, packed.astype(jnp.float32)


@pytest.mark.parametrize(
    ("config", "scheme", "experts"),
    [
        pytest.param(SMALL, "released", "fp4", id="release"),
        pytest.param(EVEN, "released", "fp4", id="even"),
        pytest.param(SMALL.replace(expert_dtype=None), "transformers", "fp8", id="transformers base"),
    ],
)
def test_packed_leaves_are_the_quantised_ones_and_hold_the_same_numbers(config, scheme, experts, tmp_path):
    folder = write_folder(tmp_path / "q", config, make_release(config, scheme, experts)[0], scheme)
    found_config, plain = load_checkpoint(folder)
    packed = flatten(load_checkpoint(folder, packed=True)[1])
    for path, leaf in flatten(plain).items():
        quantised = stored_as(path, experts) != "plain"
        assert isinstance(packed[path], Packed) == quantised, path
        assert packed[path].shape == leaf.shape and np.asarray(packed[path]).tobytes() == leaf.tobytes(), path
    stored = total_bytes(inventory(found_config, scheme)) - sum(4 * x.size for p, x in packed.items() if is_table(p))
    tiles = sum(x.scales.nbytes for x in packed.values() if isinstance(x, Packed) and 0 < x.tile[1] % 128)
    held = sum(leaf.nbytes for leaf in packed.values())
    assert held == stored if config is EVEN else stored <= held < 1.01 * stored + tiles


def test_a_matrix_grows_on_its_device_to_the_same_bytes(folder, monkeypatch):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = load_checkpoint(folder, one, packed=True)[1]
    monkeypatch.setattr(packing, "STAGING", 0)
    grown = load_checkpoint(folder, one, packed=True)[1]
    jax.tree.map(np.testing.assert_array_equal, whole, grown)
    assert len(packed_arrays(grown)) == len(packed_arrays(whole)) > 20


def test_v4_flash_weighs_packed_what_it_weighs_on_disk():
    """Every leaf's shape from the rules that loading uses, nothing allocated."""
    config = preset("v4-flash")
    shapes = packing.abstract_leaves(config, jnp.bfloat16)
    held = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    tables = sum(4 * x.size for path, x in shapes.items() if is_table(path))  # int64 on disk
    assert held == total_bytes(inventory(config)) - tables == 159_609_485_896 - tables


@pytest.mark.parametrize(("format", "tile"), [("fp8", (128, 128)), ("fp8", (128, 24)), ("fp4", None)])
@pytest.mark.parametrize("outputs", [96, 1272])
def test_products_and_their_gradients_are_those_of_the_numbers(format, tile, outputs):
    packed, numbers = a_matrix(format, 2, 320, outputs, tile=tile)
    x = jnp.asarray(RNG.standard_normal((2, 7, 320)), jnp.float32)
    np.testing.assert_allclose(jax.jit(dense)(x, packed[1]), x @ numbers[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(jax.jit(dense_by_group)(x, packed), x @ numbers, rtol=0, atol=1e-4)
    slope = jax.grad(lambda x, weight: jnp.sin(dense(x, weight) / 100).sum())
    np.testing.assert_allclose(jax.jit(slope)(x, packed[1]), slope(x, numbers[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_experts_are_multiplied_as_their_numbers_and_pass_gradients_to_the_rows(format):
    packed, numbers = a_matrix(format, 5, 64, 40)
    groups = make_groups(jnp.asarray(RNG.integers(0, 5, (9, 2)), jnp.int32), 5, 4)
    rows = jnp.asarray(RNG.standard_normal((groups.pair_of.size, 64)), jnp.float32)
    run = lambda rows, weights: grouped_matmul(rows, weights, groups)  # noqa: E731
    slope = jax.jit(jax.grad(lambda rows, weights: jnp.sin(run(rows, weights)).sum()))
    np.testing.assert_array_equal(jax.jit(run)(rows, packed), jax.jit(run)(rows, numbers))
    np.testing.assert_allclose(slope(rows, packed), slope(rows, numbers), atol=1e-5)


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("format", ["fp8", "fp4"])
def test_no_dequantised_copy_is_ever_whole(format):
    """Of 16,384 outputs a step undoes 512, of 16 experts one: the float32 copies would be 32 and 16 MiB."""
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    wide = jax.eval_shape(lambda: Packed(*_zeros(format, (512, 16384)), "bfloat16"))
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    assert temporary_bytes(dense, x, wide) < 512 * 16384 * 4 / 8
    experts = jax.eval_shape(lambda: Packed(*_zeros(format, (16, 512, 512)), "bfloat16"))
    groups = abstract(make_groups(jnp.zeros((32, 2), jnp.int32), 16, 8))
    rows = jax.ShapeDtypeStruct((groups.pair_of.size, 512), jnp.bfloat16)
    assert temporary_bytes(grouped_matmul, rows, experts, groups) < 16 * 512 * 512 * 4 / 8


def _zeros(format, shape):
    *lead, rows, columns = shape
    tile = (128, 128) if format == "fp8" else (32, 1)
    values = jnp.zeros((*lead, rows // (1 if format == "fp8" else 2), columns), jnp.uint8)
    return values, jnp.zeros((*lead, -(-rows // tile[0]), -(-columns // tile[1])), jnp.uint8), format, tile


def test_a_model_computes_the_same_from_packed_weights(folder):
    """A dozen tokens through tiles of experts, stacked; one token pair by pair, laid apart; the MTP module too."""
    plain, packed = dsv4.load(folder), dsv4.load(folder, packed=True)
    assert len(packed_arrays(packed.params)) > 20
    tokens = np.random.default_rng(1).integers(0, TWO.vocab_size, (1, 12))
    run = jax.jit(lambda params, tokens: plain.forward(params, tokens, mtp=True, dtype=jnp.float32)[:3])
    for lay, count in ((lambda params: params, 12), (weights.unstack, 1)):
        ours, theirs = (run(lay(model.params), tokens[:, :count]) for model in (packed, plain))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_packed_parameters_are_rounded_already_and_are_written_as_they_are(folder, tmp_path):
    config, packed = load_checkpoint(folder, packed=True)
    policy = precision_policy("v4", config)
    kept = flatten(policy.weights(weights.facts(config), jax.tree.map(jnp.asarray, packed)))
    assert all(isinstance(kept[path], Packed) for path, leaf in flatten(packed).items() if isinstance(leaf, Packed))
    save(tmp_path / "out", config, packed)
    before, after = (flatten(load_checkpoint(place)[1]) for place in (folder, tmp_path / "out"))
    for path, leaf in before.items():
        assert after[path].tobytes() == leaf.tobytes(), path


def on_a_mesh(folder: str) -> list:
    """Packed leaves on four devices against those of one: how many are spread, and whether all bytes agree."""
    from sharding.mesh import make_mesh
    from sharding.rules import find_strategy, parameter_shardings

    config, alone = load_checkpoint(folder, packed=True)
    shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    mesh, rules = make_mesh({"expert": 2, "tensor": 2}), find_strategy("expert-tensor").parameters
    places = parameter_shardings(weights.facts(config), shapes, rules, mesh)
    spread = load_checkpoint(folder, places, packed=True)[1]
    kept = [x for x in flatten(spread).values() if isinstance(x, Packed)]
    plain = [
        p for p, x in flatten(alone).items() if isinstance(x, Packed) and not isinstance(flatten(spread)[p], Packed)
    ]
    same = all(np.asarray(x).tobytes() == np.asarray(flatten(alone)[p]).tobytes() for p, x in flatten(spread).items())
    return [len(kept), plain, same, sum(not x.values.is_fully_replicated for x in kept)]


def test_packed_matrices_are_spread_over_devices_where_no_tile_is_cut(tmp_path):
    from devices import on_devices

    folder = write_folder(tmp_path / "even", EVEN, make_release(EVEN)[0])
    kept, plain, same, spread = on_devices(4, on_a_mesh, str(folder))
    assert same and kept > 20 and spread > 10
    assert all("shared_experts" in path or path.endswith(("wq_b", "wo_a", "wo_b")) for path in plain), plain


def test_what_compile_is_asked_for_is_what_loading_gives(folder):
    """The tree of parameters of a decoding program, against that of a loaded folder: structure, shapes, dtypes."""
    from dsv4_jax.cli.compile_programs import Setting, inference_parameters
    from sharding.mesh import make_mesh
    from sharding.partition import MeshPartition
    from sharding.rules import find_strategy

    mesh, strategy = make_mesh({}, jax.devices()[:1]), find_strategy("one")
    setting = Setting(TWO, mesh, strategy, MeshPartition(mesh, strategy), 1, 64, weights="packed")
    asked, (_, loaded) = inference_parameters(setting), load_checkpoint(folder, packed=True)
    assert jax.tree.structure(asked) == jax.tree.structure(loaded)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), asked, loaded)
    assert all(jax.tree.leaves(same))
