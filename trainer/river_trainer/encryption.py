"""Files that only their recipient can read, as the program age encrypts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyrage  # pyright: ignore[reportMissingTypeStubs]

from river_trainer.errors import InvalidTaskError

SUFFIX = ".age"

_age = cast("Any", pyrage)  # It has no types.


def encrypted(files: Mapping[str, bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """The files under their names and `.age`, each to be read with any of the recipients' X25519 keys.

    Raises:
        InvalidTaskError: a recipient is none.
    """
    keys = [recipient_key(recipient) for recipient in recipients]
    return {f"{name}{SUFFIX}": _age.encrypt(data, keys) for name, data in files.items()}


def recipient_key(recipient: str) -> object:
    """The public key that a text such as `age1…` stands for.

    Raises:
        InvalidTaskError: it stands for none.
    """
    try:
        return _age.x25519.Recipient.from_str(recipient)
    except _age.RecipientError:
        raise InvalidTaskError(
            f"{recipient[:100]!r} is no X25519 recipient of age; one begins with age1",
            param="age_recipients",
        ) from None
