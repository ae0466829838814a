"""Which backend of a kernel runs: the one of the platform that a program is compiled for.

`DSV4_KERNELS=xla` in the environment leaves every kernel to plain XLA. `DSV4_KERNELS=blackwell` takes also those for
Blackwell, which no GPU has run yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import jax

from dsv4_jax.errors import UserError

Platform = Literal["cpu", "tpu", "cuda"]
CHOICES = ("auto", "xla", "blackwell")
_elsewhere: ContextVar[Platform | None] = ContextVar("elsewhere", default=None)
_partitioned: ContextVar[bool] = ContextVar("partitioned", default=False)


@contextmanager
def compiling_for(platform: Platform) -> Iterator[None]:
    """Within this context programs are traced for machines of `platform`, which need not be here.

    What JAX remembers of functions traced for another platform is dropped: it does not know this context.
    """
    if platform != compiled_for():
        jax.clear_caches()
    token = _elsewhere.set(platform)
    try:
        yield
    finally:
        _elsewhere.reset(token)


@contextmanager
def partitioned_by_the_compiler() -> Iterator[None]:
    """Within this context arrays may be spread over devices by the compiler, which cannot cut a kernel into parts."""
    token = _partitioned.set(True)
    try:
        yield
    finally:
        _partitioned.reset(token)


def kernels_allowed() -> bool:
    """Whether each device's operands are its own here, so that kernels can take them.

    A gradient rule is traced later, elsewhere: it has to be told.
    """
    return not _partitioned.get()


def compiled_for() -> str:
    """The platform that programs are traced for here: cpu, tpu, cuda, or another of JAX's."""
    here = _elsewhere.get() or jax.default_backend()
    return "cuda" if here == "gpu" else here


def by_platform(
    *operands: Any,
    xla: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """The operands given to the backend of the platform that the program is compiled for.

    Backends must agree in the shapes and dtypes of their results. Those of platforms that are neither here nor compiled
    for (`compiling_for`) are not traced.

    Args:
        *operands: arrays.
        xla: runs everywhere.
        tpu: the kernel for TPUs; None where these operands have none.
        gpu: the kernel for NVIDIA GPUs, Hopper and later; None where these operands have none.
    """
    here = compiled_for()
    kernels = {"tpu": tpu, "cuda": gpu}
    chosen = kernels.get(here)
    if chosen is None or not kernels_allowed() or _choice() == "xla":
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, **{here: chosen}, default=xla)


def on_one_device() -> bool:
    """Whether the program is compiled for a single device, that is here: no array can be spread over several."""
    return _elsewhere.get() is None and len(jax.devices()) == 1


def is_hopper() -> bool:
    """Whether the program is compiled for one NVIDIA GPU here with warpgroup products: compute capability 9.

    With several devices XLA would copy whole operands to each of them: it cannot partition a kernel.
    """
    return on_one_device() and are_hopper()


def are_hopper() -> bool:
    """Whether the program is compiled for NVIDIA GPUs here with warpgroup products; later GPUs lack them.

    For kernels whose operands are each device's own (`kernels_allowed`), however many devices there are.
    """
    return _have_capability("9.")


def is_blackwell() -> bool:
    """Whether the program is compiled for one NVIDIA GPU here with tensor memory: compute capability 10.

    And whether its kernels are asked for, by `DSV4_KERNELS=blackwell`.
    """
    return _choice() == "blackwell" and on_one_device() and _have_capability("10.")


def _have_capability(begin: str) -> bool:
    here = _elsewhere.get() is None and jax.default_backend() == "gpu"
    return here and jax.devices()[0].compute_capability.startswith(begin)


def _choice() -> str:
    choice = os.environ.get("DSV4_KERNELS", "auto")
    if choice not in CHOICES:
        raise UserError(f"DSV4_KERNELS is {choice!r}: one of {', '.join(CHOICES)}")
    return choice
