"""How far back a model's attention reaches: the mass on compressed entries by their distance.

The article (2.2) says that HCA layers integrate long-range context. `context_integration` measures it from a trace:
a table by layer and distance, one number per layer, and a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4_jax.analysis.trace import Trace
from dsv4_jax.config import SLIDING
from dsv4_jax.errors import UserError


class Integration(NamedTuple):
    """Mean over the traced queries and their heads.

    layers: name of every layer with compressed entries, such as "3 HCA/128".
    edges: distances [N + 1] in tokens, growing by powers of two; bucket i is edges[i] <= distance < edges[i + 1].
    mass: attention mass on compressed entries in each bucket, [L, N]; the rest is on the window and the sink.
    uniform: the same if the layer's compressed mass were spread evenly over all visible entries, [L, N].
    median: [L], half of a layer's compressed mass lies at most so many tokens back.
    """

    layers: tuple[str, ...]
    edges: np.ndarray
    mass: np.ndarray
    uniform: np.ndarray
    median: np.ndarray


def context_integration(traced: Trace) -> Integration:
    """Mass by distance from the query to the last token of an entry.

    Args:
        traced: a trace with `queries`, without a cache. Each query counts alike, so give ones of like positions.

    Raises:
        UserError: for a trace without queries, or of a model without compressed entries.
    """
    if not traced.queries:
        raise UserError("the trace has no queries: trace(model, tokens, queries=...) says which tokens to look from")
    numbered = [(i, layer) for i, layer in enumerate(traced.layers) if layer.spec.attention != SLIDING]
    if not numbered:
        raise UserError("the model has no layer with compressed entries")
    edges = np.concatenate([[0], 2 ** np.arange(int(np.log2(max(traced.queries) + 1)) + 2)])
    rows = [_by_distance(np.asarray(traced.queries), layer, edges) for _, layer in numbered]
    mass, uniform, median = (np.stack(part) for part in zip(*rows, strict=True))
    return Integration(tuple(f"{i} {layer.spec}" for i, layer in numbered), edges, mass, uniform, median)


def _by_distance(queries: np.ndarray, layer: Any, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    look, ratio = layer.attention.queries, layer.spec.ratio
    mass, ids = np.asarray(look.entries, np.float64), np.asarray(look.entry_ids)
    mass = mass.mean(2) if mass.ndim == 4 else mass  # [B, Q, N]
    last = (ids + 1) * ratio - 1
    distance = np.where(ids >= 0, queries[:, None] - last, -1)
    count = mass.shape[0] * len(queries)
    buckets = lambda distance, weights: np.histogram(distance, edges, weights=weights)[0] / count  # noqa: E731
    everything = [np.arange(ratio - 1, query + 1, ratio) for query in queries]  # last tokens of the visible entries
    totals = mass.sum((0, 2))
    even = sum(
        buckets(query - ends, np.full(len(ends), total / max(len(ends), 1)))
        for query, ends, total in zip(queries, everything, totals, strict=True)
    )
    return buckets(distance, mass), np.asarray(even), weighted_median(distance, mass)


def weighted_median(distance: np.ndarray, mass: np.ndarray) -> float:
    """The smallest distance within which half of the mass lies; NaN without any."""
    order = np.argsort(distance, axis=None, kind="stable")
    total = np.cumsum(mass.ravel()[order])
    if total[-1] <= 0:
        return float("nan")
    return float(distance.ravel()[order][np.searchsorted(total, total[-1] / 2)])


def plot_integration(found: Integration, out: str | Path) -> Path:
    """Draws mass by distance, a panel per layer, against an even spread; the suffix of `out` is the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(found.layers), 2.7), layout="constrained")
    for i, axis in enumerate(figure.subplots(1, len(found.layers), sharey=True, squeeze=False)[0]):
        places = np.arange(len(found.edges) - 1)
        axis.bar(places, found.mass[i], color="#d9772b", label="measured")
        axis.step(places, found.uniform[i], where="mid", color="#22262b", linewidth=1, label="spread evenly")
        axis.set_title(f"{found.layers[i]}: half within {found.median[i]:,.0f} tokens", fontsize=9, loc="left")
        axis.set_xticks(places[::2], [f"{edge:g}" for edge in found.edges[:-1:2]], fontsize=8)
        axis.set_xlabel("tokens back, from", fontsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("attention mass", fontsize=8.5)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    return Path(out)
