"""The folder of a run: what it was asked for, its log, checkpoints, tokenizer and pictures; never another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.config import DeepseekV4Config
from dsv4_jax.config_json import to_released_json
from dsv4_jax.errors import check_writable
from dsv4_jax.paths import local_path
from train.data.manifest import Manifest, require_same_data
from train.data.tasks.rows import TaskSource
from train.data.tokens import TokenStore
from train.recipe import Recipe, RecipeError, recipe_to_json
from train.recipe_json import read_json
from train.run_lock import LOCK

FREE = ("name", "about", "cadence", "stability")
"""Settings that may change when a run goes on: they do not touch what an undisturbed run computes."""


class RunFolder:
    """Paths of a run, and the checks that a folder belongs to it."""

    def __init__(self, folder: str | Path):
        """Creates nothing yet. Raises UserError for an address instead of a path."""
        self.root = local_path(folder)
        self.recipe, self.manifest = self.root / "recipe.json", self.root / "manifest.json"
        self.checkpoints, self.metrics = self.root / "checkpoints", self.root / "metrics.jsonl"

    def check(self, recipe: Recipe) -> bool:
        """Whether the folder holds this very run (to resume); False when it is new or empty. One process asks for all.

        A run that began and did no step is as good as none: it may be replaced.

        Raises:
            RecipeError: when it holds a run with other settings, or files that are no run.
            UserError: when nothing can be written there.
        """
        check_writable(self.root)
        if not self.root.exists() or all(path.name == LOCK for path in self.root.iterdir()):
            return False
        if not self.recipe.is_file():
            raise RecipeError(f"{self.root} holds files but no recipe.json, so it is no run: give another --out")
        if self.did_nothing:
            return False
        old, new = read_json(self.recipe), recipe_to_json(recipe)
        if changed := sorted(differences(fixed(old), fixed(new))):
            raise RecipeError(
                f"{self.root} holds a run with other settings, and nothing is overwritten:\n  "
                + "\n  ".join(changed)
                + "\nGive the new run a folder with --out, or repeat the old settings to resume the old run."
            )
        return True

    @property
    def did_nothing(self) -> bool:
        """Whether a run wrote what it was asked for (the manifest shows that it was a run), and nothing behind that."""
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        saved = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        return self.manifest.is_file() and not logged and not saved

    def begin(self, recipe: Recipe, config: DeepseekV4Config) -> None:
        """Writes recipe.json and config.json; the manifest of a run that did nothing goes."""
        if jax.process_index() == 0 and self.did_nothing:
            self.manifest.unlink()
        self.write_json("recipe.json", recipe_to_json(recipe))
        self.write_json("config.json", to_released_json(config))

    def bind_data(self, store: TokenStore | TaskSource) -> None:
        """Writes the manifest and the tokenizer (of a text), or, where they are, demands that the data is the same.

        Raises:
            DataMismatchError: the corpus changed since the run began.
        """
        if self.manifest.is_file():
            require_same_data(Manifest.load(self.manifest), store.manifest)
        elif jax.process_index() == 0:
            if isinstance(store, TokenStore):
                store.tokenizer.save(self.root)
            store.manifest.save(self.manifest)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file in one go, on process 0."""
        if jax.process_index() == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            draft = self.root / f".{name}.tmp"
            draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            draft.replace(self.root / name)  # a kill leaves the old file or the new one


def fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's JSON without the settings that are `FREE`."""
    return {name: value for name, value in recipe.items() if name not in FREE}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`path: was .., is ..` for every leaf that differs."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: was {json.dumps(old)}, is {json.dumps(new)}"]
