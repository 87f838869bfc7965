"""One whole running stack a session, with every real part in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import river_client as river
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE
from river_ops.settings import StackInfo, StackOptions
from river_ops.stack import running_stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the whole stack."""
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture
def new_client(stack: StackInfo) -> Iterator[Callable[[], river.Client]]:
    """Makes clients, each of a tenant of its own."""
    clients: list[river.Client] = []

    def make() -> river.Client:
        client = river.Client(api_key=new_tenant_key(stack), base_url=stack.base_url)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client: Callable[[], river.Client]) -> river.Client:
    """A client of a fresh tenant."""
    return new_client()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_MOE)
