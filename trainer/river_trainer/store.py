"""Sets of files in the checkpoint store: a directory, S3, GCS or Azure, through obstore.

A set is a folder whose manifest is written last: a folder without one does not exist. Storing a set again under the
same name takes the manifest away first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from river_trainer.errors import StoreError

MANIFEST_FILE = "manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a set of files holds: the size of each in bytes, and facts of whoever wrote it."""

    files: dict[str, int]
    facts: dict[str, int | float | str | bool | None]


class FileSets:
    """The sets below one URL. Blocking; for worker threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store = _open(url)

    def location(self, folder: str) -> str:
        """The URL of a set."""
        return f"{self.url}/{folder}"

    def write(
        self,
        folder: str,
        files: Mapping[str, bytes],
        facts: Mapping[str, int | float | str | bool | None],
    ) -> int:
        """Stores a set; returns its size in bytes. Until the end nobody sees any of it.

        Raises:
            StoreError: the store did not take it; nothing can be seen.
        """
        assert MANIFEST_FILE not in files
        manifest = Manifest(
            files={name: len(data) for name, data in files.items()}, facts=dict(facts)
        )
        try:
            self._delete(f"{folder}/{MANIFEST_FILE}")
            for name, data in files.items():
                obstore.put(self._store, f"{folder}/{name}", data)
            obstore.put(self._store, f"{folder}/{MANIFEST_FILE}", msgspec.json.encode(manifest))
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot store {folder}: {error}") from error
        return sum(manifest.files.values())

    def read(self, folder: str) -> tuple[Manifest, dict[str, bytes]] | None:
        """The set in `folder`, None if there is none.

        Raises:
            StoreError: the store does not give it, or what it gives is not what was written.
        """
        try:
            manifest = msgspec.json.decode(self._get(f"{folder}/{MANIFEST_FILE}"), type=Manifest)
            files = {name: self._get(f"{folder}/{name}") for name in manifest.files}
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError, msgspec.DecodeError) as error:
            raise StoreError(f"cannot read {folder}: {error}") from error
        for name, size in manifest.files.items():
            if len(files[name]) != size:
                raise StoreError(f"{folder}/{name} has {len(files[name])} bytes instead of {size}")
        return manifest, files

    def exists(self, folder: str) -> bool:
        """Whether there is a complete set in `folder`.

        Raises:
            StoreError: the store does not say.
        """
        try:
            obstore.head(self._store, f"{folder}/{MANIFEST_FILE}")
        except (NotFoundError, FileNotFoundError):
            return False
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot look for {folder}: {error}") from error
        return True

    def folders(self, prefix: str) -> list[str]:
        """The folders directly under `prefix`, complete or not."""
        try:
            found = obstore.list_with_delimiter(self._store, prefix)
        except (NotFoundError, FileNotFoundError):
            return []
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot list {prefix}: {error}") from error
        return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def remove(self, folder: str) -> None:
        """Removes a set, its manifest first; one that is not there is fine.

        Raises:
            StoreError: the store refuses.
        """
        try:
            self._delete(f"{folder}/{MANIFEST_FILE}")
            for page in obstore.list(self._store, folder):
                for item in page:
                    self._delete(item["path"])
        except (BaseError, OSError) as error:
            raise StoreError(f"cannot remove {folder}: {error}") from error

    def _get(self, path: str) -> bytes:
        return bytes(obstore.get(self._store, path).bytes())

    def _delete(self, path: str) -> None:
        with contextlib.suppress(NotFoundError, FileNotFoundError):
            obstore.delete(self._store, path)


def read_location(location: str) -> tuple[Manifest, dict[str, bytes]] | None:
    """The set at a whole URL, None if there is none.

    Raises:
        StoreError: the store does not give it.
    """
    parent, _, folder = location.rstrip("/").rpartition("/")
    return FileSets(parent).read(folder)


def _open(url: str) -> ObjectStore:
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            # Where nothing is stored yet there is no directory, and reading from it finds nothing.
            return LocalStore(Path(unquote(parts.path)), mkdir=True)
        return from_url(url)
    except (BaseError, OSError, ValueError) as error:
        raise StoreError(f"cannot open the store {url}: {error}") from error
