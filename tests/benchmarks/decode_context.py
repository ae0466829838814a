"""Decoding at long context on a CPU: `python -m tests.benchmarks.decode_context`.

A pair of layers with V4-Flash's widths (CSA then HCA, 64 heads of 512, indexer of 64 heads of 128, top-k 512; 8 experts
of width 256, a small vocabulary) decodes one token of one sequence behind 4,096, 65,536 and 1,048,576 tokens, from a
deployed cache of random bytes. The first row again in a cache with room for the last: room must cost nothing.

The parts that may grow are timed apart, on the same cache: choosing entries (the indexer's keys) and attending all
HCA entries. A line a + b * context is fitted to each. Every row is a process of its own, on two CPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tests.benchmarks.common import Result, best_of, machine, markdown, measure, serve

LONGEST = 1 << 20
CONTEXTS = (4096, 65536, 262144, LONGEST)
COLUMNS = (
    "context", "room", "cache, MiB", "state, MiB", "token, ms", "choosing, ms", "all HCA entries, ms", "rest, ms",
    "peak MiB",
)  # fmt: skip


def main() -> None:
    """Measure every context in its own process; print a markdown table and the fits."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decode_context", description=__doc__)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--steps", type=int, default=20, help="timed tokens; the fastest counts")
    options = parser.parse_args()
    cases = [(context, context) for context in options.contexts]
    cases.append((options.contexts[0], options.contexts[-1]))
    results = []
    for context, room in cases:
        results.append(measure("decode_context", side="ours", context=context, room=room, steps=options.steps))
        print(results[-1], flush=True)
    print("\n" + machine(False) + "\n\n" + markdown(COLUMNS, [row(result) for result in results]))
    print("\n" + "\n".join(fits([result for result in results if result["room"] == result["context"]])))


def ours(context: int, room: int, steps: int) -> Result:
    """Bytes and seconds of one token behind `context` tokens, in a cache with room for `room` and a block more."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax import model, weights

    config = layer_pair()
    params = jax.jit(lambda key: weights.init(config, key))(jax.random.key(0))
    cache = synthetic_cache(config, context, room + 128)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    result = {"context": context, "room": room, "cache": size(cache.pools), "state": size(cache.states)}
    for part, run in parts(config, cache, context).items():
        result[part] = best_of(run, steps)["seconds"]

    step = jax.jit(lambda p, t, c: model.forward(config, p, t, cache=c), donate_argnums=2)
    held, token = [cache], jnp.zeros((1, 1), jnp.int32)
    del cache, run

    def decode() -> None:
        out = step(params, token, held.pop())
        held.append(jax.block_until_ready(out.cache))

    timed = best_of(decode, min(steps, 120))
    return result | {"token": timed["seconds"], "peak_mib": timed["peak_mib"]}


def parts(config: Any, cache: Any, context: int) -> dict[str, Callable[[], Any]]:
    """What may grow with the context: choosing entries by the indexer's keys, and attending all HCA entries."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax.kernels.indexer_topk import paged as index
    from dsv4_jax.kernels.sparse_attention import paged as attention
    from dsv4_jax.layers.kv_cache import stacks

    csa, hca = (
        cache.layer(spec, jax.tree.map(lambda x: x[0], cache.states[name]), cache.pools[name], jnp.int32(0))
        for name, spec in stacks(config).items()
    )
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(1, 1, *shape)), jnp.float32)  # noqa: E731
    hi = {ratio: jnp.full((1, 1), context // ratio, jnp.int32) for ratio in config.compress_ratios}
    choose = jax.jit(lambda q, pages, w, hi: index.index_topk(q, pages, w, hi, config.index_topk))
    attend = jax.jit(lambda q, pages, hi: attention.range_attention(q, pages, hi, config.head_dim**-0.5))
    sought, weights = normal(config.index_n_heads, config.index_head_dim), normal(config.index_n_heads)
    queries = normal(config.num_attention_heads, config.head_dim)
    return {
        "choosing": lambda: jax.block_until_ready(choose(sought, csa.index_pages, weights, hi[4])),
        "attending": lambda: jax.block_until_ready(attend(queries, hca.pages, hi[128])),
    }


def layer_pair() -> Any:
    """V4-Flash's CSA and HCA layer with few, narrow experts and few words."""
    from dsv4_jax.presets import preset

    return preset("v4-flash").replace(
        vocab_size=1024, num_hidden_layers=2, num_nextn_predict_layers=0, compress_ratios=(4, 128), num_hash_layers=0,
        n_routed_experts=8, moe_intermediate_size=256,
    )  # fmt: skip


def synthetic_cache(config: Any, context: int, capacity: int) -> Any:
    """A deployed cache of `context` tokens made of random bytes that are finite numbers."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax.layers.kv_cache import init_cache

    empty = jax.eval_shape(lambda: init_cache(config, 1, capacity, "deployed"))
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> Any:
        name = getattr(path[-1], "key", None)
        if name == "scales":
            return jnp.asarray(rng.integers(124, 128, leaf.shape, np.uint8))
        if name == "rope":  # exponents from 2^-8 on
            return jnp.asarray(rng.integers(0, 1 << 16, leaf.shape, np.uint16) & 0x83FF | 0x3C00)
        if leaf.dtype == jnp.uint8:  # no NaN: the top bit of the exponent is clear
            return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8) & (0xBF if name == "values" else 0xFF))
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    states, pools = (jax.tree_util.tree_map_with_path(fill, tree) for tree in (empty.states, empty.pools))
    tables = jnp.arange(empty.tables.shape[1], dtype=jnp.int32)[None]
    return replace(empty, lengths=jnp.array([context], jnp.int32), tables=tables, states=states, pools=pools)


def row(r: Result) -> list[str]:
    """One line of the table."""
    times = [r["token"], r["choosing"], r["attending"], r["token"] - r["choosing"] - r["attending"]]
    sizes = [f"{r[part] / 2**20:.1f}" for part in ("cache", "state")]
    return [f"{r['context']:,}", f"{r['room']:,}", *sizes, *(f"{1e3 * t:.1f}" for t in times), f"{r['peak_mib']:.0f}"]


def fits(results: list[Result]) -> list[str]:
    """Least-squares lines through the rows, and the share of the whole's slope that the two parts explain."""
    contexts = np.array([r["context"] for r in results], np.float64)
    lines, slopes = [], {}
    for part, name in (("token", "a token"), ("choosing", "choosing"), ("attending", "all HCA entries")):
        slopes[part], base = np.polyfit(contexts, [r[part] for r in results], 1)
        lines.append(f"{name}: {1e3 * base:.1f} ms + {1e3 * slopes[part] * LONGEST:.1f} ms per {LONGEST:,} tokens")
    explained = (slopes["choosing"] + slopes["attending"]) / slopes["token"]
    return [*lines, f"the two parts explain {explained:.0%} of the growth"]


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        serve({"ours": ours})
    else:
        main()
