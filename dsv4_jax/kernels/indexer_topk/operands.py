"""What an index score is made of."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.pages import Pages
from dsv4_jax.quantization import rounding


class Search(NamedTuple):
    """How the best entries are looked for; static. The default is exact.

    bf16: scores are rounded to BF16 before they are compared (report: recall of the chosen entries 99.7%).
    candidates: in two levels. Of several entries that lie apart by equal steps only the best becomes a candidate, and
        the best candidates are chosen. A query has at least so many of them for each place, c. Then of k entries at
        most about k / 2c are missed because a better one was among their rivals, if the best lie scattered at random.
        0: exact. Backends that gain nothing by it stay exact.
    """

    bf16: bool = False
    candidates: int = 0

    def levels(self, entries: int, k: int) -> int:
        """How often the candidates of `entries` can be halved, and once more for no time."""
        return max((entries // (self.candidates * k)).bit_length(), 1) if self.candidates else 1


EXACT = Search()
CANDIDATES = 16  # for each place, where attention chooses approximately


class PagedOperands(NamedTuple):
    """The operands with a cache: queries [B, S, Hi, di], the pages of all keys, weights [B, S, Hi]."""

    queries: jax.Array
    pages: Pages
    weights: jax.Array


class IndexOperands(NamedTuple):
    """queries [B, S, Hi, di], keys [B, T, di], weights [B, S, Hi] (scales included, float32)."""

    queries: jax.Array
    keys: jax.Array
    weights: jax.Array

    def scores(self, bf16: bool = False) -> jax.Array:
        """`score[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])`: [B, S, T] float32 (keys may also be [B, S, T, di]).

        Products of FP4 numbers are exact in BF16, and so are their sums in float32 while the largest and the smallest
        scale of a product's blocks of 32 are at most 2^9 apart.
        """
        keys = "bqnd" if self.keys.ndim == 4 else "bnd"
        products = jnp.einsum(f"bqhd,{keys}->bqhn", self.queries, self.keys, preferred_element_type=jnp.float32)
        scores = jnp.einsum("bqhn,bqh->bqn", jax.nn.relu(products), self.weights, precision=jax.lax.Precision.HIGHEST)
        return rounding.bf16(scores) if bf16 else scores
