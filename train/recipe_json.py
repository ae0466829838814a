"""Recipes to JSON and back, and single settings by dotted name; unknown names are errors that say the nearest one."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dsv4_jax.config import FIELDS
from dsv4_jax.config_checks import nearest

T = TypeVar("T")
Json = dict[str, Any]


def read_json(path: Path) -> Json:
    """The object in a JSON file. Raises ValueError that names the file and the place."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}; a recipe is a JSON object")
    return data


def recipe_to_json(recipe: Any) -> Json:
    """Every setting, defaults included, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def recipe_from_json(cls: type[T], data: Mapping[str, Any], base: T | None = None) -> T:
    """A recipe from JSON; what `data` leaves out comes from `base`, or from the defaults.

    Raises:
        ValueError: for unknown and missing settings and for values of a wrong kind, by dotted name.
    """
    return _read(cls, data, "", base)


def set_values(recipe: T, settings: Sequence[str]) -> T:
    """A copy with settings such as `"learning_rate.peak=1e-3"`, `"stages.0.steps=100"`, `"model.hidden_size=128"`.

    Values are read as JSON, and as plain text where they are none. Stages go by number or by name; `"stages.NAME=null"`
    leaves one out, and an object changes what it names.
    """
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"--set {setting}: expected NAME=VALUE, such as learning_rate.peak=1e-3")
        recipe = _with(recipe, path.split("."), _value(text), path)
    return recipe


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _with(node: Any, path: Sequence[str], value: Any, whole: str) -> Any:
    name, *rest = path
    if isinstance(node, tuple):
        index = _index(node, name, whole)
        if not rest and value is None:
            return (*node[:index], *node[index + 1 :])
        changed = (
            _with(node[index], rest, value, whole) if rest else _read(type(node[index]), value, whole, node[index])
        )
        return (*node[:index], changed, *node[index + 1 :])
    if isinstance(node, Mapping):  # options of a task
        if rest:
            raise ValueError(f"{whole!r}: {name} is a single value")
        return {**node, name: value}
    hints = typing.get_type_hints(type(node))
    if "overrides" in hints and name in FIELDS:  # a field of the architecture
        value = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(node, overrides={**node.overrides, name: value})
    if name not in hints:
        known = [*hints, *(FIELDS if "overrides" in hints else ())]
        raise ValueError(f"there is no setting {whole!r}{nearest(name, known)}: here are {', '.join(hints)}")
    inside = getattr(node, name)
    if rest and inside is None and any(map(dataclasses.is_dataclass, typing.get_args(hints[name]))):
        for key in reversed(rest):
            value = {key: value}
        written = f"{'.'.join(whole.split('.')[: -len(rest)])}={json.dumps(value)}"
        raise ValueError(f"{whole!r}: {name} is not set; set it as a whole: --set {written!r}")
    if rest and not (dataclasses.is_dataclass(inside) or isinstance(inside, tuple | Mapping)):
        raise ValueError(f"{whole!r}: {name} is a single value")
    changed = _with(inside, rest, value, whole) if rest else _read(hints[name], value, whole, None)
    return dataclasses.replace(node, **{name: changed})


def _index(items: tuple[Any, ...], name: str, whole: str) -> int:
    names = [str(i) for i in range(len(items))] + [getattr(item, "name", item) for item in items]
    if name not in names:
        raise ValueError(f"there is no setting {whole!r}{nearest(name, names)}: {name!r} is none of {', '.join(names)}")
    return names.index(name) % len(items)


def _read(kind: Any, value: Any, where: str, base: Any) -> Any:
    """`value` as the annotated type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where, base)
    if origin is tuple:
        _expect(isinstance(value, list | tuple), "a list", value, where)
        return tuple(_read(arguments[0], item, f"{where}.{i}", None) for i, item in enumerate(value))
    if origin in (Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where, base)
    if origin is Literal:
        _expect(value in arguments, " or ".join(map(repr, arguments)), value, where)
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is not None or kind is Any:  # a mapping
        _expect(isinstance(value, Mapping), "an object", value, where)
        return _with_tuples(value)
    _expect(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), kind.__name__, value, where)
    return value


def _read_object(kind: Any, value: Any, where: str, base: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    _expect(isinstance(value, Mapping), "an object", value, where)
    hints, prefix = typing.get_type_hints(kind), f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"there is no setting {prefix + key!r}{nearest(key, hints)}: here are {', '.join(hints)}")
    read = {
        key: _read(hints[key], entry, prefix + key, None if base is None else getattr(base, key))
        for key, entry in value.items()
    }
    if base is not None:
        return dataclasses.replace(base, **read)
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [prefix + name for name in required if name not in read]:
        raise ValueError(f"the recipe lacks {', '.join(missing)}")
    return kind(**read)


def _with_tuples(value: Any) -> Json:
    return {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in value.items()}


def _expect(good: bool, what: str, value: Any, where: str) -> None:
    if not good:
        raise ValueError(f"{where} is {value!r}; expected {what}")
