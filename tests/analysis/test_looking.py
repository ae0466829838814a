"""Attention on tokens, against the float64 statement's masses; and a text as a picture."""

import numpy as np
import pytest
from matplotlib.image import imread
from support import LENGTH, TINY, random_params, random_tokens, run_oracle

import dsv4_jax as dsv4
from dsv4_jax.analysis.looking import mass_by_token, plot_text
from dsv4_jax.config import CSA
from dsv4_jax.errors import UserError


def test_mass_on_tokens_is_that_of_the_statement_with_entries_shared_by_their_tokens():
    model, tokens, queries = dsv4.Model(TINY, random_params(TINY)), random_tokens(), (2, 17, LENGTH - 1)
    traced = dsv4.trace(model, tokens, queries=queries)
    stated = run_oracle(TINY, model.params, tokens[1]).layers
    for i, spec in enumerate(TINY.layers):
        for t in queries:
            near, far = (part.mean(0) for part in stated[i]["mass"][t][:2])
            expected = np.zeros(LENGTH)
            expected[t + 1 - len(near) : t + 1] = near
            if spec.ratio:
                ids = stated[i]["selected"][t] if spec.attention == CSA else np.arange((t + 1) // spec.ratio)
                for entry, mass in zip(ids, far, strict=True):
                    expected[spec.ratio * entry : spec.ratio * (entry + 1)] += mass / spec.ratio
            np.testing.assert_allclose(mass_by_token(traced, i, t, row=1), expected, atol=1e-5)
    with pytest.raises(UserError, match="no query 5"):
        mass_by_token(traced, 0, 5)


def test_every_token_of_a_text_has_its_colour(tmp_path):
    pieces, values = ["def", " f", "(x):\n", "    return", " $x$\t\x00"], [0.0, 0.25, 0.5, 0.75, 1.0]
    path = plot_text(pieces, {"a": values, "b": values[::-1]}, tmp_path / "text.png", colours="viridis", columns=12)
    shades = {tuple(pixel) for pixel in (imread(path)[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    for colour in ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)):
        assert any(np.abs(np.array(colour) - shade).max() <= 2 for shade in shades), colour
