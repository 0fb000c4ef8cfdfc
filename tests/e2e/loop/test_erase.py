"""A shopper of the running loop is erased: nobody to answers at once and after a restart, and nowhere on disk or in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from state import layout
from state.events.identity import load_salt, user_id
from tests.e2e.running import ROOT, Loop, until

USER = "erased-shopper@example.org"
WITHIN_S = 2.0


def holding(loop: Loop) -> list[dict[str, Any]]:
    """What still holds something, but for topics, which go by their retention."""
    told: list[dict[str, Any]] = loop.springtide("erase", "--status")["holding"]
    return [one for one in told if not one["where"].startswith("topic ")]


def compacted(loop: Loop) -> bool:
    line = [sys.executable, "-m", "deploy.cli", "compact", *loop.flags]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, check=False).returncode == 0
    return not holding(loop)


def having(loop: Loop) -> list[str]:
    """The files in which the id or its pseudonym stands, but for those that go by retention and the erasure's own."""
    pseudonym = user_id(load_salt(loop.settings.salt_path, create=False), USER)
    forms = [USER.encode(), pseudonym.to_bytes(8, "big"), pseudonym.to_bytes(8, "little")]
    forms += [b"%016x" % pseudonym, b"%d" % pseudonym]
    state, found = loop.settings.state_dir, []
    by_retention = {state / layout.KAFKA, loop.settings.registry_dir / layout.RECENT, state / "serving" / layout.ROWS}
    # Histories lie in memory, where a link leads.
    for folder, folders, names in os.walk(state, followlinks=True):
        folders[:] = [name for name in folders if Path(folder, name) not in by_retention]
        for path in (Path(folder, name) for name in names if not name.endswith(".erased")):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            found += [str(path.relative_to(state))] if any(form in data for form in forms) else []
    return found


def cold(loop: Loop) -> dict[str, Any] | None:
    answer = loop.profile(USER, item="book")
    return answer if answer and answer["cold_start"] and not answer["attributes"].get("age_band") else None


def test_an_erased_shopper_is_nobody_within_two_seconds_and_for_good(loop: Loop, tmp_path: Path) -> None:
    loop.springtide("follow", "--reason", "a test begins")
    loop.know("user", USER, {"age_band": "25-34", "memberLevel": "gold"})
    until(lambda: (loop.profile(USER) or {}).get("attributes", {}).get("age_band"), "the attributes are not known")
    ends = loop.click([(USER, "book", "reading", "purchase")] * 9 + [(USER, "lamp", "light", "favorite")])
    known = loop.answer_trained_on(USER, ends)
    assert known["known"] and known["features"]["purchase.count_7d"] == 9
    until(lambda: having(loop), "the shopper is nowhere on disk before")

    # 1. Erased, by a file that is no part of the loop.
    (tmp_path / "asked.txt").write_text(f"{USER}\n")
    loop.springtide("erase", "--users", str(tmp_path / "asked.txt"), "--reason", "request 71")
    begin_s = time.monotonic()
    answer = until(lambda: cold(loop), "the shopper is still known", WITHIN_S)
    print(f"a cold start {time.monotonic() - begin_s:.2f} s after the command")
    assert answer["features"]["purchase.count_7d"] == 0

    # 2. Histories, rows, versions and stores let go.
    until(lambda: compacted(loop), "something still holds something")
    left = until(lambda: having(loop) or ["nothing"], "")
    until(lambda: not having(loop), f"it stands in {left}", 60.0)

    # 3. A restart brings nothing back; who comes back is a new shopper.
    assert loop.stop(signal.SIGINT) == 0
    assert having(loop) == []
    loop.start()
    assert cold(loop)
    back = loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")] * 3))
    until(
        lambda: (loop.profile(USER) or back)["features"]["purchase.count_7d"] == 3, "the clicks of after do not count"
    )
