"""The vocabulary of a layer plan: kinds of attention and routing, one block's spec, and repeated segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal[
    "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention", "gqa", "mla", "mla_sparse"
]
SLIDING: AttentionKind = "sliding_attention"
CSA: AttentionKind = "compressed_sparse_attention"
HCA: AttentionKind = "heavily_compressed_attention"
GQA: AttentionKind = "gqa"  # these three are no V4: see `baseline.py`
MLA: AttentionKind = "mla"
MLA_SPARSE: AttentionKind = "mla_sparse"
BASELINE_KINDS: tuple[AttentionKind, ...] = (GQA, MLA, MLA_SPARSE)
ATTENTION_KINDS: tuple[AttentionKind, ...] = (SLIDING, CSA, HCA, *BASELINE_KINDS)
RELEASED_KINDS: dict[int, AttentionKind] = {0: SLIDING, 4: CSA, 128: HCA}

RoutingKind = Literal["hash_moe", "moe"]
ROUTING_KINDS: tuple[RoutingKind, ...] = ("hash_moe", "moe")


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one block from another; equal specs share one compiled body."""

    attention: AttentionKind
    ratio: int  # tokens per compressed entry, 0 where nothing is compressed
    routing: RoutingKind

    @property
    def compression(self) -> tuple[AttentionKind, int]:
        """What its compressed entries lie by: CSA's blocks overlap and HCA's do not, at whatever ratio."""
        return self.attention, self.ratio

    def __str__(self) -> str:
        """Short form for tables: `CSA/4`, `HCA/128 hash`."""
        names = {SLIDING: "SWA", CSA: f"CSA/{self.ratio}", HCA: f"HCA/{self.ratio}"}
        name = names.get(self.attention, self.attention)
        return name + (" hash" if self.routing == "hash_moe" else "")


@dataclass(frozen=True)
class Segment:
    """`repeats` copies of a `unit` of blocks; the unit is traced once and scanned."""

    unit: tuple[LayerSpec, ...]
    repeats: int

    def __str__(self) -> str:
        """Short form for tables: `29 x (HCA/128, CSA/4)`."""
        return f"{self.repeats} x ({', '.join(map(str, self.unit))})"


def find_segments(layers: Sequence[LayerSpec]) -> tuple[Segment, ...]:
    """Split a layer plan into repeated units so that the fewest blocks are traced (ties: the fewest segments)."""
    best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())]
    for end in range(1, len(layers) + 1):
        options = []
        for unit_size in range(1, end + 1):
            unit, repeats = tuple(layers[end - unit_size : end]), 1
            while True:
                start = end - unit_size * repeats
                if start < 0 or tuple(layers[start : start + unit_size]) != unit:
                    break
                cost, count, before = best[start]
                options.append((cost + unit_size, count + 1, (*before, Segment(unit, repeats))))
                repeats += 1
        best.append(min(options, key=lambda option: option[:2]))
    return best[-1][2]
