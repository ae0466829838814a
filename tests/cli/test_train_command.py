"""`dsv4 train`: its help, and a sentence instead of a traceback for text that cannot be read."""

import json

import pytest

from dsv4_jax.cli import main


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "dsv4 train nano --data path/to/texts" in shown


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("{here}/nothing", [], "neither `python`, `prose`, nor an existing file"),
        ("{here}/x.bin", [], "cannot read x.bin: known kinds of files are .txt"),
        ("{here}/bad.txt", [], "bad.txt is not UTF-8 text (byte 2)"),
        ("{here}/bad.jsonl", [], "bad.jsonl:1 has no text in the field 'text' (found: body)"),
        ("{here}/one.txt", [], "has 1 documents: at least 2 are needed"),
        ("{here}/good.jsonl", ["--set", "data.fim_rate=2"], "data.fim_rate is 2"),
        ("{here}/good.jsonl", ["--set", "data.tokenizer={here}/none.json"], "no tokenizer at"),
        (
            "{here}/good.jsonl",
            ["--set", "data.tokenizer={here}/plain.json", "--set", "data.fim_rate=0.1"],
            "has no <｜fim▁begin｜>, <｜fim▁end｜>, <｜fim▁hole｜>",
        ),
        ("{here}/good.jsonl", ["--set", "data.tokenizer=bytes", "--set", "model.vocab_size=100"], "vocab_size is 100"),
    ],
)
def test_text_that_cannot_be_trained_on_is_answered_in_a_sentence(tmp_path, capsys, data, options, message):
    (tmp_path / "x.bin").write_bytes(b"\xff")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30)))
    vocabulary = {chr(i): i for i in range(33, 127)} | {"<s>": 127, "</s>": 128, "Ġ": 129}
    added = [{"id": i, "content": token, "special": True} for token, i in vocabulary.items() if i in (127, 128)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    where = [part.format(here=tmp_path) for part in ("--data", data, *options)]
    assert main(["train", "nano", *where, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr()
    assert message in said.err and "new run" not in said.out
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_is_said_before_the_data_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", "nano", "--data", "nowhere", "--out", str(tmp_path / "file" / "run")]) == 2
    assert f"{tmp_path}/file/run cannot be written: {tmp_path}/file is no folder" in capsys.readouterr().err
