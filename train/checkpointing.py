"""Checkpoints that survive being killed: asynchronous, verified by checksum, never overwritten silently.

A step is a folder of Orbax items: ``params`` (so that sampling need not know the optimizer), ``training`` (every other
array of the state) and ``host`` (the record of `checkpoint_record`, with the caller's JSON inside). Orbax commits a
step by rename, but a committed step can still rot or be cut short by a full disk, so a step counts as good only when it
has been read and every checksum agrees.

Only this module and `checkpoint_files` know Orbax; they use its ``CheckpointManager`` interface, whose files later
interfaces read as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from train import adapted
from train import checkpoint_files as files
from train import checkpoint_record as records
from train.checkpoint_files import absolute, first_line, listed, newest_good
from train.checkpoint_record import CheckpointError, MismatchError, PyTree, Record

__all__ = ["CheckpointError", "Checkpoints", "MismatchError", "load_params"]
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      folder: a local or mounted path, which all processes see; created by the first save.
      keep: how many of the newest steps stay.

    In a run of several processes every process makes the same calls in the same order.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 3):
        """See the class; nothing is read or written yet."""
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        self.folder = absolute(folder)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._damaged: list[int] = []

    @property
    def steps(self) -> list[int]:
        """The committed steps, ascending; committed does not mean verified (see `restore`). Raises CheckpointError."""
        return files.committed_steps(self.folder)

    def save(self, step: int, state: PyTree, host: Mapping[str, Any]) -> None:
        """Starts writing `state` as `step` and returns once the arrays may be donated or changed.

        Args:
          step: greater than every good step in the folder.
          state: pytree of jax arrays with ``params`` at its top. Random keys go in as `jax.random.key_data`.
          host: JSON values: ``config`` (shown on a mismatch, returned by `load_params`), data iterator state, ...

        Raises:
          CheckpointError: this save or the previous one failed; the older steps are intact.
          FileExistsError: a good checkpoint of this or of a later step exists.
          TypeError, ValueError: a leaf is not a jax array, or `host` is not JSON.
        """
        self.wait()
        leaves = records.named(state)
        record = records.make(step, leaves, host)
        self._refuse_overwrite(step)
        try:
            self._set_damaged_aside()
            self._saving = step
            self._writer().save(step, args=_save_args(leaves, record), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[int, PyTree, dict[str, Any]]:
        """Reads the newest good step, or exactly `step`, and verifies every array of it.

        Args:
          abstract_state: the state's tree of `jax.ShapeDtypeStruct` (or arrays). The result gets *its* shardings,
            whatever the checkpoint was written with; a leaf without one goes to the first device.
          step: read this one or fail. By default damaged steps are skipped, with a warning that says which and why.

        Returns:
          ``(step, state, host)``; the arrays are bitwise the saved ones.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that one.
          MismatchError: the tree, a shape or a dtype differs from the checkpoint's.
          CheckpointError: every candidate is damaged, or one cannot be read now; see `checkpoint_files.newest_good`.
        """
        self.wait()
        targets = records.named(abstract_state)
        values, record = newest_good(self.folder, step, lambda record: records.matched(record, targets))
        newer = [s for s in self.steps if s > record["step"]]
        if step is None:
            self._damaged = newer
        elif newer:
            log.warning(
                "restored step %d of %s, which also holds %s: to train on from here, save into another folder",
                step,
                self.folder,
                listed(newer),
            )
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), values.values())
        return record["step"], state, record["host"]

    def wait(self) -> None:
        """Blocks until the save in progress is committed. Raises CheckpointError if it failed."""
        if self._manager is None:
            return
        problem = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            problem = error
        if not files.on_all_processes(problem is None):
            raise self._failed(problem or RuntimeError("another process could not write its part")) from problem

    def close(self) -> None:
        """Waits for the save in progress and lets go of Orbax's threads."""
        self.wait()
        self._release()

    def __enter__(self) -> Checkpoints:
        """Closes itself at the end of a ``with`` block."""
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """See `close`. After an error in one process of several nothing is waited for: the others may never come."""
        if error is None or jax.process_count() == 1:
            self.close()

    def _writer(self) -> ocp.CheckpointManager:
        """The writing manager, made at the first save: opening it clears away what killed saves left half-written."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _release(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        """Words the error, and drops the manager, whose list of steps a failed save leaves wrong."""
        self._release()
        kept = "unknown"
        with contextlib.suppress(CheckpointError):
            kept = listed(self.steps) if self.steps else "none, this was the first"
        return CheckpointError(
            f"saving the checkpoint of step {self._saving} in {self.folder} failed: "
            f"{first_line(error)}{_free_space(self.folder)}. Earlier checkpoints intact: {kept}."
        )

    def _refuse_overwrite(self, step: int) -> None:
        good = [s for s in self.steps if s >= step and s not in self._damaged]
        if good:
            raise FileExistsError(
                f"{self.folder} already holds {listed(good)}, so step {step} is not saved there: "
                "resume from the newest checkpoint, or give this run a folder of its own"
            )

    def _set_damaged_aside(self) -> None:
        """Renames the steps that `restore` found damaged: neither retention nor a later restore may count them."""
        damaged, self._damaged = self._damaged, []
        if not damaged:
            return
        self._release()
        if jax.process_index() == 0:
            for step in damaged:
                aside = _unused(self.folder, f"damaged-{step}")
                (self.folder / str(step)).rename(aside)
                log.warning("moved the damaged checkpoint of step %d to %s; it may be deleted", step, aside)
        files.on_all_processes(True)


def load_params(
    folder: str | os.PathLike,
    step: int | None = None,
    *,
    abstract_params: PyTree | Callable[[dict[str, Any]], PyTree] | None = None,
) -> tuple[dict[str, Any], PyTree]:
    """Reads only the parameters of the newest good checkpoint, or of `step`: for sampling and evaluation.

    Adapters are merged into the parameters that they adapt.

    Args:
      folder: the folder given to `Checkpoints`; a run may be writing to it.
      step: this step and no other.
      abstract_params: shapes, dtypes and shardings wanted, as in `Checkpoints.restore`, or a function that makes them
        of the config. Without it nothing about the model need be known: the result is nested dicts by name, each array
        whole on the first device.

    Returns:
      ``(config, params)``, the former being ``host["config"]`` of the save.

    Raises:
      FileNotFoundError, MismatchError, CheckpointError: as `Checkpoints.restore`.
    """
    if abstract_params is None:
        values, record = newest_good(absolute(folder), step, lambda record: records.abstract(record, "params"))
        params = records.nested(values).get("params")
    else:
        wanted: list[PyTree] = []

        def targets(record: Record) -> dict[str, jax.ShapeDtypeStruct]:
            made = abstract_params(record["host"]["config"]) if callable(abstract_params) else abstract_params
            made = adapted.abstract(record["host"], made)
            wanted[:] = [made]
            return records.matched(record, records.named({"params": made}), "params")

        values, record = newest_good(absolute(folder), step, targets)
        params = jax.tree.unflatten(jax.tree.structure(wanted[0]), values.values())
    if params is None or "config" not in record["host"]:
        raise CheckpointError(f"step {record['step']} of {folder} was saved without params or without host['config']")
    return record["host"]["config"], adapted.merged(record["host"], params)


def _save_args(leaves: Mapping[str, jax.Array], record: Record) -> ocp.args.Composite:
    items = {item: ocp.args.StandardSave(records.nested(group)) for item, group in files.grouped(leaves).items()}
    return ocp.args.Composite(host=ocp.args.JsonSave(record), **items)


def _unused(folder: epath.Path, name: str) -> epath.Path:
    taken = [path.name for path in folder.iterdir()]
    return folder / next(n for n in [name, *(f"{name}-{i}" for i in range(len(taken)))] if n not in taken)


def _free_space(folder: epath.Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(os.fspath(folder)).free / 2**30:.1f} GiB free there)"
    return ""


def _reported_by_us(entry: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failed save four times; `Checkpoints` raises the same error once."""
    return not (entry.levelno >= logging.ERROR and "/orbax/checkpoint/" in entry.pathname.replace(os.sep, "/"))


logging.getLogger("absl").addFilter(_reported_by_us)
