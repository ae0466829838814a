"""Run by test_loading.py in a process of its own: loads a folder in one of several ways and prints what it saw."""

import json
import socket
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv4_jax.checkpoint import convert, load_params, loading, read_config
from dsv4_jax.checkpoint.files import Reader, list_tensors
from dsv4_jax.checkpoint.huggingface import find_sources
from dsv4_jax.shapes import flatten


def sharded(folder, staging):
    """Every way of cutting every leaf over eight devices gives the array that the host loads."""
    loading.STAGING = int(staging)
    config = read_config(folder)
    expected = flatten(load_params(folder, config))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    cut = 0
    for turn in range(3):

        def sharding(path, shape, turn=turn):
            axes = [axis for axis in range(len(shape)) if shape[axis] % 8 == 0]
            spec = [None] * len(shape)
            if axes:  # the first such axis over one mesh axis, another over the other, or one over both
                spec[axes[turn % len(axes)]] = ("x", "y") if turn == 2 else "y"
                if turn == 1 and len(axes) > 1:
                    spec[axes[0]] = "x"
            return NamedSharding(mesh, PartitionSpec(*spec))

        found = flatten(load_params(folder, config, sharding))
        for path, array in found.items():
            assert array.dtype == expected[path].dtype and array.sharding == sharding(path, array.shape), path
            assert np.asarray(array).tobytes() == expected[path].tobytes(), (turn, path)
            cut += not array.sharding.is_fully_replicated
    print(json.dumps({"leaves": 3 * len(expected), "cut": cut}))


def half(folder, port, number):
    """One of two processes that hold half of every expert each, and a copy of the rest."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(number))
    config = read_config(folder)
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def sharding(path, shape):
        spec = (None, "x") if "/experts/" in path and path.startswith("segments") else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    expected = flatten(load_params(folder, config))
    sources, _ = find_sources(folder, config)
    with Reader() as reader:
        found = flatten(loading.load_tree(reader, sources, config, sharding, None))
        read = reader.bytes_read
    for path, array in found.items():
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[path][shard.index].tobytes(), path
    experts = sum(
        entry.nbytes for name, entry in list_tensors(folder).items() if ".experts." in name and "mtp" not in name
    )
    print(json.dumps({"read": read, "experts": experts, "devices": len(jax.local_devices())}))


def memory(folder, where):
    """The most that Python and numpy held while loading, and by how much the process grew."""
    loading.STAGING = 1 << 20
    config = read_config(folder)
    sources, _ = find_sources(folder, config)
    sharding = SingleDeviceSharding(jax.devices()[0]) if where == "device" else None
    jax.jit(lambda x: x + 1)(1.0)
    before = resident("VmRSS")
    tracemalloc.start()
    with Reader() as reader:
        params = loading.load_tree(reader, sources, config, sharding, None)
        jax.block_until_ready(params)
    peak = tracemalloc.get_traced_memory()[1]
    grown = resident("VmHWM") - before
    size = sum(leaf.nbytes for leaf in flatten(params).values())
    entries = list_tensors(folder).values()
    print(
        json.dumps(
            {
                "peak": peak,
                "grown": grown,
                "params": size,
                "largest": max(entry.nbytes for entry in entries),
                "read": reader.bytes_read,
                "stored": sum(entry.nbytes for entry in entries),
                "twice": sum(entry.nbytes for entry in entries if entry.dtype in ("F8_E8M0", "I64")),
            }
        )
    )


def conversion(folder, out, scheme, quantise):
    """The most that Python and numpy held while converting."""
    tracemalloc.start()
    convert(folder, out, scheme, quantise)
    largest = max(entry.nbytes for entry in list_tensors(folder).values())
    print(json.dumps({"peak": tracemalloc.get_traced_memory()[1], "largest": largest}))


def resident(what):
    """Memory of this process in bytes, now (VmRSS) or at most (VmHWM); ru_maxrss would count the parent's too."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else [f"{what}: 0"]
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    {"sharded": sharded, "half": half, "memory": memory, "conversion": conversion}[command](Path(folder), *rest)
