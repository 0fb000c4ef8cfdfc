"""How current a host is: what it misses makes it old, and that nothing comes does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.serving.applier import LogCheck
from deploy.serving.host_files import CLICKS, NOTE_MS, VERSIONS, Currency
from state.layout import CURRENT
from tests.deploy.serving.http_api.test_app import app_of, ask
from tests.deploy.serving.stocked import NOW_MS, Stores
from tests.deploy.serving.test_clicks import LOG, Following, append, record, written


def test_a_moment_is_noted_at_most_once_a_second_whatever_the_clock_does(tmp_path: Path) -> None:
    notes, path = Currency(tmp_path), tmp_path / f"{CURRENT}.{VERSIONS}"

    def noted_ms(at_ms: int) -> int:
        notes.note(VERSIONS, at_ms)
        return path.stat().st_mtime_ns // 1_000_000

    assert noted_ms(NOW_MS) == NOW_MS
    assert noted_ms(NOW_MS + NOTE_MS - 1) == NOW_MS
    assert noted_ms(NOW_MS + NOTE_MS) == NOW_MS + NOTE_MS
    assert noted_ms(NOW_MS - 5_000) == NOW_MS - 5_000


def test_what_is_missed_for_a_minute_is_degraded_and_still_ready(stores: Stores) -> None:
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0])
    notes = Currency(stores.settings.serving_dir)
    for part in (VERSIONS, CLICKS):
        notes.note(part, NOW_MS)
    now[0] += 59_000
    assert "degraded" not in ask(app, "GET", "/readyz").json()
    now[0] += 16_000
    notes.note(CLICKS, now[0])
    found = ask(app, "GET", "/readyz")
    assert found.status_code == 200 and found.json()["ready"]
    assert found.json()["degraded"] == {VERSIONS: "what came in the last 75 s is not all taken up"}
    app.close()


def test_readiness_ends_with_currency_and_comes_again(stores: Stores) -> None:
    now = [NOW_MS]
    app = app_of(stores, lambda: now[0], serving=replace(stores.settings.serving, max_age_s=30.0))
    assert ask(app, "GET", "/readyz").status_code == 503
    notes = Currency(stores.settings.serving_dir)
    for part in (VERSIONS, CLICKS):
        notes.note(part, NOW_MS)
    assert ask(app, "GET", "/readyz").json()["ready"]
    now[0] += 31_000
    notes.note(VERSIONS, now[0])
    old = ask(app, "GET", "/readyz")
    assert (old.status_code, old.json()["version"], old.json()["histories"]) == (503, True, False)
    assert "serving.max_age_s" in old.json()["error"]
    # Answers go on: who asks may prefer old ones to none.
    assert ask(app, "GET", "/v1/profiles/ann").status_code == 200
    app.close()


@pytest.mark.parametrize("transactional_id", [None, "stream"])
def test_histories_are_current_once_they_hold_what_the_log_held(tmp_path: Path, transactional_id: str | None) -> None:
    """Also behind a transaction's marker, which is no record; and what came later is not waited for."""
    log = written(record(0, 5))
    following, check = Following(tmp_path / "histories", log), LogCheck(1000)
    with log.writer(transactional_id) as writer:
        if transactional_id is None:
            writer.send(LOG, 0, None, record(5, 10))
        else:
            with writer.transaction():
                writer.send(LOG, 0, None, record(5, 10))
    ends = {partition: end for partition, (_, end) in log.topics().ends(LOG, committed_only=True).items()}
    assert check.due(5_000)
    check.asked(5_000, ends)
    assert not check.due(90_000) and check.reached(following.follower.positions) is None
    following.drain()
    append(log, record(10, 15))
    assert check.reached(following.follower.positions) == 5_000
    assert not check.due(5_500) and check.due(6_000)
