"""Conversations as data: what is learned, how it is packed, what a run of them measures."""

import json

import numpy as np
import pytest

from dsv4_jax.chat import encode_chat, encode_conversation
from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import load_tokenizer
from train.data.pipeline import BatchConfig, Rows, heldout_batches
from train.data.tokens import prepare
from train.recipe import RecipeError, find_recipe

BYTES = load_tokenizer("bytes")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3+3? <｜Assistant｜>"},
    {"role": "assistant", "content": "6", "reasoning_content": "easy"},
]


@pytest.mark.parametrize("mode", ["chat", "thinking"])
def test_what_the_assistant_wrote_is_what_follows_each_prompt(mode):
    ids, written = encode_conversation(BYTES, TALK, mode)
    assert ids == encode_chat(BYTES, TALK, mode, add_generation_prompt=False)
    answers = [BYTES.decode(np.array(ids)[run].tolist()) for run in _runs(written)]
    end = "<｜end▁of▁sentence｜>"
    assert answers == [f"4{end}", f"easy</think>6{end}" if mode == "thinking" else f"6{end}"]
    # Where the last answer begins, a model that is asked stands too.
    prompt = encode_chat(BYTES, TALK[:-1], mode)
    assert ids[: len(prompt)] == prompt and not written[len(prompt) - 1] and written[len(prompt)]


def _runs(written):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(written, int), [0]])))
    return [slice(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def test_a_conversation_in_which_the_assistant_is_silent_is_refused():
    with pytest.raises(UserError, match="nothing to learn"):
        encode_conversation(BYTES, TALK[:2])


@pytest.fixture
def store(tmp_path):
    talks = [[TALK[1] | {"content": f"{i}+{i}?"}, TALK[2] | {"content": str(2 * i)}] for i in range(40)]
    lines = [json.dumps({"messages": talk, "id": i}) for i, talk in enumerate(talks)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    return prepare(str(tmp_path / "talks.jsonl"), "bytes", cache=tmp_path / "cache", format="chat")


def test_rows_learn_answers_alone(store):
    rows = Rows(store, BatchConfig(64, 4, packing="first_fit"))
    for index in range(6):
        row = rows.row(index)
        assert set(row["loss_mask"].tolist()) == {0, 1} and not row["loss_mask"][row["segment_ids"] == 0].any()
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            text, learned = row["tokens"][here], row["loss_mask"][here].astype(bool)
            question, answer = BYTES.decode(text[~learned].tolist()), BYTES.decode(text[learned].tolist())
            number = int(question.split("｜User｜>")[1].split("+")[0])
            assert answer == f"{2 * number}<｜end▁of▁sentence｜>"
    held = next(heldout_batches(store, 64, 4))
    assert held["loss_mask"].sum() > 0 and held["loss_mask"].shape == held["tokens"].shape


def test_files_without_conversations_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "no messages"}\n' * 3)
    for name, says in (("notes.txt", "is text"), ("rows.jsonl", "no list in the field 'messages' \\(found: text")):
        with pytest.raises(UserError, match=says):
            prepare(str(tmp_path / name), "bytes", cache=tmp_path / "cache", format="chat")
    with pytest.raises(UserError, match="'python' is text"):
        prepare("python", "bytes", cache=tmp_path / "cache", format="chat")
    with pytest.raises(RecipeError, match="data.format is chat"):
        find_recipe("nano", ["data.format=chat"]).check()
