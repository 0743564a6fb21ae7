"""Rows of a file or a folder: what it is by name and by contents, and the shards of a folder joined in name order."""

from __future__ import annotations

from pathlib import Path

import blake3

from protos.artifact import digest_file
from strategies.data.arrays import ArrayRows
from strategies.data.chunks import ChunkCache, ChunkRows
from strategies.data.class_folder import ClassFolderRows
from strategies.data.csv_table import CsvFile
from strategies.data.jsonl_table import JsonlFile
from strategies.data.npz import read_npz
from strategies.data.rows import ConcatenatedRows, Fields, Rows
from strategies.data.source import FORMATS, SUFFIXES, SourceKind, unusable
from strategies.data.text import TextRows, corpus_of

_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"PAR1", "a parquet file"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"(\xb5/\xfd", "compressed with zstd"),
    (b"\x93NUMPY", "a single numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"%PDF", "a PDF document"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_CORPUS_SUFFIXES = (".txt", ".text", ".md", ".py")
_PEEK_BYTES = 4096


def load(path: Path, where: str, kind: SourceKind, fields: Fields) -> Rows:
    """Rows of what lies at `path`; `where` is what the user called it. Raises SpecError."""
    if path.is_dir():
        return _folder(path, where, fields)
    if not path.is_file():
        raise unusable(f"data file {where} does not exist", "correct the path; it is relative to the job file")
    return _file(path, where, kind, fields, ChunkCache())


def digest_of(path: Path) -> str:
    """Of a file's content, or of the names and contents of a folder's files."""
    if path.is_file():
        return digest_file(path)
    hasher = blake3.blake3()
    for file in sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.as_posix()):
        hasher.update(f"{file.relative_to(path).as_posix()}\0{digest_file(file)}\n".encode())
    return hasher.hexdigest()


def _file(path: Path, where: str, kind: SourceKind, fields: Fields, cache: ChunkCache) -> Rows:
    kind = _looked_at(path, where, kind)
    if kind is not SourceKind.TEXT and fields.sequence_length is not None:
        raise unusable(f"data.sequence_length is for text, and {where} is {kind}", "remove it")
    match kind:
        case SourceKind.NPZ:
            return ArrayRows(where, read_npz(path, where), fields)
        case SourceKind.CSV:
            return ChunkRows(CsvFile(path, where, fields), cache)
        case SourceKind.JSONL:
            return ChunkRows(JsonlFile(path, where, fields), cache)
        case SourceKind.PARQUET:
            from strategies.data.parquet_table import ParquetFile

            return ChunkRows(ParquetFile(path, where, fields), cache)
        case _:
            return _text([path], where, fields)


def _looked_at(path: Path, where: str, kind: SourceKind) -> SourceKind:
    """The kind by contents, once they agree with the name."""
    with path.open("rb") as file:
        head = file.read(_PEEK_BYTES)
    found = next((what for magic, what in _MAGIC if head.startswith(magic)), None)
    by_magic = {"a zip archive": SourceKind.NPZ, "a parquet file": SourceKind.PARQUET}.get(found or "")
    if not head:
        raise unusable(f"data file {where} is empty", "was it written and copied as a whole?")
    if kind is SourceKind.PATH:
        if by_magic is None:
            what = found or "not recognised"
            raise unusable(f"data file {where} is {what}", f"data are {FORMATS}; name the file by its format")
        return by_magic
    if kind in (SourceKind.NPZ, SourceKind.PARQUET):
        if by_magic is not kind:
            raise unusable(
                f"data file {where} is not {kind}: it is {found or 'something else'}", "name it by its format"
            )
    elif kind is not SourceKind.TEXT and (found is not None or b"\0" in head):
        raise unusable(
            f"data file {where} is not {kind}: it is {found or 'binary'}",
            "unpack or convert it, or name it by its format",
        )
    return kind


def _folder(path: Path, where: str, fields: Fields) -> Rows:
    entries = sorted((entry for entry in path.iterdir() if not entry.name.startswith(".")), key=lambda one: one.name)
    files = [entry for entry in entries if entry.is_file()]
    shards = [file for file in files if SUFFIXES.get(file.suffix.lower(), SourceKind.TEXT) is not SourceKind.TEXT]
    if shards:
        kinds = {SUFFIXES[file.suffix.lower()] for file in shards}
        if len(kinds) > 1:
            raise unusable(f"{where} holds {' and '.join(sorted(kinds))} files", "keep the shards of one format in it")
        return _shards(shards, where, kinds.pop(), fields)
    classes = {
        entry.name: sorted((file for file in entry.glob("*.npy") if file.is_file()), key=lambda file: file.name)
        for entry in entries
        if entry.is_dir()
    }
    classes = {name: arrays for name, arrays in classes.items() if arrays}
    if classes:
        if fields.features is not None or fields.target is not None:
            raise unusable(f"{where} has one folder per class and no columns", "remove data.features and data.target")
        if fields.sequence_length is not None:
            raise unusable(f"data.sequence_length is for text, and {where} holds arrays", "remove it")
        return ClassFolderRows(where, classes)
    texts = [file for file in path.rglob("*") if file.suffix.lower() in _CORPUS_SUFFIXES and file.is_file()]
    if texts:
        return _text(sorted(texts, key=lambda file: file.relative_to(path).as_posix()), where, fields)
    raise unusable(
        f"data folder {where} holds no data", "put npz, csv, parquet, jsonl, text or CLASS/*.npy files in it"
    )


def _shards(paths: list[Path], where: str, kind: SourceKind, fields: Fields) -> Rows:
    cache = ChunkCache()
    names = [f"{where}/{path.name}" for path in paths]
    first = _file(paths[0], names[0], kind, fields, cache)
    others = [_file(path, name, kind, first.fields, cache) for path, name in zip(paths[1:], names[1:], strict=True)]
    return ConcatenatedRows([first, *others], names) if others else first


def _text(paths: list[Path], where: str, fields: Fields) -> Rows:
    if fields.features is not None or fields.target is not None:
        raise unusable(f"{where} is text and has no columns to choose", "remove data.features and data.target")
    return TextRows(where, corpus_of(paths), fields.sequence_length)
