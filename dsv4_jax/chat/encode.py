"""Messages -> the released prompt format, as text or as token ids.

Messages are the usual objects (`role`, `content`, `tool_calls`, ...). Beyond those: `reasoning_content` on assistant
turns; `tools` and `response_format` on a system or developer turn; the roles `developer` and `latest_reminder`; `task`
on a user or assistant turn, which asks for one of the quick answers (`url` beside task `read_url`); `wo_eos` on an
assistant turn that the model shall go on with. Source: the encoding beside the released checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

from dsv4_jax.chat import template
from dsv4_jax.chat.check import arguments_of, check_messages, text_of
from dsv4_jax.chat.template import ASSISTANT, BOS, END_THINK, EOS, EXTRACTED_URL, LATEST_REMINDER, TASKS, THINK, USER
from dsv4_jax.errors import UserError
from dsv4_jax.tokenizer import Tokenizer

ThinkingMode = Literal["chat", "thinking"]


class PromptOptions(TypedDict, total=False):
    """How to write a conversation.

    Attributes:
        tools: what the model may call, `{"type": "function", "function": {...}}` each; written after the system text.
        reasoning_effort: None, "high" (the same as None) or "max" (a fixed text in front, when thinking).
        drop_thinking: leave out the reasoning before the last user turn, and developer turns before it (thinking mode
            only). Tools anywhere turn it off. Default: True.
        add_bos: begin with the token that begins a document. Default: True.
        add_generation_prompt: end with what makes the model answer. Default: True.
    """

    tools: Sequence[dict[str, Any]] | None
    reasoning_effort: Literal["high", "max"] | None
    drop_thinking: bool
    add_bos: bool
    add_generation_prompt: bool


@dataclass
class _Turn:
    """A message as it is written; `parts` are the texts and tool results that share a user turn, with call ids."""

    role: str
    message: Mapping[str, Any]
    parts: list[tuple[str | None, str]] = field(default_factory=list)
    task: str | None = None


def encode_messages(
    messages: Sequence[Mapping[str, Any]], thinking_mode: ThinkingMode = "chat", **options: Unpack[PromptOptions]
) -> str:
    """The prompt as one string, byte for byte as released. To feed a model, use `encode_chat`.

    Raises:
        UserError: for messages that the format cannot hold; it names the message and says what would be right.
    """
    return "".join(prompt_pieces(messages, thinking_mode, **options))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: ThinkingMode = "chat",
    **options: Unpack[PromptOptions],
) -> list[int]:
    """The prompt as token ids. Text of messages stays text, even where it looks like a special token.

    Raises:
        UserError: as `encode_messages`, and when the vocabulary lacks a token of the format.
    """
    return tokenizer.encode_prompt(prompt_pieces(messages, thinking_mode, **options))


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: ThinkingMode = "chat",
    **options: Unpack[PromptOptions],
) -> tuple[list[int], list[bool]]:
    """A whole conversation as token ids, and which of them the assistant wrote: what a model is to learn.

    Its turns end with the end-of-sentence token, which counts as written.

    Raises:
        UserError: as `encode_chat`, and when the assistant says nothing.
    """
    options["add_generation_prompt"] = False
    ids, written = [], []
    labelled = conversation_pieces(messages, thinking_mode, **options)
    for answer, run in itertools.groupby(labelled, lambda labelled: labelled[1]):
        encoded = tokenizer.encode_prompt(piece for piece, _ in run)
        ids += encoded
        written += [answer] * len(encoded)
    if not any(written):
        raise UserError("there is no message of the assistant: nothing to learn")
    return ids, written


def prompt_pieces(
    messages: Sequence[Mapping[str, Any]], thinking_mode: ThinkingMode = "chat", **options: Unpack[PromptOptions]
) -> list[str]:
    """The prompt in pieces: a `Special` for each token of the format, plain text for all that messages say.

    Raises:
        UserError: as `encode_messages`.
    """
    return [piece for piece, _ in conversation_pieces(messages, thinking_mode, **options)]


def conversation_pieces(
    messages: Sequence[Mapping[str, Any]], thinking_mode: ThinkingMode = "chat", **options: Unpack[PromptOptions]
) -> list[tuple[str, bool]]:
    """The pieces of a prompt, and whether the assistant wrote each of them.

    Raises:
        UserError: as `encode_messages`.
    """
    effort = options.get("reasoning_effort")
    _check_choice("thinking_mode", thinking_mode, ("chat", "thinking"))
    _check_choice("reasoning_effort", effort, (None, "high", "max"))
    messages = _with_tools(messages, options.get("tools"))
    check_messages(messages)
    dropping = options.get("drop_thinking", True) and not any(message.get("tools") for message in messages)
    turns = _merge(messages)
    if thinking_mode == "thinking" and dropping:
        last = _last_user(turns)
        turns = [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]
    writer = _Writer(turns, thinking_mode == "thinking", dropping, options.get("add_generation_prompt", True))
    head: list[str] = [BOS] if options.get("add_bos", True) else []
    if effort == "max" and thinking_mode == "thinking":
        head.append(template.MAX_EFFORT)
    labelled = [(piece, False) for piece in head]
    for index in range(len(turns)):
        labelled += [(piece, True) for piece in writer.answer(index) if piece]
        labelled += [(piece, False) for piece in writer.turn(index) if piece]
    return labelled


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}: it must be one of {', '.join(map(str, choices))}")


def _with_tools(messages: Sequence[Mapping[str, Any]], tools: Any) -> Sequence[Mapping[str, Any]]:
    """The messages, with `tools` on the system message in front (an empty one where there is none)."""
    if not tools or not messages or not isinstance(messages[0], Mapping):
        return messages
    first = messages[0] if messages[0].get("role") == "system" else {"role": "system", "content": ""}
    if first.get("tools"):
        raise UserError("tools are given twice: in the system message and beside the messages; give them once")
    return [{**first, "tools": tools}, *(messages[1:] if first is messages[0] else messages)]


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    """One turn for neighbouring messages of users and tools, the results in the order of their calls."""
    turns: list[_Turn] = []
    order: dict[str, int] = {}
    for message in messages:
        role = message["role"]
        if role == "assistant" and message.get("tool_calls"):
            order = {made["id"]: i for i, made in enumerate(message["tool_calls"]) if made.get("id")}
        if role not in ("user", "tool"):
            turns.append(_Turn(role, message, task=message.get("task")))
            continue
        if not (turns and turns[-1].role == "user" and (role == "tool" or turns[-1].task is None)):
            turns.append(_Turn("user", message))
        turn = turns[-1]
        turn.task = message.get("task") or turn.task
        turn.message = message if message.get("task") else turn.message
        turn.parts.append(_part(message))
        _sort_results(turn.parts, order)
    return turns


def _part(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """Call id (None for what a user says) and text."""
    if message["role"] == "user":
        return None, text_of(message["content"])
    result = text_of(message["content"], "[Unsupported {type}]")
    return message.get("tool_call_id") or "", f"<tool_result>{result}</tool_result>"


def _sort_results(parts: list[tuple[str | None, str]], order: dict[str, int]) -> None:
    """Put the tool results in the order of the calls, each where a result stood; texts stay in their places."""
    places = [i for i, (call_id, _) in enumerate(parts) if call_id is not None]
    ranked = sorted((parts[i] for i in places), key=lambda part: order.get(part[0] or "", 0))
    for place, part in zip(places, ranked, strict=True):
        parts[place] = part


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


class _Writer:
    """Writes the turns one by one."""

    def __init__(self, turns: Sequence[_Turn], thinking: bool, dropping: bool, generation_prompt: bool):
        self._turns, self._thinking, self._generation_prompt = turns, thinking, generation_prompt
        self._keeps_from = _last_user(turns) if dropping else -1

    def turn(self, index: int) -> list[str]:
        """The pieces of a turn that others wrote, and of what leads over to the next."""
        turn = self._turns[index]
        if turn.role == "assistant":
            return self._after(index)
        text = "\n\n".join(part for _, part in turn.parts) if turn.role == "user" else text_of(turn.message["content"])
        opening = {"user": [USER], "developer": [USER], "latest_reminder": [LATEST_REMINDER], "system": []}[turn.role]
        return [*opening, text, *_sections(turn.message), *self._after(index)]

    def answer(self, index: int) -> list[str]:
        """The pieces that the assistant wrote, if it is its turn."""
        message = self._turns[index].message
        if self._turns[index].role != "assistant":
            return []
        for_task = index > 0 and self._turns[index - 1].task is not None
        pieces: list[str] = []
        if self._thinking and not for_task and index > self._keeps_from:
            pieces = [message.get("reasoning_content") or "", END_THINK]
        pieces.append(text_of(message.get("content")))
        if message.get("tool_calls"):
            pieces += template.calls_block([_call(made["function"]) for made in message["tool_calls"]])
        return pieces if message.get("wo_eos") else [*pieces, EOS]

    def _after(self, index: int) -> list[str]:
        turn, following = self._turns[index], self._turns[index + 1 : index + 2]
        if following and following[0].role not in ("assistant", "latest_reminder"):
            return []
        if not following and not self._generation_prompt:
            return []
        think = THINK if self._thinking and (turn.task == "action" or index >= self._keeps_from) else END_THINK
        if turn.task == "action":
            return [ASSISTANT, think, TASKS["action"]]
        if turn.task is not None:
            url = turn.message.get("url")
            return [*([EXTRACTED_URL, url] if url else []), TASKS[turn.task]]
        return [ASSISTANT, think] if turn.role in ("user", "developer") else []


def _sections(message: Mapping[str, Any]) -> list[str]:
    """What follows the text of a system or developer turn."""
    tools, schema = message.get("tools"), message.get("response_format")
    return [
        *(template.tools_section(tools) if tools else []),
        *(template.response_format_section(schema) if schema else []),
    ]


def _call(function: Mapping[str, Any]) -> list[str]:
    arguments = arguments_of(function["name"], function)
    values = (
        (key, isinstance(v, str), v if isinstance(v, str) else template.to_json(v)) for key, v in arguments.items()
    )
    return template.call(function["name"], values)
