"""The model against freshly made random models of transformers, both ways, in float32.

Six models are drawn over layer orders, window sizes, ratios, top-k, groups, head dimensions, numbers of streams and of
Sinkhorn iterations, hash layers 0 to 3, YaRN on and off; lengths are primes.

A choice (router, indexer) between scores closer than float32 noise has no right answer and changes all that follows, so
tokens are redrawn until transformers' own scores decide by more than 1e-4 everywhere; choices must then be equal.

Reached, the largest of six models: logits 7.5e-6 absolute (they reach 4.4), streams 1.6e-6 of their largest value, loss
1.2e-7, gradients 1.2e-5 of their norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import draw_shapes, make_model, run_where_choices_are_clear, torch, transformers
from support import random_params, transformers_names

from dsv4_jax import model
from dsv4_jax.checkpoint import load_checkpoint, save
from dsv4_jax.config import DeepseekV4Config

pytestmark = pytest.mark.reference

SEEDS = range(6)
LOGITS = 2e-5  # absolute; they reach 5
RELATIVE = 2e-5  # streams: of their largest value; gradients: of their norm


def loss_and_output(config, params, tokens):
    out = model.forward(config, params, tokens, record=True)
    picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), tokens[:, 1:, None], -1)
    return -picked.mean(), out


@pytest.fixture(scope="module", params=SEEDS)
def both(request, tmp_path_factory):
    """(config, our Output, our loss, our gradients by transformers' names, transformers' Result) of one drawn model."""
    torch.set_num_threads(2)
    theirs = make_model(draw_shapes(request.param), request.param)
    expected = run_where_choices_are_clear(theirs, request.param)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    config, params = load_checkpoint(folder)
    step = jax.jit(lambda p, t: jax.value_and_grad(loss_and_output, 1, has_aux=True, allow_int=True)(config, p, t))
    (loss, out), gradients = jax.device_get(step(params, jnp.asarray(expected.tokens, jnp.int32)))
    return config, out, float(loss), transformers_names(config, gradients), expected


def test_logits_match_transformers(both):
    _, out, _, _, expected = both
    np.testing.assert_allclose(out.logits, expected.logits, rtol=0, atol=LOGITS)


def test_the_streams_after_every_layer_match_transformers(both):
    config, out, _, _, expected = both
    assert len(expected.streams) == config.num_hidden_layers
    for i, theirs in enumerate(expected.streams):
        tolerance = RELATIVE * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(out.layers[i]["layer_out"], theirs, rtol=0, atol=tolerance, err_msg=f"layer {i}")


def test_every_choice_of_experts_is_transformers(both):
    _, out, _, _, expected = both
    for i, theirs in expected.experts.items():
        np.testing.assert_array_equal(np.sort(out.layers[i]["expert_ids"], -1), theirs)


def test_the_loss_matches_transformers(both):
    _, _, loss, _, expected = both
    np.testing.assert_allclose(loss, expected.loss, rtol=2e-6)


def test_every_gradient_matches_transformers(both):
    _, _, _, gradients, expected = both
    # Measured against at least a hundredth of the largest: with one expert per token the router's gradient is 0.
    largest = max(np.linalg.norm(g) for g in expected.gradients.values())
    error = lambda ours, g: np.linalg.norm(ours - g) / max(np.linalg.norm(g), 1e-2 * largest)  # noqa: E731
    errors = {name: error(gradients[name], g) for name, g in expected.gradients.items()}
    assert {name: e for name, e in errors.items() if e > RELATIVE} == {}


def test_what_transformers_gives_no_gradient_gets_exactly_none(both):
    _, _, _, gradients, expected = both
    without = set(gradients) - set(expected.gradients)
    assert without and all("indexer" in name for name in without)
    assert not any(gradients[name].any() for name in without)


EXPORTED = DeepseekV4Config(
    vocab_size=48, hidden_size=24, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1,
    num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=12, o_lora_rank=8, o_groups=2,
    sliding_window=7, index_n_heads=8, index_head_dim=8, index_topk=5, n_routed_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=12, swiglu_limit=1.0,
    rope_scaling={
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1
    },
)  # fmt: skip


@pytest.fixture(scope="module", params=["released", "transformers"])
def exported(request, tmp_path_factory):
    """(our parameters, transformers' model of the folder that we wrote, its loading report)."""
    params = random_params(EXPORTED)
    folder = tmp_path_factory.mktemp("exported") / request.param
    save(folder, EXPORTED, params, scheme=request.param)
    theirs, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    return params, theirs, report


def test_transformers_finds_every_weight_that_we_write(exported):
    params, theirs, report = exported
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in report["unexpected_keys"])
    ours = transformers_names(EXPORTED, params)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), ours[name], err_msg=name)


def test_transformers_computes_our_logits_from_what_we_write(exported):
    params, theirs, _ = exported
    expected = run_where_choices_are_clear(theirs, seed=0, length=141)
    logits = jax.jit(lambda p, t: model.forward(EXPORTED, p, t).logits)(params, jnp.asarray(expected.tokens, jnp.int32))
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=LOGITS)
