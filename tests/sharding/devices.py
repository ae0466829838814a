"""Running a function in a process of its own, with as many CPU devices as it needs.

The number of devices is fixed when jax starts, and the tests' own process has one.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.processes import CPU_THREADS, cpu_threads


def on_devices(count: int, function: Callable[..., Any], *args: Any, timeout: float = 600) -> Any:
    """`function(*args)` on `count` CPU devices.

    Args:
        count: devices of the new process.
        function: at the top level of a module that the tests can import.
        *args: pickled on their way.
        timeout: seconds.

    Returns:
        The pickled result: numpy arrays and plain values, no jax arrays.

    Raises:
        AssertionError: with the end of the process's messages when it fails.
    """
    # On a busy machine a device may be kept from a collective for a while: that is no deadlock.
    patience = f"--xla_cpu_collective_call_terminate_timeout_seconds={int(timeout)}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count} {patience}"
    environment = os.environ | {
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
        CPU_THREADS: cpu_threads(count),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "given", Path(folder) / "result"
        given.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        command = [sys.executable, __file__, str(given), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{function.__qualname__} on {count} devices:\n{done.stderr[-6000:]}"
        return pickle.loads(result.read_bytes())


def _main(given: str, result: str) -> None:
    module, name, args = pickle.loads(Path(given).read_bytes())
    function = getattr(importlib.import_module(module), name)
    Path(result).write_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
