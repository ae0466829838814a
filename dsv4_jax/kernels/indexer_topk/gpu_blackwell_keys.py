"""FP4 operands on their way from memory into the products of Blackwell's tensor cores: PTX, and what it means.

128 rows of 128 numbers, packed as `Fp4` stores them, with a scale for each 32, as tensor cores read them in shared
memory. Nothing is converted, bytes only find their places: numbers in blocks of 8 rows x 64 bytes, the 16 bytes at
place p of row r at place p ^ (r / 2 % 4); the four scales of row r at byte 16 * (r % 32) + 4 * (r / 32).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv4_jax.kernels.indexer_topk.gpu_paged import WIDTH
from dsv4_jax.kernels.sparse_attention.gpu_fetch import TILED as TILED_BF16
from dsv4_jax.quantization.formats import FP4_BLOCK
from dsv4_jax.quantization.storage import Fp4

TILE = 128  # rows of an operand
PACKED, SCALES = WIDTH // 2, WIDTH // FP4_BLOCK  # bytes of a row
SCALES_SHAPE = (1, 1, 32, 16)  # of a tile: as Pallas copies them into tensor memory
TILED = plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(PACKED)
ROWS_AT_ONCE = 8  # that a warp copies with one instruction, a quarter of a row each thread
REGISTERS = """.reg .b32 lane, warp, row, quad, place, at, to, column, key;
.reg .b64 table, packed, scales, from;"""


def numbers_in_shared_memory(tiles: int, interpret: Any) -> Any:
    """Room for the numbers of `tiles` operands.

    Pallas' interpreter multiplies no FP4 with scales: there an operand's numbers have been multiplied by their scales.
    """
    shape = tiles, TILE, WIDTH
    if interpret:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED_BF16)
    return plgpu.SMEM(shape, jnp.float4_e2m1fn, transforms=TILED)


def fetch(
    stored: tuple[Any, Any], table: Any, first: Any, columns: tuple[Any, Any], slot: tuple[Any, Any], interpret: Any
) -> None:
    """Ask for a tile of 128 rows: copies into shared memory begin. `finish` waits for them.

    Args:
        stored: references to the bytes of all blocks [N, E, 64] and to their scales [N, E, 4].
        table: block numbers, in global memory.
        first: block 0 of the table's numbers among all of `stored`.
        columns: of the table: the tile's first one, and the last one that is to be read.
        slot: references to shared memory: numbers [128, 128], and scales.
        interpret: do what the PTX does in plain arrays; Pallas' interpreter runs none.
    """
    if interpret:
        per_block = stored[0].shape[1]
        blocks = first + table[...][jnp.minimum(columns[0] + jnp.arange(TILE // per_block), columns[1])]
        packed, scales = (source[...][blocks].reshape(TILE, -1) for source in stored)
        slot[0][...] = Fp4(WIDTH).decode({"packed": packed, "scales": scales}, jnp.bfloat16)
        return

    def assemble(_: Any, *args: Any) -> None:
        refs, numbers = args[:5], [x.registers.item() for x in args[5:]]
        per_block = ir.MemRefType(refs[0].type).shape[1]
        operands = [*map(mosaic.memref_ptr, refs), mosaic.thread_idx(), *numbers]
        constraints = ",".join(["l"] * 3 + ["r"] * (len(operands) - 3) + ["~{memory}"])
        _run(fetch_ptx(per_block), operands, constraints)

    plain, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    types = plain, plain, plain, plgpu.RefType(TILED), plain, number, number, number
    plgpu.inline_mgpu(arg_types=types)(assemble)(*stored, table, *slot, first, *columns)


def finish(later: int, interpret: Any) -> None:
    """End a group of copies, those since the last call, and wait until at most `later` groups are on their way.

    Tensor cores see the others, and all threads of the warpgroup may say so.
    """
    if not interpret:
        text = f"cp.async.commit_group;\ncp.async.wait_group {later};"
        plgpu.inline_mgpu()(lambda _: _run(text, [], "~{memory}"))()
    plgpu.commit_smem()


def _run(text: str, operands: list[Any], constraints: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)


def fetch_ptx(per_block: int) -> str:
    """PTX of one thread: $0 packed bytes, $1 scales, $2 table, $3 and $4 the slot, $5 thread, $6 .. $8 numbers.

    Those are the block of the layer, the tile's first column, and the last one to read. A warp has 32 rows.
    """
    lines = [
        "cvta.to.global.u64 packed, $0;",
        "cvta.to.global.u64 scales, $1;",
        "cvta.to.global.u64 table, $2;",
        "and.b32 lane, $5, 31;",
        "shr.u32 warp, $5, 5;",
        "and.b32 warp, warp, 3;",
        "mad.lo.u32 row, warp, 32, lane;",
        *_lookup("row", per_block),
        f"mad.wide.u32 from, key, {SCALES}, scales;",
        "mad.lo.u32 to, lane, 16, $4;",
        f"mad.lo.u32 to, warp, {SCALES}, to;",
        "cp.async.ca.shared.global [to], [from], 4;",
        "and.b32 quad, lane, 3;",
        "shr.u32 lane, lane, 2;",
        "shr.u32 place, lane, 1;",
        "and.b32 place, place, 3;",
        "xor.b32 place, place, quad;",
        "mad.lo.u32 row, warp, 32, lane;",
        f"mad.lo.u32 to, row, {PACKED}, $3;",
        "mad.lo.u32 to, place, 16, to;",
    ]
    for first in range(0, 32, ROWS_AT_ONCE):
        if first % per_block == 0:
            lines += [f"add.u32 at, row, {first};", *_lookup("at", per_block)]
            lines += [f"mad.wide.u32 from, key, {PACKED}, packed;", "mad.wide.u32 from, quad, 16, from;"]
        further = first % per_block * PACKED
        lines.append(f"cp.async.cg.shared.global [to + {first * PACKED}], [from + {further}], 16;")
    return "\n".join(["{", REGISTERS, *lines, "}"])


def _lookup(row: str, per_block: int) -> list[str]:
    """The `key` that a row of the tile is, among all that are stored."""
    return [
        f"shr.u32 column, {row}, {per_block.bit_length() - 1};",
        "add.s32 column, column, $7;",
        "min.s32 column, column, $8;",
        "mad.wide.u32 from, column, 4, table;",
        "ld.global.b32 key, [from];",
        "add.s32 key, key, $6;",
        f"and.b32 column, {row}, {per_block - 1};",
        f"mad.lo.u32 key, key, {per_block}, column;",
    ]
