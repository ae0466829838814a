"""Compressors, indexer and whole attention layers against the float64 loops of the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from support import TINY, blocks_in_order, check_gradients, random_params

from dsv4_jax.config import CSA, HCA
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.compressor import Compressor
from dsv4_jax.layers.indexer import Indexer, hadamard
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.layers.rotary import frequencies
from dsv4_jax.quantization.policy import NONE

RNG = np.random.default_rng(0)
LENGTH = 23
COMPRESS = np.asarray(frequencies(TINY.compress_rope_theta, TINY.qk_rope_head_dim, TINY.rope_scaling), np.float64)
FRESH = [jax.tree.map(np.asarray, block["attn"]) for block in blocks_in_order(TINY, random_params(TINY))]


def merge_into(module, values):
    """The module with `values`, a tree of its parameters."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (6, False), (3, True)])
def test_compressors_pool_their_blocks(ratio, overlap):
    width, channels = 12, 24 if overlap else 12
    module = Compressor(TINY, ratio, width, overlap, "compressor", nnx.Rngs(0))
    blocks = make_layout(
        TINY.replace(compress_ratios=(0, ratio, ratio, 0), layer_types=TINY.layer_types), 1, LENGTH, None
    ).blocks[CSA if overlap else HCA, ratio]
    names, shapes = ("wkv", "wgate", "ape", "norm"), ((32, channels), (32, channels), (ratio, channels), (width,))
    args = [RNG.normal(size=(1, LENGTH, 32)), *(RNG.normal(size=shape) / 3 for shape in shapes)]
    ours = lambda x, *values: merge_into(module, dict(zip(names, values, strict=True)))(x, blocks)  # noqa: E731
    stated = lambda x, *values: oracle.compress(  # noqa: E731
        x[0], dict(zip(names, values, strict=True)), ratio, overlap, COMPRESS
    )[None]
    check_gradients(ours, stated, args, tolerance=2e-4)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_hadamard_is_the_orthogonal_matrix_of_parities(size):
    matrix = np.asarray(hadamard(jnp.eye(size)))
    parity = [[(i & j).bit_count() for j in range(size)] for i in range(size)]
    np.testing.assert_allclose(matrix, (-1.0) ** np.array(parity) / np.sqrt(size), rtol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


def test_hadamard_of_other_sizes_is_orthogonal_in_blocks():
    matrix = np.asarray(hadamard(jnp.eye(20)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(20), atol=1e-6)
    assert not matrix[:4, 4:].any()


def test_index_scores_and_that_the_indexers_input_is_detached():
    index = next(i for i, spec in enumerate(TINY.layers) if spec.attention == CSA)
    indexer = merge_into(Indexer(TINY, 4, nnx.Rngs(0)), FRESH[index]["indexer"])
    layout = make_layout(TINY, 1, LENGTH, None)
    x, qr = (jnp.asarray(RNG.normal(size=(1, LENGTH, width)), jnp.float32) for width in (32, 12))
    scores = lambda x, qr: indexer(x, qr, layout.rope["compress"], layout.blocks[CSA, 4], NONE).scores()  # noqa: E731
    stated = oracle.index_scores(*double((x[0], qr[0], FRESH[index]["indexer"])), TINY, 4, COMPRESS)
    np.testing.assert_allclose(jax.jit(scores)(x, qr)[0], stated, rtol=0, atol=1e-5)
    for gradient in jax.jit(jax.grad(lambda *args: scores(*args).sum(), (0, 1)))(x, qr):
        assert not gradient.any()


def run(config, index, mode, x):
    """Our layer `index` on x [1, S, D]."""
    layer = merge_into(Attention(config, config.layers[index], nnx.Rngs(0)), FRESH[index])
    options = AttentionOptions(mode, False, NONE)
    return jax.jit(lambda x: layer(x, make_layout(config, 1, x.shape[1], None), options)[0])(x)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("index", range(3))
def test_every_kind_of_layer_is_one_joint_softmax(index, mode):
    x = jnp.asarray(RNG.normal(size=(1, LENGTH, 32)), jnp.float32)
    stated, _ = oracle.attention(*double((x[0], FRESH[index])), TINY.layers[index], TINY, mode)
    np.testing.assert_allclose(run(TINY, index, mode, x)[0], stated, rtol=0, atol=1e-5)


def test_sparse_equals_dense_when_topk_holds_every_entry_and_differs_otherwise():
    x = jnp.asarray(RNG.normal(size=(1, LENGTH, 32)), jnp.float32)
    dense = run(TINY, 1, "dense", x)
    entries = LENGTH // 4
    everything = run(TINY.replace(index_topk=entries), 1, "sparse", x)
    np.testing.assert_allclose(everything, dense, rtol=0, atol=1e-6)
    one_less = np.abs(run(TINY.replace(index_topk=entries - 1), 1, "sparse", x) - dense).max(-1)[0]
    # Queries that see fewer entries than top-k still attend them all; only the last ones drop one.
    assert (one_less[: 4 * entries - 1] < 1e-6).all()
    assert (one_less[4 * entries - 1 :] > 1e-3).all()


def test_the_sink_takes_mass_and_gives_nothing():
    x = jnp.asarray(RNG.normal(size=(1, LENGTH, 32)), jnp.float32)
    sink = FRESH[0]["attn_sink"]
    try:
        FRESH[0]["attn_sink"] = np.full_like(sink, 60.0)
        assert np.abs(run(TINY, 0, "sparse", x)).max() < 1e-6
    finally:
        FRESH[0]["attn_sink"] = sink
