"""Who may look inside a forward. By default nobody does, and then nothing of this is in the compiled program.

`analysis/observing.py` implements the questions. An observer is given what a layer has computed and adds to its record;
nothing that it does reaches the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:
    from dsv4_jax.kernels.indexer_topk import IndexOperands, PagedOperands
    from dsv4_jax.kernels.pages import Pages
    from dsv4_jax.layers.attention import Attention
    from dsv4_jax.layers.hyper_connections import Maps
    from dsv4_jax.layers.layout import Blocks, Layout
    from dsv4_jax.layers.moe import MoE, Routing
    from dsv4_jax.segments import Options


class Attended(NamedTuple):
    """What one attention layer computed with.

    layer: its configuration and weights.
    layout, blocks: of the tokens at hand, which may be a part of their rows; no blocks without compressed entries.
    q: queries [B, S, H, K].
    kv: one entry per token [B, S, K], or [B, W + S, K] with those of earlier tokens in front.
    entries: compressed entries [B, T, K], or the pages that hold them.
    choice: the entries that were chosen [B, S, k], -1 unused; None where all visible ones were attended.
    operands: of the index scores, where they were needed.
    branches: (output, log-sum-exp) of the window and of the compressed entries.
    lse: the joint log-sum-exp [B, S, H], sink included.
    """

    layer: Attention
    layout: Layout
    blocks: Blocks | None
    q: jax.Array
    kv: jax.Array
    entries: jax.Array | Pages | None
    choice: jax.Array | None
    operands: IndexOperands | PagedOperands | None
    branches: Sequence[tuple[jax.Array, jax.Array]]
    lse: jax.Array


class Passed(NamedTuple):
    """What one block computed with.

    ffn: the mixture of experts.
    x: its input [B, S, D].
    routing: where the tokens went.
    maps: of the hyper-connections around attention and around the experts.
    attended: the record of the attention layer.
    options: of the forward.
    """

    ffn: MoE
    x: jax.Array
    routing: Routing
    maps: tuple[Maps, Maps]
    attended: dict[str, Any]
    options: Options


@dataclass(frozen=True)
class Observer:
    """Looks at nothing."""

    def attention(self, seen: Attended) -> dict[str, Any]:
        """What to add to an attention layer's record: arrays [B, ..] or [B, S, ..], whichever tokens are at hand."""
        del seen
        return {}

    def block(self, seen: Passed) -> dict[str, Any]:
        """What to add to a block's record."""
        del seen
        return {}


NOBODY = Observer()
