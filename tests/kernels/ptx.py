"""PTX carried out for all threads of a warpgroup at once; Pallas' interpreter runs none.

Threads branch together, but for loops that some leave earlier: those wait behind them.
"""

import re

import ml_dtypes
import numpy as np

THREADS = 128
BINARY = {
    "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "shr.u32": np.right_shift,
    "shl.b32": lambda number, places: number << places & 0xFFFFFFFF, "max.s32": np.maximum, "add.s32": np.add,
    "add.u32": np.add, "mul.f32": np.multiply, "setp.ge.s32": np.greater_equal, "setp.lt.s32": np.less,
    "div.u32": np.floor_divide, "rem.u32": np.remainder, "sub.s32": np.subtract, "min.s32": np.minimum,
    "setp.gt.s32": np.greater, "setp.eq.s32": np.equal, "setp.ne.s32": np.not_equal,
    "setp.le.s32": np.less_equal, "setp.le.u32": np.less_equal, "sub.u32": lambda a, b: a - b & 0xFFFFFFFF,
}  # fmt: skip


class Machine:
    """Registers of 128 threads, shared memory, and 2^20-aligned global arrays.

    Attributes:
        shared: bytes.
        written: how often each byte of shared memory was written.
        bank_conflicts: how many more times shared memory was read than without.
        registers: of all threads, by name; `$0`, `$1`, .. among them.
        arrays: the bytes of each.
    """

    thread = np.arange(THREADS) + 2 * THREADS

    def __init__(self, arrays, shared, operands):
        """`shared` is how many bytes there are or the bytes; of `operands` None is the next array's address."""
        self.arrays = [np.ascontiguousarray(x).view(np.uint8).reshape(-1) for x in arrays]
        self.shared = np.zeros(shared, np.uint8) if isinstance(shared, int) else shared
        self.written, self.bank_conflicts = np.zeros(self.shared.size, int), 0
        addresses = (np.full(THREADS, (i + 1) << 20, np.int64) for i in range(len(arrays)))
        given = (next(addresses) if x is None else x for x in operands)
        self.registers = {f"${i}": np.broadcast_to(x, THREADS) for i, x in enumerate(given)}

    def run(self, text):
        lines = [line.strip().rstrip(";") for line in text.splitlines()]
        at, looping = 0, np.ones(THREADS, bool)
        while at < len(lines):
            line, at = lines[at], at + 1
            guard, line = line[1:].split(" ", 1) if line.startswith("@") else (None, line)
            if not line or line in "{}" or line.startswith(".reg") or line.endswith(":"):
                continue
            name, _, rest = line.partition(" ")
            active = looping if guard is None else looping & self.value(guard)
            if name == "bra":
                target = lines.index(f"{rest}:")
                assert active.all() == active.any() or target < at
                at, looping = (target, active) if active.any() else (at, np.ones(THREADS, bool))
            else:
                args = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)]
                assert looping.all() or not name.startswith(("vote", "shfl", "redux", "bar"))
                before = self.registers.get(args[0]) if args else None
                self.step(name, args, active)
                if before is not None:
                    self.registers[args[0]] = np.where(active, self.registers[args[0]], before)
        return self

    def step(self, name, args, active):
        to, *rest = args or [None]
        match name:
            case "cvta.to.global.u64":
                self.registers[to] = self.value(rest[0])
            case _ if name in BINARY:
                self.registers[to] = BINARY[name](*map(self.value, rest))
            case "prmt.b32":
                low, high, order = map(self.value, rest)
                choices = np.concatenate([x.astype(np.uint32)[:, None].view(np.uint8) for x in (low, high)], 1)
                nibbles = order[:, None] >> 4 * np.arange(4) & 15
                chosen = np.take_along_axis(choices, nibbles & 7, 1)
                signs = np.where(chosen > 127, 255, 0).astype(np.uint8)
                found = np.ascontiguousarray(np.where(nibbles > 7, signs, chosen))
                self.registers[to] = found.view(np.uint32)[:, 0].astype(np.int64)
            case "mul.rn.bf16x2":
                a, b = (self.bytes_of(x, np.uint32).view(ml_dtypes.bfloat16) for x in rest)
                self.registers[to] = (a * b).view(np.uint32)[:, 0].astype(np.int64)
            case "mad.lo.u32" | "mad.wide.u32":
                a, b, c = map(self.value, rest)
                self.registers[to] = a * b + c
            case "selp.b32":
                a, b, chosen = map(self.value, rest)
                self.registers[to] = np.where(chosen, a, b)
            case "setp.lt.and.s32" | "setp.ge.and.s32":
                a, b, both = map(self.value, rest)
                self.registers[to] = BINARY[name.replace(".and", "")](a, b) & both
            case "mov.u32" | "mov.s32":
                self.registers[to] = self.value(rest[0])
            case "popc.b32":
                self.registers[to] = np.bitwise_count(self.value(rest[0]))
            case "vote.sync.ballot.b32":
                votes = self.value(rest[0]).reshape(-1, 32)
                self.registers[to] = (votes << np.arange(32)).sum(1).repeat(32)
            case "red.shared.add.u32":
                np.add.at(self.shared.view(np.uint32), self.address(to, 4)[active] // 4, self.value(rest[0])[active])
            case "redux.sync.add.s32" | "redux.sync.max.s32":
                warps = self.value(rest[0]).reshape(-1, 32)
                self.registers[to] = (warps.sum(1) if "add" in name else warps.max(1)).repeat(32)
            case "shfl.sync.up.b32" | "shfl.sync.down.b32":
                to, there = to.split("|")
                source = np.arange(THREADS) + int(rest[1]) * (-1 if "up" in name else 1)
                self.registers[there] = source // 32 == np.arange(THREADS) // 32
                self.registers[to] = self.value(rest[0])[np.where(self.registers[there], source, np.arange(THREADS))]
            case "shfl.sync.idx.b32":
                self.registers[to] = self.value(rest[0]).reshape(-1, 32)[:, int(rest[1])].repeat(32)
            case "ld.shared.b32" | "ld.shared.s32":
                words = self.address(rest[0], 4) // 4
                kind = np.int32 if name.endswith("s32") else np.uint32
                self.registers[to] = self.shared.view(kind)[words].astype(np.int64)
                for warp in words.reshape(-1, 32):  # of 32 banks each gives one word at a time
                    self.bank_conflicts += np.bincount(np.unique(warp) % 32).max() - 1
            case "ld.shared.v4.b32":
                words = self.address(rest[0], 16)[:, None] // 4 + np.arange(4)
                for register, found in zip(self.names(to), self.shared.view(np.uint32)[words].T, strict=True):
                    self.registers[register] = found.astype(np.int64)
                for eight in words.reshape(-1, 32):  # threads whose 128 bytes come together
                    self.bank_conflicts += np.bincount(np.unique(eight) % 32).max() - 1
            case "ld.shared.u8":
                address = self.address(rest[0], 1)
                self.registers[to] = self.shared[address].astype(np.int64)
                for warp in address.reshape(-1, 32) // 4:
                    self.bank_conflicts += np.bincount(np.unique(warp) % 32).max() - 1
            case "ld.global.b32":
                self.registers[to] = self.read(rest[0], 4).view(np.int32)[:, 0].astype(np.int64)
            case "ld.global.u8":
                self.registers[to] = self.read(rest[0], 1)[:, 0].astype(np.int64)
            case "ld.global.v2.b32":
                words = self.read(rest[0], 8).view(np.uint32).astype(np.int64)
                for register, word in zip(self.names(to), words.T, strict=True):
                    self.registers[register] = word
            case "mov.b32" if to.startswith("{"):
                low, high = self.names(to)
                word = self.value(rest[0])
                self.registers[low], self.registers[high] = word & 0xFFFF, word >> 16
            case "mov.b32":
                self.registers[to] = self.value(rest[0]).astype(np.uint32).view(np.float32)
            case "cvt.rn.f16x2.e4m3x2":
                numbers = self.bytes_of(rest[0], np.uint16).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
                self.registers[to] = numbers.view(np.uint32)[:, 0].astype(np.int64)
            case "cvt.f32.f16":
                self.registers[to] = self.bytes_of(rest[0], np.uint16).view(np.float16)[:, 0].astype(np.float32)
            case "cvt.rn.bf16x2.f32":
                high, low = (self.value(x).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int64) for x in rest)
                self.registers[to] = high << 16 | low
            case "st.shared.b32":
                words = self.value(rest[0]).astype(np.uint32)[:, None].view(np.uint8)
                self.write(to, words, active)
            case "st.shared.v4.b32":
                words = np.stack([self.value(x) for x in self.names(rest[0])], 1).astype(np.uint32)
                self.write(to, words.view(np.uint8))
            case "st.global.v2.b32" | "st.global.v4.f32":
                dtype = np.uint32 if name.endswith("b32") else np.float32
                words = np.stack([self.value(x) for x in self.names(rest[0])], 1).astype(dtype).view(np.uint8)
                for address, row in zip(self.address(to, words.shape[1]), words, strict=True):
                    offset = address & ((1 << 20) - 1)
                    self.arrays[(address >> 20) - 1][offset : offset + row.size] = row
            case "cp.async.cg.shared.global" | "cp.async.ca.shared.global":
                source, size, *count = rest  # bytes beyond the count are zero
                assert size == "16" or name == "cp.async.ca.shared.global"
                wanted = active & (self.value(count[0]) > 0) if count else active
                data = self.read(source, int(size), wanted)
                self.write(to, np.where(wanted[:, None], data, 0).astype(np.uint8), active)
            case "cp.async.wait_all" | "cp.async.wait_group" | "cp.async.commit_group" | "bar.warp.sync" | "bar.sync":
                pass
            case _:
                raise NotImplementedError(name)

    def value(self, text):
        return self.registers[text] if text in self.registers else np.full(THREADS, int(text, 0))

    def bytes_of(self, text, dtype):
        return self.value(text).astype(dtype)[:, None].view(np.uint8)

    @staticmethod
    def names(text):
        return [name.strip() for name in text.strip("{}").split(",")]

    def address(self, text, alignment):
        base, _, offset = text.strip("[]").partition(" + ")
        address = self.value(base) + int(offset or 0)
        assert (address % alignment == 0).all()
        return address

    def read(self, text, count, used=None):
        address = self.address(text, count)
        address = address if used is None else np.where(used, address, 1 << 20)
        array, offset = (address >> 20) - 1, address & ((1 << 20) - 1)
        return np.stack([self.arrays[a][o : o + count] for a, o in zip(array, offset, strict=True)])

    def write(self, text, data, active=None):
        size = data.shape[1]
        for thread, address in enumerate(self.address(text, size)):
            if active is None or active[thread]:
                self.shared[address : address + size] = data[thread]
                self.written[address : address + size] += 1
