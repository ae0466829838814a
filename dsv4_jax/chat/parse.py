"""A whole completion -> an assistant message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dsv4_jax.chat.dsml import ToolCall
from dsv4_jax.chat.stream import Event, StreamParser
from dsv4_jax.errors import UserError


class CompletionError(UserError):
    """A completion that is not as the released format demands; the message says where."""


@dataclass(frozen=True)
class Message:
    """What an assistant said.

    Attributes:
        content: the answer.
        reasoning_content: what came before it, in thinking mode.
        tool_calls: in order.
        problems: what is not as the format demands, in words; none when all is well.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Event]) -> Message:
        """The message that the events of a `StreamParser` add up to."""
        events = list(events)

        def texts(kind: str) -> list[str]:
            return [event.text for event in events if event.kind == kind]

        calls = tuple(event.call for event in events if event.call is not None)
        return cls("".join(texts("content")), "".join(texts("reasoning")), calls, tuple(texts("problem")))

    def as_dict(self) -> dict[str, Any]:
        """The message to append to a conversation."""
        calls = [call.as_dict() for call in self.tool_calls]
        said = {"content": self.content, "reasoning_content": self.reasoning_content}
        return {"role": "assistant", **said, "tool_calls": calls}


def parse_completion(
    completion: str | Iterable[str],
    thinking_mode: Literal["chat", "thinking"] = "chat",
    *,
    tolerant: bool = False,
    expect_end: bool = True,
) -> Message:
    """The message in a completion.

    Args:
        completion: its text, or the pieces of `Tokenizer.decode_prompt(ids)`: then only real tokens are read as such,
            and text that looks like one stays text.
        thinking_mode: of the prompt. Use "chat" for the answers to quick tasks.
        tolerant: return what breaks the grammar as content, with `problems`; otherwise it is an error.
        expect_end: the end token is part of the completion. Give False where it has been taken off.

    Raises:
        CompletionError: for malformed completions, unless tolerant.
    """
    parser = StreamParser(thinking_mode, expect_end=expect_end)
    whole = isinstance(completion, str)
    events = [event for piece in ([completion] if whole else completion) for event in parser.feed(piece, trusted=whole)]
    message = Message.of(events + parser.finish())
    if message.problems and not tolerant:
        raise CompletionError("; ".join(message.problems))
    return message
