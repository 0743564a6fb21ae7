"""A zip archive, opened once and checked: no entry twice, a bounded number of them, and reads that are bounded whatever
an entry claims. What kind of archive it is, archive_readers.py says.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from coordinator.identify.tensors import unusable

MAX_ENTRIES = 400_000
_DAMAGED = "copy the file again, or write it again with the program that made it"


@dataclass(frozen=True, slots=True)
class Archive:
    """`leaves`: the names of the entries without the folder around them all, which torch and other tools put there."""

    file: BinaryIO
    size: int
    zip: zipfile.ZipFile
    entries: Mapping[str, zipfile.ZipInfo]
    leaves: frozenset[str]

    def read(self, name: str, limit_bytes: int) -> bytes:
        """The whole content of an entry. Raises SpecError when there is none, when it is larger or damaged."""
        entry = self.entries.get(name)
        if entry is None:
            raise unusable(f"the archive has no {name[:80]}", _DAMAGED)
        if entry.file_size > limit_bytes:
            raise unusable(f"{name[:80]} of {entry.file_size} bytes is over the limit of {limit_bytes}", _DAMAGED)
        try:
            with self.zip.open(entry) as part:
                return part.read(limit_bytes)
        except Exception as error:  # zipfile raises a dozen kinds for damaged members; all mean the same to the user
            if isinstance(error, MemoryError):
                raise
            raise unusable(f"{name[:80]} in the archive is damaged", _DAMAGED) from None

    def stored_bytes(self, name: str) -> int:
        """The size of an entry that lies in the file as it is. Raises SpecError when it is missing or packed."""
        entry = self.entries.get(name)
        if entry is None:
            raise unusable(f"{name[:80]!r} is missing from the archive", _DAMAGED)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise unusable(f"{name[:80]!r} is compressed or encrypted in the archive", _DAMAGED)
        if entry.header_offset + entry.file_size > self.size or entry.file_size != entry.compress_size:
            raise unusable(f"{name[:80]!r} lies outside the file", _DAMAGED)
        return entry.file_size


def open_archive(file: BinaryIO, size: int) -> Archive:
    """Raises SpecError for an archive that is damaged or lists an entry twice."""
    try:
        opened = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, UnicodeDecodeError):
        raise unusable("the zip archive is damaged or was cut short", _DAMAGED) from None
    listed = opened.infolist()
    entries = {entry.filename: entry for entry in listed}
    if len(listed) > MAX_ENTRIES or len(entries) != len(listed):
        raise unusable("the zip archive lists too many entries or one entry twice", _DAMAGED)
    leaves = frozenset(name.partition("/")[2] or name for name in entries)
    return Archive(file, size, opened, entries, leaves)
