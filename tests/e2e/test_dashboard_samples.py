"""Samples that a run logs, read on its page in a real browser."""

from __future__ import annotations

from playwright.sync_api import expect
from support.browser import Visit

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo

EVIL = "<script>document.title = 'taken over'</script><|im_end|>"


def test_what_a_run_says_is_read_by_step_and_reward(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """From the run's page to its samples, to those of a step with a reward, to a long one in full; text is text."""
    page = visit.page
    with client.session() as session:
        model = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=4))
        visit.sign_in(stack.base_url, client.api_key)
        page.goto(f"{stack.base_url}/admin/runs/{model.run_id}/samples")
        expect(page.get_by_text("This run has no samples yet")).to_be_visible()
        visit.check()
        drawn: list[list[river.Sample]] = []
        for step in range(3):
            prompts = [f"{step} + 1 =", f"{EVIL} {step}"]
            drawn = model.sample(prompts=prompts, num_samples=2, max_tokens=6)
            logged = model.log_samples(prompts, drawn, [[0.0, 1.0], [step, -1.0]])
            assert logged.kept == 2
            model.train_step(data=[{"input_ids": [5, 6, 7]}], loss_fn="cross_entropy", lr=1e-3)
        model.log_samples(["long"], [["beginning " + "word " * 200 + "the end"]], step=9)
        page.goto(f"{stack.base_url}/admin/runs/{model.run_id}")
        page.get_by_role("link", name="Read the samples").click()
        samples = page.locator(".sample")
        expect(samples).to_have_count(7)
        visit.check()
        expect(page.get_by_text("the end")).to_be_hidden()
        samples.first.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_text("the end")).to_be_visible()
        visit.check_phone()
        page.get_by_label("Step").select_option("2")
        page.get_by_label("Reward at least").fill("0.5")
        page.get_by_label("Reward at most").fill("1.5")
        page.get_by_role("button", name="Show").click()
        expect(samples).to_have_count(1)
        expect(samples.first).to_contain_text("2 + 1 =")
        assert samples.first.locator(".completion .text").inner_text() == drawn[0][1].text
        expect(samples.first).to_contain_text("1 more without")
        page.goto(f"{stack.base_url}/admin/runs/{model.run_id}/samples?step=1")
        expect(page.get_by_text(f"{EVIL} 1", exact=True)).to_be_visible()
        assert "taken over" not in page.title()
        # What is logged meanwhile is told, and moves nothing.
        model.log_samples(["new"], [["x"]], step=12)
        expect(page.get_by_text("up to step 12")).to_be_visible()
        expect(samples).to_have_count(2)
        visit.check()
    found = client.runs.samples(model.run_id, step=9)
    assert [one.prompt for one in found.samples] == ["long"]
