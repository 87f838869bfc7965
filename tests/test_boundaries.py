"""What each part may import: the rules of the house, as a newcomer would break them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "transformers", "litestar", "asyncpg", "nats", "aiohttp")


def loaded_by(module: str) -> set[str]:
    """The top-level modules in a fresh Python that has imported `module`."""
    program = (
        f"import {module}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "river_client",
        "river_client.wire",
        "river_client.service",
        "river_client.cli",
        "river_engine.protocol",
        "river_trainer.protocol",
        "river_trainer.loss_specs",
        "river_billing.events",
    ],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    """The SDK and the message structs cost a sender no heavy import."""
    assert loaded_by(module).isdisjoint(HEAVY)


def test_the_sdk_imports_nothing_else_of_ours() -> None:
    """The SDK stands alone."""
    ours = {name for name in loaded_by("river_client") if name.startswith("river_")}
    assert ours == {"river_client"}


@pytest.mark.parametrize(
    "module", ["river_gateway.main", "river_billing.recorder", "river_ops.stack"]
)
def test_control_processes_load_no_model_code(module: str) -> None:
    """Gateway, recorder and launcher never load torch or vLLM."""
    assert loaded_by(module).isdisjoint({"torch", "vllm", "transformers"})


def test_the_trainer_does_not_know_the_gateway() -> None:
    """Imports go down: the trainer knows neither the gateway, nor Postgres, nor ops."""
    assert loaded_by("river_trainer.main").isdisjoint({"river_gateway", "river_ops", "asyncpg"})


def test_kernels_need_only_torch() -> None:
    """The kernels are usable without the rest of River."""
    ours = {name for name in loaded_by("river_kernels") if name.startswith("river_")}
    assert ours == {"river_kernels"}
