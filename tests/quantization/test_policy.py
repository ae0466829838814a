"""Precision policies: what each rounds is what a release stores, `none` is free, and an export loses nothing."""

import dataclasses
import os
import pickle
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

from dsv4_jax import model, weights
from dsv4_jax.checkpoint import load_checkpoint, save
from dsv4_jax.checkpoint.names import tensors_of_scheme
from dsv4_jax.checkpoint.storage import quantisation_of
from dsv4_jax.config import CSA, HCA, SLIDING
from dsv4_jax.errors import UserError
from dsv4_jax.layers.kv_cache import init_cache
from dsv4_jax.presets import preset
from dsv4_jax.quantization.policy import ACTIVATIONS, NONE, ROLES, WEIGHTS, Policy, precision_policy, weight_role
from dsv4_jax.quantization.storage import cache_format
from dsv4_jax.shapes import flatten
from train.losses import OBJECTIVES
from train.recipe import RecipeError, find_recipe
from train.schedule import warmup_constant_cosine
from train.step import Precision, StepPlan, batch_gradients, chosen_experts, make_train_step

FACTS = weights.facts(TINY)
PLAN = StepPlan(TINY, warmup_constant_cosine(1e-2, 1e-3, 0, 5, 10), decay_start=5)
V4 = dataclasses.replace(PLAN, precision=Precision(policy="v4"))


def a_batch(rows=2, length=24):
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (rows, length))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "segment_ids": jnp.ones((rows, length), jnp.int32)}


def gradient_text(plan):
    run = jax.jit(partial(batch_gradients, plan, OBJECTIVES["sparse"], 1))
    return run.lower(jax.eval_shape(lambda: plan.init(0).params), a_batch(), jnp.float32(0.3)).as_text()


def test_none_is_the_program_without_any_hook(monkeypatch):
    with_hooks = gradient_text(PLAN)
    monkeypatch.setattr(Policy, "__call__", lambda self, role, x: x)
    monkeypatch.setattr(Policy, "weights", lambda self, facts, params: params)
    assert gradient_text(PLAN) == with_hooks == gradient_text(V4)
    monkeypatch.undo()
    assert gradient_text(V4) != with_hooks


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro", "nano"])
def test_v4_rounds_exactly_the_matrices_that_a_release_stores_quantised(name):
    config = preset(name)
    released = preset("v4-flash")
    stored_as = quantisation_of(
        config.replace(quantization_config=released.quantization_config, expert_dtype=released.expert_dtype)
    )
    policy, facts = precision_policy("v4", config), flatten(weights.facts(config))
    stored = {leaf: tensor for tensor in tensors_of_scheme(config, "released").values() for leaf in tensor.leaves}
    assert stored.keys() == facts.keys()
    for leaf, tensor in stored.items():
        rounding = policy.rounding.get(weight_role(facts[leaf]))
        assert (rounding.format if rounding else "plain") == stored_as.format_of(tensor), leaf
        # Ours are [in, out], the release's [out, in].
        assert rounding is None or rounding.tile == stored_as.tile_of(tensor)[::-1], leaf


def test_every_role_acts_somewhere():
    asked = []
    spies = {role: lambda x, role=role: asked.append(role) or x for role in ROLES}
    policy, params = Policy(spies), random_params(TINY)
    params = policy.weights(FACTS, params)
    jax.eval_shape(
        lambda params: model.forward(TINY, params, jnp.asarray(random_tokens()), mtp=True, policy=policy).logits, params
    )
    assert set(asked) == set(ROLES)


def test_a_policy_is_static_data():
    first, second = (precision_policy("v4", TINY) for _ in range(2))
    assert first == second and hash(first) == hash(second) and first != precision_policy("fp8", TINY)
    assert pickle.loads(pickle.dumps(first)) == first


def test_single_roles_can_differ():
    policy = precision_policy("v4, kv_entry=none, expert_weight=fp8", TINY)
    assert "kv_entry" not in policy.rounding and policy.rounding["expert_weight"].tile == (128, 128)
    assert policy.rounding["index_q"].format == "fp4"
    only = precision_policy("none,expert_weight=fp4", TINY)
    assert set(only.rounding) == {"expert_weight"} and only.rounding["expert_weight"].tile == (32, 1)
    assert precision_policy("none", TINY) == NONE
    assert set(precision_policy("fp8", TINY).rounding) == set(ACTIVATIONS + WEIGHTS)


@pytest.mark.parametrize("text", ["v5", "v4,kv=none", "v4,kv_entry=fp6", "v4,kv_entry"])
def test_unknown_policies_say_what_there_is(text):
    names = "none, fp8, v4" if text == "v5" else "kv_entry"
    with pytest.raises(UserError, match=names):
        precision_policy(text, TINY)
    with pytest.raises(RecipeError, match="precision.policy"):
        find_recipe("nano", [f'precision.policy="{text}"']).check()


def test_recipes_take_a_policy():
    recipe = find_recipe("nano", ["precision.policy=v4"])
    recipe.check()
    assert recipe.precision.policy == "v4" and find_recipe("nano").precision.policy == "none"


def test_weights_already_rounded_stay_and_lie_stacked_or_apart():
    policy, params = precision_policy("v4", TINY), random_params(TINY)
    rounded = jax.jit(partial(policy.weights, FACTS))
    once = rounded(params)
    jax.tree.map(np.testing.assert_array_equal, rounded(once), once)
    apart = rounded(weights.unstack(params))
    jax.tree.map(np.testing.assert_array_equal, apart, weights.unstack(once))
    plain = flatten(jax.tree.map(lambda fact: weight_role(fact) is None, FACTS))
    before, after = flatten(params), flatten(once)
    assert {leaf for leaf in before if not np.array_equal(before[leaf], after[leaf])} == {
        leaf for leaf, kept in plain.items() if not kept
    }


@pytest.mark.parametrize("expert_dtype", ["fp4", None])
def test_an_export_loses_nothing_of_what_training_computed_with(expert_dtype, tmp_path):
    """Nano's output groups are narrower than a tile, so tiles of the stored matrix hold parts of two."""
    kinds, ratios = (SLIDING, CSA, HCA, SLIDING), (0, 4, 32, 0)  # one block of each kind, and the MTP module's
    nano = preset("nano").replace(num_hidden_layers=3, layer_types=kinds, compress_ratios=ratios, vocab_size=512)
    released = preset("v4-flash")
    config = nano.replace(quantization_config=released.quantization_config, expert_dtype=expert_dtype)
    policy = precision_policy("v4" if expert_dtype else "fp8", nano)
    params = random_params(nano)
    # What is not quantised is stored in BF16: start there.
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 else x, params)
    rounded = policy.weights(weights.facts(nano), params)
    for stored, masters in (("rounded", rounded), ("masters", params)):
        save(tmp_path / stored, config, masters, quantise="release")
        reloaded = flatten(load_checkpoint(tmp_path / stored, dtype=jnp.float32)[1])
        for leaf, x in flatten(rounded).items():
            np.testing.assert_array_equal(x, reloaded[leaf], err_msg=f"{stored} {leaf}")


def test_a_deployed_cache_keeps_what_the_policy_rounded():
    policy, config = precision_policy("v4", preset("nano")), preset("nano")
    deployed = cache_format(config, "deployed")
    rng = np.random.default_rng(0)
    for role, storage, width in (
        ("kv_entry", deployed.entry, config.head_dim),
        ("index_k", deployed.index, config.index_head_dim),
    ):
        rounded = policy(role, jnp.asarray(rng.standard_normal((5, width)), jnp.float32))
        np.testing.assert_array_equal(storage.decode(storage.encode(rounded), jnp.float32), rounded)


@pytest.mark.slow
def test_decoding_under_a_policy_is_the_forward_under_it():
    policy, params = precision_policy("v4", TINY), random_params(TINY)
    params, tokens = jax.jit(partial(policy.weights, FACTS))(params), jnp.asarray(random_tokens(length=20))
    step = jax.jit(lambda tokens, cache: model.forward(TINY, params, tokens, cache=cache, policy=policy))
    whole = step(tokens, None).logits
    out = step(tokens[:, :16], init_cache(TINY, 2, 24))
    rows = [out.logits]
    for i in range(16, 20):
        out = step(tokens[:, i : i + 1], out.cache)
        rows.append(out.logits)
    # Sums in another order can fall on the other side of a rounding: nearly all numbers agree closely.
    error = np.abs(np.concatenate(rows, 1) - whole) / np.abs(whole).max()
    assert np.quantile(error, 0.9) < 1e-5 and error.max() < 0.1


def test_gradients_go_to_the_masters_as_those_of_the_rounded_weights():
    params = random_params(TINY)
    gradients = jax.jit(
        lambda params: batch_gradients(V4, OBJECTIVES["sparse"], 2, params, a_batch(), jnp.float32(0.3))
    )
    of_masters, _ = gradients(params)
    of_rounded, _ = gradients(jax.jit(V4.rounded)(params))
    jax.tree.map(np.testing.assert_array_equal, of_masters, of_rounded)
    moved = [np.abs(x).max() > 0 for x in jax.tree.leaves(of_masters)]
    assert np.mean(moved) > 0.95 and all(np.isfinite(x).all() for x in jax.tree.leaves(of_masters))


def test_masters_stay_float32_and_off_the_grid():
    config = TINY.replace(num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(0,), layer_types=(SLIDING,))
    plan = dataclasses.replace(V4, config=config)
    state = plan.init(0)
    before = jax.tree.map(np.asarray, state.params)["segments"]["0"]["0"]["attn"]
    after = make_train_step(plan, "dense")(state, a_batch())[0].params
    rounded = plan.rounded(after)["segments"]["0"]["0"]["attn"]
    after = after["segments"]["0"]["0"]["attn"]
    for name in ("wq_a", "wo_a"):
        assert after[name].dtype == jnp.float32 and not np.array_equal(after[name], before[name])
        assert not np.array_equal(after[name], rounded[name])


def test_experts_are_chosen_by_the_rounded_model():
    params, batch = random_params(TINY), a_batch()
    choose = {plan: jax.jit(partial(chosen_experts, plan, "sparse", 1)) for plan in (V4, PLAN)}
    chosen = np.asarray(choose[V4](params, batch))
    np.testing.assert_array_equal(chosen, choose[V4](jax.jit(V4.rounded)(params), batch))
    assert (chosen != np.asarray(choose[PLAN](params, batch))).any()


SHARDED = """
import jax
from jax.sharding import AxisType
from dsv4_jax import weights
from dsv4_jax.presets import preset
from dsv4_jax.quantization.policy import precision_policy
from sharding.mesh import make_mesh
from sharding.rules import find_strategy, parameter_shardings

config = preset("nano")
facts, strategy = weights.facts(config), find_strategy("expert-fsdp")
mesh = make_mesh({"expert": 4})
shapes = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
placed = parameter_shardings(facts, shapes, strategy.parameters, mesh)
shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
round = lambda params: precision_policy("v4,attn_weight=none,indexer_weight=none", config).weights(facts, params)
text = jax.jit(round, out_shardings=placed).lower(shapes).compile().as_text()
experts = shapes["segments"]["1"]["0"]["ffn"]["experts"]["w1"]
assert experts.sharding.spec[1] == "expert", experts.sharding
print("gathers", text.count("all-gather("), text.count("all-to-all("))
"""


def test_devices_round_their_own_experts():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.split()[-3:] == ["gathers", "0", "0"], done.stderr[-2000:]
