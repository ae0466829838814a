"""`dsv4 launch`: several processes of one job on this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated, Any

import tyro

from dsv4_jax.errors import UserError
from sharding.processes import CPU_THREADS, cpu_threads

DESCRIPTION = """Start a command in several processes on this machine, as one job.

Process 0 speaks as usual; lines of the others begin with [their number]. Signals go to all of them. When one ends badly
the others have a while to say what they know, then they are ended too, and its exit status is the launcher's.

On GPUs, process i gets the i-th group of --devices-per-process; on CPU it simulates so many. TPU hosts need no
launcher: one process has all chips of its host.

Examples:
  dsv4 launch -n 2 -- train nano
  dsv4 launch -n 2 --devices-per-process 2 -- train nano --strategy expert-fsdp --mesh expert=2,fsdp=2"""


@dataclass(frozen=True)
class Launch:
    """Arguments of `dsv4 launch`, before the `--`."""

    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """How many."""
    devices_per_process: int = 1
    """Devices that each one computes on."""
    port: int | None = None
    """Where process 0 listens, on the loopback interface; a free one by default."""
    grace: float = 45.0
    """Seconds that the others have when one has ended badly; longer than their --heartbeat."""


def main(arguments: Sequence[str]) -> int:
    """Start, watch and end the processes; returns the exit status for `dsv4`."""
    own, command = _cut(list(arguments))
    asked = tyro.cli(Launch, args=own, prog="dsv4 launch", description=DESCRIPTION)
    if asked.processes < 1 or asked.devices_per_process < 1 or asked.grace < 0:
        raise UserError("-n and --devices-per-process are at least 1, --grace at least 0")
    if not command:
        raise UserError("what to launch follows after --, as in dsv4 launch -n 2 -- train nano")
    port = asked.port or free_port()
    children = [_start(asked, port, number, command) for number in range(asked.processes)]
    try:
        with _forwarded(children) as heard:
            return _watch(children, asked.grace, heard)
    finally:
        _end(children)


def environment(count: int, number: int, port: int, devices: int = 1) -> dict[str, str]:
    """Of process `number` of `count` that meet at `port` of this machine, each with `devices` devices."""
    # On CPU the flag would override the variable.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()
    own = range(number * devices, (number + 1) * devices)
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own)),
        "JAX_NUM_CPU_DEVICES": str(devices),
        CPU_THREADS: os.environ.get(CPU_THREADS, cpu_threads(devices)),
        "XLA_FLAGS": flags,
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _start(asked: Launch, port: int, number: int, command: list[str]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE if number else None
    child = subprocess.Popen(
        [sys.executable, "-m", "dsv4_jax.cli", *command],
        env=environment(asked.processes, number, port, asked.devices_per_process),
        start_new_session=True,  # a terminal's Ctrl-C reaches the launcher, which forwards it once
        stdin=subprocess.DEVNULL if number else None,
        stdout=pipe,
        stderr=pipe,
    )
    for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
        if source is not None:
            threading.Thread(target=_relay, args=(source, target, f"[{number}] "), daemon=True).start()
    return child


def _relay(source: IO[bytes], target: Any, prefix: str) -> None:
    for line in source:
        target.write(prefix + line.decode(errors="replace"))
        target.flush()


@contextmanager
def _forwarded(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to every process; gives those that came. A third one ends them for good."""
    heard: list[int] = []

    def forward(number: int, _: Any) -> None:
        heard.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if len(heard) > 2 else number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: list[subprocess.Popen[bytes]], grace: float, heard: list[int]) -> int:
    """Waits for all, or for the first that ends badly and then `grace` seconds; the exit status."""
    first, deadline = None, float("inf")
    while True:
        running = [i for i, child in enumerate(children) if child.poll() is None]
        if first is None and (bad := next((i for i, child in enumerate(children) if child.poll()), None)) is not None:
            first, deadline = children[bad].returncode, time.monotonic() + grace
            if not heard:
                _say(f"process {bad} {_fate(first)}" + ("; waiting for the others to end" if running else ""))
        if not running:
            break
        if time.monotonic() > deadline:
            _say(f"ending processes {', '.join(map(str, running))}, which still run after {grace:g} s")
            break
        time.sleep(0.05)
    return _status(first or 0)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
    time.sleep(0.05)  # the last lines of the relays


def _status(code: int) -> int:
    """Of a shell: 128 and the signal's number for a process that a signal ended."""
    return code if code >= 0 else 128 - code


def _fate(code: int) -> str:
    return f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _say(words: str) -> None:
    print(f"dsv4 launch: {words}", file=sys.stderr, flush=True)
