"""The embedded servers and the migrations, on the real programs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import nats
import pytest

from river_ops.embedded.nats import EmbeddedNats
from river_ops.embedded.postgres import EmbeddedPostgres
from river_ops.migrate import MIGRATIONS, migrate, numbered

DISCOUNTS = 20
"""The number of the migration that gives events a column, those of detached months too."""


async def _value(url: str, statement: str, **settings: str) -> object:
    connection = await asyncpg.connect(url, server_settings=settings)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def test_postgres_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    """A second start of the same directory finds what the first one wrote."""
    for turn in range(2):
        server = EmbeddedPostgres(tmp_path)
        server.start()
        try:
            if turn == 0:
                asyncio.run(_value(server.url(), "create table kept as select 7 as number"))
            else:
                assert asyncio.run(_value(server.url(), "select number from kept")) == 7
        finally:
            server.stop()
        assert not server.child.running


async def test_nats_keeps_its_streams_over_a_restart(tmp_path: Path) -> None:
    """A second start of the same directory finds the messages of the first one."""
    for turn in range(2):
        server = EmbeddedNats(tmp_path)
        server.start()
        try:
            client = await nats.connect(server.url())
            stream = client.jetstream()
            if turn == 0:
                await stream.add_stream(name="KEPT", subjects=["kept"])
                await stream.publish("kept", b"seven")
            else:
                assert (await stream.get_last_msg("KEPT", "kept")).data == b"seven"
            await client.close()
        finally:
            server.stop()


def test_servers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """A launcher that is killed outright leaves no server behind."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from river_ops.embedded.nats import EmbeddedNats\n"
        "from river_ops.embedded.postgres import EmbeddedPostgres\n"
        "servers = [EmbeddedPostgres(Path(sys.argv[1]) / 'p'), EmbeddedNats(Path(sys.argv[1]) / 'n')]\n"
        "for server in servers: server.start()\n"
        "print(*[server.child.process.pid for server in servers], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a server outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


async def test_migrations_apply_once_however_many_callers(
    postgres_cluster: EmbeddedPostgres,
) -> None:
    """Several callers at once apply every file exactly once, and a later call applies none."""
    await _value(postgres_cluster.url(), "create database migrations_race")
    url = postgres_cluster.url("migrations_race")
    applied = await asyncio.gather(*[migrate(url) for _ in range(4)])
    names = [path.name for _, path in numbered(MIGRATIONS)]
    assert sorted(name for batch in applied for name in batch) == names
    assert await migrate(url) == []


async def test_a_detaching_that_was_cut_off_hinders_no_migration(
    postgres_cluster: EmbeddedPostgres, tmp_path: Path
) -> None:
    """The month is out of the table and whole afterwards, with the columns of the others, so that it can come back."""
    await _value(postgres_cluster.url(), "create database migrations_leaving")
    url = postgres_cluster.url("migrations_leaving")
    for number, path in numbered(MIGRATIONS):
        if number < DISCOUNTS:
            shutil.copy(path, tmp_path)
    await migrate(url, tmp_path)
    await _value(url, "select create_usage_partition('2026-06-01')")
    reader = await asyncpg.connect(url)
    try:
        async with reader.transaction(isolation="repeatable_read"):
            await reader.fetchval("select count(*) from usage_event")
            with pytest.raises(asyncpg.QueryCanceledError):
                await _value(
                    url,
                    "alter table usage_event detach partition usage_event_2026_06 concurrently",
                    statement_timeout="200ms",
                )
    finally:
        await reader.close()
    assert await _value(url, "select leaving from usage_partitions where month = '2026-06-01'")
    await migrate(url)
    assert not await _value(
        url, "select leaving or attached from usage_partitions where month = '2026-06-01'"
    )
    await _value(url, "select create_usage_partition('2026-06-01')")
    assert await _value(url, "select attached from usage_partitions where month = '2026-06-01'")


def test_migrations_with_one_number_are_refused(tmp_path: Path) -> None:
    """Two files of one number would leave their order to chance."""
    (tmp_path / "0001_a.sql").touch()
    (tmp_path / "0001_b.sql").touch()
    with pytest.raises(ValueError, match="share a number"):
        numbered(tmp_path)
