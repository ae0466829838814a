"""The files of a tokenizer that go beside a model, read before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_jax.checkpoint.files import CheckpointError
from dsv4_jax.tokenizer import Tokenizer, load_tokenizer

PATTERNS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "vocab.json")


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """Content by file name.

    Args:
        tokenizer: a `Tokenizer`; a folder, of which everything that belongs to its tokenizer is taken; whatever else
            `load_tokenizer` takes; None for no tokenizer.

    Raises:
        FileNotFoundError, UserError: as `load_tokenizer`; and for a tokenizer that does not say which tokens begin and
            end a text, and for things that are none.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, (str, Path)):
        if Path(tokenizer).is_dir() and (files := files_in(Path(tokenizer))):
            return files
        tokenizer = load_tokenizer(tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(f"tokenizer is {tokenizer!r}: a Tokenizer, its folder or file, or its name is needed")
    return {name: text.encode() for name, text in tokenizer.files().items()}


def files_in(folder: Path) -> dict[str, bytes]:
    """Content by file name of what belongs to the tokenizer in a folder; empty where there is none."""
    found = {file for pattern in PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in sorted(found)}
