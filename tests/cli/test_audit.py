"""`dsv4 audit`: the page stands alone, says what the traces say, and overwrites nothing."""

import base64
import json
import re

import jax
import numpy as np
import pytest
from support import TINY, random_params, random_tokens

import dsv4_jax as dsv4
from dsv4_jax.analysis.audit import SHARES, packed, recall_curve
from dsv4_jax.analysis.audit_page import render
from dsv4_jax.checkpoint import save
from dsv4_jax.cli import audit, main
from dsv4_jax.config import CSA, SLIDING

LENGTH = 20
CONFIG = TINY.replace(
    num_hidden_layers=2, num_nextn_predict_layers=0, compress_ratios=(0, 4), layer_types=(SLIDING, CSA)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without a tokenizer, and a file of token ids."""
    folder = tmp_path_factory.mktemp("audit")
    save(folder / "model", CONFIG, random_params(CONFIG))
    tokens = random_tokens(2, length=LENGTH)
    for number, row in enumerate((tokens[0], tokens[1, :9])):
        (folder / f"{number}.txt").write_text(" ".join(map(str, row)))
    return folder


def page_data(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def unpack(text):
    return np.frombuffer(base64.b64decode(text), "<u2") / 65535


def test_the_page_stands_alone_and_says_what_the_trace_says(folder, capsys):
    out = folder / "page.html"
    texts = ["--text", str(folder / "0.txt"), "--text", str(folder / "1.txt")]
    assert main(["audit", str(folder / "model"), *texts, "--out", str(out)]) == 0
    page = out.read_text()
    assert not re.search(r"https?://|@import|url\(|<link|src=|\{\{", page)
    data, tokens = page_data(page), random_tokens(2, length=LENGTH)
    assert data["tokens"] == [str(token) for token in tokens[0]] and data["counted"] == LENGTH + 9
    model = dsv4.load(folder / "model")
    seen = dsv4.trace(model, tokens[:1], queries=range(LENGTH)).layers
    for ours, theirs in zip(data["layers"], seen, strict=True):
        near = unpack(ours["near"]).reshape(LENGTH, CONFIG.sliding_window)
        np.testing.assert_allclose(near, theirs.attention.queries.window[0], atol=2e-5)
        masses = unpack(ours["masses"]).reshape(LENGTH, 3)
        np.testing.assert_allclose(masses[:, 0], theirs.attention.window_mass[0].mean(-1), atol=2e-5)
        np.testing.assert_allclose(masses.sum(1), 1, atol=4e-5)
    far = unpack(data["layers"][1]["far"]).reshape(LENGTH, -1)
    np.testing.assert_allclose(far, seen[1].attention.queries.entries[0], atol=2e-5)
    load = [np.bincount(np.asarray(layer.experts.expert_ids).ravel(), minlength=6) for layer in seen]
    short = dsv4.trace(model, tokens[1:, :9]).layers
    load = [
        a + np.bincount(np.asarray(b.experts.expert_ids).ravel(), minlength=6) for a, b in zip(load, short, strict=True)
    ]
    np.testing.assert_allclose(data["load"], [counts / counts.mean() for counts in load], atol=1e-4)
    logits = jax.nn.log_softmax(model.forward(model.params, tokens[:1]).logits[0])
    nats = -np.asarray(logits)[np.arange(LENGTH - 1), tokens[0, 1:]]
    np.testing.assert_allclose(data["nats"][1:], nats, atol=2e-3)
    (recall,) = data["recall"]
    assert recall["layer"] == 1 and 0 < recall["at_k"] <= 1
    assert main(["audit", str(folder / "model"), *texts, "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err


def test_recall_by_hand():
    mass, scores = np.array([0.1, 0.4, 0.2, 0.3]), np.array([4.0, 3.0, 2.0, 1.0])
    curve = recall_curve(mass, scores)
    at = {share: row for share, row in zip(SHARES.tolist(), curve, strict=True)}
    np.testing.assert_allclose(at[0.5], [0.5, 0.7, 0.5])
    np.testing.assert_allclose(at[1.0], [1, 1, 1])
    np.testing.assert_allclose(at[0.02], [0.1, 0.4, 0.25])  # one entry at least


def test_text_cannot_break_out_of_the_page():
    data = {"tokens": ["</script><script>alert(1)</script>", "{{TITLE}}"]}
    page = render("<b>&", [("<i>", "x")], data)
    assert "<title>&lt;b&gt;&amp;: audit" in page and "</script><script>alert" not in page
    assert page_data(page) == data


def test_numbers_are_packed_as_16_bits():
    values = np.array([0, 0.25, 1.0])
    np.testing.assert_allclose(unpack(packed(values)), values, atol=1e-5)
    assert np.frombuffer(base64.b64decode(packed([3, 700], 1)), "<u2").tolist() == [3, 700]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a text with --text"),
        (["--text", "nowhere.txt"], "there is no file"),
        (["--text", "words.txt"], "must hold token ids"),
        (["--text", "large.txt"], "ids go from 0 to 63"),
        (["--text", "0.txt", "--policy", "v5"], "no precision policy"),
        (["--text", "0.txt", "--tokens", "1"], "from 2 on"),
    ],
)
def test_requests_that_cannot_be_met(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "words.txt").write_text("to be")
    (folder / "large.txt").write_text("1 64")
    assert main(["audit", "model", *arguments, "--out", "other.html"]) == 2
    assert message in capsys.readouterr().err and not (folder / "other.html").exists()


def test_a_page_that_cannot_be_written_is_said_before_the_model_is_read(folder, monkeypatch, capsys):
    monkeypatch.setattr(audit, "write", lambda *_: pytest.fail("the model was read"))
    assert main(["audit", str(folder / "model"), "--out", str(folder / "no" / "x.html")]) == 2
    assert f"there is no folder {folder / 'no'}" in capsys.readouterr().err
