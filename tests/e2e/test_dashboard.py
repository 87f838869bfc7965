"""The dashboard in a real browser, on a platform that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from playwright.sync_api import expect
from support.browser import PHONE, Visit

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


@contextmanager
def training(client: river.Client, **tags: str) -> Iterator[str]:
    """A run that goes on stepping and logging a reward while the block runs; yields its id."""
    stop = threading.Event()
    with client.session(**tags) as session:
        model = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=4))

        def steps() -> None:
            number = 0
            while not stop.wait(0.05):
                row = {"input_ids": [3 + (number + place) % 40 for place in range(16)]}
                model.train_step(data=[row], loss_fn="cross_entropy", lr=1e-3)
                model.log({"reward": number / 100})
                number += 1

        thread = threading.Thread(target=steps)
        thread.start()
        try:
            yield model.run_id
        finally:
            stop.set()
            thread.join()


def test_a_curve_grows_while_its_run_trains(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """Signed in with its own key, a tenant finds its run by a tag and watches it learn, without reloading."""
    page = visit.page
    with training(client, task="watched") as run_id:
        visit.sign_in(stack.base_url, client.api_key)
        visit.check()
        page.get_by_role("link", name="Runs", exact=True).click()
        page.get_by_label("Search").fill("watched")
        page.get_by_role("button", name="Show").click()
        visit.check()
        page.get_by_role("link", name=run_id).click()
        charts = page.locator("figure.chart")
        expect(charts.first.locator("figcaption")).to_have_text("reward")
        page.get_by_text("Numbers").first.click()
        last = charts.first.locator("tbody td").last
        before = float(last.inner_text())
        expect(page.locator("#connection")).to_have_text("live")
        page.wait_for_function(
            "before => Number(document.querySelector('figure.chart tbody td:last-child').textContent) > before",
            arg=before + 0.1,
        )
        # `loss_mean` comes next, whatever else is logged.
        expect(charts.nth(1).locator("figcaption")).to_have_text("loss_mean")
        visit.check()


def test_several_runs_in_one_picture(visit: Visit, stack: StackInfo, client: river.Client) -> None:
    """Another run's curves are laid over, and both are named."""
    with training(client, task="one") as one, training(client, task="two") as two:
        visit.sign_in(stack.base_url, client.api_key)
        visit.page.goto(f"{stack.base_url}/admin/runs/{one}")
        visit.page.get_by_label("Overlay").select_option(two)
        visit.page.get_by_role("button", name="Show").click()
        expect(visit.page.locator(".key li")).to_have_text([one, two])
        expect(visit.page.locator("figure.chart").first.locator("tbody tr")).to_have_count(2)
        visit.check()


def test_on_a_phone_nothing_is_wider_than_the_screen(
    visit: Visit, stack: StackInfo, new_client: Callable[[], river.Client]
) -> None:
    """Tables scroll in their own boxes; the page does not. An admin sees every tenant's."""
    visit.page.set_viewport_size(PHONE)
    with training(new_client(), task="phone") as run_id:
        visit.sign_in(stack.base_url, stack.admin_key)
        for path in ("/admin", "/admin/runs", f"/admin/runs/{run_id}"):
            visit.page.goto(stack.base_url + path)
            expect(visit.page.locator("#connection")).to_have_text("live")
            width = visit.page.evaluate("document.documentElement.scrollWidth")
            assert width <= PHONE["width"], path
            visit.check()


def test_the_keyboard_is_enough(visit: Visit, stack: StackInfo) -> None:
    """Signing in, going to the runs and signing out takes no pointer."""
    page = visit.page
    page.goto(f"{stack.base_url}/admin")
    page.keyboard.type(stack.admin_key)  # The field has the focus.
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_role("link", name="Runs", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    page.get_by_role("button", name="Sign out").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    assert visit.problems == []


def test_a_promoted_checkpoint_answers_the_next_request(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """Promoted by a form, it is what the alias answers with; deleted by its typed name, it is gone."""
    page = visit.page
    client.aliases.set("tutor", TINY_MOE_NAME)
    with client.session() as session:
        model = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=4))
        model.train_step(data=[{"input_ids": [5, 6, 7, 8]}], loss_fn="cross_entropy", lr=1e-3)
        saved = model.save_weights("shown", mode="inference")
    visit.sign_in(stack.base_url, client.api_key)
    page.get_by_role("navigation").get_by_text("Checkpoints").click()
    visit.check()
    page.get_by_role("link", name="shown", exact=True).click()
    page.get_by_label("Alias").fill("tutor")
    visit.check()
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_text("Answers for")).to_be_visible()
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat:

        def version() -> str:
            messages: list[Any] = [{"role": "user", "content": "1+1="}]
            asked = chat.chat.completions.with_raw_response
            answer = asked.create(model="tutor", messages=messages, max_tokens=2)
            return answer.headers["x-river-policy-version"]

        assert version() == saved.policy_version
        expect(page.get_by_text("1 engine", exact=False).first).to_be_visible()
        page.get_by_role("navigation").get_by_text("Checkpoints").click()
        page.get_by_role("button", name="Roll back tutor").click()
        expect(page.get_by_role("row", name="tutor")).to_contain_text(TINY_MOE_NAME)
        assert version() == TINY_MOE_NAME
    page.get_by_role("link", name="shown", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("link", name="adapter_config.json").click()
    assert '"LORA"' in download.value.path().read_text()
    page.get_by_label("for days from now").check()
    page.get_by_label("Days", exact=True).fill("7")
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_text("in 6 d").first).to_be_visible()
    visit.check()
    visit.check_phone()
    page.get_by_label("forever").check()
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_text("never").first).to_be_visible()
    page.get_by_label("to confirm").fill("shown")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("There is no checkpoint yet")).to_be_visible()
    visit.check()


def test_keys_are_made_and_revoked(visit: Visit, stack: StackInfo) -> None:
    """A key made in the browser answers until it is revoked there; then it is 401."""
    page = visit.page
    visit.sign_in(stack.base_url, stack.admin_key)
    page.get_by_role("navigation").get_by_text("Keys").click()
    visit.check()
    name = f"shown-{visit.page.evaluate('Date.now()')}"
    page.get_by_label("Name of the key").fill(name)
    page.get_by_role("button", name="Make key").click()
    secret = page.locator("#secret").inner_text()
    visit.check()

    def models() -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=secret, max_retries=0)

    with models() as chat:
        assert chat.models.list().data
        page.get_by_role("row", name=name).get_by_role("button").click()
        expect(page.get_by_role("row", name=name)).to_contain_text("revoked")
        with pytest.raises(openai.AuthenticationError):
            chat.models.list()
    visit.check()


def test_the_csv_is_what_the_command_writes(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """Usage by day is shown and downloaded as `river usage --csv` has it; engines are there for admins."""
    page = visit.page
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat:
        messages: list[Any] = [{"role": "user", "content": "2+2="}]
        chat.chat.completions.create(model=TINY_MOE_NAME, messages=messages, max_tokens=4)
    deadline = time.monotonic() + 20
    while not client.usage_rows() and time.monotonic() < deadline:
        time.sleep(0.2)
    visit.sign_in(stack.base_url, client.api_key)
    page.get_by_role("navigation").get_by_text("Usage").click()
    expect(page.locator("svg.bars rect").first).to_be_visible()
    visit.check()
    with page.expect_download() as download:
        page.get_by_role("link", name="This month as CSV").click()
    shown = download.value.path().read_text()
    command = [sys.executable, "-m", "river_client.cli", "usage", "--by", "day", "--csv"]
    environment = {"RIVER_API_KEY": client.api_key, "RIVER_BASE_URL": stack.base_url}
    written = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert shown.splitlines() == written.stdout.splitlines()
    assert TINY_MOE_NAME in shown


def test_engines_are_shown(visit: Visit, stack: StackInfo) -> None:
    """An admin sees every engine and trainer."""
    visit.sign_in(stack.base_url, stack.admin_key)
    visit.page.get_by_role("navigation").get_by_text("Engines").click()
    expect(visit.page.get_by_text("serving").first).to_be_visible()
    visit.check()
