"""Shared key-value attention in three branches, merged with the sink by log-sum-exp (law 1 of the house).

An entry is key and value at once, and all heads share it. Every branch returns its own normalised output
[B, S, H, K] and the log-sum-exp of its scores [B, S, H] (-inf where it sees nothing), so branches computed apart, over
a window, chosen entries, all entries, or another device's entries, combine exactly.
"""

import jax

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.sparse_attention import entries as rows
from dsv4_jax.kernels.sparse_attention import paged
from dsv4_jax.kernels.sparse_attention.entries import window_attention
from dsv4_jax.kernels.sparse_attention.merge import merge
from dsv4_jax.kernels.sparse_attention.xla import Branch

__all__ = ["gather_attention", "merge", "range_attention", "window_attention"]


def range_attention(q: jax.Array, entries: jax.Array | Pages, lo: jax.Array, hi: jax.Array, scale: float) -> Branch:
    """Query t attends the entries lo_t <= i < hi_t of its row, or of a cache's pages, where sequences begin at 0."""
    if isinstance(entries, Pages):
        return paged.range_attention(q, entries, hi, scale)
    return rows.range_attention(q, entries, lo, hi, scale)


def gather_attention(q: jax.Array, entries: jax.Array | Pages, indices: jax.Array, scale: float) -> Branch:
    """Query t attends the entries `indices[t]` of its row, or of a cache's pages; -1 is unused, others occur once."""
    if isinstance(entries, Pages):
        return paged.gather_attention(q, entries, indices, scale)
    return rows.gather_attention(q, entries, indices, scale)
