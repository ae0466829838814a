"""Anticipatory routing: the features of step t use its parameters, the experts are chosen by those d steps before.

As in the report (4.2.3) no old parameters are kept: the choice for the batch of step t is computed d steps ahead, with
the parameters of then, from the batch that the loader has already read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sharding.distributed import one_at_a_time
from train.checkpoint_files import on_all_processes
from train.checkpointing import CheckpointError, Checkpoints
from train.data.ahead import ReadAhead

Batch = dict[str, jax.Array]


class Anticipation:
    """The experts chosen for the coming batches, and the step that uses them.

    The first d batches after a start find no older parameters: their experts are chosen by those of the start.

    Args:
        delay: d.
        last: the last step, of the stage or of the mode, that is to be anticipated.
        route: compiled `make_router`.
        step: compiled `make_train_step` for batches with "expert_ids".
        to_device: makes a batch of the loader one of the device.
    """

    def __init__(
        self,
        delay: int,
        last: int,
        route: Callable[..., jax.Array],
        step: Callable[..., Any],
        to_device: Callable[[Any], Batch],
    ):
        """Nothing is chosen yet."""
        self.delay, self.last = delay, last
        self._route, self._step, self._to_device = route, step, to_device
        self._chosen: deque[jax.Array] = deque()

    def step(self, done: int, state: Any, batches: ReadAhead) -> Any:
        """Step number `done`, as the ordinary step with the next batch: (state, metrics); donates the state."""
        while len(self._chosen) <= min(self.delay, self.last - done):
            ahead = self._to_device(batches.peek(len(self._chosen)))
            self._chosen.append(one_at_a_time(self._route(state.params, ahead)))
        return self._step(state, self._to_device(next(batches)) | {"expert_ids": self._chosen.popleft()})

    def save(self, done: int, folder: Path, keep: int) -> None:
        """Writes what is chosen already, so that a run resumed after step `done` goes on with it. All at once."""
        if self._chosen:
            with Checkpoints(folder, keep=keep) as kept:
                _drop(kept, done)  # of steps that were undone
                kept.save(done, {str(i): ids for i, ids in enumerate(self._chosen)}, {})

    def restore(self, done: int, folder: Path, abstract_ids: jax.ShapeDtypeStruct) -> bool:
        """Reads what `save` wrote after step `done`; False if it is not there or damaged."""
        count = min(self.delay, self.last - done)
        try:
            with Checkpoints(folder) as kept:
                _drop(kept, done + 1)
                _, chosen, _ = kept.restore({str(i): abstract_ids for i in range(count)}, step=done)
        except (FileNotFoundError, CheckpointError):
            return count <= 0
        self._chosen = deque(chosen[str(i)] for i in range(count))
        return True


def _drop(kept: Checkpoints, first: int) -> None:
    """Removes step `first` and all behind it."""
    if jax.process_index() == 0:
        for step in [step for step in kept.steps if step >= first]:
            (kept.folder / str(step)).rmtree()
    on_all_processes(True)
