"""Top-k on NVIDIA GPUs with warpgroup products (Hopper), through Pallas' Mosaic GPU backend.

Queries go in chunks. A kernel (`gpu_scores.py`) multiplies keys with all heads of a few queries, weights and adds up
the heads in registers, and writes the scores of a chunk, SCORES at the most. Another one (`gpu_best.py`) holds the
scores of a query in registers and finds the best by counting. It has room for 16,384. Where there are more, entries
that follow one another form groups: the k groups with the best of their scores hold the k best entries, of equal ones
the earlier. So the kernel chooses k groups first, then among their entries.

The kernels are imported where they are traced: not every jaxlib has Mosaic GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.kernels.chunks import chunk_length, join, split
from dsv4_jax.kernels.indexer_topk.operands import EXACT, IndexOperands, Search
from dsv4_jax.kernels.platforms import is_hopper
from dsv4_jax.quantization import rounding

ROWS = 64  # entries of a warpgroup's product
TILE = 2 * ROWS  # keys that arrive together
COLUMNS = 256  # of a product: the heads of a few queries
SCORES = 1 << 24  # of a chunk, 64 MiB
PROCESSORS = 132  # of an H100 or H200
PROGRAMS = 4 * PROCESSORS  # of a chunk, since queries do not see equally many entries
PART = 16  # tiles of a program at least, so that fetching its queries is little beside
WHOLE = 256  # the kernel that chooses takes multiples of so many numbers
MOST = 1 << 14  # and at most so many
LARGEST_GROUP = 128  # entries
MOST_CHOSEN = 1 << 11  # for which groups still have 8 entries


def supports(operands: IndexOperands, k: int) -> bool:
    """Whether the kernels take these operands and the program is compiled for a GPU that has their instructions."""
    *_, heads, width = operands.queries.shape
    shaped = heads % 8 == 0 and COLUMNS % heads == 0 and width in (64, 128) and k <= MOST_CHOSEN
    return shaped and operands.queries.dtype == operands.keys.dtype == jnp.bfloat16 and is_hopper()


def index_topk(
    operands: IndexOperands, lo: jax.Array, hi: jax.Array, k: int, search: Search = EXACT, interpret: Any = False
) -> jax.Array:
    """The k best entries lo <= i < hi of each query, ties to the earlier one; see `xla.index_topk`.

    Args:
        operands: that `supports` takes.
        lo: first visible entry [B, S].
        hi: one past the last visible entry [B, S].
        k: how many to choose.
        search: exact also where it need not be: looking for the best costs little beside their scores.
        interpret: False on a GPU; the parameters of Pallas' GPU interpreter elsewhere.

    Returns:
        int32 [B, S, min(k, T)], in the order of their positions, then -1 where fewer are visible.
    """
    from dsv4_jax.kernels.indexer_topk.gpu_scores import scores

    (batch, length), (entries, heads) = lo.shape, (operands.keys.shape[1], operands.queries.shape[2])
    keys = jnp.pad(operands.keys, ((0, 0), (0, -entries % WHOLE), (0, 0)))
    k, group = min(k, entries), COLUMNS // heads

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        queries, weights, lo, hi = args
        first, end = parts_of(*tiles_seen(lo.reshape(batch, -1, group), hi.reshape(batch, -1, group)), keys.shape[1])
        numbers = scores(IndexOperands(queries, keys, weights), first, end, interpret)
        numbers = rounding.bf16(numbers) if search.bf16 else numbers
        flat = numbers.reshape(-1, keys.shape[1]), lo.reshape(-1), hi.reshape(-1)
        return places(*flat, k, interpret).reshape(*lo.shape, k)

    chunk = chunk_length(length, batch * keys.shape[1], group, most=SCORES)
    chunks = split((operands.queries, operands.weights, lo, jnp.minimum(hi, entries)), chunk)
    return join(jax.lax.map(one, chunks), length)


def tiles_seen(lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first tile of keys that a group of queries sees, and one past the last; [B, groups, queries] each."""
    sees = lo < hi
    first = jnp.where(sees, lo, jnp.iinfo(jnp.int32).max).min(-1) // TILE
    end = -(-jnp.where(sees, hi, 0).max(-1) // TILE)
    return jnp.minimum(first, end).astype(jnp.int32), end.astype(jnp.int32)


def parts_of(first: jax.Array, end: jax.Array, entries: int) -> tuple[jax.Array, jax.Array]:
    """Tiles [B, groups] in parts [parts, B, groups], as equal as can be; as many as programs are wanted."""
    parts = max(1, min(PROGRAMS // first.size, entries // (TILE * PART)))
    each = -(-(end - first) // parts)
    begin = first + each * jnp.arange(parts, dtype=jnp.int32)[:, None, None]
    return begin, jnp.minimum(begin + each, end)


def places(numbers: jax.Array, lo: jax.Array, hi: jax.Array, k: int, interpret: Any) -> jax.Array:
    """Where the k largest numbers lo <= i < hi are; see `gpu_best.best`, for any multiple of WHOLE numbers."""
    from dsv4_jax.kernels.indexer_topk.gpu_best import best

    rows, count = numbers.shape
    if count <= MOST:
        return best(numbers, lo, hi, k, interpret)
    size = min(1 << (MOST // k).bit_length() - 1, LARGEST_GROUP)
    of_group = jnp.arange(size, dtype=jnp.int32)

    def visible(index: jax.Array, numbers: jax.Array) -> jax.Array:
        seen = (index >= lo[:, None, None]) & (index < hi[:, None, None])
        return jnp.where(seen, numbers, -jnp.inf)

    groups = numbers.reshape(rows, -1, size)
    first = jnp.arange(groups.shape[1], dtype=jnp.int32)[:, None] * size
    tops = _whole(visible(first + of_group, groups).max(-1))
    chosen = places(tops, jnp.zeros_like(lo), jnp.full_like(hi, tops.shape[1]), k, interpret)[..., None]
    index = jnp.where(chosen < 0, -1, chosen * size + of_group)
    candidates = visible(index, jnp.take_along_axis(groups, jnp.maximum(chosen, 0), axis=1))
    candidates = _whole(jnp.where(chosen < 0, -jnp.inf, candidates).reshape(rows, -1))
    at = best(candidates, jnp.zeros_like(lo), jnp.full_like(hi, candidates.shape[1]), k, interpret)
    found = jnp.take_along_axis(index.reshape(rows, -1), jnp.maximum(at, 0), axis=1)
    return jnp.where(at < 0, -1, found)


def _whole(numbers: jax.Array) -> jax.Array:
    return jnp.pad(numbers, ((0, 0), (0, -numbers.shape[1] % WHOLE)), constant_values=-jnp.inf)
