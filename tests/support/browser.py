"""A window of a real browser on the dashboard, which remembers what went wrong in it."""

from __future__ import annotations

from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, ViewportSize, expect

from river_ops.settings import StackInfo

SERIOUS = ("serious", "critical")
PHONE = ViewportSize(width=390, height=844)
DESKTOP = ViewportSize(width=1280, height=900)


class Visit:
    """A page of a browser that remembers what went wrong and whom it asked."""

    def __init__(self, page: Page, stack: StackInfo) -> None:
        self.page = page
        self._host = urlsplit(stack.base_url).netloc
        self.problems: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "data" and parts.netloc != self._host:
            self.problems.append(f"asked {url}")

    def sign_in(self, base_url: str, key: str) -> None:
        self.page.goto(f"{base_url}/admin")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("heading", name="Overview")).to_be_visible()

    def check(self) -> None:
        """Nothing serious for those who see, hear or touch otherwise; nothing on the console."""
        found = Axe().run(self.page).response["violations"]
        serious = [(each["id"], each["help"]) for each in found if each["impact"] in SERIOUS]
        assert serious == [], self.page.url
        assert self.problems == [], self.page.url

    def check_phone(self) -> None:
        """On a phone, the page is no wider than the screen, whatever scrolls in a box of its own."""
        self.page.set_viewport_size(PHONE)
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], self.page.url
        self.check()
        self.page.set_viewport_size(DESKTOP)
