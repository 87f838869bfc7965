"""One engine for all tests of it, as `river_engine.main` runs it, on the tiny model that ships."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
from transformers import AutoConfig

from river_engine.adapter_files import model_targets, write_random_adapter
from river_engine.protocol import (
    ADAPTER_HEADER,
    MODEL_HEADER,
    AdapterRef,
    EngineError,
    EngineSample,
    EngineSampleResult,
)

TOKEN = "engine-secret"
BASE_MODEL = "river/tiny-moe"
READY_WITHIN_S = 120.0


@dataclass(frozen=True)
class RunningEngine:
    url: str
    process: subprocess.Popen[bytes]
    client: httpx.Client
    engine_id: str

    def wait_ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Returns when the engine answers, whether for the first time or again."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the engine has stopped"
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"not ready within {within_s} s")

    def sample(self, **fields: object) -> EngineSampleResult:
        response = self.post_sample(**fields)
        assert response.status_code == 200, response.content
        return msgspec.msgpack.decode(response.content, type=EngineSampleResult)

    def refusal(self, **fields: object) -> tuple[int, EngineError]:
        response = self.post_sample(**fields)
        assert response.status_code != 200
        return response.status_code, msgspec.msgpack.decode(response.content, type=EngineError)

    def post_sample(self, **fields: object) -> httpx.Response:
        request = EngineSample(**{"request_id": "test", **fields})  # type: ignore[arg-type]
        return self.client.post("/river/sample", content=msgspec.msgpack.encode(request))

    def token_counts(self) -> dict[str, int]:
        """The counters the bill is checked against, by kind."""
        return {
            line.split('"')[1]: int(value)
            for line, value in self._metrics("river_engine_tokens_total{")
        }

    def running(self) -> int:
        """Sequences that vLLM is generating or about to."""
        return int(sum(value for _, value in self._metrics("vllm:num_requests_running{")))

    def preemptions(self) -> int:
        """How often vLLM took a running sequence's cache for another."""
        return int(sum(value for _, value in self._metrics("vllm:num_preemptions_total{")))

    def gauge(self, name: str) -> int:
        """One of our own, over all its labels."""
        return int(sum(value for _, value in self._metrics(f"river_engine_{name}")))

    def _metrics(self, prefix: str) -> list[tuple[str, float]]:
        lines = self.client.get("/metrics").text.splitlines()
        return [(line, float(line.rpartition(" ")[2])) for line in lines if line.startswith(prefix)]


def adapter_headers(ref: AdapterRef | None, model: str = "public-name") -> dict[str, str]:
    headers = {MODEL_HEADER: model}
    if ref is not None:
        headers[ADAPTER_HEADER] = msgspec.json.encode(ref).decode()
    return headers


@contextmanager
def running_engine(
    model: Path, nats_url: str, directory: Path, **variables: str
) -> Iterator[RunningEngine]:
    """A ready engine under its supervisor; `variables` are settings besides the usual ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RIVER_BASE_MODEL": BASE_MODEL,
        "RIVER_MODEL_PATH": str(model),
        "RIVER_ENGINE_TOKEN": TOKEN,
        "RIVER_ENGINE_ID": "eng-test",
        "RIVER_NATS_URL": nats_url,
        "RIVER_DATA_DIR": str(directory),
        "RIVER_PORT": str(port),
        "RIVER_KV_CACHE_MB": "64",
        "RIVER_MAX_LORAS": "3",
        **variables,
    }
    log = directory / "engine.log"
    with (
        log.open("wb") as output,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=60.0,
        ) as client,
        subprocess.Popen(
            [sys.executable, "-m", "river_engine.main"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        running = RunningEngine(f"http://127.0.0.1:{port}", process, client, "eng-test")
        try:
            running.wait_ready()
            yield running
            process.terminate()
            assert process.wait(timeout=10) == 0
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-8000:])
            raise
        finally:
            process.kill()


@pytest.fixture(scope="session")
def engine(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """The engine of most tests, in float32."""
    with running_engine(tiny_moe, nats_url, tmp_path_factory.mktemp("engine")) as running:
        yield running


@pytest.fixture(scope="session")
def make_adapter(
    tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AdapterRef]:
    """Writes a random adapter on attention, experts and head (or on `only` those) and names it uniquely."""
    targets = model_targets(AutoConfig.from_pretrained(tiny_moe))
    root = tmp_path_factory.mktemp("adapters")
    made: list[str] = []

    def make(
        *,
        seed: int,
        rank: int = 8,
        std: float = 0.1,
        only: str = "",
        shared_experts: bool = False,
    ) -> AdapterRef:
        name = f"run_test{len(made)}@{seed}"
        made.append(name)
        chosen = {module: target for module, target in targets.items() if only in module}
        write_random_adapter(
            root / name, chosen, rank=rank, seed=seed, std=std, shared_experts=shared_experts
        )
        return AdapterRef(name=name, location=(root / name).as_uri())

    return make
