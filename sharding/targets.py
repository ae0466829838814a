"""Machines to compile for that are not here: a text like "v5p:8x8x16" as devices that the real compilers accept.

TPU slices come from libtpu; NVIDIA clusters from the CUDA plugin and a description of the GPU, which holds only what
the compiler asks: limits of the compute capability, and the counts and rates of data sheets.
Neither needs the hardware.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dsv4_jax.analysis.hardware import Hardware, hardware
from dsv4_jax.errors import UserError, how_to_install

if TYPE_CHECKING:
    from dsv4_jax.kernels.platforms import Platform

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
EXAMPLES = "v5e:16x16, v5p:8x8x16, v6e:16x16, tpu7x:4x4x4 (chips along each axis of a slice), h200:2x8 (hosts x GPUs)"


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks about one GPU.

    Attributes:
        description: the device's own name.
        capability: compute capability, major and minor.
        sms: streaming multiprocessors.
        memory: bytes that the driver reports.
        bandwidth: bytes per second.
        l2: bytes of the second-level cache.
        ghz: boost clock.
    """

    description: str
    capability: tuple[int, int]
    sms: int
    memory: int
    bandwidth: int
    l2: int
    ghz: float

    def text(self) -> str:
        """A GpuTargetConfigProto in text form. Limits per block and core are those of capabilities 9.0 and 10.0."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
              shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
              registers_per_block_limit: 65536  registers_per_core_limit: 65536
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              core_count: {self.sms}  fpus_per_core: 128  clock_rate_ghz: {self.ghz}
              device_memory_size: {self.memory}  memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.l2}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.description}"
        """


MIB = 2**20
GPUS = {
    "h100": Gpu("NVIDIA H100", (9, 0), 132, 81559 * MIB, 3_350_000_000_000, 50 * MIB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 143771 * MIB, 4_800_000_000_000, 60 * MIB, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 183359 * MIB, 8_000_000_000_000, 126 * MIB, 1.965),
}


@dataclass(frozen=True)
class Target:
    """A machine.

    Attributes:
        text: as it was asked for.
        chip: what one chip has.
        shape: chips along each axis of a TPU slice; hosts and GPUs per host of a cluster.
    """

    text: str
    chip: Hardware
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Chips of the machine."""
        return math.prod(self.shape)

    @property
    def device_count(self) -> int:
        """Devices that JAX shows for them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.chip.name in TPUS

    @property
    def platform(self) -> Platform:
        """As JAX calls it."""
        return "tpu" if self.is_tpu else "cuda"

    @property
    def capability(self) -> str:
        """Compute capability of a GPU, such as "9.0"; empty for TPUs."""
        return "" if self.is_tpu else ".".join(map(str, GPUS[self.chip.name].capability))

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Nothing can be tried out on a machine that is not here, so GPU kernels are chosen by rules."""
        return {} if self.is_tpu else {"xla_gpu_autotune_level": 0}

    def devices(self) -> Sequence[Any]:
        """Its devices, for a mesh to compile for.

        Raises:
            UserError: without the compiler, or for a slice that does not exist.
        """
        prepare()
        from jax.errors import JaxRuntimeError
        from jax.experimental import topologies

        module = "libtpu" if self.is_tpu else "jax_plugins.xla_cuda13"
        if not _exists(module):
            missing = f"compiling for {self.text} needs {module.split('.')[-1]}, which is missing"
            raise UserError(f"{missing}: {how_to_install('aot')}")
        try:
            if self.is_tpu:
                return topologies.get_topology_desc(self.text, platform="tpu").devices
            description, shape = GPUS[self.chip.name].text(), "x".join(map(str, (1, *self.shape)))
            return topologies.get_topology_desc(
                self.chip.name, platform="cuda", target_config=description, topology=shape
            ).devices
        except (JaxRuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"there is no slice {self.text}, says its compiler: {reason}\nFor example: {EXAMPLES}"
            ) from None


def parse_target(text: str) -> Target:
    """The machine called `text`, for example "v5p:8x8x16" or "h200:2x8".

    Raises:
        UserError: for an unknown chip, a shape that is none, or one of another number of axes than the chip's.
    """
    name, _, shape = text.strip().lower().partition(":")
    axes = {"v5e": 2, "v6e": 2}.get(name, 3 if name in TPUS else 2)
    if name not in TPUS and name not in GPUS:
        raise UserError(f"there is no target {text!r}. Targets are, for example: {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        what = "hosts x GPUs per host" if name in GPUS else "chips along each axis of the slice"
        raise UserError(f"target {text!r}: {name} needs {axes} numbers, {what}. For example: {EXAMPLES}")
    return Target(f"{name}:{shape}", hardware(name), tuple(int(number) for number in shape.split("x")))


def prepare() -> None:
    """Make the compilers quiet and content without hardware. Call it before jax computes anything."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud which TPU this is
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # nor which machines are in its slice
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so nobody has to wait for it
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
        os.environ.setdefault(name, "3")
    import jax

    jax.config.update("jax_platforms", "cpu")


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
