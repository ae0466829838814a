"""Completions back to messages: the published turns, the strict grammar, what is rescued, and any way of cutting."""

import json

import pytest
from chat_cases import NASTY, TAME, D, E, answers, assistant, published, user, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.chat import (
    CompletionError,
    Message,
    StreamParser,
    encode_messages,
    parse_completion,
    prompt_pieces,
    stream,
)
from dsv4_jax.chat.dsml import read_call

PARAMETER = f'<{D}parameter name="a" string="false">1</{D}parameter>\n'
CALL = f'<{D}invoke name="f">\n{PARAMETER}</{D}invoke>\n'


def block(calls: str = CALL) -> str:
    return f"\n\n<{D}tool_calls>\n{calls}</{D}tool_calls>"


def plain(message: Message) -> dict:
    """The message with its arguments as objects."""
    calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return {"content": message.content, "reasoning_content": message.reasoning_content, "calls": calls}


def wanted(message: dict) -> dict:
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
    return {"content": message["content"], "reasoning_content": message["reasoning_content"], "calls": calls}


def test_the_published_turns_are_read_back():
    _, prompt = published(1)
    turns = prompt.split("<｜Assistant｜><think>")[1:]
    first = parse_completion(turns[0].split("<｜User｜>")[0], "thinking")
    assert first.reasoning_content.startswith("The user wants") and first.content == ""
    assert plain(first)["calls"] == [("get_weather", {"location": "Beijing", "unit": "celsius"})]
    last = parse_completion(turns[1], "thinking")
    assert last.reasoning_content == "Got the weather data. Let me format a nice response."
    assert "22°C" in last.content and last.tool_calls == ()


@settings(max_examples=150, deadline=None)
@given(answers(TAME))
def test_what_was_written_is_read_back_from_the_string(message):
    start, whole = (encode_messages(m, "thinking") for m in ([user("q")], [user("q"), message]))
    assert whole.startswith(start)
    assert plain(parse_completion(whole.removeprefix(start), "thinking")) == wanted(message)


@settings(max_examples=200, deadline=None)
@given(answers(NASTY), st.sampled_from(["bytes", "bpe"]))
def test_what_was_written_is_read_back_from_token_ids_whatever_the_text_looks_like(message, kind):
    tokenizer = vocabulary(kind)
    start, whole = (tokenizer.encode_prompt(prompt_pieces(m, "thinking")) for m in ([user("q")], [user("q"), message]))
    assert whole[: len(start)] == start
    pieces = tokenizer.decode_prompt(whole[len(start) :])
    assert plain(parse_completion(pieces, "thinking")) == wanted(message)


FRAGMENTS = [
    f"<{D}tool_calls>",
    f"</{D}tool_calls>",
    f'<{D}invoke name="f">',
    f"</{D}invoke>",
    PARAMETER,
    CALL,
    block(),
]
FRAGMENTS += ["<think>", "</think>", E, D, "\n", "\n\n", "<", "hello", " ", f"\n\n<{D}tool", f'<{D}parameter name="']
SCRAPS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=10).map("".join)


@settings(max_examples=400, deadline=None)
@given(SCRAPS, st.sampled_from(["chat", "thinking"]), st.data())
def test_any_text_is_read_without_an_error_and_alike_however_it_is_cut(text, mode, data):
    whole = parse_completion(text, mode, tolerant=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parser = StreamParser(mode)
    events = [e for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for e in parser.feed(text[a:b])]
    assert Message.of([*events, *parser.finish()]) == whole
    if not whole.problems:
        assert parse_completion(text, mode) == whole


@settings(max_examples=200, deadline=None)
@given(SCRAPS)
def test_without_a_whole_call_or_block_every_character_is_content(text):
    text = text.split(E)[0].replace(f"</{D}invoke>", "").replace(f"</{D}tool_calls>", "")
    message = parse_completion(text, tolerant=True)
    assert (message.content, message.tool_calls) == (text, ())


STRICT = {
    "</think> is missing": "all thought, no answer" + E,
    "<｜end▁of▁sentence｜> is missing": "r</think>cut off",
    "repeats <think>": f"<think>r</think>c{E}",
    "<think> inside the content": f"r</think>a<think>b{E}",
    "｜DSML｜ inside the reasoning": f"a{D}b</think>c{E}",
    "tool calls inside the reasoning": f"r{block()}{E}",
    "text after the tool calls": f"r</think>c{block()} d{E}",
    "more than one block": f"r</think>{block()}{block()}{E}",
    "after an empty line": f"r</think>c{block().lstrip()}{E}",
    "parameter 'a' of the call to 'f' is given twice": f"r</think>{block(CALL.replace(PARAMETER, PARAMETER * 2))}{E}",
    "'a' of the call to 'f' is not JSON": f"r</think>{block(CALL.replace('>1<', '>one<'))}{E}",
    "not spaced as the format": f"r</think>{block(CALL.replace('> <', '><').replace(chr(10), ' '))}{E}",
    "not closed on a line": f"r</think>{block(CALL.rstrip())}{E}",
    "expected a call": f"r</think>{block('call f please')}{E}",
    "parameter 'a' of the call to 'f' is not closed": f"r</think>{block(CALL.replace(f'1</{D}parameter>', '1'))}{E}",
    "the end of the call to 'f' is missing": f"r</think>{block(CALL.replace(PARAMETER, 'a=1'))}{E}",
    "text after <｜end▁of▁sentence｜>": f"r</think>c{E}d",
}


@pytest.mark.parametrize("problem", STRICT)
def test_the_strict_grammar_names_what_is_wrong_and_the_tolerant_one_goes_on(problem):
    with pytest.raises(CompletionError, match=problem.replace("(", r"\(")):
        parse_completion(STRICT[problem], "thinking")
    message = parse_completion(STRICT[problem], "thinking", tolerant=True)
    assert any(problem in found for found in message.problems)


def test_a_duplicate_parameter_makes_no_call_and_the_block_comes_back_as_content():
    twice = block(CALL.replace(PARAMETER, PARAMETER * 2))
    message = parse_completion(f"c{twice}{E}", tolerant=True)
    assert message.tool_calls == () and message.content == f"c{twice}"


def test_whole_calls_before_a_broken_one_are_kept():
    cut = CALL + CALL[:60]
    message = parse_completion(f"c\n\n<{D}tool_calls>\n{cut}", tolerant=True)
    assert plain(message)["calls"] == [("f", {"a": 1})] and message.content == "c\n" + CALL[:60]
    assert any("broken block" in problem for problem in message.problems)


def test_a_value_that_is_no_json_is_taken_as_the_string_it_is():
    message = parse_completion(block(CALL.replace(">1<", ">Beijing<")) + E, tolerant=True)
    assert plain(message)["calls"] == [("f", {"a": "Beijing"})]
    deep = parse_completion(block(CALL.replace(">1<", ">" + "[" * 100_000 + "<")) + E, tolerant=True)
    assert json.loads(deep.tool_calls[0].arguments)["a"] == "[" * 100_000


def test_calls_in_unended_reasoning_are_found():
    message = parse_completion(f"r{block()}{E}", "thinking", tolerant=True)
    assert message.reasoning_content == "r" and plain(message)["calls"] == [("f", {"a": 1})]


def test_an_end_token_that_was_taken_off_is_no_problem():
    assert parse_completion("hi", expect_end=False) == Message(content="hi")
    assert parse_completion("r</think>hi", "thinking", expect_end=False) == Message("hi", "r")


def test_text_that_looks_like_markup_is_content_when_it_comes_from_token_ids():
    text = f"say <think> and {D} and {E}{block()}"
    tokenizer = vocabulary("bytes")
    pieces = tokenizer.decode_prompt([*tokenizer.encode(text), tokenizer.eos_id])
    assert parse_completion(pieces) == Message(content=text)


def test_a_stream_gives_text_at_once_and_a_call_when_it_is_closed():
    parser = StreamParser("thinking")
    kinds = [[(e.kind, e.text) for e in parser.feed(piece)] for piece in ("so", "</th", "ink>", "well\n", "then")]
    assert kinds == [[("reasoning", "so")], [], [], [("content", "well")], [("content", "\nthen")]]
    assert parser.feed(block()[: block().index(f"</{D}invoke>")]) == []
    (event,) = parser.feed(f"</{D}invoke>")
    assert event.kind == "tool_call" and event.call.arguments == '{"a": 1}'
    assert parser.feed(f"\n</{D}tool_calls>{E}") == parser.finish() == []


@pytest.mark.parametrize(
    ("begin", "kinds"),
    [(f'<{D}parameter name="a" string="true">', ["tool_call"]), (f"junk\n</{D}invoke>\n", ["problem", "content"])],
    ids=["a parameter", "a broken call"],
)
def test_long_calls_are_read_when_something_is_closed_and_not_with_every_piece(begin, kinds, monkeypatch):
    reads = []
    monkeypatch.setattr(stream, "read_call", lambda text: reads.append(len(text)) or read_call(text))
    parser = StreamParser("chat", expect_end=False)
    assert not parser.feed(f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n{begin}')
    assert not any(parser.feed("abcde ", trusted=False) for _ in range(1000))
    assert len(reads) <= 2 and len(parser._text) < 100
    pieces = f"</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>"
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert [event.kind for event in events] == kinds and len(reads) <= 6
    assert "abcde " * 1000 in (events[0].call.arguments if events[0].call else events[1].text)


def test_a_parsed_message_goes_back_into_the_conversation():
    text = f"r</think>c{block()}{E}"
    message = parse_completion(text, "thinking").as_dict()
    assert encode_messages([user("q"), message], "thinking").endswith(f"<think>{text}")
    assert message | {"tool_calls": []} == assistant("c", reasoning_content="r", tool_calls=[])
