"""Whether a zip archive is as it was written, which ``torch.load`` and ``numpy.load`` do not check.

A digest of the whole file is the comment at its end. The checksums that an archive has of itself do
not cover its directory, which two readers may understand in two ways when a bit of it is wrong.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

#: Begins the comment; the digest follows as hexadecimal text.
_MARK = b"mclfast blake2b "
_COMMENT = len(_MARK) + 32
#: The record that ends an archive; its last two bytes are the length of the comment after it.
_END, _END_SIZE = b"PK\x05\x06", 22
#: Attribute of a member that is a folder.
_FOLDER = 0x10
#: Bytes that are read at a time, so that a member never lies in memory whole.
_BLOCK = 2**20


def seal(path: Path) -> None:
    """Adds the digest to an archive without a comment.

    Args:
        path: file that is complete and that no one reads yet.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT.to_bytes(2, "little"))
        size = file.tell()
        file.write(_MARK + _digest(file, size))


def damage_of(path: Path) -> str | None:
    """The fault of an archive whose members are stored as they are.

    One with a digest is compared with it; for an older one, the checksums of its members are.
    Members that are compressed, or together larger than the file, are refused before they are
    read: a small file would fill the memory.

    Args:
        path: file to read.

    Returns:
        The fault in words, None for an intact file.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _damage(file)
        # A damaged directory may ask for anything: a password, a place before the beginning. A
        # bad place of the disk is an OSError.
        except Exception as error:
            return str(error) or type(error).__name__


def _damage(file: BinaryIO) -> str | None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return "an empty file"
    sealed = _ends_with_record(file, size, _COMMENT)
    if sealed:
        file.seek(size - _COMMENT)
        found = file.read(_COMMENT)
        if found != _MARK + _digest(file, size - _COMMENT):
            return "other content than its digest says"
    elif not _ends_with_record(file, size, 0):
        return "no end of an archive"
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.compress_size != member.file_size:
                return f"a compressed member {member.filename!r}"
            # PyTorch takes a member of this kind for empty, and gives memory that no one wrote.
            if member.is_dir() or member.external_attr & _FOLDER:
                return f"a folder {member.filename!r} among the members"
        if sum(member.file_size for member in members) > size:
            return "members larger than the file"
        for member in [] if sealed else members:
            with archive.open(member) as stream:
                while stream.read(_BLOCK):
                    pass
    return None


def _ends_with_record(file: BinaryIO, size: int, comment: int) -> bool:
    """Whether the record that ends an archive is followed by a comment of that size only."""
    start = size - comment - _END_SIZE
    if start < 0:
        return False
    file.seek(start)
    record = file.read(_END_SIZE)
    return record.startswith(_END) and record[-2:] == comment.to_bytes(2, "little")


def _digest(file: BinaryIO, size: int) -> bytes:
    """Digest of the first bytes of a file as hexadecimal text."""
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    while size and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    file.seek(0, os.SEEK_END)
    return digest.hexdigest().encode()
