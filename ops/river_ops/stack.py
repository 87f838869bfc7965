"""The whole platform as children of one process: servers, recorder, engines, trainers, gateway.

postgres, nats ──▶ migrations ──▶ recorder, engines, trainers, gateway ──▶ ready
                                      └── each restarted when it dies ──┘
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx

from river_client.service import read_settings
from river_gateway.tenancy.accounts import create_key, create_tenant, list_tenants
from river_gateway.tenancy.auth import hash_secret
from river_ops import limits
from river_ops.children import Child, free_port, part_argv
from river_ops.embedded.nats import EmbeddedNats
from river_ops.embedded.postgres import EmbeddedPostgres
from river_ops.migrate import migrate
from river_ops.private_files import write_private
from river_ops.settings import Base, ExternalServers, StackInfo, StackOptions
from river_ops.stack_file import claimed, write_stack_file

FIRST_TENANT = "default"
ADMIN_KEY_FILE = "admin.key"


class StackError(RuntimeError):
    """The stack did not become ready; the message says why in a line."""


@dataclass(slots=True)
class _Watch:
    """How often a child has died lately."""

    child: Child
    started_at: float
    backoff_s: float = limits.RESTART_BACKOFF_MIN_S
    restart_at: float | None = None


class Stack:
    """Starts, supervises and stops everything; use it from the main thread."""

    def __init__(self, options: StackOptions, interrupted: threading.Event) -> None:
        self._options = options
        self._interrupted = interrupted
        self._data = options.data_directory.resolve()
        self._servers: list[EmbeddedPostgres | EmbeddedNats] = []
        self._server_watches: list[_Watch] = []
        self._watches: list[_Watch] = []
        self._engine_metrics_urls: list[str] = []
        self._trainer_metrics_urls: list[str] = []
        self._postgres_url = options.external.postgres_url
        self._nats_url = options.external.nats_url

    def start(self) -> StackInfo:
        """Brings everything up; returns when every base model can be trained and sampled.

        Raises:
            StackError: it takes too long, or was interrupted.
            ChildError: a part ended early.
        """
        port = self._options.port or free_port()
        grpc_port = self._grpc_port()
        base_url = f"http://127.0.0.1:{port}"
        self._start_servers()
        asyncio.run(migrate(self._postgres_url))
        admin_key = asyncio.run(first_admin_key(self._postgres_url, self._data / ADMIN_KEY_FILE))
        for child in self._parts(port, grpc_port):
            child.start()
            self._watches.append(_Watch(child, time.monotonic()))
        self._wait_until_ready(base_url, admin_key)
        info = StackInfo(
            process_id=os.getpid(),
            base_url=base_url,
            grpc_port=grpc_port,
            admin_key=admin_key,
            postgres_url=self._postgres_url,
            bases=[base.name for base in self._options.bases],
            engine_metrics_urls=self._engine_metrics_urls,
            trainer_metrics_urls=self._trainer_metrics_urls,
        )
        write_stack_file(self._data, info)
        return info

    def supervise(self, stop: threading.Event) -> None:
        """Restarts parts that die, with growing pauses, until `stop` is set."""
        while not stop.wait(limits.SUPERVISE_INTERVAL_S):
            now = time.monotonic()
            for watch in self._server_watches + self._watches:
                restart_if_due(watch, now)

    def stop(self) -> None:
        """Ends all parts together, then the servers that they need to end cleanly."""
        for watch in self._watches:
            watch.child.ask_to_stop()
        for watch in reversed(self._watches):
            watch.child.stop()
        for server in reversed(self._servers):
            server.stop()

    def _start_servers(self) -> None:
        if not self._postgres_url:
            postgres = EmbeddedPostgres(self._data / "postgres", durable=self._options.durable)
            self._start_server(postgres)
            self._postgres_url = postgres.url()
        if not self._nats_url:
            nats = EmbeddedNats(self._data / "nats", durable=self._options.durable)
            self._start_server(nats)
            self._nats_url = nats.url()

    def _start_server(self, server: EmbeddedPostgres | EmbeddedNats) -> None:
        self._servers.append(server)
        server.start()
        self._server_watches.append(_Watch(server.child, time.monotonic()))

    def _grpc_port(self) -> int:
        if self._options.grpc_port is not None:
            return self._options.grpc_port or free_port()
        return self._options.port + 1 if self._options.port else free_port()

    def _parts(self, port: int, grpc_port: int) -> Iterator[Child]:
        store_url = self._options.external.store_url or (self._data / "store").as_uri()
        common = {
            "RIVER_POSTGRES_URL": self._postgres_url,
            "RIVER_NATS_URL": self._nats_url,
            "RIVER_STORE_URL": store_url,
            "RIVER_ENGINE_TOKEN": secrets.token_urlsafe(32),
        }
        # The slowest to start goes first.
        for base in self._options.bases:
            for number in range(self._options.engines):
                yield self._model_part("engine", base, number, common, self._engine_metrics_urls)
            for number in range(self._options.trainers):
                yield self._model_part("trainer", base, number, common, self._trainer_metrics_urls)
        yield self._part("recorder", "recorder", {**common, "RIVER_PORT": str(free_port())})
        ports = {"RIVER_PORT": str(port), "RIVER_GRPC_PORT": str(grpc_port)}
        yield self._part("gateway", "gateway", common | ports)

    def _model_part(
        self, part: str, base: Base, number: int, common: dict[str, str], metrics_urls: list[str]
    ) -> Child:
        name = f"{part}-{file_name(base.name)}-{number}"
        port = free_port()
        metrics_urls.append(f"http://127.0.0.1:{port}/metrics")
        own = {
            "RIVER_BASE_MODEL": base.name,
            "RIVER_MODEL_PATH": base.path,
            "RIVER_PORT": str(port),
            "RIVER_ENGINE_ID": name,
        }
        return self._part(part, name, common | own)

    def _part(self, part: str, name: str, environment: dict[str, str]) -> Child:
        directory = self._data / name
        return Child(
            name=name,
            argv=part_argv(part),
            log_path=self._data / "logs" / f"{name}.log",
            environment={**environment, "RIVER_DATA_DIR": str(directory)},
        )

    def _wait_until_ready(self, base_url: str, admin_key: str) -> None:
        deadline = time.monotonic() + limits.STACK_START_TIMEOUT_S
        wanted = {base.name for base in self._options.bases}
        headers = {"authorization": f"Bearer {admin_key}"}
        with httpx.Client(base_url=base_url, headers=headers, timeout=5.0) as client:
            while not ready_models(client) >= wanted:
                if self._interrupted.is_set():
                    raise StackError("interrupted before it was ready")
                for watch in self._watches:
                    watch.child.require_running()
                if time.monotonic() > deadline:
                    logs = self._data / "logs"
                    raise StackError(
                        f"not ready in {limits.STACK_START_TIMEOUT_S:.0f} s; see {logs}"
                    )
                time.sleep(limits.READY_POLL_INTERVAL_S)


@contextmanager
def running_stack(
    options: StackOptions, interrupted: threading.Event | None = None
) -> Iterator[StackInfo]:
    """A stack for the length of the block, supervised from a thread; setting `interrupted` ends its start.

    Raises:
        StackRunsError: another process has one in this directory.
        StackError, ChildError: it does not start.
    """
    stack = Stack(options, interrupted or threading.Event())
    stop = threading.Event()

    def supervise_and_stop() -> None:
        # What this thread restarted dies with it, so it is also the one to stop the parts in order.
        stack.supervise(stop)
        stack.stop()

    with claimed(options.data_directory):
        try:
            info = stack.start()
        except BaseException:
            stack.stop()
            raise
        supervisor = threading.Thread(target=supervise_and_stop, name="supervisor")
        supervisor.start()
        try:
            yield info
        finally:
            stop.set()
            supervisor.join()


def restart_if_due(watch: _Watch, now: float) -> None:
    """Starts a child that has died, after a pause that grows while it keeps dying."""
    if watch.child.running:
        if now - watch.started_at > limits.RESTART_HEALTHY_AFTER_S:
            watch.backoff_s = limits.RESTART_BACKOFF_MIN_S
        return
    if watch.restart_at is None:
        watch.restart_at = now + watch.backoff_s
        watch.backoff_s = min(watch.backoff_s * 2, limits.RESTART_BACKOFF_MAX_S)
    elif now >= watch.restart_at:
        watch.restart_at = None
        watch.started_at = now
        watch.child.start()


async def first_admin_key(postgres_url: str, key_file: Path) -> str:
    """The admin key of this data directory, made with its tenant on the first start."""
    connection = await asyncpg.connect(postgres_url)
    try:
        if key_file.exists():
            secret = key_file.read_text().strip()
            known = "select exists (select from api_key where secret_hash = $1)"
            if await connection.fetchval(known, hash_secret(secret)):
                return secret
        async with connection.transaction():
            tenants = await list_tenants(connection)
            if not any(tenant.name == FIRST_TENANT for tenant in tenants):
                await create_tenant(connection, FIRST_TENANT)
            key = await create_key(
                connection, tenant=FIRST_TENANT, name="admin", scopes=["infer", "train", "admin"]
            )
            assert key.secret is not None
            # Written before the commit: a key that nobody can read is worse than one that was never valid.
            write_private(key_file, key.secret.encode())
    finally:
        await connection.close()
    return key.secret


def ready_models(client: httpx.Client) -> set[str]:
    """The base models that can be both trained and sampled now."""
    try:
        answer = client.get("/river/v1/models")
    except httpx.TransportError:
        return set()
    if answer.status_code != httpx.codes.OK:
        return set()
    return {
        model["name"]
        for model in answer.json().get("models", [])
        if model["trainable"] and model["servable"]
    }


def file_name(name: str) -> str:
    """`name` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def options_from_environment(**chosen: object) -> StackOptions:
    """Options as given, with external servers from `RIVER_POSTGRES_URL`, `RIVER_NATS_URL`, `RIVER_STORE_URL`.

    Raises:
        SettingsError: a variable is wrong.
    """
    return StackOptions(external=read_settings(ExternalServers), **chosen)  # pyright: ignore[reportArgumentType]
