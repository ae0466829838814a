"""The base of errors that are addressed to a person: command lines print their message without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something in a configuration, file or request is wrong; the message says what, where, and what would be right."""


class MissingPackageError(UserError, ImportError):
    """An optional package is needed; the message says how to install it."""


def how_to_install(extra: str) -> str:
    """For a message: the command that brings an optional part of this project, by one of pyproject.toml's extras."""
    return f"pip install -e '.[{extra}]' in the folder of this project"
