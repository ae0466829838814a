"""Top-k over the packed indexer keys in a cache's pages on Blackwell, whose tensor cores multiply FP4 (mxf4).

Scores come from a kernel of its own (`gpu_blackwell_scores.py`), which multiplies keys as they are stored with queries
in the same format; then the best are chosen as on Hopper (`gpu_paged.py`). The queries of a prompt go in groups of
four, each of which reads its keys.

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import join, split
from dsv4_jax.kernels.indexer_topk import gpu_paged
from dsv4_jax.kernels.indexer_topk.gpu import MOST_CHOSEN, SCORES
from dsv4_jax.kernels.indexer_topk.operands import EXACT, PagedOperands, Search
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import is_blackwell

GROUP = 4  # queries that share a tile of keys


def supports(operands: PagedOperands, k: int) -> bool:
    """Whether the kernels take these operands and are asked for, in a program for a GPU that multiplies FP4."""
    queries, pages, _ = operands
    if not gpu_paged.readable(pages):
        return False
    shaped = queries.shape[2] in (32, 64) and k <= MOST_CHOSEN and GROUP * gpu_paged.wide(pages) <= SCORES
    return shaped and queries.dtype == jnp.bfloat16 and is_blackwell()


def index_topk(
    queries: jax.Array,
    pages: Pages,
    weights: jax.Array,
    hi: jax.Array,
    k: int,
    search: Search = EXACT,
    interpret: Any = False,
) -> jax.Array:
    """The k best entries i < hi_t of each query's own sequence, of equal ones the earlier; see `paged.index_topk`.

    Args:
        queries: that `supports` takes, with `pages`: [B, S, Hi, di]. They are rounded to FP4, which changes none that
            have been: what a cache that packs its keys goes with.
        pages: the indexer keys.
        weights: of the heads, [B, S, Hi].
        hi: one past the last visible entry, [B, S].
        k: how many to choose, at most the pages' capacity.
        search: exact also where it need not be.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        int32 [B, S, k], in the order of their positions, then -1 where fewer are visible.
    """
    from dsv4_jax.kernels.indexer_topk.gpu_blackwell_scores import scores

    batch, length = hi.shape
    group = min(1 << (length - 1).bit_length(), GROUP)
    groups = split((queries, weights, jnp.clip(hi, 0, pages.capacity)), group)
    count = len(groups[0])
    queries, weights, hi = (x.reshape(-1, *x.shape[2:]) for x in groups)
    sequences = jnp.tile(jnp.arange(batch, dtype=jnp.int32), count)
    score = partial(scores, pages=pages, wide=gpu_paged.wide(pages), interpret=interpret)
    found = gpu_paged.choose(score, (queries, weights, sequences), hi, k, gpu_paged.wide(pages), search, interpret)
    return join(found.reshape(count, batch, group, k), length)
