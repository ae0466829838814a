"""Attention over rows whose tokens lie on several devices: context parallelism for compressed attention (report 3.5.3).

Device r of the axis holds the tokens from r * S / C on. What it needs of the others is little:

- the W window entries before its tokens, and of the block that it ends first the projected values and gate scores that
  its neighbour holds (with overlap also those of the block before): sent on to the next device;
- all compressed entries and index keys: every device compresses the blocks whose last token it holds, at most
  ceil(S / C / m) of them, and all of them gather these and bring them into the order of their last tokens.

A document may begin and end anywhere: every token knows its position in its document, and a block's place, its
rotation and what a query may see follow from that. The collectives transpose by themselves in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.baseline import refuse_baselines
from dsv4_jax.config import CSA, SLIDING, DeepseekV4Config, LayerSpec
from dsv4_jax.errors import UserError
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.layout import Blocks, Layout, Neighbours, block_ends
from dsv4_jax.layers.rotary import frequencies, rotation
from dsv4_jax.quantization.policy import NONE, Policy
from sharding.gathering import layer_specs, whole_layer
from sharding.rules import Strategy, spec


def attention(
    mesh: Mesh,
    strategy: Strategy,
    layer: Attention,
    x: jax.Array,
    layout: Layout,
    options: AttentionOptions,
    rounded: Policy = NONE,
) -> tuple[jax.Array, dict[str, Any]]:
    """`layer(x, layout, options)` with the tokens of each row spread over the strategy's "seq" axes.

    Args:
        mesh: all of its axes are used by hand; the layer's weights are gathered where they are spread.
        strategy: says which axes hold the rows and which their tokens.
        layer: one attention layer of any kind.
        x: [B, S, D].
        layout: of the whole rows; only its positions are read.
        options: as on one device.
        rounded: how the layer's weights have been rounded.

    Returns:
        [B, S, D] and the layer's record, whose arrays [B, S, ..] are spread as x is.

    Raises:
        UserError: when S does not divide over the devices, and for layers that are no V4.
    """
    refuse_baselines(layer.config, "context parallelism")
    axes = tuple(axis for axis in strategy.activations.get("seq", ()) if mesh.shape[axis] > 1)
    count = math.prod(mesh.shape[axis] for axis in axes)
    _check_length(x.shape[1], axes, count)
    batch = spec(strategy.activations, ("batch",), mesh, x.shape[:1])
    rows = PartitionSpec(batch[0] if len(batch) else None, axes or None)
    graph, state = nnx.split(layer)
    packed, spread = layout.segment_ids is not None, layer_specs(state, strategy, mesh)

    def local(weights: Any, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        shards = Shards(axes, count)
        own = _own_layout(layer.config, layer.spec, positions, packed, shards)
        weights = whole_layer(state, weights, spread, x.dtype, rounded)
        out, record, _ = nnx.merge(graph, weights)(x, own, options, neighbours=shards)
        return out, record

    # Every kernel's own derivative would need to say which values differ between devices: `check_vma` cannot be had.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spread, rows, rows), out_specs=(rows, rows), check_vma=False)
    return mapped(nnx.to_pure_dict(state), x, layout.positions)


@dataclass(frozen=True)
class Shards(Neighbours):
    """`count` devices along mesh `axes`, of which each holds an equal part of every row, in order."""

    axes: tuple[str, ...]
    count: int

    def before(self, rows: Any, count: int) -> Any:
        """See `Neighbours.before`, arrays [B, S / C, ..] -> [B, count + S / C, ..]; zeros before the row.

        The devices to the left send their last rows, as many devices as hold `count` of them.
        """
        return jax.tree.map(lambda x: self._behind_earlier(x, count), rows)

    def _behind_earlier(self, x: jax.Array, count: int) -> jax.Array:
        parts = [x]
        for hop in range(1, -(-count // x.shape[1]) + 1):
            wanted = min(count - (hop - 1) * x.shape[1], x.shape[1])
            pairs = [(i, i + hop) for i in range(self.count - hop)]
            last = x[:, x.shape[1] - wanted :]
            parts.append(jax.lax.ppermute(last, self.axes, pairs) if pairs else jnp.zeros_like(last))
        return jnp.concatenate(parts[::-1], axis=1)

    def gather(self, entries: jax.Array, blocks: Blocks) -> jax.Array:
        """See `Neighbours.gather`, [B, T, K] of each device -> [B, T * C, K] in the order of the row.

        Behind the last entry others repeat, and nothing sees them.
        """
        everyone = jax.lax.all_gather(entries, self.axes, axis=1, tiled=True)
        if blocks.order is None:
            return everyone
        return jax.vmap(lambda row, order: row[order])(everyone, blocks.order)

    def numbers_before(self, numbers: jax.Array) -> jax.Array:
        """[B] per device -> their sum over the devices before each one, [B, C]."""
        everyone = jax.lax.all_gather(numbers, self.axes, axis=1)
        return jnp.cumsum(everyone, axis=1) - everyone


def _check_length(length: int, axes: tuple[str, ...], count: int) -> None:
    if length % count:
        raise UserError(
            f"rows of {length} tokens do not divide over {count} devices of {' x '.join(axes)}: "
            f"pad them to {-(-length // count) * count} tokens, or choose a size that divides {length}"
        )


def _own_layout(
    config: DeepseekV4Config, spec: LayerSpec, positions: jax.Array, packed: bool, shards: Shards
) -> Layout:
    """The layout of this device's tokens for one layer; nothing in it has a row per token of another device."""
    if spec.attention == SLIDING:
        freqs = frequencies(config.rope_theta, config.qk_rope_head_dim, None)
        return Layout(None, positions, {"main": rotation(positions, freqs)}, {})
    freqs = frequencies(config.compress_rope_theta, config.qk_rope_head_dim, config.rope_scaling)
    length, ratio, blocks = positions.shape[1], spec.ratio, {}
    if length * shards.count >= ratio:
        whole = not packed and length % ratio == 0
        blocks[spec.compression] = (
            _whole_blocks(positions, ratio, freqs)
            if whole
            else _ending_blocks(positions, ratio, spec.attention == CSA, freqs, packed, shards)
        )
    return Layout(None, positions, {"compress": rotation(positions, freqs)}, blocks)


def _whole_blocks(positions: jax.Array, ratio: int, freqs: np.ndarray) -> Blocks:
    """Every device holds whole blocks of rows that are one document each."""
    first = positions[:, ::ratio]
    return Blocks(None, first == 0, rotation(first, freqs), jnp.zeros_like(positions), (positions + 1) // ratio)


def _ending_blocks(
    positions: jax.Array, ratio: int, overlap: bool, freqs: np.ndarray, packed: bool, shards: Shards
) -> Blocks:
    """The blocks that end on this device, wherever they begin: as many as can end here, the last ones unused."""
    batch, length = positions.shape
    slots = -(-length // ratio)
    last, ended = block_ends(positions, ratio, slots, unused=0)
    first = jnp.take_along_axis(positions, last, axis=1) - (ratio - 1)
    # Behind the rows before, ratio - 1 of them or with overlap a block more, a block that ends at token t begins at t,
    # or at t + ratio.
    tokens = last[..., None] + overlap * ratio + jnp.arange(ratio, dtype=jnp.int32)
    if overlap:
        tokens = jnp.concatenate([tokens[:, :1] - ratio, tokens], axis=1)
    if packed:
        before = shards.numbers_before(ended[:, -1])
    else:
        starts = jnp.arange(shards.count, dtype=jnp.int32) * length
        before = jnp.broadcast_to(starts // ratio, (batch, shards.count))
    hi = before[:, jax.lax.axis_index(shards.axes)][:, None] + ended
    order = _row_order(before, slots, length * shards.count // ratio)
    return Blocks(tokens, first == 0, rotation(first, freqs), hi - (positions + 1) // ratio, hi, order=order)


def _row_order(before: jax.Array, slots: int, entries: int) -> jax.Array:
    """Where each entry of a row lies among the gathered ones, [B, entries], from the entries before each device."""
    number = jnp.arange(entries, dtype=jnp.int32)
    holder = jax.vmap(lambda row: jnp.searchsorted(row, number, side="right", method="compare_all") - 1)(before)
    slot = jnp.minimum(number - jnp.take_along_axis(before, holder, axis=1), slots - 1)
    return holder * slots + slot
