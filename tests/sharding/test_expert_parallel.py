"""Tokens that travel to their experts and back give what one device gives, whatever the routing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax.layers.experts import Matrices, apply_experts
from sharding import exchange
from sharding.expert_parallel import Travel, dispatch_experts, plan_dispatch
from sharding.mesh import make_mesh, parse_mesh

TOLERANCE = 2e-6  # float32; sums over experts and over tokens in another order
DRAWN_TOLERANCE = 1e-5  # of few and narrow tokens the largest value can be small against what was summed
SPREAD = {"embed": ("fsdp", "data")}  # matrices are gathered from these
CASES = {  # mesh, rows' axes, headroom, tokens, k, experts, routing
    "even": ("expert=4,data=2", ("data", "expert"), 2.0, (8, 6), 2, 8, "random"),
    "all tokens on one expert": ("expert=4,data=2", ("data", "expert"), 1.0, (8, 5), 1, 8, "one"),
    "all tokens on one owner": ("expert=4,fsdp=2", ("fsdp", "expert"), 1.0, (8, 4), 2, 8, "owner"),
    "empty experts": ("expert=8", ("expert",), 2.0, (16, 3), 2, 16, "few"),
    "many rounds": ("expert=2,data=4", ("data", "expert"), 0.01, (8, 20), 3, 6, "random"),
    "one token a device": ("expert=8", ("expert",), 2.0, (8, 1), 2, 8, "random"),
    "rows repeated over experts": ("expert=4,data=2", ("data",), 2.0, (2, 7), 2, 8, "random"),
    "experts and their width": ("expert=2,tensor=2,data=2", ("data",), 2.0, (4, 5), 2, 4, "random"),
    "tokens over a context axis": ("expert=2,context=4", ("expert",), 2.0, (4, 8), 2, 4, "random"),
}


def route(kind, shape, k, experts, rng):
    """Distinct experts for every token, [B, S, k], of a few of them: a kind's, or so many as `kind` says."""
    pool = {"random": experts, "one": 1, "owner": k, "few": 3}.get(kind) or rng.permutation(experts)[:kind]
    draw = [rng.permutation(pool)[:k] for _ in range(int(np.prod(shape)))]
    return np.array(draw, np.int32).reshape(*shape, k)


def run_cases(names):
    """For each case the largest relative error of the result and of every gradient."""
    return {name: errors(*CASES[name]) for name in names}


def errors(mesh_text, row_axes, headroom, shape, k, experts, kind, width=8, inner=12):
    """Compare a scalar function of the experts' output, its value and gradients, with one device."""
    rng = np.random.default_rng(0)
    mesh = make_mesh(parse_mesh(mesh_text, 8))
    normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)  # noqa: E731
    matrices = Matrices(normal(experts, width, inner), normal(experts, width, inner), normal(experts, inner, width))
    x, weights = normal(*shape, width), jnp.abs(normal(*shape, k))
    ids = jnp.asarray(route(kind, shape, k, experts, rng))
    apply, probe = partial(apply_experts, 10.0), normal(*shape, width)
    seq = "context" if "context" in mesh_text else None
    rows = PartitionSpec(row_axes, seq)

    def alone(matrices, x, weights):
        out = apply(matrices, x.reshape(-1, width), ids.reshape(-1, k), weights.reshape(-1, k)).reshape(x.shape) + x**2
        return (out * probe).sum(), out

    def spread(matrices, x, weights):
        out = dispatch_experts(mesh, rows, SPREAD, apply, matrices, x, ids, weights, x**2, Travel(headroom))
        return (out * probe).sum(), out

    run = lambda f: jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))  # noqa: E731
    wanted = jax.device_get(run(alone)(matrices, x, weights))
    placed = jax.device_put((x, weights), NamedSharding(mesh, rows))
    found = jax.device_get(run(spread)(matrices, *placed))
    relative = lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-30))  # noqa: E731
    return [relative(a, b) for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)]


def test_dispatch_equals_one_device_for_every_routing():
    found = on_devices(8, run_cases, list(CASES))
    assert {name: worst for name, all_ in found.items() if not (worst := max(all_)) <= TOLERANCE} == {}


def ragged_by_its_definition(operand, output, starts, sends, places, gets, *, axis_name):
    """`jax.lax.ragged_all_to_all`, which CPUs lack: row j that i sends here goes to the place that i gives, plus j."""
    rows, starts, sends, places = (jax.lax.all_gather(x, axis_name) for x in (operand, starts, sends, places))
    me = jax.lax.axis_index(axis_name)
    for i in range(rows.shape[0]):
        j = jnp.arange(operand.shape[0])
        real = (j < sends[i, me]) & (j < gets[i])
        row = rows[i].at[starts[i, me] + j].get(mode="fill", fill_value=jnp.nan)
        output = output.at[jnp.where(real, places[i, me] + j, output.shape[0])].set(row, mode="drop")
    return output


def run_ragged_cases(names):
    """The same with exchanges of real rows only."""
    exchange.by_platform = lambda *operands, xla, tpu, gpu: tpu(*operands)
    jax.lax.ragged_all_to_all = ragged_by_its_definition
    return run_cases(names)


def test_ragged_exchanges_equal_one_device_for_every_routing():
    names = [name for name, (_, rows, *_) in CASES.items() if "expert" in rows]
    found = on_devices(8, run_ragged_cases, names)
    assert {name: worst for name, all_ in found.items() if not (worst := max(all_)) <= TOLERANCE} == {}


@st.composite
def dispatches(draw):
    """Meshes, tokens a device, experts an owner and k; the pool that tokens choose from may leave experts empty."""
    mesh = draw(st.sampled_from(MESHES))
    sizes = parse_mesh(mesh, 8)
    row_axes = draw(st.sampled_from([("data", "fsdp", "expert"), ("data", "fsdp")]))
    shape = (
        int(np.prod([sizes[axis] for axis in row_axes])) * draw(st.integers(1, 3)),
        sizes["context"] * draw(st.integers(1, 5)),
    )
    experts = sizes["expert"] * draw(st.integers(1, 3))
    k = draw(st.integers(1, min(4, experts)))
    pool = draw(st.integers(k, experts))  # k: all tokens on the same experts, for k = 1 on one
    headroom = draw(st.sampled_from([0.01, 0.5, 1.0, 2.0]))
    width = draw(st.integers(1, 9))
    return mesh, row_axes, headroom, shape, k, experts, pool, width, sizes["tensor"] * draw(st.integers(1, 6))


MESHES = ["expert=8", "expert=4,data=2", "expert=2,fsdp=4", "expert=2,tensor=2,data=2", "expert=4,context=2", "data=8"]


def drawn_cases_agree(examples):
    """Raises with the smallest case that differs."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(dispatches())
    def agrees(case):
        assert max(errors(*case)) <= DRAWN_TOLERANCE

    agrees()


def test_any_shape_on_any_mesh_gives_what_one_device_gives():
    on_devices(8, drawn_cases_agree, 5)


@pytest.mark.slow
def test_many_shapes_give_what_one_device_gives():
    on_devices(8, drawn_cases_agree, 60, timeout=1800)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("headroom", [0.01, 1.0, 2.0])
def test_the_rounds_have_room_for_every_pair_on_one_owner(tokens, headroom):
    plan = plan_dispatch(tokens, k=6, experts=32, owners=8, headroom=headroom)
    most_to_one_owner = tokens * min(6, plan.experts)
    assert plan.capacity * plan.rounds >= most_to_one_owner
    assert plan.capacity * (plan.rounds - 1) < most_to_one_owner
