"""The steps of one stage: take a batch, step, log the step before; look, save, and stop when there is reason to."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config_json import to_released_json
from train import adapted
from train.anticipation import Anticipation
from train.checkpointing import CheckpointError, Checkpoints
from train.data.ahead import DataSourceError, ReadAhead
from train.flops import training_flops_per_token
from train.interruptions import RunLog, Terminated, Termination
from train.losses import learned_blocks
from train.metrics import Meter, Progress
from train.placement import STEP_READS
from train.recipe import Recipe, Stage
from train.run_data import masks_loss
from train.stability import Spike, Watch
from train.state import TrainState
from train.step import make_router, make_train_step

if TYPE_CHECKING:
    from train.loop import Evaluators, Run


@dataclass
class Programs:
    """The compiled programs of the stage that runs; they outlive a rollback, and the run where several share them."""

    shared: Run
    _made: dict[Any, Any] = field(default_factory=dict)
    _stage: str = ""

    def step(self, stage: Stage, state: TrainState) -> Callable[..., Any]:
        """The stage's step, compiled before the first batch, so that its time is seen and said."""
        plan = self.shared.plan
        return self._compiled("step", stage, make_train_step(plan, stage.kind, stage.microbatches), state, {})

    def router(self, stage: Stage, state: TrainState) -> Callable[..., Any]:
        """What chooses experts for anticipatory routing; compiled when the mode begins."""
        plan = self.shared.plan
        return self._compiled("router", stage, make_router(plan, stage.kind, stage.microbatches), state.params, {})

    def anticipatory_step(self, stage: Stage, state: TrainState) -> Callable[..., Any]:
        """The step that is given the experts; compiled when the mode begins."""
        jitted = make_train_step(self.shared.plan, stage.kind, stage.microbatches)
        return self._compiled(
            "anticipatory step", stage, jitted, state, {"expert_ids": self.expert_ids(stage, state.params)}
        )

    def expert_ids(self, stage: Stage, params: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the experts of a batch."""
        plan = self.shared.plan
        router = make_router(plan, stage.kind, stage.microbatches)
        ids = jax.eval_shape(router, _abstract(params), self.batch_shape(stage))
        return jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=plan.placement.batch)

    def batch_shape(self, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of what a step reads of a batch."""
        names = [name for name in STEP_READS if name != "loss_mask" or masks_loss(self.shared.recipe)]
        size = (stage.batch_size, stage.sequence_length)
        shape = jax.ShapeDtypeStruct(size, jnp.int32, sharding=self.shared.plan.placement.batch)
        return dict.fromkeys(names, shape)

    def _compiled(self, name: str, stage: Stage, jitted: Any, state: Any, more: dict[str, Any]) -> Callable[..., Any]:
        if self.shared.compiled is None and stage.name != self._stage:
            self._stage, self._made = stage.name, {}
        made = self._made if self.shared.compiled is None else self.shared.compiled
        key = (name, program_of(self.shared.recipe, stage))
        if key not in made:
            shape = f"{stage.batch_size} x {stage.sequence_length} tokens ({stage.kind})"
            self.shared.say(f"compiling the {stage.name} {name}: {shape} ...")
            began = time.perf_counter()
            with self.shared.phase("compilation"):
                made[key] = jitted.lower(_abstract(state), self.batch_shape(stage) | more).compile()
            self.shared.say(f"compiled in {time.perf_counter() - began:.1f} s")
        return made[key]


def program_of(recipe: Recipe, stage: Stage) -> Hashable:
    """What the programs of a stage depend on: equal for runs that differ in seed or data alone."""
    numbers = recipe.learning_rate, recipe.steps, recipe.optimizer, recipe.losses, recipe.precision, recipe.lora
    shape = stage.kind, stage.sequence_length, stage.batch_size, stage.microbatches
    return recipe.model.config, numbers, shape, masks_loss(recipe)


@dataclass(frozen=True)
class Undo:
    """A spike, and the checkpoint to go back to."""

    spike: Spike
    target: int


@dataclass
class StageRun:
    """The steps of one stage."""

    shared: Run
    checkpoints: Checkpoints
    log: RunLog
    progress: Progress
    evaluators: Evaluators
    programs: Programs
    watch: Watch
    termination: Termination

    def run(self, state: TrainState, index: int, start: int, batches: ReadAhead) -> tuple[TrainState, Undo | None]:
        """From `state` towards the end of stage `index`, which began at step `start`.

        Returns:
            The state, and what is to be undone, or None at the end of the stage.

        Raises:
            UnstableError, DataSourceError, DiskError, CheckpointError, Terminated: see there.
        """
        recipe, first = self.shared.recipe, int(state.step)
        stage = recipe.stages[index]
        try:
            step = self.termination.during(lambda: self.programs.step(stage, state))
        except Terminated as ended:
            if first > max(self.checkpoints.steps, default=0):
                self.save(first, state, batches, None)
            self.end(ended)
        lines, end = _Lines(self, index, start), start + stage.steps
        anticipation: Anticipation | None = None
        if first == start:
            self.watch.begin_stage()
        for done in range(first + 1, end + 1):
            anticipating = self.watch.anticipates(done) and bool(learned_blocks(self.shared.config))
            if not anticipating:
                anticipation = None
            elif anticipation is None:
                anticipation = self.anticipation(done, state, stage, end)
            try:
                with self.shared.phase("training"), jax.profiler.StepTraceAnnotation("train", step_num=done):
                    if anticipation is None:
                        state, metrics = step(state, self.to_devices(stage, next(batches)))
                    else:
                        state, metrics = anticipation.step(done, state, batches)
                    undo = self.to_undo(lines.push(done, metrics))
            except DataSourceError as error:
                raise self.saved_before(error, done - 1, state, batches, lines, anticipation) from error
            if (undo := undo or self.after_step(done, state, batches, lines, anticipation)) is not None:
                return state, undo
        return state, None

    def after_step(
        self, done: int, state: TrainState, batches: ReadAhead, lines: _Lines, anticipation: Anticipation | None
    ) -> Undo | None:
        """Looks, saves and stops where step `done` is due for it, once its own line is logged and shows no spike."""
        recipe, stage, asked = self.shared.recipe, lines.stage, self.termination.asked()
        last, ends = done == recipe.steps, done == lines.start + stage.steps
        looks = _due(done, recipe.cadence.eval_every) and not last
        saves = _due(done, recipe.cadence.checkpoint_every) or last or asked
        if not (looks or saves or ends):
            return None
        with self.shared.phase("training"):
            if (undo := self.to_undo(lines.flush())) is not None:
                return undo
        if looks:
            self.evaluate(done, state, stage)
        if saves:
            self.save(done, state, batches, anticipation)
        if asked:
            self.end(Terminated(asked))
        lines.meter.pause()
        return None

    def to_devices(self, stage: Stage, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """What a step reads of a batch, where it reads it."""
        return self.shared.plan.placement.to_devices(batch, stage.batch_size)

    def to_undo(self, spike: Spike | None) -> Undo | None:
        """The spike with the checkpoint to go back to; if there is none, says so and lets training go on."""
        if spike is None:
            return None
        self.checkpoints.wait()
        target = self.watch.rollback_target(spike, self.checkpoints.steps)
        if target is not None:
            return Undo(spike, target)
        self.shared.say(f"{spike}. No checkpoint lies far enough before it: training goes on from here")
        self.watch.go_on(spike)
        return None

    def anticipation(self, done: int, state: TrainState, stage: Stage, end: int) -> Anticipation:
        """For step `done` and those behind it; with what was chosen already, if the run was resumed in the mode."""
        assert self.watch.episode is not None
        router, step = self.programs.router(stage, state), self.programs.anticipatory_step(stage, state)
        last, delay = min(self.watch.episode["until"], end), self.shared.recipe.stability.anticipatory_delay
        self.shared.say(f"step {done:,}: anticipatory routing, experts chosen {delay} steps ahead, until step {last:,}")
        anticipation = Anticipation(delay, last, router, step, partial(self.to_devices, stage))
        begins = done - 1 in (self.watch.episode["after"], end - stage.steps)
        shape = self.programs.expert_ids(stage, state.params)
        if not begins and not anticipation.restore(done - 1, self.ids_folder, shape):
            self.shared.say(f"the choices saved with step {done - 1:,} are gone: they are made anew")
        return anticipation

    def evaluate(self, done: int, state: TrainState, stage: Stage) -> None:
        """Adds held-out measurements to the line of step `done`."""
        with self.shared.phase("evaluation"):
            self.log.write(done, self.evaluators.measure(state.params, stage))

    def save(self, done: int, state: TrainState, batches: ReadAhead, anticipation: Anticipation | None) -> None:
        """Starts a checkpoint; the log is written out first, so that no step before it can be missing."""
        with self.shared.phase("checkpoints"):
            self.progress.update(self.log.flush())
            if anticipation is not None:
                anticipation.save(done, self.ids_folder, self.shared.recipe.cadence.keep)
            config = to_released_json(self.shared.config)
            host = {"config": config, "data": batches.get_state(), "stability": self.watch.get_state()}
            host |= {"lora": adapted.to_json(self.shared.recipe.lora)} if self.shared.recipe.lora else {}
            self.checkpoints.save(done, state, host)

    def end(self, ended: Terminated) -> NoReturn:
        """Raises `ended`, having said what is saved."""
        self.checkpoints.wait()
        steps, name = self.checkpoints.steps, ended.signal.name
        saved = f"saved step {steps[-1]:,}. The same command goes on from there" if steps else "nothing was saved yet"
        self.shared.say(f"{name}: {saved}")
        raise ended

    def saved_before(
        self,
        error: DataSourceError,
        done: int,
        state: TrainState,
        batches: ReadAhead,
        lines: _Lines,
        anticipation: Anticipation | None,
    ) -> DataSourceError:
        """Saves step `done`, behind which the data failed; the error, with what was saved.

        Not in a run of several processes: the others wait for this one in the middle of a step.
        """
        if jax.process_count() == 1:
            try:
                self.checkpoints.wait()  # the save in progress may be that of this very step
                if done > max(self.checkpoints.steps, default=0):
                    lines.flush()
                    self.save(done, state, batches, anticipation)
                    self.checkpoints.wait()
            except CheckpointError as failure:
                return DataSourceError(f"{error} Besides, {failure}")
        steps = self.checkpoints.steps
        kept = f"Saved: step {steps[-1]:,}" if steps else "No step was done yet"
        return DataSourceError(f"{error} {kept}; the same command goes on from there")

    @property
    def ids_folder(self) -> Any:
        """Where the choices of experts are kept that belong to a checkpoint."""
        return self.shared.folder.root / "anticipated"


class _Lines:
    """The log of a stage: waits for a step while the next one runs, watches it, and writes its line."""

    def __init__(self, run: StageRun, index: int, start: int):
        self.run, self.start = run, start
        recipe = run.shared.recipe
        self.stage, self.before = recipe.stages[index], sum(s.tokens for s in recipe.stages[:index])
        self.flops = training_flops_per_token(run.shared.config, self.stage.sequence_length, self.stage.kind)
        self.meter = Meter(run.shared.peak_flops)
        self.held: tuple[int, dict[str, Any]] | None = None

    def push(self, done: int, metrics: dict[str, Any]) -> Spike | None:
        """Holds the metrics of a step that still runs; handles those of the step before."""
        spike = self.flush()
        self.held = done, metrics
        return spike

    def flush(self) -> Spike | None:
        """Handles the step that is held. Raises UnstableError."""
        if self.held is None:
            return None
        (done, metrics), self.held = self.held, None
        jax.block_until_ready(metrics)
        tokens = self.stage.batch_size * self.stage.sequence_length
        seen = {"stage": self.stage.name, "tokens": self.before + (done - self.start) * tokens}
        seen |= self.run.watch.marks(done) | self.meter.tick(tokens, self.flops)
        self.run.progress.update(self.run.log.write(done, metrics | seen))
        return self.run.watch.observe(done, metrics)


def _abstract(state: Any) -> Any:
    # From shapes, so that a restored state finds the program of a fresh one in the compilation cache.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
