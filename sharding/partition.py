"""The model's questions about layout, answered for a mesh and a strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.kernels.platforms import partitioned_by_the_compiler
from dsv4_jax.layers.attention import Attention, AttentionOptions
from dsv4_jax.layers.kv_cache import LayerCache
from dsv4_jax.layers.layout import Layout
from dsv4_jax.partition import ExpertFunction, Partition
from dsv4_jax.quantization.policy import NONE, Policy
from sharding import context_parallel, row_caches
from sharding.expert_parallel import HEADROOM, Travel, dispatch_experts
from sharding.mesh import EXPERT, TENSOR
from sharding.own_heads import splits_heads
from sharding.rules import Strategy, spec, used_axes


@dataclass(frozen=True)
class MeshPartition(Partition):
    """Constraints on activations; experts by all-to-all; attention and chunked loops on each device's own tokens.

    Attributes:
        mesh: the devices.
        strategy: the rules.
        headroom: of `expert_parallel`, the capacity of its first round over an owner's mean load.
        rounded: how the parameters that come have been rounded; what FP8 holds then travels so (`wire.py`).
    """

    mesh: Mesh
    strategy: Strategy
    headroom: float = HEADROOM
    rounded: Policy = NONE

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """See `Partition.constrain`; a dimension that does not divide is left to the compiler."""
        partition = spec(self.strategy.activations, axes, self.mesh, x.shape)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, partition))

    def experts(
        self,
        apply: ExpertFunction,
        matrices: Any,
        x: jax.Array,
        expert_ids: jax.Array,
        weights: jax.Array,
        beside: jax.Array | None = None,
        rounding: Any = None,
    ) -> jax.Array:
        """See `Partition.experts`."""
        if self.mesh.size == 1:
            return super().experts(apply, matrices, x, expert_ids, weights, beside)
        travel = Travel(self.headroom, rounding, self.rounded)
        rows, lies = self._rows(x), self.strategy.parameters
        return dispatch_experts(self.mesh, rows, lies, apply, matrices, x, expert_ids, weights, beside, travel)

    @property
    def experts_in_place(self) -> bool:
        """See `Partition.experts_in_place`: not where they would have to be gathered."""
        lies = spec(self.strategy.parameters, ("experts", "embed", "mlp"), self.mesh)
        return set(used_axes(lies)) <= {EXPERT, TENSOR}

    def attention(
        self, layer: Attention, x: jax.Array, layout: Layout, options: AttentionOptions, past: LayerCache | None
    ) -> tuple[jax.Array, dict[str, Any], LayerCache | None]:
        """See `Partition.attention`.

        Every device works on its own rows with the layer's weights, so that no loop over queries ever walks over other
        devices' rows, and reads and writes the compressed entries that its rows own. Where heads are spread over a
        tensor axis it has its own heads in inference; in training, or where rows share blocks, the compiler partitions
        the layer.
        """
        if past is None and any(self.mesh.shape[axis] > 1 for axis in self.strategy.activations.get("seq", ())):
            return *context_parallel.attention(self.mesh, self.strategy, layer, x, layout, options, self.rounded), None
        spread = self.mesh.shape[TENSOR] > 1
        own_heads = spread and past is not None and splits_heads(layer, options, self.strategy, self.mesh)
        if spread > own_heads or not row_caches.stays_with_rows(past):
            with partitioned_by_the_compiler():
                return super().attention(layer, x, layout, options, past)
        rows = PartitionSpec(*self._rows(x)[:1])
        return row_caches.attention(
            self.mesh, self.strategy, rows, layer, x, layout, options, past, own_heads, self.rounded
        )

    def look_up(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `Partition.look_up`: where the vocabulary is spread, every device adds the rows that it has."""
        lies = spec(self.strategy.parameters, ("vocab", "embed"), self.mesh, table.shape)
        vocab = used_axes(PartitionSpec(*lies[:1]))
        if not vocab:
            return super().look_up(table, tokens)

        def own_rows(part: jax.Array, tokens: jax.Array) -> jax.Array:
            place = tokens - jax.lax.axis_index(vocab) * part.shape[0]
            held = (place >= 0) & (place < part.shape[0])
            found = jnp.where(held[..., None], part[jnp.where(held, place, 0)], 0)
            return jax.lax.psum(found, vocab)  # of one row and zeros: exact in any dtype

        rows = self._rows(tokens)
        mapped = jax.shard_map(
            own_rows, mesh=self.mesh, in_specs=(PartitionSpec(vocab), rows), out_specs=rows, check_vma=False
        )
        return mapped(table, tokens)

    def token_sums(self, apply: Callable[..., jax.Array], whole: jax.Array, *tokens: jax.Array) -> jax.Array:
        """See `Partition.token_sums`: every device walks over its own tokens, and the sums are added up."""
        axes = used_axes(self._rows(tokens[0]))
        summed = lambda *args: jax.lax.psum(super(MeshPartition, self).token_sums(apply, *args), axes)  # noqa: E731
        return self._on_own_tokens(summed, PartitionSpec(), whole, tokens)

    def token_values(self, apply: Callable[..., Any], whole: Any, *tokens: jax.Array) -> Any:
        """See `Partition.token_values`: every device walks over its own tokens."""
        values = partial(super().token_values, apply)
        return self._on_own_tokens(values, self._rows(tokens[0]), whole, tokens)

    def _on_own_tokens(self, apply: Callable[..., Any], out: PartitionSpec, whole: Any, tokens: Any) -> Any:
        rows = self._rows(tokens[0])
        specs = PartitionSpec(), *(rows,) * len(tokens)
        return jax.shard_map(apply, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(whole, *tokens)

    def _rows(self, x: jax.Array) -> PartitionSpec:
        """How [B, S, ..] lies on the mesh."""
        return spec(self.strategy.activations, ("batch", "seq"), self.mesh, x.shape[:2])
