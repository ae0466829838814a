"""Meshes: how many devices each axis has, from a text like "data=2,expert=4"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from dsv4_jax.errors import UserError

EXPERT, TENSOR = "expert", "tensor"
AXES = ("data", "fsdp", EXPERT, "context", TENSOR)
"""Outermost first: neighbours along the last axes are the closest devices."""


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Axis sizes of "expert=4,data=2"; one size may be -1, the rest of the devices; absent axes have size 1.

    Raises:
        UserError: for an unknown axis, a size that is no number, or a product that is not the number of devices.
    """
    sizes: dict[str, int] = {name: 1 for name in AXES}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in sizes:
            raise UserError(f"mesh {text!r}: there is no axis {name!r}; the axes are {', '.join(AXES)}")
        if not value.lstrip("-").isdigit() or int(value) == 0 or int(value) < -1:
            raise UserError(f"mesh {text!r}: {name} needs a positive number or -1 for the rest, not {value!r}")
        sizes[name] = int(value)
    return _filled(text, sizes, devices)


def _filled(text: str, sizes: dict[str, int], devices: int) -> dict[str, int]:
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh {text!r}: only one axis can be -1, not {' and '.join(open_axes)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh {text!r} is for {known} devices{' times the rest' if open_axes else ''}, but there are {devices}"
        )
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of AXES, partitioned automatically; `devices` default to all of this job's.

    Raises:
        UserError: when an axis cannot be laid along the links of a TPU slice.
    """
    shape = tuple(sizes.get(name, 1) for name in AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except NotImplementedError:
        wanted = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise UserError(
            f"mesh {wanted} does not lie on these devices: each of its axes must be a product of the slice's own axes"
        ) from None


def first_mesh(texts: Sequence[str], devices: Sequence[Any]) -> Mesh | None:
    """The first of the meshes that can be laid along the devices' links; UserError for a text that is no mesh."""
    for text in texts:
        sizes = parse_mesh(text, len(devices))
        with suppress(UserError):
            return make_mesh(sizes, devices)
    return None
