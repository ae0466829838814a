"""The base of errors that are addressed to a person: command lines print their message without a traceback."""

from __future__ import annotations

import os
from pathlib import Path


class UserError(ValueError):
    """Something in a configuration, file or request is wrong; the message says what, where, and what would be right."""


class MissingPackageError(UserError, ImportError):
    """An optional package is needed; the message says how to install it."""


def how_to_install(extra: str) -> str:
    """For a message: the command that brings an optional part of this project, by one of pyproject.toml's extras."""
    return f"pip install -e '.[{extra}]' in the folder of this project"


def for_people(error: BaseException) -> str | None:
    """What a person is told of an error instead of a traceback; None for one that is the program's own mistake.

    An error of the system is for people when it names the file: a folder that is none, or that may not be written.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) if isinstance(error, (UserError, FileNotFoundError, FileExistsError)) else None


def check_writable(folder: Path) -> None:
    """Raises UserError when nothing can be written into `folder`, which need not be there yet: before hours of work."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{folder} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: {there} is closed to this user")
