"""Shared key-value attention in three branches, merged with the sink by log-sum-exp (law 1 of the house).

An entry is key and value at once, and all heads share it. Every branch returns its own normalised output
[B, S, H, K] and the log-sum-exp of its scores [B, S, H] (-inf where it sees nothing), so branches computed apart, over
a window, chosen entries, all entries, or another device's entries, combine exactly.
"""

from dsv4_jax.kernels.sparse_attention.merge import merge
from dsv4_jax.kernels.sparse_attention.xla import gather_attention, range_attention, window_attention

__all__ = ["gather_attention", "merge", "range_attention", "window_attention"]
