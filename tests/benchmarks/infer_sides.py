"""One measurement of `infer_cpu` in a process of its own: `python -m tests.benchmarks.infer_sides '{"side": ...}'`."""

from __future__ import annotations

import time
from typing import Any

from tests.benchmarks.common import THREADS, Result, bench_model, best_of, serve

CHUNK = 1024  # tokens of a part of a long prompt


def ours(kind: str, batch: int, length: int, steps: int) -> Result:
    """Prefill, or decode behind a prefilled context, with a float32 cache."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax import model, weights
    from dsv4_jax.config_json import config_from_json
    from dsv4_jax.layers.kv_cache import init_cache

    jax.config.update("jax_enable_compilation_cache", False)
    config = config_from_json(bench_model() | {"num_nextn_predict_layers": 0})
    params = jax.jit(lambda key: weights.unstack(weights.init(config, key)))(jax.random.key(0))

    def one(params: Any, tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = model.forward(config, params, tokens, cache=cache, logits=False)
        return model.output_logits(params, out.hidden[:, -1]).argmax(-1)[:, None].astype(jnp.int32), out.cache

    def compiled(width: int) -> Any:
        shapes = jax.eval_shape(lambda: init_cache(config, batch, length + 256))
        tokens = jax.ShapeDtypeStruct((batch, width), jnp.int32)
        return jax.jit(one, donate_argnums=2).lower(params, tokens, shapes).compile()

    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    start = time.perf_counter()
    extend = compiled(min(CHUNK, length))
    compile_seconds = time.perf_counter() - start

    def prefill() -> tuple[Any, Any]:
        cache = init_cache(config, batch, length + 256)
        for first in range(0, length, CHUNK):
            token, cache = extend(params, tokens[:, first : first + CHUNK], cache)
        return jax.block_until_ready((token, cache))

    if kind == "prefill":
        return best_of(prefill, steps) | {"compile_seconds": compile_seconds}
    state, decode = [*prefill()], compiled(1)

    def step() -> None:
        state[:] = decode(params, *state)
        state[0].block_until_ready()

    found = best_of(step, steps)
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - idle_expert_bytes(config, params, batch)
    cached = sum(x.nbytes for x in jax.tree.leaves(state[1]))
    return found | {"compile_seconds": compile_seconds, "parameter_bytes": read, "cache_bytes": cached}


def idle_expert_bytes(config: Any, params: Any, batch: int) -> float:
    """Bytes of experts and embedding rows that a step does not read, for routing at random."""
    import jax

    used = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    experts = 0
    for segment in params["segments"].values():
        for block in (block for unit in segment for block in unit.values()):
            experts += sum(x.nbytes for x in jax.tree.leaves(block["ffn"]["experts"]))
    return experts * (1 - used) + params["embed"].nbytes * (1 - batch / config.vocab_size)


def transformers(kind: str, batch: int, length: int, steps: int) -> Result:
    """The same by transformers' model at its defaults, with its own cache."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = DeepseekV4Config(**bench_model(), dtype="float32")
    model = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # zeros, unless loaded: every token would go to one expert
                table.copy_(torch.rand(table.shape[0], config.n_routed_experts).argsort(-1)[:, : table.shape[1]])
    rows = batch if kind == "prefill" else 1  # a context is made once and repeated
    tokens = torch.randint(0, config.vocab_size, (rows, length))

    def prefill(chunk: int) -> tuple[Any, Any]:
        cache = DynamicCache(config=config)
        with torch.no_grad():
            for first in range(0, length, chunk):
                part = tokens[:, first : first + chunk]
                out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), cache

    if kind == "prefill":
        return best_of(lambda: prefill(length), steps)
    token, cache = prefill(CHUNK)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
        repeat_states(cache, batch)
    state = [token.expand(batch, 1).contiguous()]

    def step() -> None:
        with torch.no_grad():
            state[0] = model(state[0], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    return best_of(step, steps)


def repeat_states(cache: Any, batch: int) -> None:
    """Repeat what `batch_repeat_interleave` leaves at one row: the compressors' own tensors."""
    import torch

    def repeated(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == 1:
            return value.repeat_interleave(batch, 0)
        if isinstance(value, dict):
            return {key: repeated(entry) for key, entry in value.items()}
        return [repeated(entry) for entry in value] if isinstance(value, list) else value

    for layer in cache.layers:
        layer.__dict__.update({name: repeated(value) for name, value in vars(layer).items()})


def bandwidth() -> Result:
    """Bytes per second of a two-thread pass over memory far larger than the caches, by torch's own sum or jax's."""
    import jax
    import jax.numpy as jnp

    data = jnp.ones(1 << 28, jnp.float32)
    total = jax.jit(lambda x: x.reshape(2, -1).sum(1)).lower(data).compile()
    seconds = best_of(lambda: jax.block_until_ready(total(data)), 5)["seconds"]
    return {"bytes_per_second": data.nbytes / seconds}


SIDES = {"ours": ours, "transformers": transformers, "bandwidth": bandwidth}

if __name__ == "__main__":
    serve(SIDES)
