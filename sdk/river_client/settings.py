"""Which server, and which key: arguments first, then `RIVER_*` variables, then what `river login` stored."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from river_client.exceptions import AuthenticationError

DEFAULT_BASE_URL = "http://127.0.0.1:8700"
KEY_VARIABLE = "RIVER_API_KEY"
URL_VARIABLE = "RIVER_BASE_URL"


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """A server, and the key for it."""

    api_key: str
    base_url: str


def resolve_login(api_key: str | None, base_url: str | None) -> Login:
    """The server and key to use.

    A stored key is sent to no server but the one it was stored for.

    Raises:
        AuthenticationError: there is no key anywhere.
    """
    stored = load_login()
    url = base_url or os.environ.get(URL_VARIABLE) or (stored.base_url if stored else None)
    url = (url or DEFAULT_BASE_URL).rstrip("/")
    key = api_key or os.environ.get(KEY_VARIABLE)
    if key is None and stored is not None and stored.base_url == url:
        key = stored.api_key
    if not key:
        raise AuthenticationError(
            f"no API key for {url}: pass api_key=, set {KEY_VARIABLE}, or run `river login`"
        )
    return Login(api_key=key, base_url=url)


def login_path() -> Path:
    """Where `river login` stores."""
    root = os.environ.get("XDG_CONFIG_HOME")
    return (Path(root) if root else Path.home() / ".config") / "river" / "login.json"


def load_login() -> Login | None:
    """What `river login` stored, or None."""
    try:
        return msgspec.json.decode(login_path().read_bytes(), type=Login)
    except (OSError, RuntimeError, msgspec.DecodeError):
        return None  # Nothing stored, no home directory, or not ours.


def save_login(login: Login) -> Path:
    """Stores a login for this user alone; returns the file."""
    path = login_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made with its final permissions: the key is never readable for others, not even for a moment.
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(login))
    fresh.replace(path)
    return path
