"""The released sizes by shape alone: nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import model, weights
from dsv4_jax.presets import preset

TOTAL = {"v4-pro": 1.6e12, "v4-flash": 284e9}  # reported parameters


@pytest.fixture(scope="module", params=sorted(TOTAL))
def giant(request):
    """(name, config, abstract parameters)."""
    config = preset(request.param)
    return request.param, config, jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))


def test_init_makes_the_reported_number_of_parameters(giant):
    name, _, params = giant
    trained = [leaf for leaf in jax.tree.leaves({k: v for k, v in params.items() if k != "mtp"})]
    count = sum(leaf.size for leaf in trained if jnp.issubdtype(leaf.dtype, jnp.floating))
    assert abs(count / TOTAL[name] - 1) < 0.02


def test_forward_has_the_right_shapes_in_every_layer(giant):
    _, config, params = giant
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype), params
    )
    tokens = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    run = lambda params, tokens: model.forward(config, params, tokens, mtp=True, record=True, index_loss=True)  # noqa: E731
    out = jax.eval_shape(run, params, tokens)
    assert out.logits.shape == (2, 8192, config.vocab_size)
    assert out.logits.dtype == jnp.float32
    assert out.mtp_hidden.shape == (2, 8192, config.hidden_size)
    assert len(out.layers) == config.num_hidden_layers + 1
    for spec, layer in zip((*config.layers, *config.mtp_layers), out.layers, strict=True):
        assert layer["layer_out"].shape == (2, 8192, 4, config.hidden_size)
        assert layer["layer_out"].dtype == jnp.bfloat16
        assert layer["load"].shape == (config.n_routed_experts,)
        if spec.ratio == 4:
            assert layer["selected"].shape == (2, 8192, config.index_topk)
            assert layer["index_loss"].kl.shape == (2, 8192)


def test_every_parameter_says_its_axes(giant):
    _, config, params = giant
    facts = weights.facts(config)
    is_fact = lambda x: hasattr(x, "axes")  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(facts, is_leaf=is_fact)
    for fact, leaf in zip(jax.tree.leaves(facts, is_leaf=is_fact), jax.tree.leaves(params), strict=True):
        assert len(fact.axes) == leaf.ndim
