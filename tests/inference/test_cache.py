"""The cached forward against the training forward, the reference's decode traces, and its own program."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import FIXTURES, TINY, load_fixture, random_params, random_tokens

from dsv4_jax import model, weights
from dsv4_jax.analysis.memory import FORMATS, cache_plan
from dsv4_jax.config import CSA, HCA
from dsv4_jax.inference.sharing import fork
from dsv4_jax.layers import kv_cache
from dsv4_jax.presets import preset

CLOSE = 2e-5  # absolute; the logits of these models reach 10
# V4's ratios and blocks of 128 tokens, in tiny widths; the window is neither longer nor shorter than every chunk.
REAL = TINY.replace(
    compress_ratios=(0, 4, 128, 0), layer_types=TINY.layer_types, sliding_window=24, index_topk=5, num_hash_layers=1
)
LENGTH = 263  # two blocks of 128 and some, a multiple of neither ratio


@functools.cache
def stepper(config, **options):
    """A compiled (params, tokens [B, S], cache, counts [B]) -> Output; one program per shape."""
    return jax.jit(lambda p, t, c, n: model.forward(config, p, t, cache=c, counts=n, **options))


def in_chunks(step, params, tokens, cache, chunk):
    """Logits [B, S, V] of tokens given `chunk` at a time, and the cache; the last chunk is padded."""
    tokens, logits = np.asarray(tokens, np.int32), []
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        real = part.shape[1]
        part = np.pad(part, ((0, 0), (0, chunk - real)), constant_values=1)
        out = step(params, part, cache, np.full(len(part), real, np.int32))
        logits.append(np.asarray(out.logits[:, :real]))
        cache = out.cache
    return np.concatenate(logits, 1), cache


def same_bits(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def close(ours, theirs, tolerance=CLOSE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tiny():
    """(params, tokens [2, 41], training logits, MTP hidden) of TINY."""
    params, tokens = random_params(TINY), random_tokens()
    out = jax.jit(lambda p, t: model.forward(TINY, p, t, mtp=True))(params, tokens)
    return params, tokens, np.asarray(out.logits), np.asarray(out.mtp_hidden)


@pytest.fixture(scope="module")
def real():
    """(params, tokens [1, 263], training logits) at the released ratios."""
    params, tokens = random_params(REAL), random_tokens(1, length=LENGTH)
    return params, tokens, np.asarray(jax.jit(lambda p, t: model.forward(REAL, p, t).logits)(params, tokens))


@pytest.mark.parametrize(("format", "tolerance"), [("float32", CLOSE), ("deployed", 2e-4)])
def test_blocks_as_rows_of_words_give_the_same_logits(real, format, tolerance):
    """As on a TPU. They hold the same bits (tests/kernels/test_pools.py); XLA fuses what reads them in another way."""
    params, tokens, _ = real
    logits = []
    for in_words in (False, True):
        cache = kv_cache.init_cache(REAL, 1, 384, format, in_words=in_words)
        many, cache = in_chunks(stepper(REAL), params, tokens[:, :250], cache, 125)
        few, _ = in_chunks(stepper(REAL), params, tokens[:, 250:], cache, 1)
        logits.append(np.concatenate([many, few], 1))
    assert any(pool.keys() == {"words"} for pools in cache.pools.values() for pool in pools.values())
    close(*logits, tolerance)


# The reference's traces


@pytest.fixture(scope="module", params=["pub_a", "pub_b"])
def traced(request):
    """(config, params, tokens, decode.npz, empty cache) of a reference fixture."""
    config, params, expected, _ = load_fixture(request.param)
    trace = dict(np.load(FIXTURES / request.param / "decode.npz"))
    return config, params, expected["input_ids"], trace, kv_cache.init_cache(config, 2, 144)


def test_decoding_token_by_token_gives_the_references_logits(traced):
    config, params, tokens, trace, cache = traced
    logits, _ = in_chunks(stepper(config), params, tokens, cache, 1)
    close(logits, trace["step_logits"], 6e-5)


def test_prefill_in_the_references_chunks_gives_its_logits(traced):
    config, params, tokens, trace, cache = traced
    step, at = stepper(config), 0
    longest = int(trace["chunk_lengths"].max())
    for count in trace["chunk_lengths"]:
        part = np.zeros((2, longest), np.int32)
        part[:, :count] = tokens[:, at : at + count]
        out = step(params, part, cache, np.full(2, count, np.int32))
        close(out.logits[:, :count], trace["step_logits"][:, at : at + count], 6e-5)
        cache, at = out.cache, at + count
    assert at == tokens.shape[1]


def test_greedy_decoding_behind_a_prefill_repeats_the_references(traced):
    config, params, tokens, trace, cache = traced
    prompt, step = int(trace["prefill_len"]), stepper(config)
    logits, cache = in_chunks(step, params, tokens[:, :prompt], cache, int(trace["chunk_lengths"].max()))
    close(logits[:, -1], trace["greedy_logits"][:, 0], 6e-5)
    for i in range(trace["greedy_tokens"].shape[1]):
        chosen = trace["greedy_logits"][:, i].argmax(-1)
        np.testing.assert_array_equal(chosen, trace["greedy_tokens"][:, i])
        out = step(params, chosen[:, None].astype(np.int32), cache, np.ones(2, np.int32))
        cache = out.cache
        close(out.logits[:, 0], trace["greedy_logits"][:, i + 1], 6e-5)


# The training forward


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 127, 128, 129, LENGTH])
def test_mistake_7_every_chunk_size_gives_the_training_forward_at_every_position(real, chunk):
    params, tokens, logits = real
    ours, cache = in_chunks(stepper(REAL), params, tokens, kv_cache.init_cache(REAL, 1, LENGTH), chunk)
    boundaries = [t for t in (3, 4, 127, 128, 129, 255, 256, 257) for t in (t - 1, t)]
    close(ours[:, boundaries], logits[:, boundaries])
    close(ours, logits)
    assert cache.lengths.tolist() == [LENGTH]


@pytest.mark.parametrize("length", [*range(1, 10), 127, 128, 129])
def test_mistake_9_decoding_goes_on_rightly_behind_prefills_around_the_first_closed_blocks(real, length):
    params, tokens, logits = real
    cache = kv_cache.init_cache(REAL, 1, LENGTH)
    prompt = np.pad(tokens[:, :length], ((0, 0), (0, 129 - length)), constant_values=7)
    cache = stepper(REAL)(params, prompt, cache, np.array([length], np.int32)).cache
    ours, _ = in_chunks(stepper(REAL), params, tokens[:, length : length + 5], cache, 1)
    close(ours, logits[:, length : length + 5])


def test_dense_attention_decodes_as_it_trains(tiny):
    params, tokens, sparse, _ = tiny
    dense = jax.jit(lambda p, t: model.forward(TINY, p, t, attention="dense").logits)(params, tokens)
    step = stepper(TINY, attention="dense")
    close(in_chunks(step, params, tokens, kv_cache.init_cache(TINY, 2, 41), 8)[0], dense)
    assert np.abs(dense - sparse).max() > 1e-2


def test_both_kinds_of_compression_may_have_one_ratio():
    """CSA's blocks overlap and HCA's do not: entries of one ratio are not made of the same tokens."""
    config = TINY.replace(compress_ratios=(0, 4, 4, 0), layer_types=TINY.layer_types)
    params, tokens = random_params(config), random_tokens()
    whole = jax.jit(lambda p, t: model.forward(config, p, t).logits)(params, tokens)
    close(in_chunks(stepper(config), params, tokens, kv_cache.init_cache(config, 2, 41), 8)[0], whole)


def test_mistake_8_turns_of_any_length_add_up_to_one_forward(tiny):
    params, tokens, logits, _ = tiny
    cache, at = kv_cache.init_cache(TINY, 2, 41), 0
    for turn in (5, 1, 7, 3, 1, 1, 6, 2, 7, 8):
        part = np.zeros((2, 8), np.int32)
        part[:, :turn] = tokens[:, at : at + turn]
        out = stepper(TINY)(params, part, cache, np.full(2, turn, np.int32))
        close(out.logits[:, :turn], logits[:, at : at + turn])
        cache, at = out.cache, at + turn
    assert at == 41


def test_rows_of_different_lengths_prefill_and_decode_in_one_batch(tiny):
    params, tokens, logits, _ = tiny
    cache, at = kv_cache.init_cache(TINY, 2, 41), np.zeros(2, np.int32)
    for counts in ([8, 3], [1, 8], [1, 1], [0, 8], [8, 1], [1, 0], [1, 8], [8, 8], [8, 1], [1, 1]):
        part = np.ones((2, 8), np.int32)
        for row, count in enumerate(counts):
            part[row, :count] = tokens[row, at[row] : at[row] + count]
        out = stepper(TINY)(params, part, cache, np.array(counts, np.int32))
        for row, count in enumerate(counts):
            close(out.logits[row, :count], logits[row, at[row] : at[row] + count])
        cache, at = out.cache, at + np.array(counts, np.int32)
    assert cache.lengths.tolist() == at.tolist() == [37, 39]


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_without_tokens_stays_as_it_is_to_the_bit(tiny, format):
    params, tokens, _, _ = tiny
    _, cache = in_chunks(stepper(TINY), params, tokens[:, :17], kv_cache.init_cache(TINY, 2, 41, format), 8)
    after = stepper(TINY)(params, tokens[:, 17:25], cache, np.array([8, 0], np.int32)).cache
    blocks = np.asarray(cache.tables[1])
    assert same_bits(*(jax.tree.map(lambda x: x[:, 1], c.states) for c in (cache, after)))
    assert same_bits(*(jax.tree.map(lambda x: x[:, blocks], c.pools) for c in (cache, after)))
    assert after.lengths.tolist() == [25, 17]
    assert not same_bits(cache.states, after.states)


@pytest.mark.parametrize("counts", [(0, 8), (1, 7), (2, 6), (3, 5), (4, 4)])
def test_mistake_10_a_commit_of_some_tokens_equals_serial_decoding(tiny, counts):
    params, tokens, _, _ = tiny
    _, cache = in_chunks(stepper(TINY), params, tokens[:, :21], kv_cache.init_cache(TINY, 2, 41), 8)
    counts, draft = np.array(counts, np.int32), random_tokens(2, seed=9, length=8)  # most of it will be refused
    for row, count in enumerate(counts):
        draft[row, :count] = tokens[row, 21 : 21 + count]
    kept = stepper(TINY, keep_all=True)(params, draft, cache, np.full(2, 8, np.int32)).cache
    assert kept.lengths.tolist() == [21, 21]
    committed = kv_cache.commit(TINY, kept, jnp.asarray(counts))
    told = stepper(TINY)(params, draft, cache, counts).cache
    assert same_bits((committed.lengths, committed.states), (told.lengths, told.states))
    following = np.stack([tokens[row, 21 + n : 29 + n] for row, n in enumerate(counts)])
    a, b = (stepper(TINY)(params, following, c, np.full(2, 8, np.int32)).logits for c in (committed, told))
    np.testing.assert_array_equal(a, b)


def test_no_draft_token_sees_a_later_one(tiny):
    params, tokens, _, _ = tiny
    _, cache = in_chunks(stepper(TINY), params, tokens[:, :21], kv_cache.init_cache(TINY, 2, 41), 8)
    changed = tokens[:, 21:29].copy()
    changed[:, 5] = (changed[:, 5] + 1) % TINY.vocab_size
    all_real = np.full(2, 8, np.int32)
    a, b = (np.asarray(stepper(TINY)(params, t, cache, all_real).logits) for t in (tokens[:, 21:29], changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (a[:, 5] != b[:, 5]).any(-1).all()


def test_the_mtp_module_with_a_cache_gives_the_training_hidden(tiny):
    params, tokens, _, hidden = tiny
    cache, mtp_length = kv_cache.init_cache(TINY, 2, 41), np.zeros(2, np.int32)
    main = stepper(TINY)
    draft = jax.jit(lambda p, s, t, c, n, k: model.forward_mtp(TINY, p, s, t, c, n, k))
    for start in range(0, 35, 5):
        counts = np.full(2, 5, np.int32)
        out = main(params, tokens[:, start : start + 8], cache, counts)
        ours, cache = draft(params, out.streams, tokens[:, start + 1 : start + 9], out.cache, mtp_length, counts)
        close(ours[:, :5], hidden[:, start : start + 5])
        mtp_length += 5


def test_a_row_without_room_is_nan_and_harms_no_other(tiny):
    params, tokens, logits, _ = tiny
    step, both = stepper(TINY), np.full(2, 8, np.int32)
    _, cache = in_chunks(step, params, tokens[:, :16], kv_cache.init_cache(TINY, 2, 24), 8)
    padded = np.pad(tokens[:, 16:24], ((0, 0), (0, 4)))
    fits = step(params, padded, cache, np.array([8, 3], np.int32))  # padding needs no room
    close(fits.logits[0, :8], logits[0, 16:24])
    close(fits.logits[1, :3], logits[1, 16:19])
    one_full = step(params, np.stack([tokens[0, 24:36], tokens[1, 19:31]]), fits.cache, np.array([8, 5], np.int32))
    assert np.isnan(one_full.logits[0]).all()
    close(one_full.logits[1, :5], logits[1, 19:24])
    _, cache = in_chunks(step, params, tokens[:1, :24], kv_cache.init_cache(TINY, 1, 24), 8)
    pair = fork(cache, 2, 24)  # two full rows, all of whose blocks are shared
    out = step(params, np.repeat(tokens[:1, 24:32], 2, 0), pair, np.array([8, 0], np.int32))
    assert np.isnan(out.logits[0]).all() and np.isfinite(out.logits[1]).all()
    assert same_bits(out.cache.pools, pair.pools)
    assert np.isnan(step(params, np.repeat(tokens[:1, 24:32], 2, 0), out.cache, both).logits).all()


def test_sealed_entries_are_read_and_not_written(tiny):
    params, tokens, logits, _ = tiny
    _, full = in_chunks(stepper(TINY), params, tokens[:, :36], kv_cache.init_cache(TINY, 2, 48), 8)
    # An empty state over the full cache's entries, 24 tokens before their end; windows reach back 3 x 5 tokens.
    fresh, sealed = kv_cache.init_cache(TINY, 2, 48), jnp.full(2, 36, jnp.int32)
    again = replace(fresh, lengths=jnp.full(2, 12, jnp.int32), pools=full.pools, sealed=sealed)
    _, again = in_chunks(stepper(TINY), params, tokens[:, 12:36], again, 8)
    assert same_bits(again.pools, full.pools)
    assert again.lengths.tolist() == [36, 36]
    jax.tree.map(close, again.states, full.states)
    out = stepper(TINY)(params, np.pad(tokens[:, 36:], ((0, 0), (0, 3))), again, np.full(2, 5, np.int32))
    close(out.logits[:, :5], logits[:, 36:])
    assert not same_bits(out.cache.pools, full.pools)  # what is not sealed is written


# Its program


def test_a_decode_step_compiles_once_as_sequences_grow(tiny):
    params, tokens, _, _ = tiny
    step = jax.jit(lambda p, t, c: model.forward(TINY, p, t, cache=c).cache, donate_argnums=2)
    cache = kv_cache.init_cache(TINY, 2, 41)
    for i in range(26):  # across three blocks
        cache = step(params, tokens[:, i : i + 1], cache)
    assert step._cache_size() == 1


REPEATED = TINY.replace(
    num_hidden_layers=4, num_nextn_predict_layers=0, layer_types=(HCA, CSA) * 2, compress_ratios=(6, 4) * 2,
    num_hash_layers=0,
)  # fmt: skip


ONE_CSA = REPEATED.replace(num_hidden_layers=1, layer_types=(CSA,), compress_ratios=(4,))


def compiled_decode(config, arrange, format, columns, blocks, chunk=1):
    """A step of two sequences with a donated cache of that many table columns and blocks, compiled only."""
    params = jax.eval_shape(lambda: arrange(weights.init(config, jax.random.key(0))))
    cache = jax.eval_shape(lambda: kv_cache.init_cache(config, 2, 12 * columns, format, blocks))
    tokens, counts = jax.ShapeDtypeStruct((2, chunk), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    step = lambda p, t, c, n: model.forward(config, p, t, cache=c, counts=n)  # noqa: E731
    return cache.pools, jax.jit(step, donate_argnums=2).lower(params, tokens, cache, counts).compile()


@pytest.mark.parametrize(
    ("config", "arrange", "format"),
    [(TINY, lambda params: params, "bfloat16"), (REPEATED, weights.unstack, "deployed")],
    ids=["stacked layers, bfloat16", "layers apart, deployed"],
)
def test_pools_are_written_in_place_and_neither_memory_nor_work_follows_the_capacity(config, arrange, format):
    # Both are longer than one tile of entries; the second has four times the room and 64 times the blocks.
    _, small = compiled_decode(config, arrange, format, 4000, 1000)
    pools, large = compiled_decode(config, arrange, format, 16000, 64000)
    before, after = small.memory_analysis(), large.memory_analysis()
    assert after.alias_size_in_bytes >= nbytes(pools) > 8_000_000
    assert after.temp_size_in_bytes - before.temp_size_in_bytes <= 2 * 12000 * 4  # a row of block numbers
    # Whatever has the size of a pool is an argument, or a scatter into one: no copy, no conversion.
    whole = [line for line in large.as_text().splitlines() if re.search(r"= \w+\[\d+,64000,", line)]
    made = {re.search(r"\} ([\w-]+)\(", line).group(1) for line in whole}
    assert "scatter" in made and made <= {"parameter", "scatter", "fusion", "get-tuple-element", "bitcast"}
    # Work inside the loops over tiles counts once here, and runs for the tokens seen: see the next test.
    assert large.cost_analysis()["flops"] < 1.01 * small.cost_analysis()["flops"]


def test_mistake_18_the_memory_of_a_prefill_follows_its_chunk_and_not_the_context():
    # 192,000 tokens are 48,000 keys: index scores of all of them for 2 x 64 queries and 3 heads would take 74 MB.
    needed = {}
    for chunk, columns in ((64, 4000), (64, 16000), (256, 16000)):
        _, compiled = compiled_decode(ONE_CSA, lambda params: params, "float32", columns, 1000, chunk)
        needed[chunk, columns] = compiled.memory_analysis().temp_size_in_bytes
    assert needed[64, 16000] - needed[64, 4000] <= 4 * 12000 * 4  # rows of block numbers
    assert needed[64, 16000] < 40e6 and needed[256, 16000] < 4.4 * needed[64, 16000], needed


def test_only_the_pages_of_the_tokens_seen_are_touched(tiny):
    # Blocks beyond the longest sequence's tiles hold NaN: reading one of them anywhere would show.
    params, tokens, logits, _ = tiny
    capacity = 12 * 2000  # several tiles of TINY's entries
    _, cache = in_chunks(stepper(TINY), params, tokens[:, :40], kv_cache.init_cache(TINY, 2, capacity), 8)
    first = 1024 // 2  # blocks of a tile of HCA entries; the indexer's tile of 8,192 keys is longer than the table
    unread = np.asarray(cache.tables)[:, first:].ravel()
    poisoned = {name: {k: jax.tree.map(lambda x: x.at[:, unread].set(jnp.nan), store) for k, store in pool.items()}
                for name, pool in cache.pools.items() if name == "0/2"}  # fmt: skip
    cache = replace(cache, pools=cache.pools | poisoned)
    out = stepper(TINY)(params, np.repeat(tokens[:, 40:41], 8, 1), cache, np.ones(2, np.int32))
    close(out.logits[:, 0], logits[:, 40])


# Its bytes


def poisoned(pool):
    """The pool with NaN in every entry, as numbers of 8, 16 or 32 bits that decode to one."""
    if jnp.issubdtype(pool.dtype, jnp.floating):
        return jnp.full_like(pool, jnp.nan)
    return jnp.full_like(pool, {1: 0x7F, 2: 0x7FC0, 4: 0x7FC00000}[pool.dtype.itemsize])


@pytest.mark.parametrize("format", ["float32", "deployed"])
def test_the_leavings_of_a_blocks_former_owner_never_show(tiny, format):
    params, tokens, *_ = tiny
    step = stepper(TINY)
    clean = kv_cache.init_cache(TINY, len(tokens), 48, format)
    dirty = replace(clean, pools=jax.tree.map(poisoned, clean.pools))
    for chunk in (1, 7):
        wanted, found = (in_chunks(step, params, tokens, cache, chunk)[0] for cache in (clean, dirty))
        assert np.isfinite(found).all() and same_bits(wanted, found)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["v4-pro", "v4-flash"])
def test_the_releases_caches_at_a_million_tokens_weigh_what_the_plan_says(name, format, in_words):
    config, tokens = preset(name), 1 << 20
    plan = cache_plan(config, format, in_words)
    cache = jax.eval_shape(lambda: kv_cache.init_cache(config, 2, tokens, format, in_words=in_words))
    assert nbytes(cache.pools) == pytest.approx(2 * plan.blocks(tokens) * plan.block, rel=0.01)
    assert nbytes(cache.states) == pytest.approx(2 * plan.state, rel=0.01)
    assert nbytes(cache.pools) + nbytes(cache.states) == pytest.approx(2 * plan.sequence(tokens), rel=0.01)


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_small_cache_weighs_what_the_plan_says(format, in_words):
    config = preset("nano")
    plan, cache = cache_plan(config, format, in_words), kv_cache.init_cache(config, 3, 1000, format, in_words=in_words)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.pools)) == 3 * plan.blocks(1000) * plan.block
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.states)) == 3 * plan.state
    assert cache.capacity == plan.blocks(1000) * plan.block_tokens


def test_the_deployed_bytes_of_an_entry_are_those_of_the_report():
    pro = cache_plan(preset("v4-pro"), "deployed")
    entry, key = 448 + 7 + 2 * 64, 64 + 4  # FP8, a scale per 64, BF16 rotary dims; FP4, a scale per 32
    assert pro.block == 30 * 32 * (entry + key) + 31 * entry
    assert pro.windows == 62 * 128 * entry
