"""The two ways of keeping sets of files: directories, which can be renamed, and object stores, which cannot.

Neither knows what a manifest says, only that it is the file that makes a set complete. What goes wrong is raised as it
comes, an `OSError` or obstore's `BaseError`; `FileSets` says what it means.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.exceptions import NotFoundError as ObjectNotFoundError
from obstore.store import ObjectStore

from river_trainer import limits
from river_trainer.errors import StoreError

FileData = bytes | bytearray | memoryview | Path
"""What is in a file: a buffer, or the path of a local file with the same bytes."""

MANIFEST_FILE = "manifest.json"
_UNFINISHED = ".unfinished"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MISSING = (ObjectNotFoundError, FileNotFoundError)


class Backend(Protocol):
    """What `FileSets` needs. Thread-safe."""

    def write(self, folder: str, files: Mapping[str, FileData], manifest: bytes) -> None:
        """Stores a set in place of whatever is there."""
        ...

    def get(self, folder: str, name: str) -> bytes | None:
        """A file, None if there is none."""
        ...

    def exists(self, folder: str) -> bool:
        """Whether there is a manifest."""
        ...

    def folders(self, prefix: str) -> list[str]:
        """The folders directly under `prefix`."""
        ...

    def remove(self, folder: str) -> None:
        """Removes a set, if it is there."""
        ...


class Directory:
    """Sets below a local directory.

    A set is gathered, and put on the disk for good, under `.unfinished` and then renamed to where it belongs.
    """

    def __init__(self, root: Path, *, create: bool) -> None:
        self._root = root
        self._must_exist = create
        if create:
            root.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()

    def write(self, folder: str, files: Mapping[str, FileData], manifest: bytes) -> None:
        """As `Backend`; atomic, also when a set is replaced."""
        unfinished = self._unfinished()
        try:
            unfinished.mkdir(parents=True)
            for name, data in (*files.items(), (MANIFEST_FILE, manifest)):
                _write_synced(unfinished / name, data)
            _sync_directory(unfinished)
            self._put_in_place(unfinished, self._root / folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def get(self, folder: str, name: str) -> bytes | None:
        """As `Backend`."""
        try:
            return (self._root / folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None

    def exists(self, folder: str) -> bool:
        """As `Backend`."""
        try:
            (self._root / folder / MANIFEST_FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return False
        return True

    def folders(self, prefix: str) -> list[str]:
        """As `Backend`."""
        try:
            with os.scandir(self._root / prefix) as entries:
                return [
                    entry.name
                    for entry in entries
                    if entry.is_dir() and not entry.name.startswith(".")
                ]
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []

    def remove(self, folder: str) -> None:
        """As `Backend`; atomic."""
        leaving = self._unfinished()
        leaving.parent.mkdir(exist_ok=True)
        try:
            (self._root / folder).rename(leaving)
        except FileNotFoundError:
            self._check_root()
            return
        shutil.rmtree(leaving)

    def _put_in_place(self, new: Path, target: Path) -> None:
        """Renames; what was at `target` is at `new` afterwards."""
        _make_directories(target.parent)
        try:
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(new, target)
        _sync_directory(target.parent)

    def _unfinished(self) -> Path:
        return self._root / _UNFINISHED / uuid.uuid4().hex

    def _clear_unfinished(self) -> None:
        """Removes what killed processes left; others may be at work in the same store now."""
        oldest = time.time() - limits.STORE_UNFINISHED_MAX_AGE_S
        for path in (self._root / _UNFINISHED).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path, ignore_errors=True)

    def _check_root(self) -> None:
        """A disk that is not mounted must not look like a store that has nothing."""
        if self._must_exist and not self._root.is_dir():
            raise StoreError(f"the store's directory {self._root} is not there")


class Objects:
    """Sets in an object store. An object appears whole; a set does when its manifest does."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def write(self, folder: str, files: Mapping[str, FileData], manifest: bytes) -> None:
        """As `Backend`; a set that was there is away until the new one is complete."""
        self._delete(f"{folder}/{MANIFEST_FILE}")
        for name, data in (*files.items(), (MANIFEST_FILE, manifest)):
            obstore.put(self._store, f"{folder}/{name}", data)

    def get(self, folder: str, name: str) -> bytes | None:
        """As `Backend`."""
        try:
            return bytes(obstore.get(self._store, f"{folder}/{name}").bytes())
        except _MISSING as error:
            if _is_missing_bucket(error):
                raise
            return None

    def exists(self, folder: str) -> bool:
        """As `Backend`."""
        # Not by HEAD, whose answer cannot tell a missing object from a missing bucket.
        page = obstore.list_with_delimiter(self._store, folder)
        return any(item["path"].endswith(f"/{MANIFEST_FILE}") for item in page["objects"])

    def folders(self, prefix: str) -> list[str]:
        """As `Backend`."""
        page = obstore.list_with_delimiter(self._store, prefix)
        return [path.rstrip("/").rpartition("/")[2] for path in page["common_prefixes"]]

    def remove(self, folder: str) -> None:
        """As `Backend`; the manifest goes first."""
        self._delete(f"{folder}/{MANIFEST_FILE}")
        for page in obstore.list(self._store, folder):
            for item in page:
                self._delete(item["path"])

    def _delete(self, path: str) -> None:
        try:
            obstore.delete(self._store, path)
        except _MISSING as error:
            if _is_missing_bucket(error):
                raise


def _is_missing_bucket(error: BaseError | OSError) -> bool:
    """A bucket that is not there must not look like a store that has nothing."""
    return "NoSuchBucket" in str(error)


def _write_synced(path: Path, data: FileData) -> None:
    with path.open("xb") as file:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, file, limits.STORE_CHUNK_BYTES)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_directories(path: Path) -> None:
    """Makes a directory and those above it, so that a crash of the machine forgets none."""
    if path.is_dir():
        return
    _make_directories(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two directories: in one step where the system can, else with `other` away for a moment."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        rename = None
    paths = os.fsencode(one), os.fsencode(other)
    if rename and not rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        return
    aside = one.with_name(uuid.uuid4().hex)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
