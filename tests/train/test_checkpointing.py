"""A run can be killed, its disk can fill or rot, and what comes back is bitwise what was saved, or a clear refusal."""

import errno
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import checkpoint_files, checkpoint_record
from train.checkpointing import CheckpointError, Checkpoints, MismatchError, load_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = {"config": {"hidden_size": 8}, "data": {"seed": 3, "sample": 17}, "loss": [1.5, 0.1 + 0.2]}


def make_state(seed: int, width: int = 8):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "params": {
            "embed": jax.random.normal(keys[0], (16, width), jnp.bfloat16),
            "blocks": [{"query": jax.random.normal(keys[1], (2, width, 3))}, {"none": jnp.zeros((0, 4))}],
        },
        "buffers": {"routes": jax.random.randint(keys[2], (5, 7), -9, 9), "used": jnp.array([True, False])},
        "optimizer": (jax.random.normal(keys[3], (width,)).at[0].set(jnp.nan).at[1].set(-0.0), None),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def raw(tree):
    return [(np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_bitwise(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert raw(got) == raw(expected)


def saved(folder, steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), HOST)
    checkpoints.wait()
    return checkpoints


def array_data(folder):
    """The file that holds the values, the largest of Orbax's folders named ``d``."""
    return max((p for p in folder.rglob("d/*") if "process" not in str(p)), key=lambda p: p.stat().st_size)


def test_every_dtype_comes_back_bitwise_with_its_host_values(tmp_path):
    with saved(tmp_path / "run", [7]) as checkpoints:
        step, state, host = checkpoints.restore(abstract(make_state(0)))
    assert step == 7 and host == HOST
    assert_bitwise(state, make_state(7))
    assert state["params"]["embed"].dtype == jnp.bfloat16 and state["key"].dtype == jnp.uint32


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = bump(jnp.zeros((600, 1000)))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"params": {"x": x}}, HOST)
        for _ in range(20):
            x = bump(x)
        _, state, _ = checkpoints.restore({"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}})
    assert np.unique(np.asarray(state["params"]["x"])).tolist() == [1.0]


def test_the_newest_steps_stay(tmp_path):
    with saved(tmp_path / "run", range(1, 6), keep=2) as checkpoints:
        assert checkpoints.steps == [4, 5]


def test_a_good_step_is_never_written_over(tmp_path):
    with saved(tmp_path / "run", [2, 4]) as checkpoints:
        for step in (2, 3, 4):
            with pytest.raises(FileExistsError, match="already holds step"):
                checkpoints.save(step, make_state(9), HOST)
        assert_bitwise(checkpoints.restore(abstract(make_state(0)))[1], make_state(4))


def test_restoring_an_older_step_warns_that_newer_ones_are_in_the_way(tmp_path, caplog):
    with saved(tmp_path / "run", [2, 4]) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)), step=2)[0] == 2
        assert "also holds step 4" in caplog.text
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 .* holds steps 2, 4"):
            checkpoints.restore(abstract(make_state(0)), step=3)


def test_an_empty_folder_is_told_apart_from_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore(abstract(make_state(0)))


def truncate(step_folder):
    path = array_data(step_folder)
    os.truncate(path, path.stat().st_size // 2)


def lose_data(step_folder):
    array_data(step_folder).unlink()


def lose_item(step_folder):
    shutil.rmtree(step_folder / "params")


def lose_record(step_folder):
    shutil.rmtree(step_folder / "host")


def alter_record(step_folder):
    path = step_folder / "host" / "metadata"
    path.write_text(path.read_text().replace('"sample": 17', '"sample": 18').replace('"sample":17', '"sample":18'))


def swap_in_other_step(step_folder):
    shutil.rmtree(step_folder / "params")
    shutil.copytree(step_folder.parent / "2" / "params", step_folder / "params")


@pytest.mark.parametrize("damage", [truncate, lose_data, lose_item, lose_record, alter_record, swap_in_other_step])
def test_a_damaged_step_is_skipped_with_a_message_and_set_aside_by_the_next_save(tmp_path, caplog, damage):
    saved(tmp_path, [2, 4], keep=2).close()
    damage(tmp_path / "4")
    with Checkpoints(tmp_path, keep=2) as checkpoints, caplog.at_level(logging.WARNING):
        step, state, host = checkpoints.restore(abstract(make_state(0)))
        assert step == 2 and host == HOST
        assert_bitwise(state, make_state(2))
        assert "skipping the damaged checkpoint of step 4" in caplog.text
        checkpoints.save(3, make_state(3), HOST)
        checkpoints.save(4, make_state(4), HOST)
        assert_bitwise(checkpoints.restore(abstract(make_state(0)))[1], make_state(4))
        assert checkpoints.steps == [3, 4] and (tmp_path / "damaged-4").is_dir()


def unreadable(path):
    """A file that is there and cannot be opened: the system answers with an error of its own, not "no such file"."""
    path.unlink()
    path.symlink_to(path.name)


def hide_data(step_folder):
    unreadable(array_data(step_folder))


def hide_record(step_folder):
    unreadable(step_folder / "host" / "metadata")


@pytest.mark.parametrize("hide", [hide_data, hide_record])
def test_a_step_that_cannot_be_read_now_ends_the_run_and_is_left_where_it_is(tmp_path, caplog, monkeypatch, hide):
    monkeypatch.setattr(checkpoint_files, "PAUSES", (0.0, 0.0))
    saved(tmp_path / "run", [2, 4]).close()
    shutil.copytree(tmp_path / "run" / "4", tmp_path / "kept")
    hide(tmp_path / "run" / "4")
    with pytest.raises(CheckpointError, match="4 could not be read now, and nothing was changed.*symbolic links"):
        Checkpoints(tmp_path / "run").restore(abstract(make_state(0)))
    assert caplog.text.count("another try") == 2
    shutil.rmtree(tmp_path / "run" / "4")
    shutil.copytree(tmp_path / "kept", tmp_path / "run" / "4")
    assert Checkpoints(tmp_path / "run").restore(abstract(make_state(0)))[0] == 4


def test_a_folder_that_cannot_be_read_now_is_not_an_empty_one(tmp_path):
    saved(tmp_path / "run", [2]).close()
    (tmp_path / "run").rename(tmp_path / "kept")
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(CheckpointError, match="run could not be read now: .*symbolic links"):
        Checkpoints(tmp_path / "run").restore(abstract(make_state(0)))
    assert Checkpoints(tmp_path / "kept").steps == [2]


def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "PAUSES", (0.0,))
    saved(tmp_path, [2, 4]).close()
    read, answers = checkpoint_files._read_arrays, [OSError(errno.ETIMEDOUT, "Connection timed out")]

    def flaky(*arguments):
        if answers:
            raise answers.pop()
        return read(*arguments)

    monkeypatch.setattr(checkpoint_files, "_read_arrays", flaky)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[0] == 4
        checkpoints.save(5, make_state(5), HOST)
    assert not list(tmp_path.glob("damaged-*")) and Checkpoints(tmp_path).steps == [2, 4, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops half-read files.
def test_any_flipped_byte_is_detected_or_harmless(tmp_path, caplog):
    """Flips bytes in every file of a step; what is restored is always one of the two saved states, bitwise."""
    saved(tmp_path / "run", [2, 4]).close()
    shutil.copytree(tmp_path / "run" / "4", tmp_path / "intact")
    expected, detected = {2: raw(make_state(2)), 4: raw(make_state(4))}, 0
    dice = random.Random(0)
    for path in sorted(p for p in (tmp_path / "intact").rglob("*") if p.stat().st_size and p.is_file()):
        target = tmp_path / "run" / "4" / path.relative_to(tmp_path / "intact")
        for _ in range(2):
            content = bytearray(path.read_bytes())
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            target.write_bytes(content)
            step, state, host = Checkpoints(tmp_path / "run").restore(abstract(make_state(0)))
            assert raw(state) == expected[step] and host == HOST
            detected += step == 2
        target.write_bytes(path.read_bytes())
    assert detected > 5


def test_when_all_are_damaged_each_reason_is_given(tmp_path):
    saved(tmp_path, [2, 4]).close()
    truncate(tmp_path / "2")
    lose_record(tmp_path / "4")
    with pytest.raises(CheckpointError, match=r"(?s)can be used:\n  step 4: .*\n  step 2: "):
        Checkpoints(tmp_path).restore(abstract(make_state(0)))


def test_another_models_checkpoint_is_refused_by_name_shape_and_config(tmp_path):
    with saved(tmp_path, [2, 4]) as checkpoints:
        with pytest.raises(MismatchError) as refusal:
            checkpoints.restore(abstract(make_state(0, width=12)))
        assert "params/embed: checkpoint bfloat16[16, 8], model bfloat16[16, 12]" in str(refusal.value)
        assert '"hidden_size": 8' in str(refusal.value) and "3 of 8 arrays differ" in str(refusal.value)
        renamed = abstract(make_state(0))
        renamed["buffers"]["bias"] = renamed["buffers"].pop("used")
        with pytest.raises(MismatchError, match=r"buffers/bias: checkpoint has none, model bool\[2\]"):
            checkpoints.restore(renamed)


def test_what_cannot_be_saved_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"state\[step\] is a int.*jnp.asarray"):
            checkpoints.save(1, {"step": 3}, HOST)
        with pytest.raises(TypeError, match=r"state\[key\].*jax.random.key_data"):
            checkpoints.save(1, {"key": jax.random.key(0)}, HOST)
        with pytest.raises(TypeError, match="`host` has to be JSON"):
            checkpoints.save(1, make_state(1), {"x": jnp.ones(2)})
        assert checkpoints.steps == []


def test_parameters_load_without_knowing_the_optimizer(tmp_path):
    saved(tmp_path, [2, 4]).close()
    config, params = load_params(tmp_path)
    expected = make_state(4)["params"]
    assert config == HOST["config"]
    np.testing.assert_array_equal(params["embed"], expected["embed"])
    np.testing.assert_array_equal(params["blocks"]["0"]["query"], expected["blocks"][0]["query"])
    _, shaped = load_params(tmp_path, step=2, abstract_params=abstract(expected))
    assert_bitwise(shaped, make_state(2)["params"])
    truncate(tmp_path / "4" / "params")
    np.testing.assert_array_equal(load_params(tmp_path)[1]["embed"], make_state(2)["params"]["embed"])


def test_a_full_disk_is_reported_at_the_next_call_and_earlier_steps_survive(tmp_path):
    big = {"params": {"noise": jax.random.normal(jax.random.key(0), (300, 1000))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big, HOST)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
        try:
            with pytest.raises(CheckpointError, match=r"(?s)step 2 in .* failed: .*intact: step 1\."):
                checkpoints.save(2, big, HOST)
                checkpoints.save(3, big, HOST)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_bitwise(checkpoints.restore(abstract(big))[1], big)
        checkpoints.save(3, big, HOST)
        checkpoints.wait()
        assert checkpoints.steps == [3] and [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int4", "uint8", "bool", "float16"])
def test_changing_any_element_or_swapping_two_changes_the_checksum(dtype):
    x = jnp.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    total = checkpoint_record.checksums({"x": x})["x"]
    changed = [x.at[i, j].set((1 - x[i, j].astype(int)).astype(dtype)) for i in range(2) for j in range(3)]
    sums = [checkpoint_record.checksums({"x": y})["x"] for y in [*changed, x[:, ::-1], x[::-1]]]
    assert total not in sums and len(set(sums)) == len(sums)


KILLED_RUN = """
    import sys, jax, jax.numpy as jnp
    from train.checkpointing import Checkpoints
    make = jax.jit(lambda s: {"params": {f"w{i}": jax.random.normal(jax.random.key(s), (400, 400)) for i in range(9)},
                              "step": jnp.int32(s)})
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    start = 0
    if checkpoints.steps:
        start, state, host = checkpoints.restore(jax.eval_shape(make, 0))
        for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(make(start)), strict=True):
            assert (got == expected).all(), "restored something else than was saved"
        assert host == {"at": start}
    print("resumed", start, flush=True)
    for step in range(start + 1, 10**6):
        checkpoints.save(step, make(step), {"at": step})
        print("saving", step, flush=True)
"""


def test_killed_again_and_again_in_the_middle_of_saves_it_resumes_from_a_verified_step(tmp_path):
    dice = random.Random(1)
    command = [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    resumed, reached = [], 0
    for _ in range(4):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            resumed.append(int(process.stdout.readline().split()[1]))
            for _ in range(4):
                assert process.stdout.readline().startswith("saving"), "the run ended by itself"
            time.sleep(dice.uniform(0, 0.06))
            process.kill()
            reached = max([reached, *(int(line.split()[1]) for line in process.stdout.read().splitlines() if line)])
    assert resumed == sorted(set(resumed)) and resumed[1] > 0
    folder = checkpoint_files.absolute(tmp_path / "run")
    _, record = checkpoint_files.newest_good(folder, None, checkpoint_record.abstract)
    assert record["step"] >= resumed[-1]


RESHARDED = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from train.checkpointing import Checkpoints
    def place(shape, names, spec):
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
        return NamedSharding(mesh, P(*spec))
    values = np.arange(96, dtype=np.float32).reshape(8, 12)
    old, new = place((4,), ("a",), ("a", None)), place((2, 2), ("x", "y"), ("y", "x"))
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"params": {"w": jax.device_put(values, old)}}, {"config": {}})
        wanted = {"params": {"w": jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=new)}}
        _, state, _ = checkpoints.restore(wanted)
    assert state["params"]["w"].sharding == new, state["params"]["w"].sharding
    np.testing.assert_array_equal(state["params"]["w"], values)
"""


def test_a_state_saved_on_one_mesh_is_restored_and_verified_on_another(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    subprocess.run([sys.executable, "-c", textwrap.dedent(RESHARDED), str(tmp_path)], env=environment, check=True)


TWO_PROCESSES = """
    import os, pathlib, sys, jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2)
    folder, port, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from train import checkpoint_files
    from train.checkpointing import Checkpoints
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    values = np.arange(96, dtype=np.float32).reshape(8, 12)
    rows, columns = NamedSharding(mesh, P("a")), NamedSharding(mesh, P(None, "a"))
    make = lambda step: {"params": jax.make_array_from_callback(values.shape, rows, lambda at: values[at] + step)}
    wanted = {"params": jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=columns)}
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), {"step": step})
        checkpoints.wait()
        if rank == 0:
            data = max((folder / "3" / "params").rglob("d/*"), key=os.path.getsize)
            os.truncate(data, os.path.getsize(data) // 2)
        sync_global_devices("one process's part of step 3 is cut short")
        step, state, host = checkpoints.restore(wanted)
        assert step == 2 and host == {"step": 2}
        for shard in state["params"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index] + 2)
        checkpoints.save(3, make(3), {"step": 3})
        checkpoints.wait()
        assert checkpoints.restore(wanted)[0] == 3
        read, tries = checkpoint_files._read_arrays, []
        def flaky(*arguments):
            tries.append(rank)
            if tries == [1]:
                raise OSError("this process alone cannot read")
            return read(*arguments)
        checkpoint_files.PAUSES, checkpoint_files._read_arrays = (0.0,), flaky
        assert checkpoints.restore(wanted)[0] == 3 and len(tries) == 2
"""


def test_two_processes_save_one_state_and_agree_on_what_is_damaged(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(tmp_path / "run"), str(port)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def test_the_record_is_plain_json_that_names_every_array(tmp_path):
    saved(tmp_path, [2]).close()
    record = json.loads((tmp_path / "2" / "host" / "metadata").read_text())
    assert record["leaves"]["params/embed"][:2] == [[16, 8], "bfloat16"]
    assert record["host"] == HOST
