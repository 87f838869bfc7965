"""Two models side by side in a chat on the dashboard, in a real browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect
from support.browser import Visit
from support.gateway_usage import billed

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


def saved(client: river.Client) -> list[river.Checkpoint]:
    """Two checkpoints of a new run, `early` and `late`, a step apart."""
    made: list[river.Checkpoint] = []
    with client.session() as session:
        model = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=4))
        for name in ("early", "late"):
            model.train_step(data=[{"input_ids": [5, 6, 7, 8]}], loss_fn="cross_entropy", lr=1e-3)
            made.append(model.save_weights(name, mode="inference"))
    return made


def set_tokens(page: Page, count: int) -> None:
    page.get_by_label("Answer of at most").fill(str(count))


def test_two_checkpoints_answer_side_by_side(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """Chosen in the list, both answer every prompt, by keyboard too, each with what it used and how soon it began."""
    page = visit.page
    early, late = saved(client)
    visit.sign_in(stack.base_url, client.api_key)
    page.get_by_role("navigation").get_by_text("Checkpoints").click()
    page.get_by_role("link", name="Compare early").click()
    expect(page.get_by_text("Comparing")).to_be_visible()
    visit.check()
    page.get_by_role("link", name="Compare with late").click()
    sides = page.locator("[data-model]")
    expect(sides.first.get_by_role("heading")).to_have_text(early.path)
    expect(sides.last.get_by_role("heading")).to_have_text(late.path)
    visit.check()
    set_tokens(page, 12)
    prompt = page.get_by_label("Prompt, for both")
    for turn in (1, 2):
        prompt.fill(f"What is {turn} + 1?")
        prompt.press("Enter")
        for side, checkpoint in zip(sides.all(), (early, late), strict=True):
            facts = side.get_by_role("status")
            expect(facts).to_contain_text(checkpoint.policy_version)
            expect(facts).to_contain_text("first token after")
            expect(facts).to_contain_text("answer tokens")
            expect(side.locator(".said.user")).to_have_count(turn)
            expect(side.locator(".said.assistant")).to_have_count(turn)
        expect(prompt).to_be_focused()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    visit.check()
    visit.check_phone()
    # The second question came with the conversation before it: four answers, all billed.
    assert billed(client, events=4)["completion"] > 0
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".said")).to_have_count(0)


def test_an_answer_is_stopped(visit: Visit, stack: StackInfo, client: river.Client) -> None:
    """Escape ends both answers in the middle; what was produced stays and is billed, and the conversation goes on."""
    page = visit.page
    visit.sign_in(stack.base_url, client.api_key)
    page.goto(f"{stack.base_url}/admin/chat")
    # So hot that hardly any answer ends by itself.
    set_tokens(page, 220)
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Prompt, for both").fill("Tell me everything, at length, and then again.")
    page.get_by_role("button", name="Send").click()
    for side in page.locator(".said.assistant").all():
        expect(side).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(
        page.get_by_text("Stopped; what was produced until then is billed.").first
    ).to_be_visible()
    told = billed(client, events=2)
    assert 0 < told["completion"] < 2 * 220
    set_tokens(page, 4)
    page.get_by_label("Prompt, for both").fill("And now?")
    page.get_by_label("Prompt, for both").press("Enter")
    expect(page.locator(".facts").first).to_contain_text("answer tokens")
    visit.check()


def test_what_is_wrong_is_shown(visit: Visit, stack: StackInfo, client: river.Client) -> None:
    """A side that cannot answer says why in words; the other one answers all the same."""
    page = visit.page
    visit.sign_in(stack.base_url, client.api_key)
    page.goto(f"{stack.base_url}/admin/chat?left={TINY_MOE_NAME}&right=gone<b>")
    set_tokens(page, 4)
    page.get_by_label("Prompt, for both").fill("Hello <img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".problem")).to_contain_text("gone<b>` does not exist")
    expect(page.locator(".facts").first).to_contain_text("answer tokens")
    expect(page.locator(".said.user").first).to_have_text("Hello <img src=x onerror=alert(1)>")
    # The browser itself notes an answer of 404 on its console.
    visit.problems = [text for text in visit.problems if "404" not in text]
    visit.check()
