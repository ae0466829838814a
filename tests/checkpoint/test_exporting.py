"""What goes along with weights: a tokenizer, from wherever it is; and what a dtype can hold."""

import numpy as np
import pytest
from support import FIXTURES, TINY, random_params

from dsv4_jax.checkpoint import CheckpointError, convert, load_params, save
from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


def names_in(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_a_tokenizer_goes_along_as_object_folder_file_or_name(tmp_path):
    params, saved = random_params(TINY), ByteTokenizer().save(tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages }}")
    for i, tokenizer in enumerate([ByteTokenizer(), "bytes", saved, tmp_path / "own"]):
        save(tmp_path / str(i), TINY, params, tokenizer=tokenizer)
        assert load_tokenizer(tmp_path / str(i)).digest == ByteTokenizer().digest
    assert (tmp_path / "3" / "chat_template.jinja").read_text() == "{{ messages }}"
    convert(tmp_path / "3", tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(tmp_path / "3")


@pytest.mark.parametrize(
    ("tokenizer", "error", "words"),
    [
        (42, UserError, "tokenizer is 42: a Tokenizer, its folder or file, or its name"),
        ("nowhere", FileNotFoundError, "no tokenizer at nowhere"),
        (FIXTURES / "pub_a", FileNotFoundError, "no tokenizer at"),
        (Tokenizer([b"a"], {}), UserError, "cannot tell which token is bos"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused_before_anything_is_written(tokenizer, error, words, tmp_path):
    with pytest.raises(error, match=words):
        save(tmp_path / "out", TINY, random_params(TINY), tokenizer=tokenizer)
    assert names_in(tmp_path / "out") == []


def test_another_tokenizer_is_not_overwritten(tmp_path):
    save(tmp_path / "in", TINY, random_params(TINY), tokenizer="bytes")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds tokenizer.json"):
        convert(tmp_path / "in", tmp_path / "out")
    assert (
        names_in(tmp_path / "out") == ["tokenizer.json"] and (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    )


def test_numbers_too_large_for_a_dtype_are_refused(tmp_path):
    params = random_params(TINY)
    params["embed"] = params["embed"].at[3, 3].set(1e5)
    save(tmp_path / "in", TINY, params)
    with pytest.raises(CheckpointError, match="embed holds 100000.0, which is too large for float16"):
        convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    with pytest.raises(CheckpointError, match="embed holds 100000.0"):
        save(tmp_path / "out", TINY, params, dtype="float16")
    assert "config.json" not in names_in(tmp_path / "out")
    params["embed"] = params["embed"].at[3, 3].set(np.inf)  # what is infinite stays so
    save(tmp_path / "infinite", TINY, params, dtype="float16")
    assert np.isinf(load_params(tmp_path / "infinite", TINY)["embed"][3, 3])
