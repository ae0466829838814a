"""The released markup of completions: its special tokens as marks, and one tool call.

Inside the parser each special token is one character that no decoded text can hold: half a surrogate pair. Text that
only looks like a special token is then just text, and no token is ever half there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from dsv4_jax.chat import template
from dsv4_jax.chat.template import BOS, DSML, END_THINK, EOS, THINK, to_json
from dsv4_jax.tokenizer import Special

MARKS = {BOS: "\udc00", EOS: "\udc01", THINK: "\udc02", END_THINK: "\udc03", DSML: "\udc04"}
"""Special token -> what stands for it inside the parser."""
STRINGS = {mark: str(token) for token, mark in MARKS.items()}
"""Mark -> the token's string."""

_TOKEN = re.compile("|".join(map(re.escape, MARKS)))
_DSML = MARKS[DSML]
_INVOKE = re.compile(rf'\s*<{_DSML}invoke\s+name="([^"\r\n]+)"\s*>')
_PARAMETER = re.compile(rf'\s*<{_DSML}parameter\s+name="([^{_DSML}]*?)"\s+string="(true|false)"\s*>')
_INVOKE_END = re.compile(rf"\s*</{_DSML}invoke>")
_PARAMETER_END = f"</{_DSML}parameter>"


def marked(text: str, *, trusted: bool) -> str:
    """Text with marks for its special tokens, if they are trusted; half surrogate pairs of its own become U+FFFD."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return _TOKEN.sub(lambda found: MARKS[Special(found.group())], text) if trusted else text


def after_tokens(text: str) -> int:
    """Where the last special token of the text ends."""
    return max((found.end() for found in _TOKEN.finditer(text)), default=0)


def unmarked(text: str) -> str:
    """Text with the tokens' strings again."""
    return text.translate(_STRING_OF)


_STRING_OF = {ord(mark): string for mark, string in STRINGS.items()}


@dataclass(frozen=True)
class ToolCall:
    """A tool call.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as text.
        problems: where the markup was understood but is not as the format demands.
    """

    name: str
    arguments: str
    problems: tuple[str, ...] = field(default=(), compare=False)

    def as_dict(self) -> dict[str, object]:
        """The call as messages hold it; whoever runs tools adds an `id`."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def read_call(text: str) -> tuple[ToolCall | str, str]:
    """The call at the beginning of the text and what follows it; or what is wrong, and the same text."""
    opening = _INVOKE.match(text)
    if not opening:
        return "expected a call or the end of the block", text
    name, at, where = opening[1], opening.end(), f"of the call to {unmarked(opening[1])!r}"
    parameters: dict[str, tuple[bool, str]] = {}
    while parameter := _PARAMETER.match(text, at):
        end = text.find(_PARAMETER_END, parameter.end())
        if end < 0:
            return f"parameter {unmarked(parameter[1])!r} {where} is not closed", text
        if parameter[1] in parameters:
            return f"parameter {unmarked(parameter[1])!r} {where} is given twice", text
        parameters[parameter[1]] = parameter[2] == "true", text[parameter.end() : end]
        at = end + len(_PARAMETER_END)
    closing = _INVOKE_END.match(text, at)
    if not closing:
        return f"the end {where} is missing, or not all in it is parameters", text
    return _call(name, parameters, text[: closing.end()]), text[closing.end() :]


def _call(name: str, parameters: dict[str, tuple[bool, str]], written: str) -> ToolCall:
    problems, values = [], []
    exact = written == "\n" + _rendered(name, parameters)
    name = unmarked(name)
    if not exact:
        problems.append(f"the call to {name!r} is not spaced as the format demands")
    for key, (is_string, value) in parameters.items():
        key, value = unmarked(key), unmarked(value)
        if not is_string and not _is_json(value):
            problems.append(f"parameter {key!r} of the call to {name!r} is not JSON; it is taken as a string")
            is_string = True
        values.append(f"{to_json(key)}: {to_json(value) if is_string else value}")
    return ToolCall(name, "{" + ", ".join(values) + "}", tuple(problems))


def _rendered(name: str, parameters: dict[str, tuple[bool, str]]) -> str:
    """The call as the format writes it, with marks."""
    pieces = template.call(name, ((key, *rest) for key, rest in parameters.items()))
    return "".join(MARKS[piece] if isinstance(piece, Special) else piece for piece in pieces)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
