"""Paths that people give: files and folders of this machine or mounted on it, never addresses of another service."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dsv4_jax.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: that is what Path leaves of two


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path, with ~ for the home folder.

    Raises:
        UserError: for an address such as gs://bucket/run, which would be taken for a folder called "gs:".
    """
    if _ADDRESS.match(os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)} is an address, and only paths are read and written here: mount that storage "
            "(gcsfuse, Filestore, NFS, Lustre) on every machine of the job, and give the path where it is mounted"
        )
    return Path(path).expanduser()
