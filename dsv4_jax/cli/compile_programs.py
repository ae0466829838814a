"""The three programs that `dsv4 compile` compiles, as functions of abstract arrays that lie on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from dsv4_jax import model, weights
from dsv4_jax.analysis.flops import attention_products, matrix_products, token_products
from dsv4_jax.analysis.serving import v4_serving
from dsv4_jax.checkpoint.packing import abstract_leaves
from dsv4_jax.checkpoint.storage import stored_as
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.facts import Fact
from dsv4_jax.layers.kv_cache import Cache, init_cache
from dsv4_jax.partition import Partition
from dsv4_jax.shapes import flatten, is_table, keeps_float32, nest
from sharding.aot import Program, device_bytes
from sharding.rules import Strategy, parameter_shardings, row_shards, spec
from train.flops import training_flops_per_token
from train.optimizer import OptimizerConfig
from train.step import Kind, Precision, StepPlan, make_train_step

Tree = Any
IN_BFLOAT16 = OptimizerConfig(newton_schulz_dtype="bfloat16")


@dataclass(frozen=True)
class Setting:
    """What all programs of one request share.

    Attributes:
        config: the architecture.
        mesh: the devices.
        strategy: where arrays lie.
        partition: what the model asks about layout.
        batch: sequences, over all devices.
        length: tokens of a row in training, of room in the cache otherwise.
        dtype: of matrix products, and of the weights of inference.
        weights: of inference: "plain", or "packed": FP8 and FP4 as a release stores them.
    """

    config: DeepseekV4Config
    mesh: Mesh
    strategy: Strategy
    partition: Partition
    batch: int
    length: int
    dtype: str = "bfloat16"
    weights: Literal["plain", "packed"] = "plain"

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Of an activation with these logical axes."""
        return NamedSharding(self.mesh, spec(self.strategy.activations, axes, self.mesh))

    @property
    def row_shards(self) -> int:
        """Parts into which the rows of a batch are cut."""
        return row_shards(self.strategy, self.mesh)

    def array(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        """An abstract activation."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(*axes))


def train_program(
    setting: Setting,
    kind: Kind = "sparse",
    remat: bool = True,
    microbatches: int = 1,
    policy: str = "none",
    optimizer: OptimizerConfig = IN_BFLOAT16,
) -> Program:
    """One optimizer step: float32 masters and optimizer state, donated; a batch of whole rows."""
    config = setting.config
    computed = "bfloat16" if setting.dtype == "bfloat16" else "float32"
    precision = Precision(computed, "block" if remat else "none", policy=policy)
    plan = StepPlan(
        config, optax.constant_schedule(1e-4), 1 << 30, optimizer, precision=precision, partition=setting.partition
    )
    state = plan.abstract_state()
    tokens = setting.array((setting.batch, setting.length), jnp.int32, "batch", "seq")
    batch = {"tokens": tokens, "segment_ids": tokens}
    repeats = sum(segment.repeats for segment in config.segments) if remat else config.num_hidden_layers
    return Program(
        name=f"train ({kind})",
        function=make_train_step(plan, kind, microbatches),
        arguments=(state, batch),
        parts={"parameters": state.params, "optimizer": state.optimizer, "batch": batch},
        within={
            "gradients, float32": device_bytes(on_mesh(setting, state.params, setting.strategy.parameters)),
            "streams kept for the backward pass": repeats * _stream_bytes(setting) // microbatches,
        },
        flops=training_flops_per_token(config, setting.length, kind) * setting.batch * setting.length,
        recomputed=4 / 3 if remat else 1.0,
    )


def decode_program(setting: Setting, cache_format: str = "deployed") -> Program:
    """The next token of every sequence, greedily, with `setting.length` tokens of room in the cache."""
    config, batch = setting.config, setting.batch

    def step(params: Tree, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache | None]:
        out = model.forward(config, params, token, cache=cache, partition=setting.partition)
        assert out.logits is not None
        return out.logits.argmax(-1).astype(jnp.int32), out.cache

    tokens = setting.array((batch, 1), jnp.int32, "batch", None)
    products = token_products(config, setting.length, "bf16", cache_format)
    flops = batch * sum(product.flops for product in products)
    return _cached_program(setting, "decode", step, tokens, cache_format, flops, batch)


def prefill_program(setting: Setting, cache_format: str = "deployed", chunk: int = 4096) -> Program:
    """The last `chunk` tokens of prompts of `setting.length` tokens into the cache, and the token that follows."""
    config, chunk = setting.config, min(chunk, setting.length)

    def step(params: Tree, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache | None]:
        out = model.forward(config, params, tokens, cache=cache, logits=False, partition=setting.partition)
        return model.output_logits(params, out.hidden[:, -1]).argmax(-1).astype(jnp.int32), out.cache

    tokens = setting.array((setting.batch, chunk), jnp.int32, "batch", "seq")
    products = matrix_products(config, "bf16") + attention_products(config, setting.length, cache_format)
    count = setting.batch * chunk
    flops = sum(p.flops * (setting.batch if p.component == "head" else count) for p in products)
    return _cached_program(setting, f"prefill of {chunk:,} tokens", step, tokens, cache_format, flops, count)


def _cached_program(
    setting: Setting, name: str, step: Any, tokens: Any, cache_format: str, flops: float, count: int
) -> Program:
    params, cache = inference_parameters(setting), abstract_cache(setting, cache_format)
    held = {"parameters": params, "cache": cache}
    serving = v4_serving(setting.config, setting.length, "bf16", cache_format, in_words=_in_words(setting))
    routed = device_bytes(_chosen(params, weights.facts(setting.config), lambda fact: "experts" in fact.axes[:-1]))
    others = device_bytes(params) - routed
    read = others + routed * (1 - (1 - serving.chosen) ** count) + serving.read * setting.batch / setting.row_shards
    return Program(
        name=name,
        function=jax.jit(step, donate_argnums=1, out_shardings=(None, jax.tree.map(lambda x: x.sharding, cache))),
        arguments=(params, cache, tokens),
        parts=held,
        flops=flops,
        traffic=read,
        tokens=count,
    )


def inference_parameters(setting: Setting) -> Tree:
    """Abstract parameters as a checkpoint loads them: in `setting.dtype` or packed, and float32 what must stay so."""
    config = setting.config
    shapes = weights.shapes(config)
    if setting.weights == "packed":
        rules, facts = setting.strategy.parameters, weights.facts(config)
        places = flatten(parameter_shardings(facts, shapes, rules, setting.mesh))
        return nest(abstract_leaves(stored_as(config, "release"), jnp.dtype(setting.dtype), places))

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kept = is_table(name) or keeps_float32(name)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else jnp.dtype(setting.dtype))

    return on_mesh(setting, jax.tree_util.tree_map_with_path(one, shapes), setting.strategy.parameters)


def abstract_cache(setting: Setting, cache_format: str) -> Cache:
    """An abstract cache: what belongs to a row lies where the row does, and so do the blocks that the rows own."""
    made = partial(init_cache, setting.config, setting.batch, setting.length, cache_format, in_words=_in_words(setting))
    cache = jax.eval_shape(made)
    by_row, second = setting.sharding("batch"), setting.sharding(None, "batch")
    place = lambda tree, sharding: jax.tree.map(  # noqa: E731
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
    return replace(
        cache,
        lengths=place(cache.lengths, by_row),
        tables=place(cache.tables, by_row),
        states=place(cache.states, second),
        pools=place(cache.pools, second),
    )


def _in_words(setting: Setting) -> bool:
    """Whether the cache's blocks are rows of words on the devices of the mesh."""
    return setting.mesh.devices.flat[0].platform == "tpu"


def on_mesh(setting: Setting, params: Tree, rules: Mapping[str, tuple[str, ...]]) -> Tree:
    """Abstract parameters as a table of rules places them."""
    shardings = parameter_shardings(weights.facts(setting.config), params, rules, setting.mesh)
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(put, params, shardings)


def _stream_bytes(setting: Setting) -> int:
    """Bytes of the residual streams [B, S, n, D] on one device."""
    streams = (setting.batch, setting.length, setting.config.hc_mult, setting.config.hidden_size)
    return device_bytes(setting.array(streams, jnp.dtype(setting.dtype), "batch", "seq"))


def _chosen(tree: Tree, facts: Tree, wanted: Any) -> Tree:
    def one(fact: Fact, leaf: Any) -> Any:  # a leaf may be packed, a tree of two arrays
        return leaf if wanted(fact) else None

    return jax.tree.map(one, facts, tree)
