"""The k largest of a row of integers, by the threads of a warpgroup, in PTX (see `gpu_best.py`).

The k-th largest is found digit by digit of 8 bits, the highest first: all numbers that have the digits found so far
are counted by their next one, each by an addition to one of 256 counts. They are integers: no order of sums matters.
Then each of four warps asks its threads about a quarter of the numbers, 32 at a time. A thread keeps the answers of one
time, as bits: from how many there are before its own it knows where the places of its chosen ones go.
"""

from __future__ import annotations

import math
from collections.abc import Callable

THREADS, WARPS, LANES = 128, 4, 32
UNROLLED = 16  # numbers of a thread that are on their way from shared memory together
UNSEEN = -0x7F800000  # in place of a number that cannot be chosen; the smallest
SHIFTS = (24, 16, 8, 0)  # of digits
DIGITS = 256
ROW = DIGITS + 4  # words: counts of the digits, and at DIGITS of what has none
TALLY = (len(SHIFTS) + 1) * DIGITS  # words: the rows, then counts of the warps
WORDS = """thread lane warp begin from turn steps ballot low last need digit rest reach before base all ties
both some equal left to less bit index place"""


def choose_ptx(count: int, k: int) -> str:
    """PTX of one thread for `count` numbers: $0 thread, $1 numbers, $2 tally of zeros, $3 chosen.

    `low` is the least number with the digits that are found, and in the end the k-th largest or any that just k reach;
    UNSEEN + 1 where no more than k are seen. Counts of numbers above it and of those that equal it are the halves of a
    word. `base` are the counts before the warp's quarter, then before its next thousand.
    """
    steps = count // THREADS
    thousands = [min(LANES, steps - first) for first in range(0, steps, LANES)]
    start = [
        "and.b32 thread, $0, 127;",
        "shr.u32 warp, thread, 5;",
        "and.b32 lane, thread, 31;",
        f"mad.lo.u32 place, warp, {count // WARPS}, lane;",
        "mad.lo.u32 begin, place, 4, $1;",
        f"mad.lo.u32 place, lane, {LANES - 1}, place;",
        f"mov.s32 low, {UNSEEN + 1};",
        "mov.u32 last, 0xfffffffe;",
        f"mov.u32 need, {k};",
    ]
    search = [line for i in range(len(SHIFTS)) for line in (*_count(i, steps), *_digit(i))]
    found = ["found:", "mov.u32 from, begin;", "mov.u32 base, 0;"]
    look = [line for i, part in enumerate(thousands) for line in _look(i, part)]
    write = [line for i in range(len(thousands)) for line in _write(i)]
    lines = [_registers(len(thousands)), *start, *search, *found, *look, *_share(k), *write]
    return "\n".join(["{", *lines, "}"])


def _registers(thousands: int) -> str:
    each = [f"{name}{i}" for i in range(thousands) for name in ("above", "equal", "both")]
    numbers = [f"number{i}" for i in range(UNROLLED)]
    return f".reg .b32 {', '.join([*WORDS.split(), *each, *numbers])};\n.reg .pred flag, mine, more;"


def _walk(label: str, steps: int, visit: Callable[[int], list[str]]) -> list[str]:
    """Some steps of 32 numbers each, from where `from` is: a step's are in the registers that `visit` gets the name of.

    In step j of those together `turn` equals j in one thread, another one each time.
    """
    together = math.gcd(steps, UNROLLED)
    lines = ["mov.u32 turn, lane;", f"mov.u32 steps, {steps};", f"{label}:"]
    lines += [f"ld.shared.s32 number{j}, [from + {4 * LANES * j}];" for j in range(together)]
    lines += [line for j in range(together) for line in visit(j)]
    lines += [f"add.s32 from, from, {4 * LANES * together};", f"add.s32 turn, turn, {-together};"]
    return [*lines, f"add.s32 steps, steps, {-together};", "setp.gt.s32 more, steps, 0;", f"@more bra {label};"]


def _count(i: int, steps: int) -> list[str]:
    """The numbers from `low` to `low` + `last`, by their digit."""

    def visit(j: int) -> list[str]:
        return [
            f"sub.u32 number{j}, number{j}, low;",
            f"setp.le.u32 flag, number{j}, last;",
            f"shr.u32 digit, number{j}, {SHIFTS[i]};",
            f"selp.b32 digit, digit, {DIGITS}, flag;",  # an addition on a condition would take a branch
            "mad.lo.u32 to, digit, 4, $2;",
            f"red.shared.add.u32 [to + {4 * ROW * i}], 1;",
        ]

    return ["mov.u32 from, begin;", *_walk(f"count{i}", steps, visit), f"bar.sync 1, {THREADS};"]


def _digit(i: int) -> list[str]:
    """The digit before which too few numbers come, but with it enough: `reach`. `need` is how many of its numbers.

    Each warp does the same. A lane has 8 digits, `before` are how many numbers have a larger one.
    """
    each = DIGITS // LANES
    lines = [f"mad.lo.u32 from, lane, {4 * each}, $2;"]
    for j in range(0, each, 4):
        four = ", ".join(f"number{j + n}" for n in range(4))
        lines += [f"ld.shared.v4.b32 {{{four}}}, [from + {4 * (ROW * i + j)}];"]
    lines += ["mov.u32 rest, 0;", *(f"add.s32 rest, rest, number{j};" for j in range(each)), "mov.u32 before, rest;"]
    for lanes in (1, 2, 4, 8, 16):
        lines += [f"shfl.sync.down.b32 some|more, before, {lanes}, 31, 0xffffffff;"]
        lines += ["@more add.s32 before, before, some;"]
    lines += ["sub.s32 before, before, rest;", "mov.u32 digit, 0;", "mov.u32 rest, 0;", "mov.u32 reach, 0;"]
    for j in reversed(range(each)):
        lines += ["setp.lt.s32 flag, before, need;", "selp.b32 some, 0, 1, flag;", "add.s32 digit, digit, some;"]
        lines += ["@flag mov.u32 rest, before;", f"add.s32 before, before, number{j};", "@flag mov.u32 reach, before;"]
    return [
        *lines,
        "redux.sync.add.s32 digit, digit, 0xffffffff;",
        "redux.sync.max.s32 rest, rest, 0xffffffff;",
        "redux.sync.max.s32 reach, reach, 0xffffffff;",
        f"shl.b32 digit, digit, {SHIFTS[i]};",
        "add.s32 low, low, digit;",
        f"mov.u32 last, {(1 << SHIFTS[i]) - 1};",
        "setp.le.s32 more, reach, need;",
        "sub.s32 need, need, rest;",
        "@more bra found;",
    ]


def _look(i: int, steps: int) -> list[str]:
    """A step asks 32 threads whether their numbers are above `low`, and equal. A thread keeps the answers of one step.

    So it has the answers of 32 numbers that follow one another, their first number's place being `place`.
    """

    def visit(j: int) -> list[str]:
        lines = [f"setp.eq.s32 mine, turn, {j};"]
        for order, name in (("gt", "above"), ("eq", "equal")):
            lines += [f"setp.{order}.s32 flag, number{j}, low;", "vote.sync.ballot.b32 ballot, flag, 0xffffffff;"]
            lines += [f"@mine mov.u32 {name}{i}, ballot;"]
        return lines

    lines = [f"mov.u32 above{i}, 0;", f"mov.u32 equal{i}, 0;", *_walk(f"look{i}", steps, visit)]
    lines += [f"popc.b32 some, equal{i};", f"popc.b32 both{i}, above{i};"]
    return [*lines, f"mad.lo.u32 both{i}, some, 65536, both{i};", f"add.s32 base, base, both{i};"]


def _share(k: int) -> list[str]:
    """The warps tell each other their counts; `ties` is for how many equal ones there is room."""
    shared = 4 * len(SHIFTS) * ROW
    lines = [
        "redux.sync.add.s32 some, base, 0xffffffff;",
        "mad.lo.u32 to, warp, 4, $2;",
        f"st.shared.b32 [to + {shared}], some;",
    ]
    lines += [f"bar.sync 1, {THREADS};", "mov.u32 base, 0;", "mov.u32 all, 0;"]
    for warp in range(WARPS):
        lines += [f"ld.shared.b32 some, [$2 + {shared + 4 * warp}];", "add.s32 all, all, some;"]
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
        "setp.ne.s32 flag, some, 0;",
        "@flag add.s32 left, left, -1;",
        "selp.b32 some, left, 0, flag;",
        "setp.ge.and.s32 more, some, 0, more;",
        "@more st.shared.b32 [to], index;",
        "@more add.s32 to, to, 4;",
        "setp.ne.s32 more, both, 0;",
        f"@more bra write{i};",
        f"add.s32 place, place, {LANES * LANES};",
    ]
