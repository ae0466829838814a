"""Compile-only bounds: memory of a CSA block at long context, and the size of the programs of deep stacks."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support import TINY

from dsv4_jax import model, weights
from dsv4_jax.config import CSA, HCA
from dsv4_jax.presets import preset

GIB = 2**30
CSA_BLOCK = preset("nano").replace(
    num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(4,), layer_types=(CSA,), num_hash_layers=0
)

pytestmark = pytest.mark.optimized


def abstract_params(config):
    return jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))


def compiled_training(config, length, **options):
    """Forward and backward of a stack without its output matrix, for [1, length] tokens; nothing is run."""

    def loss(params, tokens):
        out = model.forward(config, params, tokens, logits=False, **options)
        kl = sum(layer["index_loss"].kl.sum() for layer in out.layers if "index_loss" in layer)
        return (out.hidden**2).sum() + kl

    lowered = jax.jit(jax.grad(loss, allow_int=True)).lower(
        abstract_params(config), jax.ShapeDtypeStruct((1, length), jnp.int32)
    )
    return lowered.compile()


def bytes_needed(compiled):
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes, analysis.temp_size_in_bytes + analysis.argument_size_in_bytes


@pytest.fixture(scope="module", params=["sparse", "dense"])
def long_context(request):
    """{length: compiled program} of one nano-wide CSA block, forward and backward with the index loss."""
    lengths = (16384, 65536) if request.param == "sparse" else (65536,)
    return {
        length: compiled_training(CSA_BLOCK, length, attention=request.param, index_loss=True) for length in lengths
    }


def test_mistake_18_a_csa_block_at_65536_tokens_trains_within_8_gib(long_context):
    _, total = bytes_needed(long_context[65536])
    assert total < 8 * GIB


def test_mistake_18_memory_grows_linearly_with_length(long_context):
    if 16384 in long_context:
        short, long = (bytes_needed(long_context[length])[0] for length in (16384, 65536))
        assert long < 4.4 * short


def test_mistake_18_no_buffer_holds_queries_times_entries(long_context):
    # 65,536 queries x 16,384 entries are 1.07e9 elements, before heads; the largest buffer must stay far below.
    shapes = re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]+)\]", long_context[65536].as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in set(shapes))
    assert largest < 65536 * 16384 / 8


def program_size(config):
    """Lines of the lowered forward and backward of the stack, records included; bodies of loops count once."""

    def loss(params, tokens):
        out = model.forward(config, params, tokens, logits=False)
        return out.hidden.sum() + sum(layer["balance"] for layer in out.layers), out.layers

    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    lowered = jax.jit(jax.grad(loss, has_aux=True, allow_int=True)).lower(abstract_params(config), tokens)
    return len(lowered.as_text().splitlines())


def deep(layers):
    """V4-Pro's plan at `layers` layers in tiny widths: 2 HCA and 1 CSA with hash routing, then (HCA, CSA) repeated."""
    kinds = (HCA, *(HCA, CSA) * ((layers - 1) // 2))
    return TINY.replace(
        num_hidden_layers=layers, num_nextn_predict_layers=0, layer_types=kinds, num_hash_layers=3,
        compress_ratios=tuple({HCA: 6, CSA: 4}[kind] for kind in kinds),
    )  # fmt: skip


def test_a_61_layer_plan_is_hardly_a_larger_program_than_a_9_layer_one():
    nine, sixty_one = deep(9), deep(61)
    assert [len(segment.unit) for segment in nine.segments] == [len(segment.unit) for segment in sixty_one.segments]
    # Only taking the layers' records apart grows with depth; compile time follows the size.
    assert program_size(sixty_one) < 1.1 * program_size(nine)


COMPILES = """
import time
import jax, jax.numpy as jnp
from test_memory import abstract_params, deep
from dsv4_jax import model

def seconds(config):
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    loss = lambda params, tokens: (model.forward(config, params, tokens, logits=False).hidden ** 2).sum()
    params, began = abstract_params(config), time.process_time()
    jax.jit(jax.grad(loss, allow_int=True)).lower(params, tokens).compile()
    return time.process_time() - began

seconds(deep(5))  # whatever is done once
print(seconds(deep(9)), seconds(deep(61)))
"""


@pytest.mark.slow
def test_compiling_61_layers_takes_at_most_half_more_than_9():
    """Forward and backward; in seconds of the processor, which other programs on the machine hardly change."""
    nine, sixty_one = map(float, in_a_process(COMPILES, JAX_ENABLE_COMPILATION_CACHE="false"))
    assert sixty_one < 1.5 * nine


TRAINS_AT_LENGTH = """
import resource, sys
import jax, jax.numpy as jnp
from test_memory import CSA_BLOCK, compiled_training
from dsv4_jax import weights

length = int(sys.argv[1])
params = jax.jit(lambda key: weights.init(CSA_BLOCK, key))(jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (1, length), 0, CSA_BLOCK.vocab_size)
step = compiled_training(CSA_BLOCK, length, attention="sparse", index_loss=True)
gradients = jax.block_until_ready(step(params, tokens))
finite = all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients) if g.dtype == jnp.float32)
high_water = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(finite, int(high_water.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the high-water mark of a Linux process")
def test_mistake_18_65536_tokens_are_really_trained_on_within_8_gib():
    """The compiled bound of the tests above, held by a process of its own from start to end."""
    finite, high_water = in_a_process(TRAINS_AT_LENGTH, "65536")
    assert finite == "True" and int(high_water) < 8 * GIB


def in_a_process(script, *arguments, **variables):
    """The words that a script prints last."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command, environment = [sys.executable, "-c", script, *arguments], os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1].split()
