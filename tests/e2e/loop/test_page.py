"""The page in a browser, against the running loop: it moves, looks a profile up, and is steered by keyboard alone."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Locator, Page, ViewportSize, expect, sync_playwright

from deploy.serving.requests.access import OPERATE, tokens_in
from tests.e2e.loop.test_rollback import served
from tests.e2e.running import Loop, until

CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000.0
FLOOD = 200
SMALL_TARGETS = """
[...document.querySelectorAll('a, button, input, select, summary')]
  .filter((one) => one.checkVisibility() && !one.matches('.skip'))
  .map((one) => [one.textContent || one.name, one.getBoundingClientRect()])
  .filter(([, box]) => box.width < 24 || box.height < 24)
  .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)
"""
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
    # Chromium without a graphics card draws each frame of what flows with a tenth of a core.
    window: ViewportSize = {"width": 1360, "height": 900}
    context = browser.new_context(viewport=window, color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    made = context.new_page()
    asked, wrong = set[str](), list[str]()
    made.on("request", lambda request: asked.add(request.url))
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

    def opens() -> bool:
        # The console may still be starting.
        with suppress(Error):
            return made.goto(url) is not None
        return False

    until(opens, "the console does not answer")
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
    expect(page.locator("#snapshots-told")).to_contain_text("The newest is")

    page.get_by_role("textbox", name="User", exact=True).focus()
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


def test_screenshots_are_taken_on_a_desktop_and_on_a_phone_where_every_control_is_reached(
    page: Page, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    expect(page.locator("#plots canvas").first).to_be_visible()
    if "SCREENSHOTS" in os.environ:
        # The README's picture shows curves of two minutes.
        page.wait_for_timeout(120_000)
    for name, width, height in (("console", 1280, 800), ("console-phone", 360, 740)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(200)
        assert len(page.screenshot(path=folder / f"{name}.png")) > 20_000
        # WCAG 2.5.8: targets of at least 24 px. A radio button's or a checkbox's label belongs to it.
        small = page.evaluate(SMALL_TARGETS)
        assert small == [], f"{width} wide"
        for button in ("Pin", "Go back"):
            # The table is drawn again each second, and a button that is replaced meanwhile has no box.
            found = page.locator("#versions-table").get_by_role("button", name=button).first
            box = until(found.bounding_box, f"{button} is not shown")
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, (button, width)


def press_until(page: Page, key: str, wanted: Locator) -> None:
    """Presses a key, such as Tab, until an element has the focus."""
    for _ in range(200):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not reach {wanted}")


def go_to(page: Page, section: str) -> None:
    """Follows the link of the navigation to a section."""
    press_until(page, "Tab", page.get_by_role("navigation").get_by_role("link", name=section, exact=True))
    page.keyboard.press("Enter")


def poison(loop: Loop) -> str:
    """Lets a user that nobody knows flood the clicks of one item, and returns the user, once the trainer has learned from it."""
    user = f"visitor-{random.SystemRandom().randrange(10**6)}"
    until(lambda: loop.springtide("jumps", "--minutes", "1")["clicks_before"] > 1000, "too few clicks to compare with")
    ends = loop.click([(user, "flooded", "stamps", "purchase")] * FLOOD)

    def is_learned() -> bool:
        answer = loop.profile("anyone")
        sources = answer["version"]["sources"] if answer else {}
        return all(sources.get(name, 0) >= end for name, end in ends.items())

    until(is_learned, "the flood is not learned")
    return user


def test_an_operator_finds_a_flood_on_the_page_rolls_back_without_it_and_follows_by_keyboard_alone(
    page: Page, loop: Loop
) -> None:
    culprit = poison(loop)
    # 1. Authorization.
    press_until(page, "Tab", page.locator("#token"))
    page.keyboard.press("Enter")
    page.keyboard.type(tokens_in(loop.settings.tokens_dir / OPERATE)[0])
    page.keyboard.press("Enter")
    expect(page.locator("#token")).to_have_text("Token: operate")
    # 2. The cause: the page names a user, and shows the profile.
    go_to(page, "Cause")
    press_until(page, "Tab", page.locator("#jumps input"))
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    expect(page.locator("#jumps-told")).to_be_focused()
    found = page.locator("#jumps-table tbody tr", has=page.get_by_role("cell", name="user", exact=True)).first
    name = found.locator("td").nth(1).inner_text()
    plan = found.get_by_role("button", name=re.compile("Plan without this user"))
    press_until(page, "Tab", found.get_by_role("button", name=re.compile("Show profile")))
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_contain_text(f"{name} is known")
    # 3. The plan, which changes nothing, leaves out the clicks on the item since then, or this user alone.
    epoch = loop.kept()[1]
    decided = len(loop.springtide("history", "--all"))
    item = page.locator("#jumps-table tbody tr", has=page.get_by_role("cell", name="item", exact=True)).first
    press_until(page, "Tab", item.get_by_role("button", name=re.compile("Plan without this item")))
    page.keyboard.press("Enter")
    expect(page.locator("#go h3")).to_be_focused()
    expect(page.locator("#go")).to_contain_text(re.compile(f"item flooded, .* to .*: {FLOOD} examples of 1 user"))
    go_to(page, "Cause")
    press_until(page, "Tab", plan)
    page.keyboard.press("Enter")
    expect(page.locator("#go h3")).to_be_focused()
    expect(page.locator("#go")).to_contain_text("fast: the trainer learns again")
    expect(page.locator("#go")).to_contain_text(f"all clicks of 1 user: {FLOOD} examples of 1 user")
    assert len(loop.springtide("history", "--all")) == decided
    good = re.findall(r"Type (\d+) to confirm", page.locator("#go").inner_text())[0]
    # 4. Confirmed by its number, with a reason and a name.
    for typed in (good, "a flood", "ann"):
        page.keyboard.press("Tab")
        page.keyboard.type(typed)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text(f"epoch {epoch + 1} starts from version {good}")
    until(lambda: served(loop) == (int(good), epoch), f"version {good} does not answer")
    newest = loop.springtide("history")[-1]
    assert (newest["action"], newest["reason"], newest["actor"]) == ("rollback", "a flood", "ann (console)")
    expect(page.locator("#held")).to_contain_text("pinned by an operator")
    expect(page.locator("#restarted")).to_contain_text(f"measured again from version {good} on")
    # 5. Answers follow again.
    go_to(page, "Steer")
    press_until(page, "Tab", page.get_by_role("button", name="Follow", exact=True))
    page.keyboard.press("Enter")
    page.keyboard.type("it is left out")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("follow")
    until(lambda: served(loop)[1] == epoch + 1, "answers do not follow into the new epoch")
    assert loop.springtide("history")[-1]["reason"] == "it is left out"
    # It was the one, and it is gone.
    assert name == culprit
    assert not [one for one in loop.springtide("jumps", "--minutes", "1")["users"] if one["name"] == culprit]
    log = (loop.settings.logs_dir / "console.log").read_text()
    assert culprit not in log and USER not in log


def test_axe_finds_nothing_grave_in_light_in_dark_and_on_a_phone(page: Page) -> None:
    page.get_by_role("textbox", name="User", exact=True).fill(USER)
    page.keyboard.press("Enter")
    expect(page.locator("#found .reasons li").first).to_be_visible()
    for scheme, width in (("light", 1360), ("dark", 390)):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.set_viewport_size({"width": width, "height": 844})
        found = Axe().run(page).response
        grave = [(one["id"], one["nodes"][0]["target"]) for one in found["violations"] if one["impact"] in GRAVE]
        assert (grave, len(found["passes"]) > 20) == ([], True), (scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, f"{width} wide, it does not fit"
