"""The page in a browser, against the running loop: it moves, looks a profile up, and is steered by keyboard alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from deploy.serving.requests.access import OPERATE, tokens_in
from tests.e2e.loop.test_rollback import served
from tests.e2e.running import Loop, until

CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000.0
GRAVE = ("serious", "critical")
USER = "shopper-17"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; a page of our own needs none.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield made
        made.close()


@pytest.fixture
def page(loop: Loop, browser: Browser) -> Iterator[Page]:
    """The page as it is opened, without a token; whatever it asks is asked of the console, and nothing it does is an error."""
    loop.springtide("follow", "--reason", "a test begins")
    url = f"http://127.0.0.1:{loop.settings.console.port}/"
    context = browser.new_context(viewport={"width": 1360, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    made = context.new_page()
    asked, wrong = set[str](), list[str]()
    made.on("request", lambda request: asked.add(request.url))
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    made.goto(url)
    expect(made.locator("#versions-table tbody tr").nth(1)).to_be_visible()
    yield made
    context.close()
    assert asked and all(one.startswith(url) for one in asked)
    assert wrong == []


def stage(page: Page, name: str) -> str:
    """What the picture says of one stage in large."""
    return (
        page.locator("#stages li", has=page.get_by_role("heading", name=name, exact=True)).locator(".main").inner_text()
    )


def versions(page: Page) -> int:
    """How many versions the picture says; 0 where it says nothing now."""
    told = stage(page, "Versions").replace(",", "")
    return int(told) if told.isdigit() else 0


def test_the_picture_moves_and_a_profile_is_looked_up_with_its_reasons(page: Page, loop: Loop) -> None:
    until(lambda: re.fullmatch(r"[\d,.]+/s", stage(page, "Clicks")) and stage(page, "Clicks") != "0/s", "no clicks")
    seen = until(lambda: versions(page), "no versions")
    until(lambda: versions(page) > seen, "the picture does not move")
    expect(page.locator("#stages li.flows")).not_to_have_count(0)
    expect(page.locator("#plots canvas")).to_have_count(9)
    expect(page.locator("#segments-table")).to_contain_text("collectors")

    page.get_by_role("textbox", name="User").focus()
    page.keyboard.type(USER)
    page.keyboard.press("Enter")
    found = page.locator("#found")
    expect(found).to_contain_text(f"{USER} is known. Answered by version")
    interests = found.locator(".interests button")
    expect(interests.first).to_have_attribute("aria-pressed", "true")
    expect(found.locator(".reasons li").first).to_be_visible()
    # Another one of them is explained, by keyboard.
    other = interests.nth(1).get_attribute("data-label")
    interests.nth(1).focus()
    page.keyboard.press("Enter")
    expect(found.get_by_role("heading", name=re.compile(f"Why {other} is"))).to_be_visible()
    assert USER not in (loop.settings.logs_dir / "console.log").read_text()


def test_by_keyboard_alone_the_plan_is_shown_it_is_rolled_back_answers_turn_and_follow_again(
    page: Page, loop: Loop
) -> None:
    # 1. Who may do that.
    page.get_by_role("button", name="Enter a token").focus()
    page.keyboard.press("Enter")
    page.keyboard.type(tokens_in(loop.settings.tokens_dir / OPERATE)[0])
    page.keyboard.press("Enter")
    expect(page.locator("#token")).to_have_text("Token: operate")
    # 2. The plan, which changes nothing.
    good, epoch = loop.kept()
    decided = len(loop.springtide("history", "--all"))
    page.get_by_role("textbox", name="Version to go back to").focus()
    page.keyboard.type(str(good))
    page.keyboard.press("Enter")
    expect(page.locator("#go h3")).to_be_focused()
    expect(page.locator("#go")).to_contain_text(f"version {good}")
    assert len(loop.springtide("history", "--all")) == decided
    # 3. Confirmed by its number, with a reason and a name.
    for typed in (str(good), "odd answers", "ann"):
        page.keyboard.press("Tab")
        page.keyboard.type(typed)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text(f"epoch {epoch + 1} starts from version {good}")
    until(lambda: served(loop) == (good, epoch), f"version {good} does not answer")
    newest = loop.springtide("history")[-1]
    assert (newest["action"], newest["reason"], newest["actor"]) == ("rollback", "odd answers", "ann (console)")
    expect(page.locator("#held")).to_contain_text("pinned by an operator")
    # 4. Answers follow again.
    page.get_by_role("button", name="Follow", exact=True).focus()
    page.keyboard.press("Enter")
    page.keyboard.type("they are good")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("follow")
    until(lambda: served(loop)[1] == epoch + 1, "answers do not follow into the new epoch")
    assert loop.springtide("history")[-1]["reason"] == "they are good"


def test_axe_finds_nothing_grave_in_light_in_dark_and_on_a_phone(page: Page) -> None:
    page.get_by_role("textbox", name="User").fill(USER)
    page.keyboard.press("Enter")
    expect(page.locator("#found .reasons li").first).to_be_visible()
    for scheme, width in (("light", 1360), ("dark", 390)):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.set_viewport_size({"width": width, "height": 844})
        found = Axe().run(page).response
        grave = [(one["id"], one["nodes"][0]["target"]) for one in found["violations"] if one["impact"] in GRAVE]
        assert (grave, len(found["passes"]) > 20) == ([], True), (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{width} wide, it does not fit"
