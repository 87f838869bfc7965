"""The dashboard's scripts and styles, by names that change with their content, so that browsers may keep them."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from litestar import Response, get

from river_gateway.errors import NotFoundError

_FOLDER = Path(__file__).parent / "static"
_PREFIX = "/admin/static"
_DIGEST_CHARS = 12
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    data: bytes
    media_type: str
    digest: str


def _load() -> dict[str, _File]:
    files: dict[str, _File] = {}
    for path in sorted(_FOLDER.iterdir()):
        data = path.read_bytes()
        media_type = mimetypes.guess_type(path.name)[0] or "text/plain"
        digest = hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]
        files[path.name] = _File(path.name, data, media_type, digest)
    return files


_FILES = _load()


def static_url(name: str) -> str:
    """Where a file of the folder `static` is; it must be there."""
    return f"{_PREFIX}/{_FILES[name].digest}/{name}"


@get("/static/{digest:str}/{name:str}", include_in_schema=False)
async def get_static(digest: str, name: str) -> Response[bytes]:
    """A file; one of an older release is not found."""
    file = _FILES.get(name)
    if file is None or file.digest != digest:
        raise NotFoundError(f"there is no file {name!r}")
    return Response(file.data, media_type=file.media_type, headers={"cache-control": _FOREVER})
