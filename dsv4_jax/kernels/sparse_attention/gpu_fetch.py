"""Fetching entries, chosen ones or a run, into shared memory on a GPU: the PTX of one thread, and what it means.

A tile is 64 entries in shared memory, [2, 64, K / 2]: the columns of an entry in two halves, one for each warpgroup
that computes. Or it is whole, [1, 64, K]. It lies in blocks of 8 rows x 128 bytes, along the columns of a half first,
then down its rows. Within a block, the 16 bytes at place p of row r are at place p ^ (r % 8): products of warpgroups
read such blocks.

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
WAIT = "cp.async.wait_all;"
REGISTERS = """.reg .b32 thread, row, place, to, more, after, chosen, bytes, scale, halves, word<2>, out<4>;
.reg .b16 pair<2>, half<2>;
.reg .f32 factor, first, second;
.reg .b64 values, scales, rope, index, from;
.reg .pred seen;"""


def fetch(stored: tuple[Any, ...], index: Any, tile: Any, interpret: Any, later: int = 0) -> None:
    """Entries `index` [64] into `tile` [2, 64, K / 2]; zeros where the index is negative.

    A whole warpgroup calls it. On return the copies that each of its threads asked for have arrived, but for those of
    the `later` last calls; `wait_for_copies` waits for these too.

    Args:
        stored: references to [R, K] BF16 or its bits; or to FP8 numbers [R, K - 64], their scales and 64 BF16 numbers,
            as `Fp8WithRope` stores them.
        index: int32 in global memory.
        tile: in shared memory; with BF16 entries also [1, 64, K].
        interpret: do what the PTX does in plain arrays; Pallas' interpreter runs none.
        later: how many calls, this one included, may still be on their way.
    """
    if interpret:
        _copy_rows(stored, index[...], tile)
        return
    types = *(plgpu.RefType() for _ in stored), plgpu.RefType(), plgpu.RefType(TILED)

    plgpu.inline_mgpu(arg_types=types)(lambda _, *refs: _assemble(refs, later=later))(*stored, index, tile)


def wait_for_copies(interpret: Any) -> None:
    """Returns when all copies that each thread asked for have arrived."""
    if not interpret:
        plgpu.inline_mgpu()(lambda _: _inline(WAIT, [], []))()


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
    tile[...] = jnp.moveaxis(chosen.reshape(ENTRIES, tile.shape[0], -1), 1, 0)


def _decoded(arrays: list[jax.Array]) -> jax.Array:
    if len(arrays) == 1:
        return jax.lax.bitcast_convert_type(arrays[0], jnp.bfloat16)
    values, scales, rope = arrays
    storage = Fp8WithRope(values.shape[1] + rope.shape[1], rope.shape[1])
    return storage.decode({"values": values, "scales": scales, "rope": rope}, jnp.bfloat16)


def _assemble(refs: Any, per_block: int | None = None, run: Any = (), later: int = 0) -> None:
    *stored, index, tile = refs
    width, sides = ir.MemRefType(stored[0].type).shape[1], ir.MemRefType(tile.type).shape[0]
    text = plain_ptx(width, per_block, sides, later) if len(stored) == 1 else fp8_ptx(width, per_block)
    operands = [*map(mosaic.memref_ptr, (tile, index)), mosaic.thread_idx(), *map(mosaic.memref_ptr, stored), *run]
    _inline(text, operands, ["r", "l", "r", *("l" for _ in stored), *("r" for _ in run)])


def _inline(text: str, operands: list[Any], constraints: list[str]) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, operands, text, ",".join([*constraints, "~{memory}"]), has_side_effects=True)


def plain_ptx(width: int, per_block: int | None = None, sides: int = 2, later: int = 0) -> str:
    """PTX of one thread, for BF16 entries of `width` numbers: $0 tile, $1 index, $2 thread, $3 entries.

    With `per_block` entries are a run: $1 the blocks' first rows, $4 the first entry, $5 the end. The tile has so many
    `sides`. See `fetch` for `later`.
    """
    lines = width // COLUMNS
    across = lines // sides
    addresses = ["cvta.to.global.u64 values, $3;", "mad.wide.u32 values, place, 16, values;"]
    copies = [
        part
        for first in range(0, ENTRIES, 16)
        for part in (
            *_choose(first, per_block, "$5"),
            f"mad.wide.u32 from, chosen, {2 * width}, values;",
            *(_copy(first, line, across, 128 * line) for line in range(lines)),
        )
    ]
    wait = f"cp.async.commit_group;\ncp.async.wait_group {later};" if later else WAIT
    return _thread(_index(per_block, "$4") + addresses, across, copies, wait)


def fp8_ptx(width: int, per_block: int | None = None) -> str:
    """PTX of one thread, for entries of `width` FP8 numbers and 64 in BF16; $3 FP8 numbers, $4 scales, $5 BF16 numbers.

    The rest as in `plain_ptx`, a run's first entry in $6 and its end in $7. An FP8 number times a power of two is a
    BF16 number, so that nothing is rounded. A scale's byte 0 reads as zero.
    """
    lines, blocks = width // COLUMNS + 1, width // FP8_BLOCK
    across = lines // 2
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
            _copy(first, lines - 1, across, 0),
            *(part for block in range(blocks) for part in _decode(first, block, blocks, across)),
        )
    ]
    return _thread(_index(per_block, "$6") + addresses, across, copies, WAIT)


def _thread(addresses: list[str], across: int, copies: list[str], wait: str) -> str:
    """The whole of a thread: its row and place in a block, `to` where that lies, then the copies.

    Of the columns of a side there are so many blocks `across`.
    """
    place = [
        "and.b32 thread, $2, 127;",
        "shr.u32 row, thread, 3;",
        "and.b32 place, thread, 7;",
        "cvta.to.global.u64 index, $1;",
        *addresses,
        "shr.u32 more, row, 3;",
        f"mad.lo.u32 to, more, {BLOCK * across}, $0;",
        "and.b32 more, row, 7;",
        "mad.lo.u32 to, more, 128, to;",
        "xor.b32 place, place, more;",
        "mad.lo.u32 to, place, 16, to;",
    ]
    return "\n".join(["{", REGISTERS, *place, *copies, wait, "}"])


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


def _offset(first: int, line: int, across: int) -> int:
    """Of columns 64 * line .. and rows `first` further down than the thread's, which is a multiple of 16."""
    side, column = divmod(line, across)
    return BLOCK * ((side * ENTRIES // 8 + first // 8) * across + column)


def _copy(first: int, line: int, across: int, start: int) -> str:
    return f"cp.async.cg.shared.global [to + {_offset(first, line, across)}], [from + {start}], 16, bytes;"


def _decode(first: int, block: int, blocks: int, across: int) -> list[str]:
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
    return [*parts, f"st.shared.v4.b32 [to + {_offset(first, block, across)}], {{out0, out1, out2, out3}};"]
