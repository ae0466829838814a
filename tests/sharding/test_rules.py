"""Strategies are tables; a mesh that does not fit is refused with the numbers that would."""

import math

import jax
import pytest
from devices import on_devices
from jax.sharding import AbstractMesh, PartitionSpec

from dsv4_jax import weights
from dsv4_jax.errors import UserError
from dsv4_jax.presets import preset
from sharding.mesh import AXES, parse_mesh
from sharding.rules import STRATEGIES, check_axes, check_fit, find_strategy, parameter_specs, spec, used_axes
from train.placement import place

FLASH = preset("v4-flash")
FACTS = weights.facts(FLASH)
SHAPES = jax.eval_shape(lambda: weights.init(FLASH, jax.random.key(0)))


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_a_mesh_is_read_from_text():
    assert parse_mesh("expert=4, data=2", 8) == {"data": 2, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1}
    assert parse_mesh("expert=4,fsdp=-1", 32)["fsdp"] == 8
    assert parse_mesh("", 1) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experts=4", "no axis 'experts'"),
        ("expert=four", "not 'four'"),
        ("expert=0", "positive number"),
        ("expert=-1,data=-1", "only one axis"),
        ("expert=3", "is for 3 devices, but there are 8"),
        ("expert=3,data=-1", "times the rest, but there are 8"),
    ],
)
def test_a_wrong_mesh_says_what_is_wrong(text, says):
    with pytest.raises(UserError, match=says):
        parse_mesh(text, 8)


def test_an_unknown_strategy_lists_those_there_are():
    with pytest.raises(UserError, match="expert-fsdp"):
        find_strategy("zero")


@pytest.mark.parametrize(
    ("text", "strategy", "says"),
    [
        (
            "expert=8",
            "fsdp",
            "expert=8: the strategy 'fsdp' .* 8 devices would repeat .* that use expert: expert-fsdp, ",
        ),
        ("data=2,context=4", "fsdp", "context=4: .* It uses data, fsdp; strategies that use context: long-context$"),
        ("fsdp=8", "data", "fsdp=8: .* that use fsdp: fsdp, expert-fsdp, expert-tensor, expert-data, long-context"),
        ("tensor=8", "expert-fsdp", "tensor=8: .* that use tensor: expert-tensor$"),
        ("expert=4,tensor=2", "expert-data", "tensor=2: .* that use tensor"),
        ("data=8", "one", "data=8: the strategy 'one' .* It uses one device; "),
    ],
)
def test_a_mesh_axis_that_a_strategy_does_not_use_is_refused(text, strategy, says):
    with pytest.raises(UserError, match=says):
        check_axes(find_strategy(strategy), parse_mesh(text, 8))


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda strategy: strategy.name)
def test_a_strategy_may_use_its_own_axes_and_any_may_have_one_device(strategy):
    check_axes(strategy, dict.fromkeys(AXES, 1) | dict.fromkeys(strategy.axes, 2))
    assert strategy.name == "one" or strategy.grows in strategy.axes


def unused_axis_refused():
    """What the command line's texts give on eight devices."""
    said = []
    for mesh, strategy in (("expert=8", None), (None, "one"), ("fsdp=4,data=2", None), (None, "expert-data")):
        try:
            said.append(str(place(mesh, strategy).mesh.size))
        except UserError as error:
            said.append(str(error))
    return said


def test_training_and_inference_refuse_it_before_they_begin():
    expert, one, *accepted = on_devices(8, unused_axis_refused)
    assert expert.startswith("mesh axis expert=8") and one.startswith("mesh axis data=8")
    assert accepted == ["8", "8"]


def test_a_mesh_axis_is_taken_once_and_by_the_first_dimension():
    rules = {"experts": ("expert",), "embed": ("fsdp", "expert")}
    assert spec(rules, ("experts", "embed", "mlp"), mesh_of(expert=2, fsdp=4)) == PartitionSpec("expert", "fsdp")
    assert spec(rules, ("embed", "mlp"), mesh_of(expert=2, fsdp=4)) == PartitionSpec(("fsdp", "expert"))
    assert spec(rules, ("mlp", "embed"), mesh_of(fsdp=4)) == PartitionSpec(None, "fsdp")


def test_rows_take_only_as_many_devices_as_divide_them():
    rules = {"batch": ("data", "expert")}
    assert spec(rules, ("batch", "seq"), mesh_of(data=2, expert=4), (6, 9)) == PartitionSpec("data")


@pytest.mark.parametrize("name", ["fsdp", "expert-fsdp", "long-context"])
def test_every_weight_matrix_of_flash_is_spread_over_all_devices_that_share_it(name):
    sizes_by_name = {"fsdp": {"fsdp": 32}, "expert-fsdp": {"fsdp": 4, "expert": 8}}
    mesh = mesh_of(data=2, **sizes_by_name.get(name, {"fsdp": 4, "expert": 4, "context": 2}))
    strategy = STRATEGIES[name]
    specs = parameter_specs(FACTS, SHAPES, strategy.state, mesh)
    held = whole = 0
    for shape, partition in zip(jax.tree.leaves(SHAPES), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        held, whole = held + shape.size / math.prod(mesh.shape[a] for a in used_axes(partition)), whole + shape.size
    assert held / whole < 1.01 / mesh.size


def is_spec(x):
    return isinstance(x, PartitionSpec)


@pytest.mark.parametrize(
    ("name", "mesh", "rows", "says"),
    [
        ("expert-fsdp", {"expert": 24}, 24, "'embed' of embed is 4096.*expert=24.*16, 32, 64"),
        ("fsdp", {"fsdp": 12}, 12, r"is \d+, which does not divide over fsdp=12"),
        ("data", {"data": 8}, 12, "a batch's rows is 12.*data=8"),
        ("long-context", {"context": 8}, 1, "tokens per row is 4100.*context=8"),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(name, mesh, rows, says):
    length = 4100 if name == "long-context" else 4096
    with pytest.raises(UserError, match=says):
        check_fit(FACTS, SHAPES, find_strategy(name), mesh_of(**mesh), rows, length)


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_the_giants_fit_the_meshes_of_the_docs(name):
    config = preset(name)
    facts, shapes = weights.facts(config), jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    check_fit(facts, shapes, find_strategy("expert-fsdp"), mesh_of(fsdp=8, expert=64), 512, 4096)
    check_fit(facts, shapes, find_strategy("expert-tensor"), mesh_of(expert=32, tensor=8), 0, 0)
