"""What tests of the kernels for Hopper share: comparing, the layout of a tile, compiling for GPUs that are not here."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

CALL = 'custom_call_target="mosaic_gpu_v2"'
# Relative to the largest value: weights and outputs are rounded to the 8 bits of BF16, in another order.
TOLERANCE = 1e-2


def close(name, found, wanted, tolerance=TOLERANCE):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(found), finite, err_msg=name)
    largest = np.abs(wanted[finite]).max(initial=1e-6)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) <= tolerance * largest, name


def sorted_choice(numbers, lo, hi, k):
    """Of each row [.., n] the k largest numbers by position, then -1: a stable sort."""
    choice = np.full((*lo.shape, min(k, numbers.shape[-1])), -1)
    for at in np.ndindex(lo.shape):
        visible = np.arange(max(lo[at], 0), min(hi[at], numbers.shape[-1]))
        visible = visible[numbers[at][visible] > -np.inf]
        best = np.sort(visible[np.argsort(-numbers[at][visible], kind="stable")][:k])
        choice[at][: len(best)] = best
    return choice


def unswizzled(shared, width, sides=2):
    """A tile's bytes as [64, K] BF16: the 128-byte swizzle xors bits 4 to 6 of an address with bits 7 to 9."""
    address = np.arange(shared.size)
    plain = np.empty_like(shared)
    plain[address ^ (address >> 7 & 7) << 4] = shared
    across = width // (64 * sides)
    blocks = plain.view(ml_dtypes.bfloat16).reshape(sides, 8, across, 8, 64)  # side, rows / 8, columns / 64, 8, 64
    return blocks.transpose(1, 3, 0, 2, 4).reshape(64, width)


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def arrays(chip, *trees):
    from sharding.targets import parse_target

    here = jax.sharding.SingleDeviceSharding(parse_target(f"{chip}:1x1").devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), trees)


def compile_for(chip, function, *shapes):
    from sharding.targets import parse_target

    return jax.jit(function).lower(*shapes).compile(parse_target(f"{chip}:1x1").compiler_options)


def spilled(printed):
    """Bytes per thread that ptxas says it stored for want of registers, of every kernel; printed in one text or two."""
    return [int(count) for count in re.findall(r"(\d+) bytes spill stores", "".join(printed))]
