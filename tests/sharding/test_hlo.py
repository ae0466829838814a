"""Collectives of a program's text: hand-written text with known answers, and programs compiled for 8 CPU devices."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from devices import on_devices
from jax.sharding import NamedSharding, PartitionSpec

from sharding.hlo import Collective, array_bytes, bytes_by_axis, collectives, largest_arrays
from sharding.hlo_groups import first_group
from sharding.mesh import make_mesh

MESH = {"data": 2, "expert": 4}

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %permuted = f32[8]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %t = (s32[], f32[8]) tuple(%i, %permuted)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  %p = (s32[], f32[8]) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %gather-start = (bf16[2,16]{1,0}, bf16[8,16]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(step)/while/body/gather"}
  %gather-done = bf16[8,16]{1,0} all-gather-done(%gather-start), metadata={op_name="jit(step)/while/body/gather"}
  %loop = (s32[], f32[8]) while(%start), condition=%inner_condition, body=%inner_body
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%unknown (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %bound = s32[] get-tuple-element(%p), index=1
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%scattered (x: f32[64]) -> f32[16] {
  %x = f32[64] parameter(0)
  ROOT %part = f32[16] reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%taken (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %exchanged = f32[8] all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%other (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8] parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %outer = (s32[], f32[8]) while(%start), condition=%unknown, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %open = (s32[], f32[8]) while(%start), condition=%unknown, body=%inner_body
  %begun = ((f32[64]), f32[16], s32[]) async-start(%big), calls=%scattered
  %ended = f32[16] async-done(%begun), calls=%scattered
  %total = (f32[10], /*index=1*/f32[6]) all-reduce(%g, %h), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %chosen = f32[8] conditional(%which, %x, %x), branch_computations={%taken, %other}
  %alone = f32[8] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %out = f32[1000,1000] broadcast(%x), metadata={op_name="jit(step)/out"}
}
"""


def found(kind: str) -> list[Collective]:
    return [one for one in collectives(TEXT, MESH) if one.kind == kind]


def test_an_asynchronous_gather_in_a_loop_counts_once_per_trip():
    (gather,) = found("all-gather")
    assert (gather.times, gather.exact, gather.axes, gather.members) == (5, True, ("expert",), (0, 1, 2, 3))
    assert gather.sent == 5 * 8 * 16 * 2 * 3 / 4  # five times what three of four devices hold, bfloat16
    assert gather.op_name == "jit(step)/while/body/gather"


def test_trips_of_nested_loops_multiply_and_unknown_ones_are_marked():
    nested, open_ended = found("collective-permute")
    assert (nested.times, nested.exact, nested.axes) == (15, True, ("data",))
    assert (open_ended.times, open_ended.exact) == (1, False)
    assert nested.once == 8 * 4


def test_a_wrapped_reduce_scatter_is_counted_at_its_start_only():
    (scatter,) = found("reduce-scatter")
    assert (scatter.axes, scatter.sent) == (("expert",), 64 * 4 * 3 / 4)


def test_an_all_reduce_of_several_arrays_sends_twice_their_bytes_but_one_share():
    (reduce,) = found("all-reduce")  # the one among single devices is none
    assert (reduce.axes, reduce.sent) == (("data",), 2 * 16 * 4 / 2)


def test_what_a_branch_would_send_is_kept_out_of_the_sums():
    (exchange,) = found("all-to-all")
    assert exchange.conditional and exchange.members == (0, 1, 2, 3)
    assert ("all-to-all", ("expert",)) not in bytes_by_axis(collectives(TEXT, MESH))


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use_global_device_ids=true", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_are_read_in_every_form(text: str, members: tuple[int, ...]):
    assert first_group(f"%x), channel_id=1, {text}, dimensions={{0}}", 8) == members


def test_bytes_of_shapes():
    assert array_bytes("bf16[8,128]{1,0:T(8,128)(2,1)}") == 2048
    assert array_bytes("(f32[4], /*index=1*/ s32[], pred[3], f8e4m3fn[5], u4[3], token[])") == 16 + 4 + 3 + 5 + 2


def test_the_largest_arrays_name_their_origin():
    assert largest_arrays(TEXT, 1) == [(4_000_000, "f32[1000,1000]", "jit(step)/out")]


def programs() -> dict[str, list[tuple[str, tuple[str, ...], int, bool, float]]]:
    """What small programs on 8 CPU devices move."""
    mesh = make_mesh({"data": 2, "expert": 4})
    rows = PartitionSpec(("data", "expert"))

    def array(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        whole = lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))  # noqa: E731
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, weights)[0]

    def mapped(body: Any) -> Any:
        return jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows)

    x = array((16, 8), rows)
    weights = array((6, 64, 64), PartitionSpec(None, "expert"))
    cases = {
        "scan": (layers, array((8, 64), PartitionSpec("data")), weights),
        "exchange": (mapped(lambda x: jax.lax.all_to_all(x, "expert", 1, 0, tiled=True)), x),
        "shift": (mapped(lambda x: jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)])), x),
        "local": (lambda x: x + 1, x),
    }
    texts = {name: jax.jit(f).lower(*arguments).compile().as_text() for name, (f, *arguments) in cases.items()}
    found = {name: collectives(text or "", mesh.shape) for name, text in texts.items()}
    return {name: [(c.kind, c.axes, c.times, c.exact, c.sent) for c in moved] for name, moved in found.items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return on_devices(8, programs)


def test_a_scan_over_sharded_weights_gathers_every_layer_once(compiled):
    gathered = [sent for _, axes, _, _, sent in compiled["scan"] if axes == ("expert",)]
    assert sum(gathered) == 6 * 64 * 64 * 4 * 3 / 4
    assert all(exact for *_, exact, _ in compiled["scan"])


def test_explicit_exchanges_are_found_with_their_bytes(compiled):
    assert compiled["exchange"] == [("all-to-all", ("expert",), 1, True, 2 * 8 * 4 * 3 / 4)]
    assert compiled["shift"] == [("collective-permute", ("expert",), 1, True, 2 * 8 * 4)]


def test_local_work_moves_nothing(compiled):
    assert compiled["local"] == []
