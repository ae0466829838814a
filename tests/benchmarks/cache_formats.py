"""What the cache's format does to a trained model: `python -m tests.benchmarks.cache_formats RUN`.

RUN is a run of `dsv4 train` or a checkpoint with a tokenizer. The project's own documents, which no recipe trains
on, are read in chunks through a cache in each format; every token's logits are compared with those of a float32 cache.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax as dsv4
from dsv4_jax import model
from dsv4_jax.analysis.memory import cache_plan
from dsv4_jax.layers.kv_cache import init_cache
from tests.benchmarks.common import ROOT, machine, markdown

CHUNK = 32
COLUMNS = ("cache", "bytes per token", "bytes of state", "loss, nats", "logit error", "same first choice", "KL, nats")


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cache_formats", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=2048, help="length of each document")
    options = parser.parse_args()
    loaded = dsv4.load(options.run)
    assert loaded.tokenizer is not None
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    )
    ids = np.array(loaded.tokenizer.encode(text), np.int32)
    length = min(options.tokens, len(ids)) // CHUNK * CHUNK
    tokens = jnp.asarray(ids[: len(ids) // length * length].reshape(-1, length))
    exact = read_through(loaded.config, "float32", loaded.params, tokens)
    rows = []
    for name in ("float32", "bfloat16", "deployed"):
        found = exact if name == "float32" else read_through(loaded.config, name, loaded.params, tokens)
        plan = cache_plan(loaded.config, name)
        rows.append([name, f"{plan.token:.0f}", f"{plan.state:,}", *compared(exact, found, tokens)])
    print(machine(False) + f"; {tokens.shape[0]} documents of {length} tokens\n\n" + markdown(COLUMNS, rows))


@partial(jax.jit, static_argnums=(0, 1))
def read_through(config: Any, format: str, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits [B, S, V] of tokens that go through a cache in chunks."""
    chunks = jnp.moveaxis(tokens.reshape(len(tokens), -1, CHUNK), 1, 0)

    def step(cache: Any, chunk: jax.Array) -> tuple[Any, jax.Array]:
        out = model.forward(config, params, chunk, cache=cache)
        return out.cache, out.logits

    logits = jax.lax.scan(step, init_cache(config, *tokens.shape, format), chunks)[1]
    return jnp.moveaxis(logits, 0, 1).reshape(*tokens.shape, -1)


def compared(exact: jax.Array, found: jax.Array, tokens: jax.Array) -> list[str]:
    """Loss, error of the logits as a share of their spread, agreement of the likeliest token, mean divergence."""
    spread = (exact - exact.mean(-1, keepdims=True)).std()
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(found)
    loss = -jnp.take_along_axis(q[:, :-1], tokens[:, 1:, None], -1).mean()
    error = jnp.sqrt(jnp.mean((found - exact) ** 2)) / spread
    same = (exact.argmax(-1) == found.argmax(-1)).mean()
    return [f"{loss:.4f}", f"{error:.2%}", f"{same:.1%}", f"{(jnp.exp(p) * (p - q)).sum(-1).mean():.1e}"]


if __name__ == "__main__":
    main()
