"""Applies the numbered SQL files of `migrations/`, in order, each once, under an advisory lock."""

from __future__ import annotations

from pathlib import Path

import asyncpg

from river_ops.limits import MIGRATION_LOCK_ID

MIGRATIONS = Path(__file__).parent / "migrations"

_CREATE_LEDGER = """
create table if not exists schema_migration (
  number     integer primary key,
  name       text not null,
  applied_at timestamptz not null default now()
)
"""


async def migrate(postgres_url: str, directory: Path = MIGRATIONS) -> list[str]:
    """Brings the database up to date; returns the names of the files applied now.

    Several callers at once are safe: the lock lets one work and the others then find nothing to do.
    """
    connection = await asyncpg.connect(postgres_url)
    try:
        # A session lock, because each file commits in a transaction of its own.
        await connection.execute("select pg_advisory_lock($1)", MIGRATION_LOCK_ID)
        await connection.execute(_CREATE_LEDGER)
        rows = await connection.fetch("select number from schema_migration")
        done = {row["number"] for row in rows}
        applied: list[str] = []
        for number, path in numbered(directory):
            if number in done:
                continue
            async with connection.transaction():
                await connection.execute(path.read_text())
                await connection.execute(
                    "insert into schema_migration (number, name) values ($1, $2)", number, path.name
                )
            applied.append(path.name)
        return applied
    finally:
        await connection.close()


def numbered(directory: Path) -> list[tuple[int, Path]]:
    """The migration files by number.

    Raises:
        ValueError: two files share a number.
    """
    files = sorted((int(path.name.split("_", 1)[0]), path) for path in directory.glob("*.sql"))
    numbers = [number for number, _ in files]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two migrations in {directory.name} share a number: {numbers}")
    return files
