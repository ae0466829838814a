"""The places of a query's best numbers on a GPU: found by counting in registers, nothing is sorted (see `gpu.py`).

A program is one warpgroup and has one query. Its numbers, as integers of the same order, lie in the registers of 128
threads and in shared memory. The k-th largest is found by bisection: each pass counts in registers how many reach a
number. Then each of the four warps asks its threads about a quarter of the numbers in shared memory, 32 at a time. A
thread keeps the answers of one time, as bits: from how many there are before its own it knows where the places of its
chosen ones go. This step is PTX.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

THREADS, WARPS, LANES = 128, 4, 32
UNROLLED = 8  # numbers of a thread that are on their way from shared memory together
UNSEEN = -(1 << 31)  # in place of a number that cannot be chosen


def best(numbers: jax.Array, lo: jax.Array, hi: jax.Array, k: int, interpret: Any) -> jax.Array:
    """Where the k largest of each row's numbers lo <= i < hi are; of equal ones the earlier is taken, -inf never.

    Args:
        numbers: [N, n] float32; n a multiple of `gpu.WHOLE`, at most `gpu.MOST`, a register each.
        lo: int32 [N].
        hi: int32 [N].
        k: how many.
        interpret: see `gpu.index_topk`.

    Returns:
        int32 [N, k] in rising order, then -1 where there are fewer.
    """
    rows, count = numbers.shape
    wide = -(-k // THREADS) * THREADS
    chosen = plgpu.kernel(
        partial(_best, k=k, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((rows, wide), jnp.int32),
        grid=(rows,),
        grid_names=("program",),
        scratch_types=[
            plgpu.SMEM((count,), jnp.int32),
            plgpu.SMEM((WARPS,), jnp.int32),
            plgpu.SMEM((wide,), jnp.int32),
        ],
        interpret=interpret or None,
        kernel_name="index_best",
    )(numbers, lo, hi)
    return chosen[:, :k]


def _best(numbers_ref, lo_ref, hi_ref, out_ref, ordered_ref, tally_ref, chosen_ref, *, k, interpret):
    """One query."""
    query = lax.axis_index("program")
    numbers = numbers_ref[query]
    index = plgpu.broadcasted_iota(
        jnp.int32, numbers.shape, 0, layout=None if interpret else plgpu.Layout.WG_STRIDED(numbers.shape, 2)
    )
    seen = (index >= lo_ref[query]) & (index < hi_ref[query]) & (numbers > -jnp.inf)
    ordered = jnp.where(seen, _ordered(numbers), UNSEEN)
    ordered_ref[...] = ordered
    chosen_ref[...] = jnp.full(chosen_ref.shape, -1, jnp.int32)
    least = _kth_largest(ordered, k)
    plgpu.commit_smem()
    _collect(ordered_ref, least, k, tally_ref, chosen_ref, interpret)
    plgpu.commit_smem()
    out_ref[query] = chosen_ref[...]


def _ordered(numbers: jax.Array) -> jax.Array:
    """Float32 as int32 of the same order; both zeros become 0."""
    bits = lax.bitcast_convert_type(jnp.where(numbers == 0, 0.0, numbers), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _kth_largest(ordered: jax.Array, k: int) -> jax.Array:
    """The largest number that at least k reach, or any that just k reach; UNSEEN + 1 where no more than k are seen."""

    def unfinished(state):
        low, high, reach = state
        return (reach > k) & (high - 1 > low)

    def halve(state):
        low, high, reach = state
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = _reaching(ordered, middle)
        up = found >= k
        return jnp.where(up, middle, low), jnp.where(up, high, middle), jnp.where(up, found, reach)

    low = jnp.int32(UNSEEN + 1)
    return lax.while_loop(unfinished, halve, (low, jnp.int32((1 << 31) - 1), _reaching(ordered, low)))[0]


def _reaching(ordered: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.where(ordered >= least, 1, 0).sum()


def _collect(ordered: Any, least: jax.Array, k: int, tally: Any, chosen: Any, interpret: Any) -> None:
    """Places of all numbers above `least` and of the first that equal it, k at the most, in rising order."""
    if interpret:
        numbers = ordered[...]
        above, equal = numbers > least, numbers == least
        early = equal & (jnp.cumsum(equal) <= k - above.sum())
        taken = above | early
        to = jnp.where(taken, jnp.cumsum(taken) - 1, chosen.shape[0])
        chosen[...] = chosen[...].at[to].set(jnp.arange(numbers.shape[0], dtype=jnp.int32), mode="drop")
        return
    _assemble(collect_ptx(ordered.shape[0], k), (ordered, tally, chosen), (least,))


def _assemble(text: str, refs: tuple[Any, ...], numbers: tuple[jax.Array, ...]) -> None:
    """The PTX of one thread; its operands are the thread's number, then what is given."""
    types = *(plgpu.RefType() for _ in refs), *(plgpu.Layout.WG_SPLAT(()) for _ in numbers)

    @plgpu.inline_mgpu(arg_types=types)
    def run(_: Any, *args: Any) -> None:
        addresses = map(mosaic.memref_ptr, args[: len(refs)])
        operands = [mosaic.thread_idx(), *addresses, *(x.registers.item() for x in args[len(refs) :])]
        constraints = ",".join(["r"] * len(operands) + ["~{memory}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)

    run(*refs, *numbers)


def collect_ptx(count: int, k: int) -> str:
    """PTX of one thread for `count` numbers: $0 thread, $1 numbers, $2 tally, $3 chosen, $4 the least.

    Counts of numbers above the least and of those that equal it are the halves of a word. `base` are the counts before
    the warp's part, then before its next thousand.
    """
    steps = count // (WARPS * LANES)
    thousands = [range(LANES)[: steps - first] for first in range(0, steps, LANES)]
    start = [
        "and.b32 thread, $0, 127;",
        "shr.u32 warp, thread, 5;",
        "and.b32 lane, thread, 31;",
        f"mad.lo.u32 place, warp, {count // WARPS}, lane;",
        "mad.lo.u32 from, place, 4, $1;",
        f"mad.lo.u32 place, lane, {LANES - 1}, place;",
        "mov.u32 base, 0;",
    ]
    look = [line for i, part in enumerate(thousands) for line in _look(i, len(part))]
    write = [line for i in range(len(thousands)) for line in _write(i)]
    return "\n".join(["{", _registers(len(thousands)), *start, *look, *_share(k), *write, "}"])


def _registers(thousands: int) -> str:
    words = "thread lane warp from place turn steps ballot base all ties both some before equal left to less bit index"
    each = [f"{name}{i}" for i in range(thousands) for name in ("above", "equal", "both")]
    numbers = [f"number{i}" for i in range(UNROLLED)]
    return f".reg .b32 {', '.join([*words.split(), *each, *numbers])};\n.reg .pred flag, mine, more, is_equal;"


def _look(i: int, steps: int) -> list[str]:
    """A step asks 32 threads whether their numbers are above the least, and equal: `lane` keeps the answers of its step.

    So it has those of 32 numbers that follow one another, their first number's place being `place`.
    """
    together = math.gcd(steps, UNROLLED)
    lines = [f"mov.u32 above{i}, 0;", f"mov.u32 equal{i}, 0;", "mov.u32 turn, lane;", f"mov.u32 steps, {steps};"]
    lines += [f"look{i}:", *(f"ld.shared.s32 number{j}, [from + {4 * LANES * j}];" for j in range(together))]
    for j in range(together):
        lines += [f"setp.eq.s32 mine, turn, {j};"]
        for order, name in (("gt", "above"), ("eq", "equal")):
            lines += [f"setp.{order}.s32 flag, number{j}, $4;", "vote.sync.ballot.b32 ballot, flag, 0xffffffff;"]
            lines += [f"@mine mov.u32 {name}{i}, ballot;"]
    lines += [f"add.s32 from, from, {4 * LANES * together};", f"add.s32 turn, turn, {-together};"]
    lines += [f"add.s32 steps, steps, {-together};", "setp.gt.s32 more, steps, 0;", f"@more bra look{i};"]
    lines += [f"popc.b32 some, equal{i};", f"popc.b32 both{i}, above{i};"]
    return [*lines, f"mad.lo.u32 both{i}, some, 65536, both{i};", f"add.s32 base, base, both{i};"]


def _share(k: int) -> list[str]:
    """The warps tell each other their counts; `ties` is for how many equal ones there is room."""
    lines = ["redux.sync.add.s32 some, base, 0xffffffff;", "mad.lo.u32 to, warp, 4, $2;", "st.shared.b32 [to], some;"]
    lines += [f"bar.sync 0, {THREADS};", "mov.u32 base, 0;", "mov.u32 all, 0;"]
    for warp in range(WARPS):
        lines += [f"ld.shared.b32 some, [$2 + {4 * warp}];", "add.s32 all, all, some;"]
        lines += [f"setp.gt.s32 more, warp, {warp};", "@more add.s32 base, base, some;"]
    return [*lines, "and.b32 all, all, 0xffff;", f"mov.u32 ties, {k};", "sub.s32 ties, ties, all;"]


def _write(i: int) -> list[str]:
    """Places of a thread's chosen numbers, behind those of all threads before it."""
    lines = [f"mov.u32 before, both{i};"]
    for lanes in (1, 2, 4, 8, 16):
        lines += [f"shfl.sync.up.b32 some|more, before, {lanes}, 0, 0xffffffff;", "@more add.s32 before, before, some;"]
    return [
        *lines,
        "shfl.sync.idx.b32 some, before, 31, 31, 0xffffffff;",
        f"sub.s32 before, before, both{i};",
        "add.s32 before, before, base;",
        "add.s32 base, base, some;",
        "shr.u32 equal, before, 16;",
        "sub.s32 left, ties, equal;",
        "min.s32 equal, equal, ties;",
        "and.b32 to, before, 0xffff;",
        "add.s32 to, to, equal;",
        "mad.lo.u32 to, to, 4, $3;",
        f"or.b32 both, above{i}, equal{i};",
        f"write{i}:",
        "setp.ne.s32 more, both, 0;",
        "add.s32 less, both, -1;",
        "and.b32 some, both, less;",
        "xor.b32 bit, both, some;",
        "mov.u32 both, some;",
        "add.s32 less, bit, -1;",
        "popc.b32 index, less;",
        "add.s32 index, index, place;",
        f"and.b32 some, equal{i}, bit;",
        "setp.ne.s32 is_equal, some, 0;",
        "@is_equal add.s32 left, left, -1;",
        "selp.b32 some, left, 0, is_equal;",
        "setp.ge.and.s32 more, some, 0, more;",
        "@more st.shared.b32 [to], index;",
        "@more add.s32 to, to, 4;",
        "setp.ne.s32 more, both, 0;",
        f"@more bra write{i};",
        f"add.s32 place, place, {LANES * LANES};",
    ]
