"""The base of errors that are addressed to a person: command lines print their message without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something in a configuration, file or request is wrong; the message says what, where, and what would be right."""


class MissingPackageError(UserError, ImportError):
    """An optional package is needed; the message says how to install it."""
