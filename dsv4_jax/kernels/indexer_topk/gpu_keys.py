"""Packed indexer keys in the registers of a warpgroup product on a GPU: the PTX of one thread, and what it means.

The left operand of a product, [64 keys, 128 numbers], comes from registers, and its columns may be in any order that is
the queries' too. Four threads have a key. In the order here each has 32 numbers that lie side by side: 16 bytes, which
share a scale.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv4_jax.kernels.grouped_matmul.gpu_undo import fp4_numbers
from dsv4_jax.kernels.indexer_topk.gpu import ROWS
from dsv4_jax.kernels.indexer_topk.gpu_paged import WIDTH
from dsv4_jax.quantization.storage import Fp4

NUMBERS = plgpu.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
OPERANDS = 32  # registers of a thread, two numbers each
SHARING = 4  # threads that have a key
REGISTERS = """.reg .b32 lane, row, quad, at, scale, factor, word<4>, size, shifted, high, low, sign, raw;
.reg .pred broken;"""


def reordered(numbers: jax.Array) -> jax.Array:
    """[.., 128] in the order of the operand's columns: two of each of the four threads, then the next two."""
    return numbers.reshape(*numbers.shape[:-1], SHARING, -1, 2).swapaxes(-3, -2).reshape(numbers.shape)


def undone(packed: Any, scales: Any, interpret: Any) -> jax.Array:
    """64 keys in shared memory as BF16 [64, 128], `reordered`: whole blocks of bytes [n, E, 64] and scales [n, 4 E]."""
    if interpret:
        stored = {"packed": packed[...].reshape(ROWS, -1), "scales": scales[...].reshape(ROWS, -1)}
        return reordered(Fp4(WIDTH).decode(stored, jnp.bfloat16))

    def assemble(_: Any, packed: Any, scales: Any) -> Any:
        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        operands = [mosaic.memref_ptr(packed), mosaic.memref_ptr(scales), mosaic.thread_idx()]
        constraints = ",".join(["=&r"] * OPERANDS + ["r"] * 3 + ["~{memory}"])
        struct = llvm.StructType.get_literal([i32] * OPERANDS)
        found: Any = llvm.inline_asm(struct, operands, undo_ptx(), constraints, has_side_effects=True)
        numbers = mgpu.FragmentedArray.splat(mosaic.c(0, bf16), NUMBERS.shape, plgpu.Layout.WGMMA.to_mgpu())
        for i in range(OPERANDS):
            pair = mosaic.bitcast(llvm.extractvalue(i32, found, [i]), ir.VectorType.get((2,), bf16))
            numbers.registers.flat[i] = pair
        return numbers

    types = plgpu.RefType(), plgpu.RefType()
    return plgpu.inline_mgpu(arg_types=types, return_type=NUMBERS)(assemble)(packed, scales)


def undo_ptx() -> str:
    """PTX of one thread: $0 .. $31 its numbers in pairs, $32 packed bytes, $33 scales, $34 thread.

    An e2m1 number times a power of two is a BF16 number, so that nothing is rounded. A scale's byte 0 reads as zero,
    255 as NaN.
    """
    warp = "shr.u32 row, $34, 5;", "and.b32 row, row, 3;", "shl.b32 row, row, 4;"
    place = ["and.b32 lane, $34, 31;", "and.b32 quad, lane, 3;", *warp, "shr.u32 lane, lane, 2;"]
    parts = [*place, "add.u32 row, row, lane;"]
    for second in (0, 1):
        parts += [*(["add.u32 row, row, 8;"] if second else []), *_key(second)]
    return "\n".join(["{", REGISTERS, *parts, "}"])


def _key(second: int) -> list[str]:
    """A quarter of the key `row`: a thread's first or second row of the operand."""
    parts = [
        "mad.lo.u32 at, row, 4, quad;",
        "add.u32 at, at, $33;",
        "ld.shared.u8 scale, [at];",
        f"mad.lo.u32 at, row, {WIDTH // 2}, $32;",
        "mad.lo.u32 at, quad, 16, at;",
        "ld.shared.v4.b32 {word0, word1, word2, word3}, [at];",
        "mad.lo.u32 factor, scale, 0x00800080, 0;",
        "setp.eq.s32 broken, scale, 255;",
        "selp.b32 factor, 0x7FC07FC0, factor, broken;",
    ]
    for word in range(4):
        outs = [(f"${2 * (4 * word + byte) + second}", "factor") for byte in range(4)]
        parts += fp4_numbers(f"word{word}", outs)
    return parts
