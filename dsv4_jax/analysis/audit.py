"""What a model did with some documents, as the plain data that the audit's page shows.

Every document is traced twice by the same two compiled programs: as the model runs, with the whole distribution of
every token, and in dense attention, which says what the indexer's choice would have missed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.analysis.trace import Trace, trace
from dsv4_jax.analysis.trace_records import LayerTrace
from dsv4_jax.config import CSA, SLIDING
from dsv4_jax.model import output_logits
from dsv4_jax.partition import ALONE, Partition

if TYPE_CHECKING:
    from dsv4_jax.api import Model

PROBES = 32
"""Tokens of a document whose dense attention is compared with the indexer's order of entries."""


def audit(
    model: Model,
    documents: Sequence[Sequence[int]],
    *,
    length: int = 512,
    policy: str = "none",
    partition: Partition = ALONE,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Data of the page: the first document token by token, statistics over all of them.

    Args:
        model: with its tokenizer, or token ids stand for text.
        documents: token ids; at most `length` of each are used.
        length: tokens of a row. Shorter documents are padded behind, which no earlier token sees.
        policy: of precision; "none", or what is rounded is measured too.
        partition: how the parameters lie on devices.
        progress: told what is being done.

    Returns:
        Strings, numbers, lists and dicts only; large arrays as base64 text.
    """
    documents = [list(document)[:length] for document in documents]
    length = max(map(len, documents))
    page: dict[str, Any] = {}
    totals = Totals(model)
    for number, document in enumerate(documents):
        progress(f"document {number + 1} of {len(documents)}: {len(document)} tokens")
        row = np.zeros((1, length), np.int32)
        row[0, : len(document)] = document
        ran = trace(model, row, queries=range(length), policy=policy, partition=partition)
        dense = trace(model, row, queries=probes(length), attention="dense", policy=policy, partition=partition)
        totals.add(jax.device_get(ran.layers), jax.device_get(dense.layers), dense.queries, len(document))
        if not number:
            page = reading(model, document, ran)
    return page | {"documents": len(documents), "counted": totals.tokens} | totals.summary() | {"policy": policy}


def probes(length: int) -> tuple[int, ...]:
    """Positions spread over the later three quarters, where there is something to choose."""
    return tuple(sorted({int(p) for p in np.linspace(length // 4, length - 1, PROBES)}))


def reading(model: Model, document: Sequence[int], ran: Trace) -> dict[str, Any]:
    """One document, token by token."""
    count = len(document)
    nats = surprise(model.params, ran.output.hidden, jnp.asarray(document, jnp.int32))
    return {
        "tokens": pieces(model, document),
        "nats": [None, *(round(float(x), 3) for x in nats)],
        "window": model.config.sliding_window,
        "experts_per_token": model.config.num_experts_per_tok,
        "experts": model.config.n_routed_experts,
        "layers": [layer_data(layer, count) for layer in jax.device_get(ran.layers)],
    }


def pieces(model: Model, document: Sequence[int]) -> list[str]:
    """The text of each token; its number without a tokenizer."""
    if model.tokenizer is None:
        return [str(token) for token in document]
    return [model.tokenizer.decode([token]) for token in document]


@jax.jit
def surprise(params: Any, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Nats of every token but the first, given those before it: hidden [1, S', D], tokens [S] -> [S - 1]."""
    logits = jax.nn.log_softmax(output_logits(params, hidden[0, : len(tokens) - 1]))
    return -jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]


def layer_data(layer: LayerTrace, count: int) -> dict[str, Any]:
    """What one layer did with the `count` tokens of the document read."""
    look, experts = layer.attention, layer.experts
    assert look.queries is not None
    masses = np.stack([np.asarray(mass)[0, :count].mean(-1) for mass in look[:3]], axis=-1)
    data = {
        "name": str(layer.spec),
        "ratio": layer.spec.ratio,
        "masses": packed(masses),
        "near": packed(look.queries.window[0, :count]),
        "ids": packed(experts.expert_ids[0, :count], 1),
        "weights": packed(experts.weights[0, :count] / experts.weights[0, :count].sum(-1, keepdims=True)),
        "entropy": [round(float(x), 3) for x in experts.entropy[0, :count]],
    }
    if look.queries.entries is not None:
        entries, ids = (np.asarray(x)[0, :count] for x in (look.queries.entries, look.queries.entry_ids))
        data |= {"far": packed(entries), "far_ids": packed(ids + 1, 1), "far_count": ids.shape[-1]}
    return data


def packed(values: Any, unit: int = 65535) -> str:
    """Numbers from 0 to 1 (or integers, with unit 1) as base64 of 16-bit integers."""
    whole = np.clip(np.rint(np.asarray(values, np.float64) * unit), 0, 65535)
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()


class Totals:
    """Sums over documents."""

    def __init__(self, model: Model):
        """Nothing yet."""
        self.config, self.tokens = model.config, 0
        depth = model.config.num_hidden_layers
        self.load = np.zeros((depth, model.config.n_routed_experts))
        self.curves: dict[int, list[np.ndarray]] = {}
        self.recall: dict[int, list[float]] = {}
        self.mixing: list[dict[str, np.ndarray]] = []
        self.rounding: list[list[dict[str, float]]] = []

    def add(self, ran: Iterable[LayerTrace], dense: Sequence[LayerTrace], queries: Sequence[int], count: int) -> None:
        """One document of `count` tokens, as the model runs and in dense attention."""
        ran = list(ran)
        self.tokens += count
        for i, layer in enumerate(ran):
            np.add.at(self.load[i], np.asarray(layer.experts.expert_ids)[0, :count].ravel(), 1)
        mixing = [layer.mixing for layer in ran]
        means = {
            name: np.stack([getattr(m, name)[0, :count].mean(0) for m in mixing]) for name in ("pre", "post", "comb")
        }
        gains = np.stack([m.gain[0, :count] for m in mixing])  # [L, S, 2, 2]
        errors = np.stack([np.maximum(m.row_error, m.column_error)[0, :count] for m in mixing])
        self.mixing.append(means | {"gain": gains.mean(1), "largest": gains.max(1), "error": errors.max((1, 2))})
        self.rounding.append([{role: float(x) for role, x in layer.rounding.items()} for layer in ran])
        for i, layer in enumerate(dense):
            if layer.spec.attention == CSA and layer.attention.recall is not None:
                self._compare(i, layer, [q for q in queries if q < count], count)

    def _compare(self, i: int, layer: LayerTrace, queries: Sequence[int], count: int) -> None:
        """The indexer of layer i against dense attention."""
        visible = (np.arange(count) + 1) // layer.spec.ratio
        choosing = visible > self.config.index_topk
        self.recall.setdefault(i, []).extend(np.asarray(layer.attention.recall)[0, :count][choosing].tolist())
        look = layer.attention.queries
        if look is None or look.entries is None or look.index_scores is None:
            return
        for q, t in enumerate(queries):
            if visible[t] >= 2:
                mass, scores = (np.asarray(x)[0, q, : visible[t]] for x in (look.entries, look.index_scores))
                self.curves.setdefault(i, []).append(recall_curve(mass, scores))

    def summary(self) -> dict[str, Any]:
        """Everything added up."""
        c = self.config
        mean = lambda name: np.mean([document[name] for document in self.mixing], axis=0)  # noqa: E731
        largest = lambda name: np.max([document[name] for document in self.mixing], axis=0)  # noqa: E731
        recall = [
            {
                "layer": i,
                "curve": np.mean(curves, axis=0).round(4).tolist(),  # [shares, (indexer, best, chance)]
                "at_k": float(np.mean(self.recall[i])) if self.recall[i] else None,
            }
            for i, curves in sorted(self.curves.items())
        ]
        return {
            "load": (self.load / np.maximum(self.load.mean(-1, keepdims=True), 1e-9)).round(4).tolist(),
            "hashed": [spec.routing == "hash_moe" for spec in c.layers],
            "recall": recall,
            "shares": SHARES.tolist(),
            "topk": c.index_topk,
            "mixing": {name: mean(name).round(5).tolist() for name in ("pre", "post", "comb", "gain")}
            | {"largest": largest("largest").round(5).tolist(), "error": float(largest("error").max())},
            "rounding": self._rounding(),
            "sliding": [spec.attention == SLIDING for spec in c.layers],
        }

    def _rounding(self) -> list[dict[str, float]]:
        """Per layer the mean over documents."""
        by_layer = zip(*self.rounding, strict=True)
        return [{role: float(np.mean([d[role] for d in layer])) for role in layer[0]} for layer in by_layer]


SHARES = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
"""Of the visible entries: how many a query may choose."""


def recall_curve(mass: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Share of the mass [T] held by the best entries, for each share of entries chosen: [shares, 3].

    The columns: chosen by the indexer's scores, by the mass itself (the best possible), and at random (the mean).
    """
    counts = np.maximum(np.rint(SHARES * len(mass)).astype(int), 1)
    held = lambda order: np.cumsum(mass[order])[counts - 1] / max(mass.sum(), 1e-30)  # noqa: E731
    return np.stack([held(np.argsort(-scores, kind="stable")), held(np.argsort(-mass)), counts / len(mass)], axis=-1)
