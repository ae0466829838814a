"""The fixed strings of the released prompt format, and its markup for tool calls (DSML).

Source: the encoding that comes with the released checkpoints. What is a token of its own is `Special`; all else is
text. The markup has no escapes: in a prompt as one string, a value that holds `</｜DSML｜parameter>` ends there. In
token ids it does not, since typed text never becomes the token `｜DSML｜`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from dsv4_jax import tokenizer as vocabulary
from dsv4_jax.tokenizer import Special

BOS, EOS = Special(vocabulary.BOS), Special(vocabulary.EOS)
USER, ASSISTANT = Special("<｜User｜>"), Special("<｜Assistant｜>")
THINK, END_THINK = Special("<think>"), Special("</think>")
DSML = Special("｜DSML｜")
LATEST_REMINDER, EXTRACTED_URL = Special("<｜latest_reminder｜>"), Special("<｜extracted_url｜>")
TASKS = {name: Special(f"<｜{name}｜>") for name in ("action", "query", "authority", "domain", "title", "read_url")}

MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_TOOLS_HEAD = """## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


def to_json(value: Any) -> str:
    """JSON as the format writes it: one line, characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def tools_section(tools: Iterable[dict[str, Any]]) -> list[str]:
    """The pieces that tell the model of its tools, one JSON schema a line."""
    fixed = re.split(f"({'|'.join((DSML, THINK, END_THINK))})", _TOOLS_HEAD)
    head = [Special(part) if part in (DSML, THINK, END_THINK) else part for part in fixed]
    return ["\n\n", *head, "\n".join(to_json(tool["function"]) for tool in tools), _TOOLS_TAIL]


def response_format_section(schema: Any) -> list[str]:
    """The pieces that demand an answer by a schema."""
    return ["\n\n", _RESPONSE_FORMAT, to_json(schema)]


def calls_block(calls: Iterable[list[str]]) -> list[str]:
    """The pieces of a block of rendered calls."""
    inside = [piece for call in calls for piece in (*call, "\n")]
    return ["\n\n", *_opening("tool_calls", ""), "\n", *inside, *_closing("tool_calls")]


def call(name: str, parameters: Iterable[tuple[str, bool, str]]) -> list[str]:
    """The pieces of one tool call.

    Args:
        name: of the tool.
        parameters: name, whether the value is a string, and the value (JSON where it is none).
    """
    inside: list[str] = []
    for key, is_string, value in parameters:
        attributes = f' name="{key}" string="{"true" if is_string else "false"}"'
        inside += ["\n", *_opening("parameter", attributes), value, *_closing("parameter")]
    return [*_opening("invoke", f' name="{name}"'), *(inside or ["\n"]), "\n", *_closing("invoke")]


def _opening(tag: str, attributes: str) -> list[str]:
    return ["<", DSML, f"{tag}{attributes}>"]


def _closing(tag: str) -> list[str]:
    return ["</", DSML, f"{tag}>"]
