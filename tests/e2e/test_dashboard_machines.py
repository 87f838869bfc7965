"""Engines and trainers on the dashboard of a platform with two engines: how they are, live, and restarting each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, Page, expect
from support.browser import DESKTOP, Visit

import river_client as river
from river_client.machine_wire import Engine, Trainer
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo, StackOptions
from river_ops.stack import running_stack

ASKING = 4
BACK_WITHIN_S = 180.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackInfo]:
    """A platform of its own: everybody else's would miss the engine that is restarted."""
    directory = tmp_path_factory.mktemp("fleet")
    options = StackOptions(data_directory=directory, port=0, durable=False, engines=2)
    with running_stack(options) as info:
        yield info


@pytest.fixture
def admin(fleet: StackInfo) -> Iterator[river.Client]:
    with river.Client(api_key=fleet.admin_key, base_url=fleet.base_url) as client:
        yield client


@pytest.fixture
def window(fleet: StackInfo, chromium: Browser) -> Iterator[Visit]:
    """A signed-in admin."""
    context = chromium.new_context(color_scheme="dark", viewport=DESKTOP)
    visit = Visit(context.new_page(), fleet)
    visit.sign_in(fleet.base_url, fleet.admin_key)
    yield visit
    context.close()


@dataclass
class Asked:
    """Requests that were asked without pause: how many were answered in full, and what went wrong."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def asking(fleet: StackInfo) -> Iterator[Asked]:
    """Asks from several threads while the block runs; streams and whole answers, never again what failed."""
    asked, stop = Asked(), threading.Event()

    def ask(number: int) -> None:
        messages: list[Any] = [{"role": "user", "content": f"{number}+1="}]
        with openai.OpenAI(
            base_url=f"{fleet.base_url}/v1", api_key=fleet.admin_key, max_retries=0
        ) as client:
            while not stop.is_set():
                problem = _ask(client, messages, stream=bool(number % 2))
                with asked.lock:
                    asked.answered += problem is None
                    if problem is not None:
                        asked.wrong.append(problem)

    with ThreadPoolExecutor(ASKING) as pool:
        for number in range(ASKING):
            pool.submit(ask, number)
        try:
            yield asked
        finally:
            stop.set()


def _ask(client: openai.OpenAI, messages: list[Any], *, stream: bool) -> str | None:
    """What went wrong, or None when an answer came to its end."""
    options: dict[str, Any] = {"max_tokens": 48, "extra_body": {"ignore_eos": True}}
    try:
        if not stream:
            whole = client.chat.completions.create(
                model=TINY_MOE_NAME, messages=messages, **options
            )
            return None if whole.choices[0].finish_reason else "no end"
        chunks = list(
            client.chat.completions.create(
                model=TINY_MOE_NAME, messages=messages, stream=True, **options
            )
        )
        return None if chunks[-1].choices[0].finish_reason else "a stream without its end"
    except openai.OpenAIError as error:
        return repr(error)


def until(condition: Callable[[], Any], within_s: float = BACK_WITHIN_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not so within {within_s} s")


def engines(admin: river.Client) -> dict[str, Engine]:
    return {engine.engine_id: engine for engine in admin.engines.list()}


def open_machine(page: Page, machine_id: str) -> None:
    page.get_by_role("navigation").get_by_text("Engines").click()
    page.get_by_role("link", name=machine_id, exact=True).click()
    expect(page.get_by_role("heading", name=machine_id)).to_be_visible()


def test_an_engine_is_restarted_and_no_request_is_lost(
    fleet: StackInfo, window: Visit, admin: river.Client
) -> None:
    """Its id typed, it ends what it has begun while the other one answers, and comes back by itself, all of it live."""
    page = window.page
    first = min(engines(admin))
    with asking(fleet) as asked:
        until(lambda: asked.answered > 2 * ASKING)
        open_machine(page, first)
        window.check()
        expect(page.get_by_text("tokens / s")).to_be_visible()
        page.get_by_role("button", name="Restart the engine").click()
        assert engines(admin)[first].state == "serving", "nothing was typed"
        page.get_by_label("to confirm").fill(first)
        page.get_by_role("button", name="Restart the engine").click()
        expect(page.get_by_role("heading", name="Engines and trainers")).to_be_visible()
        until(lambda: first not in engines(admin))
        before = asked.answered
        until(lambda: (found := engines(admin).get(first)) and found.restarts == 1)
        until(lambda: asked.answered > before + 2 * ASKING)
        expect(page.get_by_role("link", name=first, exact=True)).to_be_visible()
        window.check()
    assert asked.wrong == []
    window.check_phone()


def test_a_drained_engine_takes_nothing_until_it_goes_on(
    fleet: StackInfo, window: Visit, admin: river.Client
) -> None:
    """Drained by a click, it has nothing to do while others are asked; with another click it takes part again."""
    page = window.page
    until(lambda: len(engines(admin)) == 2)
    second = max(engines(admin))
    open_machine(page, second)
    page.get_by_role("button", name="Drain").click()
    expect(page.locator("#engine .state")).to_have_text("draining")
    until(lambda: engines(admin)[second].state == "draining")
    with asking(fleet) as asked:
        until(lambda: asked.answered > 2 * ASKING)
        assert engines(admin)[second].inside == 0
        window.check()
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#engine .state")).to_have_text("serving")
    assert asked.wrong == []


def test_a_trainer_is_restarted_in_the_middle_of_a_run(
    fleet: StackInfo, window: Visit, admin: river.Client
) -> None:
    """The client just waits longer: every step is done once, and the successor's page says where its time goes."""
    page = window.page
    (trainer,) = admin.trainers.list()
    row = {"input_ids": [3 + number for number in range(32)]}
    with admin.session(task="restarted") as session:
        model = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=4))
        for _ in range(3):
            model.train_step(data=[row], loss_fn="cross_entropy", lr=1e-3)
        open_machine(page, trainer.trainer_id)
        expect(page.get_by_text("Backward passes")).to_be_visible()
        window.check()
        page.get_by_label("to confirm").fill(trainer.trainer_id)
        page.get_by_role("button", name="Restart the trainer").click()
        expect(page.get_by_role("heading", name="Engines and trainers")).to_be_visible()
        for _ in range(3):
            model.train_step(data=[row], loss_fn="cross_entropy", lr=1e-3)
        saved = model.save_weights("after", mode="inference")
        assert saved.policy_version == f"{model.run_id}@6"

        def successor() -> Trainer | None:
            """Once it has told of the run."""
            found = [each for each in admin.trainers.list() if each.runs]
            return next((each for each in found if each.trainer_id != trainer.trainer_id), None)

        assert until(successor)
    window.check()


def test_health_is_that_of_all_requests(
    fleet: StackInfo, window: Visit, admin: river.Client
) -> None:
    """The overview's tiles lead to it; refused requests are in it and have not failed."""
    page = window.page
    with openai.OpenAI(
        base_url=f"{fleet.base_url}/v1", api_key=fleet.admin_key, max_retries=0
    ) as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=[])
        with asking(fleet) as asked:
            until(lambda: asked.answered > ASKING)
    page.get_by_role("navigation").get_by_text("Overview").click()
    tile = page.locator("a.tile", has_text="First token")
    # A slot of ten seconds, and two for gateways that are late to tell.
    expect(tile.locator(".figure")).to_contain_text("s", timeout=60_000)
    window.check()
    tile.click()
    expect(page.get_by_role("heading", name="Health")).to_be_visible()
    row = page.get_by_role("row", name=TINY_MOE_NAME)
    expect(row).to_be_visible(timeout=60_000)
    expect(page.get_by_role("row", name="OpenAI API")).to_contain_text("404", timeout=60_000)
    expect(page.get_by_text("None in the last half hour")).to_be_visible()
    page.get_by_text("By half minute").click()
    window.check()
    window.check_phone()
