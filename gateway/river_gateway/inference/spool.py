"""Usage on local disk while NATS is away: what is written here survives the gateway, and is delivered in order.

A spool is a folder of segments, each a file of records: the length and checksum of an event, then the event. A record
counts once it is synced to the disk; a torn one at the end of a segment, of a gateway that was killed while it wrote,
was never confirmed to anybody. A segment is removed once all of it is delivered. After a crash it is delivered again
from its beginning: the identity of an event makes that harmless.

Whoever works on a segment holds a lock on the file that ends with its process, so gateways may share a folder, and one
that is alive takes over what a dead one has left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from river_billing.events import UsageEvent
from river_gateway.limits import USAGE_SEGMENT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger("river.gateway")

SUFFIX = ".usage"
DAMAGED_SUFFIX = ".damaged"
_HEADER = struct.Struct("<II")  # bytes of the event, CRC-32 of them
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(UsageEvent)


@dataclass(slots=True)
class _Segment:
    """A file that is ours; `events` of it, from `read_bytes` on, are not delivered.

    In a damaged one an event is not what was written; those behind it cannot be found, and the file is kept.
    """

    path: Path
    file: int
    size_bytes: int
    events: int
    read_bytes: int = 0
    damaged: bool = False


class Spool:
    """What this gateway has in a folder. Its methods block, and may be called from any thread."""

    def __init__(self, directory: Path, *, size_max_bytes: int) -> None:
        self._directory = directory
        self._size_max_bytes = size_max_bytes
        self._segments: deque[_Segment] = deque()
        self._current: _Segment | None = None
        self._lock = threading.Lock()
        self._opened = 0
        self.full = False
        """Whether it has reached its size; what is appended all the same is kept."""
        self.waiting = 0
        """Events that are not delivered."""

    def open(self) -> None:
        """Makes the folder and takes over what nobody is working on.

        Raises:
            OSError: the folder cannot be used.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.adopt()

    def adopt(self) -> int:
        """Takes over the segments of gateways that are gone; returns how many events they hold."""
        with self._lock:
            ours = {segment.path for segment in self._segments}
            found = [
                segment
                for path in sorted(self._directory.glob(f"*{SUFFIX}"))
                if path not in ours and (segment := _take(path)) is not None
            ]
            # Older than anything of our own, but for what is being delivered already.
            self._segments.extendleft(reversed(found))
            self._count()
        return sum(segment.events for segment in found)

    def append(self, events: Sequence[UsageEvent]) -> None:
        """Writes events at the end; on return they are on the disk.

        Raises:
            OSError: they are not, and what was written of them will not be read.
        """
        records = bytearray()
        for event in events:
            payload = _encoder.encode(event)
            records += _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        with self._lock:
            segment = self._writable()
            try:
                _write(segment.file, records, segment.size_bytes)
                os.fdatasync(segment.file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(segment.file, segment.size_bytes)
                raise
            segment.size_bytes += len(records)
            segment.events += len(events)
            self._count()

    def head(self, count_max: int) -> list[UsageEvent]:
        """The oldest events that are not delivered."""
        with self._lock:
            while self._segments:
                segment = self._segments[0]
                events, _ = _read(segment, count_max)
                if events:
                    return events
                segment.damaged |= segment.events > 0
                self._remove(segment)
            return []

    def advance(self, count: int) -> None:
        """The oldest `count` events, which `head` has returned, are delivered."""
        with self._lock:
            segment = self._segments[0]
            events, size_bytes = _read(segment, count)
            assert len(events) == count
            segment.read_bytes += size_bytes
            segment.events -= count
            if segment.read_bytes == segment.size_bytes:
                self._remove(segment)
            self._count()

    def close(self) -> None:
        """Leaves what is not delivered to whoever is next."""
        with self._lock:
            for segment in self._segments:
                os.close(segment.file)
            self._segments.clear()
            self._current = None
            self._count()

    def _writable(self) -> _Segment:
        if self._current is None or self._current.size_bytes >= USAGE_SEGMENT_BYTES:
            self._opened += 1
            name = f"{time.time_ns():020d}-{os.getpid()}-{self._opened}{SUFFIX}"
            path = self._directory / name
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sync_directory()
            self._current = _Segment(path, file, 0, 0)
            self._segments.append(self._current)
        return self._current

    def _remove(self, segment: _Segment) -> None:
        self._segments.remove(segment)
        if segment is self._current:
            self._current = None
        if segment.damaged:
            logger.error("%s is damaged and set aside", segment.path)
            segment.path.rename(segment.path.with_suffix(DAMAGED_SUFFIX))
        else:
            segment.path.unlink(missing_ok=True)
        os.close(segment.file)
        self._count()

    def _count(self) -> None:
        self.waiting = sum(segment.events for segment in self._segments)
        self.full = sum(segment.size_bytes for segment in self._segments) >= self._size_max_bytes

    def _sync_directory(self) -> None:
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _take(path: Path) -> _Segment | None:
    """A segment that nobody else has, without the torn record that it may end with."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    # Whoever had it may have delivered and removed it just before we had the lock.
    if os.fstat(file).st_nlink == 0:
        os.close(file)
        return None
    segment = _Segment(path, file, os.fstat(file).st_size, 0)
    events, whole_bytes = _read(segment, None)
    segment.damaged = _is_whole(segment, whole_bytes)
    segment.size_bytes, segment.events = whole_bytes, len(events)
    return segment


def _is_whole(segment: _Segment, at: int) -> bool:
    """Whether there are all bytes of a record, as there are not where a writer was killed."""
    header = os.pread(segment.file, _HEADER.size, at)
    return len(header) == _HEADER.size and (
        at + _HEADER.size + _HEADER.unpack(header)[0] <= segment.size_bytes
    )


def _read(segment: _Segment, count_max: int | None) -> tuple[list[UsageEvent], int]:
    """Whole events from where the segment is read to, and how many bytes they take."""
    data = os.pread(segment.file, segment.size_bytes - segment.read_bytes, segment.read_bytes)
    events: list[UsageEvent] = []
    at = 0
    while (count_max is None or len(events) < count_max) and at + _HEADER.size <= len(data):
        size, checksum = _HEADER.unpack_from(data, at)
        payload = data[at + _HEADER.size : at + _HEADER.size + size]
        if len(payload) < size or zlib.crc32(payload) != checksum:
            break
        try:
            events.append(_decoder.decode(payload))
        except msgspec.DecodeError:  # Whole, but of a release that writes others.
            break
        at += _HEADER.size + size
    return events, at


def _write(file: int, data: bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
