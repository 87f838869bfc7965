"""What admins do in a real browser: keys rotated and limited, prices tried out and set, discounts, the audit log."""

from __future__ import annotations

import csv
import re
import uuid
from collections.abc import Callable

import openai
import pytest
from playwright.sync_api import expect
from support.browser import Visit

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


def _ask(stack: StackInfo, secret: str) -> str:
    """A completion with a key."""
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=secret, max_retries=0) as client:
        answer = client.completions.create(model=TINY_MOE_NAME, prompt="1+1=", max_tokens=2)
    return answer.choices[0].text


def test_a_key_is_rotated_and_limited(visit: Visit, stack: StackInfo, client: river.Client) -> None:
    """The new secret works and the old one does until it is told to end; a limit set in the browser is enforced."""
    page = visit.page
    with river.Client(api_key=stack.admin_key, base_url=stack.base_url) as admin:
        tenant = client.credit.show().tenant
        (key,) = admin.admin.keys(tenant)
        visit.sign_in(stack.base_url, stack.admin_key)
        page.get_by_role("navigation").get_by_text("Keys", exact=True).click()
        page.get_by_role("link", name=key.prefix).first.click()
        visit.check()
        page.get_by_label("The old secret goes on for").select_option("1 hour")
        page.get_by_role("button", name="Rotate key").click()
        secret = page.locator("#secret").inner_text()
        expect(page.get_by_text("The old one goes on until")).to_be_visible()
        visit.check()
        assert isinstance(_ask(stack, secret), str)
        assert isinstance(_ask(stack, client.api_key), str)
        page.get_by_label("The old secret goes on for").select_option(value="0")
        page.get_by_role("button", name="Rotate key").click()
        expect(page.get_by_text("The old one has ended.")).to_be_visible()
        last = page.locator("#secret").inner_text()
        for ended in (secret, client.api_key):
            with pytest.raises(openai.AuthenticationError):
                _ask(stack, ended)
        page.get_by_label("Requests a minute").fill("often")
        page.get_by_role("button", name="Set limits").click()
        expect(page.get_by_role("alert")).to_contain_text("is no whole number")
        expect(page.get_by_label("Requests a minute")).to_have_value("often")
        assert page.get_by_label("Requests a minute").get_attribute("aria-invalid") == "true"
        # The answer is a 422, which a browser writes to its console.
        assert all("422" in problem for problem in visit.problems)
        visit.problems.clear()
        page.get_by_label("Requests a minute").fill("1")
        page.get_by_role("button", name="Set limits").click()
        expect(page.get_by_label("Requests a minute")).to_have_value("1")
        _ask(stack, last)
        with pytest.raises(openai.RateLimitError):
            _ask(stack, last)
        expect(page.get_by_role("heading", name="Last used").locator("..")).to_contain_text("ago")
        visit.check_phone()


def test_a_price_is_set_with_the_keyboard(visit: Visit, stack: StackInfo) -> None:
    """Wrong, it is told beside the field; tried out, it is not set; set, it is in force and the one before is over."""
    page, model = visit.page, f"e2e/{uuid.uuid4().hex[:8]}"
    visit.sign_in(stack.base_url, stack.admin_key)
    page.get_by_role("navigation").get_by_text("Prices").click()
    visit.check()
    page.get_by_role("link", name="New price").click()

    def type_price(usd: str) -> None:
        page.locator("#price-model").focus()
        for text in (model, None, "1024", usd):  # The kind stays what it is.
            if text is not None:
                page.keyboard.press("ControlOrMeta+a")
                page.keyboard.type(text)
            page.keyboard.press("Tab")

    type_price("cheap")
    page.keyboard.press("Enter")  # In a form, it is the first button: what it would cost.
    expect(page.get_by_role("alert")).to_contain_text("'cheap' is no decimal number")
    visit.problems.clear()
    visit.check()
    type_price("2.5")
    page.get_by_role("button", name="Show what it would cost").press("Enter")
    expect(page.locator("#preview")).to_contain_text("$2.50")
    visit.check()
    with river.Client(api_key=stack.admin_key, base_url=stack.base_url) as admin:
        assert not [one for one in admin.prices() if one.model == model]
        for usd in ("2.5", "3"):
            type_price(usd)
            page.get_by_role("button", name="Set price").press("Enter")
            row = page.get_by_role("region", name="Prices in force").get_by_role("row", name=model)
            expect(row).to_contain_text(f"${usd}")
        prices = [one.usd_per_million for one in admin.prices() if one.model == model]
        assert prices == ["2.5", "3"]
    page.goto(f"{stack.base_url}/admin/prices?model={model}")
    expect(page.get_by_role("region", name="Prices before")).to_contain_text("$2.50")
    visit.check_phone()


def test_a_discount_is_given_and_seen(
    visit: Visit, stack: StackInfo, new_client: Callable[[], river.Client]
) -> None:
    """Its tenant sees it, by the API and on its own page, which has no forms."""
    page, client = visit.page, new_client()
    tenant = client.credit.show().tenant
    visit.sign_in(stack.base_url, stack.admin_key)
    page.goto(f"{stack.base_url}/admin/prices")
    page.get_by_label("Tenant").select_option(value=tenant)
    page.get_by_label("Off the price, %").fill("12.5")
    page.get_by_role("button", name="Set discount").click()
    expect(page.get_by_role("region", name="All discounts")).to_contain_text("12.5 %")
    visit.check()
    assert [one.percent for one in client.discounts()] == ["12.5"]
    page.get_by_role("button", name="Sign out").click()
    visit.sign_in(stack.base_url, client.api_key)
    page.get_by_role("navigation").get_by_text("Prices").click()
    expect(page.get_by_role("region", name="All discounts")).to_contain_text("12.5 %")
    expect(page.get_by_role("button", name="Set price")).to_have_count(0)
    visit.check()


def test_the_audit_log_is_looked_through(
    visit: Visit, stack: StackInfo, client: river.Client
) -> None:
    """A tenant's own promotion is there; filters are in the address, and the CSV has what the page shows."""
    page = visit.page
    client.aliases.set("tutor", TINY_MOE_NAME)
    visit.sign_in(stack.base_url, client.api_key)
    page.get_by_role("navigation").get_by_text("Audit").click()
    table = page.get_by_role("region", name="Audit log")
    expect(table.get_by_role("row", name="aliases.put")).to_contain_text("tutor")
    visit.check()
    page.get_by_label("Action").select_option("aliases.put")
    page.get_by_role("button", name="Show").click()
    expect(page).to_have_url(re.compile("action=aliases.put"))
    expect(table.get_by_role("row")).to_have_count(2)
    with page.expect_download() as download:
        page.get_by_role("link", name="All of these as CSV").click()
    (line,) = csv.DictReader(download.value.path().read_text().splitlines())
    assert (line["action"], line["subject"], line["through"]) == ("aliases.put", "tutor", "api")
    assert line["key_tenant"] == client.credit.show().tenant
    page.get_by_label("Action").select_option("keys.revoke")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("Nothing was changed that these filters find.")).to_be_visible()
    visit.check_phone()
