"""Attention with the tokens of each row on several devices is attention on one: values, gradients, traffic, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import (
    BATCH,
    KINDS,
    LAYERS,
    STRATEGY,
    attention_layer,
    collectives,
    errors_of_layers,
    errors_of_models,
    influence,
    temporary_bytes,
)
from devices import on_devices
from support import TINY

from dsv4_jax.errors import UserError
from dsv4_jax.layers.attention import AttentionOptions
from dsv4_jax.layers.layout import make_layout
from dsv4_jax.quantization.policy import NONE
from sharding import context_parallel
from sharding.mesh import AXES

# TINY's blocks have 4 and 6 tokens, its window 5. Parts of 24 tokens hold whole blocks of both kinds and parts of 6 of
# one, parts of 20 and 10 end within blocks, and parts of 3 are shorter than the window and than every block.
MESHES = {
    (48, False): [{"context": 2, "data": 2, "tensor": 2}, {"context": 8}],
    (40, False): [{"context": 4, "fsdp": 2}],
    (24, False): [{"context": 8}],
    (40, True): [{"context": 2, "expert": 2}, {"context": 8}],
    (24, True): [{"context": 4, "data": 2}, {"context": 8}],
}


@pytest.mark.parametrize(("length", "packed"), MESHES, ids=lambda case: str(case))
def test_outputs_choices_losses_and_gradients_of_every_kind_of_layer_are_those_of_one_device(length, packed):
    for errors in on_devices(8, errors_of_layers, length, packed, MESHES[length, packed]):
        assert {name for name in errors if "selected" in name and errors[name] == 0}
        assert max(errors.values()) < 5e-6, max(errors, key=errors.get)


@pytest.mark.parametrize(
    ("packed", "contexts", "gradient"),
    [(False, [8], False), (True, [2], False), pytest.param(True, [4], True, marks=pytest.mark.slow)],
    ids=["plain rows", "packs", "gradients of packs"],
)
def test_the_whole_model_is_that_of_one_device(packed, contexts, gradient):
    for errors in on_devices(8, errors_of_models, 40, packed, contexts, gradient):
        assert max(errors.values()) < 5e-5, max(errors, key=errors.get)


def test_no_gradient_reaches_later_tokens_or_other_documents_on_any_device():
    ids, sizes = on_devices(4, influence, 24, 4)
    starts = np.concatenate([np.ones((BATCH, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    documents = np.cumsum(starts, axis=1)
    may_see = np.tril(documents[:, :, None] == documents[:, None, :])
    assert not sizes[:, ~may_see].any()
    assert (sizes[:, may_see] > 0).mean() > 0.5
    # A document of 18 tokens over four devices: the dense branches see all of its complete blocks.
    last = 3 + 18 - 1
    for kind in ("CSA dense", "HCA"):
        assert (sizes[list(KINDS).index(kind), 0, last, 3:21] > 0).all()


def sizes_of(found, operation):
    return sorted(shape for name, shape in found if name == operation)


def test_only_entries_and_keys_are_gathered_and_boundary_rows_sent_to_the_neighbour():
    length, context = 48, 4
    entries, keys = (BATCH, length // 4, TINY.head_dim), (BATCH, length // 4, TINY.index_head_dim)
    window = (BATCH, TINY.sliding_window, TINY.head_dim)
    found = on_devices(4, collectives, length, context, False, False)
    assert sizes_of(found, "all-gather") == sorted([entries, keys])
    # A whole block before the first one, values and scores, of the compressor and the indexer's.
    boundary = [(BATCH, 4, 2 * width) for width in (TINY.head_dim, TINY.index_head_dim) for _ in range(2)]
    assert sizes_of(found, "collective-permute") == sorted([window, *boundary])
    assert {name for name, _ in found} == {"all-gather", "collective-permute"}


def test_packs_gather_no_more_than_counts_and_positions_besides():
    length, context = 48, 4
    found = on_devices(4, collectives, length, context, True, False)
    gathered = sizes_of(found, "all-gather")
    assert [shape for shape in gathered if len(shape) > 2] == [(BATCH, 12, 8), (BATCH, 12, 16)]
    assert all(np.prod(shape) <= BATCH * length for shape in gathered if len(shape) == 2)  # integers


def test_the_backward_pass_moves_what_the_forward_pass_moved_and_the_weights_gradients():
    length, context = 48, 4
    found = on_devices(4, collectives, length, context, False, True)
    assert len(sizes_of(found, "all-gather")) == 2
    assert len(sizes_of(found, "collective-permute")) == 2 * 5
    largest_weight = max(np.prod(leaf.shape) for leaf in jax.tree.leaves(LAYERS[1]))
    summed = [shape for name, shape in found if name in ("all-reduce", "reduce-scatter")]
    assert max(np.prod(shape) for shape in summed) <= largest_weight < BATCH * length * TINY.hidden_size


def test_activations_of_a_million_tokens_fall_with_the_number_of_devices():
    one, eight = on_devices(8, temporary_bytes, 1 << 20, [1, 8])
    assert eight < one / 7


def test_rows_that_do_not_divide_are_refused_by_name():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4, 1), AXES)
    x, options = jnp.zeros((1, 41, TINY.hidden_size)), AttentionOptions("dense", False, NONE)
    layer = attention_layer(TINY, 0, LAYERS[0])
    with pytest.raises(UserError, match="41 tokens do not divide over 4 devices of context: pad them to 44"):
        context_parallel.attention(mesh, STRATEGY, layer, x, make_layout(TINY, 1, 41, None), options)
