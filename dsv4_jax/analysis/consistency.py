"""How much a model's answer changes when the same thing is said in other words.

The article (3.3, 6) says that manifold-constrained hyper-connections make outputs vary less across similar inputs. This
is the number to compare two models by, the second one trained alike with `hc_mult` 1, say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv4_jax import model as _model
from dsv4_jax.errors import UserError

if TYPE_CHECKING:
    from dsv4_jax.api import Model


class Consistency(NamedTuple):
    """Divergences of next-token distributions, in bits: 0 is the same, 1 has nothing in common.

    within: mean Jensen-Shannon divergence of two texts of one group, of each group.
    between: the same of texts of different groups, one number: what saying something else changes.
    ratio: mean of `within` over `between`; 0 is an answer that depends on the meaning alone, 1 one on the words alone.
    """

    within: np.ndarray
    between: float
    ratio: float


def consistency(model: Model, groups: Sequence[Sequence[Sequence[int]]]) -> Consistency:
    """Compares what the model expects to follow each text.

    Args:
        model: any.
        groups: token ids of texts; the texts of a group mean the same.

    Raises:
        UserError: for fewer than two groups or a group of fewer than two texts.
    """
    if len(groups) < 2 or min(map(len, groups)) < 2:
        raise UserError("consistency compares at least two groups of at least two texts each")
    texts = [list(text) for group in groups for text in group]
    of_group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    apart = divergences(next_token_log_probs(model, texts))
    pairs = np.triu(np.ones(apart.shape, bool), 1)
    together = of_group[:, None] == of_group
    within = [apart[pairs & together & (of_group == g)[:, None]].mean() for g in range(len(groups))]
    between = float(apart[pairs & ~together].mean())
    return Consistency(np.array(within), between, float(np.mean(within) / max(between, 1e-30)))


def next_token_log_probs(model: Model, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, V] float64: of what follows each text; shorter ones are padded behind, which no earlier token sees."""
    length = max(map(len, texts))
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    hidden = model.forward(model.params, jnp.asarray(rows), logits=False).hidden
    last = jnp.stack([hidden[i, len(text) - 1] for i, text in enumerate(texts)])
    logits = np.asarray(_model.output_logits(model.params, last), np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def divergences(log_probs: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of every two rows of [N, V] log-probabilities, [N, N] in bits."""
    p = np.exp(log_probs)
    entropy = -(p * log_probs).sum(-1)
    found = np.zeros((len(p), len(p)))
    for i, j in zip(*np.triu_indices(len(p), 1), strict=True):
        middle = (p[i] + p[j]) / 2
        mixed = -(middle * np.log(np.maximum(middle, 1e-300))).sum()
        found[i, j] = found[j, i] = (mixed - (entropy[i] + entropy[j]) / 2) / np.log(2)
    return found


def plot_consistency(found: Mapping[str, Consistency], out: str | Path) -> Path:
    """Draws the groups of every named model as points, its mean as a bar, and `between` as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.4 * len(found), 3), layout="constrained")
    axis = figure.subplots()
    for place, one in enumerate(found.values()):
        axis.bar(place, one.within.mean(), width=0.6, color="#2f6db5", alpha=0.8)
        axis.plot(np.full(len(one.within), place), one.within, "o", color="#22262b", markersize=3)
        axis.hlines(one.between, place - 0.35, place + 0.35, color="#d9772b")
        axis.text(place, one.between, f"{one.ratio:.2f}", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(found)), list(found))
    axis.set_ylabel("bits apart: same meaning (bar), other (line)", fontsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    return Path(out)
