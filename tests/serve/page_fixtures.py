"""Debian's Chromium for the tests of the page; it watches what no page may do.

A test module takes the fixtures with `pytest_plugins = ("page_fixtures",)`.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

# Without a display, as root, and without anything that asks the network by itself.
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser. In CI it has to be there."""
    path = shutil.which("chromium")
    if path is None:
        reason = "there is no Chromium: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser, tmp_path: Path) -> Iterator[Visit]:
    """A function that opens the page at an address, in a window of some width.

    In the end: no script failed, nothing was asked of another origin, and a screenshot is kept.
    """
    pages: list[tuple[str, Page]] = []
    asked: list[tuple[str, str]] = []
    troubles: list[str] = []

    def visit(address: str, *, width: int = 1280, scheme: str = "light") -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: _note(troubles, message.type, message.text))
        page.on("request", lambda request: asked.append((address, request.url)))
        page.goto(address)
        pages.append((f"{len(pages)}-{width}-{scheme}", page))
        return page

    yield visit
    for name, page in pages:
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        page.context.close()
    assert not troubles
    assert asked and all(urlsplit(url)[:2] == urlsplit(home)[:2] for home, url in asked)


def _note(troubles: list[str], kind: str, text: str) -> None:
    # What the browser says of an answer other than 2xx is no fault of the page.
    if kind == "error" and not text.startswith("Failed to load resource"):
        troubles.append(text)


def add(page: Page, words: str, name: str | None = None) -> None:
    """Search for an item and take what is suggested first, which has that name."""
    page.get_by_label("Add an item").fill(words)
    option = page.get_by_role("option").first
    expect(option).to_contain_text(name or words)
    page.get_by_label("Add an item").press("Enter")


def recommend(page: Page) -> list[Locator]:
    """Press the button; the cards, when all of them are whole."""
    page.get_by_role("button", name="Recommend").click()
    expect(page.locator(".run").first).to_be_attached()
    expect(page.locator(".run.waiting")).to_have_count(0)
    return page.locator(".run").all()


def names(within: Page | Locator, where: str) -> list[str]:
    """Names of the items in a list."""
    return within.locator(f"{where} .name").all_text_contents()
