"""Experts packed as the release stores them."""

from dataclasses import replace

import jax.numpy as jnp

from dsv4_jax.quantization.formats import FP4_BLOCK, TILE, quantise_fp4, quantise_fp8_tiles
from dsv4_jax.quantization.packed import Packed

TILES = {"fp8": TILE, "fp4": (FP4_BLOCK, 1)}


def pack(weights, format):
    """[.., I, O] floats, with scales for inputs of an output."""
    quantise = {"fp8": quantise_fp8_tiles, "fp4": quantise_fp4}[format]
    turned = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    values, scales = (turned(x.view(jnp.uint8)) for x in quantise(turned(weights)))
    return Packed(values, scales, format, TILES[format], "bfloat16")


def with_every_code(packed):
    """In the first column of experts 1 and 2, together, is every code of the format that is a number."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    codes = jnp.where((codes & 127) == 127, 0, codes)
    size = min(packed.values.shape[-2], 256)
    values = packed.values.at[1, :size, 0].set(codes[:size]).at[2, :size, 0].set(codes[-size:])
    return replace(packed, values=values)
