"""Packed weights in the registers of a warpgroup product on a GPU: the PTX of one thread, and what it means.

The left operand of a product, [128 columns, 64 inputs], comes from registers. Its rows may be the columns in any order,
as long as the result is written in the same one. A thread has four of them: here the columns of one 32-bit word of
bytes, so that shared memory is read, and the result written, in whole words.

Bytes lie as copies leave them, [inputs, 128 columns] in blocks of 8 rows: the 16 bytes at place p of row r are at place
p ^ (r % 8). Threads of a warp have four rows and two such places, chosen so that they meet in no bank.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from dsv4_jax.kernels.grouped_matmul.gpu import STEP, WIDTH
from dsv4_jax.kernels.grouped_matmul.gpu_loop import tiled
from dsv4_jax.quantization.packed import Packed, PackedFormat

NUMBERS = plgpu.ShapeDtypeStruct((WIDTH, STEP), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
OPERANDS = 32  # registers of a thread, two numbers each
FIRST, SECOND = "0x5140", "0x7362"  # bytes 0 and 1, or 2 and 3, of two words in turn
REGISTERS = """.reg .b32 lane, warp, row, word, chunk, at, place, from<2>, scale, scales, factor<8>, word<2>;
.reg .b32 size, shifted, high, low, sign, both<2>, halves, raw, first, second;
.reg .b16 pair<2>, half<2>;
.reg .f32 one, other;
.reg .b64 to;"""


def undone(values: Any, scales: Any, format: PackedFormat, interpret: Any) -> jax.Array:
    """Packed bytes [64 or 32, 128] and their scales [1 or 2, 128] in shared memory as BF16 numbers [128, 64]."""
    if interpret:
        tile = (STEP // scales.shape[0], 1)
        return Packed(values[...], scales[...], format, tile, "bfloat16").astype(jnp.bfloat16).T

    def assemble(_: Any, values: Any, scales: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        groups = ir.MemRefType(scales.type).shape[0]
        operands = [mosaic.memref_ptr(values), mosaic.memref_ptr(scales), mosaic.thread_idx()]
        constraints = ",".join(["=r"] * OPERANDS + ["r"] * 3 + ["~{memory}"])
        struct = llvm.StructType.get_literal([i32] * OPERANDS)
        found: Any = llvm.inline_asm(struct, operands, undo_ptx(format, groups), constraints, has_side_effects=True)
        bf16 = ir.BF16Type.get()
        numbers = mgpu.FragmentedArray.splat(mosaic.c(0, bf16), NUMBERS.shape, plgpu.Layout.WGMMA.to_mgpu())
        for i in range(OPERANDS):
            pair = mosaic.bitcast(llvm.extractvalue(i32, found, [i]), ir.VectorType.get((2,), bf16))
            numbers.registers.flat[i] = pair
        return numbers

    types = plgpu.RefType(tiled(1)), plgpu.RefType()
    return plgpu.inline_mgpu(arg_types=types, return_type=NUMBERS)(assemble)(values, scales)


def write(total: jax.Array, out: Any, format: PackedFormat, interpret: Any) -> None:
    """A result [128, n] of `undone` operands into `out` [n, 128], BF16 or float32, in global memory."""
    if interpret:
        out[...] = total.T.astype(out.dtype)
        return

    def assemble(_: Any, total: Any, out: Any) -> None:
        type_ = ir.MemRefType(out.type)
        stride, itemsize = type_.get_strides_and_offset()[0][0], mosaic.bytewidth(type_.element_type)
        pointer, thread = mosaic.memref_ptr(out), mosaic.thread_idx()
        constraints = ",".join(["l", "r", *["f"] * 8, "~{memory}"])
        registers = total.registers.reshape(2, -1, 2)
        for block in range(registers.shape[1]):
            numbers = [vector.extract(pair, [], [i]) for pair in registers[:, block].flat for i in (0, 1)]
            text = write_ptx(format, 8 * block, stride, itemsize)
            void = ir.Type.parse("!llvm.void")
            llvm.inline_asm(void, [pointer, thread, *numbers], text, constraints, has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(assemble)(total, out)


def undo_ptx(format: PackedFormat, groups: int) -> str:
    """PTX of one thread: $0 .. $31 its numbers in pairs of inputs, $32 values, $33 scales of `groups`, $34 thread.

    A number of either format times a power of two is a BF16 number, so that nothing is rounded. A scale's byte 0 reads
    as zero.
    """
    fp8 = format == "fp8"
    rows = [f"mad.lo.u32 at, row, 2, {i};" if fp8 else f"add.u32 at, row, {4 * i};" for i in (0, 1)]
    addresses = [
        "mad.lo.u32 scale, chunk, 16, $33;",
        "mad.lo.u32 scale, word, 4, scale;",
        *(
            part
            for i, row in enumerate(rows)
            for part in (
                row,
                "xor.b32 place, chunk, at;",
                f"mad.lo.u32 from{i}, at, 128, $32;",
                f"mad.lo.u32 from{i}, place, 16, from{i};",
                f"mad.lo.u32 from{i}, word, 4, from{i};",
            )
        ),
    ]
    factors = [part for group in range(groups) for part in _factors(group)]
    undo = _undo_fp8 if fp8 else _undo_fp4
    numbers = [part for eight in range(STEP // 8) for part in undo(eight, 4 * (eight * groups * 8 // STEP))]
    return _thread(format, "$34", [*addresses, *factors, *numbers])


def write_ptx(format: PackedFormat, first: int, stride: int, itemsize: int) -> str:
    """PTX of one thread, for rows `first` .. `first + 8`: $0 result, $1 thread, $2 .. $9 its columns' pairs of rows."""
    stores = ["cvta.to.global.u64 to, $0;"]
    strides = (("chunk", 16 * itemsize), ("word", 4 * itemsize), ("row", 2 * stride * itemsize))
    stores += [f"mad.wide.u32 to, {name}, {size}, to;" for name, size in strides]
    for row in (0, 1):
        numbers = [f"${2 + 2 * column + row}" for column in range(4)]
        place = f"[to + {(first + row) * stride * itemsize}]"
        if itemsize == 4:
            stores.append(f"st.global.v4.f32 {place}, {{{', '.join(numbers)}}};")
            continue
        stores += [
            f"cvt.rn.bf16x2.f32 first, {numbers[1]}, {numbers[0]};",
            f"cvt.rn.bf16x2.f32 second, {numbers[3]}, {numbers[2]};",
            f"st.global.v2.b32 {place}, {{first, second}};",
        ]
    return _thread(format, "$1", stores)


def _thread(format: PackedFormat, thread: str, steps: list[str]) -> str:
    """The whole of a thread: `row` of four, then its columns, 4 * word .. of the 16 in `chunk`."""
    # The rows of a warp are 2 apart in FP8 and 1 apart in FP4: so are, after their exclusive or, its two places.
    chunk = "mad.lo.u32 chunk, warp, 2, chunk;" if format == "fp8" else "mad.lo.u32 chunk, chunk, 4, warp;"
    place = [
        f"and.b32 lane, {thread}, 31;",
        f"shr.u32 warp, {thread}, 5;",
        "and.b32 warp, warp, 3;",
        "and.b32 row, lane, 3;",
        "shr.u32 word, lane, 2;",
        "and.b32 word, word, 3;",
        "shr.u32 chunk, lane, 4;",
        chunk,
    ]
    return "\n".join(["{", REGISTERS, *place, *steps, "}"])


def _factors(group: int) -> list[str]:
    """The scales of four columns, each twice in BF16."""
    scales = [f"ld.shared.b32 scales, [scale + {WIDTH * group}];"]
    for column in range(4):
        factor = f"factor{4 * group + column}"
        scales += [f"prmt.b32 {factor}, scales, 0, 0x{column}4{column}4;", f"shr.u32 {factor}, {factor}, 1;"]
    return scales


def _out(column: int, eight: int) -> str:
    """The register of a column's two inputs among the `eight`-th eight: as `wgmma` counts its left operand's."""
    high, low = divmod(column, 2)
    return f"${OPERANDS // 2 * high + 2 * eight + low}"


def _undo_fp8(eight: int, factor: int) -> list[str]:
    """Two inputs of four columns: a word of each input."""
    parts = [f"ld.shared.b32 word{i}, [from{i} + {1024 * eight}];" for i in (0, 1)]
    for half, order in enumerate((FIRST, SECOND)):
        parts += [f"prmt.b32 both{half}, word0, word1, {order};", f"mov.b32 {{pair0, pair1}}, both{half};"]
        for column in (0, 1):
            parts += [
                f"cvt.rn.f16x2.e4m3x2 halves, pair{column};",
                "mov.b32 {half0, half1}, halves;",
                "cvt.f32.f16 one, half0;",
                "cvt.f32.f16 other, half1;",
                "cvt.rn.bf16x2.f32 raw, other, one;",
                f"mul.rn.bf16x2 {_out(2 * half + column, eight)}, raw, factor{factor + 2 * half + column};",
            ]
    return parts


def _undo_fp4(eight: int, factor: int) -> list[str]:
    """Two inputs of four columns: one word, whose bytes have an input in each half."""
    load = f"ld.shared.b32 word0, [from{eight % 2} + {1024 * (eight // 2)}];"
    return [load, *fp4_numbers("word0", [(_out(column, eight), f"factor{factor + column}") for column in range(4)])]


def fp4_numbers(word: str, products: list[tuple[str, str]]) -> list[str]:
    """The numbers of a word's four bytes in BF16: of each byte both, times a factor, in one register.

    Both bytes of a BF16 number's size are looked up by the low three bits of its code; the fourth is its sign.

    Args:
        word: the register that holds them.
        products: of each byte where its numbers go, and the register with their factor, twice.
    """
    parts = [f"and.b32 size, {word}, 0x77777777;", f"shl.b32 shifted, {word}, 4;"]
    for half, signs in enumerate(("0xD9C8", "0xFBEA")):
        parts += [
            *(["shr.u32 size, size, 16;"] if half else []),
            "prmt.b32 high, 0x3F3F3F00, 0x40404040, size;",
            "prmt.b32 low, 0xC0800000, 0xC0804000, size;",
            f"prmt.b32 sign, shifted, {word}, {signs};",
            "and.b32 sign, sign, 0x80808080;",
            "or.b32 high, high, sign;",
        ]
        for order, (out, factor) in zip((FIRST, SECOND), products[2 * half : 2 * half + 2], strict=True):
            parts += [f"prmt.b32 raw, low, high, {order};", f"mul.rn.bf16x2 {out}, raw, {factor};"]
    return parts
