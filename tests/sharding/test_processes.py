"""Jobs of several real processes on this machine: how they start, fail, end, and go on as another number of them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from faults import spoilt_after
from jax.sharding import AbstractMesh

from dsv4_jax import cli, weights
from dsv4_jax.cli.launch import environment, free_port
from dsv4_jax.errors import UserError
from sharding.mesh import AXES, parse_mesh
from sharding.processes import Processes
from sharding.rules import check_fit, find_strategy
from train import stage_run
from train.data.pipeline import BatchConfig, TrainBatches
from train.data.tokens import prepare
from train.loop import train
from train.metrics import read_metrics
from train.recipe import find_recipe

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1, "compress_ratios": [4], "num_hash_layers": 0,
    "layer_types": ["compressed_sparse_attention"], "num_attention_heads": 2, "head_dim": 8, "qk_rope_head_dim": 4,
    "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 4, "index_n_heads": 1, "index_head_dim": 8, "index_topk": 4,
    "sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "hc_mult": 2,
    "hc_sinkhorn_iters": 3, "num_nextn_predict_layers": 0,
}  # fmt: skip
STEPS, TOLERANCE = 40, 2e-5  # of losses, relative; measured: 6e-7 behind 40 steps
HEARTBEAT, BOUND = 10, 60  # seconds; a busy machine needs some of them to notice anything
LOST = ("another process of the job has ended", "stopped sending heartbeats", "Failed to send RPC to coordination")
COMMAND = [sys.executable, "-m", "dsv4_jax.cli"]
QUICK = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


PRETEND = """
from sharding.processes import pretend_devices
pretend_devices(3)
import jax
print(jax.device_count(), jax.default_backend(), jax.jit(lambda x: x.sum())(jax.numpy.ones(4)))
pretend_devices(3)  # a cell that is run again
try:
    pretend_devices(4)
except Exception as error:
    print(error)
"""


def test_a_cpu_pretends_to_be_several_devices_if_it_is_asked_before_jax_starts():
    flags = {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", PRETEND], env=os.environ | flags, cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert said[0] == "3 cpu 4.0", done.stderr
    assert said[1] == "jax has started with other devices: 4 pretended ones need a fresh process, or kernel"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts and a recipe of forty steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    words = [line for line in (ROOT / "train" / "loop.py").read_text().splitlines() if line]
    rng = np.random.default_rng(0)
    for number in range(12):
        (home / "texts" / f"{number}.txt").write_text("\n".join(rng.choice(words, 40)))
    recipe = {
        "base": "nano",
        "name": "tiny",
        "model": {"overrides": MODEL},
        "data": {"corpus": str(home / "texts"), "tokenizer": "bytes", "recall_share": 0.0},
        "stages": [{"name": "dense", "kind": "dense", "steps": STEPS, "sequence_length": 64, "batch_size": 4}],
        "learning_rate": {"warmup_steps": 1, "decay_start": 0.5},
        "cadence": {"checkpoint_every": 5, "keep": 9, "eval_every": 20, "eval_documents": 1, "final_documents": 1,
                    "eval_batch_size": 4, "recall_rows": 0},
    }  # fmt: skip
    (home / "tiny.json").write_text(json.dumps(recipe))
    return home


@pytest.fixture(scope="module")
def whole(home):
    """The run of one process on one device, without an interruption."""
    train(find_recipe(home / "tiny.json"), home / "whole", cache=home / "cache")
    return home / "whole"


def arguments(home, *more):
    wanted = ["train", "--recipe", home / "tiny.json", "--out", home / "run", "--cache", home / "cache"]
    return [*map(str, wanted), "--heartbeat", str(HEARTBEAT), *more]


def values(folder, name):
    log = folder / "metrics.jsonl"
    return {line["step"]: line[name] for line in read_metrics(log) if name in line} if log.exists() else {}


def wait_for_step(folder, step, processes, log):
    end = time.monotonic() + 300
    while max(values(folder, "loss"), default=0) < step:
        assert all(process.poll() is None for process in processes), log()
        assert time.monotonic() < end, log()
        time.sleep(0.02)


def test_a_job_survives_a_kill_and_goes_on_as_4_then_2_processes_then_1_with_the_losses_of_one(home, whole):
    """SIGKILL of one of four; SIGTERM to two of two devices each, under another strategy; the rest on one device."""
    port, folder = free_port(), home / "run"
    logs = [home / f"log-{number}.txt" for number in range(4)]
    four = [
        subprocess.Popen(
            [*COMMAND, *arguments(home)], cwd=ROOT, env=environment(4, i, port) | {"XLA_FLAGS": QUICK},
            stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    try:
        wait_for_step(folder, 7, four, lambda: "\n".join(log.read_text()[-3000:] for log in logs))
        four[2].send_signal(signal.SIGKILL)
        began = time.monotonic()
        others = [process.wait(timeout=BOUND) for process in four if process is not four[2]]
        print(f"the others ended {time.monotonic() - began:.1f} s after the kill")
    finally:
        for process in four:
            process.kill()
    assert all(status != 0 for status in others)
    for log in (logs[0], logs[1], logs[3]):
        assert any(words in log.read_text() for words in LOST), log.read_text()[-3000:]
    done = max(values(folder, "loss"))
    assert done < STEPS, "the job ended before it was killed"

    launch = [*COMMAND, "launch", "-n", "2", "--devices-per-process", "2", "--", *arguments(home)]
    launch += ["--strategy", "expert-fsdp", "--mesh", "expert=2,fsdp=2"]
    quick = os.environ | {"XLA_FLAGS": QUICK}
    two = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quick)
    try:
        wait_for_step(folder, 22, [two], lambda: two.communicate(two.terminate())[0][-6000:])
        two.send_signal(signal.SIGTERM)
        said = two.communicate(timeout=BOUND)[0]
    finally:
        two.kill()
    assert two.returncode == 128 + signal.SIGTERM, said
    assert re.search(r"resuming after step (5|10|15|20|25|30) of 40", said)
    saved = int(re.search(r"SIGTERM: saved step (\d+)", said)[1])
    assert saved == max(values(folder, "loss")) and (folder / "checkpoints" / str(saved)).is_dir()
    assert not re.search(r"^\[1\] .*(step|saved|resuming)", said, re.M), "only process 0 speaks"

    train(find_recipe(home / "tiny.json"), folder, cache=home / "cache")
    for name, steps in (("loss", STEPS), ("heldout_bpb", 2)):
        found, wanted = values(folder, name), values(whole, name)
        assert len(found) == steps and sorted(found) == sorted(wanted)
        np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=TOLERANCE, err_msg=name)


def both_end_well(out, script, options):
    """What two processes of two devices said in a run in folder `out`; `script` is one of tests/, with arguments."""
    port, logs = free_port(), [out.with_name(f"{out.name}-{number}.txt") for number in range(2)]
    options[options.index("--out") + 1] = str(out)
    two = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / script[0]), *script[1:], *options],
            cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
            env=environment(2, i, port, devices=2) | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)},
        )
        for i, log in enumerate(logs)
    ]  # fmt: skip
    try:
        ends = [process.wait(timeout=600) for process in two]
    finally:
        for process in two:
            process.kill()
    assert ends == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return logs


def test_two_processes_whose_rows_lie_apart_train_as_one(home, whole):
    """As on a TPU slice, where a mesh follows the wiring."""
    options = arguments(home, "--strategy", "fsdp", "--mesh", "fsdp=4", "--set", "stages.dense.steps=6")
    both_end_well(home / "apart", ["wiring.py"], options)
    found, wanted = values(home / "apart", "loss"), values(whole, "loss")
    assert sorted(found) == list(range(1, 7))
    for step in range(1, 5):  # behind them the learning rate falls
        assert found[step] == pytest.approx(wanted[step], rel=TOLERANCE)


SPIKE_AT = 11
STABILITY = {"spike_window": 6, "spike_steps": 1, "rollback_steps": 2, "anticipatory_steps": 7, "anticipatory_delay": 2}


@pytest.mark.slow
def test_two_processes_undo_a_spike_and_route_ahead_as_one_does(home, monkeypatch):
    """A fault after step 10: back to step 5, experts chosen two steps ahead for a while, then as before."""
    settings = ["stages.dense.steps=18", *(f"stability.{name}={value}" for name, value in STABILITY.items())]
    monkeypatch.setattr(stage_run.Programs, "step", spoilt_after({SPIKE_AT - 1}))
    train(find_recipe(home / "tiny.json", settings), home / "spiked-alone", cache=home / "cache")
    options = [*arguments(home, "--strategy", "expert-fsdp", "--mesh", "expert=2,fsdp=2")]
    options += [word for setting in settings for word in ("--set", setting)]
    logs = both_end_well(home / "spiked", ["faults.py", str(SPIKE_AT - 1)], options)
    said = logs[0].read_text()
    assert f"loss spike at step {SPIKE_AT}" in said and "back to the checkpoint of step 5" in said
    assert "back to standard training" in said and "spike" not in logs[1].read_text(), "only process 0 speaks"
    folders = [home / name for name in ("spiked", "spiked-alone")]
    modes, spikes = ([values(folder, name) for folder in folders] for name in ("anticipatory", "spike_step"))
    assert modes[0] == modes[1] and sorted(modes[0]) == list(range(6, 13)) and spikes[0] == spikes[1] == {6: SPIKE_AT}
    found, wanted = (values(folder, "loss") for folder in folders)
    assert sorted(found) == sorted(wanted) == list(range(1, 19))
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=TOLERANCE)


def test_two_processes_generate_what_one_does(whole):
    """Tokens, and log-probabilities to three digits; the second process says nothing."""
    generate = [
        "generate",
        str(whole),
        "--prompt",
        "def main",
        "--max-new-tokens",
        "6",
        "--seed",
        "3",
        "--logprobs",
        "1",
    ]
    said = []
    for before in ([], ["launch", "-n", "2", "--"]):
        command = [*COMMAND, *before, *generate, *(["--strategy", "expert-fsdp"] if before else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append([done.stdout.splitlines()[-1], *(x for x in done.stderr.splitlines() if re.match(r"\[1\] '", x))])
    assert said[0] == said[1] and len(said[0]) == 7


def test_the_rows_of_a_batch_are_the_same_for_any_number_of_processes(home):
    """And in the same order, after a place was restored that another number of processes saved."""
    store, config = prepare(str(home / "texts"), "bytes", cache=home / "cache"), BatchConfig(64, 4, seed=3)

    def batches(count, state=None):
        parts = [TrainBatches(store, config, range(i * 4 // count, (i + 1) * 4 // count)) for i in range(count)]
        for part in parts:
            part.set_state(state) if state else None
        return [np.concatenate([next(part)["tokens"] for part in parts]) for _ in range(3)], parts[-1].get_state()

    first, state = batches(4)
    second, _ = batches(2, state)
    alone, later = batches(1)
    assert np.array_equal(first, alone)
    assert np.array_equal(second, batches(1, later)[0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Processes("node-0:1234", 4, 4), r"--process-id is 4: of 4 processes it is one of 0 to 3"),
        (Processes("node-0", 4, 0), r"--coordinator is 'node-0': HOST:PORT"),
        (Processes(num_processes=0), r"--num-processes is 0: at least 1"),
        (Processes(cpu_devices=0), r"--cpu-devices is 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_anything_starts(given, words):
    with pytest.raises(UserError, match=words):
        given.resolved()


def test_the_environment_describes_the_job_and_arguments_come_before_it(monkeypatch):
    for name, value in environment(4, 3, 5555).items():
        monkeypatch.setenv(name, value)
    assert Processes().resolved() == Processes("127.0.0.1:5555", 4, 3)
    assert Processes(process_id=1).resolved().process_id == 1
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is 'three'"):
        Processes().resolved()


def started(*options, **more):
    """`dsv4 train nano` in a process of its own, which has to end by itself."""
    command = [*COMMAND, "train", "nano", "--start-timeout", "3", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BOUND, env=os.environ | more)


def test_a_process_whose_job_does_not_come_together_ends_with_words(tmp_path):
    """No process 0; no process 1; and a job of which only the address is known."""
    at = f"127.0.0.1:{free_port()}"
    for number in ("0", "1"):
        done = started(
            "--coordinator", at, "--num-processes", "2", "--process-id", number, "--out", str(tmp_path / "x")
        )
        assert done.returncode == 2
        assert f"process {number} has waited 3 s (--start-timeout) for all 2 processes" in done.stderr
        assert at in done.stderr and "Check failure" not in done.stderr
    done = started("--coordinator", at)
    assert done.returncode == 2 and "--num-processes N and --process-id I" in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_launcher_gives_the_status_of_the_first_that_fails_and_names_who_speaks():
    command = [*COMMAND, "launch", "-n", "2", "--grace", "20", "--", "info", "no-such-preset"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any(line.startswith("dsv4 info:") for line in lines)
    assert any(line.startswith("[1] dsv4 info:") for line in lines)
    assert re.search(r"dsv4 launch: process [01] ended with status 2", done.stderr)
    assert cli.main(["launch", "-n", "2"]) == 2


RECIPES = ROOT / "docs" / "recipes"
DEVICES = {"slurm-gpu.sbatch": 16, "jobset-gpu.yaml": 16, "jobset-tpu.yaml": 16, "tpu-slice.sh": 16}


def test_every_recipe_of_the_documentation_is_tested():
    assert sorted(path.name for path in RECIPES.iterdir()) == sorted(DEVICES)
    linked = re.findall(r"\(recipes/([^)]+)\)", (ROOT / "docs" / "pods.md").read_text())
    assert sorted(linked) == sorted(DEVICES)


@pytest.mark.parametrize(("name", "devices"), DEVICES.items())
def test_the_command_of_a_recipe_is_accepted_and_its_mesh_fits_machine_and_model(name, devices, capsys):
    [command] = re.findall(r"^[^#]*?(dsv4 train .*)$", (RECIPES / name).read_text(), re.M)
    words = shlex.split(command.rstrip('"').replace("$RUN", "run").replace('"', ""))[1:]
    assert cli.main([*words, "--show"]) == 0
    assert json.loads(capsys.readouterr().out.rpartition("\n}")[0] + "}")["name"] == words[1]
    sizes = parse_mesh(words[words.index("--mesh") + 1], devices)
    mesh, recipe = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES), find_recipe(words[1])
    config, strategy = recipe.check(), find_strategy(words[words.index("--strategy") + 1])
    shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    for stage in recipe.stages:
        rows = stage.batch_size // stage.microbatches
        check_fit(weights.facts(config), shapes, strategy, mesh, rows, stage.sequence_length)


@pytest.mark.parametrize("name", ["slurm-gpu.sbatch", "tpu-slice.sh"])
def test_the_shell_recipes_are_whole_scripts(name):
    assert subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True).stderr == ""


def test_the_slurm_recipe_starts_one_process_for_each_gpu():
    text = (RECIPES / "slurm-gpu.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert int(asked["nodes"]) * int(asked["ntasks-per-node"]) == DEVICES["slurm-gpu.sbatch"]


@pytest.mark.parametrize(
    ("name", "resource"), [("jobset-gpu.yaml", "nvidia.com/gpu"), ("jobset-tpu.yaml", "google.com/tpu")]
)
def test_the_pods_of_a_jobset_are_the_processes_of_the_job(name, resource):
    whole = yaml.safe_load((RECIPES / name).read_text())
    [group] = whole["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"][resource] == DEVICES[name]
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    if "JAX_COORDINATOR_ADDRESS" in given:
        port, name = container["ports"][0]["containerPort"], whole["metadata"]["name"]
        assert given["JAX_COORDINATOR_ADDRESS"] == f"{name}-{group['name']}-0-0.{name}:{port}"
        assert given["JAX_NUM_PROCESSES"] == str(job["parallelism"]) and "JAX_PROCESS_ID" in given
