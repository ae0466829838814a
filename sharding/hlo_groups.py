"""Groups of devices in a compiled program's text, in each of the forms in which XLA writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_TILED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of a collective's attributes; all devices when it names none.

    Forms: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` (a transposed count), and
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` (axes of a mesh, whole or `'b':(2)2`, a part of one).
    """
    if tiled := _TILED.search(attributes):
        return _numbers(_count(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))[0])
    if listed := _LISTED.search(attributes):
        return tuple(int(number) for number in listed[1].split(","))
    if mesh := _MESH.search(attributes):
        return _along_axes(*mesh.groups())
    return tuple(range(devices))


def varying_axes(groups: Iterable[tuple[int, ...]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which devices of one group differ."""
    differing: set[str] = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group, int), tuple(mesh.values()))
        differing |= {axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1}
    return tuple(axis for axis in mesh if axis in differing)


def _along_axes(mesh: str, order: str | None, named: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    devices = _device_order(order, sizes)
    shape: list[int] = []
    chosen: list[bool] = []
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(named)}
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        shape += [before, part, size // (before * part)]
        chosen += [False, name in wanted, False]
    at = tuple(slice(None) if whole else 0 for whole in chosen)
    return _numbers(devices.reshape(shape)[at].reshape(-1))


def _device_order(order: str | None, sizes: Mapping[str, int]) -> np.ndarray:
    if order is None:
        return np.arange(int(np.prod(list(sizes.values()))))
    return _count(order) if "[" in order else np.array([int(number) for number in order.split(",")])


def _count(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0 .. 7 as [4, 2], transposed."""
    found = _IOTA.match(text)
    assert found, text
    shape = [int(size) for size in found[1].split(",")]
    count = np.arange(int(np.prod(shape))).reshape(shape)
    return count.transpose([int(axis) for axis in found[2].split(",")]) if found[2] else count


def _numbers(group: np.ndarray) -> tuple[int, ...]:
    return tuple(int(number) for number in group)
