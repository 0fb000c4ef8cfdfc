"""A rollout on the running loop: `up` answers for the trial by itself, it is told everywhere, and with the rollout its host goes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from deploy.experiments import status as experiments
from deploy.watch.address import serving_address
from state.experiments.experiment import Experiments
from state.experiments.exposure import LIVE, TRIAL
from tests.e2e.loop.test_page import CHROMIUM, PATIENCE_MS
from tests.e2e.loop.test_page import browser as browser
from tests.e2e.loop.test_trial import SCORED_S, process_of
from tests.e2e.running import ROOT, Loop, until

NAME = "among-users"
USERS = [f"one-of-a-rollout-{number}" for number in range(60)]


def words(loop: Loop, verb: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", "experiment", verb, NAME, *more, *loop.flags]


def arms(loop: Loop) -> Counter[str]:
    """How many of the users are answered by which arm."""
    found = httpx.post(str(serving_address(loop.settings, "/v1/profiles:batch")), json={"users": USERS}, timeout=60.0)
    assert found.status_code == 200, found.text
    return Counter(one.get("arm", "") for one in found.json()["profiles"])


def rolled_out(loop: Loop) -> dict[str, Any]:
    """The rollout in the status of the experiment."""
    (found,) = [one for one in experiments.reported(loop.settings) if one["name"] == NAME]
    return dict(found["rollout"])


def answers_for_it(loop: Loop) -> bool:
    """Whether a worker of the trial runs."""
    return process_of(loop, NAME, "deploy.serving.rest") is not None


@pytest.mark.nightly
def test_up_answers_for_a_trial_while_its_rollout_is_not_over(
    loop: Loop, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    loop.springtide("experiment", "start", NAME, "--set", "model.hidden=8", "--reason", "what do users say?")
    assert arms(loop) == {"": len(USERS)} and not answers_for_it(loop)
    page = None
    if CHROMIUM is not None:
        known: Browser = request.getfixturevalue("browser")
        page = known.new_page()
        page.goto(f"http://127.0.0.1:{loop.settings.console.port}/")
    log = tmp_path / "driving"
    with log.open("w") as said:
        driving = subprocess.Popen(
            words(loop, "rollout", "--steps", "50,100", "--every", "1h"),
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        # 1. Its first step begins once its host answers, and nobody is failed by it.
        until(
            lambda: arms(loop).keys() == {TRIAL, LIVE},
            lambda: f"no trial answers\n{log.read_text()}\n{loop.logs()}",
            SCORED_S,
        )
        assert answers_for_it(loop) and "among-users starting" in log.read_text()
        loop.click([(user, "lamp", "light", "purchase") for user in USERS])

        # 2. It is told: in status, on /metrics, on the page.
        def compared() -> dict[str, Any] | None:
            found = rolled_out(loop)["compared"]
            return dict(found) if found and found["arms"][TRIAL]["answers"] and found["arms"][LIVE]["answers"] else None

        found = until(compared, lambda: f"nothing is compared\n{log.read_text()}")
        assert found["arms"][TRIAL]["failures"] == 0
        (reported,) = [one for one in loop.springtide("status")["experiments"] if one["name"] == NAME]
        assert (reported["rollout"]["phase"], reported["share"]) == ("running", 0.5)
        metrics = loop.metrics("up")
        assert metrics.value("springtide_rollout_share_ratio", trial=NAME) == 0.5
        assert metrics.value("springtide_rollout_stopped", trial=NAME) == 0.0
        assert (metrics.value("springtide_rollout_answers", trial=NAME, arm=TRIAL) or 0) > 0
        if page is not None:
            expect(page.locator("#rollout-told")).to_contain_text("50.0 % of the users", timeout=PATIENCE_MS)
            expect(page.locator("#rollout-table tbody tr")).to_have_count(2, timeout=PATIENCE_MS)
            page.close()

        # 3. With it its host goes, and what that kept.
        subprocess.run(words(loop, "back", "--reason", "enough"), cwd=ROOT, check=True, capture_output=True)
        until(lambda: arms(loop) == {"": len(USERS)}, "users are still told apart")
        host = Experiments(loop.settings).folder(NAME) / "host"
        until(lambda: not answers_for_it(loop) and not host.exists(), lambda: f"its host stays\n{loop.logs()}")
        assert driving.wait(60) == 0, log.read_text()
    finally:
        driving.kill()
        driving.wait()
        # Where it failed, too: an open rollout lets no other begin.
        loop.springtide("experiment", "stop", NAME, "--reason", "enough")
    until(lambda: NAME not in Experiments(loop.settings).open(), "what it learned is not removed")
