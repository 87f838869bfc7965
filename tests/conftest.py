"""The servers that tests share: one Postgres cluster and one nats-server a session, the real ones."""

from __future__ import annotations

import os

# Torch's threads must not spin while they wait: tests share their cores. It only counts before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing here may reach for a hub or report to anybody, and nobody's own platform may be mistaken for a test's.
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
for name in [
    name for name in os.environ if name.startswith("RIVER_") and not name.endswith("_BIN")
]:
    del os.environ[name]

# Triton decides when it is loaded whether kernels run in its interpreter; here they do, but not in other processes.
os.environ["TRITON_INTERPRET"] = "1"

import triton.experimental.gluon  # noqa: F401  # which triton would load at the first start of a kernel

import river_kernels.gpu  # noqa: F401  # it is the import that counts

del os.environ["TRITON_INTERPRET"]

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from support.s3 import S3, running_s3

from river_ops.embedded.nats import EmbeddedNats
from river_ops.embedded.postgres import EmbeddedPostgres
from river_ops.migrate import migrate
from river_ops.models import TINY_MOE
from river_ops.settings import StackInfo, StackOptions
from river_ops.stack import running_stack

_TEMPLATE = "river_template"
_database_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A running cluster with a migrated template database."""
    cluster = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False)
    cluster.start()
    try:
        asyncio.run(_make_template(cluster))
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def postgres_url(postgres_cluster: EmbeddedPostgres) -> str:
    """The URL of a fresh, migrated, empty database."""
    name = f"test_{next(_database_numbers)}"
    asyncio.run(_execute(postgres_cluster, f"create database {name} template {_TEMPLATE}"))
    return postgres_cluster.url(name)


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running nats-server with JetStream; tests use names of their own in it."""
    server = EmbeddedNats(tmp_path_factory.mktemp("nats"), durable=False)
    server.start()
    try:
        yield server.url()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A running S3 server; tests use buckets of their own in it."""
    with running_s3() as server:
        yield server


@pytest.fixture(scope="session")
def stack_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of the running platform."""
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="session")
def stack(stack_directory: Path) -> Iterator[StackInfo]:
    """The running platform."""
    options = StackOptions(data_directory=stack_directory, port=0, durable=False)
    with pytest.MonkeyPatch.context() as patch:
        # Files of expired checkpoints go while a test can wait for it.
        patch.setenv("RIVER_SWEEP_INTERVAL_S", "0.5")
        patch.setenv("RIVER_SWEEP_GRACE_S", "0")
        with running_stack(options) as info:
            yield info


@pytest.fixture(scope="session")
def tiny_moe() -> Path:
    """The directory of the tiny model that ships."""
    return TINY_MOE


async def _make_template(cluster: EmbeddedPostgres) -> None:
    await _execute(cluster, f"create database {_TEMPLATE}")
    await migrate(cluster.url(_TEMPLATE))


async def _execute(cluster: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(cluster.url())
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
