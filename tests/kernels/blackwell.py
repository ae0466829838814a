"""Compiling kernels for a B200 that is not here, and what their compilers print."""

import os
import tempfile
from contextlib import contextmanager

from hopper import CALL, compile_for

from dsv4_jax.kernels.sparse_attention import gpu


def compiled(program, *given):
    """How many kernels a program for a B200 has, its memory, and what the compilers print."""
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    gpu.is_blackwell = lambda: True
    function, shapes = program(*given)
    with tempfile.TemporaryFile("w+") as file, redirected(file):
        found = compile_for("b200", function, *shapes)
        file.seek(0)
        printed = file.read()
    memory = found.memory_analysis()
    sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    return found.as_text().count(CALL), *sizes, printed


@contextmanager
def redirected(file):
    """What the process prints, compilers included, goes into the file."""
    before = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, old in zip((1, 2), before, strict=True):
            os.dup2(old, descriptor)
            os.close(old)
