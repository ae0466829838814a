"""A trace against the float64 statement of the model and against itself across caches and packs; and it costs nothing.

Largest differences reached: masses, weights and mixing 3e-6, index scores 2e-5 of their largest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import LENGTH, TINY, blocks_in_order, load_fixture, random_params, random_tokens, run_oracle

import dsv4_jax as dsv4
from dsv4_jax import model, weights
from dsv4_jax.analysis.trace import trace
from dsv4_jax.config import CSA, SLIDING
from dsv4_jax.errors import UserError
from dsv4_jax.layers import attention
from dsv4_jax.observer import Observer
from dsv4_jax.quantization.policy import Policy, precision_policy

MASS, SCORE = 1e-5, 5e-5  # absolute; relative to the largest
QUERIES = (0, 3, 17, LENGTH - 1)
PARAMS, TOKENS = random_params(TINY), random_tokens()
MODEL = dsv4.Model(TINY, PARAMS)


def make_case(name):
    if name == "tiny":
        return MODEL, TOKENS
    config, params, expected, _ = load_fixture(name)
    return dsv4.Model(config, params), np.asarray(expected["input_ids"], np.int32)


@pytest.fixture(scope="module", params=["tiny", "pub_a", pytest.param("pub_b", marks=pytest.mark.slow)])
def case(request):
    """(model, trace of the first row, the statement's record of it)."""
    asked, tokens = make_case(request.param)
    found = jax.device_get(dsv4.trace(asked, tokens[:1], queries=QUERIES, per_head=True).layers)
    return asked, found, run_oracle(asked.config, asked.params, tokens[0]).layers


def check(ours, theirs, tolerance=MASS):
    np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(theirs), rtol=0, atol=tolerance)


def test_masses_are_the_shares_of_the_joint_softmax(case):
    _, found, stated = case
    for ours, theirs in zip(found, stated, strict=False):
        for name, part in (("window_mass", 0), ("entry_mass", 1)):
            check(getattr(ours.attention, name)[0], np.array([mass[part].sum(-1) for mass in theirs["mass"]]))
        check(ours.attention.sink_mass[0], np.array([mass[2] for mass in theirs["mass"]]))
        check(sum(ours.attention[:3]), np.ones_like(ours.attention.sink_mass))


def test_experts_their_weights_and_the_routers_entropy(case):
    _, found, stated = case
    for ours, theirs in zip(found, stated, strict=False):
        np.testing.assert_array_equal(ours.experts.expert_ids[0], theirs["expert_ids"])
        check(ours.experts.weights[0], theirs["weights"])
        p = theirs["router_scores"] / theirs["router_scores"].sum(-1, keepdims=True)
        check(ours.experts.entropy[0], -(p * np.log(p)).sum(-1))


def test_chosen_entries_their_scores_their_masses_and_the_tokens_they_stand_for(case):
    asked, found, stated = case
    m = {spec: spec.ratio for spec in asked.config.layers}
    assert any(layer.spec.attention == CSA for layer in found)
    for ours, theirs in zip(found, stated, strict=False):
        if ours.spec.attention != CSA:
            with pytest.raises(UserError, match="nothing was chosen"):
                ours.chosen_spans()
            continue
        spans, look = ours.chosen_spans(), ours.attention
        for t, selected in enumerate(theirs["selected"]):
            used = look.chosen[0, t] >= 0
            np.testing.assert_array_equal(look.chosen[0, t, used], selected)
            scores = theirs["scores"][t, selected]
            check(look.chosen_scores[0, t, used], scores, SCORE * np.abs(theirs["scores"]).max())
            check(look.chosen_mass[0, t, used], theirs["mass"][t][1].mean(0))
            np.testing.assert_array_equal(spans[0, t, used, 0], selected * m[ours.spec])
            assert (spans[0, t, used, 1] <= t + 1).all() and (spans[0, t, ~used] == -1).all()
            assert not look.chosen_mass[0, t, ~used].any()


def test_whole_distributions_of_the_queries_asked_for(case):
    asked, found, stated = case
    window = asked.config.sliding_window
    for ours, theirs in zip(found, stated, strict=False):
        look = ours.attention.queries
        for q, t in enumerate(QUERIES):
            near, far, _ = theirs["mass"][t]
            check(look.window[0, q, :, window - near.shape[1] :], near)
            assert not look.window[0, q, :, : window - near.shape[1]].any()
            if ours.spec.attention == SLIDING:
                assert look.entries is None
                continue
            used = look.entry_ids[0, q] >= 0
            check(look.entries[0, q][:, used], far)
            assert not look.entries[0, q][:, ~used].any()
            ids = theirs["selected"][t] if ours.spec.attention == CSA else np.arange((t + 1) // ours.spec.ratio)
            np.testing.assert_array_equal(look.entry_ids[0, q, used], ids)
            if ours.spec.attention == CSA:
                scores, visible = theirs["scores"][t], (t + 1) // ours.spec.ratio
                check(look.index_scores[0, q, :visible], scores[:visible], SCORE * np.abs(scores).max())
                assert (look.index_scores[0, q, visible:] == -np.inf).all()


def test_mixing_and_the_gain_of_its_product_over_depth(case):
    _, found, stated = case
    product = np.eye(found[0].mixing.pre.shape[-1])
    for ours, theirs in zip(found, stated, strict=False):
        for site, maps in enumerate(theirs["maps"]):
            for name, map_ in zip(("pre", "post", "comb"), maps, strict=True):
                check(getattr(ours.mixing, name)[0, :, site], map_)
            check(ours.mixing.row_error[0, :, site], np.abs(maps[2].sum(-1) - 1).max(-1), 3e-6)
            check(ours.mixing.column_error[0, :, site], np.abs(maps[2].sum(-2) - 1).max(-1), 3e-6)
            product = product @ maps[2]
            check(ours.mixing.gain[0, :, site, 0], np.abs(product).sum(-1).max(-1))
            check(ours.mixing.gain[0, :, site, 1], np.abs(product).sum(-2).max(-1))


def test_dense_attention_gives_the_indexers_recall():
    found = dsv4.trace(MODEL, TOKENS[:1], attention="dense", mtp=True).layers
    stated = run_oracle(TINY, PARAMS, TOKENS[0], "dense").layers
    recall = np.asarray(found[1].attention.recall)[0]
    assert np.isnan(recall[:3]).all() and found[0].attention.recall is None and len(found) == 4
    check(recall[3:], stated[1]["recall"][3:])
    check(np.asarray(found[3].experts.weights)[0, :-1], stated[3]["weights"][:-1])  # the MTP block


def same(a, b, take):
    """Every array of trace `a` is what `take` makes of the same array of `b`."""
    for ours, theirs in zip(a.layers, b.layers, strict=True):
        for part in ("experts", "mixing", "attention"):
            for name, x in getattr(ours, part)._asdict().items():
                if name == "queries" or x is None:
                    continue
                x, y = (np.asarray(z, np.float64) for z in (x, take(getattr(getattr(theirs, part), name))))
                tolerance = SCORE * np.abs(y[np.isfinite(y)]).max() if name == "chosen_scores" else MASS
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=f"{ours.spec} {part}.{name}")


def test_a_decode_step_traces_as_its_position_of_a_prefill():
    whole = dsv4.trace(MODEL, TOKENS, queries=QUERIES)
    before = dsv4.trace(MODEL, TOKENS[:, :-1], cache=MODEL.init_cache(2, 48))
    step = dsv4.trace(MODEL, TOKENS[:, -1:], cache=before.output.cache, queries=QUERIES[-1:])
    same(before, whole, lambda x: x[:, :-1])
    same(step, whole, lambda x: x[:, -1:])
    np.testing.assert_array_equal(step.layers[1].chosen_spans(), whole.layers[1].chosen_spans()[:, -1:])
    for ours, theirs in zip(step.layers, whole.layers, strict=True):
        check(ours.attention.queries.window, theirs.attention.queries.window[:, -1:])
        if theirs.attention.queries.entries is not None:
            count = theirs.attention.queries.entries.shape[-1]  # a cache has room for more
            check(ours.attention.queries.entries[..., :count], theirs.attention.queries.entries[:, -1:])


def test_a_document_in_a_pack_traces_as_alone():
    first = 18
    ids = np.where(np.arange(LENGTH) < first, 1, 2)[None]
    packed = dsv4.trace(MODEL, TOKENS[:1], segment_ids=ids)
    alone = dsv4.trace(MODEL, TOKENS[:1, first:])
    for ours, theirs in zip(packed.layers, alone.layers, strict=True):
        for name in ("window_mass", "entry_mass", "sink_mass"):
            check(getattr(ours.attention, name)[:, first:], getattr(theirs.attention, name))
    spans = packed.layers[1].chosen_spans()[:, first:]
    np.testing.assert_array_equal(jnp.where(spans < 0, -1, spans - first), alone.layers[1].chosen_spans())


@pytest.mark.slow
def test_rounding_is_measured_wherever_the_policy_acts():
    """Against a forward without any compilation, whose policy keeps every array it is given."""
    v4, tokens, kept = precision_policy("v4", TINY), TOKENS[:1, :14], []

    def spying(role):
        def spy(x):
            rounded = v4.rounding[role](x)
            kept.append((role, np.asarray(x, np.float64), np.asarray(rounded, np.float64)))
            return rounded

        return spy

    found = dsv4.trace(MODEL, tokens, policy="v4", mtp=True)
    spies = Policy({role: spying(role) for role in v4.rounding})
    with jax.disable_jit():
        rounded = spies.weights(weights.facts(TINY), PARAMS)
        assert {role for role, *_ in kept} == {name for name in v4.rounding if name.endswith("_weight")}
        kept.clear()
        model.forward(TINY, rounded, jnp.asarray(tokens), mtp=True, policy=spies)
    layer, blocks = 0, [{} for _ in range(4)]
    for role, x, y in kept:
        sums = np.array([np.square(y - x).sum(), np.square(x).sum()])
        blocks[layer][role] = blocks[layer].get(role, 0) + sums
        # The shared expert's hidden activations are the last that a block rounds.
        layer += role == "shared_input" and x.shape[-1] == TINY.moe_intermediate_size
    assert layer == 4
    for ours, theirs in zip(found.layers, blocks, strict=True):
        activations = {name: value for name, value in ours.rounding.items() if not name.endswith("_weight")}
        assert activations.keys() == theirs.keys()
        for role, (error, square) in theirs.items():
            np.testing.assert_allclose(activations[role], np.sqrt(error / square), rtol=2e-3, err_msg=role)


def test_rounding_of_matrices_is_that_of_the_layers_own():
    v4 = precision_policy("v4", TINY)
    found = dsv4.trace(MODEL, TOKENS[:1, :8], policy=v4)
    experts = blocks_in_order(TINY, PARAMS)[1]["ffn"]["experts"]
    exact = np.concatenate([np.asarray(experts[name], np.float64).ravel() for name in ("w1", "w2", "w3")])
    rounded = [np.asarray(v4.rounding["expert_weight"](experts[name])) for name in ("w1", "w2", "w3")]
    error = np.concatenate([x.ravel() for x in rounded]) - exact
    expected = np.sqrt(np.square(error).sum() / np.square(exact).sum())
    np.testing.assert_allclose(found.layers[1].rounding["expert_weight"], expected, rtol=1e-5)


def forward_text(**options):
    run = jax.jit(lambda params, tokens: model.forward(TINY, params, tokens, **options).logits)
    return run.lower(PARAMS, jnp.asarray(TOKENS)).as_text()


def test_the_ordinary_program_is_that_of_a_model_without_hooks(monkeypatch):
    before = forward_text()
    trace(MODEL, TOKENS[:1, :8])
    with_hooks = forward_text()
    for name in ("Attended", "Passed"):  # what the hooks are given vanishes, and so do the hooks
        monkeypatch.setattr(model if name == "Passed" else attention, name, lambda *_: None)
    monkeypatch.setattr(Observer, "attention", lambda self, seen: {})
    monkeypatch.setattr(Observer, "block", lambda self, seen: {})
    assert before == with_hooks == forward_text()
    monkeypatch.undo()

    class Nosy(Observer):
        def block(self, seen):
            return {"trace": seen.maps[0].comb}

    look = lambda params: [x["trace"] for x in model.forward(TINY, params, TOKENS, observer=Nosy()).layers]  # noqa: E731
    assert jax.eval_shape(look, PARAMS)[0].shape == (*TOKENS.shape, TINY.hc_mult, TINY.hc_mult)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"queries": [LENGTH]}, "positions 0 to 40"),
        ({"queries": [1], "segment_ids": np.ones_like(TOKENS)}, "one document"),
    ],
)
def test_queries_that_cannot_be_answered(asked, message):
    with pytest.raises(UserError, match=message):
        dsv4.trace(MODEL, TOKENS, **asked)
