"""One measurement of `train_cpu` in a process of its own: `python -m tests.benchmarks.train_sides '{"side": ...}'`.

Prints one line of JSON. Its own process, because peak memory belongs to a process. jax and torch are imported late,
after the process is confined to as many CPUs as it may have threads.
"""

from __future__ import annotations

import time
from typing import Any

from tests.benchmarks.common import THREADS, Result, bench_model, best_of, serve


def ours(batch: int, length: int, steps: int, unroll: bool) -> Result:
    """Loss and gradients of `dsv4_jax.model`, sparse attention, chunked cross-entropy."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax import model, weights
    from dsv4_jax.config_json import config_from_json
    from train.losses import chunked_cross_entropy, shifted_targets

    jax.config.update("jax_enable_compilation_cache", False)
    config = config_from_json(bench_model() | {"num_nextn_predict_layers": 0})

    def loss(params: Any, tokens: Any) -> Any:
        hidden = model.forward(config, params, tokens, logits=False, unroll=unroll or 1).hidden
        targets, counted = shifted_targets(tokens, jnp.ones_like(tokens), 1)
        flat = hidden.reshape(-1, config.hidden_size)
        total = chunked_cross_entropy(flat, model.output_matrix(params), targets.reshape(-1), counted.reshape(-1))
        return total / counted.sum()

    params = jax.jit(lambda key: weights.init(config, key))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss, allow_int=True)).lower(params, tokens).compile()
    compile_seconds = time.perf_counter() - start
    flops = step_flops(config, length) * batch * length
    timed = best_of(lambda: jax.block_until_ready(step(params, tokens)), steps)
    return timed | {"compile_seconds": compile_seconds, "flops": flops}


def step_flops(config: Any, length: int) -> float:
    """Model FLOPs per token, forward and backward; the indexers run forward only, as nothing here trains them."""
    from train.flops import training_flops_per_token

    unlimited = config.replace(index_topk=length)  # makes sparse attention dense: the difference is the indexers' alone
    indexers = training_flops_per_token(unlimited, length, "sparse") - training_flops_per_token(config, length, "dense")
    return training_flops_per_token(config, length, "sparse") - indexers * 2 / 3


def transformers(batch: int, length: int, steps: int, unroll: bool) -> Result:
    """Loss and gradients of transformers' model at its defaults."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**bench_model(), dtype="float32")).train()
    experts = model.config.n_routed_experts
    with torch.no_grad():
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # zeros, unless loaded: every token would go to one expert
                table.copy_(torch.rand(table.shape[0], experts).argsort(-1)[:, : table.shape[1]])
    tokens = torch.randint(0, model.config.vocab_size, (batch, length))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    chosen = {"attention": model.config._attn_implementation, "experts": model.config._experts_implementation}
    return best_of(step, steps) | chosen


def peak() -> Result:
    """FLOP/s of the machine's fastest float32 matrix product, jax's or numpy's."""
    import jax.numpy as jnp
    import numpy as np

    from train.progress import measured_matmul_peak

    matrix = np.ones((2048, 2048), np.float32)
    by_numpy = 2 * 2048**3 / best_of(lambda: matrix @ matrix, 10)["seconds"]
    return {"flops_per_second": max(by_numpy, measured_matmul_peak(jnp.float32, size=2048, seconds=3.0))}


SIDES = {"ours": ours, "transformers": transformers, "peak": peak}

if __name__ == "__main__":
    serve(SIDES)
