"""Baseline layers (gqa, mla, mla_sparse) and top-2 routing: float64 statements, causality, memory, costs, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import TINY, blocks_in_order, random_params

from dsv4_jax import api, model, weights
from dsv4_jax.analysis import count
from dsv4_jax.analysis.flops import SCORES, attention_products
from dsv4_jax.analysis.memory import cache_parts, cache_plan
from dsv4_jax.analysis.trace import trace
from dsv4_jax.checkpoint import save
from dsv4_jax.config import CSA, SLIDING, ConfigError
from dsv4_jax.config_json import config_from_json, to_released_json, to_transformers_json
from dsv4_jax.errors import UserError
from dsv4_jax.layer_plan import BASELINE_KINDS, GQA, MLA, MLA_SPARSE
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.baseline_attention import BASELINE_LAYERS, grouped_attention
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.layers.moe import Gate
from dsv4_jax.layers.rotary import frequencies
from dsv4_jax.quantization.policy import NONE
from dsv4_jax.shapes import flatten, nest, tree_shapes
from sharding import context_parallel
from train.flops import training_flops_per_token

SIZES = {"num_key_value_heads": 2, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "v_head_dim": 7}
PLAN = {"compress_ratios": (0, 0, 0, 0), "layer_types": (GQA, MLA, MLA_SPARSE), "num_hash_layers": 0}
CONFIG = TINY.replace(**PLAN, baseline=SIZES)
LENGTH = 23
DOCUMENTS = np.repeat([[1] * 9 + [2] * 3 + [3] * 11], 2, axis=0)
SPARSE = AttentionOptions("sparse", False, NONE)
RNG = np.random.default_rng(0)
PARAMS = [jax.tree.map(np.asarray, block["attn"]) for block in blocks_in_order(CONFIG, random_params(CONFIG))]


def layer(kind, x, options=SPARSE, segment_ids=None):
    """The layer of this kind on x [B, S, D]: (output, record)."""
    index = BASELINE_KINDS.index(kind)
    graph, state = nnx.split(BASELINE_LAYERS[kind](CONFIG, CONFIG.layers[index], nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, PARAMS[index])
    return nnx.merge(graph, state)(x, make_layout(CONFIG, *x.shape[:2], segment_ids), options)[:2]


def rotated(x, positions):
    """The last dims of x [S, .., R] in adjacent pairs, as complex numbers that turn."""
    freqs = frequencies(CONFIG.compress_rope_theta, x.shape[-1], CONFIG.rope_scaling).astype(np.float64)
    turn = np.exp(1j * positions[:, None] * freqs).reshape(len(x), *(1,) * (x.ndim - 2), -1)
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def rms(x, weight):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)


def softmax_over(scores, seen):
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def stated(kind, x, sparse=True):
    """One document x [S, D] in float64, with keys and values of every head and all scores at once: (output, KL)."""
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), PARAMS[BASELINE_KINDS.index(kind)])
    heads, rope, place = CONFIG.num_attention_heads, CONFIG.qk_rope_head_dim, np.arange(len(x))
    seen = np.tri(len(x), dtype=bool)
    if kind == GQA:
        q, k, v = ((x @ p[name]).reshape(len(x), -1, CONFIG.head_dim) for name in ("wq", "wk", "wv"))
        q, k = rotated(q, place), rotated(k, place)
        k, v = (np.repeat(y, heads // SIZES["num_key_value_heads"], axis=1) for y in (k, v))
    else:
        nope, rank = SIZES["qk_nope_head_dim"], SIZES["kv_lora_rank"]
        qr = rms(x @ p["wq_a"], p["q_norm"])
        q = (qr @ p["wq_b"]).reshape(len(x), heads, -1)
        q = np.concatenate([q[..., :nope], rotated(q[..., nope:], place)], -1)
        latent, key = np.split(x @ p["wkv_a"], [rank], -1)
        up = (rms(latent, p["kv_norm"]) @ p["wkv_b"]).reshape(len(x), heads, -1)
        shared = np.repeat(rotated(key, place)[:, None], heads, axis=1)
        k, v = np.concatenate([up[..., :nope], shared], -1), up[..., nope:]
        if kind == MLA_SPARSE:
            scores = np.where(seen, index_scores(p["indexer"], x, qr, rope), -np.inf)
            seen = seen & chosen(scores) if sparse else seen
    p_of = softmax_over(np.einsum("qhk,nhk->hqn", q, k) / np.sqrt(q.shape[-1]), seen)
    out = np.einsum("hqn,nhk->qhk", p_of, v).reshape(len(x), -1) @ p["wo"]
    if kind != MLA_SPARSE:
        return out, None
    mean, guess = p_of.mean(0), softmax_over(scores, seen)
    return out, np.where(seen, mean * np.log(np.where(seen, mean / np.where(seen, guess, 1), 1)), 0).sum(-1)


def index_scores(p, x, qr, rope):
    """Scores [S, S] of the indexer, of all pairs."""
    place, width = np.arange(len(x)), CONFIG.index_head_dim
    turned = lambda y: np.concatenate([y[..., :-rope], rotated(y[..., -rope:], place)], -1)  # noqa: E731
    q = turned((qr @ p["wq_b"]).reshape(len(x), -1, width))
    k = x @ p["wk"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6) * p["k_norm"] + p["k_norm_bias"]
    products = np.maximum(np.einsum("qhd,nd->qhn", q, turned(k)), 0)
    return np.einsum("qhn,qh->qn", products, x @ p["weights_proj"]) / np.sqrt(width * CONFIG.index_n_heads)


def chosen(scores):
    """Which tokens [S, S] are among the best of each query."""
    marks = np.zeros(scores.shape, bool)
    np.put_along_axis(marks, np.argsort(-scores, -1, kind="stable")[:, : CONFIG.index_topk], True, axis=-1)
    return marks


@pytest.mark.parametrize("kind", BASELINE_KINDS)
def test_layers_are_their_float64_statements_document_by_document(kind):
    x = RNG.normal(size=(2, LENGTH, CONFIG.hidden_size))
    run = jax.jit(lambda x: layer(kind, x, segment_ids=jnp.asarray(DOCUMENTS))[0])
    out = run(jnp.asarray(x, jnp.float32))
    for row in range(2):
        ends = [0, 9, 12, LENGTH]
        parts = [stated(kind, x[row, first:last])[0] for first, last in zip(ends, ends[1:], strict=False)]
        np.testing.assert_allclose(out[row], np.concatenate(parts), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", BASELINE_KINDS)
def test_nothing_later_and_no_other_document_reaches_a_token(kind):
    x = jnp.asarray(RNG.normal(size=(2, LENGTH, CONFIG.hidden_size)), jnp.float32)
    run = lambda x: layer(kind, x, segment_ids=jnp.asarray(DOCUMENTS))[0]  # noqa: E731
    jacobian = jax.jit(jax.jacrev(lambda x: run(x).sum((0, 2))))(x)  # [S, B, S, D]
    reached = np.asarray(jnp.abs(jacobian).sum((1, 3)) > 0)
    allowed = np.tri(LENGTH, dtype=bool) & (DOCUMENTS[0][:, None] == DOCUMENTS[0])
    assert not reached[~allowed].any() and reached.diagonal().all()
    assert (reached == allowed).all() or kind == MLA_SPARSE


def test_the_sparse_layer_reads_what_it_chooses_and_its_indexer_follows_its_attention():
    x = jnp.asarray(RNG.normal(size=(1, LENGTH, CONFIG.hidden_size)), jnp.float32)
    for mode in ("dense", "sparse"):
        options = AttentionOptions(mode, True, NONE)
        out, record = jax.jit(lambda x, o=options: layer(MLA_SPARSE, x, o))(x)
        _, kl = stated(MLA_SPARSE, np.asarray(x[0], np.float64), mode == "sparse")
        np.testing.assert_allclose(record["index_loss"].kl[0], kl, rtol=0, atol=1e-5)
        assert record["index_loss"].counts.all() and kl.max() > 0.1
        if mode == "sparse":
            np.testing.assert_array_equal((record["selected"] >= 0).sum(-1)[0], np.minimum(np.arange(LENGTH) + 1, 3))
        else:
            plain = jax.jit(lambda x: layer(MLA_SPARSE, x, SPARSE._replace(mode="dense"))[0])(x)
            np.testing.assert_allclose(out, plain, rtol=0, atol=1e-6)
            assert (record["index_loss"].recall[0] < 0.999).any()


def test_grouped_attention_never_holds_all_scores():
    length, heads = 8192, 4
    shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (heads, 2, 2)]
    bound = jax.ShapeDtypeStruct((1, length), jnp.int32)
    loss = lambda q, k, v, lo, hi: grouped_attention(q, k, v, lo, hi, 0.25).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, bound, bound).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * heads * 4 / 8


def test_softmax_routing_has_no_bias_and_its_two_weights_add_up_to_one():
    config = TINY.replace(scoring_func="softmax", topk_method="greedy", n_shared_experts=0, routed_scaling_factor=1.0)
    gate = Gate(config, "moe", nnx.Rngs(0))
    assert not hasattr(gate, "bias")
    x = RNG.normal(size=(5, config.hidden_size))
    routing = gate(jnp.asarray(x, jnp.float32), jnp.zeros(5, jnp.int32))
    scores = softmax_over(x @ np.asarray(gate.weight[...], np.float64), True)
    np.testing.assert_array_equal(routing.expert_ids, np.argsort(-scores, -1)[:, :2])
    best = np.sort(scores, -1)[:, :-3:-1]
    np.testing.assert_allclose(routing.weights, best / best.sum(-1, keepdims=True), rtol=1e-5)


MIXED = TINY.replace(
    compress_ratios=(0, 4, 0, 0), layer_types=(SLIDING, CSA, MLA_SPARSE), baseline=SIZES,
    scoring_func="softmax", topk_method="greedy", n_shared_experts=0,
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, MIXED])
def test_shapes_from_the_config_are_those_of_the_model_and_a_json_round_trip_keeps_it(config):
    tree = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
    assert tree_shapes(config) == {path: leaf.shape for path, leaf in flatten(tree).items()}
    facts = weights.facts(config)
    is_fact = lambda x: hasattr(x, "axes")  # noqa: E731
    assert jax.tree.structure(tree) == jax.tree.structure(facts, is_leaf=is_fact)
    for fact, leaf in zip(jax.tree.leaves(facts, is_leaf=is_fact), jax.tree.leaves(tree), strict=True):
        assert len(fact.axes) == leaf.ndim
    assert config_from_json(to_released_json(config)) == config
    assert "baseline" not in to_released_json(TINY)


def test_costs_are_those_counted_by_hand():
    heads, tokens = CONFIG.num_attention_heads, 40
    numbers = 2 * 2 * CONFIG.head_dim, 10 + 8, 10 + 8 + CONFIG.index_head_dim
    plan = cache_plan(CONFIG.replace(num_nextn_predict_layers=0), "bfloat16")
    assert plan.sequence(tokens) == 2 * tokens * sum(numbers) and plan.token == 2 * sum(numbers)
    assert count.cache_elements_per_token(CONFIG) == sum(numbers) and count.window_elements(CONFIG) == 0
    found = {product.component: product.flops for product in attention_products(CONFIG, tokens)}
    latents = 2 * heads * (2 * 10 + 8)
    assert found[SCORES] == 2 * CONFIG.index_n_heads * CONFIG.index_head_dim * tokens
    assert sum(found.values()) - found[SCORES] == 4 * heads * CONFIG.head_dim * tokens + latents * (tokens + 3)
    pair = 2 * heads * min(2 * 10 + 8, 6 + 8 + 7)  # whichever form of a latent multiplies less
    longer = CONFIG.replace(index_topk=4)
    more = training_flops_per_token(longer, tokens, "sparse") - training_flops_per_token(CONFIG, tokens, "sparse")
    assert more == pytest.approx(3 * pair * (tokens - 3) / tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": 5}, "baseline is 5: an object with num_key_value_heads, kv_lora_rank"),
        ({"baseline": {"kv_rank": 3}}, "baseline has no key 'kv_rank'"),
        ({"baseline": {"kv_lora_rank": 0}}, "baseline.kv_lora_rank is 0: an integer of at least 1"),
        ({"baseline": {"num_key_value_heads": 3}}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"head_dim": 15}, "head_dim is 15: gqa layers rotate all dims"),
        ({"compress_ratios": (4, 0, 0, 0), "layer_types": (GQA,) * 3}, "is 4 for a gqa layer: 0 is needed"),
        ({"layer_types": (GQA,) * 4}, "for the MTP block: V4's is a sliding layer"),
    ],
)
def test_a_wrong_size_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**changes)


def zeros(config):
    return nest({path: np.zeros(shape, np.float32) for path, shape in tree_shapes(config).items()})


def test_what_baseline_layers_cannot_do_is_refused_in_words(tmp_path):
    made = api.Model(CONFIG, zeros(CONFIG))
    why = "gqa, mla, mla_sparse layers only train and are evaluated"
    for attempt in (
        lambda: made.init_cache(1, 32),
        lambda: made.engine(),
        lambda: trace(made, np.zeros((1, 4), np.int32)),
        lambda: save(tmp_path / "out", CONFIG, made.params),
        lambda: to_transformers_json(CONFIG),
        lambda: cache_parts(CONFIG, 64),
        lambda: cache_plan(CONFIG, "deployed"),
    ):
        with pytest.raises(UserError, match=why):
            attempt()
    with pytest.raises(UserError, match="context parallelism is there for V4's own layers"):
        gqa = BASELINE_LAYERS[GQA](CONFIG, CONFIG.layers[0], nnx.Rngs(0))
        context_parallel.attention(None, None, gqa, None, None, SPARSE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="n_shared_experts is 0, not 1"):
        top_2 = TINY.replace(n_shared_experts=0)
        save(tmp_path / "out", top_2, zeros(top_2))


def test_the_whole_model_runs_and_its_padding_changes_nothing():
    one = {"num_hidden_layers": 1, "compress_ratios": (0, 0), "layer_types": (MLA_SPARSE,)}
    config = MIXED.replace(**one, num_nextn_predict_layers=1)
    params, tokens = random_params(config), RNG.integers(0, 64, LENGTH).astype(np.int32)
    padded = [(np.pad(tokens, sides), np.pad(np.ones_like(tokens), sides)) for sides in ((4, 2), (0, 6))]
    tokens, ids = (np.stack(rows) for rows in zip(*padded, strict=True))
    logits = jax.jit(lambda *batch: model.forward(config, params, batch[0], segment_ids=batch[1]).logits)(tokens, ids)
    np.testing.assert_allclose(logits[0, 4:-2], logits[1, :-6], rtol=0, atol=1e-5)
