"""Every process makes the same program: Python's hash seed, another one in each, must not order anything.

Processes of one job have to run the same program, and a compilation cache only helps who asks for what is in it.
"""

import os
import subprocess
import sys
from pathlib import Path

PRINT_DIGESTS = """
import hashlib, jax, jax.numpy as jnp
from dsv4_jax import model, weights
from dsv4_jax.layers.kv_cache import init_cache
from dsv4_jax.presets import preset
from train.schedule import warmup_constant_cosine
from train.step import StepPlan, make_train_step

config = preset("nano")
params = jax.eval_shape(lambda: weights.init(config, jax.random.key(0)))
cache = jax.eval_shape(lambda: init_cache(config, 1, 256))
tokens = jax.ShapeDtypeStruct((1, 48), jnp.int32)
extend = jax.jit(lambda params, tokens, cache: model.forward(config, params, tokens, cache=cache))
plan = StepPlan(config, warmup_constant_cosine(1e-3, 1e-4, 0, 5, 10), 5)
state, batch = jax.eval_shape(lambda: plan.init(0)), {"tokens": tokens, "segment_ids": tokens}
for lowered in (extend.lower(params, tokens, cache), make_train_step(plan, "sparse").lower(state, batch)):
    print(hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""


def test_programs_do_not_depend_on_the_hash_seed():
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_DIGESTS],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1", "2", "3")
    ]
    programs = [process.communicate(timeout=300)[0].split() for process in processes]
    assert len(programs[0]) == 2 and all(found == programs[0] for found in programs)
