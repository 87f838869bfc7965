"""What the trainer's tests share: the base model, executors over it, and data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.trainer_world import World
from support.training import BASE_NAME
from support.workbench import Workbench

from river_billing import streams as billing
from river_trainer import journal
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.store import FileSets

ExecutorMaker = Callable[..., Workbench]


@pytest.fixture(scope="session")
def base(tiny_moe: Path) -> BaseModel:
    """The tiny model, loaded once."""
    return BaseModel(tiny_moe)


@pytest.fixture(scope="session")
def lanes() -> Iterator[Lanes]:
    """Two lanes for everybody."""
    lanes = Lanes(2)
    yield lanes
    lanes.close()


@pytest.fixture
def make_executor(base: BaseModel, lanes: Lanes, tmp_path: Path) -> ExecutorMaker:
    """Makes executors that share one checkpoint store."""

    def make(**options: Any) -> Workbench:
        store = FileSets((tmp_path / "store").as_uri())
        return Workbench(base, lanes, store, base_model=BASE_NAME, **options)

    return make


@pytest.fixture
async def world(
    nats_url: str, base: BaseModel, lanes: Lanes, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    client = await journal.connect(nats_url)
    js = client.jetstream()
    await journal.ensure_streams(js)
    await billing.ensure_streams(js)
    yield World(js, client, base, lanes, f"test/{request.node.name}", tmp_path)
    await client.close()
