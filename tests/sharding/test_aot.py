"""Compiling for machines that are not here: targets, refusals, what a report adds up to, and the real compilers."""

import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from flax import nnx
from gathered import assert_nothing_large, gathered
from jax.sharding import NamedSharding, PartitionSpec
from support import TINY

from dsv4_jax.analysis.hardware import hardware
from dsv4_jax.analysis.memory import cache_plan
from dsv4_jax.cli import compile_programs as programs
from dsv4_jax.cli import main
from dsv4_jax.cli.compile_report import as_json
from dsv4_jax.config import CSA, HCA
from dsv4_jax.errors import UserError
from dsv4_jax.kernels.platforms import compiling_for
from dsv4_jax.layers.moe import MoE
from dsv4_jax.presets import preset
from sharding import targets
from sharding.aot import Memory, Program, _refused, _size, advise, compile_for
from sharding.hlo import Collective
from sharding.mesh import make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.roofline import wire_bytes
from sharding.rules import STRATEGIES, check_axes, default_meshes, find_strategy
from sharding.targets import parse_target


def test_targets_count_chips_and_devices():
    pod, ironwood, cluster = (parse_target(text) for text in ("v5p:8x8x16", "tpu7x:4x4x4", "H200:2x8"))
    assert (pod.chips, pod.device_count, pod.is_tpu) == (1024, 1024, True)
    assert (ironwood.chips, ironwood.device_count) == (64, 128)  # two devices per chip
    assert (cluster.chips, cluster.is_tpu, cluster.chip.hbm_bytes) == (16, False, 141e9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", "no target 'v9:2x2'.*v5p:8x8x16.*h200:2x8"),
        ("v5p", "needs 3 numbers, chips along each axis"),
        ("v5p:8x8", "needs 3 numbers"),
        ("v5e:4x0", "needs 2 numbers"),
        ("h200:8", "needs 2 numbers, hosts x GPUs per host"),
        ("h200:two", "needs 2 numbers"),
    ],
)
def test_a_target_that_is_none_is_refused_with_examples(text, says):
    with pytest.raises(UserError, match=says):
        parse_target(text)


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(targets, "_exists", lambda module: False)
    for text, module in (("v5e:2x2", "libtpu"), ("h200:1x8", "xla_cuda13")):
        with pytest.raises(UserError, match=rf"needs {module}.*\.\[aot\]"):
            parse_target(text).devices()


def test_the_description_of_a_gpu_agrees_with_the_table_of_hardware():
    for name, gpu in targets.GPUS.items():
        assert gpu.bandwidth == hardware(name).hbm_bandwidth
        assert hardware(name).hbm_bytes <= gpu.memory < 1.08 * hardware(name).hbm_bytes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nano --target v9:2x2", "no target"),
        ("nona --target h200:1x8", "no preset 'nona'"),
        ("nano --target h200:1x8 --seq many", "--seq 'many'"),
        ("nano --target h200:1x8 --batch 0", "numbers from 1 on"),
        ("nano --target h200:1x8 --batch 8 --microbatches 3", "does not divide"),
        ("nano --target h200:1x8 --strategy magic", "no strategy 'magic'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(arguments, says, capsys):
    assert main(["compile", *arguments.split()]) == 2
    assert says in capsys.readouterr().err


def test_default_meshes_put_as_many_devices_on_the_experts_as_divide_them():
    flash = preset("v4-flash")
    assert default_meshes(flash, find_strategy("expert-fsdp"), 1024)[0] == "expert=256,fsdp=-1"
    assert default_meshes(flash, find_strategy("expert-tensor"), 8) == [f"expert={n},tensor=-1" for n in (8, 4, 2, 1)]
    assert default_meshes(preset("v4-pro"), find_strategy("expert-fsdp"), 2048)[0] == "expert=128,fsdp=-1"
    assert default_meshes(flash, find_strategy("expert-data"), 512)[0] == "expert=256,data=-1"
    assert default_meshes(flash, find_strategy("fsdp"), 64) == ["fsdp=-1"]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "one"])
def test_a_strategy_uses_every_axis_of_its_default_meshes(name):
    for text in default_meshes(preset("v4-flash"), STRATEGIES[name], 512):
        check_axes(STRATEGIES[name], parse_mesh(text, 512))


def test_an_axis_that_the_strategy_does_not_use_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(targets.Target, "devices", lambda self: [None] * 8)
    asked = "nano --target h200:1x8 --strategy fsdp --mesh expert=8"
    assert main(["compile", *asked.split()]) == 2
    assert "mesh axis expert=8: the strategy 'fsdp'" in capsys.readouterr().err


def mesh_of(hosts: int, gpus: int):
    devices = [SimpleNamespace(process_index=host) for host in range(hosts) for _ in range(gpus)]
    return SimpleNamespace(devices=np.array(devices, object))


def test_what_crosses_hosts_is_told_from_what_does_not():
    inside = Collective("all-gather", "", 800, (0, 1, 2, 3, 4, 5, 6, 7), ("fsdp",))
    assert wire_bytes(mesh_of(2, 8), [inside], True) == (700, 0)
    # A pair in two hosts: each sends its half over the network.
    pair = Collective("all-gather", "", 800, (0, 8), ("data",))
    assert wire_bytes(mesh_of(2, 8), [pair], True) == (0, 400)
    # All 16: half of the array comes from the other host, an eighth of it through each of the host's adapters.
    whole = Collective("all-gather", "", 800, tuple(range(16)), ("fsdp",))
    links, network = wire_bytes(mesh_of(2, 8), [whole], True)
    assert network == pytest.approx(50) and links + network == pytest.approx(750)
    exchange = Collective("all-to-all", "", 1600, tuple(range(16)), ("expert",))
    assert wire_bytes(mesh_of(2, 8), [exchange], True) == pytest.approx((700, 800))
    assert wire_bytes(mesh_of(2, 8), [exchange], False) == (1500, 0)


def array(shape, dtype=np.float32):
    return SimpleNamespace(shape=shape, dtype=np.dtype(dtype), sharding=None)


def refusal(message: str):
    program = Program("train", None, (array((1 << 28,)),), {"parameters": array((1 << 28,))}, flops=1e12)
    mesh = SimpleNamespace(shape={"fsdp": 4}, devices=mesh_of(1, 4).devices)
    return _refused(program, parse_target("v5e:2x2"), mesh, message, (1.0, 2.0))  # type: ignore[arg-type]


def test_a_program_that_the_tpu_compiler_refuses_is_reported_with_its_needs():
    found = refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (64.00G) exceeds "
        "available HBM (15.75G)."
    )
    assert (found.memory.temporary, found.memory.arguments, found.fits) == (64 << 30, 1 << 30, False)
    assert "49.0 GiB too much; working memory weighs most (64.0 GiB)" in found.advice


def test_the_listed_allocations_of_a_refusal_are_the_largest_arrays():
    found = refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.50G of 15.75G hbm. Exceeded hbm "
        "capacity by 17.75G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 16.00G\n"
        '     Operator: op_name="jit(f)/dot"\n'
        "     Shape: f32[65536,65536]{1,0:T(8,128)}\n     Unpadded size: 16.00G\n"
    )
    assert found.memory.temporary == _size("32.50G")
    assert list(found.largest) == [(16 << 30, "f32[65536,65536]", "jit(f)/dot")]


@pytest.mark.parametrize(
    ("parts", "within", "temporary", "says"),
    [
        ({"optimizer": 90, "parameters": 60}, {}, 20, "optimizer weighs most.*larger fsdp"),
        ({"cache": 90, "parameters": 60}, {}, 20, "cache weighs most.*fewer sequences"),
        ({"parameters": 10}, {"streams kept for the backward pass": 80}, 120, "streams.*--microbatches"),
        ({"parameters": 10}, {"gradients, float32": 10}, 120, r"working memory.*the largest array is f32\[9\]"),
    ],
)
def test_the_advice_follows_what_weighs_most(parts, within, temporary, says):
    memory = Memory(parts, sum(parts.values()), 0, temporary, within, 0, 100)
    found = SimpleNamespace(memory=memory, largest=[(36, "f32[9]", "jit(f)/mul")])
    assert re.search(says, advise(found))  # type: ignore[arg-type]


ONE_BLOCK = TINY.replace(
    num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,), num_nextn_predict_layers=0, num_hash_layers=0,
    n_routed_experts=8, q_lora_rank=16,
)  # fmt: skip


def compiled(*asked: tuple[str, str, dict[str, int], str | None]) -> list[Any]:
    """Reports of a small model by (mode, strategy, mesh, target); without a target for 8 CPU devices as a v5e:2x4."""
    reports = []
    for mode, strategy, sizes, target in asked:
        machine = parse_target(target or "v5e:2x4")
        mesh = make_mesh(sizes, machine.devices() if target else None)
        chosen = find_strategy(strategy)
        setting = programs.Setting(ONE_BLOCK, mesh, chosen, MeshPartition(mesh, chosen), 8, 24)
        make = {"train": programs.train_program, "decode": programs.decode_program, "prefill": programs.prefill_program}
        found = compile_for(make[mode](setting), machine, mesh)
        reports.append(as_json(found) | {"gathered": gathered(found.moved)})
    return reports


@pytest.fixture(scope="module")
def on_cpu() -> list[Any]:
    inference = "expert-tensor", {"expert": 4, "data": 2}, None
    training = "train", "expert-fsdp", {"expert": 4, "fsdp": 2}, None
    with pytest.MonkeyPatch.context() as patch:  # nothing runs, so nothing needs good machine code
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        return on_devices(8, compiled, training, ("decode", *inference), ("prefill", *inference))


def test_the_state_of_training_is_masters_and_as_much_again(on_cpu):
    memory = on_cpu[0]["memory"]
    parts = memory["parts"]
    assert sum(parts.values()) == pytest.approx(memory["arguments"], abs=64)  # the step, the key, small buffers
    assert parts["parameters"] < parts["optimizer"] < 2.2 * parts["parameters"]  # momentum; two moments for some


def test_training_sends_tokens_to_experts(on_cpu):
    sent = {(one["kind"], tuple(one["axes"])): one["bytes"] for one in on_cpu[0]["sent"]}
    assert sent["all-to-all", ("expert",)] > 0


def test_every_mode_has_bounds_and_fits(on_cpu):
    for found in on_cpu:
        assert found["fits"] and found["sent"] and 0 < found["seconds"]["at_least"] < 1, found["program"]
        assert found["utilisation"]["without_overlap"] <= found["utilisation"]["at_most"] <= 1


def test_the_cache_lies_with_its_rows(on_cpu):
    plan, rows = cache_plan(ONE_BLOCK), 4  # a half of eight
    whole, tables = rows * plan.sequence(24), rows * (plan.blocks(24) + 1) * 4  # block numbers, and the length
    for found in on_cpu[1:]:
        assert found["memory"]["parts"]["cache"] == whole + tables


def test_no_row_reads_the_cache_of_another_device(on_cpu):
    """Rows lie over `data`; what travels along it in a step is at most a row's token."""
    for found in on_cpu[1:]:
        assert sum(one["bytes"] for one in found["sent"] if "data" in one["axes"]) <= 8 * 4, found["sent"]


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x4", "h200:2x4", "b200:2x4"])
def test_a_train_step_compiles_and_gathers_nothing_large(target):
    (found,) = on_devices(1, compiled, ("train", "expert-fsdp", {"expert": 4, "fsdp": 2}, target))
    assert found["fits"] and found["chips"] == 8 and found["memory"]["temporary"] > 0
    sent = {(o["kind"], *o["axes"]) for o in found["sent"]}
    assert {("ragged-all-to-all", "expert"), ("all-gather", "fsdp")} <= sent  # of tokens, only those that there are
    assert found["gathered"]
    assert_nothing_large(found["gathered"], ONE_BLOCK, 8, 24)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x2", "h200:1x4", "b200:1x4"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_serving_compiles_and_every_cache_stays_where_its_rows_are(target, mode):
    """With `expert-data` tokens travel to the experts' devices, besides the count of rounds; no weight does."""
    (found,) = on_devices(1, compiled, (mode, "expert-data", {"expert": 4}, target))
    assert found["fits"] and found["chips"] == 4 and found["memory"]["temporary"] > 0
    assert not found["gathered"]
    expected = ("ragged-all-to-all", "all-to-all")
    others = [one for one in found["sent"] if one["kind"] not in expected]
    assert sum(one["bytes"] for one in others) <= 8, others


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v5e:2x2", "h200:1x4"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_decoding_a_few_sequences_sums_over_the_owners_of_experts_and_gathers_no_weight(target, tensor):
    """Neither the embedding nor a router's matrix: queries whose heads do not divide, and choices, of eight tokens."""
    (found,) = on_devices(1, compiled, ("decode", "expert-tensor", {"expert": 4 // tensor, "tensor": tensor}, target))
    assert found["fits"] and {one["kind"] for one in found["sent"]} <= {"all-reduce", "all-gather"}
    router = ONE_BLOCK.hidden_size, ONE_BLOCK.n_routed_experts
    assert not [shape for shape in found["gathered"] if ONE_BLOCK.vocab_size in shape or shape[-2:] == router]
    assert "h200" in target or (found["memory"]["program"] > 0 and found["compiler_flops"] > 0)


# Entries, keys and blocks of the release, two experts a device, three times a CSA and an HCA layer in a scan.
DEEP = TINY.replace(
    num_hidden_layers=6, layer_types=(CSA, HCA) * 3, compress_ratios=(4, 128) * 3, num_nextn_predict_layers=0,
    num_hash_layers=0, hidden_size=256, head_dim=512, qk_rope_head_dim=64, index_head_dim=128, index_topk=64,
    n_routed_experts=4, moe_intermediate_size=16384,
)  # fmt: skip


def deep_decode(target: str, cache_format: str) -> dict[str, int]:
    """The memory of decoding four sequences of 128K tokens with DEEP."""
    machine, chosen = parse_target(target), find_strategy("expert-tensor")
    mesh = make_mesh({"expert": 2, "data": 2}, machine.devices())
    setting = programs.Setting(DEEP, mesh, chosen, MeshPartition(mesh, chosen), 4, 131072)
    found = compile_for(programs.decode_program(setting, cache_format), machine, mesh)
    return {"temporary": found.memory.temporary, "cache": found.memory.parts["cache"]}


@pytest.mark.aot
@pytest.mark.parametrize(("target", "most"), [("v5e:2x2", 25e6), ("h200:1x4", 50e6)])
@pytest.mark.parametrize("cache_format", ["deployed", "bfloat16"])
def test_decoding_copies_neither_the_cache_nor_a_layers_experts(target, most, cache_format):
    """Pools by part took 448 MB on the v5e, experts sliced out of their stacks 90 MB on the H200."""
    found = on_devices(1, deep_decode, target, cache_format)
    assert found["cache"] > 130e6 and found["temporary"] < most, found


def moe_program(target: str) -> str:
    """The compiled text of a block's experts, tokens spread over four devices."""
    machine = parse_target(target)
    config = TINY.replace(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=16, num_experts_per_tok=4)
    mesh = make_mesh({"expert": 4}, machine.devices())
    partition = MeshPartition(mesh, find_strategy("expert-fsdp"))
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(config, "moe", nnx.Rngs(0))))

    def array(shape: tuple[int, ...], dtype: Any, spread: bool) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec("expert" if spread else None))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        whole = jax.tree_util.keystr(path)
        return array(leaf.shape, jnp.bfloat16 if leaf.ndim > 1 else leaf.dtype, "['experts']" in whole)

    state = jax.tree_util.tree_map_with_path(placed, nnx.to_pure_dict(state))
    given = [array((8, 512, *more), kind, True) for more, kind in (((1024,), jnp.bfloat16), ((), "int32"), ((), bool))]
    run = lambda state, *given: nnx.merge(graph, state)(*given, partition=partition)[0]  # noqa: E731
    with compiling_for(machine.platform, machine.capability):
        lowered = jax.jit(run).lower(state, *given)
    return lowered.compile(compiler_options=machine.compiler_options or None).as_text()


@pytest.mark.aot
def test_the_shared_expert_multiplies_while_results_travel_back():
    """On GPUs. A TPU's ragged exchange is one instruction, with nothing beside it."""
    text = on_devices(1, moe_program, "h200:1x4")
    start = text.rindex("ragged-all-to-all-start(")  # of the round that always runs, on its way back
    meanwhile = text[start : text.index("ragged-all-to-all-done(", start)]
    assert len(re.findall(r"gemm_fusion_dot[.\d]* = |__cublas", meanwhile)) >= 2, meanwhile[:2000]


@pytest.mark.slow
@pytest.mark.aot
def test_v4_flash_decodes_a_million_tokens_on_one_host_of_h200s(capsys):
    asked = "v4-flash --target h200:1x8 --mode decode --batch 8 --seq 1M --json"
    assert main(["compile", *asked.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["memory"]["parts"]["cache"] > 8 * 3.4e9 and not found["sent"][0]["bytes"] > 1e9
