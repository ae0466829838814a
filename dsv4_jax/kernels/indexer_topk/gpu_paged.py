"""Top-k over the packed indexer keys in a cache's pages on NVIDIA GPUs with warpgroup products (Hopper): decoding.

Few queries of each sequence, and many keys: a kernel (`gpu_paged_scores.py`) reads every key once, as it is stored, and
writes its scores; then the best are chosen as in `gpu.py`. Programs share the tiles of keys that all sequences really
have, equally and in their order: one long sequence fills a GPU as well as many short ones.

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.gpu import MOST_CHOSEN, ROWS, SCORES, WHOLE, places
from dsv4_jax.kernels.indexer_topk.operands import EXACT, PagedOperands, Search
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.platforms import is_hopper
from dsv4_jax.kernels.pools import ByPart
from dsv4_jax.quantization import rounding
from dsv4_jax.quantization.storage import Fp4

WIDTH = 128  # numbers of a key
FEW = 4  # queries of a sequence, whose heads' weights still fit the registers
BLOCKS = (16, 32, 64)  # keys of one, of which a warp has 16


def supports(operands: PagedOperands, k: int) -> bool:
    """Whether the kernels take these operands and the program is compiled for a GPU that has their instructions."""
    (queries, pages, _), (_, length, heads, _) = operands, operands.queries.shape
    if not readable(pages):
        return False
    shaped = length <= FEW and heads % 8 == 0 and heads <= ROWS and k <= MOST_CHOSEN and length * wide(pages) <= SCORES
    return shaped and queries.dtype == jnp.bfloat16 and is_hopper()


def readable(pages: Pages) -> bool:
    """Whether the keys lie as kernels read them: packed FP4 of the released width, part by part."""
    if not (isinstance(pages.pool, ByPart) and pages.storage == Fp4(WIDTH) and pages.per_block in BLOCKS):
        return False
    return math.prod(pages.store["packed"].shape[:3]) < 2**31


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
        queries: that `supports` takes, with `pages`: [B, S, Hi, di].
        pages: the indexer keys.
        weights: of the heads, [B, S, Hi].
        hi: one past the last visible entry, [B, S].
        k: how many to choose, at most the pages' capacity.
        search: exact also where it need not be.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        int32 [B, S, k], in the order of their positions, then -1 where fewer are visible.
    """
    from dsv4_jax.kernels.indexer_topk.gpu_paged_scores import scores

    score = partial(scores, pages=pages, wide=wide(pages), interpret=interpret)
    rows = queries, weights, pages.tables
    return choose(score, rows, jnp.clip(hi, 0, pages.capacity), k, wide(pages), search, interpret)


def choose(
    scores: Callable[..., jax.Array],
    rows: tuple[jax.Array, ...],
    hi: jax.Array,
    k: int,
    wide: int,
    search: Search,
    interpret: Any,
) -> jax.Array:
    """The k best of the first `hi` scores of each query, a few rows at a time.

    Args:
        scores: of rows and of how many entries they see, int32 [b]: [b, S, wide].
        rows: what scores are computed from, [B, ..] each.
        hi: [B, S].
        k: how many to choose.
        wide: a multiple of WHOLE.
        search: see `index_topk`.
        interpret: see `index_topk`.

    Returns:
        int32 [B, S, k], as `index_topk`.
    """
    batch, length = hi.shape

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        *rows, hi = (x[0] for x in args)
        numbers = scores(*rows, hi.max(1))
        numbers = rounding.bf16(numbers) if search.bf16 else numbers
        hi = hi.reshape(-1)
        return places(numbers.reshape(len(hi), -1), jnp.zeros_like(hi), hi, k, interpret).reshape(1, -1, length, k)

    chunk = chunk_length(batch, length * wide, most=SCORES)
    return join(jax.lax.map(one, split(jax.tree.map(lambda x: x[None], (*rows, hi)), chunk)), batch)[0]


def wide(pages: Pages) -> int:
    """Scores of a query, as many as the kernel that chooses takes."""
    return -(-pages.capacity // WHOLE) * WHOLE
