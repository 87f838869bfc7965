"""The files of a checkpoint, wherever its location URL points: listed by its manifest, read in ranges, removed."""

from __future__ import annotations

import asyncio
import errno
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError

from river_client.wire import CheckpointFile
from river_engine.stores import open_store
from river_gateway.errors import (
    GatewayError,
    InvalidFieldError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from river_gateway.limits import FILE_CHUNK_BYTES
from river_trainer.errors import CorruptError, FullError, StoreError
from river_trainer.store import FileSets

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

_FULL = "the checkpoint store is full; try again when space has been made"
_RANGE = re.compile(r"bytes=(?P<first>\d*)-(?P<last>\d*)")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, end) of a file of `size_bytes`."""

    start: int
    end: int
    size_bytes: int

    @property
    def content_range(self) -> str:
        """As the header of that name says it."""
        return f"bytes {self.start}-{self.end - 1}/{self.size_bytes}"


def parse_range(header: str, size_bytes: int) -> ByteRange:
    """The one range of a Range header (RFC 9110, 14.1.2).

    Raises:
        InvalidFieldError: it is none, or begins past the end.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not (match["first"] or match["last"]):
        raise InvalidFieldError(f"Range: {header!r} is not one range of bytes", param="Range")
    if not match["first"]:
        start, end = max(size_bytes - int(match["last"]), 0), size_bytes
    else:
        start = int(match["first"])
        end = min(int(match["last"]) + 1, size_bytes) if match["last"] else size_bytes
    if not 0 <= start < end:
        raise InvalidFieldError(f"Range: {header!r} of a file of {size_bytes} bytes", param="Range")
    return ByteRange(start, end, size_bytes)


async def list_files(location: str) -> list[CheckpointFile]:
    """The files of a checkpoint as they were written, by name.

    Raises:
        NotFoundError: they are gone.
        UnavailableError: the store cannot be read.
    """
    root, folder = _split(location)

    def read() -> list[CheckpointFile]:
        manifest = FileSets(root, create=False).manifest(folder)
        if manifest is None:
            raise NotFoundError("the checkpoint's files are gone", param="path")
        return [
            CheckpointFile(name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
            for name, entry in sorted(manifest.files.items())
        ]

    with store_errors():
        return await asyncio.to_thread(read)


async def find_file(location: str, name: str) -> CheckpointFile:
    """One file of a location. Looked up in the listing, so that no name can lead anywhere else.

    Raises:
        NotFoundError: there is none of that name.
    """
    for file in await list_files(location):
        if file.name == name:
            return file
    raise NotFoundError(f"the checkpoint has no file {name!r}", param="name")


async def read_file(location: str, name: str, part: ByteRange) -> AsyncGenerator[bytes]:
    """The bytes of a part of a file, in chunks.

    Raises:
        UnavailableError: the store cannot be read, or the file ends early.
    """
    if part.start == part.end:
        return
    missing = part.end - part.start
    try:
        options = {"range": (part.start, part.end)}
        result = await open_store(location).get_async(name, options=options)  # pyright: ignore[reportArgumentType]
        async for chunk in result.stream(min_chunk_size=FILE_CHUNK_BYTES):
            missing -= len(chunk)
            yield bytes(chunk)
    except (BaseError, OSError, ValueError) as error:
        raise UnavailableError("the checkpoint store cannot be read; try again") from error
    if missing:
        raise UnavailableError("the checkpoint store cannot be read; try again")


async def remove_files(location: str) -> None:
    """Removes the files of a checkpoint; again is a no-op.

    Raises:
        UnavailableError: the store refused.
    """
    root, folder = _split(location)
    with store_errors():
        await asyncio.to_thread(lambda: FileSets(root, create=False).remove(folder))


def is_below(location: str, store_url: str | None) -> bool:
    """Whether files are in the configured store: only those are ours to remove."""
    return store_url is not None and location.startswith(store_url.rstrip("/") + "/")


@contextmanager
def store_errors() -> Generator[None]:
    """Turns what the store raises into what a client is told. Where things lie is for the log."""
    try:
        yield
    except FullError as error:
        raise StorageFullError(_FULL) from error
    except CorruptError as error:
        raise GatewayError("the checkpoint's files are damaged") from error
    except StoreError as error:
        raise UnavailableError("the checkpoint store cannot be read; try again") from error


@contextmanager
def disk_errors() -> Generator[None]:
    """Turns a disk that takes no more, where uploads are gathered, into what a client is told."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageFullError(_FULL) from error


def _split(location: str) -> tuple[str, str]:
    root, _, folder = location.rstrip("/").rpartition("/")
    return root, folder
