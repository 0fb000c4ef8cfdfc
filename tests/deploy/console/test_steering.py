"""The console plans and does what commands do, and shows the suspect clicks of a held update."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from deploy.serving.requests.access import OPERATE, READ, tokens_in
from state.events.identity import load_salt
from tests.deploy.console.conftest import Reached
from tests.deploy.operate.test_control import hold
from tests.deploy.operating import BOT, Operator, draft, files

SKIP = {"skip": ["1:360-399"]}


def planned(client: httpx.Client, **wanted: Any) -> dict[str, Any]:
    answer = client.post("/api/plan", json=wanted)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_plan_is_that_of_a_dry_run_and_changes_nothing(operating: httpx.Client, operator: Operator) -> None:
    found = planned(operating, **SKIP)
    assert len(operator.registry.controls()) == 1
    assert (found["generation"], found["plan"]["to"], found["plan"]["masked"]) == (1, 3, 40)
    assert found["plan"]["mask"]["offsets"][0][1:] == [1, 360, 400]


def test_a_plan_leaves_out_users_and_no_answer_names_them(
    operating: httpx.Client, operator: Operator, tmp_path: Path
) -> None:
    found = planned(operating, pseudonyms=[f"{BOT:016x}"])
    assert (found["plan"]["masked"], found["plan"]["users"], found["plan"]["mask"]["users"]) == (56, 1, 1)
    # An id is looked for by its pseudonym; this user never clicked.
    salt = load_salt(tmp_path / "salt")
    operator.registry.publish(replace(draft(6, 5), salt=salt.fingerprint), files())
    answer = operating.post("/api/plan", json={"users": ["somebody"]})
    assert (answer.status_code, "no row of the training log" in answer.json()["error"]) == (400, True)
    assert "somebody" not in answer.text
    assert planned(operating, users=["somebody"], to=3, skip=SKIP["skip"])["plan"]["mask"]["users"] == 1


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_what_was_planned_is_done_with_reason_and_name(operating: httpx.Client, operator: Operator, mode: str) -> None:
    found = planned(operating, **SKIP, mode=mode)
    wanted = {"plan": found["digest"], "confirm": 3, "reason": " bots clicked ", "name": "ann"}
    done = operating.post("/api/rollback", json=wanted).json()
    assert (done["changed"], done["plan"]["to"], done["plan"]["masked"]) == (True, 3, 40)
    control = operator.registry.controls()[-1]
    assert (control.action, control.base, control.mode, control.epoch) == ("rollback", 3, mode, 2)
    assert (control.reason, control.actor) == ("bots clicked", "ann (console)")
    assert operating.get("/api/masks").json()[0]["rows"] == 40
    assert operating.get("/api/history").json()[-1]["outcome"]["planned"]["masked"] == 40


def test_a_plan_that_was_overtaken_is_refused_and_nothing_is_changed(
    operating: httpx.Client, operator: Operator
) -> None:
    found = planned(operating, to=3)
    operator("hold", "--reason", "somebody else was first")
    answer = operating.post("/api/rollback", json={"plan": found["digest"], "confirm": 3, "reason": "bots"})
    assert answer.status_code == 409
    assert "somebody else was first" in answer.json()["error"]
    assert [one.action for one in operator.registry.controls()] == ["start", "hold"]
    # Shown anew, it is done.
    found = planned(operating, to=3)
    answer = operating.post("/api/rollback", json={"plan": found["digest"], "confirm": 3, "reason": "bots"})
    assert answer.status_code == 200 and operator.registry.controls()[-1].action == "rollback"


def test_only_what_was_shown_is_done_and_only_as_it_is_confirmed(operating: httpx.Client, operator: Operator) -> None:
    digest = planned(operating, to=3)["digest"]
    for plan, confirm in (("0" * 64, 3), (digest, 4)):
        answer = operating.post("/api/rollback", json={"plan": plan, "confirm": confirm, "reason": "bots"})
        assert answer.status_code == 409, answer.text
    assert len(operator.registry.controls()) == 1


def test_relative_times_mean_what_they_meant_when_the_plan_was_shown(
    operating: httpx.Client, operator: Operator
) -> None:
    found = planned(operating, minutes=4)
    operating.post("/api/rollback", json={"plan": found["digest"], "confirm": found["plan"]["to"], "reason": "bots"})
    (mask,) = operator.registry.controls()[-1].masks
    assert mask.times is not None
    assert [list(mask.times)] == found["plan"]["mask"]["times"]


def test_each_verb_is_a_generation_or_changes_nothing(operating: httpx.Client, operator: Operator) -> None:
    generation = 1
    for verb, back in (("hold", "release"), ("pause", "resume"), ("pin", "follow")):
        for one, changes in ((back, False), (verb, True), (verb, False), (back, True)):
            more = {"version": 2} if one == "pin" else {}
            asked = {"generation": generation, "reason": f"to {one}", **more}
            assert operating.post(f"/api/{one}", json=asked).json()["changed"] is changes, one
            if changes:
                generation += 1
                control = operator.registry.controls()[-1]
                assert (control.action, control.reason, control.generation) == (one, f"to {one}", generation)
                again = operating.post(f"/api/{one}", json=asked)
                assert again.status_code == 409, "what was shown is not so any more"
    assert len(operator.registry.controls()) == generation == 7


def test_a_mask_is_lifted(operating: httpx.Client, operator: Operator) -> None:
    operator("rollback", *("--skip", "1:360-399"), "--reason", "bots")
    done = operating.post("/api/unmask", json={"generation": 2, "reason": "a campaign", "masks": [1]})
    assert done.status_code == 200 and operator.registry.controls()[-1].masks == ()
    unknown = operating.post("/api/unmask", json={"generation": 3, "reason": "x", "masks": [7]})
    assert (unknown.status_code, "no mask 7" in unknown.json()["error"]) == (409, True)


UNDOABLE: Sequence[tuple[str, dict[str, Any], int]] = (
    ("hold", {"generation": 1, "reason": "  "}, 400),
    ("hold", {"generation": 1, "reason": "two\nlines"}, 400),
    ("hold", {"generation": 1, "reason": "x" * 501}, 400),
    ("hold", {"generation": 1, "reason": "x", "name": "n" * 65}, 400),
    ("hold", {"reason": "x"}, 400),
    ("hold", {"generation": 1, "reason": "x", "force": True}, 400),
    ("pin", {"generation": 1, "reason": "x", "version": 9}, 404),
    ("plan", {"to": 9}, 404),
    ("plan", {"skip": ["--reason=x"]}, 400),
    ("plan", {"minutes": 0}, 400),
    ("plan", {}, 400),
    ("plan", {"pseudonyms": ["ann"]}, 400),
    ("plan", {"to": 5, "skip": ["1:360-399"]}, 409),
)


def test_what_cannot_be_done_says_why_and_what_to_do(operating: httpx.Client, operator: Operator) -> None:
    for path, body, status in UNDOABLE:
        answer = operating.post(f"/api/{path}", json=body)
        assert (answer.status_code, bool(answer.json()["error"]), bool(answer.json()["do"])) == (status, True, True), (
            body
        )
    assert len(operator.registry.controls()) == 1


def test_a_reason_that_looks_like_an_option_is_a_reason(operating: httpx.Client, operator: Operator) -> None:
    operating.post("/api/hold", json={"generation": 1, "reason": "--config=/etc/passwd", "name": "--output=text"})
    control = operator.registry.controls()[-1]
    assert (control.reason, control.actor) == ("--config=/etc/passwd", "--output=text (console)")


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
