"""What a run reports while it trains: a log of every step, TensorBoard curves, and a line with rates and time left.

Nothing here waits for the device: values of step n - 1 are read while step n runs. The names in use are ``step``,
``tokens``, ``stage``, ``loss``, ``ce``, ``mtp``, ``balance``, ``index_kl``, ``index_recall``, ``lr``, ``grad_norm``,
``update_rms_muon``, ``update_rms_adamw``, ``load_max_over_mean``, ``load_entropy``, ``dead_experts``, ``hc_row_error``,
``hc_col_error``, ``tokens_per_s``, ``flops_per_token``, ``mfu``, one of `HELDOUT` and ``retrieval_accuracy``; in a run
on a synthetic task ``task_accuracy``, ``task_loss`` (nats per answer), ``task_far``, ``task_worst_phase``,
``task_by_distance`` and ``task_by_phase``;
in a run that met trouble also ``skipped`` (1: the step was not finite and changed nothing), ``spike_step`` and
``spike_loss`` (of a spike that was rolled back, at the first step behind the rollback) and ``anticipatory`` (1: experts
were chosen by older parameters).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from train.progress import HELDOUT, Meter, Progress, device_peak, measured_matmul_peak, sparkline
from train.tensorboard import Curves

__all__ = [
    "HELDOUT",
    "Meter",
    "MetricsWriter",
    "Progress",
    "device_peak",
    "measured_matmul_peak",
    "read_metrics",
    "sparkline",
]
Value = Any


class MetricsWriter:
    """Writes one JSON line a step to ``folder/metrics.jsonl``, and scalars to TensorBoard when tensorboardX is there.

    Args:
      folder: of the run; created.
      resume_step: the step that was restored (0 when starting over). Later lines are dropped, so that the log holds
        each step once; a line that a kill cut short goes too. Without it a folder that has a log is refused.
      tensorboard: also write event files into ``folder/tensorboard``, if tensorboardX can be imported.

    Only process 0 writes. Call `flush` before a checkpoint is saved: then no step before it can be missing from the
    log of a run that is killed and resumed.
    """

    def __init__(self, folder: str | os.PathLike, *, resume_step: int | None = None, tensorboard: bool = True):
        """See the class."""
        self.path = pathlib.Path(folder) / "metrics.jsonl"
        self._pending: tuple[int, dict[str, Value]] | None = None
        self._file: int | None = None
        self._board: Curves | None = None
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(resume_step)
            self._board = _tensorboard(self.path.parent, resume_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Value]) -> dict[str, Any] | None:
        """Takes the metrics of `step`, without waiting for them, and writes those of the step before.

        Args:
          step: not smaller than in the call before; a second call for one step adds to its line.
          metrics: numbers, strings, None (unknown), or jax and numpy arrays: scalars, or small ones (kept as lists).

        Returns:
          The line of the step before as plain Python values, for `Progress.update`; None when there is none.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        if self._pending is not None and self._pending[0] == step:
            self._pending[1].update(metrics)
            return None
        written = self.flush()
        self._pending = (step, dict(metrics))
        return written

    def flush(self) -> dict[str, Any] | None:
        """Writes the step still held back, waiting for its values. Returns its line as `write` does."""
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        if self._file is None:
            return None
        line = {"step": step} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        # One system call a line: readers and kills see whole lines or, at worst, one cut short at the end.
        os.write(self._file, (_json_line(line) + "\n").encode())
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, step)
        return line

    def close(self) -> None:
        """Writes what is held back and closes the files."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
        if self._board is not None:
            self._board.close()
        self._file = self._board = None

    def __enter__(self) -> MetricsWriter:
        """Closes itself at the end of a ``with`` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def _open(self, resume_step: int | None) -> None:
        if self.path.exists() and self.path.stat().st_size:
            if resume_step is None:
                raise FileExistsError(
                    f"{self.path} is the log of an earlier run: resume it (resume_step=...), or "
                    "give this run a folder of its own"
                )
            _drop_after(self.path, resume_step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that was cut short. Not-finite values come back as floats."""
    lines = []
    for text in pathlib.Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            lines.append(line | {name: float(value) for name, value in line.pop("not_finite", {}).items()})
    return lines


def _plain(value: Value) -> Any:
    """A number, string, None or nested list."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).astype(np.float64 if value.dtype.kind not in "iub" else value.dtype).tolist()
    return value


def _json_line(line: Mapping[str, Any]) -> str:
    """Strict JSON: NaN and infinities become null, and are named under ``not_finite``."""
    odd = {name: str(value) for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    strict = {name: _finite(value) for name, value in line.items()}
    return json.dumps(strict | ({"not_finite": odd} if odd else {}), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the whole lines up to `step`, replacing the file in one go."""
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(line + "\n" for line in kept))
    os.replace(draft, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _tensorboard(folder: pathlib.Path, resume_step: int | None) -> Curves | None:
    try:
        return Curves(folder / "tensorboard", resume_step or 0)
    except ImportError:
        return None
