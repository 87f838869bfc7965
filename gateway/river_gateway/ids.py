"""Identities made by the gateway."""

from __future__ import annotations

import os
import secrets
import time
import uuid

_TOKEN_BYTES = 10


def new_id(kind: str) -> str:
    """A fresh identity such as `run_9f86d081884c7d659a2f`."""
    return f"{kind}_{secrets.token_hex(_TOKEN_BYTES)}"


def idempotent_id(kind: str, tenant_id: str, key: str | None) -> str:
    """The identity of what a tenant asks for under an idempotency key: the same each time, or without a key fresh."""
    if key is None:
        return new_id(kind)
    digest = uuid.uuid5(uuid.NAMESPACE_URL, f"river:{kind}:{tenant_id}:{key}").bytes
    return f"{kind}_{digest[-_TOKEN_BYTES:].hex()}"


def seed_of(run_id: str) -> int:
    """The seed of a run whose client gave none: arbitrary, but the same when its creation is sent again."""
    return int(run_id.rpartition("_")[2], 16) % 2**31


def uuid7() -> str:
    """A version 7 UUID (RFC 9562): 48 bits of Unix milliseconds, the rest random but for version and variant."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (
        milliseconds << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    )
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def uuid7_time_s(identity: str) -> float:
    """When a version 7 UUID was made, in Unix seconds."""
    return int(identity[:8] + identity[9:13], 16) / 1000


def checkpoint_id(operation: str) -> str:
    """The identity of the checkpoint a save operation makes: the same however often it is submitted."""
    return f"ckpt_{uuid.uuid5(uuid.NAMESPACE_URL, f'river:checkpoint:{operation}').hex[:20]}"
