"""Where a run's state and batches lie: the rules of a strategy applied to everything a train step touches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax import weights
from dsv4_jax.baseline import refuse_baselines
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.lora import Lora
from dsv4_jax.partition import ALONE, Partition
from sharding.batch_rows import place_among, rows_of
from sharding.mesh import first_mesh, make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import (
    check_axes,
    check_fit,
    default_meshes,
    find_strategy,
    parameter_shardings,
    row_shards,
    spec,
)
from train import adapted

Tree = Any
STEP_READS = ("tokens", "segment_ids", "loss_mask")
"""Of a batch, int32 [B, S] each; the mask is there where not all tokens are targets."""


def place(mesh: str | None, strategy: str | None, config: DeepseekV4Config | None = None) -> Partition:
    """How a run lies on this job's devices, from the texts of the command line.

    With neither text, one device needs nothing and several share the rows ("fsdp"); with a strategy alone, the axis
    that the strategy grows takes all devices, of experts as many as divide those of the config.

    Raises:
        UserError: for an unknown strategy or axis, an axis that the strategy does not use, and sizes that are not
            those of this job's devices.
    """
    devices = jax.device_count()
    if strategy is None and mesh is None and devices == 1:
        return ALONE
    chosen = find_strategy(strategy or "fsdp")
    if mesh is None and config is not None:
        found = first_mesh(default_meshes(config, chosen, devices), jax.devices())
        if found is not None:
            return MeshPartition(found, chosen)
    sizes = parse_mesh(mesh or f"{chosen.grows}=-1", devices)
    check_axes(chosen, sizes)
    return MeshPartition(make_mesh(sizes), chosen)


@dataclass(frozen=True)
class Placement:
    """The shardings of a run; on one device there are none and arrays go where jax puts them.

    Attributes:
        partition: as the model knows it.
        config: the architecture.
        lora: adapters that the state holds beside the model's parameters.
    """

    partition: Partition
    config: DeepseekV4Config
    lora: Lora | None = None

    @property
    def mesh_partition(self) -> MeshPartition | None:
        """The partition, if it has a mesh."""
        return self.partition if isinstance(self.partition, MeshPartition) else None

    def check(self, rows: int, length: int) -> None:
        """Raises UserError when the model or batches of [rows, length] cannot be spread over the mesh."""
        if found := self.mesh_partition:
            if any(found.mesh.shape[axis] > 1 for axis in found.strategy.activations.get("seq", ())):
                refuse_baselines(self.config, "context parallelism")
            check_fit(weights.facts(self.config), weights.shapes(self.config), found.strategy, found.mesh, rows, length)

    def state(self, state: Tree) -> Tree:
        """A sharding for every leaf of a `TrainState`, concrete or abstract; None for each without a mesh.

        Masters and the optimizer's moments, which mirror the parameters, lie as the strategy's `state` rules say
        (ZeRO); counters and keys are on every device.
        """
        if (found := self.mesh_partition) is None:
            return jax.tree.map(lambda _: None, state)
        placed = self._state_shardings()
        by_path = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(placed)}
        whole = NamedSharding(found.mesh, PartitionSpec())

        def one(path: Any, leaf: Any) -> NamedSharding:
            names = _names(path)
            mirrored = (by_path.get(names[start:]) for start in range(len(names)))
            return next((found for found in mirrored if found is not None), whole) if leaf.ndim else whole

        return jax.tree_util.tree_map_with_path(one, state)

    def placed(self, state: Tree) -> Tree:
        """An abstract state with the shardings of this run: what a checkpoint is restored into."""
        if self.mesh_partition is None:
            return state
        put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(put, state, self.state(state))

    def stored(self, params: Tree) -> Tree:
        """Parameters, or gradients, as the state keeps them: the strategy's `state` rules."""
        if self.mesh_partition is None:
            return params
        return jax.lax.with_sharding_constraint(params, self._state_shardings())

    def computing(self, params: Tree) -> Tree:
        """The model's parameters as a step computes with them, and their gradients: the `parameters` rules."""
        if (found := self.mesh_partition) is None:
            return params
        return jax.lax.with_sharding_constraint(params, self._shardings(found.strategy.parameters))

    def _state_shardings(self) -> Tree:
        """Of the state's parameters."""
        assert (found := self.mesh_partition) is not None
        rules = found.strategy.state or found.strategy.parameters
        if self.lora is None:
            return self._shardings(rules)
        shapes = adapted.shapes(self.lora, self.config)
        return parameter_shardings(adapted.facts(self.lora, self.config), shapes, rules, found.mesh)

    def _shardings(self, rules: Any) -> Tree:
        """Of the model's parameters, by the rules."""
        assert (found := self.mesh_partition) is not None
        return parameter_shardings(weights.facts(self.config), weights.shapes(self.config), rules, found.mesh)

    @cached_property
    def batch(self) -> NamedSharding | None:
        """Of tokens and segment ids [B, S]."""
        if (found := self.mesh_partition) is None:
            return None
        return NamedSharding(found.mesh, spec(found.strategy.activations, ("batch", "seq"), found.mesh))

    @property
    def whole(self) -> NamedSharding | None:
        """Of results that every process reads."""
        found = self.mesh_partition
        return NamedSharding(found.mesh, PartitionSpec()) if found else None

    def full_batch(self, rows: int) -> int:
        """`rows`, or the next number that the devices share evenly: of another, several would do the same rows."""
        shards = row_shards(found.strategy, found.mesh) if (found := self.mesh_partition) else 1
        return -(-rows // shards) * shards

    @lru_cache(maxsize=8)  # noqa: B019 (lives as long as the run)
    def own_rows(self, rows: int) -> tuple[int, ...]:
        """The numbers of the rows of a batch of `rows` that this process makes, in order: those of its devices."""
        if self.batch is None:
            return tuple(range(rows))
        return rows_of(self.batch.addressable_devices, self.batch, rows)

    def to_devices(self, batch: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
        """What a step reads of this process's `own_rows` of a batch of `rows` rows, as part of a whole array."""
        read = {name: batch[name] for name in STEP_READS if name in batch}
        if (sharding := self.batch) is None:
            return {name: jnp.asarray(x) for name, x in read.items()}
        own = self.own_rows(rows)

        def array(x: np.ndarray) -> jax.Array:
            local = lambda index: x[place_among(own, index[0], rows), *index[1:]]  # noqa: E731
            return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, local)

        return {name: array(x) for name, x in read.items()}


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
