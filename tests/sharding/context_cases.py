"""What the tests of context parallelism run on several devices; see `devices.on_devices`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import TINY, blocks_in_order, random_params

from dsv4_jax import model
from dsv4_jax.config import CSA, HCA, DeepseekV4Config
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.partition import Partition
from dsv4_jax.presets import preset
from dsv4_jax.quantization.policy import NONE
from sharding import context_parallel
from sharding.mesh import make_mesh
from sharding.rules import find_strategy

BATCH = 2
KINDS = {"sliding": (0, "dense"), "CSA dense": (1, "dense"), "CSA sparse": (1, "sparse"), "HCA": (2, "dense")}
STRATEGY = find_strategy("long-context")
WEIGHTS_WHOLE = replace(STRATEGY, name="long-context, weights whole", parameters={}, state={})
FRESH = random_params(TINY)
LAYERS = [block["attn"] for block in blocks_in_order(TINY, FRESH)]


def mesh_of(context: int, **others: int) -> Mesh:
    """A mesh of the first devices, as many as the axes need."""
    sizes = {"context": context, **others}
    return make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])


def packs(length: int, count: int = 5) -> list[np.ndarray]:
    """Segment ids [BATCH, length]: documents shorter than a block, longer than two ranks, and random ones.

    Ids are used again, and the last documents are padding.
    """
    rng = np.random.default_rng(length)
    long = length - 3 - 2 - 1
    drawn = [np.diff([0, *np.sort(rng.integers(0, length, rng.integers(1, 9))), length]) for _ in range(2 * count - 2)]
    rows = [np.array([3, long, 2, 1]), np.array([1, 1, 2, 5, 1, 3, length - 13]), *drawn]
    ids = [np.repeat(np.arange(len(row))[::-1] % 5, row) for row in rows]
    return list(np.array(ids, np.int32).reshape(count, BATCH, length))


def attention_program(mesh: Mesh | None, packed: bool) -> Any:
    """(weights, x, ids, cotangents, weights of the KL) -> (gradients of weights and x, outputs and records by kind)."""

    def loss(weights: Any, x: jax.Array, ids: jax.Array, cotangents: jax.Array, kl_weights: jax.Array) -> Any:
        layout = make_layout(TINY, *x.shape[:2], ids if packed else None)
        seen, total = {}, jnp.zeros(())
        for (kind, (index, mode)), cotangent in zip(KINDS.items(), cotangents, strict=True):
            layer = attention_layer(TINY, index, weights[index])
            options = AttentionOptions(mode, True, NONE)
            if mesh is None:
                out, record, _ = layer(x, layout, options)
            else:
                out, record = context_parallel.attention(mesh, STRATEGY, layer, x, layout, options)
            seen[kind] = {"out": out} | record
            total += (out * cotangent).sum()
            if "index_loss" in record:
                total += (record["index_loss"].kl * kl_weights).sum()
        return total, seen

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def attention_layer(config: DeepseekV4Config, index: int, weights: Any) -> Attention:
    """Layer `index` of a model with these weights."""
    abstract = nnx.eval_shape(lambda: Attention(config, config.layers[index], nnx.Rngs(0)))
    return nnx.merge(nnx.split(abstract)[0], weights)


def errors_of_layers(length: int, packed: bool, meshes: list[dict[str, int]]) -> list[dict[str, float]]:
    """By mesh and leaf: the largest difference from one device, relative to the leaf's largest value or 1."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, cotangents = draw(BATCH, length, TINY.hidden_size), draw(len(KINDS), BATCH, length, TINY.hidden_size)
    kl_weights = draw(BATCH, length)
    cases = packs(length) if packed else [np.ones((BATCH, length), np.int32)]
    run = lambda program: [host(program(LAYERS, x, ids, cotangents, kl_weights)) for ids in cases]  # noqa: E731
    alone = run(attention_program(None, packed))
    return [largest_errors(run(attention_program(mesh_of(**axes), packed)), alone) for axes in meshes]


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def largest_errors(ours: Any, expected: Any) -> dict[str, float]:
    """By leaf (the first index, of cases, left out)."""
    worst: dict[str, float] = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        difference = np.abs(np.asarray(a, float) - np.asarray(b, float)).max() if a.size else 0.0
        name = jax.tree_util.keystr(path[1:])
        worst[name] = max(worst.get(name, 0.0), float(difference / max(1.0, np.abs(b).max(initial=0))))
    return worst


def influence(length: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids [B, S], and the size of the gradient of each query's outputs by each token: [kinds, B, S, S]."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, length, TINY.hidden_size)), jnp.float32)
    ids, program = packs(length)[0], attention_program(mesh_of(context), True)
    sizes = np.zeros((len(KINDS), BATCH, length, length))
    for kind, query in np.ndindex(len(KINDS), length):
        cotangents = np.zeros((len(KINDS), *x.shape), np.float32)
        cotangents[kind, :, query] = np.random.default_rng(query).normal(size=TINY.hidden_size)
        gradient = program(LAYERS, x, ids, cotangents, np.zeros((BATCH, length), np.float32))[0][1]
        sizes[kind, :, query] = np.abs(gradient).max(-1)
    return ids, sizes


@dataclass(frozen=True)
class OverContext(Partition):
    """Only attention by hand; the rest is left to the compiler."""

    mesh: Mesh

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        del axes
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(None, "context")))

    def attention(self, layer: Any, x: Any, layout: Any, options: Any, past: Any) -> Any:
        assert past is None
        return *context_parallel.attention(self.mesh, STRATEGY, layer, x, layout, options), None


def errors_of_models(length: int, packed: bool, contexts: list[int], gradient: bool) -> list[dict[str, float]]:
    """As `errors_of_layers`, of the whole TINY model: outputs, and on demand gradients of all parameters."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, TINY.vocab_size, (BATCH, length)).astype(np.int32)
    ids = packs(length)[1] if packed else None
    by_logits = jnp.asarray(rng.normal(size=(BATCH, length, TINY.vocab_size)), jnp.float32)

    def loss(params: Any, partition: Partition) -> Any:
        out = model.forward(
            TINY, params, tokens, segment_ids=ids, mtp=True, index_loss=True, remat="block", partition=partition
        )
        kl = sum(layer["index_loss"].kl for layer in out.layers if "index_loss" in layer)
        total = (out.logits * by_logits).sum() + (out.mtp_hidden**2).sum() + kl.sum()
        return total, (total, out.logits, out.mtp_hidden, kl)

    step = jax.grad(loss, has_aux=True, allow_int=True) if gradient else loss
    step = jax.jit(step, static_argnums=1)
    run = lambda partition: [keep_floats(host(step(FRESH, partition)))]  # noqa: E731
    alone = run(Partition())
    return [largest_errors(run(OverContext(mesh_of(context))), alone) for context in contexts]


def keep_floats(tree: Any) -> Any:
    """Without the gradients of integers, which have no values."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == np.float32]


def collectives(length: int, context: int, packed: bool, gradient: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(operation, shape of its result) of each collective of a compiled sparse CSA layer with the index loss.

    Its weights are whole on every device.
    """
    mesh, whole = mesh_of(context), NamedSharding(mesh_of(context), PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(None, "context"))

    def run(weights: Any, x: jax.Array, ids: jax.Array) -> Any:
        layer, layout = attention_layer(TINY, 1, weights), make_layout(TINY, *x.shape[:2], ids if packed else None)
        options = AttentionOptions("sparse", True, NONE)
        out, record = context_parallel.attention(mesh, WEIGHTS_WHOLE, layer, x, layout, options)
        return out.sum() + record["index_loss"].kl.sum() if gradient else (out, record)

    x = jax.ShapeDtypeStruct((BATCH, length, TINY.hidden_size), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((BATCH, length), jnp.int32, sharding=whole)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), LAYERS[1])
    text = jax.jit(jax.grad(run, (0, 1)) if gradient else run).lower(weights, x, ids).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    operations = re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)
    return [
        (operation, tuple(map(int, filter(None, dims.split(",")))))
        for results, operation in operations
        for dims in re.findall(r"\w+\[([\d,]*)\]", results)
    ]


LONG = preset("nano").replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, compress_ratios=(4, 32), layer_types=(CSA, HCA), num_hash_layers=0
)


def temporary_bytes(length: int, contexts: list[int]) -> list[int]:
    """Per device, of the compiled forward and backward of a nano-wide CSA and an HCA layer; nothing is run."""
    return [_compiled_layers(length, mesh_of(context)).memory_analysis().temp_size_in_bytes for context in contexts]


def _compiled_layers(length: int, mesh: Mesh) -> Any:
    def loss(weights: Any, x: jax.Array) -> jax.Array:
        layout, kl = make_layout(LONG, *x.shape[:2], None), jnp.zeros(())
        for index, own in enumerate(weights):
            layer, options = attention_layer(LONG, index, own), AttentionOptions("sparse", True, NONE)
            out, record = context_parallel.attention(mesh, STRATEGY, layer, x, layout, options)
            x = x + out
            kl += record["index_loss"].kl.sum() if "index_loss" in record else 0.0
        return (x**2).sum() + kl

    modules = nnx.eval_shape(lambda: [Attention(LONG, spec, nnx.Rngs(0)) for spec in LONG.layers])
    whole, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), (None, "context")))
    weights = [
        jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), nnx.to_pure_dict(nnx.state(module))
        )
        for module in modules
    ]
    x = jax.ShapeDtypeStruct((1, length, LONG.hidden_size), jnp.float32, sharding=rows)
    return jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
