"""How fast a run goes, how much of the machine that is, and how long it still takes; shown while it trains."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

HELDOUT = ("heldout_bpb", "heldout_answers", "task_accuracy")
"""What an evaluation measures first: bits per byte of text, nats per token of answers, right answers of a task."""

TERA = 1e12
PEAK_BF16_FLOPS: dict[str, float] = {
    "A100": 312 * TERA,
    "H100 PCIe": 756 * TERA,
    "H100 NVL": 835 * TERA,
    "H100": 989.4 * TERA,
    "H200 NVL": 835 * TERA,
    "H200": 989.4 * TERA,
    "GH200": 989.4 * TERA,
    "GB200": 2500 * TERA,
    "B200": 2250 * TERA,
    "TPU v4 lite": 138 * TERA,
    "TPU v4": 275 * TERA,
    "TPU v5 lite": 197 * TERA,
    "TPU v5e": 197 * TERA,
    "TPU v5p": 459 * TERA,
    "TPU v5": 459 * TERA,
    "TPU v6 lite": 918 * TERA,
    "TPU v6e": 918 * TERA,
    "TPU7x": 2307 / 2 * TERA,
}
"""Dense BF16 peak of one JAX device by a part of its ``device_kind``, from the makers' data sheets (without sparsity).

A TPU7x chip appears as two devices; a v4 or v5p chip as one (both cores together).
"""


class Meter:
    """Tokens per second and model FLOPs utilisation over the last steps.

    Args:
      peak_flops: of all devices together (`device_peak`), or None: utilisation is then None, never a guess.
      window: how many steps to average over.
    """

    def __init__(self, peak_flops: float | None = None, *, window: int = 20):
        """See the class."""
        self.peak_flops = peak_flops
        self._ticks: deque[tuple[float, float, float]] = deque(maxlen=window + 1)

    def tick(self, tokens: int, flops_per_token: float | None = None, *, now: float | None = None) -> dict[str, Any]:
        """Marks the end of a step of `tokens`; nothing can be said at the first, which holds the compilation.

        Returns:
          ``tokens_per_s``, ``flops_per_token`` and ``mfu``, those that are unknown as None.
        """
        now = time.perf_counter() if now is None else now
        self._ticks.append((now, tokens, tokens * (flops_per_token or 0)))
        elapsed = now - self._ticks[0][0]
        if len(self._ticks) < 2 or elapsed <= 0:
            return {"tokens_per_s": None, "flops_per_token": flops_per_token, "mfu": None}
        rate, flops = (sum(tick[i] for tick in list(self._ticks)[1:]) / elapsed for i in (1, 2))
        known = self.peak_flops and flops_per_token
        return {
            "tokens_per_s": rate,
            "flops_per_token": flops_per_token,
            "mfu": flops / self.peak_flops if known and self.peak_flops else None,
        }

    def pause(self) -> None:
        """Forgets the steps so far, so that time spent on evaluation or a new compilation does not count."""
        self._ticks.clear()


class Progress:
    """A live line in a terminal, or a plain line every few seconds elsewhere: step, loss, rates, time left.

    Args:
      total_steps: of the run.
      first_step: the step that was restored.
      total_tokens: makes the time left follow tokens instead of steps, for runs whose batch grows.
      every: seconds between plain lines.
      stream: standard output by default.
      watch: called with every line of metrics.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        total_tokens: int | None = None,
        every: float = 10.0,
        stream: TextIO | None = None,
        watch: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """See the class."""
        self.watch = watch
        self.total_steps, self.total_tokens, self.every = total_steps, total_tokens, every
        self._stream = sys.stdout if stream is None else stream
        self._times: deque[tuple[float, int]] = deque(maxlen=50)
        self._last_print = -math.inf
        self._live = _rich_bar(self._stream, total_steps, first_step) if self._stream.isatty() else None

    def update(self, line: Mapping[str, Any] | None, *, now: float | None = None) -> None:
        """Shows one written line of metrics (what `MetricsWriter.write` returned; None is ignored)."""
        if line is None:
            return
        now = time.perf_counter() if now is None else now
        self._times.append((now, line["step"]))
        text = self.describe(line)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=line["step"], description=text)
        elif now - self._last_print >= self.every or line["step"] >= self.total_steps or set(HELDOUT) & set(line):
            self._last_print = now
            self.note(text)
        if self.watch is not None:
            self.watch(line)

    def describe(self, line: Mapping[str, Any]) -> str:
        """One line of text for one line of metrics."""
        parts = [
            f"step {line['step']:,}/{self.total_steps:,}",
            line.get("stage"),
            _labelled("loss {:.4f}", line, "loss"),
            _labelled("held-out {:.3f} bits/byte", line, "heldout_bpb"),
            _labelled("held-out answers {:.3f} nats/token", line, "heldout_answers"),
            _labelled("answers {:.1%}", line, "task_accuracy"),
            _labelled("far {:.1%}", line, "task_far"),
            _labelled("{:,.0f} tokens/s", line, "tokens_per_s"),
            _labelled("MFU {:.1%}", line, "mfu"),
            _time_left(self.seconds_left(line)),
        ]
        return " | ".join(part for part in parts if part)

    def seconds_left(self, line: Mapping[str, Any]) -> float | None:
        """From the recent rate of steps, or of tokens when the total is known; None before there is one."""
        if self.total_tokens and line.get("tokens") is not None and line.get("tokens_per_s"):
            return max(0.0, (self.total_tokens - line["tokens"]) / line["tokens_per_s"])
        if not self._times:
            return None
        (start, first), (end, last) = self._times[0], self._times[-1]
        return (end - start) / (last - first) * max(0, self.total_steps - last) if last > first else None

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live line if there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state of the live line on the screen."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        """Closes itself at the end of a ``with`` block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()


def device_peak(devices: Sequence[Any] | None = None) -> float | None:
    """Dense BF16 peak of all `devices` (by default all there are) in FLOP/s; None if one is not in the table."""
    peaks = [peak_of(device.device_kind) for device in (jax.devices() if devices is None else devices)]
    return None if any(peak is None for peak in peaks) else sum(peak for peak in peaks if peak)


def peak_of(device_kind: str) -> float | None:
    """The table's entry whose name is the longest part of `device_kind`; None (unknown) for a CPU and the rest.

    Whole words only ("RTX A1000" is no A100), and no slices of a device (MIG), whose share is not in the name.
    """
    found = [name for name in PEAK_BF16_FLOPS if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE)]
    return PEAK_BF16_FLOPS[max(found, key=len)] if found and "MIG" not in device_kind else None


def measured_matmul_peak(dtype: Any = jnp.float32, *, size: int = 1536, seconds: float = 1.0) -> float:
    """FLOP/s of the best of repeated ``[size, size] @ [size, size]`` products on the first device: a CPU's peak."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best, stop = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < stop:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """A curve in one line of text: the mean of each of `width` equal parts, from the lowest to the highest bar.

    Missing and not-finite values leave a gap where a whole part consists of them.
    """
    y = np.array([math.nan if value is None else value for value in values], float)
    y[~np.isfinite(y)] = math.nan
    parts = [part[np.isfinite(part)] for part in np.array_split(y, min(width, len(y)))] if len(y) else []
    means = [part.mean() if len(part) else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) / span * 7)] if math.isfinite(mean) else " " for mean in means)


def _rich_bar(stream: TextIO, total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        console=Console(file=stream),
        refresh_per_second=4,
    )
    bar.add_task("compiling", total=total, completed=done)
    bar.start()
    return bar


def _labelled(form: str, line: Mapping[str, Any], name: str) -> str | None:
    return None if line.get(name) is None else form.format(line[name])


def _time_left(seconds: float | None) -> str | None:
    return None if seconds is None or not math.isfinite(seconds) else f"{_duration(seconds)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
