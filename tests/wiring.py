"""`dsv4 ..` on a mesh in which the devices of a process do not lie together, as those of a TPU host do not.

python tests/wiring.py train --recipe FILE ...
"""

from __future__ import annotations

import sys

import jax

from dsv4_jax import cli
from sharding.mesh import make_mesh
from train import placement


def wired(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of all devices in the order 0, 2, .., 1, 3, .."""
    devices = jax.devices()
    return make_mesh(sizes, devices[::2] + devices[1::2])


if __name__ == "__main__":
    placement.make_mesh = wired
    sys.exit(cli.main(sys.argv[1:]))
