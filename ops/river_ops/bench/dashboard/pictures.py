"""Pictures of every page in Chromium: light and dark, on a desktop and on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from playwright.sync_api import ViewportSize, sync_playwright

from river_ops.chromium import ARGUMENTS, ensure_chromium

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
SCREENS: Mapping[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 900},
    "phone": {"width": 390, "height": 844},
}
SETTLED_MS = 1200


def take_pictures(base_url: str, key: str, pages: Mapping[str, str], folder: Path) -> int:
    """Writes `<page>-<scheme>-<screen>.png` for each of `pages`, a path by its name, and the sign-in page.

    Raises:
        ChromiumMissingError: there is no browser.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=ensure_chromium(), args=list(ARGUMENTS)
        )
        for scheme in SCHEMES:
            for screen, size in SCREENS.items():
                context = browser.new_context(color_scheme=scheme, viewport=size)
                page = context.new_page()
                page.goto(f"{base_url}/admin/sign-in")
                page.screenshot(path=folder / f"sign-in-{scheme}-{screen}.png")
                page.get_by_label("API key").fill(key)
                page.get_by_role("button", name="Sign in").click()
                page.wait_for_url("**/admin")
                for name, path in pages.items():
                    page.goto(base_url + path)
                    page.wait_for_timeout(SETTLED_MS)
                    page.screenshot(path=folder / f"{name}-{scheme}-{screen}.png", full_page=True)
                    taken += 1
                context.close()
        browser.close()
    return taken
