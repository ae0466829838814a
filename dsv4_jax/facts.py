"""What a parameter says of itself: logical axes, which optimizer moves it, and its precision role.

The optimizer, the sharding rules and the quantisation hooks read these facts instead of matching names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["muon", "adamw", "none"]


@dataclass(frozen=True)
class Fact:
    """Facts of one array. Not a pytree node: a tree of facts has the structure of the tree of arrays.

    Attributes:
        axes: one logical axis name per dimension ("embed", "experts", "mlp", ...); `sharding/` maps them to mesh axes.
        optimizer: "muon" (the last two dimensions are the matrix, all before are independent matrices), "adamw", or
            "none" for arrays that no gradient moves (router bias, hash tables).
        role: where the array sits ("attn", "compressor", "indexer", "experts", "router", "hc", "norm", "embed", "head",
            "mtp"); used to freeze groups and by precision policies.
    """

    axes: tuple[str, ...]
    optimizer: Optimizer
    role: str
