"""Heads over a tensor axis: a cache read by devices with heads of their own gives what one device gives."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from devices import on_devices
from flax import nnx
from jax.sharding import PartitionSpec as P
from support import TINY, random_params

from dsv4_jax import model, weights
from dsv4_jax.config import CSA
from dsv4_jax.kernels import platforms
from dsv4_jax.layers import kv_cache
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.observer import Observer
from dsv4_jax.partition import ALONE
from dsv4_jax.quantization.packed import Packed
from dsv4_jax.quantization.policy import NONE
from sharding.mesh import make_mesh
from sharding.own_heads import head_specs, splits_heads
from sharding.partition import MeshPartition
from sharding.rules import find_strategy, parameter_shardings

CONFIG = TINY.replace(n_routed_experts=8)
MESHES = [{"data": 2, "tensor": 2}, {"expert": 2, "tensor": 2}]
STRATEGY = find_strategy("expert-tensor")


def steps(partition, params, tokens):
    """Logits of a prompt in two chunks and of three tokens after it, and everything that the cache then holds."""
    cache = kv_cache.init_cache(CONFIG, 2, 64)
    run = jax.jit(lambda params, tokens, cache: model.forward(CONFIG, params, tokens, cache=cache, partition=partition))
    logits = []
    for begin, end in ((0, 20), (20, 40), (40, 41), (41, 42), (42, 43)):
        out = run(params, tokens[:, begin:end], cache)
        cache = out.cache
        logits.append(np.asarray(out.logits))
    return np.concatenate(logits, 1), jax.tree.map(np.asarray, (cache.states, cache.pools))


def differences():
    """Largest difference of logits and of what is remembered, for each mesh."""
    params = random_params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 43)).astype(np.int32)
    alone, found = steps(ALONE, params, tokens), []
    for axes in MESHES:
        mesh = make_mesh(axes)
        placed = jax.device_put(params, parameter_shardings(weights.facts(CONFIG), params, STRATEGY.parameters, mesh))
        ours = steps(MeshPartition(mesh, STRATEGY), placed, tokens)
        found.append([float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours, alone)), strict=True)])
    return found


def test_a_cache_read_with_heads_on_two_devices_is_that_of_one():
    for apart in on_devices(4, differences):
        assert max(apart) < 2e-5, apart


def kernels_in_a_decoding_step():
    """Kernels' names, and whether anything is summed, in a step traced for Hopper: two devices with 16 heads each."""
    platforms.are_hopper = lambda: True
    config = TINY.replace(
        num_attention_heads=32,
        head_dim=128,
        qk_rope_head_dim=64,
        index_n_heads=64,
        index_head_dim=128,
        compress_ratios=(0, 4, 128, 0),
    )
    cache = jax.eval_shape(lambda: kv_cache.init_cache(config, 2, 256, "deployed"))
    partition = MeshPartition(make_mesh({"tensor": 2}), STRATEGY)

    def step(params, tokens, cache):
        return model.forward(config, params, tokens, cache=cache, dtype=jnp.bfloat16, partition=partition).logits

    params = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    with platforms.compiling_for("cuda"):
        text = str(jax.make_jaxpr(step)(params, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache))
    return sorted(set(re.findall(r"((?:gather|range)_attention|paged_index_scores)\n", text))), "psum" in text


def test_devices_with_their_own_heads_take_the_kernels():
    names, summed = on_devices(2, kernels_in_a_decoding_step)
    assert names == ["gather_attention", "paged_index_scores", "range_attention"]
    assert summed


def test_heads_are_split_only_where_every_device_gets_whole_ones():
    """Four heads in two output groups: two devices get whole ones, three or four do not; nor may anyone look at all."""
    spec = next(layer for layer in CONFIG.layers if layer.attention == CSA)
    layer = nnx.eval_shape(lambda: Attention(CONFIG, spec, nnx.Rngs(0)))
    options = AttentionOptions("sparse", False, NONE)

    def fits(ways, layer=layer, options=options, strategy=STRATEGY):
        return splits_heads(layer, options, strategy, SimpleNamespace(shape={"tensor": ways}))

    assert fits(2)
    assert not fits(3) and not fits(4)
    assert not fits(2, strategy=find_strategy("expert-fsdp"))
    assert not fits(2, options=options._replace(observer=Observer()))

    def packed(rows):
        """The output matrix with a scale for so many of its 16 rows."""
        scales = np.zeros((16 // rows, 1), np.uint8)
        other = nnx.clone(layer)
        other.wo_b.set_value(Packed(np.zeros((16, 32), np.uint8), scales, "fp8", (rows, 32), "bfloat16"))
        return other

    assert fits(2, layer=packed(8)) and not fits(2, layer=packed(16))
    lies = head_specs(nnx.state(layer))
    assert lies["wo_a"] == P("tensor") and lies["wq_b"] == P(None, "tensor") and lies["attn_sink"] == P("tensor")
    assert {lies["wkv"], lies["wq_a"], lies["indexer"]["wq_b"], lies["compressor"]["wkv"]} == {P()}
