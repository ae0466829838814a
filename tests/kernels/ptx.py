"""PTX without branches, carried out for all threads of a warpgroup at once; Pallas' interpreter runs none."""

import re

import ml_dtypes
import numpy as np

THREADS = 128
BINARY = {
    "and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor, "shr.u32": np.right_shift, "shl.b32": np.left_shift,
    "max.s32": np.maximum, "add.s32": np.add, "mul.f32": np.multiply, "setp.ge.s32": np.greater_equal,
    "setp.lt.s32": np.less, "div.u32": np.floor_divide, "rem.u32": np.remainder,
}  # fmt: skip


class Machine:
    """Registers of 128 threads, `shared` memory, and `memory` of 2^20-aligned global arrays.

    Operands are the place of the tile, the first array, the thread, the other arrays, and numbers.

    Attributes:
        shared: bytes.
        written: how often each byte of shared memory was written.
    """

    def __init__(self, arrays, shared_bytes, *numbers):
        self.arrays = [np.ascontiguousarray(x).view(np.uint8).reshape(-1) for x in arrays]
        self.shared, self.written = np.zeros(shared_bytes, np.uint8), np.zeros(shared_bytes, int)
        addresses = [np.full(THREADS, (i + 1) << 20, np.int64) for i in range(len(arrays))]
        index, *stored = addresses
        self.operands = [np.zeros(THREADS, np.int64), index, np.arange(THREADS) + 2 * THREADS, *stored]
        self.operands += [np.full(THREADS, number, np.int64) for number in numbers]
        self.registers = {}

    def run(self, text):
        for line in text.splitlines():
            line = line.strip().rstrip(";")
            if line and line not in "{}" and not line.startswith(".reg"):
                name, _, rest = line.partition(" ")
                self.step(name, [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)])
        return self

    def step(self, name, args):
        to, *rest = args or [None]
        match name:
            case "cvta.to.global.u64":
                self.registers[to] = self.value(rest[0])
            case _ if name in BINARY:
                self.registers[to] = BINARY[name](*map(self.value, rest))
            case "mad.lo.u32" | "mad.wide.u32":
                a, b, c = map(self.value, rest)
                self.registers[to] = a * b + c
            case "selp.b32":
                a, b, chosen = map(self.value, rest)
                self.registers[to] = np.where(chosen, a, b)
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
            case "st.shared.v4.b32":
                words = np.stack([self.value(x) for x in self.names(rest[0])], 1).astype(np.uint32)
                self.write(to, words.view(np.uint8))
            case "cp.async.cg.shared.global":
                source, size, read = rest
                assert size == "16"
                data = self.read(source, 16, self.value(read) > 0)
                self.write(to, np.where((self.value(read) > 0)[:, None], data, 0).astype(np.uint8))
            case "cp.async.wait_all":
                pass
            case _:
                raise NotImplementedError(name)

    def value(self, text):
        if text.startswith("$"):
            return self.operands[int(text[1:])]
        return self.registers[text] if text in self.registers else np.full(THREADS, int(text))

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

    def write(self, text, data):
        for address, row in zip(self.address(text, 16), data, strict=True):
            self.shared[address : address + 16] = row
            self.written[address : address + 16] += 1
