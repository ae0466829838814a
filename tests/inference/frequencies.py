"""Do counts fit probabilities?"""

import numpy as np


def excess(counts, p):
    """Pearson's chi-square over cells expected 5 times or more (the rest is one cell), minus its 99.9% quantile."""
    assert counts[p == 0].sum() == 0
    expected, big = p * counts.sum(), p * counts.sum() >= 5
    cells = [(n, e) for n, e in zip(counts[big], expected[big], strict=True)]
    if (~big & (p > 0)).any():
        cells.append((counts[~big].sum(), expected[~big].sum()))
    k = max(len(cells) - 1, 1)
    quantile = k * (1 - 2 / (9 * k) + 3.09 * np.sqrt(2 / (9 * k))) ** 3  # Wilson-Hilferty
    return sum((n - e) ** 2 / e for n, e in cells) - quantile
