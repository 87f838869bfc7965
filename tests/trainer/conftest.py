"""What the trainer's tests share: the base model, executors over it, and data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from support.trainer_world import World
from support.training import BASE_NAME

from river_billing import streams as billing
from river_trainer import journal
from river_trainer.base_model import BaseModel
from river_trainer.executor import Executor, configure_torch
from river_trainer.store import FileSets

ExecutorMaker = Callable[[], Executor]


@pytest.fixture(scope="session")
def base(tiny_moe: Path) -> BaseModel:
    """The tiny model, loaded once."""
    configure_torch(2)
    torch.manual_seed(0)
    return BaseModel(tiny_moe)


@pytest.fixture
def make_executor(base: BaseModel, tmp_path: Path) -> ExecutorMaker:
    """Makes executors that share one checkpoint store."""

    def make(micro_batch_tokens: int = 4096) -> Executor:
        return Executor(
            base,
            FileSets((tmp_path / "store").as_uri()),
            base_model=BASE_NAME,
            context_length=256,
            max_lora_rank=32,
            micro_batch_tokens=micro_batch_tokens,
        )

    return make


@pytest.fixture
async def world(
    nats_url: str, base: BaseModel, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    client = await journal.connect(nats_url)
    js = client.jetstream()
    await journal.ensure_streams(js)
    await billing.ensure_streams(js)
    yield World(js, client, base, f"test/{request.node.name}", tmp_path)
    await client.close()
