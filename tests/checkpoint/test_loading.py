"""Loading onto devices: every cut of every leaf, only the bytes that are needed, and little memory on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from loading_process import free_port
from synthetic_release import EVEN, SMALL, make_release, write_folder

import dsv4_jax as dsv4
from dsv4_jax.checkpoint import CheckpointError, load_checkpoint, load_params, loading, read_config
from dsv4_jax.checkpoint.files import list_tensors
from dsv4_jax.shapes import flatten, nest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "public" / "pub_a"
SCRIPT = Path(__file__).with_name("loading_process.py")
MIDDLE = EVEN.replace(vocab_size=4096, hidden_size=512, moe_intermediate_size=512, n_routed_experts=8)


def start(*arguments, devices=1):
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("release") / "fp4", SMALL, make_release(SMALL)[0])


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A release of 45 million numbers, most of them experts of 128 KB each."""
    return write_folder(tmp_path_factory.mktemp("middle") / "fp4", MIDDLE, make_release(MIDDLE)[0])


@pytest.mark.parametrize(
    "staging", [pytest.param(1 << 28, id="on the host"), pytest.param(1 << 14, id="large ones on their devices")]
)
def test_shards_on_eight_devices_are_parts_of_the_whole(release, staging):
    found = result(start("sharded", release, staging, devices=8))
    assert found["cut"] > found["leaves"] / 2


def test_a_process_reads_only_what_its_devices_hold(tmp_path):
    release = write_folder(tmp_path / "even", EVEN, make_release(EVEN)[0])
    port = free_port()
    both = [result(p) for p in [start("half", release, port, number, devices=2) for number in range(2)]]
    entries = list_tensors(release)
    everything = sum(entry.nbytes for entry in entries.values())
    scales = {False: 0, True: 0}  # read twice: once to look for NaN before anything else, once with their weight
    for name, entry in entries.items():
        if entry.dtype in ("F8_E8M0", "I64"):
            scales[".experts." in name and "mtp" not in name] += entry.nbytes
    for process in both:
        assert process["devices"] == 2
        halves = (process["experts"] + scales[True]) / 2
        assert process["read"] == everything - process["experts"] + scales[False] + halves


@pytest.mark.parametrize("where", ["host", "device"])
def test_memory_beyond_the_parameters_is_a_few_times_the_largest_tensor(middle, where):
    found = result(start("memory", middle, where))
    assert found["read"] == found["stored"] + found["twice"]
    held = found["peak"] - (found["params"] if where == "host" else 0)
    assert held < 2.5 * found["largest"] + (1 << 21), found  # names and rules count too
    assert found["grown"] < found["params"] + 4 * found["largest"] + (48 << 20), found


@pytest.mark.parametrize(("scheme", "quantise"), [("released", "release"), ("transformers", "none")])
def test_converting_holds_a_few_matrices_and_never_the_model(middle, tmp_path, scheme, quantise):
    found = result(start("conversion", middle, tmp_path / "out", scheme, quantise))
    assert found["peak"] < 3 * found["largest"] + (4 << 20), found


def test_one_device_gets_what_the_host_loads(release, monkeypatch):
    config = read_config(release)
    host = flatten(load_params(release, config))
    for staging in (loading.STAGING, 0):
        monkeypatch.setattr(loading, "STAGING", staging)
        device = flatten(load_params(release, config, SingleDeviceSharding(jax.devices()[0])))
        for path, array in device.items():
            assert isinstance(array, jax.Array)
            assert array.dtype == host[path].dtype and np.asarray(array).tobytes() == host[path].tobytes(), path


def test_a_tree_of_shardings_has_the_leaves_of_the_parameters():
    config, params = load_checkpoint(FIXTURE)
    one = SingleDeviceSharding(jax.devices()[0])
    tree = nest(dict.fromkeys(flatten(params), one))
    assert flatten(load_params(FIXTURE, config, tree)).keys() == flatten(params).keys()
    del tree["norm"]
    with pytest.raises(CheckpointError, match="differ in leaves: norm"):
        load_params(FIXTURE, config, tree)


def test_the_face_loads_a_quantised_release_and_runs_it(release):
    model = dsv4.load(release)
    assert model.params["embed"].dtype == jax.numpy.bfloat16
    logits = model.forward(model.params, np.arange(12)[None]).logits
    assert logits.shape == (1, 12, SMALL.vocab_size) and bool(np.isfinite(logits).all())
