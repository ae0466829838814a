"""A dataset by its name on the Hugging Face hub: `hf:NAME`, `hf:NAME@CONFIGURATION`, `hf:NAME:SPLIT`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_jax.errors import UserError
from train.data.local_files import Documents, Take, require, rows_of, text_of
from train.data.manifest import Manifest, source_files

PREFIX = "hf:"
RECIPE = "1"
_FORM = re.compile(r"(?P<name>[^@:]+)(?:@(?P<configuration>[^@:]+))?(?::(?P<split>[^@]+))?")


def hub_corpus(data: str, take: Take = text_of, cache: Path | None = None) -> tuple[Manifest, Callable[[], Documents]]:
    """Manifest and reader of a dataset, which `datasets` downloads once; `take` reads its rows, `cache` keeps hashes.

    Without a split it is `train`. A folder that `datasets.load_dataset` takes may stand for the name.

    Raises:
        UserError: when there is no such dataset, or it cannot be had; MissingPackageError: without `datasets`.
    """
    datasets, form = require("datasets", "Hugging Face datasets"), _FORM.fullmatch(data.removeprefix(PREFIX))
    if form is None:
        raise UserError(f"--data {data} is not of the form hf:NAME, hf:NAME@CONFIGURATION or hf:NAME:SPLIT")
    split = form["split"] or "train"
    try:
        rows: Any = datasets.load_dataset(form["name"], form["configuration"], split=split)
    except Exception as error:  # of the network, the hub, and every kind of file that it may hold
        raise UserError(f"--data {data} could not be loaded: {type(error).__name__}: {error}") from error
    files = [Path(file["filename"]) for file in rows.cache_files]
    named = {f"{number}-{path.name}": path for number, path in enumerate(files)}
    manifest = Manifest(Path(form["name"]).name, {"recipe": RECIPE, "split": split}, source_files(named, cache))
    return manifest, lambda: rows_of(rows, take, form["name"])
