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
_elsewhere: ContextVar[tuple[Platform, str] | None] = ContextVar("elsewhere", default=None)
_partitioned: ContextVar[bool] = ContextVar("partitioned", default=False)


@contextmanager
def compiling_for(platform: Platform, capability: str = "") -> Iterator[None]:
    """Within this context programs are traced for machines of `platform`, which need not be here.

    What JAX remembers of functions traced for another platform is dropped: it does not know this context.

    Args:
        platform: of JAX.
        capability: of NVIDIA GPUs, such as "9.0"; where it is not said they get no kernels.
    """
    if (platform, capability) != (compiled_for(), _capability()):
        jax.clear_caches()
    token = _elsewhere.set((platform, capability))
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
    elsewhere = _elsewhere.get()
    here = elsewhere[0] if elsewhere else jax.default_backend()
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


def operands_are_own() -> bool:
    """Whether arrays here are each device's own: the program is for a single device, or under `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return (not mesh.empty and mesh.are_all_axes_manual) or (_elsewhere.get() is None and len(jax.devices()) == 1)


def is_hopper() -> bool:
    """Whether the program is for NVIDIA GPUs with warpgroup products, and `operands_are_own`.

    Elsewhere on several devices XLA would copy whole operands to each of them: it cannot partition a kernel.
    """
    return operands_are_own() and are_hopper()


def are_hopper() -> bool:
    """Whether the program is compiled for NVIDIA GPUs with warpgroup products; later GPUs lack them.

    For kernels whose operands are known to be each device's own (`kernels_allowed`), however many devices there are.
    """
    return _capability().startswith("9.")


def is_blackwell() -> bool:
    """Whether the program is for NVIDIA GPUs with tensor memory (10.x), `operands_are_own`, and kernels are asked for.

    By `DSV4_KERNELS=blackwell`: they have not run on such a GPU yet.
    """
    return _choice() == "blackwell" and operands_are_own() and _capability().startswith("10.")


def _capability() -> str:
    """Of the GPUs that programs are compiled for; empty where there are none."""
    if elsewhere := _elsewhere.get():
        return elsewhere[1]
    return jax.devices()[0].compute_capability if jax.default_backend() == "gpu" else ""


def _choice() -> str:
    choice = os.environ.get("DSV4_KERNELS", "auto")
    if choice not in CHOICES:
        raise UserError(f"DSV4_KERNELS is {choice!r}: one of {', '.join(CHOICES)}")
    return choice
