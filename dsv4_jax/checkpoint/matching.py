"""Which stored tensor is what: every name must match exactly one rule, scales included, before a byte is read.

The dtype says how a tensor is stored, and must be what the configuration says; plain floats are always welcome.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4_jax.checkpoint.files import CheckpointError, Entry, listed
from dsv4_jax.checkpoint.names import Place, Stored, scale_names, stored_tensors, tensors_of_scheme
from dsv4_jax.checkpoint.storage import Format, Quantisation, Spec, quantisation_of
from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.shapes import is_table

FLOATS = ("F32", "BF16", "F16")
INTEGERS = ("I64", "I32")
SCALES = ("F8_E8M0", "U8", "F32")  # powers of two, the same as bytes, and the numbers themselves
CONTRADICTION = "stored otherwise than config.json says"
QUANTISED: dict[str, Format] = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4"}


@dataclass(frozen=True)
class Source:
    """A stored tensor of a checkpoint, its rule, and its scales when it is quantised."""

    name: str
    stored: Stored
    entry: Entry
    scale: Entry | None
    format: Format
    tile: tuple[int, int]


def match(entries: dict[str, Entry], config: DeepseekV4Config) -> list[Source]:
    """The rule of every stored tensor.

    Raises:
        CheckpointError: that lists every name which has no rule, claims a place twice, has another shape or dtype than
            the configuration says, and all that is missing.
    """
    quantisation = quantisation_of(config)
    rules = {name: stored for stored in stored_tensors(config) for name in stored.names if name is not None}
    scale_of = _pair_scales(entries, rules)
    weights = [name for name in entries if name in rules]
    unknown = set(entries) - set(weights) - {scale for scales in scale_of.values() for scale in scales}
    problems = _Problems()
    problems.add("without a place in this architecture", unknown)
    problems.add("stored twice", _claimed_twice({name: rules[name] for name in weights}))
    problems.add("stored twice", (" and ".join(scales) for scales in scale_of.values() if len(scales) > 1))
    problems.add("missing (released names)", _missing([rules[name] for name in weights], config))
    sources = []
    for name in weights:
        scale = next(iter(scale_of.get(name, [])), None)
        kind = QUANTISED.get(entries[name].dtype, "plain")
        source = Source(
            name, rules[name], entries[name], entries.get(scale or ""), kind, quantisation.tile_of(rules[name])
        )
        problems.check(source, scale, quantisation)
        sources.append(source)
    problems.raise_if_any()
    return sources


def places_by_leaf(sources: list[Source]) -> dict[str, list[tuple[Source, Place]]]:
    """For every leaf of the tree what fills it."""
    found: dict[str, list[tuple[Source, Place]]] = defaultdict(list)
    for source in sources:
        for place in source.stored.places:
            found[place.leaf].append((source, place))
    return found


class _Problems:
    """What does not fit, by kind, and the error that says all of it."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = defaultdict(set)

    def add(self, kind: str, names: object) -> None:
        self._found[kind] |= set(names)  # type: ignore[arg-type]

    def check(self, source: Source, scale: str | None, quantisation: Quantisation) -> None:
        """Dtype and shape of one tensor and its scales."""
        table, kind, expected = is_table(source.stored.leaves[0]), source.format, quantisation.format_of(source.stored)
        allowed = INTEGERS if table else FLOATS
        if source.entry.dtype not in (*allowed, *QUANTISED):
            needed = ", ".join(allowed)
            self.add("of the wrong dtype", [f"{source.name} has dtype {source.entry.dtype}: one of {needed} is needed"])
            return
        if (table and source.entry.dtype not in INTEGERS) or kind not in ("plain", expected):
            self.add(CONTRADICTION, [_contradiction(source, expected)])
            return
        if source.scale is None and kind != "plain":
            self.add("missing (released names)", [f"{scale_names(source.name)[0]} (the scales of {source.name})"])
        if source.scale is not None and kind == "plain":
            self.add("without a place in this architecture", [f"{scale} (its weight is {source.entry.dtype})"])
        weight_spec, scale_spec = quantisation.specs(source.stored)
        self._check_shape(source.name, source.entry, weight_spec.shape if kind != "plain" else source.stored.shape)
        if source.scale is not None and scale_spec is not None and kind != "plain":
            self._check_shape(str(scale), source.scale, scale_spec.shape)
            if source.scale.dtype not in SCALES:
                needed = ", ".join(SCALES)
                self.add("of the wrong dtype", [f"{scale} has dtype {source.scale.dtype}: one of {needed} is needed"])

    def _check_shape(self, name: str, entry: Entry, needed: tuple[int, ...]) -> None:
        if entry.shape != needed:
            self.add("of another shape", [f"{name} {list(entry.shape)} instead of {list(needed)}"])

    def raise_if_any(self) -> None:
        most = {CONTRADICTION: 2}  # one sentence each
        lines = [f"  {len(n)} {kind}: {listed(n, most.get(kind, 12))}" for kind, n in self._found.items() if n]
        if lines:
            raise CheckpointError("the tensors do not fit the configuration:\n" + "\n".join(lines))


def _pair_scales(entries: dict[str, Entry], rules: dict[str, Stored]) -> dict[str, list[str]]:
    """The scales in the files by the name of their weight, for weights that are there and may have scales."""
    pairs: dict[str, list[str]] = {}
    for name in entries:
        if name in rules and rules[name].transposed:
            if found := [scale for scale in scale_names(name) if scale in entries]:
                pairs[name] = found
    return pairs


def _claimed_twice(weights: dict[str, Stored]) -> Iterator[str]:
    claims: dict[object, list[str]] = defaultdict(list)
    for name, stored in weights.items():
        for slot in stored.slots:
            claims[slot].append(name)
    return (" and ".join(names) for names in claims.values() if len(names) > 1)


def _missing(found: list[Stored], config: DeepseekV4Config) -> Iterator[str]:
    filled = {slot for stored in found for slot in stored.slots}
    released = tensors_of_scheme(config, "released")
    return (name for name, stored in released.items() if not filled.issuperset(stored.slots))


def _contradiction(source: Source, expected: Format) -> str:
    """What is stored, and which setting would make it right."""
    shown = f"{source.name} is {Spec(source.entry.dtype, source.entry.shape)}"
    if "/experts/" in source.stored.leaves[0]:
        right = {"fp4": "I8, two numbers per byte", "fp8": "F8_E4M3", "plain": "plain floats"}[expected]
        return f"{shown}, but expert_dtype (where it is absent, quantization_config) means {right}"
    right = "F8_E4M3 or plain floats" if expected == "fp8" else "plain floats"
    return f"{shown}, but quantization_config means {right}"
