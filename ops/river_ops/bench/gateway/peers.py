"""Other gateways, in an environment of their own: the Rust `vllm-router` and the LiteLLM proxy.

They are installed on first use from `ops/requirements/bench-peers.txt` into the user's cache. Each runs as its makers
advise for speed: one process, no retries, no callbacks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from river_ops.bench.gateway.answers import MODEL
from river_ops.children import Child, dying_with_parent, free_port

INSTALL_TIMEOUT_S = 900.0
START_TIMEOUT_S = 120.0
API_KEY = "sk-river-bench-" + "0" * 16
PEERS = ("vllm_router", "litellm")
# The lock is complete; left to itself pip would ask for the hash of `pydantic[email]` beside that of pydantic.
_INSTALL = ("install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "OMP_NUM_THREADS": "1",
    # Set to anything it would halve LiteLLM's speed: what it imports anew on each request is compiled each time.
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPATH": "",
}
_LOCK = Path(__file__).parents[3] / "requirements" / "bench-peers.txt"


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer; `process` is its only one that works."""

    port: int
    process: int
    model: str


def peers_environment(say: Callable[[str], None], *, install: bool) -> Path | None:
    """The folder of the peers' programs; None if they are not there and cannot, or shall not, be installed."""
    if not _LOCK.exists():
        return None
    digest = hashlib.sha256(_LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "river" / f"bench-peers-{digest}"
    if (folder / "complete").exists():
        return folder / "bin"
    if not install:
        return None
    say("installing the peers, once…")
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [folder / "bin" / "pip", *_INSTALL, "-r", _LOCK],
            check=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        say(f"the peers cannot be installed: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    (folder / "complete").touch()
    return folder / "bin"


@contextmanager
def running_peer(name: str, programs: Path, stub_url: str, data: Path) -> Iterator[Peer]:
    """A peer in front of the stand-in engine.

    Raises:
        ChildError: it does not come up.
    """
    port = free_port()
    argv = _ARGUMENTS[name](programs, stub_url, data, port)
    # LiteLLM looks for modules two folders above the one it is started in: there should be none.
    folder = data / "peers" / name
    folder.mkdir(parents=True)
    argv = ["env", f"--chdir={folder}", *argv]
    child = Child(name, dying_with_parent(argv), data / f"{name}.log", _ENVIRONMENT)
    child.start()
    try:
        child.wait_until(lambda: _answers(port), timeout_s=START_TIMEOUT_S)
        assert child.process is not None
        yield Peer(port, child.process.pid, MODEL)
    finally:
        child.stop()


def _vllm_router(programs: Path, stub_url: str, _data: Path, port: int) -> list[str]:
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "policy": "round_robin",
        "worker-urls": stub_url,
        "prometheus-port": str(free_port()),
        "log-level": "error",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [str(programs / "vllm-router"), *flags, "--disable-retries"]


def _litellm(programs: Path, stub_url: str, data: Path, port: int) -> list[str]:
    model = {
        "model_name": MODEL,
        "litellm_params": {
            "model": f"hosted_vllm/{MODEL}",
            "api_base": f"{stub_url}/v1",
            "api_key": "none",
        },
    }
    configuration = {
        "model_list": [model],
        "litellm_settings": {"num_retries": 0, "telemetry": False, "callbacks": []},
        "router_settings": {"num_retries": 0},
        "general_settings": {"master_key": API_KEY, "disable_spend_logs": True},
    }
    path = data / "litellm.json"
    path.write_text(json.dumps(configuration))
    flags = ["--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    return [str(programs / "litellm"), *flags, "--num_workers", "1"]


_ARGUMENTS: dict[str, Callable[[Path, str, Path, int], list[str]]] = {
    "vllm_router": _vllm_router,
    "litellm": _litellm,
}


def _answers(port: int) -> bool:
    """Whether a completion comes back."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    headers = {"authorization": f"Bearer {API_KEY}"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    try:
        return httpx.post(url, json=body, headers=headers, timeout=10.0).is_success
    except httpx.HTTPError:
        return False
