"""Fetching entries, chosen ones or a run, into shared memory on a GPU: the PTX of one thread, and what it means.

A tile is 64 entries in shared memory, [2, 64, K / 2]: the columns of an entry in two halves, one for each warpgroup
that computes. It lies in blocks of 8 rows x 128 bytes, along the columns of a half first, then down its rows. Within a
block, the 16 bytes at place p of row r are at place p ^ (r % 8): products of warpgroups read such blocks.

For Hopper Pallas has no asynchronous copy of chosen rows into such blocks, and its copies of many rows begin at a
multiple of 8, so the copies are written in PTX. Eight threads take the 128 bytes of a block's row, 16 bytes each, and a
warpgroup 16 rows at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv4_jax.quantization.storage import FP8_BLOCK, Fp8WithRope

ENTRIES = 64  # of a tile
COLUMNS = 64  # of BF16 numbers in the 128 bytes of a block's row
BLOCK = 1024  # bytes
TILED = plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128)
REGISTERS = """.reg .b32 thread, row, place, to, more, after, chosen, bytes, scale, halves, word<2>, out<4>;
.reg .b16 pair<2>, half<2>;
.reg .f32 factor, first, second;
.reg .b64 values, scales, rope, index, from;
.reg .pred seen;"""


def fetch(stored: tuple[Any, ...], index: Any, tile: Any, interpret: Any) -> None:
    """Entries `index` [64] into `tile` [2, 64, K / 2]; zeros where the index is negative.

    A whole warpgroup calls it. On return the copies that each of its threads asked for have arrived.

    Args:
        stored: references to [R, K] BF16 or its bits; or to FP8 numbers [R, K - 64], their scales and 64 BF16 numbers,
            as `Fp8WithRope` stores them.
        index: int32 in global memory.
        tile: in shared memory.
        interpret: do what the PTX does in plain arrays; Pallas' interpreter runs none.
    """
    if interpret:
        _copy_rows(stored, index[...], tile)
        return
    types = *(plgpu.RefType() for _ in stored), plgpu.RefType(), plgpu.RefType(TILED)

    plgpu.inline_mgpu(arg_types=types)(lambda _, *refs: _assemble(refs))(*stored, index, tile)


def fetch_run(
    stored: tuple[Any, ...], first: Any, end: Any, blocks: Any, per_block: int, tile: Any, interpret: Any
) -> None:
    """As `fetch`, of the entries `first + i` for i < 64; zeros from `end` on.

    Args:
        stored: as in `fetch`.
        first: entry, int32 [].
        end: int32 [].
        blocks: entry n is row `blocks[n // per_block] + n % per_block` of what is stored; int32 in global memory.
        per_block: entries of a block.
        tile: as in `fetch`.
        interpret: as in `fetch`.
    """
    if interpret:
        entry = first + jnp.arange(ENTRIES, dtype=jnp.int32)
        seen = entry < end
        entry = jnp.where(seen, entry, 0)
        _copy_rows(stored, jnp.where(seen, blocks[...][entry // per_block] + entry % per_block, -1), tile)
        return
    number = plgpu.Layout.WG_SPLAT(())
    types = *(plgpu.RefType() for _ in stored), plgpu.RefType(), plgpu.RefType(TILED), number, number

    @plgpu.inline_mgpu(arg_types=types)
    def copy(_: Any, *args: Any) -> None:
        *refs, first, end = args
        _assemble(refs, per_block, [x.registers.item() for x in (first, end)])

    copy(*stored, blocks, tile, first, end)


def _copy_rows(stored: tuple[Any, ...], index: jax.Array, tile: Any) -> None:
    entries = _decoded([ref[...] for ref in stored])
    chosen = jnp.where((index >= 0)[:, None], entries[jnp.maximum(index, 0)], jnp.zeros((), jnp.bfloat16))
    tile[...] = jnp.moveaxis(chosen.reshape(ENTRIES, 2, -1), 1, 0)


def _decoded(arrays: list[jax.Array]) -> jax.Array:
    if len(arrays) == 1:
        return jax.lax.bitcast_convert_type(arrays[0], jnp.bfloat16)
    values, scales, rope = arrays
    storage = Fp8WithRope(values.shape[1] + rope.shape[1], rope.shape[1])
    return storage.decode({"values": values, "scales": scales, "rope": rope}, jnp.bfloat16)


def _assemble(refs: Any, per_block: int | None = None, run: Any = ()) -> None:
    *stored, index, tile = refs
    widths = [ir.MemRefType(ref.type).shape[1] for ref in stored]
    text = plain_ptx(widths[0], per_block) if len(stored) == 1 else fp8_ptx(widths[0], per_block)
    operands = [*map(mosaic.memref_ptr, (tile, index)), mosaic.thread_idx(), *map(mosaic.memref_ptr, stored), *run]
    constraints = ",".join(["r", "l", "r", *("l" for _ in stored), *("r" for _ in run), "~{memory}"])
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)


def plain_ptx(width: int, per_block: int | None = None) -> str:
    """PTX of one thread, for BF16 entries of `width` numbers: $0 tile, $1 index, $2 thread, $3 entries.

    With `per_block` entries are a run: $1 the blocks' first rows, $4 the first entry, $5 the end.
    """
    lines = width // COLUMNS
    addresses = ["cvta.to.global.u64 values, $3;", "mad.wide.u32 values, place, 16, values;"]
    copies = [
        part
        for first in range(0, ENTRIES, 16)
        for part in (
            *_choose(first, per_block, "$5"),
            f"mad.wide.u32 from, chosen, {2 * width}, values;",
            *(_copy(first, line, lines, 128 * line) for line in range(lines)),
        )
    ]
    return _thread(_index(per_block, "$4") + addresses, lines, copies)


def fp8_ptx(width: int, per_block: int | None = None) -> str:
    """PTX of one thread, for entries of `width` FP8 numbers and 64 in BF16; $3 FP8 numbers, $4 scales, $5 BF16 numbers.

    The rest as in `plain_ptx`, a run's first entry in $6 and its end in $7. An FP8 number times a power of two is a
    BF16 number, so that nothing is rounded. A scale's byte 0 reads as zero.
    """
    lines, blocks = width // COLUMNS + 1, width // FP8_BLOCK
    addresses = [
        "cvta.to.global.u64 values, $3;",
        "mad.wide.u32 values, place, 8, values;",
        "cvta.to.global.u64 scales, $4;",
        "cvta.to.global.u64 rope, $5;",
        "mad.wide.u32 rope, place, 16, rope;",
    ]
    copies = [
        part
        for first in range(0, ENTRIES, 16)
        for part in (
            *_choose(first, per_block, "$7"),
            f"mad.wide.u32 from, chosen, {2 * COLUMNS}, rope;",
            _copy(first, lines - 1, lines, 0),
            *(part for block in range(blocks) for part in _decode(first, block, blocks, lines)),
        )
    ]
    return _thread(_index(per_block, "$6") + addresses, lines, copies)


def _thread(addresses: list[str], lines: int, copies: list[str]) -> str:
    """The whole of a thread: its row and place in a block, `to` where that lies, then the copies."""
    place = [
        "and.b32 thread, $2, 127;",
        "shr.u32 row, thread, 3;",
        "and.b32 place, thread, 7;",
        "cvta.to.global.u64 index, $1;",
        *addresses,
        "shr.u32 more, row, 3;",
        f"mad.lo.u32 to, more, {BLOCK * lines // 2}, $0;",
        "and.b32 more, row, 7;",
        "mad.lo.u32 to, more, 128, to;",
        "xor.b32 place, place, more;",
        "mad.lo.u32 to, place, 16, to;",
    ]
    return "\n".join(["{", REGISTERS, *place, *copies, "cp.async.wait_all;", "}"])


def _index(per_block: int | None, first: str) -> list[str]:
    """`index` at the number of the thread's first entry; or for a run `after`, that number itself."""
    return ["mad.wide.u32 index, row, 4, index;"] if per_block is None else [f"add.s32 after, row, {first};"]


def _choose(first: int, per_block: int | None, end: str) -> list[str]:
    """The stored entry of the thread's row, `first` rows further down; where it is unseen no byte of it is read."""
    if per_block is None:
        return [
            f"ld.global.b32 chosen, [index + {4 * first}];",
            "setp.ge.s32 seen, chosen, 0;",
            "selp.b32 bytes, 16, 0, seen;",
            "max.s32 chosen, chosen, 0;",
        ]
    return [
        f"add.s32 chosen, after, {first};",
        f"setp.lt.s32 seen, chosen, {end};",
        "selp.b32 bytes, 16, 0, seen;",
        "selp.b32 chosen, chosen, 0, seen;",
        f"div.u32 more, chosen, {per_block};",
        "mad.wide.u32 from, more, 4, index;",
        "ld.global.b32 more, [from];",
        f"rem.u32 chosen, chosen, {per_block};",
        "add.s32 chosen, chosen, more;",
        "selp.b32 chosen, chosen, 0, seen;",
    ]


def _offset(first: int, line: int, lines: int) -> int:
    """Of columns 64 * line .. and rows `first` further down than the thread's, which is a multiple of 16."""
    side, column = divmod(line, lines // 2)
    return BLOCK * (side * ENTRIES // 8 * lines // 2 + first // 8 * lines // 2 + column)


def _copy(first: int, line: int, lines: int, start: int) -> str:
    return f"cp.async.cg.shared.global [to + {_offset(first, line, lines)}], [from + {start}], 16, bytes;"


def _decode(first: int, block: int, blocks: int, lines: int) -> list[str]:
    """Eight FP8 numbers of one block times its scale, as BF16."""
    parts = [
        f"mad.wide.u32 from, chosen, {blocks * FP8_BLOCK}, values;",
        f"ld.global.v2.b32 {{word0, word1}}, [from + {block * FP8_BLOCK}];",
        f"mad.wide.u32 from, chosen, {blocks}, scales;",
        f"ld.global.u8 scale, [from + {block}];",
        "selp.b32 scale, scale, 0, seen;",
        "shl.b32 scale, scale, 23;",
        "mov.b32 factor, scale;",
    ]
    for word in range(2):
        parts += [f"selp.b32 word{word}, word{word}, 0, seen;", f"mov.b32 {{pair0, pair1}}, word{word};"]
        for number in range(2):
            parts += [
                f"cvt.rn.f16x2.e4m3x2 halves, pair{number};",
                "mov.b32 {half0, half1}, halves;",
                "cvt.f32.f16 first, half0;",
                "cvt.f32.f16 second, half1;",
                "mul.f32 first, first, factor;",
                "mul.f32 second, second, factor;",
                f"cvt.rn.bf16x2.f32 out{2 * word + number}, second, first;",
            ]
    return [*parts, f"st.shared.v4.b32 [to + {_offset(first, block, lines)}], {{out0, out1, out2, out3}};"]
