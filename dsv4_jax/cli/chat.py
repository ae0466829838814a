"""`dsv4 chat`: a conversation in the terminal, in the release's prompt format."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dsv4_jax.cli.model_arguments import ModelArguments
from dsv4_jax.errors import UserError

if TYPE_CHECKING:
    from dsv4_jax.chat import Event
    from dsv4_jax.inference.generate import Engine
    from dsv4_jax.tokenizer import Tokenizer

DESCRIPTION = """Talk with a checkpoint. A line is a message; /reset begins anew, /exit or the end of the input leaves,
Ctrl-C ends an answer.

Examples:
  dsv4 chat runs/nano
  dsv4 chat path/to/model-folder --system 'Answer in one sentence.' --max-new-tokens 1000
  dsv4 chat path/to/model-folder --thinking --effort max --speculative 1
  echo 'What is a residual stream?' | dsv4 chat path/to/model-folder"""

DIM, BRIGHT = "\033[2m", "\033[22m"


@dataclass(frozen=True)
class Chat(ModelArguments):
    """Arguments of `dsv4 chat`."""

    max_new_tokens: int = 512
    """Of one answer, its reasoning included."""
    system: str | None = None
    """A system message in front of the conversation."""
    thinking: bool = False
    """Reason before answering; the reasoning is shown dimmed."""
    effort: Literal["high", "max"] | None = None
    """How long to reason; goes with --thinking."""


def main(arguments: Sequence[str]) -> None:
    """Parse `arguments`, load, and talk until the input ends."""
    asked = tyro.cli(Chat, args=list(arguments), prog="dsv4 chat", description=DESCRIPTION)
    if asked.effort is not None and not asked.thinking:
        raise UserError("--effort goes with --thinking")
    engine, tokenizer = asked.open()
    conversation = Conversation(asked, engine, tokenizer)
    for line in lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation = Conversation(asked, engine, tokenizer)
            print("a new conversation", file=sys.stderr)
        elif line:
            try:
                show(conversation.answer(line))
            except UserError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print(f"{BRIGHT if sys.stdout.isatty() else ''}\n(broken off)", file=sys.stderr)


def lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, asked: Chat, engine: Engine, tokenizer: Tokenizer):
        """An empty conversation, but for the system message."""
        self._asked, self._engine, self._tokenizer = asked, engine, tokenizer
        self.messages: list[dict[str, Any]] = []
        if asked.system is not None:
            self.messages.append({"role": "system", "content": asked.system})

    def answer(self, text: str) -> Iterator[Event]:
        """The events of the answer to a message; both join the conversation, even if the answer is broken off.

        Raises:
            UserError: when the conversation does not fit the model; the message is then not part of it.
        """
        from dsv4_jax.chat import Message, StreamParser, encode_chat

        mode = "thinking" if self._asked.thinking else "chat"
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(self._tokenizer, messages, mode, reasoning_effort=self._asked.effort)
        room = self._engine.config.max_position_embeddings - len(prompt) - 1
        if room < 1:
            raise UserError(f"the conversation has {len(prompt)} tokens and fills the model: /reset begins anew")
        options = self._asked.options(max_new_tokens=min(self._asked.max_new_tokens, room))
        stream = self._engine.stream([prompt], options)  # which refuses at once what it cannot do
        parser, events = StreamParser(mode, expect_end=False), []
        try:
            for event in self._parsed(stream, parser):
                events.append(event)
                yield event
        finally:
            self.messages = [*messages, Message.of(events).as_dict()]

    def _parsed(self, stream: Any, parser: Any) -> Iterator[Event]:
        """Special tokens reach the parser as such; text that looks like one stays text."""
        from dsv4_jax.tokenizer_stream import StreamDecoder

        decoder = StreamDecoder(self._tokenizer)
        for event in stream:
            for token in event.tokens:
                for piece in decoder.feed_pieces(token):
                    yield from parser.feed(piece, trusted=False)
        yield from parser.feed(decoder.flush(), trusted=False)
        yield from parser.finish()


def show(events: Iterator[Event]) -> None:
    """Print an answer as it comes: reasoning dimmed, tool calls as JSON, problems on stderr."""
    dim = False
    for event in events:
        if sys.stdout.isatty() and dim != (event.kind == "reasoning"):
            dim = not dim
            print(DIM if dim else BRIGHT, end="")
        if event.call is not None:
            print(json.dumps(event.call.as_dict(), ensure_ascii=False), flush=True)
        elif event.kind == "problem":
            print(f"({event.text})", file=sys.stderr)
        else:
            print(event.text, end="", flush=True)
    print(BRIGHT if dim else "", flush=True)
