"""Compiling a program for a machine that is not here, and what the compiled program says of it.

Everything is per chip. Where a chip shows as several devices, its share is the sum of theirs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from dsv4_jax.analysis.hardware import Operand
from dsv4_jax.kernels.platforms import compiling_for
from sharding.hlo import Collective, collectives, largest_arrays
from sharding.roofline import Roofline, roofline
from sharding.targets import Target

Tree = Any


@dataclass(frozen=True)
class Program:
    """A function and the abstract arrays it is compiled for.

    Attributes:
        name: for people.
        function: what is compiled, under `jax.jit`.
        arguments: trees of `jax.ShapeDtypeStruct` with shardings.
        parts: names for trees among the arguments.
        flops: useful floating-point operations of all chips, counted from the architecture.
        within: what temporary memory must hold at least, in bytes on one device.
        recomputed: how many times the useful operations the program does, at least.
        operand: format of the products.
        traffic: bytes that a device must read from its memory, or None: all it holds once, temporaries twice.
        tokens: tokens that come out, 0 where that is not the point.
    """

    name: str
    function: Any
    arguments: tuple[Tree, ...]
    parts: Mapping[str, Tree]
    flops: float
    within: Mapping[str, int] = field(default_factory=dict)
    recomputed: float = 1.0
    operand: Operand = "bf16"
    traffic: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
        parts: named arguments.
        arguments: all arguments.
        results: results that do not take over an argument's memory.
        temporary: everything while it runs.
        within: what of the temporary memory can be named, by arithmetic.
        code: the program itself.
        capacity: of the chip.
    """

    parts: Mapping[str, int]
    arguments: int
    results: int
    temporary: int
    within: Mapping[str, int]
    code: int
    capacity: int

    @property
    def needed(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporary + self.code

    @property
    def spare(self) -> int:
        """What stays free; negative when it does not fit."""
        return self.capacity - self.needed


@dataclass(frozen=True)
class Report:
    """What compiling one program for one machine gave.

    Attributes:
        program: its name.
        target: the machine.
        mesh: axis sizes.
        memory: see there.
        flops: useful operations per chip.
        compiler_flops: operations per chip as the compiler counts them (bodies of loops once), None where it does not.
        moved: the collectives.
        roofline: see there.
        lower_seconds: tracing and lowering.
        compile_seconds: compiling.
        largest: bytes, shape and origin of the largest arrays that the program makes on a device.
        tokens: tokens that come out of a step.
        refusal: why the compiler made no program, "" when it did. Its collectives are unknown then, and its memory is
            what the compiler says it would need.
    """

    program: str
    target: Target
    mesh: Mapping[str, int]
    memory: Memory
    flops: float
    compiler_flops: float | None
    moved: Sequence[Collective]
    roofline: Roofline
    lower_seconds: float
    compile_seconds: float
    largest: Sequence[tuple[int, str, str]]
    tokens: int = 0
    refusal: str = ""

    @property
    def utilisation(self) -> tuple[float, float]:
        """Useful operations over the chip's peak, if nothing overlaps and if everything does."""
        peak = self.flops / self.target.chip.peak("bf16")
        return peak / self.roofline.serial, peak / self.roofline.seconds

    @property
    def advice(self) -> str:
        """The first thing to change when it does not fit; "" when it does."""
        return "" if self.fits else advise(self)

    @property
    def fits(self) -> bool:
        """Whether there is a program and it fits into the chip's memory."""
        return self.memory.spare >= 0 and not self.refusal


def device_bytes(tree: Tree) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(_on_device(leaf) for leaf in jax.tree.leaves(tree))


def _on_device(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    size = leaf.dtype.itemsize
    for length in shape:
        size *= length
    return size


def compile_for(program: Program, target: Target, mesh: Mesh, say: Callable[[str], None] = lambda _: None) -> Report:
    """Compile `program` with the compiler of `target`.

    Args:
        program: its arguments lie on `mesh`.
        target: the machine.
        mesh: of the target's devices.
        say: told what is being done.

    Returns:
        The report; with a `refusal` where the compiler finds no room.
    """
    say("tracing")
    started = time.perf_counter()
    with compiling_for(target.platform, target.capability):
        lowered = program.function.lower(*program.arguments)
    lowered_at = time.perf_counter()
    say("compiling")
    seconds = lambda: (lowered_at - started, time.perf_counter() - lowered_at)  # noqa: E731
    try:
        compiled = lowered.compile(compiler_options=target.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(program, target, mesh, str(error), seconds())
    took = seconds()
    say("reading the program")
    return report(program, target, mesh, compiled, took)


def report(program: Program, target: Target, mesh: Mesh, compiled: Any, seconds: tuple[float, float]) -> Report:
    """What a compiled program says; `seconds` are those of lowering and of compiling."""
    text, stats = compiled.as_text(), compiled.memory_analysis()
    sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = memory_of(program, target, *sizes, results)
    counted = (compiled.cost_analysis() or {}).get("flops")
    found = _Found(collectives(text, mesh.shape), largest_arrays(text, 5), counted)
    return _report(program, target, mesh, memory, found, seconds)


@dataclass(frozen=True)
class _Found:
    """What a program's text says, and the compiler's own count of operations on a device."""

    moved: Sequence[Collective] = ()
    largest: Sequence[tuple[int, str, str]] = ()
    flops: float | None = None


def _report(
    program: Program,
    target: Target,
    mesh: Mesh,
    memory: Memory,
    found: _Found,
    seconds: tuple[float, float],
    refusal: str = "",
) -> Report:
    return Report(
        program=program.name,
        target=target,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        memory=memory,
        flops=program.flops / target.chips,
        compiler_flops=found.flops * target.chip.devices_per_chip if found.flops else None,
        moved=found.moved,
        roofline=_bounds(program, target, mesh, memory, found.moved),
        lower_seconds=seconds[0],
        compile_seconds=seconds[1],
        largest=found.largest,
        tokens=program.tokens,
        refusal=refusal,
    )


def _refused(program: Program, target: Target, mesh: Mesh, message: str, seconds: tuple[float, float]) -> Report:
    """The report of a program for which the TPU compiler finds no room; its message says how much it would need."""
    arguments = sum(device_bytes(tree) for tree in program.arguments)
    temporaries = re.search(r"temporaries \(([\d.]+[KMGT]?)\)", message)
    used = re.search(r"Used ([\d.]+[KMGT]?) of", message)
    temporary = _size(temporaries[1]) if temporaries else max(_size(used[1]) - arguments, 0) if used else 0
    listed = re.findall(r"Size: ([\d.]+[KMGT]?)\s+(?:Operator: op_name=\"([^\"]*)\".*\s+)?Shape: (\S+)", message)
    largest = [(_size(size), shape.split("{")[0], origin) for size, origin, shape in listed]
    memory = memory_of(program, target, arguments, temporary, 0, 0)
    reason = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    return _report(program, target, mesh, memory, _Found(largest=largest), seconds, reason.partition(": ")[2] or reason)


def _size(text: str) -> int:
    """Bytes of "64.00G"."""
    return int(float(text.rstrip("KMGT")) * 1024 ** (" KMGT".find(text[-1]) if text[-1] in "KMGT" else 0))


def memory_of(program: Program, target: Target, arguments: int, temporary: int, code: int, results: int) -> Memory:
    """Bytes of a chip from those of a device."""
    per_chip = target.chip.devices_per_chip
    return Memory(
        parts={name: device_bytes(tree) * per_chip for name, tree in program.parts.items()},
        arguments=arguments * per_chip,
        results=results * per_chip,
        temporary=temporary * per_chip,
        within={name: size * per_chip for name, size in program.within.items()},
        code=code * per_chip,
        capacity=int(target.chip.hbm_bytes),
    )


def _bounds(program: Program, target: Target, mesh: Mesh, memory: Memory, moved: Sequence[Collective]) -> Roofline:
    """See `roofline`; a program that does not say what it reads reads what it holds, and temporaries twice."""
    traffic = None if program.traffic is None else program.traffic * target.chip.devices_per_chip
    held = memory.arguments + memory.results + 2 * memory.temporary
    return roofline(target, mesh, program.flops * program.recomputed, program.operand, traffic, held, moved)


def advise(found: Report) -> str:
    """What to change first, chosen by what weighs most."""
    memory = found.memory
    named = sum(memory.within.values())
    sizes = {**memory.parts, **memory.within, "working memory": max(memory.temporary - named, 0)}
    worst = max(sizes, key=lambda name: sizes[name])
    size, over = f"{sizes[worst] / 2**30:,.1f} GiB", f"{-memory.spare / 2**30:,.1f} GiB"
    biggest = found.largest[0] if found.largest else (0, "", "")
    what = {
        "parameters": "spread the weights over more devices (larger fsdp or expert axes, a larger slice)",
        "optimizer": "spread the state over more devices (larger fsdp or expert axes, a larger slice)",
        "gradients, float32": "spread the weights, and with them their gradients, over more devices",
        "cache": "decode fewer sequences at a time, spread rows over more devices, or --cache deployed",
        "streams kept for the backward pass": "fewer tokens per device at a time: --microbatches, or a smaller --batch",
    }.get(worst) or (
        f"fewer tokens per device at a time (--microbatches, a smaller --batch); the largest array is {biggest[1]}, "
        f"{biggest[0] / 2**30:,.1f} GiB, of {biggest[2] or 'unknown origin'}"
    )
    return f"{over} too much; {worst} weighs most ({size}): {what}"
