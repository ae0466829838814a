"""Accelerators as their vendors describe them: memory, bandwidth, dense peak rates, links.

NVIDIA: data sheets of H100 SXM, H200 SXM and DGX B200 (an eighth of it), without sparsity. NVIDIA's GB are taken as
10**9 bytes; drivers report a little more (an H200 of "141 GB" 150.8e9 bytes), which is left as a margin.
TPU: the Cloud TPU pages of each generation; capacities there are GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv4_jax.config_checks import nearest
from dsv4_jax.errors import UserError

Operand = Literal["fp4", "fp8", "bf16", "float32"]


@dataclass(frozen=True)
class Hardware:
    """One chip: a GPU, or a TPU chip with all its cores.

    Attributes:
        name: as `--hardware` and compile targets spell it.
        kind: gpu or tpu.
        hbm_bytes: memory capacity.
        hbm_bandwidth: bytes per second.
        bf16_flops: dense peak of BF16 products per second.
        fp8_flops: of FP8 products; the BF16 rate on chips that have none and multiply the operands as BF16.
        fp4_flops: of FP4 products; the FP8 rate on chips that have none.
        interconnect_bandwidth: bytes per second that a chip sends while it receives as many, all its links together,
            inside one host (NVLink) or one pod (ICI).
        network_bandwidth: the same between hosts (GPUs: one 400 Gb/s adapter each) or between pods (TPUs).
        chips_per_host: chips of one host.
        devices_per_chip: how many devices JAX shows for a chip; memory and rates above are the chip's.
    """

    name: str
    kind: Literal["gpu", "tpu"]
    hbm_bytes: float
    hbm_bandwidth: float
    bf16_flops: float
    fp8_flops: float
    fp4_flops: float
    interconnect_bandwidth: float
    network_bandwidth: float
    chips_per_host: int
    devices_per_chip: int = 1

    @property
    def in_words(self) -> bool:
        """Whether caches keep their blocks as rows of words here (`kernels.pools`)."""
        return self.kind == "tpu"

    def peak(self, operand: Operand) -> float:
        """FLOP/s of products of `operand`; float32 runs at half the BF16 rate (TF32 on GPUs, passes on TPUs)."""
        rates = {"fp4": self.fp4_flops, "fp8": self.fp8_flops, "bf16": self.bf16_flops}
        return rates.get(operand, self.bf16_flops / 2)


GIB = 2**30
HARDWARE: dict[str, Hardware] = {
    chip.name: chip
    for chip in (
        Hardware("h100", "gpu", 80e9, 3.35e12, 989e12, 1979e12, 1979e12, 450e9, 50e9, 8),
        Hardware("h200", "gpu", 141e9, 4.8e12, 989e12, 1979e12, 1979e12, 450e9, 50e9, 8),
        Hardware("b200", "gpu", 180e9, 8e12, 2250e12, 4500e12, 9000e12, 900e9, 50e9, 8),
        Hardware("v5e", "tpu", 16 * GIB, 819e9, 197e12, 197e12, 197e12, 200e9, 3.125e9, 8),
        Hardware("v5p", "tpu", 95 * GIB, 2765e9, 459e12, 459e12, 459e12, 600e9, 6.25e9, 4),
        Hardware("v6e", "tpu", 32 * GIB, 1638e9, 918e12, 918e12, 918e12, 400e9, 12.5e9, 4),
        Hardware("tpu7x", "tpu", 192 * GIB, 7380e9, 2307e12, 4614e12, 4614e12, 600e9, 12.5e9, 4, 2),
    )
}


def hardware(name: str) -> Hardware:
    """The chip called `name`, one of `HARDWARE`, in any case.

    Raises:
        UserError: for an unknown name, with the known ones.
    """
    if name.lower() not in HARDWARE:
        known = ", ".join(HARDWARE)
        raise UserError(f"there is no hardware {name!r}{nearest(name.lower(), HARDWARE)}: known are {known}")
    return HARDWARE[name.lower()]
