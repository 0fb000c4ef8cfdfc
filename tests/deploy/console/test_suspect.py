"""What the guard holds stands on the page with its rollback a step from its plan: in a browser, on a real registry."""

from __future__ import annotations

import os
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from deploy.serving.requests.access import OPERATE, READ, tokens_in
from tests.deploy.console.conftest import Reached
from tests.deploy.operate.test_control import hold
from tests.deploy.operating import Operator

CHROMIUM = shutil.which("chromium")
PATIENCE_MS = 60_000.0


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the Kafka client leaves its sockets to the collector
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_what_the_guard_holds_is_shown_and_gone_back_from_without_its_clicks(
    console: Reached, operator: Operator
) -> None:
    hold(operator)
    token = tokens_in(console.settings.tokens_dir / OPERATE)[0]
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.add_init_script(f"sessionStorage.setItem('springtide-token', '{token}')")
        page.goto(console.url)
        # What a command would write between backticks is shown as code.
        page.get_by_role("button", name="Token: operate").click()
        asking = page.locator("#asking")
        expect(asking.locator("code")).to_have_text([OPERATE, READ])
        expect(asking).not_to_contain_text("`")
        asking.get_by_role("button", name="Cancel").click()
        suspect = page.locator("#suspect")
        expect(suspect).to_contain_text("share of one user is 30.5, usually 1.00 (user). Answers stay at version 3")
        expect(suspect).to_contain_text("1:400-479")
        # Everything else is away, and the page says so.
        expect(page.locator("#troubles li").first).to_be_visible()
        expect(page.locator("#stages li[data-state=away]")).to_have_count(6)
        reasons = page.locator("#plots .reason")
        expect(reasons).to_have_count(9)
        expect(reasons.first).to_contain_text("stream and trainer do not answer")
        # A problem leads to its section of the runbook, which the console has itself.
        expect(page.locator("#problems-table")).to_contain_text("nothing answers")
        link = page.locator("#troubles").get_by_role("link", name="what to do").first
        assert link.get_attribute("href") == "runbook.html#a-process-cannot-run"
        link.click()
        expect(page.locator("h2#a-process-cannot-run")).to_be_in_viewport()
        page.go_back()
        suspect.get_by_role("button", name="Go back without these clicks").click()
        go = page.locator("#go")
        expect(go).to_contain_text("version 3")
        expect(go).to_contain_text("fast: the trainer learns again")
        expect(go).to_contain_text("partition 1 offsets 400-479: 80 examples")
        go.get_by_label("Type 3 to confirm").fill("3")
        go.get_by_label("Reason").fill("a flood")
        go.get_by_role("button", name="Roll back").click()
        expect(page.locator("#said")).to_contain_text("epoch 2 starts from version 3")
        expect(suspect).to_be_hidden()
        browser.close()
    control = operator.registry.control()
    assert control is not None and control.held is None and control.serving.then_follow
    assert [one.mask.offsets for one in control.masks] == [((0x2A, 1, 400, 480),)]
