"""What a process may be told about the job it belongs to: arguments, or the environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

from dsv4_jax.errors import UserError

CPU_THREADS = "NPROC"
"""Environment: threads of XLA on CPU. A collective holds one until all devices are there, and with as many threads as
devices, all waiting in two different collectives, nothing goes on (seen with jax 0.10.2, 8 devices on 2 cores)."""


def cpu_threads(devices: int) -> str:
    """Threads for a process with so many CPU devices."""
    return str(max(4 * devices, os.cpu_count() or 1))


def pretend_devices(count: int, patience: int = 600) -> None:
    """Lets the CPU show as `count` devices, for trying a mesh out without having one. Call it before jax is imported.

    Accelerators are not used then. Flags that the environment holds already stay.

    Args:
        count: devices.
        patience: seconds that a device may wait for the others in a collective; a busy machine needs many.

    Raises:
        UserError: when jax has started already with other devices.
    """
    if "jax" in sys.modules:
        import jax

        if (jax.default_backend(), jax.device_count()) == ("cpu", count):
            return
        raise UserError(f"jax has started with other devices: {count} pretended ones need a fresh process, or kernel")
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={count}"]
    flags += [f"--xla_cpu_collective_call_terminate_timeout_seconds={patience}"]
    os.environ |= {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    os.environ.setdefault(CPU_THREADS, cpu_threads(count))


@dataclass(frozen=True)
class Processes:
    """The job that this process belongs to. Clusters tell by themselves; see docs/pods.md."""

    coordinator: str | None = None
    """HOST:PORT of process 0; also JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """Processes of the job; also JAX_NUM_PROCESSES. 1 looks for no cluster."""
    process_id: int | None = None
    """Which of them this is, from 0; also JAX_PROCESS_ID."""
    cpu_devices: int | None = None
    """Devices of this process where it computes on CPU; also JAX_NUM_CPU_DEVICES."""
    start_timeout: int = 300
    """Seconds to wait for the other processes at the start."""
    heartbeat: int = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""

    def resolved(self) -> Processes:
        """With the environment where an argument is missing, checked. Raises UserError."""
        found = replace(
            self,
            coordinator=self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=_number(self.num_processes, "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
            process_id=_number(self.process_id, "JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK"),
        )
        found._check()
        return found

    def __str__(self) -> str:
        """What is known."""
        known = {"coordinator": self.coordinator, "processes": self.num_processes, "id": self.process_id}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None) or "nothing"

    @property
    def named(self) -> bool:
        """Whether anything says that there are other processes."""
        return (self.coordinator, self.num_processes, self.process_id) != (None, None, None)

    def _check(self) -> None:
        count, own = self.num_processes, self.process_id
        if count is not None and count < 1:
            raise UserError(f"--num-processes is {count}: at least 1")
        if own is not None and (own < 0 or (count is not None and own >= count)):
            last = "their number less 1" if count is None else count - 1
            raise UserError(f"--process-id is {own}: of {count or 'several'} processes it is one of 0 to {last}")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator is {self.coordinator!r}: HOST:PORT of process 0, as in node-0:1234")
        if min(self.start_timeout, self.heartbeat) < 1:
            raise UserError("--start-timeout and --heartbeat are seconds, at least 1")
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise UserError(f"--cpu-devices is {self.cpu_devices}: at least 1")


def _number(given: int | None, *variables: str) -> int | None:
    """An argument, else the first of the variables that is set."""
    found = next((name for name in variables if os.environ.get(name)), None)
    if given is not None or found is None:
        return given
    if not os.environ[found].lstrip("-").isdigit():
        raise UserError(f"{found} is {os.environ[found]!r} in the environment: a number is needed")
    return int(os.environ[found])
