"""The user's own text: .txt, .md, .py, .jsonl and .parquet files, folders and globs, a saved Hugging Face dataset."""

from __future__ import annotations

import glob
import gzip
import importlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dsv4_jax.errors import MissingPackageError, UserError, how_to_install
from dsv4_jax.paths import local_path
from train.data.manifest import Manifest, source_files

RECIPE = "1"
TEXT_FIELD, CHAT_FIELD = "text", "messages"
TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_FEW = 20
_SHORTEST_PIECE = 2_000

Documents = Iterator[tuple[str, str]]
Take = Callable[[Any, str], str]
"""The document in a row of a table, from the row and its name."""


def local_corpus(data: str, cache: Path | None = None) -> tuple[Manifest, Callable[[], Documents]]:
    """Manifest and reader of what lies at a path or glob.

    Hashes of the files are kept in `cache`. Fewer than 20 documents (one long file, say) are cut at line ends into
    about 64 pieces: some can be held out then.

    Raises:
        FileNotFoundError: when nothing is there; UserError: when the files are of no known kind.
    """
    root = local_path(data)
    files = _data_files(root) if root.exists() else _matching(data)
    base = root if root.is_dir() else _common_folder(files)
    named = {path.relative_to(base).as_posix(): path for path in files}
    manifest = Manifest(root.name, {"recipe": RECIPE}, source_files(named, cache))
    if _is_saved_dataset(root):
        return manifest, lambda: cut_when_few(_saved_dataset(root))
    return manifest, lambda: cut_when_few(itertools.chain.from_iterable(_file(*entry) for entry in named.items()))


def chat_corpus(data: str, cache: Path | None = None) -> tuple[Manifest, Callable[[], Documents]]:
    """As `local_corpus`, of tables whose field "messages" holds a conversation; each document is one, as JSON.

    Raises:
        FileNotFoundError, UserError: as `local_corpus`, and for files of text.
    """
    manifest, _ = local_corpus(data, cache)
    root = local_path(data)
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
    files = [Path(name) for name in sorted(glob.glob(str(local_path(pattern)), recursive=True))]
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
        return iter([(name, _whole(name, path))])
    return _table(name, path, TEXT_FIELD, text_of)


def _table(name: str, path: Path, field: str, take: Take) -> Documents:
    if _suffix(path) == ".parquet":
        return ((where, take(row, where)) for where, row in numbered(_column(name, path, field), name))
    lines = numbered(_lines(path), name, 1)
    return ((where, take(_parsed(line, where), where)) for where, line in lines if line.strip())


def _whole(name: str, path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise UserError(f"{name} could not be read: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    # Bytes that are no UTF-8 come through as lone surrogates, so that the line which holds them can be named.
    how: Any = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    with _open_of(path)(path, "rt", **how) as stream:
        yield from stream


def _open_of(path: Path) -> Callable[..., IO[str]]:
    if path.suffix.lower() == ".gz":
        return gzip.open  # type: ignore[return-value]
    return require("zstandard", ".jsonl.zst files").open if path.suffix.lower() == ".zst" else open


def _parsed(line: str, where: str) -> Any:
    try:
        _refuse_surrogates(line, f"{where} is not UTF-8 text: convert it first")
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def text_of(row: Any, where: str) -> str:
    """The field "text" of a row; nothing where it is null. UserError where there is none, or what is no text."""
    if isinstance(row, dict) and row.get(TEXT_FIELD, "") is None:
        return ""
    if not isinstance(row, dict) or not isinstance(row.get(TEXT_FIELD), str):
        raise UserError(f"{where} has no text in the field {TEXT_FIELD!r} (found: {_found(row)})")
    _refuse_surrogates(row[TEXT_FIELD], f'{where}: the text holds half of a character, as in "\\ud83d"')
    return row[TEXT_FIELD]


def conversation_of(row: Any, where: str) -> str:
    """The row without what is no part of the conversation, as JSON: equal conversations are equal text.

    Nothing where the field is null, as in `text_of`. UserError where there is none, and for one without messages.
    """
    if isinstance(row, dict) and row.get(CHAT_FIELD, "") is None:
        return ""
    if not isinstance(row, dict) or not isinstance(row.get(CHAT_FIELD), list):
        raise UserError(f"{where} has no list in the field {CHAT_FIELD!r} (found: {_found(row)})")
    if not row[CHAT_FIELD]:
        raise UserError(f"{where} has no messages: its list in the field {CHAT_FIELD!r} is empty")
    kept = {name: row[name] for name in (CHAT_FIELD, "tools") if row.get(name)}
    words = f'{where}: a message holds half of a character, as in "\\ud83d"'
    _refuse_surrogates(json.dumps(kept, ensure_ascii=False), words)
    return json.dumps(kept, sort_keys=True)


def _refuse_surrogates(text: str, words: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(words) from error


def _found(row: Any) -> str:
    return (", ".join(row) if isinstance(row, dict) else type(row).__name__) or "nothing"


def _column(name: str, path: Path, field: str) -> Iterator[dict[str, Any]]:
    parquet = require("pyarrow.parquet", ".parquet files").ParquetFile(path)
    if field not in parquet.schema_arrow.names:
        raise UserError(f"{name} has no column {field!r} (found: {', '.join(parquet.schema_arrow.names)})")
    for batch in parquet.iter_batches(columns=[field]):
        yield from ({field: value} for value in batch.column(0).to_pylist())


def numbered(rows: Iterable[Any], name: str, first: int = 0) -> Iterator[tuple[str, Any]]:
    """Each row with its place, `name:number`.

    Raises:
        UserError: when the rows cannot be read further, with the place where they end.
    """
    number = first
    try:
        for row in rows:
            yield f"{name}:{number}", row
            number += 1
    except UserError:
        raise
    except Exception as error:  # of the disk, the compression, and every kind of table
        raise UserError(f"{name}:{number} could not be read: {error or type(error).__name__}") from error


def _is_saved_dataset(root: Path) -> bool:
    return any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(root: Path, take: Take = text_of) -> Documents:
    dataset = require("datasets", "Hugging Face datasets").load_from_disk(str(root))
    parts = dataset if isinstance(dataset, dict) else {root.name: dataset}
    for split, rows in parts.items():
        yield from rows_of(rows, take, split)


def rows_of(rows: Any, take: Take, name: str) -> Documents:
    """The documents of a dataset's rows, by its name and their numbers."""
    return ((where, take(row, where)) for where, row in numbered(rows, name))


def require(module: str, what: str) -> Any:
    """An optional package; MissingPackageError says what needs it and which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(f"{what} need the package {package}: {how_to_install('data')}") from error
