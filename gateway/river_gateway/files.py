"""The files of a checkpoint, wherever its location URL points: listed, read in ranges, deleted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import from_url

from river_client.wire import CheckpointFile
from river_gateway.errors import InvalidFieldError, NotFoundError, UnavailableError
from river_gateway.limits import FILE_CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from obstore.store import ObjectStore

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
    """The files under a location, by name.

    Raises:
        UnavailableError: the store cannot be read.
    """
    files: list[CheckpointFile] = []
    try:
        async for batch in _store(location).list():  # pyright: ignore[reportUnknownMemberType] - its Arrow variant
            files += [CheckpointFile(name=item["path"], size_bytes=item["size"]) for item in batch]
    except (BaseError, OSError) as error:
        raise UnavailableError("the checkpoint store cannot be read; try again") from error
    return sorted(files, key=lambda file: file.name)


async def find_file(location: str, name: str) -> CheckpointFile:
    """One file of a location. Looked up in the listing, so that no name can lead anywhere else.

    Raises:
        NotFoundError: there is none of that name.
    """
    for file in await list_files(location):
        if file.name == name:
            return file
    raise NotFoundError(f"the checkpoint has no file {name!r}", param="name")


async def read_file(location: str, name: str, part: ByteRange) -> AsyncIterator[bytes]:
    """The bytes of a part of a file, in chunks."""
    if part.start == part.end:
        return
    result = await _store(location).get_async(name, options={"range": (part.start, part.end)})
    async for chunk in result.stream(min_chunk_size=FILE_CHUNK_BYTES):
        yield bytes(chunk)


async def delete_files(location: str) -> None:
    """Deletes everything under a location.

    Raises:
        UnavailableError: the store refused.
    """
    store = _store(location)
    names = [file.name for file in await list_files(location)]
    try:
        await store.delete_async(names)
    except (BaseError, OSError) as error:
        raise UnavailableError("the checkpoint store refused; try again") from error


def _store(location: str) -> ObjectStore:
    try:
        return from_url(location)
    except (BaseError, OSError, ValueError) as error:
        raise UnavailableError("the checkpoint store cannot be read; try again") from error
