"""The peer of the hotload benchmark: plain `vllm serve` with our plugin, told of adapters by its own load route.

The plugin is there because vLLM alone has no LoRA on a CPU; all settings are those of our engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from river_engine.main import server_environment
from river_engine.settings import EngineSettings
from river_ops.children import Child, dying_with_parent, free_port
from river_ops.models import TINY_MOE, TINY_MOE_NAME

START_TIMEOUT_S = 180.0
SERVER_MODULE = "vllm.entrypoints.launchers.api_server.entry"


class VllmPeer:
    """A running server."""

    def __init__(self, base_url: str, directory: Path) -> None:
        self.base_url = base_url
        self._directory = directory
        self._loaded = 0
        self.http = httpx.Client(base_url=base_url, timeout=30.0)

    def publish(self, files: dict[str, bytes]) -> str:
        """Writes an adapter's files and has the server load them; returns the model's name."""
        self._loaded += 1
        name = f"version-{self._loaded}"
        folder = self._directory / name
        folder.mkdir()
        for file_name, data in files.items():
            (folder / file_name).write_bytes(data)
        body = {"lora_name": name, "lora_path": str(folder), "is_3d_lora_weight": True}
        self.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        return name


@contextmanager
def running_vllm(directory: Path) -> Iterator[VllmPeer]:
    """A server for the length of the block.

    Raises:
        ChildError: it does not start.
    """
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    settings = EngineSettings(
        base_model=TINY_MOE_NAME, model_path=str(TINY_MOE), port=port, engine_token=""
    )
    server = Child(
        name="vllm",
        argv=dying_with_parent([sys.executable, "-m", SERVER_MODULE, *arguments(settings)]),
        log_path=directory / "vllm.log",
        environment={**server_environment(settings), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )
    server.start()
    try:
        server.wait_until(lambda: is_healthy(base_url), timeout_s=START_TIMEOUT_S)
        peer = VllmPeer(base_url, directory)
        with peer.http:
            yield peer
    finally:
        server.stop()


def arguments(settings: EngineSettings) -> list[str]:
    """`vllm serve`'s, as our engine has them on this machine."""
    options = [
        f"--model={settings.model_path}",
        f"--served-model-name={settings.base_model}",
        f"--host={settings.host}",
        f"--port={settings.port}",
        "--enable-lora",
        f"--max-loras={settings.max_loras}",
        f"--max-cpu-loras={settings.max_cpu_loras}",
        f"--max-lora-rank={settings.max_lora_rank}",
        "--enable-mixed-moe-lora-format",
        "--enable-prefix-caching",
    ]
    if settings.on_cpu:
        options += [
            "--enforce-eager",
            "--block-size=32",
            "--dtype=float32",
            f"--kv-cache-memory-bytes={settings.kv_cache_mb * 1024 * 1024}",
        ]
    return options


def is_healthy(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/health", timeout=5.0).is_success
    except httpx.TransportError:
        return False
