"""Is this a conversation that the released format can hold? If not: which message is wrong, and what is right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.chat.template import TASKS, to_json
from dsv4_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
_MAY_BE_EMPTY = ("system", "assistant")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check every message by itself and each tool result against the calls before it.

    Raises:
        UserError: that names the message (`messages[2]`) and says what would be right.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UserError(
            'messages must be a list with at least one message such as {"role": "user", "content": "Hello"}'
        )
    open_calls: dict[str, bool] | None = None
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        _check_role(place, message)
        place += f" ({message['role']})"
        _check_content(place, message)
        _check_fields(place, message)
        if message["role"] == "assistant":
            open_calls = _check_calls(place, message.get("tool_calls"))
        elif message["role"] == "tool":
            _check_result(place, message.get("tool_call_id"), open_calls)


def text_of(content: Any, unsupported: str | None = None) -> str:
    """The text of a message's content: a string, or parts `{"type": "text", "text": ...}` with empty lines between.

    Args:
        content: string, parts, or None for "".
        unsupported: what stands for a part that is not text, with `{type}` in it; without it such a part is an error.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(_part_text(part, unsupported) for part in content)


def _part_text(part: Any, unsupported: str | None) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if unsupported is None or kind == "text":
        raise UserError(f'a part of type {kind}: only {{"type": "text", "text": "..."}} can be written')
    return unsupported.format(type=kind)


def _check_role(place: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f'{place} is {message!r}: it must be an object such as {{"role": "user", "content": "Hello"}}')
    if message.get("role") not in ROLES:
        raise UserError(f"{place} has role {message.get('role')!r}: it must be one of {', '.join(ROLES)}")


def _check_content(place: str, message: Mapping[str, Any]) -> None:
    content, role = message.get("content"), message["role"]
    if content is None and role not in _MAY_BE_EMPTY:
        raise UserError(f"{place} has no content: it must be a string")
    if content is not None and not isinstance(content, (str, list)):
        raise UserError(f"{place} has content of type {type(content).__name__}: it must be a string")
    try:
        text = text_of(content, "" if role == "tool" else None)
    except UserError as error:
        raise UserError(f"{place} has content that is no text: {error}") from error
    if role == "developer" and not text:
        raise UserError(f"{place} is empty: a developer message must say something")
    if not isinstance(message.get("reasoning_content") or "", str):
        raise UserError(f"{place} has reasoning_content that is no string")
    _check_unicode(place, text + (message.get("reasoning_content") or ""))


def _check_unicode(place: str, text: str) -> None:
    stray = re.search("[\ud800-\udfff]", text)
    if stray:
        raise UserError(f"{place} holds half a surrogate pair ({stray.group()!r}): text must be encodable as UTF-8")


def _check_fields(place: str, message: Mapping[str, Any]) -> None:
    role, task = message["role"], message.get("task")
    if task is not None and (task not in TASKS or role not in ("user", "developer", "assistant")):
        raise UserError(
            f"{place} has task {task!r}: a user's or assistant's message may have one of {', '.join(TASKS)}"
        )
    url = message.get("url")
    if url is not None and (task != "read_url" or not isinstance(url, str)):
        raise UserError(f"{place} has url {url!r}: it must be a string, and goes with task 'read_url' only")
    _check_unicode(f"{place} url", url or "")
    for field in ("tools", "response_format"):
        if message.get(field) and role not in ("system", "developer"):
            raise UserError(f"{place} has {field}: only a system or developer message may")
        _check_unicode(f"{place} {field}", to_json(message.get(field)))
    for field in ("tool_calls", "reasoning_content"):
        if message.get(field) and role != "assistant":
            raise UserError(f"{place} has {field}: only an assistant's message may")
    for number, tool in enumerate(message.get("tools") or []):
        _function(f"{place} tools[{number}]", tool, '"parameters": {...}')


def _check_calls(place: str, calls: Any) -> dict[str, bool] | None:
    """Id of each call -> whether it is answered, yet; None without calls."""
    if not calls:
        return None
    names: dict[str, bool] = {}
    for number, made in enumerate(calls):
        where = f"{place} tool_calls[{number}]"
        arguments_of(where, _function(where, made, '"arguments": "{...}"'))
        if made.get("id") in names:
            raise UserError(f"{where} has the id {made['id']!r} of an earlier call: ids must differ")
        if made.get("id"):
            names[made["id"]] = False
    return names


def _function(where: str, holder: Any, rest: str) -> Mapping[str, Any]:
    function = holder.get("function") if isinstance(holder, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not re.fullmatch(r'[^"\r\n]+', name):
        raise UserError(
            f'{where} must look like {{"type": "function", "function": {{"name": "...", {rest}}}}}, '
            "the name without quotes and line breaks"
        )
    return function


def arguments_of(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call: a JSON object as text, or an object.

    Text that is no JSON becomes the one argument `arguments`, as in the release.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        raise UserError(f"{where} has arguments {arguments!r}: they must be a JSON object")
    _check_unicode(where, to_json(arguments))
    unwritable = next((key for key in arguments if '" string="' in key), None)
    if unwritable is not None:
        raise UserError(f"{where} has an argument named {unwritable!r}: the format cannot write this name")
    return arguments


def _check_result(place: str, call_id: Any, open_calls: dict[str, bool] | None) -> None:
    if open_calls is None:
        raise UserError(f"{place} answers no call: the assistant's message before it must have tool_calls")
    if not call_id or not open_calls:
        return  # the release takes results without ids in the order they come
    if call_id not in open_calls:
        raise UserError(f"{place} answers call {call_id!r}: the calls before it are {', '.join(open_calls)}")
    if open_calls[call_id]:
        raise UserError(f"{place} answers call {call_id!r} for the second time: one result for each call")
    open_calls[call_id] = True
