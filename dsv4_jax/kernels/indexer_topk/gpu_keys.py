"""Packed indexer keys on their way from a cache's pages into a warpgroup product on a GPU: PTX, and what it means.

The left operand of a product, [64 keys, 128 numbers], comes from registers, and its columns may be in any order that is
the queries' too. Four threads have a key. In the order here each has 32 numbers that lie side by side: 16 bytes, which
share a scale. Every thread copies just what it will need itself, so that threads never wait for each other.
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
from dsv4_jax.quantization.formats import FP4_BLOCK
from dsv4_jax.quantization.storage import Fp4

NUMBERS = plgpu.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
OPERANDS = 32  # registers of a thread, two numbers each
SHARING = 4  # threads that have a key
PACKED, SCALES = WIDTH // 2, WIDTH // FP4_BLOCK  # bytes of a key
REGISTERS = """.reg .b32 lane, row, quad, at, to, column, key, scale, factor, word<4>;
.reg .b32 size, shifted, high, low, sign, raw;
.reg .b64 table, packed, scales;
.reg .pred wanted, broken;"""


def reordered(numbers: jax.Array) -> jax.Array:
    """[.., 128] in the order of the operand's columns: two of each of the four threads, then the next two."""
    return numbers.reshape(*numbers.shape[:-1], SHARING, -1, 2).swapaxes(-3, -2).reshape(numbers.shape)


def fetch(
    stored: tuple[Any, Any], table: Any, first: Any, columns: tuple[Any, Any], wanted: Any, slot: Any, interpret: Any
) -> None:
    """Ask for 64 keys: copies into shared memory begin, and are counted, also where nothing is copied.

    Args:
        stored: references to the bytes of all blocks [N, E, 64] and to their scales [N, E, 4].
        table: of the sequence, in global memory.
        first: block 0 of the table's numbers among all of `stored`.
        columns: of the table: the tile's first one, and the last one that is to be read.
        wanted: whether to copy.
        slot: references to shared memory [64, 64] and [64, 4].
        interpret: do what the PTX does in plain arrays; Pallas' interpreter runs none.
    """
    if interpret:
        per_block = stored[0].shape[1]
        column = jnp.minimum(columns[0] + jnp.arange(ROWS // per_block), columns[1])
        blocks = first + table[...][column]
        for source, to in zip(stored, slot, strict=True):
            to[...] = jnp.where(wanted, source[...][blocks].reshape(to.shape), to[...])
        return

    def assemble(_: Any, *args: Any) -> None:
        refs, numbers = args[:5], [x.registers.item() for x in args[5:]]
        per_block = ir.MemRefType(refs[0].type).shape[1]
        operands = [*map(mosaic.memref_ptr, refs), mosaic.thread_idx(), *numbers]
        constraints = ",".join(["l"] * 3 + ["r"] * (len(operands) - 3) + ["~{memory}"])
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, operands, fetch_ptx(per_block), constraints, has_side_effects=True)

    types = *[plgpu.RefType()] * 5, *[plgpu.Layout.WG_SPLAT(())] * 4
    numbers = first, *columns, jnp.where(wanted, 1, 0)
    plgpu.inline_mgpu(arg_types=types)(assemble)(*stored, table, *slot, *numbers)


def undone(slot: tuple[Any, Any], later: int, interpret: Any) -> jax.Array:
    """The keys of a slot as BF16 [64, 128], `reordered`, when no more than `later` calls of `fetch` are unfinished."""
    if interpret:
        packed, scales = (ref[...] for ref in slot)
        return reordered(Fp4(WIDTH).decode({"packed": packed, "scales": scales}, jnp.bfloat16))

    def assemble(_: Any, packed: Any, scales: Any) -> Any:
        i32, bf16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        operands = [mosaic.memref_ptr(packed), mosaic.memref_ptr(scales), mosaic.thread_idx()]
        constraints = ",".join(["=&r"] * OPERANDS + ["r"] * 3 + ["~{memory}"])
        struct = llvm.StructType.get_literal([i32] * OPERANDS)
        found: Any = llvm.inline_asm(struct, operands, undo_ptx(later), constraints, has_side_effects=True)
        numbers = mgpu.FragmentedArray.splat(mosaic.c(0, bf16), NUMBERS.shape, plgpu.Layout.WGMMA.to_mgpu())
        for i in range(OPERANDS):
            pair = mosaic.bitcast(llvm.extractvalue(i32, found, [i]), ir.VectorType.get((2,), bf16))
            numbers.registers.flat[i] = pair
        return numbers

    types = plgpu.RefType(), plgpu.RefType()
    return plgpu.inline_mgpu(arg_types=types, return_type=NUMBERS)(assemble)(*slot)


def fetch_ptx(per_block: int) -> str:
    """PTX of one thread: $0 packed bytes, $1 scales, $2 table, $3 and $4 their slots, $5 thread, $6 .. $9 numbers.

    Those are the block of the layer, the tile's first column, the last one to read, and whether to copy. The four
    threads of a key copy all its scales each, one word, to the same place.
    """
    copies = [
        f"@wanted cp.async.{kind}.shared.global [to + {8 * second * size}], [{name} + {8 * second * size}], {copied};"
        for name, kind, size, copied in (("packed", "cg", PACKED, 16), ("scales", "ca", SCALES, 4))
        for second in (0, 1)
    ]
    parts = [
        "bar.warp.sync 0xffffffff;",  # all of them have read what the slot held
        "setp.gt.s32 wanted, $9, 0;",
        "cvta.to.global.u64 packed, $0;",
        "cvta.to.global.u64 scales, $1;",
        "cvta.to.global.u64 table, $2;",
        f"shr.u32 column, row, {per_block.bit_length() - 1};",
        "add.s32 column, column, $7;",
        "min.s32 column, column, $8;",
        "mad.wide.u32 table, column, 4, table;",
        "ld.global.b32 key, [table];",
        "add.s32 key, key, $6;",
        f"and.b32 at, row, {per_block - 1};",
        f"mad.lo.u32 key, key, {per_block}, at;",
        f"mad.wide.u32 packed, key, {PACKED}, packed;",
        "mad.wide.u32 packed, quad, 16, packed;",
        f"mad.wide.u32 scales, key, {SCALES}, scales;",
        f"mad.lo.u32 to, row, {PACKED}, $3;",
        "mad.lo.u32 to, quad, 16, to;",
        *copies[:2],
        f"mad.lo.u32 to, row, {SCALES}, $4;",
        *copies[2:],
        "cp.async.commit_group;",
    ]
    return _thread("$5", parts)


def undo_ptx(later: int) -> str:
    """PTX of one thread: $0 .. $31 its numbers in pairs, $32 and $33 the slot, $34 thread.

    An e2m1 number times a power of two is a BF16 number, so that nothing is rounded. A scale's byte 0 reads as zero,
    255 as NaN.
    """
    parts = [
        f"cp.async.wait_group {later};",
        f"mad.lo.u32 at, row, {PACKED}, $32;",
        "mad.lo.u32 at, quad, 16, at;",
        f"mad.lo.u32 to, row, {SCALES}, $33;",
        "add.u32 to, to, quad;",
    ]
    return _thread("$34", [*parts, *(part for second in (0, 1) for part in _quarter(second))])


def _quarter(second: int) -> list[str]:
    """What a thread has of a key: a part of the first or second of its rows of the operand, 8 further down."""
    parts = [
        f"ld.shared.u8 scale, [to + {8 * second * SCALES}];",
        f"ld.shared.v4.b32 {{word0, word1, word2, word3}}, [at + {8 * second * PACKED}];",
        "mad.lo.u32 factor, scale, 0x00800080, 0;",
        "setp.eq.s32 broken, scale, 255;",
        "selp.b32 factor, 0x7FC07FC0, factor, broken;",
    ]
    for word in range(4):
        outs = [(f"${2 * (4 * word + byte) + second}", "factor") for byte in range(4)]
        parts += fp4_numbers(f"word{word}", outs)
    return parts


def _thread(thread: str, parts: list[str]) -> str:
    """The whole of a thread: its first `row` of the operand, of 16 that its warp has, and its `quad` of the key."""
    place = [
        f"and.b32 lane, {thread}, 31;",
        "and.b32 quad, lane, 3;",
        "shr.u32 lane, lane, 2;",
        f"shr.u32 row, {thread}, 5;",
        "and.b32 row, row, 3;",
        "mad.lo.u32 row, row, 16, lane;",
    ]
    return "\n".join(["{", REGISTERS, *place, *parts, "}"])
