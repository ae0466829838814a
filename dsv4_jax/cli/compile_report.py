"""What `dsv4 compile` prints: a report as tables for people, or as one JSON object."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4_jax.cli.info import weight
from sharding.aot import Report
from sharding.hlo import bytes_by_axis


def show(name: str, found: Report, console: Console) -> None:
    """Print everything."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items()) or "one device"
    target = found.target
    console.print(
        f"[bold]{escape(name)}, {found.program}[/bold] on {target.text}: {target.chips:,} chips, mesh {mesh}\n"
        f"lowered in {found.lower_seconds:.0f} s, compiled in {found.compile_seconds:.0f} s; "
        "all numbers are per chip",
        highlight=False,
    )
    console.print(memory_table(found))
    _verdict(found, console)
    if found.moved:
        console.print(wire_table(found))
    if not found.refusal:
        console.print(time_table(found))
        _work(found, console)
    console.print(array_table(found))


def memory_table(found: Report) -> Table:
    """Bytes by what they hold."""
    memory = found.memory
    table = _table("memory", "", "bytes", "of the chip")
    rows = [(part, size) for part, size in memory.parts.items()]
    rows += [("not read by this program", memory.arguments - sum(memory.parts.values()))]
    rows += [("results", memory.results), ("temporary", memory.temporary)]
    rows += [(f"  at least: {part}", size) for part, size in memory.within.items()]
    rows += [("program", memory.code)]
    for part, size in rows:
        if abs(size) > memory.capacity / 1e5:
            table.add_row(part, ("-" if size < 0 else "") + weight(abs(size)), f"{size / memory.capacity:.1%}")
    table.add_section()
    table.add_row("[bold]all", weight(memory.needed), f"{memory.needed / memory.capacity:.1%}")
    table.add_row("chip", weight(memory.capacity), "")
    return table


def _verdict(found: Report, console: Console) -> None:
    if found.fits:
        console.print(f"[green]fits[/green]: {weight(found.memory.spare)} stay free", highlight=False)
        return
    console.print(f"[red]does not fit[/red]: {escape(found.advice)}", highlight=False)
    if found.refusal:
        console.print(f"[dim]the compiler: {escape(found.refusal)}[/dim]", highlight=False)


def wire_table(found: Report) -> Table:
    """Bytes that a chip sends, by collective and mesh axes."""
    per_chip = found.target.chip.devices_per_chip
    table = _table("sent per step", "collective", "mesh axes", "in the text", "runs", "bytes")
    for (kind, axes), size in bytes_by_axis(found.moved).items():
        members = [c for c in found.moved if (c.kind, c.axes) == (kind, axes) and not c.conditional]
        runs = sum(c.times for c in members)
        unknown = "" if all(c.exact for c in members) else " or more"
        table.add_row(kind, ", ".join(axes), str(len(members)), f"{runs:,}{unknown}", weight(int(size * per_chip)))
    rare = [c for c in found.moved if c.conditional]
    if rare:
        size = weight(int(sum(c.sent for c in rare) * per_chip))
        table.add_section()
        table.add_row("in branches, when taken", "", str(len(rare)), "", size)
    return table


def time_table(found: Report) -> Table:
    """Bounds of a step's time by resource."""
    line = found.roofline
    table = _table("a step takes at least", "resource", "ms")
    for resource in ("compute", "memory", "links", "network"):
        seconds = getattr(line, resource)
        mark = " [bold]<[/bold]" if resource == line.bound_by else ""
        if seconds:
            table.add_row(resource + mark, f"{seconds * 1e3:,.3g}")
    table.add_section()
    table.add_row("one after another", f"{line.serial * 1e3:,.3g}")
    return table


def _work(found: Report, console: Console) -> None:
    low, high = found.utilisation
    counted = f"; the compiler counts {found.compiler_flops / 1e12:,.3g}, loops once" if found.compiler_flops else ""
    lines = [
        f"useful work: {found.flops / 1e12:,.3g} TFLOP, counted from the architecture{counted}",
        f"utilisation: at most {high:.1%}, {low:.1%} where nothing overlaps",
    ]
    if found.tokens:
        lines += [f"tokens per second of all chips: at most {found.tokens / found.roofline.seconds:,.0f}"]
    console.print("\n".join(lines), highlight=False)


def array_table(found: Report) -> Table:
    """The largest arrays."""
    table = _table("largest arrays that the program makes on a device", "bytes", "shape", "origin")
    for size, shape, origin in found.largest:
        table.add_row(weight(size), shape, escape(_short(origin)))
    return table


def _short(origin: str, most: int = 70) -> str:
    return origin if len(origin) <= most else f"..{origin[-most:]}"


def as_json(found: Report) -> dict[str, Any]:
    """Everything a script may want, per chip, in bytes and seconds."""
    memory, line, per_chip = found.memory, found.roofline, found.target.chip.devices_per_chip
    sent = bytes_by_axis(found.moved).items()
    return {
        "program": found.program,
        "target": found.target.text,
        "chips": found.target.chips,
        "mesh": dict(found.mesh),
        "fits": found.fits,
        "advice": found.advice,
        "compiler_message": found.refusal,
        "memory": {
            "parts": dict(memory.parts),
            "arguments": memory.arguments,
            "results": memory.results,
            "temporary": memory.temporary,
            "temporary_at_least": dict(memory.within),
            "program": memory.code,
            "needed": memory.needed,
            "capacity": memory.capacity,
            "spare": memory.spare,
        },
        "flops": found.flops,
        "compiler_flops": found.compiler_flops,
        "sent": [{"kind": kind, "axes": list(axes), "bytes": size * per_chip} for (kind, axes), size in sent],
        "sent_in_branches": sum(c.sent for c in found.moved if c.conditional) * per_chip,
        "seconds": {
            "compute": line.compute,
            "memory": line.memory,
            "links": line.links,
            "network": line.network,
            "at_least": line.seconds,
            "one_after_another": line.serial,
        },
        "utilisation": {"at_most": found.utilisation[1], "without_overlap": found.utilisation[0]},
        "largest": [{"bytes": size, "shape": shape, "origin": origin} for size, shape, origin in found.largest],
        "lower_seconds": found.lower_seconds,
        "compile_seconds": found.compile_seconds,
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        numeric = name in ("bytes", "of the chip", "in the text", "runs", "ms")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold" if number == 2 else "ellipsis")
    return table
