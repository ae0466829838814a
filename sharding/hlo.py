"""What a compiled program moves between devices, read from its text.

Every collective is found wherever it stands: in loops (times the trip count, where the text gives it), in calls, in
fusions, in asynchronous pairs (counted once). Its groups of devices are mapped back to the axes of the mesh.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sharding.hlo_groups import first_group, varying_axes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(r"(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool = False

    @property
    def op_name(self) -> str:
        """Where in the source it comes from, "" when the text does not say."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which one is the entry."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of `KINDS`.
        shape: of its result, as the text has it without layouts.
        size: bytes of the whole array on one device: gathered, to be reduced, or to be exchanged.
        members: the first group of partitions (positions in `mesh.devices.flat`) that take part together.
        axes: the mesh axes that vary inside a group.
        times: how often it runs.
        exact: whether all loops around it have known trip counts; the others count once.
        conditional: whether it stands in a branch that need not be taken.
        op_name: where in the source it comes from.
    """

    kind: str
    shape: str
    size: int
    members: tuple[int, ...]
    axes: tuple[str, ...]
    times: int = 1
    exact: bool = True
    conditional: bool = False
    op_name: str = ""

    @property
    def once(self) -> float:
        """Bytes that one device sends (and receives as many) when it runs once, by the best algorithm."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.size
        away = (len(self.members) - 1) / len(self.members)
        return self.size * away * (2 if self.kind == "all-reduce" else 1)

    @property
    def sent(self) -> float:
        """Bytes that one device sends in the whole program."""
        return self.once * self.times


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives between devices of a compiled program, in the order in which they are reached.

    Args:
        text: `compiled.as_text()`.
        mesh: axis sizes in order, as in `mesh.shape`; partitions are numbered along it.
    """
    module = parse(text)
    return [c for c in _walk(module, module.entry, mesh, 1, True, False) if len(c.members) > 1]


def bytes_by_axis(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that one device sends by (kind, mesh axes); what stands in conditional branches is left out."""
    sums: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for one in found:
        if not one.conditional:
            sums[one.kind, one.axes] += one.sent
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def largest_arrays(text: str, count: int) -> list[tuple[int, str, str]]:
    """(bytes, shape, op_name) of the largest arrays that instructions outside fusions make, unequal shapes only."""
    module, best = parse(text), {}
    fused = {name for one in _all(module) if one.opcode == "fusion" for name in _called(one)}
    for name, instructions in module.computations.items():
        for one in instructions if name not in fused else ():
            if one.opcode in _NO_MEMORY or one.shape.startswith("("):
                continue
            shape = _plain(one.shape)
            best.setdefault(shape, (array_bytes(shape), shape, one.op_name))
    return sorted(best.values(), reverse=True)[:count]


_NO_MEMORY = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "while", "conditional", "opt-barrier"}


def parse(text: str) -> Module:
    """The computations of a program's text."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = _COMPUTATION.match(line)
            if head:
                current = head[2]
                computations[current] = []
                entry = current if head[1] else entry
        elif current and " = " in line and (one := _instruction(line)):
            computations[current].append(one)
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry or current)


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as "bf16[8,128]{1,0}" or "(f32[4], s32[])"."""
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        width = re.search(r"\d+", kind)
        bits = _BITS.get(kind) or (int(width[0]) if width else 0)  # "f32", "s8", "u4"; tokens and tuples weigh nothing
        sizes = [int(size.lstrip("<=")) for size in dimensions.split(",") if size]
        total += -(-bits * math.prod(sizes) // 8)
    return total


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().partition(" = ")
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opcode, found, rest = call.partition("(")
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), shape, opcode, rest, root) if found else None


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def _plain(shape: str) -> str:
    """A shape without layouts and comments."""
    return re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape; a plain shape is its only element."""
    if not shape.startswith("("):
        return [shape]
    elements, depth, start = [], 0, 1
    for place, letter in enumerate(shape):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            elements.append(shape[start:place].strip())
            start = place + 1
    return elements


def _all(module: Module) -> Iterator[Instruction]:
    return (one for lines in module.computations.values() for one in lines)


def _called(one: Instruction) -> list[str]:
    """Computations that an instruction runs; reductions' scalars included, the ends of asynchronous pairs not."""
    if one.opcode in ("async-update", "async-done"):
        return []
    names = [name for role, name in _CALLED.findall(one.rest) if role != "condition"]
    for group in _BRANCHES.findall(one.rest):
        names += [name.strip().lstrip("%") for name in group.split(",") if name.strip()]
    return names


def _walk(
    module: Module, name: str, mesh: Mapping[str, int], times: int, exact: bool, conditional: bool
) -> Iterator[Collective]:
    for one in module.computations.get(name, ()):
        if found := _collective(one, mesh, name):
            yield replace(found, times=times, exact=exact, conditional=conditional)
        elif one.opcode == "while":
            trips = _trips(module, one)
            for body in _called(one):
                yield from _walk(module, body, mesh, times * (trips or 1), exact and trips is not None, conditional)
        else:
            for called in _called(one):
                yield from _walk(module, called, mesh, times, exact, conditional or one.opcode == "conditional")


def _trips(module: Module, loop: Instruction) -> int | None:
    """The loop's trip count: as the text states it, or from a condition `counter < constant` as scans have it."""
    if stated := _TRIPS.search(loop.rest):
        return int(stated[1])
    condition = dict(_CALLED.findall(loop.rest)).get("condition", "")
    lines = {one.name: one for one in module.computations.get(condition, ())}
    root = next((one for one in lines.values() if one.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    left, right = (lines.get(name) for name in re.findall(r"%([\w.\-]+)", root.rest.split(")")[0])[:2])
    if left is None or right is None or left.opcode != "get-tuple-element" or right.opcode != "constant":
        return None
    bound = re.match(r"(\d+)\)", right.rest)
    return int(bound[1]) if bound else None


def _collective(one: Instruction, mesh: Mapping[str, int], computation: str) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    elements = _elements(one.shape)
    # What is started returns (operands, results, ..), an all-reduce its results alone.
    paired = one.opcode.endswith("-start") and kind != "all-reduce" and len(elements) > 1
    shape = elements[1] if paired else one.shape
    if kind == "collective-permute":
        members = _permuted(one.rest)
        axes = varying_axes(members, mesh)
        return Collective(
            kind, _plain(shape), array_bytes(shape), members[0] if members else (), axes, op_name=one.op_name
        )
    members = first_group(one.rest, math.prod(mesh.values()))
    size = array_bytes(shape)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU: a fusion that reduces and keeps one's own part
    elif kind == "reduce-scatter":
        size *= len(members)
    return Collective(kind, _plain(shape), size, members, varying_axes([members], mesh), op_name=one.op_name)


def _permuted(rest: str) -> Sequence[tuple[int, ...]]:
    """The (source, target) pairs that leave their device."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    pairs = re.findall(r"(\d+),(\d+)", found[1]) if found else []
    return [(int(a), int(b)) for a, b in pairs if a != b]
