"""Sets of files in the checkpoint store: a directory, S3, GCS or Azure, through obstore.

A set is a folder with a manifest, which is written last and holds the SHA-256 of every file: a folder without one does
not exist. Every read is checked against it. Three ways of not getting a set are told apart:

* it is not there: None;
* it is there but not as it was written: `CorruptError`, which no waiting will mend;
* the store does not say: any other `StoreError`, which is worth asking again.

In a directory a set appears, is replaced and goes away whole, by renaming. In an object store, which cannot rename, the
manifest goes first and comes last; a set that is replaced by another one is away in between. Storing the same files
again changes nothing.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
from obstore.exceptions import BaseError

from river_engine.stores import open_store
from river_trainer import limits
from river_trainer.errors import CorruptError, FullError, StoreError
from river_trainer.store_backends import (
    MANIFEST_FILE,
    Backend,
    Directory,
    FileData,
    Objects,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Facts = Mapping[str, int | float | str | bool | None]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a file must be."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of files holds, and facts of whoever wrote it."""

    files: dict[str, FileEntry]
    facts: dict[str, int | float | str | bool | None]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(entry.size_bytes for entry in self.files.values())


class FileSets:
    """The sets below one URL. Blocking, and usable from several threads at once: it keeps no state of its own."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        """Opens the store; `create` makes the directory of a `file://` URL, which has to be there from then on.

        Raises:
            StoreError: the URL means no store, or the directory cannot be made.
        """
        self.url = url.rstrip("/")
        self._backend = _open(self.url, create=create)

    def location(self, folder: str) -> str:
        """The URL of a set."""
        return f"{self.url}/{folder}"

    def write(self, folder: str, files: Mapping[str, FileData], facts: Facts) -> int:
        """Stores a set; returns its size in bytes. It can be read when this returns and, if new, not a moment before.

        The files are streamed from where they are: buffers are not copied, paths are not read into memory.

        Raises:
            FullError: there is no room for it.
            StoreError: the store did not take it; in any case nothing half-written can be read.
        """
        assert MANIFEST_FILE not in files
        assert not any("/" in name for name in files), "a set is one folder"
        with _telling(f"cannot store {folder}"):
            entries = {name: _entry(data) for name, data in files.items()}
            manifest = Manifest(files=entries, facts=dict(facts))
            if not self._holds(folder, manifest):
                self._backend.write(folder, files, msgspec.json.encode(manifest))
        return manifest.size_bytes

    def read(self, folder: str) -> tuple[Manifest, dict[str, bytes]] | None:
        """The set in `folder`, None if there is none.

        Raises:
            CorruptError: a file is not what was written.
            StoreError: the store does not give it.
        """
        with _telling(f"cannot read {folder}"):
            for _ in range(limits.STORE_READ_ATTEMPTS_MAX):
                encoded = self._backend.get(folder, MANIFEST_FILE)
                if encoded is None:
                    return None
                manifest = _decode(folder, encoded)
                files: dict[str, bytes] = {}
                wrong = None
                for name in manifest.files:
                    data = self._backend.get(folder, name)
                    wrong = _difference(data, manifest.files[name])
                    if wrong is not None or data is None:
                        wrong = f"{folder}/{name} {wrong}"
                        break
                    files[name] = data
                if wrong is None:
                    return manifest, files
                # Somebody may have removed or replaced the set while it was being read.
                if self._backend.get(folder, MANIFEST_FILE) == encoded:
                    raise CorruptError(wrong)
        raise StoreError(f"cannot read {folder}: it changes all the time")

    def manifest(self, folder: str) -> Manifest | None:
        """What the set in `folder` says that it holds, None if there is none.

        Raises:
            CorruptError: it says nothing that can be read.
            StoreError: the store does not give it.
        """
        with _telling(f"cannot read {folder}"):
            encoded = self._backend.get(folder, MANIFEST_FILE)
            return None if encoded is None else _decode(folder, encoded)

    def exists(self, folder: str) -> bool:
        """Whether there is a complete set in `folder`.

        Raises:
            StoreError: the store does not say.
        """
        with _telling(f"cannot look for {folder}"):
            return self._backend.exists(folder)

    def folders(self, prefix: str) -> list[str]:
        """The folders directly under `prefix`, complete or not.

        Raises:
            StoreError: the store does not say.
        """
        with _telling(f"cannot list {prefix}"):
            return self._backend.folders(prefix)

    def remove(self, folder: str) -> None:
        """Removes a set, which from the first moment on cannot be read; one that is not there is fine.

        Raises:
            StoreError: the store refuses.
        """
        with _telling(f"cannot remove {folder}"):
            self._backend.remove(folder)

    def _holds(self, folder: str, manifest: Manifest) -> bool:
        """Whether exactly this set is stored already, every byte of it."""
        encoded = self._backend.get(folder, MANIFEST_FILE)
        if encoded is None or encoded != msgspec.json.encode(manifest):
            return False
        return all(
            _difference(self._backend.get(folder, name), entry) is None
            for name, entry in manifest.files.items()
        )


def read_location(location: str) -> tuple[Manifest, dict[str, bytes]] | None:
    """The set at a whole URL, None if there is none.

    Raises:
        CorruptError: a file is not what was written.
        StoreError: the store does not give it.
    """
    parent, _, folder = location.rstrip("/").rpartition("/")
    return FileSets(parent, create=False).read(folder)


def _open(url: str, *, create: bool) -> Backend:
    parts = urlsplit(url)
    with _telling(f"cannot open the store {url}"):
        if parts.scheme == "file":
            return Directory(Path(unquote(parts.path)), create=create)
        try:
            return Objects(open_store(url))
        except ValueError as error:
            raise StoreError(f"cannot open the store {url}: {error}") from error


@contextmanager
def _telling(what_failed: str) -> Generator[None]:
    """Turns what a store raises into a `StoreError` of one line."""
    try:
        yield
    except (BaseError, OSError) as error:
        # The first line says it; a server's whole answer may follow.
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        is_full = isinstance(error, OSError) and error.errno in _FULL
        kind = FullError if is_full else StoreError
        raise kind(f"{what_failed}: {reason}") from error


def _entry(data: FileData) -> FileEntry:
    if isinstance(data, Path):
        with data.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        return FileEntry(size_bytes=data.stat().st_size, sha256=digest.hexdigest())
    view = memoryview(data)
    return FileEntry(size_bytes=view.nbytes, sha256=hashlib.sha256(view).hexdigest())


def _difference(data: bytes | None, entry: FileEntry) -> str | None:
    """What is wrong with a file, None if nothing."""
    if data is None:
        return "is missing from its set"
    if len(data) != entry.size_bytes:
        return f"has {len(data)} bytes instead of {entry.size_bytes}"
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return "has other bytes than were written"
    return None


def _decode(folder: str, encoded: bytes) -> Manifest:
    try:
        return msgspec.json.decode(encoded, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{folder}/{MANIFEST_FILE} cannot be read: {error}") from error
