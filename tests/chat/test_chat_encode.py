"""The prompt as text: the published cases byte for byte, and each rule of the format by itself."""

import json

import pytest
from chat_cases import SEARCH, A, B, D, E, U, assistant, called, published, system, tool, user

from dsv4_jax.chat import encode_messages
from dsv4_jax.errors import UserError

DEVELOPER = {"role": "developer", "content": "be brief"}
REMINDER = {"role": "latest_reminder", "content": "2026-02-21, Saturday"}


@pytest.mark.parametrize("number", [1, 2])
def test_the_published_prompts_are_reproduced_byte_for_byte(number):
    messages, prompt = published(number)
    assert encode_messages(messages, "thinking") == prompt


def test_tools_beside_the_messages_are_written_after_the_system_text():
    messages, prompt = published(1)
    tools = messages[0].pop("tools")
    assert encode_messages(messages, "thinking", tools=tools) == prompt
    alone = encode_messages([user("hi")], tools=[SEARCH])
    assert alone.startswith(f"{B}\n\n## Tools\n\n") and alone.endswith(f"tool calls.\n{U}hi{A}</think>")


def test_chat_mode_closes_the_reasoning_at_once_and_never_shows_any():
    messages = [system("s"), user("a"), assistant("b", reasoning_content="r"), user("c")]
    assert encode_messages(messages) == f"{B}s{U}a{A}</think>b{E}{U}c{A}</think>"
    assert encode_messages(messages, drop_thinking=False) == encode_messages(messages)


def test_reasoning_before_the_last_user_turn_is_dropped_unless_asked_for():
    messages = [user("a"), assistant("b", reasoning_content="r"), user("c")]
    assert encode_messages(messages, "thinking") == f"{B}{U}a{A}</think>b{E}{U}c{A}<think>"
    kept = encode_messages(messages, "thinking", drop_thinking=False)
    assert kept == f"{B}{U}a{A}<think>r</think>b{E}{U}c{A}<think>"


@pytest.mark.parametrize("owner", ["system", "developer"])
def test_tools_anywhere_keep_all_reasoning_and_developer_turns(owner):
    first = {"role": owner, "content": "s", "tools": [SEARCH]}
    prompt = encode_messages([first, user("a"), assistant("b", reasoning_content="r"), user("c")], "thinking")
    assert prompt.endswith(f"tool calls.\n{U}a{A}<think>r</think>b{E}{U}c{A}<think>")


def test_developer_turns_look_like_users_and_vanish_before_the_last_user_turn():
    messages = [system("s"), DEVELOPER, user("a"), assistant("b"), user("c")]
    assert encode_messages(messages, "thinking") == f"{B}s{U}a{A}</think>b{E}{U}c{A}<think>"
    assert encode_messages(messages) == f"{B}s{U}be brief{U}a{A}</think>b{E}{U}c{A}</think>"
    assert encode_messages([system("s"), DEVELOPER], "thinking") == f"{B}s{U}be brief{A}<think>"


def test_a_reminder_a_developer_with_tools_and_a_search_without_ids():
    developer = DEVELOPER | {"tools": [SEARCH]}
    search = assistant("", reasoning_content="look", tool_calls=[called("search", {"queries": "柴胡 布洛芬"})])
    messages = [system("s"), REMINDER, developer, search, tool("[0]"), assistant("done", reasoning_content="now")]
    prompt = encode_messages(messages, "thinking")
    assert prompt.startswith(f"{B}s<｜latest_reminder｜>2026-02-21, Saturday{U}be brief\n\n## Tools\n\nYou have")
    block = (
        f'\n\n<{D}tool_calls>\n<{D}invoke name="search">\n<{D}parameter name="queries" string="true">柴胡 布洛芬'
        f"</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>{E}"
    )
    result = f"{U}<tool_result>[0]</tool_result>{A}<think>now</think>done{E}"
    assert prompt.endswith(f"invoke tool calls.\n{A}<think>look</think>{block}{result}")


def test_a_reminder_after_a_user_turn_stands_behind_the_generation_prompt_as_released():
    assert encode_messages([user("q"), REMINDER]) == f"{B}{U}q{A}</think><｜latest_reminder｜>2026-02-21, Saturday"


def test_maximal_effort_is_a_text_in_front_when_thinking():
    messages = [system("s"), user("a")]
    plain, most = encode_messages(messages, "thinking"), encode_messages(messages, "thinking", reasoning_effort="max")
    assert most.startswith(f"{B}Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very")
    assert most.endswith(f"to ensure absolutely no assumption is left unchecked.\n\n{plain.removeprefix(B)}")
    assert encode_messages(messages, "thinking", reasoning_effort="high") == plain
    assert encode_messages(messages, "chat", reasoning_effort="max") == encode_messages(messages)


def test_results_join_the_user_turn_in_the_order_of_the_calls():
    calls = [called("f", {}, "one"), called("g", {}, "two"), called("f", {}, "three")]
    answers = [tool("3", "three"), tool("1", "one"), user("and?"), tool("2", "two"), user("so?")]
    prompt = encode_messages([user("q"), assistant("a", tool_calls=calls), *answers])
    results = [f"<tool_result>{i}</tool_result>" for i in (1, 2, 3)]
    turn = "\n\n".join([results[0], results[1], "and?", results[2], "so?"])
    assert prompt.endswith(f"{E}{U}{turn}{A}</think>")


def test_arguments_are_strings_as_they_are_and_json_for_all_else():
    arguments = {"s": 'a "b"\n<c>', "n": 1.5, "t": True, "z": None, "l": [1, "é"], "o": {"k": "v"}}
    prompt = encode_messages([user("q"), assistant("", tool_calls=[called("f", arguments)])])
    rows = ['"s" string="true">a "b"\n<c>', '"n" string="false">1.5', '"t" string="false">true']
    rows += ['"z" string="false">null', '"l" string="false">[1, "é"]', '"o" string="false">{"k": "v"}']
    lines = "\n".join(f"<{D}parameter name={row}</{D}parameter>" for row in rows)
    assert f'<{D}invoke name="f">\n{lines}\n</{D}invoke>' in prompt


def test_arguments_that_are_no_json_become_one_argument_and_none_leave_an_empty_line():
    calls = [called("f", "{oops"), called("g", "{}")]
    prompt = encode_messages([user("q"), assistant("", tool_calls=calls)])
    assert f'"f">\n<{D}parameter name="arguments" string="true">{{oops</{D}parameter>\n</{D}invoke>\n<{D}inv' in prompt
    assert f'<{D}invoke name="g">\n\n</{D}invoke>\n</{D}tool_calls>{E}' in prompt


def test_a_response_format_follows_the_tools():
    schema = {"type": "json_object", "überschrift": 1}
    prompt = encode_messages([system("s", tools=[SEARCH], response_format=schema), user("q")])
    text = "You MUST strictly adhere to the following schema to reply:\n" + json.dumps(schema, ensure_ascii=False)
    assert f"invoke tool calls.\n\n\n## Response Format:\n\n{text}{U}q" in prompt


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url", "title"])
def test_a_quick_task_ends_the_turn_with_its_token(task):
    assert encode_messages([user("q", task=task)], "thinking") == f"{B}{U}q<｜{task}｜>"


def test_the_action_task_stands_after_the_think_token_and_its_answer_has_no_reasoning():
    messages = [system("s"), REMINDER, user("q"), assistant("b"), user("c", task="action"), assistant("Search")]
    start = f"{B}s<｜latest_reminder｜>2026-02-21, Saturday{U}q{A}</think>b{E}{U}c{A}"
    assert encode_messages(messages) == f"{start}</think><｜action｜>Search{E}"
    assert encode_messages(messages, "thinking") == f"{start}<think><｜action｜>Search{E}"


def test_a_title_is_asked_for_after_an_answer_and_a_url_before_its_task():
    messages = [user("q"), assistant("a", task="title"), assistant("A title")]
    assert encode_messages(messages) == f"{B}{U}q{A}</think>a{E}<｜title｜>A title{E}"
    read = encode_messages([user("q", task="read_url", url="http://x.org")])
    assert read == f"{B}{U}q<｜extracted_url｜>http://x.org<｜read_url｜>"


def test_a_task_is_not_lost_when_its_message_joins_the_turn_before():
    assert encode_messages([user("a"), user("b", task="query")]) == f"{B}{U}a\n\nb<｜query｜>"


def test_parts_of_the_prompt_can_be_left_to_the_caller():
    messages = [user("q"), assistant("Once", wo_eos=True)]
    assert encode_messages(messages) == f"{B}{U}q{A}</think>Once"
    assert encode_messages(messages[:1], add_generation_prompt=False, add_bos=False) == f"{U}q"


def test_content_may_come_as_parts_of_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([user(parts)]) == f"{B}{U}a\n\nb{A}</think>"
    picture = [*parts, {"type": "image_url"}]
    messages = [user("q"), assistant("", tool_calls=[called("f", {})]), tool(picture)]
    assert "<tool_result>a\n\nb\n\n[Unsupported image_url]</tool_result>" in encode_messages(messages)


CALL = assistant("", tool_calls=[called("f", {}, "one")])
WRONG = {
    "at least one message": [],
    r"messages\[1\] has role 'bot': it must be one of system, user,": [user("a"), {"role": "bot", "content": ""}],
    r"messages\[0\] is 'hi': it must be an object": ["hi"],
    r"messages\[0\] \(user\) has no content": [{"role": "user"}],
    r"messages\[0\] \(user\) has content of type int: it must be a string": [user(3)],
    r"content that is no text: a part of type image_url: only": [user([{"type": "image_url"}])],
    r"messages\[1\] \(tool\) answers no call: the assistant's message before": [user("a"), tool("1", "one")],
    r"messages\[2\] \(tool\) answers call 'two': the calls before it are one": [user("a"), CALL, tool("1", "two")],
    r"messages\[3\] .* 'one' for the second time": [user("a"), CALL, tool("1", "one"), tool("1", "one")],
    r"tool_calls\[1\] has the id 'one' of an earlier call": [assistant("", tool_calls=CALL["tool_calls"] * 2)],
    r"tool_calls\[0\] must look like": [assistant("", tool_calls=[{"name": "f"}])],
    r"tool_calls\[0\] must look": [assistant("", tool_calls=[called('a"b', {})])],
    r"arguments \[1\]: they must be a JSON object": [assistant("", tool_calls=[called("f", "[1]")])],
    r"the format cannot write this name": [assistant("", tool_calls=[called("f", {'a" string="': 1})])],
    r"tools\[0\] must look like": [system("", tools=[{"name": "f"}])],
    r"\(user\) has tools: only a system or developer": [user("a", tools=[SEARCH])],
    r"\(user\) has tool_calls: only an assistant's": [user("a", tool_calls=[called("f", {})])],
    r"has task 'summary': .*one of action, query": [user("a", task="summary")],
    r"has url 'x': .*goes with task 'read_url'": [user("a", url="x")],
    r"\(developer\) is empty": [{"role": "developer", "content": ""}],
    r"half a surrogate pair": [user("a\ud800")],
}


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_message_is_named_with_what_would_be_right(says):
    with pytest.raises(UserError, match=says):
        encode_messages(WRONG[says])


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="thinking_mode is 'deep': it must be one of chat, thinking"):
        encode_messages([user("a")], "deep")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="reasoning_effort is 'low': it must be one of None, high, max"):
        encode_messages([user("a")], reasoning_effort="low")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tools are given twice"):
        encode_messages([system("", tools=[SEARCH]), user("a")], tools=[SEARCH])
