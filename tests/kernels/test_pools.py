"""Blocks as rows of words hold, bit for bit, what blocks of parts hold, wherever entries are written and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.kernels.pages import Pages
from dsv4_jax.kernels.pools import ByPart, InWords
from dsv4_jax.quantization.storage import Fp4, Fp8WithRope, Plain, cache_format

LAYERS, BLOCKS = 2, 5
ENTRY, KEY = Fp8WithRope(512, 64), Fp4(128)  # of the release
STORAGES = [ENTRY, KEY, Fp8WithRope(24, 8), Fp4(8), Plain(20, "float32"), Plain(7, "bfloat16"), Plain(512, "bfloat16")]


def filled(pool, seed):
    """Every entry of every block written, a sequence of blocks in some order, in parts of odd lengths."""
    rng = np.random.default_rng(seed)
    blocks, size = rng.permutation(BLOCKS), pool.per_block
    entries = jnp.asarray(rng.normal(size=(BLOCKS * size, pool.storage.width)), jnp.float32)
    encoded, store = pool.storage.encode(entries[None]), pool.zeros(LAYERS, BLOCKS)
    length = 2 * size + 1
    for start in range(0, len(entries), length):
        place = np.arange(start - 1, start + length)  # the first is not written
        known = np.clip(place, 0, len(entries) - 1)
        skip = (place < start) | (place >= len(entries))
        to = jnp.asarray(np.where(skip, BLOCKS, blocks[known // size]), jnp.int32)[None]
        part = {name: x[:, known] for name, x in encoded.items()}
        store = pool.write(store, part, jnp.int32(1), to, jnp.asarray(place % size, jnp.int32)[None])
    return store


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(STORAGES), st.sampled_from([1, 3, 8, 32]), st.integers(0, 99))
def test_words_hold_the_bits_of_parts(storage, per_block, seed):
    parts, words = (filled(kind(storage, per_block), seed) for kind in (ByPart, InWords))
    by_part, in_words = ByPart(storage, per_block), InWords(storage, per_block)
    blocks = jnp.asarray([[3, 0], [4, 4]], jnp.int32)
    for layer in (jnp.int32(0), jnp.int32(1)):
        same(by_part.read_blocks(parts, layer, blocks), in_words.read_blocks(words, layer, blocks))
        slots = jnp.asarray([[0, per_block - 1], [per_block // 2, 0]], jnp.int32)
        same(by_part.read(parts, layer, blocks, slots), in_words.read(words, layer, blocks, slots))


@pytest.mark.parametrize("kind", [ByPart, InWords])
def test_a_block_beyond_the_last_is_not_written(kind):
    pool = kind(ENTRY, 32)
    before = filled(pool, 3)
    encoded = ENTRY.encode(jnp.ones((1, 2, 512)))
    after = pool.write(before, encoded, jnp.int32(1), jnp.full((1, 2), BLOCKS, jnp.int32), jnp.zeros((1, 2), jnp.int32))
    same(before, after)


def test_what_a_block_weighs():
    """146 words of an entry lie in 128 + 32, 17 of an index key in 16 + 1; one entry a block takes whole rows."""
    entry, key, alone = InWords(ENTRY, 32), InWords(KEY, 32), InWords(ENTRY, 1)
    assert entry.pieces == [(0, 128, 0), (128, 32, 32)] and key.pieces == [(0, 16, 0), (16, 1, 4)]
    assert (entry.rows, key.rows, alone.rows) == (32 + 8, 4 + 1, 2)
    assert entry.zeros(1, 1)["words"].shape == (1, 1, 40, 128) and key.zeros(1, 1)["words"].shape == (1, 1, 640)
    stored = sum(x.nbytes for pool in (entry, key) for x in jax.tree.leaves(pool.zeros(1, 1)))
    assert stored / (32 * (583 + 68)) == pytest.approx(1.106, abs=1e-3)  # of the bytes that the format needs


def test_pages_find_their_entries():
    pool = InWords(ENTRY, 4)
    tables = jnp.asarray([[3, 0, 4], [1, 2, 2]], jnp.int32)
    pages = Pages(pool.zeros(LAYERS, BLOCKS), jnp.int32(1), tables, pool)
    entries = jax.random.normal(jax.random.key(0), (2, 8, 512))
    index = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, -1], [-1, -1, 0, 1, 2, 3, 4, 5]], jnp.int32)
    pages = pages.write(index, entries)
    rounded = ENTRY.decode(ENTRY.encode(entries), jnp.float32)
    got = pages.read_entries(jnp.maximum(index, 0), jnp.float32)
    seen = np.asarray(index) >= 0
    np.testing.assert_array_equal(np.asarray(got)[seen], np.asarray(rounded)[seen])
    number, tile = pages.tile(jnp.int32(0), 2, jnp.float32)
    np.testing.assert_array_equal(number, np.arange(8))
    np.testing.assert_array_equal(tile[0, :7], rounded[0, :7])


def test_every_format_of_a_model_has_words():
    for name in ("float32", "bfloat16", "deployed"):
        form = cache_format(DeepseekV4Config(head_dim=512, qk_rope_head_dim=64), name)
        assert InWords(form.entry, 32).rows and InWords(form.index, 32).rows
