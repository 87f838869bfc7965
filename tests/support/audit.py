"""The audit log as its route tells it."""

from __future__ import annotations

from typing import Any

import msgspec
from support.gateway import Rig

from river_client.audit_wire import AuditEntry, AuditPage


async def audit_lines(rig: Rig, **asked: Any) -> list[AuditEntry]:
    """The lines that an admin is shown, the newest first."""
    answer = await rig.admin.get("/audit", **asked)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=AuditPage).entries
