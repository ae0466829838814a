"""Low-rank adapters: what they add, where, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

from dsv4_jax import model, weights
from dsv4_jax.errors import UserError
from dsv4_jax.lora import TARGETS, Lora, adapted_paths, adapter_facts, init, merged, target_of
from dsv4_jax.shapes import flatten, nest

FACTS = weights.facts(TINY)
PARAMS = random_params(TINY)


def drawn(lora):
    """Adapters whose product is not zero."""
    factors = flatten(init(lora, FACTS, PARAMS, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(factors))
    draw = lambda path, x, key: jax.random.normal(key, x.shape) if path.endswith("/b") else x  # noqa: E731
    return nest({path: draw(path, x, key) for (path, x), key in zip(factors.items(), keys, strict=True)})


def test_an_adapted_model_starts_as_the_model_it_adapts():
    lora = Lora(rank=2, targets=TARGETS, streams="adapted")
    same = merged(lora, PARAMS, init(lora, FACTS, PARAMS, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, same, PARAMS)


def test_every_layer_expert_and_group_has_an_update_of_its_own():
    lora = Lora(rank=2, alpha=3.0, targets=("attn", "experts"))
    adapters = drawn(lora)
    before, after, factors = flatten(PARAMS), flatten(merged(lora, PARAMS, adapters)), flatten(adapters)
    paths = adapted_paths(adapters)
    for path, fact in flatten(FACTS).items():
        if path not in paths:
            np.testing.assert_array_equal(after[path], before[path])
            continue
        assert target_of(fact) in ("attn", "experts")
        a, b = (np.asarray(factors[f"{path}/{name}"], np.float64) for name in "ab")
        for at in np.ndindex(before[path].shape[:-2]):
            wanted = np.asarray(before[path][at], np.float64) + 3.0 / 2 * a[at] @ b[at]
            np.testing.assert_allclose(after[path][at], wanted, rtol=1e-5, atol=1e-5)
    stacks = {len(before[path].shape) for path in paths}
    assert stacks == {2, 3, 4}  # the MTP block's alone; layers or experts of matrices; layers x experts (or groups)


def test_no_update_of_a_generator_leaves_the_manifold_and_held_ones_stay():
    tokens = jnp.asarray(random_tokens(1, length=16))
    for streams in ("held", "adapted"):
        lora = Lora(rank=2, alpha=0.1, streams=streams)
        changed = merged(lora, PARAMS, drawn(lora))
        generators = [path for path in flatten(PARAMS) if "hc_" in path and path.endswith("fn")]
        same = [bool((flatten(changed)[path] == flatten(PARAMS)[path]).all()) for path in generators]
        assert all(same) if streams == "held" else not any(same)
        rows, columns = jnp.stack([x["hc_errors"] for x in model.forward(TINY, changed, tokens).layers]).max(0)
        # Sinkhorn ends with the columns; how far rows have come is a matter of its rounds.
        assert columns < 1e-5 and rows < 0.1


def test_facts_lie_beside_the_adapters():
    lora = Lora(rank=2, targets=TARGETS, streams="adapted")
    adapters, facts = init(lora, FACTS, PARAMS, jax.random.key(0)), adapter_facts(lora, FACTS)
    assert jax.tree.structure(adapters) == jax.tree.structure(facts)
    assert all(len(f.axes) == x.ndim for f, x in zip(jax.tree.leaves(facts), jax.tree.leaves(adapters), strict=True))
    matrices = [path for path, fact in flatten(FACTS).items() if fact.optimizer == "muon"]
    assert sorted(adapted_paths(adapters)) == sorted(matrices)


def test_what_cannot_be_is_said():
    assert Lora(rank=0, targets=("atn",)).problems() == [
        f"lora.targets has ['atn']; there are {', '.join(TARGETS)}",
        "lora.rank is 0, at least 1 is needed",
    ]
    with pytest.raises(UserError, match="no low rank for "):
        init(Lora(rank=4096), FACTS, PARAMS, jax.random.key(0))
