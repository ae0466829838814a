"""The training loop, from a recipe to a trained model: one linear story, resumable at any moment."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.analysis.count import activated_parameters, total_parameters
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.partition import ALONE, Partition
from dsv4_jax.paths import local_path
from sharding.distributed import from_first
from train import adapted
from train.checkpointing import CheckpointError, Checkpoints
from train.data.ahead import ReadAhead
from train.data.tokens import TokenStore, default_cache
from train.evaluate import Evaluator
from train.fitting import check_stages
from train.interruptions import RunLog, Termination
from train.metrics import Progress, device_peak, measured_matmul_peak
from train.recipe import Recipe, Stage
from train.report import finish
from train.rollback import begin_rollback, episode_after, finish_rollback
from train.run_data import Source, check_recall, describe, describe_passes, open_source, recall_task, stage_batches
from train.run_folder import RunFolder
from train.run_lock import alone_in
from train.stability import Watch
from train.stage_run import Programs, StageRun, Undo
from train.starting import check_vocabulary, starting_weights
from train.state import TrainState
from train.step import StepPlan
from train.task_report import measure_task


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    partition: Partition = ALONE,
    compiled: dict[Any, Any] | None = None,
    watch: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs a recipe to its end, from the newest good checkpoint in `out` if the folder holds this very run.

    Args:
        recipe: what to do.
        out: the run folder.
        cache: where token files are kept; the user's cache folder by default.
        partition: how the run lies on devices (`train.placement.place`).
        compiled: programs that runs on the same devices share, a dictionary that is empty at first.
        watch: called with every line of metrics.jsonl as it is written, to draw curves while the run goes on, say.

    Returns:
        The summary that is also written to `summary.json`.

    Raises:
        RecipeError, ConfigError, DataMismatchError, CheckpointError: before anything is computed or overwritten.
        UserError: as well, when another job is at work in the folder.
    """
    run = Run(recipe, recipe.check(), RunFolder(out), partition, compiled, watch)
    with alone_in(run.folder.root):
        return _whole(run, cache)


def _whole(run: Run, cache: str | Path | None) -> dict[str, Any]:
    """`train`, in a folder that no other job writes to."""
    recipe, config, folder = run.recipe, run.config, run.folder
    resuming = from_first(lambda: folder.check(recipe))
    check_stages(recipe, run.plan.placement)
    with run.phase("data"):
        store = open_source(recipe, config, cache)
        check_recall(recipe, store)
        if not resuming and isinstance(store, TokenStore):
            check_vocabulary(recipe, store.tokenizer)
        run.say(_headline(recipe, config, folder, resuming))
        run.say(f"data: {describe(store)}")
        for line in describe_passes(recipe, store):
            run.say(line)
        if resuming:
            _bind(run, store)
    with Checkpoints(folder.checkpoints, keep=recipe.cadence.keep) as checkpoints:
        with run.phase("set-up"):
            state, host = _restored_or_new(run, checkpoints)
            if not resuming:  # now, that what refuses the new run leaves no folder in the way of the next attempt
                _bind(run, store)
        evaluators = Evaluators(run, store)
        state = _all_stages(run, store, state, host, checkpoints, evaluators)
    return finish(run, store, state.params, evaluators)


def _bind(run: Run, store: Source) -> None:
    """Writes into the run's folder what it was asked for; of a run that goes on, the data has to be the same."""
    run.folder.begin(run.recipe, run.config)
    from_first(lambda: run.folder.bind_data(store))


def _all_stages(
    run: Run,
    store: Source,
    state: TrainState,
    host: dict[str, Any],
    checkpoints: Checkpoints,
    evaluators: Evaluators,
) -> TrainState:
    """From `state` to the end of the run; after a loss spike the same again, from an older checkpoint."""
    recipe, first, say = run.recipe, int(state.step), run.say
    programs, undo, speaks = Programs(run), None, jax.process_index() == 0
    newest = partial(_newest, checkpoints)
    shown = {"first_step": first, "total_tokens": recipe.tokens, "stream": None if speaks else io.StringIO()}
    shown |= {"watch": run.watch}
    with Progress(recipe.steps, **shown) as progress, Termination(lambda text: run.say(text)) as termination:
        run.say = progress.note if speaks else say
        watch = Watch(recipe.stability, run.say, newest)
        while undo is not None or int(state.step) < recipe.steps:
            if undo is not None:
                del state
                state, host = _rolled_back(run, checkpoints, watch, undo)
            watch.set_state(host.get("stability", {}))
            with RunLog(run.folder.root, int(state.step), newest) as log:
                stages = StageRun(run, checkpoints, log, progress, evaluators, programs, watch, termination)
                state, undo = _stages_from(stages, store, state, host)
                progress.update(log.flush())
    run.say = say
    return state


def _stages_from(
    stages: StageRun, store: Source, state: TrainState, host: dict[str, Any]
) -> tuple[TrainState, Undo | None]:
    """All stages that still have steps to do, until a spike is to be undone."""
    recipe, undo = stages.shared.recipe, None
    while undo is None and (step := int(state.step)) < recipe.steps:
        index, start = recipe.stage_at(step)
        batches = stage_batches(recipe, store, index, step - start, host, stages.shared.plan.placement)
        source = f"the task {task.name!r}" if (task := recipe.data.task) else f"the text {recipe.data.corpus!r}"
        ahead = ReadAhead(batches, source, recipe.cadence.data_timeout)
        try:
            state, undo = stages.run(state, index, start, ahead)
        finally:
            ahead.close()
    return state, undo


def _rolled_back(run: Run, checkpoints: Checkpoints, watch: Watch, undo: Undo) -> tuple[TrainState, dict[str, Any]]:
    """The state and host values of an older checkpoint, from which anticipatory routing sets out."""
    with run.phase("rollback"):
        run.say(f"{undo.spike}: back to the checkpoint of step {undo.target:,}")
        watch.begin_episode(undo.target, undo.spike)
        begin_rollback(run.folder, checkpoints, undo.target, watch.episode)
        return _restored(run, checkpoints)


@dataclass
class Run:
    """What every part of a run shares: its settings, its folder, and where the time went."""

    recipe: Recipe
    config: DeepseekV4Config
    folder: RunFolder
    partition: Partition = ALONE
    compiled: dict[Any, Any] | None = None
    watch: Callable[[Mapping[str, Any]], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    say: Callable[..., None] = print

    def __post_init__(self) -> None:
        """Only process 0 speaks."""
        if jax.process_index():
            self.say = lambda *_: None

    @cached_property
    def plan(self) -> StepPlan:
        """What the recipe means for a step."""
        r = self.recipe
        numbers = r.schedule(), r.decay_start, r.optimizer, r.losses, r.precision
        return StepPlan(self.config, *numbers, self.partition, r.lora)

    @cached_property
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

    def __init__(self, run: Run, store: Source):
        """Compiles nothing yet."""
        self.run, self.store = run, store
        self._made: dict[Any, Evaluator] = {}
        if run.compiled is not None and run.recipe.data.task is not None:  # of a task, it holds nothing of the run
            self._made = run.compiled

    def at(self, length: int) -> Evaluator:
        """For rows of `length` tokens."""
        rows, plan = self.run.recipe.cadence.eval_batch_size, self.run.plan
        key = ("evaluator", self.run.config, plan.precision, plan.lora, length, rows)
        if key not in self._made:
            self._made[key] = Evaluator(
                self.run.config, self.store, length, rows, plan.forward(), plan.placement, plan.rounded
            )
        return self._made[key]

    def measure(self, params: Any, stage: Stage) -> dict[str, float]:
        """The metrics of an evaluation between steps: few documents or rows, the attention of the stage."""
        cadence, evaluator = self.run.recipe.cadence, self.at(stage.sequence_length)
        attention = "sparse" if stage.kind == "sparse" else "dense"
        if self.run.recipe.data.task is not None:
            return measure_task(self.run, params, evaluator, stage, cadence.recall_rows)
        found = evaluator.heldout(params, attention, cadence.eval_documents)
        if attention == "sparse" and self.run.config.has_indexer:
            found |= evaluator.index_recall(params, cadence.eval_documents)
        if rows := self.run.recipe.recall_rows:
            score = evaluator.recall(params, attention, recall_task(self.run.recipe), rows)
            found["retrieval_accuracy"] = score.accuracy
        return found


def use_compilation_cache(cache: str | Path | None = None) -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(local_path(cache or default_cache()) / "compiled"))


def _restored_or_new(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    finish_rollback(run.folder, checkpoints)
    if not from_first(lambda: checkpoints.steps):
        return _new(run), {}
    state, host = _restored(run, checkpoints)
    run.say(f"resuming after step {int(state.step):,} of {run.recipe.steps:,}")
    return state, host


def _new(run: Run) -> TrainState:
    """The state before the first step."""
    if run.recipe.start_from is None:
        return run.plan.make_state(run.recipe.seed)
    params, differences = starting_weights(run.recipe.start_from, run.plan)
    run.say("\n  ".join([f"beginning with the weights in {run.recipe.start_from}", *differences]))
    if run.plan.lora is not None:
        run.say(adapted.describe(run.plan.lora, run.config))
    return run.plan.make_state(run.recipe.seed, params)


def _restored(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """The newest good checkpoint; if a rollback led to it, its host values say so."""
    step, state, host = checkpoints.restore(run.plan.abstract_state())
    if (episode := episode_after(run.folder, step)) is not None:
        host["stability"] = host.get("stability", {}) | {"episode": episode}
    return state, host


def _newest(checkpoints: Checkpoints) -> int | None:
    """The newest checkpoint, for an error's words; where one process speaks for several, it cannot wait for a save."""
    if jax.process_count() == 1:
        with suppress(CheckpointError):
            checkpoints.wait()
    return max(checkpoints.steps, default=None)


def _headline(recipe: Recipe, config: DeepseekV4Config, folder: RunFolder, resuming: bool) -> str:
    millions = (count / 1e6 for count in (total_parameters(config), activated_parameters(config)))
    size = "{:,.1f}M parameters ({:,.1f}M activated)".format(*millions)
    doing = "resuming" if resuming else "new run"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    devices += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    work = f"{recipe.steps:,} steps, {recipe.tokens:,} tokens, on {devices}"
    return f"{recipe.name}: {recipe.about}\n{doing} in {folder.root}: {size}, {work}"
