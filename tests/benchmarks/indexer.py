"""What a choice loses that is not exact, and how its time compares: `python -m tests.benchmarks.indexer [RUN]`.

Random operands, rounded to FP4 as the release rounds them, at the width of V4's indexer: scores whose best lie
scattered, seen by every query whole. With RUN, a run of `dsv4 train` or a checkpoint with a tokenizer, also the
operands of each of its indexers on the project's own documents, the attention's mass on the chosen entries, and how
far neighbouring queries agree: how many entries a tile of queries chooses together, in units of k.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax as dsv4
from dsv4_jax import model
from dsv4_jax.kernels.indexer_topk import IndexOperands, Search, index_loss, index_topk
from dsv4_jax.kernels.indexer_topk.xla_loss import mass_of
from dsv4_jax.quantization.rounding import Rounding
from tests.benchmarks.common import ROOT, machine, markdown

SEARCHES = {"exact": Search(), "BF16 scores": Search(bf16=True)} | {
    f"two levels, {n} candidates a place": Search(candidates=n) for n in (16, 8, 4)
}
COLUMNS = ("operands", "entries", "k", "search", "chosen entries kept", "mass, exact = 100%", "time, exact = 1")
TILES = (2, 4, 8, 16)  # queries that could fetch their entries together
UNIONS = ("operands", "entries", "k", *(f"{tile} queries" for tile in TILES))
QUERIES = 64  # looked at together: early queries, which see little, would make the search of later ones exact


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.indexer", description=__doc__)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--entries", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="length of each document")
    parser.add_argument("--turns", type=int, default=3, help="of each search; the fastest counts")
    options = parser.parse_args()
    rows, unions = [], []
    for entries in options.entries:
        operands, bounds = random_case(entries)
        rows += compared("random", operands, bounds, None, options.k, options.turns)
    if options.run:
        for name, operands, bounds, mass, topk in trained_cases(options.run, options.tokens):
            for k in (topk, topk // 8):  # two levels act where the entries are many times k
                rows += compared(name, operands, bounds, mass, k, options.turns)
                unions.append([name, f"{operands.keys.shape[1]:,}", str(k), *chosen_together(operands, bounds, k)])
    print(machine(False) + "\n\n" + markdown(COLUMNS, rows))
    if unions:
        print("\n" + markdown(UNIONS, unions))


def random_case(entries: int) -> tuple[IndexOperands, jax.Array]:
    """Operands of 16 queries that see all entries, and their bounds [1, 16, 2]."""
    keys = jax.random.split(jax.random.key(0), 3)
    fp4 = lambda key, *shape: Rounding("fp4", (1, 32))(jax.random.normal(key, shape))  # noqa: E731
    weights = jax.random.normal(keys[2], (1, 16, 64))
    bounds = jnp.broadcast_to(jnp.asarray([0, entries], jnp.int32), (1, 16, 2))
    return IndexOperands(fp4(keys[0], 1, 16, 64, 128), fp4(keys[1], 1, entries, 128), weights), bounds


def trained_cases(run: str, tokens: int) -> Iterator[tuple[str, IndexOperands, jax.Array, jax.Array, int]]:
    """Of every indexer of a trained model: name, operands, bounds, the attention's mass [B, S, T], its top-k."""
    loaded = dsv4.load(run)
    assert loaded.tokenizer is not None
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    ids = np.array(loaded.tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in paths)), np.int32)
    text = jnp.asarray(ids[: len(ids) // tokens * tokens].reshape(-1, tokens)[:4])
    seen: list[Any] = []

    def watched(operands, q, entries, lse, bounds, scale, k):
        visible = (jnp.arange(entries.shape[1]) >= bounds[..., :1]) & (jnp.arange(entries.shape[1]) < bounds[..., 1:])
        jax.debug.callback(lambda *x: seen.append(x), *operands, bounds, mass_of(q, entries, lse, visible, scale))
        return index_loss(operands, q, entries, lse, bounds, scale, k)

    with mock.patch("dsv4_jax.layers.attention.index_loss", watched):
        run_it = jax.jit(lambda p, t: model.forward(loaded.config, p, t, attention="dense", index_loss=True).hidden)
        jax.block_until_ready(run_it(loaded.params, text))
        jax.effects_barrier()
    for i, (queries, keys, weights, bounds, mass) in enumerate(seen):
        yield f"trained, indexer {i + 1}", IndexOperands(queries, keys, weights), bounds, mass, loaded.config.index_topk


def compared(
    name: str, operands: IndexOperands, bounds: jax.Array, mass: jax.Array | None, k: int, turns: int
) -> list[list[str]]:
    """A row for each search. Queries count that see more entries than are chosen."""
    counts = np.asarray(bounds[..., 1] - bounds[..., 0]) > k
    rows, exact, unit = [], np.zeros(0), 1.0
    for label, search in SEARCHES.items():
        found, seconds = choose(operands, bounds, k, search, turns)
        if not rows:
            exact, unit = found, seconds
        kept = np.mean([np.isin(a, b).mean() for a, b in zip(exact[counts], found[counts], strict=True)])
        share = (
            f"{np.mean(share_of(mass, found)[counts] / share_of(mass, exact)[counts]):.2%}" if mass is not None else "-"
        )
        entries = f"{operands.keys.shape[1]:,}"
        rows.append([name, entries, str(k), label, f"{kept:.2%}", share, f"{seconds / unit:.2f}"])
    return rows


def chosen_together(operands: IndexOperands, bounds: jax.Array, k: int) -> list[str]:
    """For each size of tile the entries that its queries choose together over k, and over what chance would give.

    Tiles count whose queries see four times as many entries as they choose.
    """
    found, _ = choose(operands, bounds, k, Search(), 1)
    seen = np.asarray(bounds[..., 1] - bounds[..., 0])
    cells = []
    for size in TILES:
        cut = lambda x, size=size: x[:, : x.shape[1] // size * size].reshape(-1, size, *x.shape[2:])  # noqa: E731
        tiles, visible = cut(found), cut(seen)
        wide = visible.min(1) >= 4 * k
        together = np.mean([len(np.unique(tile)) / k for tile in tiles[wide]])
        n = visible[wide].mean()
        cells.append(f"{together:.1f} (chance {n / k * (1 - (1 - k / n) ** size):.1f})")
    return cells


def choose(operands, bounds, k, search, turns) -> tuple[np.ndarray, float]:
    """The chosen entries [B, S, k], and the seconds of the fastest turn over all queries."""
    run = jax.jit(lambda o, bounds: index_topk(o, bounds[..., 0], bounds[..., 1], k, search))
    cut = lambda x, i: x[:, i : i + QUERIES]  # noqa: E731
    starts = range(0, bounds.shape[1], QUERIES)
    parts = [
        (IndexOperands(cut(operands.queries, i), operands.keys, cut(operands.weights, i)), cut(bounds, i))
        for i in starts
    ]
    found = np.concatenate([np.asarray(run(*part)) for part in parts], axis=1)
    times = []
    for _ in range(turns):
        begun = time.perf_counter()
        for part in parts:
            jax.block_until_ready(run(*part))
        times.append(time.perf_counter() - begun)
    return found, min(times)


def share_of(mass: jax.Array, found: np.ndarray) -> np.ndarray:
    """Share of the attention's mass that lies on the chosen entries, [B, S]."""
    mass = np.asarray(mass)
    chosen = np.where(found >= 0, np.take_along_axis(mass, np.maximum(found, 0), -1), 0).sum(-1)
    return chosen / np.maximum(mass.sum(-1), 1e-30)


if __name__ == "__main__":
    main()
