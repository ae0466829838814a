"""The places of a query's best numbers on a GPU: found by counting in registers, nothing is sorted (see `gpu.py`).

A program is one warpgroup and has one query. Its numbers, as integers of the same order, lie in the registers of 128
threads and in shared memory. The k-th largest is found by bisection: each pass counts in registers how many reach a
number. Then each of the four warps walks over a quarter of the numbers in shared memory, 32 at a time: a ballot says to
each thread how many chosen ones stand before its own, and so where its place goes. This step is PTX.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

THREADS, WARPS = 128, 4
UNSEEN = -(1 << 31)  # in place of a number that cannot be chosen
REGISTERS = """.reg .b32 thread, lane, warp, from, place, number, ballot, lower, some, steps;
.reg .b32 above, equal, ahead, rank, ties, to;
.reg .pred is_above, is_equal, early, more;"""


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
            plgpu.SMEM((2 * WARPS,), jnp.int32),
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
    _count(ordered_ref, least, tally_ref, interpret)
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


def _count(ordered: Any, least: jax.Array, tally: Any, interpret: Any) -> None:
    """How many numbers of each warp's quarter are above `least`, and how many equal it, to tally[2 w] and [2 w + 1]."""
    if interpret:
        quarters = ordered[...].reshape(WARPS, -1)
        tally[...] = jnp.stack([(quarters > least).sum(1), (quarters == least).sum(1)], 1).reshape(-1).astype(jnp.int32)
        return
    _assemble(count_ptx(ordered.shape[0]), (ordered, tally), (least,))


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


def count_ptx(count: int) -> str:
    """PTX of one thread for `count` numbers: $0 thread, $1 numbers, $2 tally, $3 the least."""
    step = [*_look("$3"), *_add_ballot("is_above", "above"), *_add_ballot("is_equal", "equal")]
    write = ["mad.lo.u32 to, warp, 8, $2;", "st.shared.b32 [to], above;", "st.shared.b32 [to + 4], equal;"]
    return _thread([], count, step, write)


def collect_ptx(count: int, k: int) -> str:
    """PTX of one thread for `count` numbers: $0 thread, $1 numbers, $2 tally, $3 chosen, $4 the least.

    `above` and `equal` are how many of all numbers before the warp's 32 are, `ahead` before the thread's own.
    """
    start = ["shl.b32 lower, 1, lane;", "add.s32 lower, lower, -1;", f"mov.u32 ties, {k};"]
    for warp in range(WARPS):
        start += [f"setp.gt.s32 more, warp, {warp};"]
        for name, offset in (("above", 8 * warp), ("equal", 8 * warp + 4)):
            start += [f"ld.shared.b32 some, [$2 + {offset}];", "selp.b32 some, some, 0, more;"]
            start += [f"add.s32 {name}, {name}, some;"]
        start += [f"ld.shared.b32 some, [$2 + {8 * warp}];", "sub.s32 ties, ties, some;"]
    before = lambda flag: [f"vote.sync.ballot.b32 ballot, {flag}, 0xffffffff;", "and.b32 some, ballot, lower;"]  # noqa: E731
    step = [
        *_look("$4"),
        *before("is_equal"),
        "popc.b32 rank, some;",
        "add.s32 rank, rank, equal;",
        "setp.lt.and.s32 early, rank, ties, is_equal;",
        "min.s32 ahead, rank, ties;",
        "popc.b32 some, ballot;",
        "add.s32 equal, equal, some;",
        *before("is_above"),
        "popc.b32 rank, some;",
        "add.s32 ahead, ahead, rank;",
        "add.s32 ahead, ahead, above;",
        "popc.b32 some, ballot;",
        "add.s32 above, above, some;",
        "mad.lo.u32 to, ahead, 4, $3;",
        "@is_above st.shared.b32 [to], place;",
        "@early st.shared.b32 [to], place;",
    ]
    return _thread(start, count, step, [])


def _look(least: str) -> list[str]:
    """The number of the thread's place, compared with `least`."""
    return [
        "ld.shared.s32 number, [from];",
        f"setp.gt.s32 is_above, number, {least};",
        f"setp.eq.s32 is_equal, number, {least};",
    ]


def _add_ballot(flag: str, total: str) -> list[str]:
    vote = f"vote.sync.ballot.b32 ballot, {flag}, 0xffffffff;"
    return [vote, "popc.b32 some, ballot;", f"add.s32 {total}, {total}, some;"]


def _thread(start: list[str], count: int, step: list[str], end: list[str]) -> str:
    """The whole of a thread: `step` for each 32 numbers of its warp's quarter, `place` being the thread's own."""
    quarter = count // WARPS
    before = [
        "and.b32 thread, $0, 127;",
        "shr.u32 warp, thread, 5;",
        "and.b32 lane, thread, 31;",
        f"mad.lo.u32 place, warp, {quarter}, lane;",
        "mad.lo.u32 from, place, 4, $1;",
        "mov.u32 above, 0;",
        "mov.u32 equal, 0;",
        f"mov.u32 steps, {quarter // 32};",
    ]
    after = [
        "add.s32 place, place, 32;",
        "add.s32 from, from, 128;",
        "add.s32 steps, steps, -1;",
        "setp.gt.s32 more, steps, 0;",
        "@more bra again;",
    ]
    return "\n".join(["{", REGISTERS, *before, *start, "again:", *step, *after, *end, "}"])
