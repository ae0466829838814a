"""Prefixes on disk (report 3.6.2): compressed entries of complete blocks, and states to go on from.

A file per block, named by a chain of hashes over everything before it: the model's identity, then the tokens block by
block. Two prompts share exactly the blocks in which, and before which, all their tokens agree.

States, the windows above all, are large. How many are kept is a choice between space and work: after every block (the
report's full caching: with windows of one block, every token's window entry is stored once), after every p tokens, or
none. What is missing is computed again from the last state, or from as many tokens as windows reach back, W x L, while
the entries are read from their blocks and not made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsv4_jax import model
from dsv4_jax.config import CSA, DeepseekV4Config
from dsv4_jax.errors import UserError
from dsv4_jax.inference.block_pool import BlockPool
from dsv4_jax.inference.digest import params_digest
from dsv4_jax.layers.kv_cache import stacks
from dsv4_jax.paths import local_path

Windows = Literal["full", "none"] | int
ENTRIES = 1  # raise it with whatever changes what an entry or a state holds, so that older ones are not found
FILL = 8  # blocks that are read or written at once
STALE = 3600.0  # seconds after which an unfinished file belongs to nobody
log = logging.getLogger(__name__)


class BadEntry(UserError):
    """A file of the store is damaged, or was made by another model."""


@dataclass(frozen=True)
class Hit:
    """What the store had for a prompt.

    Attributes:
        tokens: of the prompt.
        stored: of these, tokens whose entries came from the store.
        recomputed: of the stored, tokens that ran through the model again to bring back a state.
        ignored: files that were passed over, with the reason.
    """

    tokens: int
    stored: int
    recomputed: int
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """Stored blocks of a prompt, now allocated: where to go on, with which state (None: an empty one)."""

    start: int
    states: Any
    blocks: list[int]
    hit: Hit


class PrefixStore:
    """A folder of stored prefixes. Any number of processes may use it at once.

    Attributes:
        folder: the folder.
        windows: "full", "none", or p: a state after every p tokens, rounded up to whole blocks.
        limit: bytes that the folder may hold; what was used last is kept longest. None: no limit.
    """

    def __init__(self, folder: str | Path, params: model.Params, windows: Windows = "full", limit: int | None = None):
        """Open or make the store in `folder` for the model with these parameters, which are read once."""
        if windows not in ("full", "none") and not (isinstance(windows, int) and windows > 0):
            raise UserError(f'windows is {windows!r}: it is "full", "none", or a number of tokens')
        self.folder, self.windows, self.limit = local_path(folder), windows, limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._params = params_digest(params)

    def identity(self, pool: BlockPool) -> dict[str, str]:
        """Everything that entries depend on besides the tokens."""
        return {
            "configuration": hashlib.sha256(pool.config._json.encode()).hexdigest(),
            "cache format": f"{pool.format!r} {pool.options!r}",
            "parameters": self._params,
            "entries": f"version {ENTRIES}",
            "software": f"jax {jax.__version__} on {jax.default_backend()}",
        }

    def keys(self, pool: BlockPool, tokens: np.ndarray) -> list[str]:
        """One key per complete block of `tokens`."""
        key, size, keys = json.dumps(self.identity(pool), sort_keys=True), pool.block_tokens, []
        for start in range(0, len(tokens) // size * size, size):
            block = np.ascontiguousarray(tokens[start : start + size], "<i4")
            key = hashlib.sha256(key.encode() + block.tobytes()).hexdigest()
            keys.append(key)
        return keys

    def find(self, pool: BlockPool, tokens: np.ndarray, empty_states: Any) -> Found:
        """The longest stored prefix of `tokens` that leaves at least one token to run, in freshly allocated blocks."""
        size, ignored = pool.block_tokens, []
        keys = self.keys(pool, tokens[:-1])
        template = jax.eval_shape(lambda: jax.tree.map(lambda x: x[:, 0], pool.pools))
        contents = []
        for key in keys:
            content = self._try(pool, self._path(key, "block"), template, ignored)
            if content is None:
                break
            contents.append(content)
        keys = keys[: len(contents)]
        start, states = self._state(pool, keys, empty_states, ignored)
        blocks = self._into(pool, contents)
        self._touch(keys)
        for reason in ignored:
            log.warning("prefix store: ignored %s", reason)
        stored = len(blocks) * size
        hit = Hit(len(tokens), stored, stored - start, tuple(ignored))
        log.info("prefix store: %s", hit)
        return Found(start, states, blocks, hit)

    def add_blocks(self, pool: BlockPool, keys: list[str], blocks: np.ndarray) -> None:
        """Store complete blocks under their keys; those that are there already stay."""
        wanted = [i for i, key in enumerate(keys) if not self._path(key, "block").exists()]
        for start in range(0, len(wanted), FILL):
            part = wanted[start : start + FILL]
            content = pool.read(np.resize(blocks[part], FILL).astype(np.int32))  # one shape for any number
            for place, i in enumerate(part):
                one = jax.tree.map(lambda x, place=place: x[:, place], content)
                self._write(self._path(keys[i], "block"), self.identity(pool), one)

    def wants_state(self, pool: BlockPool, tokens: int) -> bool:
        """Whether the state after `tokens` tokens, whole blocks, is one to store."""
        if self.windows == "none":
            return False
        every = 1 if self.windows == "full" else -(-int(self.windows) // pool.block_tokens)
        return tokens // pool.block_tokens % every == 0

    def add_state(self, pool: BlockPool, key: str, states: Callable[[], Any]) -> None:
        """Store the state of one row after the block `key`, unless it is there."""
        path = self._path(key, "state")
        if not path.exists():
            self._write(path, self.identity(pool), jax.device_get(_between_blocks(pool.config, states())))

    def evict(self, keys: list[str]) -> None:
        """Mark `keys` as used now and shrink the folder to its limit, what was used longest ago first."""
        self._touch(keys)
        files = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if not entry.name.startswith("."):
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
            elif time.time() - stat.st_mtime > STALE:
                Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self.limit is None or total <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    def _path(self, key: str, kind: str) -> Path:
        return self.folder / f"{key}.{kind}"

    def _state(self, pool: BlockPool, keys: list[str], empty: Any, ignored: list[str]) -> tuple[int, Any]:
        """Where to go on, and the state there, or None where windows need not reach back further."""
        size, template = pool.block_tokens, _between_blocks(pool.config, empty)
        unneeded = max(0, len(keys) * size - reach(pool.config)) // size
        for count in range(len(keys), unneeded, -1):
            if self._path(keys[count - 1], "state").exists():
                states = self._try(pool, self._path(keys[count - 1], "state"), template, ignored)
                if states is not None:
                    return count * size, {name: parts | states.get(name, {}) for name, parts in empty.items()}
        return unneeded * size, None

    def _into(self, pool: BlockPool, contents: list[Any]) -> list[int]:
        blocks = pool.allocate(len(contents))
        for start in range(0, len(blocks), FILL):
            part = contents[start : start + FILL]
            places = np.full(FILL, -1, np.int32)
            places[: len(part)] = blocks[start : start + FILL]
            padded = part + part[:1] * (FILL - len(part))
            pool.fill(places, jax.tree.map(lambda *x: np.stack(x, 1), *padded))
        return blocks

    def _touch(self, keys: list[str]) -> None:
        """Mark files as used now, earlier blocks a little later: a chain is eaten from its end."""
        now = time.time_ns()
        for i, key in enumerate(keys):
            for kind in ("block", "state"):
                try:
                    os.utime(self._path(key, kind), ns=(now - i, now - i))
                except FileNotFoundError:
                    pass

    def _write(self, path: Path, identity: dict[str, str], tree: Any) -> None:
        """Write a tree of arrays in one step: no reader ever sees half a file. A full disk is only warned of."""
        arrays = {name: np.ascontiguousarray(x) for name, x in _named(tree).items()}
        about = {"identity": json.dumps(identity, sort_keys=True), "key": path.name, "sha256": _checksum(arrays)}
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        try:
            unfinished.write_bytes(save(arrays, about))
            os.replace(unfinished, path)
        except OSError as error:  # what is not stored is computed again
            log.warning("prefix store: %s was not stored: %s", path.name, error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _try(self, pool: BlockPool, path: Path, template: Any, ignored: list[str]) -> Any:
        """What `read` gives, or None for a file that is missing, damaged or foreign."""
        try:
            return self.read(pool, path, template)
        except FileNotFoundError:
            return None
        except BadEntry as error:
            ignored.append(str(error))
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # a right one takes its place
            return None

    def read(self, pool: BlockPool, path: Path, template: Any) -> Any:
        """The arrays of a file, in the structure of `template`.

        Raises:
            FileNotFoundError: when there is none.
            BadEntry: when it is damaged or another model's.
        """
        try:
            with safe_open(path, "numpy") as file:
                about, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
            theirs, ours = json.loads(about.get("identity", "{}")), self.identity(pool)
        except FileNotFoundError:
            raise
        except (SafetensorError, ValueError, OSError) as error:
            raise BadEntry(f"{path.name} is damaged: {error}") from error
        if other := [part for part, value in ours.items() if theirs.get(part) != value]:
            raise BadEntry(f"{path.name} was made with another {' and another '.join(other)}")
        expected = {name: (x.shape, np.dtype(x.dtype)) for name, x in _named(template).items()}
        if expected != {name: (x.shape, x.dtype) for name, x in arrays.items()}:
            raise BadEntry(f"{path.name} is damaged: its arrays are not those of this model")
        if about.get("key") != path.name or about.get("sha256") != _checksum(arrays):
            raise BadEntry(f"{path.name} is damaged: its content does not match its checksum")
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in expected])


def _between_blocks(config: DeepseekV4Config, states: Any) -> Any:
    """The parts of a state that count after complete blocks: HCA's tails are empty then. MTP's is not kept."""
    kinds = stacks(config)
    return {
        name: {part: x for part, x in parts.items() if part != "tail" or kinds[name].attention == CSA}
        for name, parts in states.items()
        if name != "mtp"
    }


def reach(config: DeepseekV4Config) -> int:
    """Tokens whose recomputation brings back a state: W x L, and more where a compressor's overlap is longer than W."""
    window, overlaps = config.sliding_window, (layer.ratio for layer in config.layers if layer.attention == CSA)
    return (config.num_hidden_layers - 1) * window + max(window, *overlaps, 0)


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
