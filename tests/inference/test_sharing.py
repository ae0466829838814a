"""One document, many agents: what is shared, what is each one's own, and what is on disk."""

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

from dsv4_jax import model
from dsv4_jax.analysis.memory import cache_plan
from dsv4_jax.errors import UserError
from dsv4_jax.inference.agents import _forward_in_place as shared_forward
from dsv4_jax.inference.digest import params_digest
from dsv4_jax.inference.prefix_store import BadEntry, PrefixStore, reach
from dsv4_jax.inference.sharing import Agents, BlockPool, OutOfBlocks, fork, prefill
from dsv4_jax.layers.kv_cache import init_cache

CLOSE = 2e-5
BLOCK = 12  # tokens per block of TINY
DOCUMENT = random_tokens(1, seed=1, length=41)[0]  # three blocks and five tokens
CAPACITY = 72
BLOCKS = 16  # of most pools, so that they share programs


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@functools.cache
def training():
    return jax.jit(lambda p, t: model.forward(TINY, p, t).logits)


def expected(params, *parts):
    """Training logits at the last token of the parts together; padding behind it changes nothing."""
    tokens = np.concatenate(parts)
    return np.asarray(training()(params, np.pad(tokens, (0, CAPACITY - len(tokens)))[None])[0, len(tokens) - 1])


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def pool_of(blocks=BLOCKS, format="float32"):
    return BlockPool(TINY, blocks, format)


def prefilled(pool, params, tokens=DOCUMENT, **options):
    return prefill(pool, params, tokens, chunk=8, **options)


# fork


def parent_cache(params, length=41, format="float32"):
    step = jax.jit(lambda p, t, c: model.forward(TINY, p, t, cache=c).cache)
    return step(params, DOCUMENT[None, :length], init_cache(TINY, 1, 48, format))


def test_forked_rows_go_on_as_the_parent_does_and_leave_it_alone(params):
    parent = parent_cache(params)
    before = jax.tree.map(np.array, parent)
    step = jax.jit(lambda p, t, c: model.forward(TINY, p, t, cache=c))
    rows, tails = fork(parent, 3, CAPACITY), random_tokens(3, seed=2, length=20)
    for i in range(20):
        out = step(params, tails[:, i : i + 1], rows)
        rows = out.cache
        for row in range(3):
            close(out.logits[row, 0], expected(params, DOCUMENT, tails[row, : i + 1]))
    jax.tree.map(np.testing.assert_array_equal, parent, before)


@pytest.mark.parametrize("length", [35, 36, 41])
def test_a_fork_holds_complete_blocks_once_and_rooms_of_their_own(params, length):
    rows = fork(parent_cache(params, length), 4, CAPACITY)
    complete, tables = length // BLOCK, np.asarray(rows.tables)
    assert (tables[:, :complete] == tables[0, :complete]).all()
    own = tables[:, complete:].ravel()
    assert len(set(own)) == len(own) and not set(own) & set(tables[0, :complete])
    blocks = complete + 4 * (CAPACITY // BLOCK - complete)
    assert {leaf.shape[1] for leaf in jax.tree.leaves(rows.pools)} == {blocks}


def test_a_fork_that_cannot_be_is_refused_in_words(params):
    parent = parent_cache(params)
    with pytest.raises(ValueError, match="does not hold the 41 tokens"):
        fork(parent, 2, 40)
    with pytest.raises(ValueError, match="need 9 blocks, not 8"):
        fork(parent, 2, CAPACITY, blocks=8)
    with pytest.raises(ValueError, match="one sequence"):
        fork(init_cache(TINY, 2, 12), 2, CAPACITY)


# Documents and agents


@pytest.mark.parametrize("format", [pytest.param("float32", marks=pytest.mark.slow), "deployed"])
def test_ten_agents_weigh_the_blocks_once_and_ten_states(params, format):
    plan = cache_plan(TINY, format)
    pool = pool_of(4 + 10, format)  # the document's, and one of each agent for what it adds
    document = prefilled(pool, params)
    agents = document.fork(10, 48)
    assert pool.blocks - pool.free == 4
    document.close()
    agents.forward(params, random_tokens(10, seed=4, length=3))
    assert pool.blocks - pool.free == 3 + 10  # the incomplete block is torn: a copy for each
    assert pool.nbytes == 14 * plan.block
    assert agents.state_bytes == 10 * plan.state
    assert pool.nbytes + agents.state_bytes == plan.shared(41, 10, own=3) + plan.block
    private = jax.eval_shape(lambda: init_cache(TINY, 10, 44, format))
    alone = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((private.pools, private.states)))
    assert alone == 10 * plan.sequence(44)


def test_agents_of_one_document_diverge_and_equal_private_caches(params):
    pool = pool_of()
    agents = prefilled(pool, params).fork(3, CAPACITY)
    tails = random_tokens(3, seed=2, length=26)
    step = jax.jit(lambda p, t, c, n: model.forward(TINY, p, t, cache=c, counts=n))
    private, one = init_cache(TINY, 3, CAPACITY), np.ones(3, np.int32)
    private = step(params, np.tile(DOCUMENT, (3, 1)), private, 41 * one).cache  # the document once more, for each
    for i in range(26):
        shared, own = agents.forward(params, tails[:, i : i + 1]), step(params, tails[:, i : i + 1], private, one)
        private = own.cache
        close(shared.logits, own.logits)
    for row in range(3):
        close(shared.logits[row, 0], expected(params, DOCUMENT, tails[row]))


def test_a_document_gives_its_last_logits_and_serves_agents_again_and_again(params):
    pool = pool_of()
    document = prefilled(pool, params)
    close(document.logits, expected(params, DOCUMENT))
    for seed in range(3):
        agents = document.fork(3, CAPACITY)
        tails = random_tokens(3, seed=seed, length=9)
        for i in range(9):
            logits = agents.forward(params, tails[:, i : i + 1]).logits
        close(logits[1, 0], expected(params, DOCUMENT, tails[1]))
        for row in range(3):
            agents.leave(row)
        assert pool.free == BLOCKS - 4
    document.close()
    document.close()
    assert pool.free == BLOCKS
    with pytest.raises(UserError, match="closed"):
        document.fork(1, CAPACITY)


def test_agents_of_several_documents_come_and_go_in_one_batch(params):
    pool, other = pool_of(), random_tokens(1, seed=7, length=17)[0]
    documents = [prefilled(pool, params), prefilled(pool, params, other)]
    agents = Agents(pool, 3, CAPACITY)
    tails = random_tokens(3, seed=8, length=9)
    assert [agents.enter(documents[0]), agents.enter(documents[1])] == [0, 1]
    for i in range(4):
        logits = agents.forward(params, tails[:, i : i + 1]).logits  # row 2 is free
    close(logits[0, 0], expected(params, DOCUMENT, tails[0, :4]))
    close(logits[1, 0], expected(params, other, tails[1, :4]))
    agents.leave(0)
    assert [agents.enter(documents[1]), agents.enter()] == [0, 2]
    with pytest.raises(UserError, match="rows are taken"):
        agents.enter(documents[0])
    for i in range(4, 9):
        logits = agents.forward(params, tails[:, i : i + 1]).logits
    close(logits[0, 0], expected(params, other, tails[0, 4:]))
    close(logits[1, 0], expected(params, other, tails[1]))
    close(logits[2, 0], expected(params, tails[2, 4:]))
    for thing in documents:
        thing.close()
    for row in range(3):
        agents.leave(row)
    assert pool.free == BLOCKS


def test_a_kept_agent_can_be_forked_and_come_back_to(params):
    pool = pool_of()
    document = prefilled(pool, params)
    agents, tails = document.fork(3, CAPACITY), random_tokens(3, seed=3, length=12)
    document.close()
    for i in range(5):
        agents.forward(params, tails[:, i : i + 1])
    kept = agents.keep(0)
    assert kept.tokens.tolist() == [*DOCUMENT, *tails[0, :5]]
    for i in range(5, 12):
        agents.forward(params, tails[:, i : i + 1])
    children = kept.fork(2, CAPACITY)  # after the row itself wrote more into their common block
    turns = random_tokens(3, seed=5, length=9)
    for i in range(9):
        logits = children.forward(params, turns[:2, i : i + 1]).logits
    close(logits[0, 0], expected(params, DOCUMENT, tails[0, :5], turns[0]))
    close(logits[1, 0], expected(params, DOCUMENT, tails[0, :5], turns[1]))
    logits = agents.forward(params, turns[:, :1]).logits
    close(logits[0, 0], expected(params, DOCUMENT, tails[0], turns[0, :1]))
    for thing in (agents, children):
        for row in range(thing.rows):
            thing.leave(row)
    kept.close()
    assert pool.free == BLOCKS


def test_refused_tokens_give_their_blocks_back(params):
    pool = pool_of()
    agents = prefilled(pool, params).fork(2, CAPACITY)
    draft, held = random_tokens(2, seed=6, length=16), pool.blocks - pool.free
    out = agents.forward(params, draft, keep_all=True)
    close(out.logits[0, 15], expected(params, DOCUMENT, draft[0]))
    assert pool.blocks - pool.free == held + 2 + 2  # copies of the incomplete block, and a new one each
    agents.commit(np.array([3, 16]))
    assert pool.blocks - pool.free == held + 2 + 1
    assert agents.lengths.tolist() == [44, 57]
    logits = agents.forward(params, draft[:, :1]).logits
    close(logits[0, 0], expected(params, DOCUMENT, draft[0, :3], draft[0, :1]))
    close(logits[1, 0], expected(params, DOCUMENT, draft[1], draft[1, :1]))


def test_a_full_pool_says_so_and_nothing_has_changed(params):
    pool = pool_of(5)
    document = prefilled(pool, params)
    agents = document.fork(2, CAPACITY)
    tables, before = agents.tables.copy(), jax.tree.map(np.array, pool.pools)
    with pytest.raises(OutOfBlocks, match="2 more blocks of 12 tokens are needed and 1 of 5 are free"):
        agents.forward(params, random_tokens(2, length=1))
    jax.tree.map(np.testing.assert_array_equal, pool.pools, before)
    np.testing.assert_array_equal(agents.tables, tables)
    assert agents.lengths.tolist() == [41, 41] and pool.free == 1
    agents.leave(1)
    document.close()
    close(agents.forward(params, np.array([[5], [0]])).logits[0, 0], expected(params, DOCUMENT, [5]))
    with pytest.raises(OutOfBlocks):
        prefilled(pool, params)
    assert pool.free == 1


def test_requests_that_make_no_sense_are_refused_in_words(params):
    pool = pool_of()
    agents = prefilled(pool, params).fork(1, 48)
    with pytest.raises(UserError, match="would hold 49 tokens; rows have room for 48"):
        agents.forward(params, np.zeros((1, 8), np.int32))
    with pytest.raises(UserError, match="nothing to commit"):
        agents.commit(np.array([1]))
    with pytest.raises(UserError, match="another pool"):
        agents.leave(0), agents.enter(prefilled(pool_of(), params))
    with pytest.raises(UserError, match="free row"):
        agents.forward(params, np.zeros((1, 1), np.int32), np.array([1]))
    with pytest.raises(UserError, match="one or more tokens"):
        prefilled(pool, params, [])
    for tokens, words in (([64], "holds token 64"), ([1.5], "not made of token ids"), (["a"], "not made of token ids")):
        with pytest.raises(UserError, match=words):
            prefilled(pool, params, tokens)
    with pytest.raises(ValueError, match="free already"):
        pool.release([11])


def test_counts_and_tokens_that_cannot_be_are_refused_and_change_nothing(params):
    pool = pool_of()
    agents = prefilled(pool, params).fork(2, CAPACITY)
    free, draft = pool.free, random_tokens(2, seed=6, length=4)
    for counts in ([9, 1], [1, -3], [1], [1.0, 1.0]):
        with pytest.raises(UserError, match="counts are"):
            agents.forward(params, draft, np.array(counts))
    for tokens, words in ((draft[:1], "shape"), (draft + 61, "holds token"), (draft / 2, "not made of token ids")):
        with pytest.raises(UserError, match=words):
            agents.forward(params, tokens)
    assert pool.free == free and agents.lengths.tolist() == [41, 41]
    agents.forward(params, np.where([[True], [False]], draft, 99), np.array([4, 0]), keep_all=True)  # padding is free
    with pytest.raises(UserError, match=r"counts are \[5, 0\]: they go from 0 to \[4, 0\]"):
        agents.commit(np.array([5, 0]))
    agents.commit(np.array([4, 0]))
    assert agents.lengths.tolist() == [45, 41] and len(agents.keep(0).tokens) == 45


def test_who_leaves_before_a_commit_takes_no_blocks_along(params):
    pool = pool_of()
    document = prefilled(pool, params)
    agents, before = document.fork(2, CAPACITY), pool.free
    for _ in range(3):
        agents.forward(params, random_tokens(2, seed=6, length=8), keep_all=True)
        agents.leave(1)
        with pytest.raises(UserError, match="commit the last forward first"):
            agents.enter(document)  # states have rows for all tokens now
        agents.commit(np.array([0, 8]))
        assert agents.lengths.tolist() == [41, 0]
        agents.forward(params, random_tokens(2, seed=6, length=1), np.array([0, 0]))
        agents.enter(document)
    assert pool.free == before - 1  # row 0's copy of the incomplete block
    agents.leave(0), agents.leave(1), document.close()
    assert pool.free == BLOCKS


def test_block_tables_go_to_the_device_only_when_they_change(params):
    agents = prefilled(pool_of(), params).fork(2, CAPACITY)
    agents.forward(params, np.ones((2, 1), np.int32))
    table, states = agents._held.on_device(), jax.tree.leaves(agents._states)
    agents.forward(params, np.ones((2, 1), np.int32))
    assert agents._held.on_device() is table and all(x.is_deleted() for x in states)
    agents.forward(params, np.ones((2, 8), np.int32))
    assert agents._held.on_device() is not table
    np.testing.assert_array_equal(agents._held.on_device(), agents.tables)


def test_longer_documents_of_a_bucket_compile_nothing_new(params):
    prefilled(pool_of(), params)
    before = shared_forward._cache_size()
    prefilled(pool_of(), params, np.resize(DOCUMENT, 90))
    assert shared_forward._cache_size() == before > 0


# On disk


def go_on(params, document, tail):
    """Logits behind a document and a tail, decoded one by one."""
    agents = document.fork(1, CAPACITY)
    logits = [np.asarray(agents.forward(params, [[token]]).logits[0, 0]) for token in tail]
    agents.leave(0)
    return np.stack(logits)


TAIL = random_tokens(1, seed=11, length=9)[0]


@pytest.mark.parametrize(("windows", "recomputed"), [("full", 0), (24, 12), ("none", 24)])
def test_a_hit_goes_on_as_no_hit_does(params, tmp_path, windows, recomputed):
    store = PrefixStore(tmp_path, params, windows)
    missed = prefilled(pool_of(), params, store=store)
    assert (missed.hit.stored, missed.hit.recomputed, missed.hit.ignored) == (0, 0, ())
    states = {"full": 3, 24: 1, "none": 0}[windows]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".block"] * 3 + [".state"] * states
    plain, hit = (
        prefilled(pool_of(), params),
        prefilled(pool_of(), params, store=PrefixStore(tmp_path, params, windows)),
    )
    assert (hit.hit.tokens, hit.hit.stored, hit.hit.recomputed) == (41, 36, recomputed)
    for document in (missed, hit):
        close(document.logits, plain.logits)
        close(go_on(params, document, TAIL), go_on(params, plain, TAIL))


@pytest.mark.parametrize("windows", ["full", 24, "none"])
def test_a_hit_is_bitwise_the_same_where_chunks_are_whole_blocks(params, tmp_path, windows):
    run = lambda store: prefill(pool_of(format="deployed"), params, DOCUMENT, chunk=BLOCK, store=store)  # noqa: E731
    store = PrefixStore(tmp_path, params, windows)
    first, hit = run(store), run(store)
    assert hit.hit.stored == 36
    np.testing.assert_array_equal(first.logits, hit.logits)
    np.testing.assert_array_equal(go_on(params, first, TAIL), go_on(params, hit, TAIL))


def test_mistake_13_the_length_of_a_hit_is_reported_for_every_prompt_length(params, tmp_path):
    store, pool = PrefixStore(tmp_path, params), pool_of()
    prefilled(pool, params, store=store).close()
    for length in range(1, 42):
        found = store.find(pool, DOCUMENT[:length], Agents(pool, 1, CAPACITY).empty_states())
        # At least one token is left to run: it gives the logits.
        assert found.hit.stored == found.start == len(found.blocks) * BLOCK == (length - 1) // BLOCK * BLOCK
        pool.release(found.blocks)
    assert pool.free == BLOCKS


def test_mistake_12_prompts_that_differ_in_one_token_of_a_block_share_nothing_of_it(params, tmp_path):
    store = PrefixStore(tmp_path, params)
    keys = store.keys(pool_of(), DOCUMENT)
    for place in range(36):
        changed = DOCUMENT.copy()
        changed[place] = (changed[place] + 1) % TINY.vocab_size
        others = store.keys(pool_of(), changed)
        same = [a == b for a, b in zip(keys, others, strict=True)]
        assert same == [i < place // BLOCK for i in range(3)]  # nor of any later one
    prefilled(pool_of(), params, store=store)
    changed = DOCUMENT.copy()
    changed[23] += 1
    hit = prefilled(pool_of(), params, changed % TINY.vocab_size, store=store)
    assert hit.hit.stored == 12
    close(hit.logits, expected(params, changed % TINY.vocab_size))


@pytest.mark.parametrize("evicted", ["state", "block"])
def test_mistake_11_a_hit_after_an_eviction_equals_recomputing(params, tmp_path, evicted):
    store = PrefixStore(tmp_path, params)
    prefilled(pool_of(), params, store=store)
    (tmp_path / f"{store.keys(pool_of(), DOCUMENT)[2]}.{evicted}").unlink()
    hit = prefilled(pool_of(), params, store=store)
    assert hit.hit.stored == {"state": 36, "block": 24}[evicted]
    assert hit.hit.recomputed == {"state": 12, "block": 0}[evicted]
    close(go_on(params, hit, TAIL)[-1], expected(params, DOCUMENT, TAIL))


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "header", "renamed", "foreign"])
def test_a_damaged_or_foreign_file_is_passed_over_and_reported(params, tmp_path, damage):
    store, pool = PrefixStore(tmp_path, params, "none"), pool_of()
    prefilled(pool, params, store=store).close()
    keys = store.keys(pool, DOCUMENT)
    path = tmp_path / f"{keys[1]}.block"
    data = bytearray(path.read_bytes())
    if damage == "foreign":
        other = PrefixStore(tmp_path / "other", jax.tree.map(lambda x: x * 2, params), "none")
        prefilled(pool, params, store=other).close()
        data = (tmp_path / "other" / f"{other.keys(pool, DOCUMENT)[1]}.block").read_bytes()
    elif damage == "renamed":
        data = (tmp_path / f"{keys[0]}.block").read_bytes()
    elif damage == "flipped":
        data[-7] ^= 1
    elif damage == "header":
        data[20] ^= 0xFF
    else:
        data = data[: {"truncated": -100, "empty": 0}[damage]]
    path.write_bytes(data)
    with pytest.raises(BadEntry, match="another parameters" if damage == "foreign" else "is damaged"):
        store.read(pool, path, jax.eval_shape(lambda: jax.tree.map(lambda x: x[:, 0], pool.pools)))
    hit = prefilled(pool, params, store=store)
    assert hit.hit.stored == 12 and len(hit.hit.ignored) == 1 and keys[1] in hit.hit.ignored[0]
    close(hit.logits, expected(params, DOCUMENT))
    hit.close()
    assert prefilled(pool, params, store=store).hit.stored == 36  # and a right one has taken its place


def test_a_file_that_cannot_be_read_is_passed_over(params, tmp_path):
    store, pool = PrefixStore(tmp_path, params, "none"), pool_of()
    path = tmp_path / f"{store.keys(pool, DOCUMENT)[0]}.block"
    path.mkdir()
    hit = prefilled(pool, params, store=store)
    assert hit.hit.stored == 0 and path.name in hit.hit.ignored[0]
    close(hit.logits, expected(params, DOCUMENT))


def test_a_full_disk_ends_no_request_and_leaves_no_half_file(params, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = PrefixStore(tmp_path, params)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        missed = prefilled(pool_of(), params, store=store)
    close(missed.logits, expected(params, DOCUMENT))
    assert not list(tmp_path.iterdir()) and "was not stored: [Errno 28]" in caplog.text
    prefilled(pool_of(), params, store=store)
    assert prefilled(pool_of(), params, store=store).hit.stored == 36


def test_what_entries_depend_on_makes_other_keys(params, tmp_path, monkeypatch):
    store = PrefixStore(tmp_path, params)
    pools = [pool_of(), pool_of(format="deployed"), BlockPool(TINY.replace(index_topk=2), 1, "float32"),
             BlockPool(TINY, 1, "float32", attention="dense")]  # fmt: skip
    keys = {store.keys(pool, DOCUMENT)[0] for pool in pools}
    monkeypatch.setattr("dsv4_jax.inference.prefix_store.ENTRIES", 0)  # of other code
    assert len(keys | {store.keys(pool, DOCUMENT)[0] for pool in pools}) == 8


def test_the_digest_of_parameters_sees_every_bit(params):
    digest, rng = params_digest(params), np.random.default_rng(0)
    assert params_digest(jax.tree.map(lambda x: x + 0, params)) == digest
    changed = np.array(params["embed"])
    for _ in range(3):
        place = tuple(rng.integers(changed.shape))
        other = changed.copy()
        other[place] = np.nextafter(other[place], np.float32(9))
        assert params_digest(params | {"embed": jnp.asarray(other)}) != digest
    swapped = changed[::-1].copy()
    assert params_digest(params | {"embed": jnp.asarray(swapped)}) != digest


def test_the_folder_stays_within_its_limit_and_chains_are_eaten_from_their_ends(params, tmp_path):
    store = PrefixStore(tmp_path, params, "none")
    prefilled(pool_of(), params, store=store)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    small = PrefixStore(tmp_path, params, "none", limit=4 * size)
    other = random_tokens(1, seed=12, length=30)[0]
    prefilled(pool_of(), params, other, store=small)
    names = {path.stem for path in tmp_path.iterdir()}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * size
    old, new = small.keys(pool_of(), DOCUMENT), small.keys(pool_of(), other)
    assert names == {*new, *old[:2]}
    assert prefilled(pool_of(), params, store=small).hit.stored == 24


WRITES_AND_READS = """
import sys, json, numpy as np
from support import TINY, random_params
from test_sharing import DOCUMENT, BlockPool, PrefixStore, prefill

params = random_params(TINY)
store = PrefixStore(sys.argv[1], params, "full", limit=200_000)
hits = []
for turn in range(6):
    tokens = DOCUMENT.copy()
    tokens[30] = turn % 3
    document = prefill(BlockPool(TINY, 8, "float32"), params, tokens, chunk=8, store=store)
    hits.append([document.hit.stored, len(document.hit.ignored), float(np.abs(document.logits).sum())])
print(json.dumps(hits))
"""


def test_several_processes_share_a_store(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    command = [sys.executable, "-c", WRITES_AND_READS, str(tmp_path)]
    running = [
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running]
    for hits in results:
        assert all(ignored == 0 for _, ignored, _ in hits)
        assert [stored for stored, _, _ in hits][3:] == [36, 36, 36]
        np.testing.assert_allclose([x for *_, x in hits[:3]], [x for *_, x in hits[3:]], rtol=1e-5)
    np.testing.assert_allclose(results[0][-1][2], results[1][-1][2], rtol=1e-5)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_windows_reach_back_by_their_length_times_the_depth():
    assert reach(TINY) == 15
    assert reach(TINY.replace(sliding_window=2)) == 2 * 2 + 4  # an overlap of 4 tokens is longer than the window
    with pytest.raises(UserError, match="windows is 'some'"):
        PrefixStore("unused", {}, "some")
