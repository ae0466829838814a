"""Strategies: one table each, from the logical axes of parameters and activations to mesh axes.

A dimension takes the mesh axes of its logical axis that no earlier dimension of the same array has taken. Vectors
(norms, biases, sinks) stay whole on every device: gathering them would cost more than they weigh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.facts import Fact

Axes = tuple[str, ...]
Tree = Any


@dataclass(frozen=True)
class Strategy:
    """How logical axes map to mesh axes.

    Attributes:
        name: as the command line calls it.
        about: one line for people.
        grows: the mesh axis that takes all devices when no mesh is given.
        activations: "batch" and "seq" of activations.
        parameters: logical axes of parameters.
        state: of the optimizer's state and the masters, where they are spread further than the parameters a step
            computes with; the same by default.
    """

    name: str
    about: str
    grows: str
    activations: Mapping[str, Axes]
    parameters: Mapping[str, Axes] = field(default_factory=dict)
    state: Mapping[str, Axes] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes over which it spreads anything."""
        tables = (self.activations, self.parameters, self.state)
        return frozenset(axis for table in tables for axes in table.values() for axis in axes)


def _wide(*axes: str) -> dict[str, Axes]:
    """The one wide dimension of every weight matrix, whatever its name there."""
    return dict.fromkeys(("embed", "streams_embed", "q_lora", "o_lora"), axes)


INSTEAD = {"q_lora": ("heads", "index_heads")}
"""Which dimension of a matrix takes the devices by which another does not divide: V4-Pro's rank is 1,536, not 1,024."""

_TENSOR = dict.fromkeys(("heads", "o_groups", "o_lora", "mlp", "vocab"), ("tensor",))
_DATA = ("data", "fsdp", "expert")

STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("one", "everything on one device", "data", {}),
        Strategy("data", "rows over devices, weights on all", "data", {"batch": ("data",)}, {}, _wide("data")),
        Strategy(
            "fsdp",
            "rows and weights over devices; a layer's weights are gathered where they are used",
            "fsdp",
            {"batch": ("data", "fsdp")},
            _wide("fsdp"),
            _wide("fsdp", "data"),
        ),
        Strategy(
            "expert-fsdp",
            "experts stay on their devices and tokens travel to them; other weights as in fsdp",
            "expert",
            {"batch": _DATA},
            _wide("fsdp", "expert") | {"experts": ("expert",)},
            _wide("fsdp", "expert", "data") | {"experts": ("expert",)},
        ),
        Strategy(
            "expert-tensor",
            "inference: experts over one axis, heads and widths over another, rows over the third",
            "expert",
            {"batch": ("data", "fsdp")},
            _TENSOR | {"experts": ("expert",)},
        ),
        Strategy(
            "expert-data",
            "inference of many sequences: each on one device with its cache, tokens travel to the experts' devices",
            "expert",
            {"batch": _DATA},
            {"experts": ("expert",)},
        ),
        Strategy(
            "long-context",
            "expert-fsdp with the tokens of each row spread over devices as well",
            "context",
            {"batch": _DATA, "seq": ("context",)},
            _wide("fsdp", "expert", "context") | {"experts": ("expert",)},
            _wide("fsdp", "expert", "context", "data") | {"experts": ("expert",)},
        ),
    )
}


def find_strategy(name: str) -> Strategy:
    """A strategy by name; UserError that lists them all."""
    if name not in STRATEGIES:
        listed = "\n".join(f"  {s.name}: {s.about}" for s in STRATEGIES.values())
        raise UserError(f"there is no strategy {name!r}; there are\n{listed}")
    return STRATEGIES[name]


def check_axes(strategy: Strategy, sizes: Mapping[str, int]) -> None:
    """Raises UserError when a mesh of these sizes has an axis that the strategy does not use, naming who does."""
    for axis, size in sizes.items():
        if size > 1 and axis not in strategy.axes:
            users = ", ".join(other.name for other in STRATEGIES.values() if axis in other.axes)
            raise UserError(
                f"mesh axis {axis}={size}: the strategy {strategy.name!r} spreads nothing over it, so {size} devices "
                f"would repeat the same work. It uses {', '.join(sorted(strategy.axes)) or 'one device'}; strategies "
                f"that use {axis}: {users}"
            )


def default_meshes(config: DeepseekV4Config, strategy: Strategy, devices: int) -> list[str]:
    """Meshes for all devices, best first: one axis, or as many devices as divide the experts and the rest elsewhere."""
    if strategy.grows != "expert":
        return [f"{strategy.grows}=-1"]
    spread = {axis for axes in strategy.parameters.values() for axis in axes}
    rest = next((axis for axis in ("fsdp", "tensor") if axis in spread), "data")
    fitting = [n for n in range(devices, 0, -1) if devices % n == 0 and config.n_routed_experts % n == 0]
    return [f"expert={n},{rest}=-1" for n in fitting]


def spec(
    rules: Mapping[str, Axes], axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes; mesh axes of size 1 are left out.

    With a `shape`, a dimension takes only as many of its mesh axes, from the first on, as divide its size, unless the
    dimension that stands in for it (`INSTEAD`) can take all.
    """
    taken: set[str] = set()
    dimensions = []
    rules = dict(rules)
    for number, axis in enumerate(axes):
        free = tuple(a for a in rules.get(axis or "", ()) if a not in taken and mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in free)
        if shape and shape[number] % ways:
            others = (axes.index(name) for name in INSTEAD.get(axis or "", ()) if name in axes and name not in rules)
            if (other := next((i for i in others if shape[i] % ways == 0), None)) is not None:
                rules[str(axes[other])], free = free, ()
        while shape and shape[number] % math.prod(mesh.shape[a] for a in free):
            free = free[:-1]
        taken |= set(free)
        dimensions.append(free if len(free) > 1 else free[0] if free else None)
    while dimensions and dimensions[-1] is None:
        dimensions.pop()
    return PartitionSpec(*dimensions)


def row_shards(strategy: Strategy, mesh: Mesh) -> int:
    """Parts into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in strategy.activations.get("batch", ()))


def used_axes(partition: PartitionSpec) -> Axes:
    """The mesh axes of a PartitionSpec, in order."""
    return tuple(
        axis for axes in partition if axes is not None for axis in ((axes,) if isinstance(axes, str) else tuple(axes))
    )


def parameter_specs(facts: Tree, shapes: Tree, rules: Mapping[str, Axes], mesh: Mesh) -> Tree:
    """A PartitionSpec for every `Fact` and the array (or `jax.ShapeDtypeStruct`) beside it; see `spec` for shapes."""

    def one(fact: Fact, leaf: Any) -> PartitionSpec:
        own = [axis for axis in fact.axes if axis != "layers"]
        return spec(rules, fact.axes, mesh, leaf.shape) if len(own) > 1 else PartitionSpec()

    return jax.tree.map(one, facts, shapes)


def parameter_shardings(facts: Tree, shapes: Tree, rules: Mapping[str, Axes], mesh: Mesh) -> Tree:
    """A NamedSharding for every `Fact`."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), parameter_specs(facts, shapes, rules, mesh))


def check_fit(facts: Tree, shapes: Tree, strategy: Strategy, mesh: Mesh, batch: int = 0, length: int = 0) -> None:
    """Raises UserError when a dimension does not divide, naming it and what would.

    Experts and batches must take all their mesh axes, other dimensions at least the first one that there is.

    Args:
        facts: of the parameters.
        shapes: arrays or `jax.ShapeDtypeStruct`s beside them.
        strategy: the rules.
        mesh: the devices.
        batch: rows of a batch, 0 to leave them unchecked.
        length: tokens of a row, 0 to leave them unchecked.
    """
    sizes = {"batch": batch, "seq": length}
    for axis, mesh_axes in strategy.activations.items():
        _check_division(f"a batch's {'rows' if axis == 'batch' else 'tokens per row'}", sizes[axis], mesh_axes, mesh)
    for rules in (strategy.parameters, strategy.state or strategy.parameters):
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        for fact, (path, leaf) in zip(jax.tree.leaves(facts), leaves, strict=True):
            if len([axis for axis in fact.axes if axis != "layers"]) > 1:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                _check_parameter(where, fact, leaf.shape, rules, mesh)


def _check_parameter(where: str, fact: Fact, shape: tuple[int, ...], rules: Mapping[str, Axes], mesh: Mesh) -> None:
    wanted = spec(rules, fact.axes, mesh)
    for axis, size, axes in zip(fact.axes, shape, wanted, strict=False):
        over = (axes,) if isinstance(axes, str) else tuple(axes or ())
        _check_division(f"{axis!r} of {where}", size, over if axis == "experts" else over[:1], mesh)


def _check_division(what: str, size: int, mesh_axes: Axes | None, mesh: Mesh) -> None:
    mesh_axes = tuple(axis for axis in mesh_axes or () if mesh.shape[axis] > 1)
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
    if size % parts:
        named = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
        fitting = [str(n) for n in range(1, size + 1) if size % n == 0 and n <= 4 * parts]
        raise UserError(
            f"{what} is {size}, which does not divide over {named} ({parts} parts). "
            f"Sizes of {' x '.join(mesh_axes)} that fit: {', '.join(fitting[-8:])}"
        )
