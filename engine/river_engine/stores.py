"""Object stores by URL. Imports nothing heavy; engine, trainer and gateway open theirs here.

What a URL cannot say comes from the environment: the standard variables of the store (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, …), or `RIVER_STORE_OPTIONS`, a JSON object of texts that
goes before them: `{"endpoint": "http://minio:9000", "region": "eu-1", "allow_http": "true"}`. Its keys are obstore's.
"""

from __future__ import annotations

import datetime as dt
import os

import msgspec
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from river_engine.limits import STORE_RETRIES_MAX, STORE_RETRY_TIMEOUT_S

OPTIONS_VARIABLE = "RIVER_STORE_OPTIONS"
_CLIENT_OPTIONS = frozenset(
    {"allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout"}
)


def open_store(url: str) -> ObjectStore:
    """The store below a URL; opening it does not ask whether it is there.

    Raises:
        ValueError: the URL or the options mean no store.
    """
    scheme = url.partition(":")[0]
    try:
        if scheme == "file":
            return from_url(url)
        config, client = _options()
        # Its overloads are of one store each, while here the URL says which.
        return from_url(  # pyright: ignore[reportCallIssue]
            url,
            config=config,  # pyright: ignore[reportArgumentType]
            # None and not {}: any given ones stand before those of the environment, `AWS_ALLOW_HTTP` for one.
            client_options=client or None,  # pyright: ignore[reportArgumentType]
            retry_config={
                "max_retries": STORE_RETRIES_MAX,
                "retry_timeout": dt.timedelta(seconds=STORE_RETRY_TIMEOUT_S),
            },
        )
    except BaseError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{scheme}: {reason}") from error


def check_store(url: str) -> str | None:
    """What is wrong with a store's URL or the options, in a line that names the variable; None if nothing."""
    try:
        if not url.startswith("file:"):
            open_store(url)
    except ValueError as error:
        message = str(error)
        return message if OPTIONS_VARIABLE in message else f"RIVER_STORE_URL={url}: {message}"
    return None


def _options() -> tuple[dict[str, str], dict[str, str]]:
    """The store's own options and those of its HTTP client."""
    text = os.environ.get(OPTIONS_VARIABLE) or "{}"
    try:
        options = msgspec.json.decode(text, type=dict[str, str])
    except msgspec.DecodeError as error:
        # The value may hold a secret and is not repeated.
        raise ValueError(f"{OPTIONS_VARIABLE} is not a JSON object of texts: {error}") from error
    client = {name: value for name, value in options.items() if name in _CLIENT_OPTIONS}
    return {name: options[name] for name in options.keys() - _CLIENT_OPTIONS}, client
