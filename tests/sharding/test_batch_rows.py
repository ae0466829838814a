"""Every process makes the rows of its own devices, and every device finds its rows there, wherever a mesh puts them."""

import itertools
import re
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import on_devices
from jax.sharding import NamedSharding
from support import TINY

from sharding.batch_rows import place_among, rows_of
from sharding.mesh import AXES, make_mesh, parse_mesh
from sharding.partition import MeshPartition
from sharding.rules import find_strategy, spec
from sharding.targets import parse_target
from train import placement
from train.data.batches import RowBatches
from train.loop import Run
from train.placement import Placement
from train.recipe import find_recipe
from train.run_folder import RunFolder

DOCS = Path(__file__).parents[2] / "docs"
LENGTH = 32


class Numbered:
    """Row i holds LENGTH * i, LENGTH * i + 1, .., so that every token says where it belongs."""

    def row(self, index):
        return {"tokens": np.arange(LENGTH, dtype=np.int32) + LENGTH * index}


def shared_out(mesh, strategy, process_of):
    """Makes a batch as the processes of a mesh would; the rows that each made, after a look at every device's part."""
    rows = 2 * mesh.size
    whole = np.arange(2 * rows * LENGTH, dtype=np.int32).reshape(2, rows, LENGTH)
    sharding = NamedSharding(mesh, spec(strategy.activations, ("batch", "seq"), mesh))
    places, processes, made = sharding.devices_indices_map((rows, LENGTH)), defaultdict(list), {}
    for device in mesh.devices.flat:
        processes[process_of(device)].append(device)
    for process, devices in processes.items():
        own = rows_of(devices, sharding, rows)
        batches = RowBatches(Numbered(), rows, {}, own)
        for batch in whole:
            mine = next(batches)["tokens"]
            for device in devices:
                index = places[device]
                assert np.array_equal(mine[place_among(own, index[0], rows), index[1]], batch[index]), (process, device)
        made[process] = own
    assert {row for own in made.values() for row in own} == set(range(rows))
    return made


def together(own):
    return own == tuple(range(own[0], own[0] + len(own)))


MESHES = [
    ("fsdp", "fsdp=8"),
    ("fsdp", "data=2,fsdp=4"),
    ("expert-fsdp", "data=2,fsdp=2,expert=2"),
    ("expert-tensor", "data=4,tensor=2"),
    ("long-context", "expert=2,context=4"),
    ("long-context", "context=8"),
]


def on_drawn_meshes(seed):
    """Processes of two and four devices, which stand in the mesh in any order; whether any had rows apart."""
    apart, rng = 0, np.random.default_rng(seed)
    for (name, text), size, _ in itertools.product(MESHES, (2, 4), range(4)):
        shape = [parse_mesh(text, 8)[axis] for axis in AXES]
        mesh = jax.sharding.Mesh(np.array(jax.devices())[rng.permutation(8)].reshape(shape), AXES)
        made = shared_out(mesh, find_strategy(name), lambda device, size=size: device.id // size)
        apart += sum(not together(own) for own in made.values())
        placed = Placement(MeshPartition(mesh, find_strategy(name)), TINY)
        batch = next(RowBatches(Numbered(), 8, {}, placed.own_rows(8)))
        assert np.array_equal(placed.to_devices(batch, 8)["tokens"], np.arange(8 * LENGTH).reshape(8, LENGTH))
    return apart


def test_rows_are_shared_out_on_any_order_of_devices():
    assert on_devices(8, on_drawn_meshes, 0) > 20


def test_a_run_asks_once_which_rows_are_its_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(placement, "rows_of", lambda *args: asked.append(args) or rows_of(*args))
    recipe = find_recipe("nano")
    run = Run(recipe, recipe.check(), RunFolder(tmp_path), MeshPartition(make_mesh({}), find_strategy("fsdp")))
    assert run.plan is run.plan and run.plan.placement is run.plan.placement
    for _ in range(3):
        run.plan.placement.to_devices({"tokens": np.zeros((5, LENGTH), np.int32)}, 5)
    assert len(asked) == 1


def documented():
    """(strategy, mesh, machine) of every command in the recipes and the document about pods."""
    machines = {16: ("v5p:2x2x4", "h200:2x8"), 4: ("v5e:2x2", "h200:2x2")}
    texts = [path.read_text() for path in (DOCS / "pods.md", *sorted((DOCS / "recipes").iterdir()))]
    found = {words for text in texts for words in re.findall(r"--strategy (\S+) --mesh ([\w=,]+)", text)}
    sizes = lambda mesh: np.prod([int(size) for size in re.findall(r"\d+", mesh)])  # noqa: E731
    return [(*words, machine) for words in sorted(found) for machine in machines[sizes(words[1])]]


SLICES = [
    ("fsdp", "fsdp=-1", "v5e:4x4"),
    ("fsdp", "fsdp=-1", "v5e:16x16"),
    ("fsdp", "fsdp=-1", "v6e:16x16"),
    ("fsdp", "fsdp=-1", "v5p:4x4x4"),
    ("expert-fsdp", "expert=64,fsdp=4", "v5p:4x8x8"),
    ("expert-fsdp", "expert=128,fsdp=8", "v5p:8x8x16"),
    ("long-context", "context=16,expert=64", "v5p:8x8x16"),
]


def test_the_documented_meshes_are_found():
    assert len(documented()) == 4


@pytest.mark.aot
@pytest.mark.parametrize(("strategy", "mesh", "machine"), [*documented(), *SLICES])
def test_rows_are_shared_out_on_the_wiring_of_real_machines(strategy, mesh, machine):
    devices = parse_target(machine).devices()
    laid = make_mesh(parse_mesh(mesh, len(devices)), devices)
    made = shared_out(laid, find_strategy(strategy), lambda device: device.process_index)
    print(machine, len(made), "processes, of which", sum(not together(own) for own in made.values()), "have rows apart")
