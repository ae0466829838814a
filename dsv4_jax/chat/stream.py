"""Completions -> messages, as they come: one state machine, in which a completion at once is the case of one piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from dsv4_jax.chat.dsml import MARKS, STRINGS, ToolCall, after_tokens, marked, read_call, unmarked
from dsv4_jax.chat.template import DSML, END_THINK, EOS, THINK
from dsv4_jax.tokenizer import Special

_OPENING = f"<{MARKS[DSML]}tool_calls>"
_CLOSING = re.compile(rf"\s*</{MARKS[DSML]}tool_calls>")
_CALL_END = f"</{MARKS[DSML]}invoke>"
_BLOCK_END = f"</{MARKS[DSML]}tool_calls>"
_HELD = ("\n\n" + _OPENING, _OPENING)
_ANY_MARK = re.compile(f"[{''.join(STRINGS)}]")


@dataclass(frozen=True)
class Event:
    """What a piece of a completion brought.

    Attributes:
        kind: of it.
        text: the next characters of the reasoning or content, or the problem in words.
        call: of a "tool_call".
    """

    kind: Literal["reasoning", "content", "tool_call", "problem"]
    text: str = ""
    call: ToolCall | None = None


@dataclass
class _State:
    phase: Literal["reasoning", "content", "calls", "ended"]
    started: bool = False
    blocks: int = 0
    opening: str = ""
    noted: set[str] = field(default_factory=set)


class StreamParser:
    """Reads a completion piece by piece; never raises.

    What breaks the grammar comes out as content, with an event "problem" that says what is wrong. Calls of a block that
    are whole are given as soon as they are closed, even if a later one is broken.
    """

    def __init__(self, thinking_mode: Literal["chat", "thinking"] = "chat", *, expect_end: bool = True):
        """A completion that followed a prompt of this mode; `expect_end` when its end token is part of the text."""
        self._state = _State("reasoning" if thinking_mode == "thinking" else "content")
        self._expect_end = expect_end
        self._raw = self._text = ""
        self._held: list[str] = []  # what comes behind `_text`, not joined to it yet
        self._edge = ""  # its last characters, in which an end may have begun

    def feed(self, piece: str, *, trusted: bool = True) -> list[Event]:
        """The events of one more piece.

        Args:
            piece: text, or a `Special` for a special token.
            trusted: read special strings in the text as tokens. False when the pieces come from token ids, where
                each token is a `Special`.
        """
        if isinstance(piece, Special) or not trusted:
            new = marked(self._raw, trusted=True)
            self._raw = ""
            new += MARKS.get(piece, str(piece)) if isinstance(piece, Special) else marked(piece, trusted=False)
        else:
            self._raw += piece
            whole = len(self._raw) - _partial(self._raw[after_tokens(self._raw) :], MARKS)
            new = marked(self._raw[:whole], trusted=True)
            self._raw = self._raw[whole:]
        self._held.append(new)
        closing = any(end in self._edge[1 - len(end) :] + new for end in (_CALL_END, _BLOCK_END))
        self._edge = (self._edge + new)[-len(_BLOCK_END) :]
        # Among calls nothing happens before one, or their block, is closed: a long parameter is not read every time.
        if self._state.phase == "calls" and not closing:
            return []
        self._join()
        return list(self._advance(final=False))

    def finish(self) -> list[Event]:
        """The events at the end: what was held back, and what is missing."""
        self._held.append(marked(self._raw, trusted=True))
        self._raw = ""
        self._join()
        events = list(self._advance(final=True))
        if self._state.phase == "calls":
            events += self._break_off()
        if self._state.phase == "reasoning":
            events += self._problem(f"the reasoning does not end: {END_THINK} is missing")
        if self._state.phase != "ended" and self._expect_end:
            events += self._problem(f"the completion does not end: {EOS} is missing, as when it is cut off")
        return events

    def _join(self) -> None:
        self._text += "".join(self._held)
        self._held.clear()

    def _advance(self, final: bool) -> Iterator[Event]:
        while self._text:
            before = self._state.phase, len(self._text)
            yield from {
                "reasoning": self._read_text,
                "content": self._read_text,
                "calls": self._read_calls,
                "ended": self._read_rest,
            }[self._state.phase](final)
            if before == (self._state.phase, len(self._text)):
                return

    def _read_text(self, final: bool) -> Iterator[Event]:
        """Reasoning or content, up to the mark that ends it or to what may become one."""
        if not self._state.started and self._state.phase == "reasoning" and self._text.startswith(MARKS[THINK]):
            yield from self._problem(f"the completion repeats {THINK}, which the prompt ends with")
            self._text = self._text[1:]
        self._state.started = True
        stops = {"reasoning": (MARKS[END_THINK], MARKS[EOS], _OPENING), "content": (MARKS[EOS], _OPENING)}
        ends = [(at, stop) for stop in stops[self._state.phase] if (at := self._text.find(stop)) >= 0]
        at, stop = min(ends, default=(len(self._text), ""))
        if not stop and not final:
            at -= _partial(self._text, _HELD)
        head, self._text = self._text[:at], self._text[at + len(stop) :]
        if stop == _OPENING:
            yield from self._open_block(head)
        else:
            yield from self._said(head)
        if stop == MARKS[END_THINK]:
            self._state.phase = "content"
        elif stop == MARKS[EOS]:
            yield from self._end()

    def _open_block(self, head: str) -> Iterator[Event]:
        yield from self._said(head.removesuffix("\n\n"))
        if not head.endswith("\n\n"):
            yield from self._problem("the block of tool calls does not begin after an empty line")
        if self._state.phase == "reasoning":
            yield from self._problem(f"tool calls inside the reasoning: {END_THINK} is missing")
        if self._state.blocks:
            yield from self._problem("there is more than one block of tool calls")
        self._state.phase, self._state.blocks = "calls", self._state.blocks + 1
        self._state.opening = head[len(head.removesuffix("\n\n")) :] + _OPENING

    def _read_calls(self, final: bool) -> Iterator[Event]:
        """Calls, each as soon as it is whole, and the end of their block."""
        closing = _CLOSING.match(self._text)
        if closing:
            if closing.group() != f"\n</{MARKS[DSML]}tool_calls>":
                yield from self._problem("the block of tool calls is not closed on a line of its own")
            self._text = self._text[closing.end() :]
            self._state.phase = "content"
        elif _CALL_END in self._text:
            call, self._text = read_call(self._text)
            if isinstance(call, ToolCall):
                self._state.opening = ""
                yield Event("tool_call", call=call)
                yield from (event for problem in call.problems for event in self._problem(problem))

    def _break_off(self) -> Iterator[Event]:
        """A block that is broken, when all has come: what is left of it is content."""
        yield from self._problem(f"broken block of tool calls: {read_call(self._text)[0]}")
        rest, end, after = self._text.partition(MARKS[EOS])
        yield Event("content", unmarked(self._state.opening + rest))
        self._state.phase, self._text = "content", end + after
        yield from self._advance(final=True)

    def _read_rest(self, final: bool) -> Iterator[Event]:
        yield from self._problem(f"there is text after {EOS}; it is left out")
        self._text = ""

    def _end(self) -> Iterator[Event]:
        if self._state.phase == "reasoning":
            yield from self._problem(f"the completion ends inside the reasoning: {END_THINK} is missing")
        self._state.phase = "ended"

    def _said(self, text: str) -> Iterator[Event]:
        """Text of the reasoning or the content, with the tokens in it as their strings."""
        if not text:
            return
        kind: Literal["reasoning", "content"] = "reasoning" if self._state.phase == "reasoning" else "content"
        if self._state.blocks:
            yield from self._problem("there is text after the tool calls")
        for mark in dict.fromkeys(_ANY_MARK.findall(text)):
            yield from self._problem(f"{STRINGS[mark]} inside the {kind}")
        yield Event(kind, unmarked(text))

    def _problem(self, text: str) -> Iterator[Event]:
        """Each problem is told once."""
        if text not in self._state.noted:
            self._state.noted.add(text)
            yield Event("problem", text)


def _partial(text: str, strings: Iterable[str]) -> int:
    """Length of the longest end of `text` that one of `strings` begins with, but is not yet whole."""
    lengths = (n for s in strings for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)
