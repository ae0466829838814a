"""The training loop, from a recipe to a trained model: one linear story, resumable at any moment."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.analysis.count import activated_parameters, total_parameters
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import to_released_json
from train.checkpointing import Checkpoints
from train.data.pipeline import TrainBatches
from train.data.tokens import TokenStore, default_cache
from train.evaluate import Evaluator
from train.flops import training_flops_per_token
from train.metrics import Meter, MetricsWriter, Progress, device_peak, measured_matmul_peak
from train.recipe import Recipe, Stage
from train.report import finish
from train.run_data import check_recall, describe, open_store, recall_task, stage_batches
from train.run_folder import RunFolder
from train.state import TrainState
from train.step import StepPlan, make_train_step


def train(recipe: Recipe, out: str | Path, *, cache: str | Path | None = None) -> dict[str, Any]:
    """Runs a recipe to its end, from the newest good checkpoint in `out` if the folder holds this very run.

    Args:
        recipe: what to do.
        out: the run folder.
        cache: where token files are kept; the user's cache folder by default.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        RecipeError, ConfigError, DataMismatchError, CheckpointError: before anything is computed or overwritten.
    """
    config = recipe.check()
    folder = RunFolder(out)
    resuming = folder.check(recipe)
    run = Run(recipe, config, folder)
    with run.phase("data"):
        run.say(_headline(recipe, config, folder, resuming))
        store = open_store(recipe, config, cache)
        check_recall(recipe, store)
        folder.begin(recipe, config)
        folder.bind_data(store)
        run.say(f"data: {describe(store)}")
    with Checkpoints(folder.checkpoints, keep=recipe.cadence.keep) as checkpoints:
        with run.phase("set-up"):
            state, host = _restored_or_new(run, checkpoints)
        evaluators = Evaluators(run, store)
        state = _all_stages(run, store, state, host, checkpoints, evaluators)
    return finish(run, store, state.params, evaluators)


def _all_stages(
    run: Run,
    store: TokenStore,
    state: TrainState,
    host: dict[str, Any],
    checkpoints: Checkpoints,
    evaluators: Evaluators,
) -> TrainState:
    recipe, first, say = run.recipe, int(state.step), run.say
    with (
        MetricsWriter(run.folder.root, resume_step=first) as writer,
        Progress(recipe.steps, first_step=first, total_tokens=recipe.tokens) as progress,
    ):
        run.say = progress.note if jax.process_index() == 0 else say
        for index, start in _stages_from(recipe, first):
            batches = stage_batches(recipe, store, index, int(state.step) - start, host)
            state = StageRun(run, checkpoints, writer, progress, evaluators).run(state, index, start, batches)
        progress.update(writer.flush())
    run.say = say
    return state


@dataclass
class Run:
    """What every part of a run shares: its settings, its folder, and where the time went."""

    recipe: Recipe
    config: DeepseekV4Config
    folder: RunFolder
    seconds: dict[str, float] = field(default_factory=dict)
    say: Callable[..., None] = print

    def __post_init__(self) -> None:
        """Only process 0 speaks."""
        if jax.process_index():
            self.say = lambda *_: None

    @property
    def plan(self) -> StepPlan:
        """What the recipe means for a step."""
        r = self.recipe
        return StepPlan(self.config, r.schedule(), r.decay_start, r.optimizer, r.losses, r.precision)

    @functools.cached_property
    def peak_flops(self) -> float | None:
        """Of the accelerators by their data sheets; of a CPU, whose kinds no table knows, as measured."""
        return measured_matmul_peak(seconds=0.5) if jax.default_backend() == "cpu" else device_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a `with` block to a phase of the breakdown."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Evaluators:
    """One `Evaluator` for each row length, made when it is needed."""

    def __init__(self, run: Run, store: TokenStore):
        """Compiles nothing yet."""
        self.run, self.store = run, store
        self._made: dict[int, Evaluator] = {}

    def at(self, length: int) -> Evaluator:
        """For rows of `length` tokens."""
        if length not in self._made:
            rows = self.run.recipe.cadence.eval_batch_size
            self._made[length] = Evaluator(self.run.config, self.store, length, rows, self.run.plan.forward())
        return self._made[length]

    def measure(self, params: Any, stage: Stage) -> dict[str, float]:
        """The metrics of an evaluation between steps: few documents, the attention of the stage."""
        cadence, evaluator = self.run.recipe.cadence, self.at(stage.sequence_length)
        attention = "sparse" if stage.kind == "sparse" else "dense"
        found = evaluator.heldout(params, attention, cadence.eval_documents)
        if cadence.recall_rows:
            score = evaluator.recall(params, attention, recall_task(self.run.recipe), cadence.recall_rows)
            found["retrieval_accuracy"] = score.accuracy
        return found


@dataclass
class StageRun:
    """The steps of one stage."""

    shared: Run
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    evaluators: Evaluators

    def run(self, state: TrainState, index: int, start: int, batches: TrainBatches) -> TrainState:
        """From `state` to the end of stage `index`, which began at step `start`."""
        recipe = self.shared.recipe
        stage, before = recipe.stages[index], sum(s.tokens for s in recipe.stages[:index])
        step = compiled_step(self.shared, stage, state)
        flops = training_flops_per_token(self.shared.config, stage.sequence_length, stage.kind)
        tokens, meter, held = stage.batch_size * stage.sequence_length, Meter(self.shared.peak_flops), None

        def log(held: tuple[int, dict[str, Any]] | None) -> None:
            """Waits for a step, while the next one runs, and writes its line."""
            if held is not None:
                done, metrics = held[0], jax.block_until_ready(held[1])
                seen = {"stage": stage.name, "tokens": before + (done - start) * tokens}
                self.progress.update(self.writer.write(done, metrics | seen | meter.tick(tokens, flops)))

        for done in range(int(state.step) + 1, start + stage.steps + 1):
            with self.shared.phase("training"), jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, metrics = step(state, to_device(next(batches)))
                log(held)
                held = done, metrics
            last, cadence = done == recipe.steps, recipe.cadence
            looks, saves = _due(done, cadence.eval_every) and not last, _due(done, cadence.checkpoint_every) or last
            if looks or saves or done == start + stage.steps:
                with self.shared.phase("training"):
                    log(held)
                    held = None
            if looks:
                self.evaluate(done, state, stage)
            if saves:
                self.save(done, state, batches)
            if held is None:
                meter.pause()
        return state

    def evaluate(self, done: int, state: TrainState, stage: Stage) -> None:
        """Adds held-out measurements to the line of step `done`."""
        with self.shared.phase("evaluation"):
            self.writer.write(done, self.evaluators.measure(state.params, stage))

    def save(self, done: int, state: TrainState, batches: TrainBatches) -> None:
        """Starts a checkpoint; the log is written out first, so that no step before it can be missing."""
        with self.shared.phase("checkpoints"):
            self.progress.update(self.writer.flush())
            config = to_released_json(self.shared.config)
            self.checkpoints.save(done, state, {"config": config, "data": batches.get_state()})


def compiled_step(run: Run, stage: Stage, state: TrainState) -> Any:
    """The stage's step, compiled before the first batch, so that its time is seen and said."""
    shape = jax.ShapeDtypeStruct((stage.batch_size, stage.sequence_length), jnp.int32)
    run.say(f"compiling the {stage.name} step: {stage.batch_size} x {stage.sequence_length} tokens ({stage.kind}) ...")
    began = time.perf_counter()
    with run.phase("compilation"):
        # From shapes, so that a restored state finds the program of a fresh one in the compilation cache.
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jitted: Any = make_train_step(run.plan, stage.kind, stage.microbatches)
        step = jitted.lower(abstract, {"tokens": shape, "segment_ids": shape}).compile()
    run.say(f"compiled in {time.perf_counter() - began:.1f} s")
    return step


def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What a step reads of a batch."""
    return {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids")}


def use_compilation_cache(cache: str | Path | None = None) -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(cache or default_cache()) / "compiled"))


def _stages_from(recipe: Recipe, step: int) -> Iterator[tuple[int, int]]:
    """(index, first step) of each stage that still has steps to do."""
    start = 0
    for index, stage in enumerate(recipe.stages):
        if step < start + stage.steps:
            yield index, start
        start += stage.steps


def _restored_or_new(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    plan, seed = run.plan, run.recipe.seed
    if not checkpoints.steps:
        return jax.jit(plan.init, static_argnums=0)(seed), {}
    step, state, host = checkpoints.restore(jax.eval_shape(lambda: plan.init(seed)))
    run.say(f"resuming after step {step:,} of {run.recipe.steps:,}")
    return state, host


def _headline(recipe: Recipe, config: DeepseekV4Config, folder: RunFolder, resuming: bool) -> str:
    millions = (count / 1e6 for count in (total_parameters(config), activated_parameters(config)))
    size = "{:,.1f}M parameters ({:,.1f}M activated)".format(*millions)
    doing = "resuming" if resuming else "new run"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    work = f"{recipe.steps:,} steps, {recipe.tokens:,} tokens, on {devices}"
    return f"{recipe.name}: {recipe.about}\n{doing} in {folder.root}: {size}, {work}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
