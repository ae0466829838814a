"""Weights that are spread over devices, made whole where each device multiplies them.

They travel in the dtype of the product, which rounds them anyway: half the bytes of float32 masters; or in FP8, if a
precision policy has rounded them (`wire.py`). Gradients are added up in float32, and every device keeps the sum for its
own part. All of it happens under `shard_map`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.facts import Fact
from dsv4_jax.kernels.grouped_matmul import OfStack
from dsv4_jax.layers.parameters import facts_of
from dsv4_jax.quantization.policy import NONE, Policy, weight_role
from sharding.mesh import EXPERT, TENSOR
from sharding.rules import Axes, Strategy, parameter_specs, spec, used_axes
from sharding.wire import Tile, gather_rounded, keeps_tiles, tile_of

Tree = Any


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def whole(part: jax.Array, lies: PartitionSpec, dtype: Any, tile: Tile | None = None) -> jax.Array:
    """This device's part of an array that lies on the mesh as `lies` -> the array, in `dtype` if it is spread at all.

    A gradient comes in `dtype` from every device's own tokens; their sum is the float32 one of an unspread array, but
    for that rounding.

    Args:
        part: floats.
        lies: how the array lies on the mesh.
        dtype: in which it travels.
        tile: it travels in FP8 instead, which holds its numbers with a scale for every tile (`wire.tile_of`), if it is
            spread in one dimension, in parts that `keeps_tiles`.
    """
    if not used_axes(lies):
        return part
    spread = [(dimension, axes) for dimension, axes in enumerate(lies) if axes is not None]
    if tile and len(spread) == 1 and keeps_tiles(part.shape, spread[0][0], tile):
        return gather_rounded(part, spread[0][1], spread[0][0], tile, dtype)
    part = part.astype(dtype)
    for dimension, axes in spread:
        part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return part


def _whole_fwd(part: jax.Array, lies: PartitionSpec, dtype: Any, tile: Tile | None):
    return whole(part, lies, dtype, tile), jnp.zeros((), part.dtype)


def _whole_bwd(lies: PartitionSpec, dtype: Any, tile: Tile | None, like: jax.Array, d_whole: jax.Array):
    del dtype, tile
    if used_axes(lies):
        d_whole = d_whole.astype(jnp.float32)
    for dimension, axes in enumerate(lies):
        if axes is not None:
            d_whole = jax.lax.psum_scatter(d_whole, axes, scatter_dimension=dimension, tiled=True)
    return (d_whole.astype(like.dtype),)


whole.defvjp(_whole_fwd, _whole_bwd)


def layer_specs(state: nnx.State, strategy: Strategy, mesh: Mesh) -> Tree:
    """How the weights of one layer lie: a PartitionSpec for each; packed ones are left to the compiler to gather."""
    facts, weights = facts_of(state), nnx.to_pure_dict(state)
    plain = lambda fact, weight: fact if isinstance(weight, jax.Array) else Fact((), "none", "")  # noqa: E731
    return parameter_specs(jax.tree.map(plain, facts, weights), weights, strategy.parameters, mesh)


def whole_layer(state: nnx.State, parts: Tree, lies: Tree, dtype: Any, rounded: Policy = NONE) -> Tree:
    """Every device's `parts` of a layer's weights, made whole; in `dtype` the matrices that Muon moves.

    In an attention layer these are the ones that multiply activations, in the activations' dtype.

    Args:
        state: of the layer; only its structure and facts are read.
        parts: what this device holds of them.
        lies: `layer_specs`.
        dtype: of the activations.
        rounded: how the weights have been rounded.
    """

    def one(fact: Fact, lies: PartitionSpec, part: Any) -> Any:
        if not used_axes(lies):
            return part
        tile = tile_of(rounded.rounding.get(weight_role(fact) or ""))
        if tile and "o_groups" in fact.axes and part.shape[-1] % tile[1]:  # tiles that hold parts of two groups
            tile = None
        return whole(part, lies, dtype if fact.optimizer == "muon" else part.dtype, tile)

    return jax.tree.map(one, facts_of(state), lies, parts)


def expert_specs(matrices: Any, rules: Mapping[str, Axes], mesh: Mesh) -> Any:
    """How w1, w3 [E, D, I] and w2 [E, I, D] of all experts are given to each device; see `owned_experts`.

    Experts and widths go to their owners; plain arrays come spread further, as `rules` has them.
    """
    axes = ("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    return type(matrices)(*(_lies(*each, rules, mesh) for each in zip(matrices, axes, strict=True)))


def owned_experts(matrices: Any, specs: Any, dtype: Any, rounded: Policy = NONE) -> Any:
    """An owner's part of the matrices, gathered along all axes but the owners'; in `dtype` where they were spread.

    `rounded` says how they have been rounded.
    """
    tile = tile_of(rounded.rounding.get("expert_weight"))
    return type(matrices)(*(_owned(*each, dtype, tile) for each in zip(matrices, specs, strict=True)))


def _lies(matrix: Any, axes: tuple[str, ...], rules: Mapping[str, Axes], mesh: Mesh) -> Any:
    """How a matrix is given to each device: experts and widths to their owners, plain ones spread as they lie."""
    own = {"experts": EXPERT, "mlp": TENSOR}
    if isinstance(matrix, OfStack):
        return OfStack(PartitionSpec(None, *map(own.get, axes)), PartitionSpec())
    if not isinstance(matrix, jax.Array):
        return PartitionSpec(*map(own.get, axes))
    further = {"embed": tuple(axis for axis in rules.get("embed", ()) if axis not in (EXPERT, TENSOR))}
    spread = spec(further, axes, mesh, matrix.shape)
    spread = *spread, *(None,) * (len(axes) - len(spread))
    return PartitionSpec(*(own.get(axis, lies) for axis, lies in zip(axes, spread, strict=True)))


def _owned(matrix: Any, lies: Any, dtype: Any, tile: Tile | None) -> Any:
    if not isinstance(matrix, jax.Array):
        return matrix
    if tile and TENSOR in lies and not keeps_tiles(matrix.shape, lies.index(TENSOR), tile):
        tile = None
    return whole(matrix, PartitionSpec(*(None if axes in (EXPERT, TENSOR) else axes for axes in lies)), dtype, tile)
