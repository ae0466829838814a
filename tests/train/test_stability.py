"""A long run skips what is not finite, undoes loss spikes, routes by older parameters for a while, loses nothing."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import spoilt_after
from jax.tree_util import keystr
from support import TINY, random_params
from tensorboardX.proto import event_pb2
from test_loop import MODEL

from dsv4_jax import model
from dsv4_jax.errors import UserError
from dsv4_jax.partition import ALONE
from dsv4_jax.segments import learned_choices
from train import interruptions, stage_run
from train.checkpointing import CheckpointError, Checkpoints, load_params
from train.data.ahead import DataSourceError, ReadAhead
from train.data.pipeline import TrainBatches
from train.interruptions import DiskError, Terminated
from train.loop import train
from train.losses import OBJECTIVES
from train.metrics import read_metrics
from train.placement import Placement
from train.recipe import RecipeError, find_recipe
from train.schedule import warmup_constant_cosine
from train.stability import Spike, SpikeDetector, Stability, UnstableError, Watch
from train.state import TrainState
from train.step import StepPlan, batch_gradients, make_router, make_train_step
from train.tensorboard import Curves

ROOT = Path(__file__).parents[2]
PLAN = StepPlan(TINY, warmup_constant_cosine(1e-2, 1e-3, 0, 5, 10), decay_start=5)
LEARNED = 3  # the last two of TINY's blocks, and its MTP block


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def a_batch(rows=2, length=24):
    rng = np.random.default_rng(1)
    segments = np.ones((rows, length), np.int32)
    segments[1, 9:] = 2
    tokens = rng.integers(0, TINY.vocab_size, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.asarray(segments)}


def state_of(params):
    state = PLAN.init(0)
    return TrainState(state.step, params, state.optimizer, state.key)


# --- steps that are not finite -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """One compiled program: it cannot compile again for values that are not finite."""
    shapes = jax.eval_shape(lambda: state_of(random_params(TINY)))
    return make_train_step(PLAN, "dense").lower(shapes, jax.eval_shape(a_batch)).compile()


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_counter(step, broken):
    """1e30 is a finite parameter whose gradients or loss overflow."""
    params = random_params(TINY)
    params["norm"] = params["norm"].at[3].set(broken)
    state, first = step(state_of(random_params(TINY)), a_batch())
    assert first["skipped"] == 0
    state = state._replace(params=params | {"norm": params["norm"]})
    before = bits(state[1:])
    state, metrics = step(state, a_batch())
    assert metrics["skipped"] == 1 and int(state.step) == 2
    assert bits(state[1:]) == before


def test_the_learning_rate_goes_on_over_skipped_steps(step):
    """Two runs that have skipped all of their 5 and 7 steps: the same gradients, at the rates of their schedule."""
    moved = []
    for done in (5, 7):
        before = random_params(TINY)
        after, metrics = step(state_of(before)._replace(step=jnp.int32(done)), a_batch())
        assert metrics["lr"] == PLAN.learning_rate(done) and metrics["skipped"] == 0
        moved.append(after.params["embed"] - random_params(TINY)["embed"])
    rates = float(PLAN.learning_rate(7)) / float(PLAN.learning_rate(5))
    assert rates < 0.9
    assert jnp.linalg.norm(moved[1]) / jnp.linalg.norm(moved[0]) == pytest.approx(rates, rel=1e-4)


def test_an_update_that_is_not_finite_is_not_applied(step):
    """From finite gradients: a momentum that has overflowed."""
    state, _ = step(state_of(random_params(TINY)), a_batch())
    spoilt = lambda path, x: jnp.full_like(x, jnp.inf) if "momentum" in jax.tree_util.keystr(path) else x  # noqa: E731
    state = state._replace(optimizer=jax.tree_util.tree_map_with_path(spoilt, state.optimizer))
    before = bits(state[1:])
    state, metrics = step(state, a_batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    assert bits(state[1:]) == before


@pytest.mark.slow
def test_the_guard_works_on_sharded_parameters():
    """Two devices, a NaN on one of them; in a process of its own, with one block."""
    script = """
        import dataclasses, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from test_stability import PLAN, a_batch, bits
        from train.step import make_train_step
        one = PLAN.config.replace(num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(0,),
                                  layer_types=("sliding_attention",), mlp_layer_types=("moe",), num_hash_layers=0)
        plan = dataclasses.replace(PLAN, config=one)
        mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
        spread = lambda x: P(*(["fsdp"] + [None] * (x.ndim - 1))) if x.ndim and x.shape[0] % 2 == 0 else P()
        state = jax.jit(plan.init, static_argnums=0)(0)
        state = state._replace(params=state.params | {"embed": state.params["embed"].at[63, 5].set(jnp.nan)})
        state = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spread(x))), state)
        batch = jax.device_put(a_batch() | {"tokens": jnp.full((2, 24), 63)}, NamedSharding(mesh, P("fsdp")))
        before = bits(state[1:])
        state, metrics = make_train_step(plan, "dense")(state, batch)
        assert metrics["skipped"] == 1 and int(state.step) == 1 and bits(state[1:]) == before
        state = state._replace(params=state.params | {"embed": jnp.nan_to_num(state.params["embed"])})
        state, metrics = make_train_step(plan, "dense")(state, batch)
        assert metrics["skipped"] == 0 and bits(state[1:]) != before
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "train")))
    script = "\n".join(line[8:] for line in script.splitlines())
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


# --- anticipatory routing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen():
    """The experts that the routers choose by themselves, and others."""
    ids = make_router(PLAN, "dense")(random_params(TINY), a_batch())
    return ids, (ids + 1) % TINY.n_routed_experts


def test_given_its_own_choice_a_step_is_bitwise_the_ordinary_one(step, chosen):
    assert chosen[0].shape == (2, 24, LEARNED, TINY.num_experts_per_tok)
    ordinary, expected = step(state_of(random_params(TINY)), a_batch())
    given, metrics = make_train_step(PLAN, "dense")(
        state_of(random_params(TINY)), a_batch() | {"expert_ids": chosen[0]}
    )
    assert bits(metrics) == bits(expected) and bits(given) == bits(ordinary)


def test_microbatches_choose_what_the_whole_batch_chooses(chosen):
    np.testing.assert_array_equal(make_router(PLAN, "dense", 2)(random_params(TINY), a_batch()), chosen[0])


def other_routers(params, scale=-1.0):
    """The same parameters with other learned routers."""
    change = lambda path, x: scale * x if "gate/weight" in keystr(path, simple=True, separator="/") else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(change, params)


def test_given_experts_are_used_whatever_the_current_routers_would_choose(chosen):
    run = jax.jit(lambda p, ids: model.forward(TINY, p, a_batch()["tokens"], segment_ids=a_batch()["segment_ids"],
                                               expert_ids=ids, attention="dense", mtp=True, record=True))  # fmt: skip
    params, changed = random_params(TINY), other_routers(random_params(TINY))
    own = make_router(PLAN, "dense")(changed, a_batch())
    assert (np.asarray(own) != np.asarray(chosen[0])).any(axis=(0, 1, 3)).all(), "every router would choose otherwise"
    for p in (params, changed):
        out = run(p, chosen[0])
        np.testing.assert_array_equal(learned_choices(TINY, out.layers), chosen[0])
    logits = [run(p, chosen[0]).logits for p in (params, changed)]
    assert (logits[0] != logits[1]).any(), "their weights are those of the current routers"


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_scores_of_given_experts_have_gradients(chosen, microbatches):
    run = jax.jit(partial(batch_gradients, PLAN, OBJECTIVES["dense"], microbatches))
    gradients, parts = run(random_params(TINY), a_batch() | {"expert_ids": chosen[1]}, jnp.float32(0.3))
    gates = [gradients["segments"]["0"]["1"], gradients["segments"]["0"]["2"], gradients["mtp"]["0"]["block"]]
    assert all(float(jnp.abs(block["ffn"]["gate"]["weight"]).max()) > 0 for block in gates)
    load = [np.bincount(np.asarray(chosen[1])[:, :, i].ravel(), minlength=6) for i in range(LEARNED)]
    np.testing.assert_array_equal(parts["load"][1:], load)


def test_experts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"for 2 learned routers it must be \(2, 24, 2, 2\)"):
        jax.eval_shape(lambda p: model.forward(TINY, p, a_batch()["tokens"], expert_ids=jnp.zeros((2, 24, 3, 2), int)),
                       random_params(TINY))  # fmt: skip


# --- what is a spike -----------------------------------------------------------------------------------------------

SETTINGS = Stability(spike_window=8, spike_steps=2, spike_threshold=6.0, rollback_steps=2, anticipatory_steps=5)
CALM = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9]


def spikes_in(losses, settings=SETTINGS):
    detector = SpikeDetector(settings)
    return [spike for step, loss in enumerate(losses, 1) if (spike := detector.observe(step, loss))]


def test_only_high_losses_in_a_row_are_a_spike():
    assert spikes_in(CALM + [9.0, 2.0, 9.0, 2.0]) == []
    [spike] = spikes_in(CALM + [9.0, 8.0, 2.0])
    assert (spike.first, spike.step, spike.loss, spike.usual) == (9, 10, 8.0, 2.025)
    assert spikes_in([9.0, 9.0] + CALM) == [], "nothing is judged before the window is full"
    assert spikes_in(CALM[::-1] + [0.1, 0.1]) == [], "a fall is no spike"
    assert spikes_in([2.0] * 8 + [2.1, 2.1]) == [], "nor is a tremor of losses that hardly vary"
    assert spikes_in(CALM + [9.0, 9.0], dataclasses.replace(SETTINGS, spike_threshold=0.0)) == []


def test_a_lasting_change_becomes_the_new_normal():
    assert 1 <= len(spikes_in(CALM + [9.0 + 0.1 * (i % 3) for i in range(60)])) <= 4


def test_a_noisy_fall_without_spikes_is_left_alone():
    rng = np.random.default_rng(0)
    for _ in range(20):
        steps = np.arange(2000)
        losses = 2 + 8 * np.exp(-steps / 300) + 0.2 * rng.standard_t(5, 2000)
        assert spikes_in(losses.tolist(), Stability()) == []


def watch_of(settings=SETTINGS, said=None):
    return Watch(settings, (said if said is not None else []).append, lambda: 40)


def metrics_of(loss, skipped=0.0):
    return {"loss": np.float32(loss), "skipped": np.float32(skipped), "grad_norm": np.float32(loss)}


def test_a_spike_that_returns_goes_back_further_each_time_until_nothing_is_left():
    watch, spike, targets = watch_of(), Spike(50, 51, 9.0, 2.0), []
    while (target := watch.rollback_target(spike, [10, 20, 30, 48, 49])) is not None:
        targets.append(target)
        watch.begin_episode(target, spike)
    assert targets == [48, 30, 20, 10]
    for step in range(11, 52):
        watch.observe(step, metrics_of(2.0))
    assert watch.rollback_target(spike, [10, 20]) == 20, "past the place of the spike it is over"


def test_the_mode_lasts_as_long_as_set_and_its_state_is_json():
    watch, said = watch_of(), []
    watch.say = said.append
    watch.begin_episode(10, Spike(12, 13, 9.0, 2.0))
    assert watch.marks(11) == {"spike_step": 12, "spike_loss": 9.0, "anticipatory": 1}
    for step in range(11, 17):
        assert watch.anticipates(step) == (step <= 15)
        other = watch_of()
        other.set_state(json.loads(json.dumps(watch.get_state())))
        assert other.get_state() == watch.get_state() and other.anticipates(step) == watch.anticipates(step)
        watch.observe(step, metrics_of(2.0 + step / 7))
    assert watch.episode is None and watch.marks(16) == {}
    assert said == ["step 15: anticipatory routing ends, back to standard training"]


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_step_and_the_checkpoint():
    said = []
    watch = watch_of(dataclasses.replace(SETTINGS, skipped_in_a_row=3), said)
    for step, skipped in enumerate([1, 1, 0, 1, 1], 41):
        watch.observe(step, metrics_of(np.nan if skipped else 2.0, skipped))
    assert len(said) == 4 and "step 42 was skipped" in said[1] and "2 in a row" in said[1]
    with pytest.raises(UnstableError, match="step 46 was the last of 3 in a row.*good checkpoint is step 40.*44 to 46"):
        watch.observe(46, metrics_of(np.nan, 1))


def test_a_skipped_step_says_what_was_not_finite():
    watch = watch_of(SETTINGS, said := [])
    watch.observe(5, metrics_of(2.0, 1) | {"update_rms_muon": np.float32(np.inf), "update_rms_adamw": np.float32(0.2)})
    assert "(loss 2, gradient norm 2, update_rms_muon inf)" in said[0]


def test_settings_that_cannot_work_are_named(home):
    with pytest.raises(RecipeError, match=r"stability.spike_steps is 0, at least 1(?s:.*)rollback_steps is 0"):
        find_recipe(home / "tiny.json", ["stability.spike_steps=0", "stability.rollback_steps=0"]).check()


# --- whole runs ----------------------------------------------------------------------------------------------------

STEPS, SPIKE_AT = 18, 11


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts and a recipe of one dense stage."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    words = [line for line in (ROOT / "train" / "loop.py").read_text().splitlines() if line]
    rng = np.random.default_rng(0)
    for number in range(24):
        (home / "texts" / f"{number}.txt").write_text("\n".join(rng.choice(words, 40)))
    stage = {"name": "dense", "kind": "dense", "steps": STEPS, "sequence_length": 64, "batch_size": 2}
    recipe = {
        "base": "nano",
        "name": "tiny",
        "model": {"overrides": MODEL},
        "data": {"corpus": str(home / "texts"), "tokenizer": "bytes", "recall_share": 0.0, "recall_distance": 16},
        "stages": [stage],
        "learning_rate": {"warmup_steps": 1, "decay_start": 0.5, "peak": 1e-3},
        "cadence": {"checkpoint_every": 2, "keep": 9, "eval_every": 0, "eval_documents": 1, "final_documents": 1,
                    "eval_batch_size": 2, "recall_rows": 0},
        "stability": {"spike_window": 6, "spike_steps": 1, "rollback_steps": 2, "anticipatory_steps": 7,
                      "anticipatory_delay": 2, "skipped_in_a_row": 3},
    }  # fmt: skip
    (home / "tiny.json").write_text(json.dumps(recipe))
    return home


@pytest.fixture
def run(home, monkeypatch):
    """Trains the recipe into a folder, what is said going to a list."""
    monkeypatch.setattr("train.loop.finish", lambda run, store, params, evaluators: {"params": bits(params)})
    monkeypatch.setattr("train.loop.measured_matmul_peak", lambda **_: 1e12)
    monkeypatch.setattr(stage_run.Programs, "_compiled", compiled_once)

    def run(name, *settings):
        return train(find_recipe(home / "tiny.json", settings), home / name, cache=home / "cache")

    return run


ORDINARY_COMPILE, PROGRAMS = stage_run.Programs._compiled, {}


def compiled_once(self, name, *arguments):
    """All these runs have the same programs."""
    if name not in PROGRAMS:
        PROGRAMS[name] = ORDINARY_COMPILE(self, name, *arguments)
    return PROGRAMS[name]


def lines_of(folder, what="loss"):
    return {line["step"]: line[what] for line in read_metrics(folder / "metrics.jsonl") if what in line}


@pytest.fixture
def spiked(run, home, monkeypatch, capsys):
    """(folder, what was said) of a run with a spike at SPIKE_AT."""
    monkeypatch.setattr(stage_run.Programs, "step", spoilt_after({SPIKE_AT - 1}))
    folder = home / "spiked"
    if not folder.exists():
        run("spiked")
        (folder / "said.txt").write_text(capsys.readouterr().out)
    return folder, (folder / "said.txt").read_text()


def test_a_spike_is_rolled_back_anticipated_and_left_behind(spiked):
    folder, said = spiked
    loss, mode = lines_of(folder), lines_of(folder, "anticipatory")
    assert sorted(loss) == list(range(1, STEPS + 1)) and max(loss.values()) < 1.5 * loss[1]
    assert sorted(mode) == list(range(9, 16)), "seven steps behind the checkpoint of step 8"
    assert lines_of(folder, "spike_step") == {9: SPIKE_AT}
    undone = read_metrics(folder / "metrics.rolled-back.jsonl")
    assert [line["step"] for line in undone][:3] == [9, 10, 11] and undone[2]["loss"] > 2 * loss[1]
    for words in (
        f"loss spike at step {SPIKE_AT}", "back to the checkpoint of step 8", "compiling the dense anticipatory step",
        "step 9: anticipatory routing, experts chosen 2 steps ahead, until step 15", "back to standard training",
    ):  # fmt: skip
        assert words in said, words
    assert (folder / "checkpoints" / "rolled-back-10").is_dir()


@pytest.mark.parametrize("newest", [8, 10, 14, 16])
def test_a_run_killed_in_any_mode_resumes_to_the_same_numbers(run, home, spiked, newest, tmp_path):
    """Right after the rollback, twice within the mode (with experts chosen ahead, and with few left), behind it."""
    folder = home / f"killed-{newest}"
    shutil.copytree(spiked[0], folder)
    for step in range(newest + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
    run(f"killed-{newest}")
    assert lines_of(folder) == lines_of(spiked[0])
    assert bits(load_params(folder / "checkpoints")[1]) == bits(load_params(spiked[0] / "checkpoints")[1])


def test_a_rollback_killed_in_its_middle_is_completed(run, home, spiked):
    """The journal is written and no checkpoint renamed yet."""
    folder = home / "half"
    shutil.copytree(spiked[0], folder)
    for step in (12, 14, 16, 18):
        shutil.rmtree(folder / "checkpoints" / str(step))
    shutil.rmtree(folder / "checkpoints" / "10")
    (folder / "checkpoints" / "rolled-back-10").rename(folder / "checkpoints" / "10")
    journal = json.loads((folder / "rollback.json").read_text())
    (folder / "rollback.json").write_text(json.dumps(journal | {"finished": False}))
    run("half")
    assert lines_of(folder) == lines_of(spiked[0])


def test_the_experts_of_the_mode_are_those_of_older_parameters(home, spiked):
    """The step behind the checkpoint of step 12 by hand, with the parameters of step 10 choosing."""
    recipe = find_recipe(home / "tiny.json")
    from train.run_data import open_store, stage_batches

    folder, loss = spiked[0], lines_of(spiked[0])
    plan = StepPlan(recipe.check(), recipe.schedule(), recipe.decay_start, recipe.optimizer, recipe.losses)
    batches = stage_batches(recipe, open_store(recipe, plan.config, home / "cache"), 0, 0, {}, plan.placement)
    batch = [next(batches) for _ in range(13)][-1]
    thirteenth = plan.placement.to_devices(batch, len(batch["tokens"]))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        shapes = jax.eval_shape(lambda: plan.init(0))
        states = {step: checkpoints.restore(shapes, step)[1] for step in (10, 12)}
    route, step = make_router(plan, "dense"), make_train_step(plan, "dense")
    losses = {}
    for chooser in (10, 12):
        state = jax.tree.map(jnp.copy, states[12])
        ids = route(states[chooser].params, thirteenth)
        losses[chooser] = float(step(state, thirteenth | {"expert_ids": ids})[1]["loss"])
    assert losses[10] == loss[13] != losses[12]


@pytest.mark.slow
def test_a_run_without_delay_is_bitwise_the_ordinary_run(run, home, monkeypatch):
    """The fault spoils a loss, not the parameters; the mode with delay 0 then changes nothing."""
    expected = run("calm")["params"]
    original = stage_run.Programs.step
    told = []

    def step(self, stage, state):
        inner = original(self, stage, state)

        def lying(state, batch):
            state, metrics = inner(state, batch)
            if int(state.step) == SPIKE_AT and not told:
                told.append(metrics.update(loss=metrics["loss"] * 10))
            return state, metrics

        return lying

    monkeypatch.setattr(stage_run.Programs, "step", step)
    assert run("undelayed", "stability.anticipatory_delay=0")["params"] == expected
    assert lines_of(home / "undelayed") == lines_of(home / "calm")
    assert len(lines_of(home / "undelayed", "anticipatory")) == 7


def test_without_a_checkpoint_far_enough_back_training_goes_on_in_the_mode(run, home, monkeypatch, capsys):
    monkeypatch.setattr(stage_run.Programs, "step", spoilt_after({SPIKE_AT - 1}))
    run("no-way-back", "cadence.checkpoint_every=100")
    assert "No checkpoint lies far enough before it" in capsys.readouterr().out
    assert sorted(lines_of(home / "no-way-back", "anticipatory")) == list(range(SPIKE_AT + 2, STEPS + 1))


def test_skipped_steps_are_reported_and_too_many_end_the_run(run, home, monkeypatch, capsys):
    original = stage_run.Programs.step

    def step(self, stage, state):
        inner = original(self, stage, state)

        def poisoned(state, batch):
            if int(state.step) + 1 in (4, *range(8, 14)):
                state = state._replace(params=state.params | {"norm": state.params["norm"] * jnp.nan})
                kept = bits(state[1:])
                state, metrics = inner(state, batch)
                assert bits(state[1:]) == kept
                return state._replace(params=state.params | {"norm": jnp.ones_like(state.params["norm"])}), metrics
            return inner(state, batch)

        return poisoned

    monkeypatch.setattr(stage_run.Programs, "step", step)
    with pytest.raises(UnstableError, match="step 10 was the last of 3 in a row.*good checkpoint is step 8"):
        run("poisoned")
    assert [s for s, skipped in lines_of(home / "poisoned", "skipped").items() if skipped] == [4, 8, 9, 10]
    assert "step 4 was skipped" in capsys.readouterr().out


# --- requests, sources and disks -----------------------------------------------------------------------------------


def test_sigterm_saves_the_step_it_is_in_and_the_run_goes_on_from_there(run, home, monkeypatch, capsys):
    original = Placement.to_devices
    taken = []

    def to_devices(self, batch, rows):
        taken.append(batch)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, rows)

    monkeypatch.setattr(Placement, "to_devices", to_devices)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended:
        run("asked", "cadence.checkpoint_every=100")
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert Checkpoints(home / "asked" / "checkpoints").steps == [5] and "saved step 5" in capsys.readouterr().out
    run("asked", "cadence.checkpoint_every=100")
    run("unasked", "cadence.checkpoint_every=100")
    assert lines_of(home / "asked") == lines_of(home / "unasked")


def test_a_terminated_command_ends_with_143_and_a_saved_step(home):
    folder = home / "terminated"
    command = [sys.executable, "-m", "dsv4_jax.cli", "train", "--recipe", str(home / "tiny.json"), "--out", str(folder)]
    command += ["--cache", str(home / "cache"), "--set", "cadence.checkpoint_every=1000000",
                "--set", "stages.0.steps=100000"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and lines_of(folder)):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    [saved] = Checkpoints(folder / "checkpoints").steps
    assert process.returncode == 143 and f"saved step {saved:,}" in said and "Traceback" not in errors
    assert max(lines_of(folder)) == saved


def stalling(monkeypatch, at, how):
    original, calls = TrainBatches.__next__, []

    def read(self):
        calls.append(self.step)
        if self.step == at and len(calls) <= at + 1:
            how()
        return original(self)

    monkeypatch.setattr(TrainBatches, "__next__", read)


def test_a_stalled_source_is_named_saves_the_run_and_leaves_no_hanging_process(run, home, monkeypatch):
    with monkeypatch.context() as patched:
        stalling(patched, 5, lambda: threading.Event().wait(30))
        start = time.perf_counter()
        with pytest.raises(DataSourceError, match=r"no batch of the text .*texts.* within 0.5 s.*Saved: step 5;"):
            run("stalled", "cadence.checkpoint_every=100", "cadence.data_timeout=0.5")
        assert time.perf_counter() - start < 25
    run("stalled", "cadence.checkpoint_every=100")
    run("flowing", "cadence.checkpoint_every=100")
    assert lines_of(home / "stalled") == lines_of(home / "flowing")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "read-ahead")


def test_a_source_that_fails_is_named_and_the_run_saved(run, monkeypatch):
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    stalling(monkeypatch, 3, fail)
    with pytest.raises(DataSourceError, match=r"the text .* could not be read: .*Input/output error.*Saved: step 3"):
        run("failing", "cadence.checkpoint_every=100")


def test_a_source_that_fails_while_the_checkpoint_is_being_written_is_named_all_the_same(run, monkeypatch):
    """On a slow disk: a step is seen in the folder only after its save was waited for."""
    steps, wait, finished = Checkpoints.steps, Checkpoints.wait, set()

    def wait_and_see(self):
        wait(self)
        finished.update(steps.fget(self))

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Checkpoints, "wait", wait_and_see)
    monkeypatch.setattr(Checkpoints, "steps", property(lambda self: [s for s in steps.fget(self) if s in finished]))
    stalling(monkeypatch, 3, fail)
    with pytest.raises(DataSourceError, match=r"could not be read: .*Input/output error.*Saved: step 3"):
        run("failing-early", "cadence.checkpoint_every=3")


def test_batches_are_looked_at_without_being_taken(home):
    from train.run_data import open_store, stage_batches

    recipe = find_recipe(home / "tiny.json")
    config = recipe.check()
    store, alone = open_store(recipe, config, home / "cache"), Placement(ALONE, config)
    batches = stage_batches(recipe, store, 0, 0, {}, alone)
    expected = [next(batches) for _ in range(9)]
    ahead = ReadAhead(stage_batches(recipe, store, 0, 0, {}, alone), "text", 30.0)
    for i in range(5):
        np.testing.assert_array_equal(ahead.peek(i % 4)["tokens"], expected[i + i % 4]["tokens"])
        np.testing.assert_array_equal(next(ahead)["tokens"], expected[i]["tokens"])
        assert ahead.get_state()["step"] == i + 1
    resumed = ReadAhead(stage_batches(recipe, store, 0, 5, {"data": ahead.get_state()}, alone), "text", 30.0)
    np.testing.assert_array_equal(next(resumed)["tokens"], expected[5]["tokens"])
    ahead.close(), resumed.close()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_ends_the_run_in_words(run, home, monkeypatch):
    with monkeypatch.context() as patched:
        write, lines = os.write, []

        def filling(file, data):
            lines.append(data)
            return write(file, data) if len(lines) < 6 else full()

        patched.setattr("train.metrics.os.write", filling)
        with pytest.raises(DiskError, match=r"No space left.*MiB free.*newest checkpoint, step 4, is intact"):
            run("full-log")
    run("full-log")
    run("unasked", "cadence.checkpoint_every=100")
    assert lines_of(home / "full-log") == lines_of(home / "unasked")


def test_curves_are_read_back_by_tensorboard_and_a_full_disk_raises(tmp_path):
    curves = Curves(tmp_path, 4)
    for step in (5, 6):
        curves.add_scalar("loss", 2.0 / step, step)
    curves.close()
    [file] = tmp_path.iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # the records of an event file: length, checksum, an Event, checksum
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
        at += size + 16
    assert [event.step for event in found] == [0, 5, 5, 6]
    assert [round(v.simple_value, 4) for event in found for v in event.summary.value] == [0.4, 0.3333]
    filling = Curves(tmp_path, 6, flush_every=-1.0)
    filling._writer._py_recordio_writer._writer = open("/dev/full", "wb")
    with pytest.raises(OSError, match="No space left"):
        filling.add_scalar("loss", 1.0, 7)


def test_a_disk_full_of_checkpoints_leaves_the_earlier_ones(run, home, monkeypatch):
    with monkeypatch.context() as patched:
        save = Checkpoints._writer

        def writer(self):
            return full() if self._saving == 6 else save(self)

        patched.setattr(Checkpoints, "_writer", writer)
        with pytest.raises(CheckpointError, match=r"step 6 .*No space left.*intact: steps 2, 4"):
            run("full-disk")
    run("full-disk")
    assert lines_of(home / "full-disk") == lines_of(home / "unasked")


def test_the_errors_of_a_run_are_for_people():
    assert all(issubclass(kind, UserError) for kind in (UnstableError, DataSourceError, DiskError))
    assert interruptions.Terminated().code == 143
