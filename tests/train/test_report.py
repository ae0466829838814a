"""The last evaluation does not grow with the corpus, and its line says of how much text it is."""

from types import SimpleNamespace

import numpy as np
import pytest

from train.recipe import find_recipe
from train.report import final_documents, measured_line


def a_store(documents, tokens=1000):
    """As much of a token store as the choice of documents reads."""
    return SimpleNamespace(lengths=np.full(documents, tokens), heldout_documents=np.arange(documents))


@pytest.mark.parametrize(("name", "most"), [("nano", 4096), ("small", 256), ("flash", 64)])
def test_a_last_evaluation_scores_all_of_a_small_corpus_and_the_first_documents_of_a_large_one(name, most):
    """Documents of 1,000 tokens: two of nano's rows, less than one of the others, of which flash's are a million."""
    recipe = find_recipe(name)
    assert final_documents(recipe, a_store(20)) == 20
    assert final_documents(recipe, a_store(100_000)) == most
    assert final_documents(find_recipe(name, ["cadence.final_documents=5000"]), a_store(100_000)) == 5000
    assert final_documents(find_recipe(name, ["cadence.final_documents=5000"]), a_store(20)) == 20


def test_the_line_says_of_how_many_documents_it_is_where_it_is_not_of_all():
    text = {"heldout_bpb": 1.5, "xz_bpb": 2.0}
    assert measured_line(text | {"heldout_documents": 20, "heldout_of": 20}).startswith("held-out text: 1.500 bits")
    assert measured_line(text | {"heldout_documents": 256, "heldout_of": 12345}).startswith(
        "held-out text (the first 256 of 12,345 documents): 1.500 bits per byte; xz -9 on the same text: 2.000"
    )
    talks = {"heldout_answers": 3.0, "heldout_documents": 2, "heldout_of": 9}
    assert measured_line(talks).startswith("held-out conversations (the first 2 of 9 documents): 3.000 nats")
