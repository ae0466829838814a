"""The least time that a step can take on a machine, by the rates of data sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from dsv4_jax.analysis.hardware import Operand
from sharding.hlo import Collective
from sharding.targets import Target


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least for each resource of a chip, and of which the longest is the bound."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """If everything overlaps perfectly."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def serial(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.memory + self.links + self.network

    @property
    def bound_by(self) -> str:
        """The resource that decides."""
        names = {"compute": self.compute, "memory": self.memory, "links": self.links, "network": self.network}
        return max(names, key=lambda name: names[name])


def roofline(
    target: Target,
    mesh: Mesh,
    flops: float,
    operand: Operand,
    traffic: float | None,
    held: float,
    moved: Sequence[Collective],
) -> Roofline:
    """Bounds of one step: nothing waits, every link is used evenly.

    Args:
        target: the machine.
        mesh: of its devices.
        flops: of all chips.
        operand: format of the products.
        traffic: bytes that a chip reads and writes in its memory, or None to take `held` and what the wires bring.
        held: bytes of arguments, results and twice the temporaries of a chip.
        moved: the program's collectives.
    """
    chip, per_chip = target.chip, target.chip.devices_per_chip
    links, network = (size * per_chip for size in wire_bytes(mesh, moved, across_hosts=not target.is_tpu))
    return Roofline(
        compute=flops / target.chips / chip.peak(operand),
        memory=(held + 2 * (links + network) if traffic is None else traffic) / chip.hbm_bandwidth,
        links=links / chip.interconnect_bandwidth,
        network=network / chip.network_bandwidth,
    )


def wire_bytes(mesh: Mesh, moved: Sequence[Collective], across_hosts: bool) -> tuple[float, float]:
    """Bytes that one device sends inside its host (or slice) and, with `across_hosts`, to other hosts.

    Exchanges send what belongs elsewhere; the others cross between hosts once per host, shared by its members.
    """
    hosts = [device.process_index for device in mesh.devices.flat]
    links = network = 0.0
    for one in moved:
        if one.conditional:
            continue
        of = [hosts[member] for member in one.members] if across_hosts else [0]
        count = len(set(of))
        share, size = len(of) / count, one.sent
        if count == 1:
            links += size
            continue
        n = len(of)
        if one.kind in ("all-to-all", "ragged-all-to-all"):
            outside = size * (n - share) / (n - 1)
        elif one.kind.startswith("collective"):
            outside = size
        else:
            outside = size * (1 - 1 / count) / (1 - 1 / n) / share
        network += outside
        links += size - outside
    return links, network
