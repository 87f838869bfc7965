"""Checkpoints as the dashboard shows them: a searchable list with what each costs to keep, and one."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from river_billing.prices import HOURS_PER_MONTH
from river_gateway.checkpoints.catalog import checkpoint_path, parse_path
from river_gateway.errors import NotFoundError
from river_trainer.protocol import policy_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from river_engine.protocol import EngineRecord
    from river_gateway.database import Database, Row

PAGE_CHECKPOINTS = 50
SEARCH_CHARS_MAX = 200
_BYTES_PER_KILOBYTE = 1000  # as storage is billed

_COLUMNS = """
select c.checkpoint_id, c.tenant_id, t.name as tenant, c.run_id, c.mode, c.name, c.base_model, c.step, c.size_bytes,
       c.created_at, c.expires_at, c.location,
       price.nano_usd_per_unit as storage_price
from checkpoint c join tenant t using (tenant_id) join run r on r.run_id = c.run_id
left join lateral price_in_force(c.base_model, r.context_length, 'storage', now()) as price on true
where c.deleted_at is null and (c.expires_at is null or c.expires_at > now())
  and ($1::text is null or c.tenant_id = $1)
"""
_LIST = f"""
{_COLUMNS}
  and ($2 = '' or strpos(lower(c.run_id || ' ' || c.name || ' ' || c.base_model), lower($2)) > 0)
  and ($3::timestamptz is null or (c.created_at, c.checkpoint_id) < ($3, $4))
order by c.created_at desc, c.checkpoint_id desc limit $5
"""
_ONE = f"{_COLUMNS} and c.run_id = $2 and c.mode = $3 and c.name = $4"


@dataclass(frozen=True, slots=True)
class ShownCheckpoint:
    """A live checkpoint; `storage_price` is nano-dollars for a kilobyte and hour, None where none is set."""

    checkpoint_id: str
    tenant_id: str
    tenant: str
    run_id: str
    mode: Literal["training", "inference"]
    name: str
    base_model: str
    step: int
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    location: str
    storage_price: Decimal | None

    @property
    def path(self) -> str:
        """What clients call it."""
        return checkpoint_path(self.run_id, self.mode, self.name)

    @property
    def policy_version(self) -> str:
        """What answers made with it carry."""
        return policy_version(self.run_id, self.step)

    @property
    def monthly_nano_usd(self) -> int:
        """What keeping it costs in 720 hours, before any discount."""
        kilobytes = Decimal(self.size_bytes) / _BYTES_PER_KILOBYTE
        return int(kilobytes * HOURS_PER_MONTH * (self.storage_price or 0))

    def loaded_on(self, engines: Sequence[EngineRecord]) -> list[str]:
        """The engines that hold its weights now."""
        names = {self.checkpoint_id, self.policy_version}
        return [engine.engine_id for engine in engines if names.intersection(engine.resident)]


async def list_checkpoints(
    database: Database,
    tenant_id: str | None,
    *,
    search: str = "",
    before: ShownCheckpoint | None = None,
) -> list[ShownCheckpoint]:
    """The newest whose run, name or base model contains `search`, at most `PAGE_CHECKPOINTS`, older than `before`."""
    rows = await database.fetch(
        _LIST,
        tenant_id,
        search[:SEARCH_CHARS_MAX],
        before.created_at if before else None,
        before.checkpoint_id if before else None,
        PAGE_CHECKPOINTS,
    )
    return [_checkpoint(row) for row in rows]


async def find_checkpoint(database: Database, tenant_id: str | None, path: str) -> ShownCheckpoint:
    """The one of a path.

    Raises:
        NotFoundError: there is none, or it is another tenant's.
    """
    parsed = parse_path(path)
    row = None
    if parsed is not None and parsed.name is not None:
        row = await database.fetchrow(_ONE, tenant_id, parsed.run_id, parsed.mode, parsed.name)
    if row is None:
        raise NotFoundError(f"there is no checkpoint {path!r}")
    return _checkpoint(row)


def _checkpoint(row: Row) -> ShownCheckpoint:
    return ShownCheckpoint(**row)
