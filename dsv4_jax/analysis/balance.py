"""How evenly a model uses its experts: whether its routing has collapsed.

The article (3.2) says that routers collapse onto a few experts unless something balances them, and that an adaptive
routing temperature evens them out. These are the numbers to compare models by that were trained with and without: the
router bias (`losses.bias_speed=0` in a recipe) and `adaptive_routing_temperature`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4_jax.analysis.trace import Trace
from dsv4_jax.errors import UserError


class Balance(NamedTuple):
    """Of each layer with a learned router.

    layers: names, such as "3 HCA/128".
    load: pairs of each expert over a fair share, [L, E].
    used: exp of the entropy of the load over E: the share of the experts that the layer behaves as if it had, [L].
    dead: experts that nothing went to, [L].
    sharpness: mean weight of a token's first expert among its k, [L]; 1/k where all weigh alike.
    """

    layers: tuple[str, ...]
    load: np.ndarray
    used: np.ndarray
    dead: np.ndarray
    sharpness: np.ndarray


def routing_balance(traced: Trace, counted: Any = None) -> Balance:
    """Counts the experts of a trace.

    Args:
        traced: of enough tokens that every expert could have been used.
        counted: [B, S], the tokens that count; all by default.

    Raises:
        UserError: when no layer has a learned router.
    """
    numbered = [(i, layer) for i, layer in enumerate(traced.layers) if layer.spec.routing == "moe"]
    if not numbered:
        raise UserError("the model routes by its hash table alone: there is no learned router to look at")
    rows = [_of_layer(layer.experts, traced.config.n_routed_experts, counted) for _, layer in numbered]
    return Balance(tuple(f"{i} {layer.spec}" for i, layer in numbered), *map(np.stack, zip(*rows, strict=True)))


def _of_layer(experts: Any, count: int, counted: Any) -> tuple[np.ndarray, Any, Any, Any]:
    ids, weights = np.asarray(experts.expert_ids), np.asarray(experts.weights, np.float64)
    keep = np.ones(ids.shape[:2], bool) if counted is None else np.asarray(counted, bool)
    pairs = np.bincount(ids[keep].ravel(), minlength=count)
    p = pairs / pairs.sum()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
    first = (weights / weights.sum(-1, keepdims=True)).max(-1)[keep].mean()
    return p * count, np.exp(entropy) / count, (pairs == 0).sum(), first


def plot_balance(found: Mapping[str, Balance], out: str | Path) -> Path:
    """Draws of every named model the share of experts in use, layer by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(found)
    for i, (name, one) in enumerate(found.items()):
        places = np.arange(len(one.layers)) + (i - (len(found) - 1) / 2) * width
        axis.bar(places, one.used, width, label=f"{name}: {one.used.mean():.0%}")
        axis.set_xticks(np.arange(len(one.layers)), one.layers, fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of the experts in use", fontsize=8.5)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    return Path(out)
