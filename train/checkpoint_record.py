"""What a checkpoint says about itself: a name, shape, dtype and checksum for every array, and a digest of the whole.

The checksum is a sum over elements, so it is computed on the devices, without gathering anything, and does not depend
on how an array is sharded: what was saved on one mesh is verified on another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.distributed import one_at_a_time

PyTree = Any
Record = Mapping[str, Any]
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read. The message says which, why, and what is intact."""


class MismatchError(CheckpointError):
    """A checkpoint is sound but belongs to another model: names, shapes or dtypes differ."""


class DamagedError(Exception):
    """One step is unreadable or disagrees with its checksums; an older one may be good."""


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by path, ``params/blocks/0/query`` style, in the tree's order."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths_and_leaves]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubled:
        raise ValueError(f"two arrays of the state share the name {doubled[0]!r}: no key may contain '/'")
    return dict(zip(names, (leaf for _, leaf in paths_and_leaves), strict=True))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from names, the reverse of `named` but for lists and tuples, which become dicts by index."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def make(step: int, leaves: Mapping[str, jax.Array], host: Mapping[str, Any]) -> Record:
    """The record of one checkpoint. Raises TypeError or ValueError for what it cannot hold, naming it."""
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"state[{name}] is {_kind(leaf)}; a checkpoint holds jax arrays: jnp.asarray for a number, "
                "jax.random.key_data for a random key, or put plain values into `host`"
            )
    record = {"format": FORMAT, "step": step, "leaves": _described(leaves), "host": _plain_json(host)}
    return {**record, "sha256": _digest(record)}


def check_whole(record: Record, step: int) -> None:
    """Raises DamagedError unless `record` is, unaltered, the one written for `step`."""
    body = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != _digest(body):
        raise DamagedError("its JSON record does not agree with its own digest")
    if record["format"] != FORMAT:
        raise CheckpointError(f"step {step} has checkpoint format {record['format']}; this version reads {FORMAT}")
    if record["step"] != step:
        raise DamagedError(f"its record is that of step {record['step']}")


def abstract(record: Record, top: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every saved array (under `top`) by name, to be placed whole on the first device."""
    return {
        name: _placed(jax.ShapeDtypeStruct(shape, dtype))
        for name, (shape, dtype, _) in record["leaves"].items()
        if not top or name == top or name.startswith(top + "/")
    }


def matched(record: Record, targets: Mapping[str, Any], top: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """`targets` as shapes, dtypes and shardings to restore into. Raises MismatchError unless the saved ones agree."""
    saved = {name: _signature(leaf) for name, leaf in abstract(record, top).items()}
    wanted = {name: _signature(leaf) for name, leaf in targets.items()}
    if saved != wanted:
        raise MismatchError(_difference(record, saved, wanted))
    return {name: _placed(leaf) for name, leaf in targets.items()}


def check_values(record: Record, values: Mapping[str, jax.Array]) -> None:
    """Raises DamagedError unless every array has the checksum it was saved with."""
    wrong = [name for name, total in checksums(values).items() if total != record["leaves"][name][2]]
    if wrong:
        raise DamagedError(f"{len(wrong)} of {len(values)} arrays differ from their checksums, {wrong[0]} the first")


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """A 32-bit sum of mixed (element, position) pairs for each array; one changed element always changes it."""
    totals = jax.device_get({name: one_at_a_time(_checksum(leaf)) for name, leaf in leaves.items()})
    return {name: int(total) for name, total in totals.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    words = _words(x)
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(position + np.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32; 64-bit types get a trailing axis of two."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], -1))
    bits = (jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo)(x.dtype).bits
    unsigned = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit reaches every output bit (the finaliser of MurmurHash3)."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _described(leaves: Mapping[str, jax.Array]) -> dict[str, list]:
    totals = checksums(leaves)
    return {name: [list(leaf.shape), leaf.dtype.name, totals[name]] for name, leaf in leaves.items()}


def _plain_json(host: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(host))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`host` has to be JSON (numbers, strings, lists, dicts, None): {error}") from error


def _digest(body: Record) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _signature(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _kind(leaf: Any) -> str:
    return f"a {leaf.dtype} array" if isinstance(leaf, jax.Array) else f"a {type(leaf).__name__}"


def _difference(record: Record, saved: Mapping[str, str], wanted: Mapping[str, str], shown: int = 6) -> str:
    """The first differing names with both shapes, how many differ, and the config of the save."""
    names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
    names.sort(key=lambda name: not name.startswith("params/"))
    lines = [
        f"  {name}: checkpoint {saved.get(name, 'has none')}, model {wanted.get(name, 'has none')}"
        for name in names[:shown]
    ]
    if len(names) > shown:
        lines.append(f"  ... and {len(names) - shown} more")
    config = json.dumps(record["host"].get("config", "not recorded"))
    config = config if len(config) < 1500 else config[:1500] + " ..."
    return "\n".join(
        [
            f"the checkpoint of step {record['step']} belongs to another model or optimizer: {len(names)} of "
            f"{len({**wanted, **saved})} arrays differ",
            *lines,
            f"It was written with the config {config}",
        ]
    )
