"""The processes of a job: how they find each other, agree before they begin, and end together.

On one machine there is nothing to find. Under Slurm, Open MPI, on TPU pods, GKE and in a Kubernetes Job JAX reads from
the environment how many processes there are and where the first one listens; arguments and the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID come before that.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv4_jax.errors import UserError, for_people
from sharding.processes import CPU_THREADS, Processes, cpu_threads

SHUTDOWN_SECONDS = 300  # how long the first process to finish waits for the last
_LOST = ("gloo", "nccl", "connection reset", "connection closed", "socket closed", "coordination service", "heartbeat")


def start(asked: Processes | None = None) -> None:
    """Makes this process one of its job's; does nothing where it is alone. Call it before JAX is used.

    Raises:
        UserError: for arguments that cannot be right, or a job that is only half described. Processes that do not come
            within `start_timeout` seconds end this one with a message: JAX cannot stop waiting.
    """
    if jax.distributed.is_initialized():
        return
    asked = asked or Processes()
    _prepare_cpu(asked)
    found = asked.resolved()
    if found.num_processes == 1 or (not found.named and _alone_in_kubernetes()):
        return
    with _bounded(found):
        if _connect(found):
            jax.process_count()  # makes the devices of all processes known, which waits for all as well


@contextmanager
def job(asked: Processes, command: str) -> Iterator[None]:
    """`start`, and around the body: an error in one of several processes ends that process at once.

    An orderly exit would wait for the others, which wait for this one in the middle of a step.
    """
    start(asked)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        _leave(error, command)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on process 0, a JSON value, on all processes; elsewhere it is not called.

    Raises:
        UserError: on the other processes, when `make` raised something that is for people.
    """
    if jax.process_count() == 1:
        return make()
    error: BaseException | None = None
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": make()}
        except Exception as caught:
            error, answer = caught, {"error": str(caught)}
    answer = _broadcast(answer)
    if error is not None:
        raise error
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Inside, what the processes behind the first print goes nowhere; errors do not pass through here."""
    if jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def one_at_a_time(results: Any) -> Any:
    """The results of a program, waited for where several processes compute on CPU.

    There, two programs that do not depend on each other run at the same time, and when both sum over processes they can
    wait for each other for ever (seen with jax 0.10.2 and two devices a process).
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(results)
    return results


def whole_on_host(tree: Any) -> Any:
    """The arrays of a tree as numpy arrays, wherever their parts lie; every process calls it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def _prepare_cpu(asked: Processes) -> None:
    """Several CPU devices, and sums over processes, have to be asked for before JAX starts."""
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if asked.cpu_devices is None:
        return
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        raise UserError("--cpu-devices, and XLA_FLAGS has xla_force_host_platform_device_count: give one of them")
    jax.config.update("jax_num_cpu_devices", asked.cpu_devices)
    os.environ.setdefault(CPU_THREADS, cpu_threads(asked.cpu_devices))


def _connect(found: Processes) -> bool:
    """Whether this process is one of several now."""
    known = {"coordinator_address": found.coordinator, "num_processes": found.num_processes}
    try:
        jax.distributed.initialize(
            **known,
            process_id=found.process_id,
            cluster_detection_method=_method(found),
            initialization_timeout=found.start_timeout + 60,  # `_bounded` speaks first
            heartbeat_timeout_seconds=found.heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if not found.named:
            return False  # JAX found no cluster
        raise UserError(
            "a job of several processes needs --coordinator HOST:PORT, --num-processes N and --process-id I where no "
            f"cluster tells them. Known: {found}. JAX says: {error}"
        ) from error
    except (RuntimeError, KeyError, OSError) as error:
        if not found.named and "before any JAX calls" in str(error):
            return False  # called from a program that uses JAX already: it is this process's own affair
        raise UserError(
            f"this looks like a cluster, but its description is not whole: {error}. Name the job with --coordinator, "
            "--num-processes and --process-id, or run alone with --num-processes 1"
        ) from error
    return True


@contextmanager
def _bounded(found: Processes) -> Iterator[None]:
    """Ends the process when the body takes longer than `start_timeout`; JAX itself would abort with a stack trace."""

    def give_up() -> None:
        own = "this process" if found.process_id is None else f"process {found.process_id}"
        count = "all" if found.num_processes is None else f"all {found.num_processes}"
        where = f" at {found.coordinator}" if found.coordinator else ""
        print(
            f"dsv4: {own} has waited {found.start_timeout} s (--start-timeout) for {count} processes of its job to "
            f"meet at process 0{where}. Was every one started, with its own --process-id, and can they all reach that "
            "address? To run alone: --num-processes 1",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(found.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(error: BaseException, command: str) -> NoReturn:
    """Says what happened, and ends this process of several without waiting for any other."""
    who = f"dsv4 {command}: process {jax.process_index()} of {jax.process_count()}"
    status = 1
    if (told := for_people(error)) is not None:
        words, status = f"{who}: {told}", 2
    elif isinstance(error, KeyboardInterrupt):
        words, status = f"{who}: interrupted{f'. {error}' if str(error) else ''}", 130
    elif _lost(error):
        words = (
            f"{who}: another process of the job has ended or cannot be reached, so this one ends too; the reason is "
            f"in the other's messages. The same command goes on from the newest checkpoint. ({_first_line(error)})"
        )
    else:
        words = f"{who}:\n{''.join(traceback.format_exception(error))}"
    print(words, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _lost(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError | ValueError) and any(word in text for word in _LOST)


def _broadcast(value: Any) -> Any:
    """A JSON value from process 0 to all."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes())


def _method(found: Processes) -> str | None:
    """How JAX is to look for what is missing; by default it tries every way it knows."""
    local = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # from these it takes which GPU is this process's
    if None not in (found.coordinator, found.num_processes, found.process_id):
        return None if any(name in os.environ for name in local) else "deactivate"
    # Open MPI 5 no longer tells the address that JAX looks for; mpi4py does, where it is installed.
    new_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
    return "mpi4py" if new_mpi and not found.coordinator and importlib.util.find_spec("mpi4py") else None


def _alone_in_kubernetes() -> bool:
    """A pod that is no part of an indexed Job, such as one with a notebook: JAX would look for its Job and fail."""
    several = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_STEP_NODELIST")
    return "KUBERNETES_SERVICE_HOST" in os.environ and not any(name in os.environ for name in several)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
