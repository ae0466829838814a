"""Where one token looked, token by token; and a text as a picture, each token coloured by a number.

`mass_by_token` spreads what a layer's attention drew from compressed entries over the tokens that they stand for, so
that layers of all kinds can be read on the same text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.analysis.trace import Trace
from dsv4_jax.errors import UserError


def mass_by_token(traced: Trace, layer: int, query: int, row: int = 0) -> np.ndarray:
    """The attention mass of one query on every token of its row, float64 [S], mean of the heads.

    The mass on an entry is shared evenly by the tokens of its span; that a CSA entry also pools the block before is
    left out. All of it with the sink's is 1.

    Args:
        traced: a trace with this query among its `queries`, without a cache and with one document a row.
        layer: which.
        query: its position.
        row: of the batch.

    Raises:
        UserError: when the trace did not ask for this query.
    """
    if query not in traced.queries:
        raise UserError(f"the trace has no query {query}: trace(model, tokens, queries=[{query}]) asks for it")
    found, place = traced.layers[layer], traced.queries.index(query)
    look = found.attention.queries
    assert look is not None
    mean = lambda x: np.asarray(x, np.float64)[row, place].reshape(-1, x.shape[-1]).mean(0)  # noqa: E731
    near = mean(look.window)
    mass = np.zeros(traced.output.hidden.shape[1])
    back = min(len(near), query + 1)
    mass[query + 1 - back : query + 1] = near[len(near) - back :]
    if look.entries is not None:
        assert look.entry_ids is not None
        ids = np.asarray(look.entry_ids)[row, place].reshape(-1, look.entry_ids.shape[-1])[0]
        entries, ratio = mean(look.entries), found.spec.ratio
        for entry, share in zip(ids[ids >= 0], entries[ids >= 0], strict=True):
            mass[entry * ratio : (entry + 1) * ratio] += share / ratio
    return mass


def plot_text(
    pieces: Sequence[str],
    values: Mapping[str, Any],
    out: str | Path,
    *,
    colours: str = "Blues",
    limits: tuple[float, float] | None = None,
    columns: int = 100,
    marked: int | None = None,
) -> Path:
    """Draws a text several times, one below the other, its tokens coloured by numbers.

    Args:
        pieces: the text of each token.
        values: by title the numbers [tokens]; NaN leaves a token white.
        out: picture to write; the suffix is the format.
        colours: a colour map of matplotlib.
        limits: numbers of the first and of the last colour; by default those that occur under each title.
        columns: characters of a line.
        marked: a token that gets a frame.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs, lines = _lines(pieces, columns)
    size, height = 9.0, 1.45  # points of a letter, and lines per letter
    wide, high = columns * 0.602 * size / 72, (lines + 1.4) * height * size / 72  # DejaVu Sans Mono is 0.602 em wide
    figure = Figure(figsize=(wide, high * len(values)))
    for number, (title, own) in enumerate(values.items()):
        axis = figure.add_axes((0, 1 - (number + 1) / len(values), 1, 1 / len(values)))
        axis.set(xlim=(0, columns), ylim=(lines, -1.4))
        axis.axis("off")
        axis.text(0, -0.6, title, fontsize=size + 1, fontweight="bold", va="center")
        own = np.asarray(own, float)
        low, top = limits or (np.nanmin(own), np.nanmax(own))
        for token, text, column, line in runs:
            value = (own[token] - low) / max(top - low, 1e-30)
            colour = colormaps[colours](value) if np.isfinite(value) else (1.0, 1.0, 1.0, 1.0)
            edge = "#c0392b" if token == marked else "none"
            box = {"facecolor": colour, "edgecolor": edge, "linewidth": 1.5, "zorder": 2 if token == marked else 1}
            axis.add_patch(_box(column, line, len(text), box))
            dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.5
            style = {"color": "white" if dark else "#22262b", "family": "DejaVu Sans Mono", "fontsize": size}
            axis.text(column, line + 0.52, text, va="center", zorder=3, parse_math=False, **style)
    figure.savefig(out, dpi=130)
    return Path(out)


def _lines(pieces: Sequence[str], columns: int) -> tuple[list[tuple[int, str, int, int]], int]:
    """(token, text, column, line) of every stretch of a token on one line, and the number of lines."""
    runs, column, line = [], 0, 0
    for token, piece in enumerate(pieces):
        for number, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if number:
                column, line = 0, line + 1
            part = "".join(map(_drawn, part))
            while part:
                if column >= columns:
                    column, line = 0, line + 1
                here, part = part[: columns - column], part[columns - column :]
                runs.append((token, here, column, line))
                column += len(here)
    return runs, line + 1


def _drawn(letter: str) -> str:
    """A letter of the width of all others: wide ones as their narrow form, or a box."""
    narrow = unicodedata.normalize("NFKC", letter)
    alone = len(narrow) == 1 and narrow.isprintable() and unicodedata.east_asian_width(narrow) not in "WF"
    return narrow if alone else "\N{WHITE SQUARE}"


def _box(column: int, line: int, width: int, style: Mapping[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, line + 0.03), width, 0.94, **style)
