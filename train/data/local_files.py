"""The user's own text: .txt, .md, .py, .jsonl and .parquet files, folders and globs, a saved Hugging Face dataset."""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsv4_jax.errors import MissingPackageError, UserError, how_to_install
from train.data.manifest import Manifest, SourceFile

RECIPE = "1"
TEXT_FIELD, CHAT_FIELD = "text", "messages"
TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_FEW = 20
_SHORTEST_PIECE = 2_000

Documents = Iterator[tuple[str, str]]
Take = Callable[[Any, str], str]
"""The document in a row of a table, from the row and its name."""


def local_corpus(data: str) -> tuple[Manifest, Callable[[], Documents]]:
    """Manifest and reader of what lies at a path or glob.

    Fewer than 20 documents (one long file, say) are cut at line ends into about 64 pieces: some can be held out then.

    Raises:
        FileNotFoundError: when nothing is there; UserError: when the files are of no known kind.
    """
    root = Path(data).expanduser()
    files = _data_files(root) if root.exists() else _matching(data)
    base = root if root.is_dir() else _common_folder(files)
    named = {path.relative_to(base).as_posix(): path for path in files}
    manifest = Manifest(root.name, {"recipe": RECIPE}, tuple(SourceFile.of(*entry) for entry in named.items()))
    if _is_saved_dataset(root):
        return manifest, lambda: cut_when_few(_saved_dataset(root))
    return manifest, lambda: cut_when_few(itertools.chain.from_iterable(_file(*entry) for entry in named.items()))


def chat_corpus(data: str) -> tuple[Manifest, Callable[[], Documents]]:
    """As `local_corpus`, of tables whose field "messages" holds a conversation; each document is one, as JSON.

    Raises:
        FileNotFoundError, UserError: as `local_corpus`, and for files of text.
    """
    manifest, _ = local_corpus(data)
    root = Path(data).expanduser()
    files = _data_files(root) if root.exists() else _matching(data)
    if _is_saved_dataset(root):
        return manifest, lambda: _saved_dataset(root, conversation_of)
    texts = [path.name for path in files if _suffix(path) not in TABLE_SUFFIXES]
    if texts:
        known = ", ".join(TABLE_SUFFIXES)
        raise UserError(f"{texts[0]} is text, and data.format chat needs tables of conversations: {known}")
    base = root if root.is_dir() else _common_folder(files)
    named = {path.relative_to(base).as_posix(): path for path in files}
    read = lambda name, path: _table(name, path, CHAT_FIELD, conversation_of)  # noqa: E731
    return manifest, lambda: itertools.chain.from_iterable(read(*entry) for entry in named.items())


def cut_when_few(documents: Documents) -> Documents:
    """The documents as they are; when they are fewer than 20, pieces of them named `name#0`, `name#1`, ..."""
    first = list(itertools.islice(documents, _FEW))
    if len(first) == _FEW:
        return itertools.chain(first, documents)
    size = max(_SHORTEST_PIECE, sum(len(text) for _, text in first) // 64)
    return ((f"{name}#{i}", piece) for name, text in first for i, piece in enumerate(_pieces(text, size)))


def _pieces(text: str, size: int) -> Iterator[str]:
    while text:
        end = text.find("\n", size) + 1
        end = end if 0 < end <= 2 * size else size
        yield text[:end]
        text = text[end:]


def _data_files(root: Path) -> list[Path]:
    if _is_saved_dataset(root):
        return sorted(root.rglob("*.arrow"))
    if root.is_file():
        return _known([root])
    files = sorted(path for path in root.rglob("*") if path.is_file() and _suffix(path))
    if not files:
        raise UserError(
            f"the folder {root} holds no file of a known kind ({', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)})"
        )
    return files


def _matching(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    if not files:
        raise FileNotFoundError(f"--data {pattern}: neither `python`, `prose`, nor an existing file, folder or glob")
    return _known([path for path in files if path.is_file()])


def _known(files: list[Path]) -> list[Path]:
    unknown = [path.name for path in files if not _suffix(path)]
    if unknown:
        known = ", ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
        raise UserError(f"cannot read {', '.join(unknown[:3])}: known kinds of files are {known}")
    return files


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in TEXT_SUFFIXES + TABLE_SUFFIXES if path.name.lower().endswith(suffix)), None)


def _common_folder(files: list[Path]) -> Path:
    return next(folder for folder in files[0].parents if all(folder in path.parents for path in files))


def _file(name: str, path: Path) -> Documents:
    if _suffix(path) in TEXT_SUFFIXES:
        return iter([(name, _decode(path.read_bytes(), name))])
    return _table(name, path, TEXT_FIELD, text_of)


def _table(name: str, path: Path, field: str, take: Take) -> Documents:
    return _parquet(name, path, field, take) if _suffix(path) == ".parquet" else _jsonl(name, path, take)


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from error


def _jsonl(name: str, path: Path, take: Take) -> Documents:
    with _open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{name}:{number}", take(_parsed(line, f"{name}, line {number}"), f"{name}:{number}")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _open_lines(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return require("zstandard", ".jsonl.zst files").open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def text_of(row: Any, where: str) -> str:
    """The field "text" of a row. UserError where there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(TEXT_FIELD), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no text in the field {TEXT_FIELD!r} (found: {found or 'nothing'})")
    return row[TEXT_FIELD]


def conversation_of(row: Any, where: str) -> str:
    """The row without what is no part of the conversation, as JSON: equal conversations are equal text."""
    if not isinstance(row, dict) or not isinstance(row.get(CHAT_FIELD), list):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no list in the field {CHAT_FIELD!r} (found: {found or 'nothing'})")
    return json.dumps({name: row[name] for name in (CHAT_FIELD, "tools") if row.get(name)}, sort_keys=True)


def _parquet(name: str, path: Path, field: str, take: Take) -> Documents:
    parquet = require("pyarrow.parquet", ".parquet files").ParquetFile(path)
    if field not in parquet.schema_arrow.names:
        raise UserError(f"{name} has no column {field!r} (found: {', '.join(parquet.schema_arrow.names)})")
    column = (value for batch in parquet.iter_batches(columns=[field]) for value in batch.column(0).to_pylist())
    named = ((f"{name}:{number}", value) for number, value in enumerate(column))
    return ((where, take({field: value}, where) if value is not None else "") for where, value in named)


def _is_saved_dataset(root: Path) -> bool:
    return any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(root: Path, take: Take = text_of) -> Documents:
    dataset = require("datasets", "Hugging Face datasets").load_from_disk(str(root))
    parts = dataset if isinstance(dataset, dict) else {"": dataset}
    for split, rows in parts.items():
        yield from rows_of(rows, take, f"{split}:" if split else "")


def rows_of(rows: Any, take: Take, prefix: str = "") -> Documents:
    """The documents of a dataset's rows, named by their numbers."""
    for number, row in enumerate(rows):
        yield f"{prefix}{number}", take(row, f"{prefix}{number}")


def require(module: str, what: str) -> Any:
    """An optional package; MissingPackageError says what needs it and which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(f"{what} need the package {package}: {how_to_install('data')}") from error
