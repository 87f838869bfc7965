"""Clients of the running stack that the whole suite shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from support.browser import DESKTOP, Visit
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import river_client as river
from river_ops.chromium import ARGUMENTS, ChromiumMissingError, ensure_chromium
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE
from river_ops.settings import StackInfo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the whole stack."""
    for item in items:
        if "tests/e2e" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser; of one module, because its loop would be in the way of asynchronous tests."""
    try:
        path = ensure_chromium()
    except ChromiumMissingError as error:
        pytest.skip(str(error))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def visit(chromium: Browser, stack: StackInfo, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh browser window in a colour scheme."""
    context = chromium.new_context(color_scheme=request.param, viewport=DESKTOP)
    yield Visit(context.new_page(), stack)
    context.close()
