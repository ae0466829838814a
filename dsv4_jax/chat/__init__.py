"""The released prompt format: messages to a prompt (text or token ids), and completions back to messages."""

from dsv4_jax.chat.encode import PromptOptions, encode_chat, encode_conversation, encode_messages, prompt_pieces
from dsv4_jax.chat.parse import CompletionError, Message, ToolCall, parse_completion
from dsv4_jax.chat.stream import Event, StreamParser

__all__ = [
    "CompletionError",
    "Event",
    "Message",
    "PromptOptions",
    "StreamParser",
    "ToolCall",
    "encode_chat",
    "encode_conversation",
    "encode_messages",
    "parse_completion",
    "prompt_pieces",
]
