"""A run that learns from feedback, watched and stopped on the dashboard in a real browser."""

from __future__ import annotations

from typing import Any

import openai
from playwright.sync_api import expect
from support.browser import Visit

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


def test_lessons_are_watched_and_ended(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """Started by the form, it says what it waits for, counts a lesson when it has been taken, and is stopped."""
    page = visit.page
    client.aliases.set("pupil", TINY_MOE_NAME)
    with client.session(task="lessons") as session:
        model = session.create_model(TINY_MOE_NAME, lora=river.LoraConfig(rank=4))
        visit.sign_in(stack.base_url, client.api_key)
        page.get_by_role("navigation").get_by_text("Learning").click()
        expect(page.get_by_text("No run learns from feedback yet")).to_be_visible()
        visit.check()
        page.locator("select[name=run_id]").select_option(model.run_id)
        page.get_by_label("Alias whose completions").fill("pupil")
        page.get_by_label("Completions a step").fill("2")
        page.get_by_label("at most").fill("2")
        page.get_by_label("Alias whose completions").press("Enter")
        row = page.get_by_role("row", name=model.run_id)
        expect(row).to_contain_text("0 of 2 judged completions")
        visit.check()
        with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat:
            messages: list[Any] = [{"role": "user", "content": "1+1="}]
            for reward in (0.0, 1.0):
                made = chat.chat.completions.create(
                    model="pupil", messages=messages, max_tokens=4, store=True
                )
                client.feedback(made.id, reward=reward)
                if not reward:
                    expect(row).to_contain_text("1 of 2 judged completions")
        lessons, completions, last_step = (row.locator("td.n").nth(at) for at in range(3))
        expect(lessons).to_have_text("1", timeout=30_000)
        expect(completions).to_have_text("2")
        expect(last_step).to_have_text("1")
        page.get_by_role("button", name=f"Stop {model.run_id}").click()
        expect(row).to_contain_text("stopped")
        expect(page.get_by_role("button", name=f"Start again {model.run_id}")).to_be_visible()
        visit.check()
        visit.check_phone()
    assert client.learning.get(model.run_id).status == "stopped"
