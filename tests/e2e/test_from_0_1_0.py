"""This release continues in the state directory of a running 0.1.0: version, epoch, histories and clicks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.against import worktree
from tests.e2e.loop.test_restart import balanced
from tests.e2e.running import ROOT, STOP_S, Loop, until
from tests.golden.archive import SETTINGS_OF_0_1_0

COMMIT = "21e0a5d"
"""Release 0.1.0."""
USER = "customer-of-0-1-0"
BOUGHT = (USER, "book-1", "reading", "purchase")

pytestmark = pytest.mark.nightly


def counted(answer: dict[str, Any] | None) -> int:
    return int(answer["features"]["purchase.count_7d"]) if answer else 0


def test_this_release_continues_where_0_1_0_stopped(tmp_path: Path) -> None:
    if subprocess.run(["git", "-C", ROOT, "cat-file", "-e", f"{COMMIT}^{{commit}}"], capture_output=True).returncode:
        pytest.skip(f"commit {COMMIT} (release 0.1.0) is not in this clone; fetch the whole history")
    loop = Loop(tmp_path)
    pairs = list(zip(loop.flags[::2], loop.flags[1::2], strict=True))
    known = [word for flag, value in pairs if flag[2:] in SETTINGS_OF_0_1_0 for word in (flag, value)]

    def old_answer(at_least: int = 0, sources: dict[str, int] | None = None) -> dict[str, Any] | None:
        status, answer = loop.get(f"/v1/profiles/{USER}")
        learned = answer["version"]["sources"] if status == 200 else {}
        caught_up = all(learned.get(source, 0) >= end for source, end in (sources or {}).items())
        return answer if status == 200 and counted(answer) >= at_least and caught_up else None

    # 1. Release 0.1.0 runs, learns three purchases of a user, and is stopped by Ctrl-C.
    with worktree(COMMIT) as checkout, (tmp_path / "old.log").open("wb") as log:
        old = subprocess.Popen(
            [sys.executable, "-m", "deploy.up", *known],
            cwd=checkout,
            env={name: value for name, value in os.environ.items() if not name.startswith("SPRINGTIDE_")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            until(old_answer, lambda: (tmp_path / "old.log").read_text())
            ends = loop.click([BOUGHT] * 3)
            before = until(lambda: old_answer(3, ends), lambda: f"0.1.0 has not learned the clicks: {old_answer()}")
        finally:
            old.send_signal(signal.SIGINT)
            assert old.wait(STOP_S) == 0, (tmp_path / "old.log").read_text()

    # 2. This release starts in the same state directory with the same settings.
    loop.start()
    try:
        first = until(lambda: loop.profile(USER), "no answer")
        assert first["known"] and counted(first) == 3
        assert first["version"]["epoch"] >= before["version"]["epoch"]
        assert first["version"]["number"] > before["version"]["number"] - 100
        # 3. Nothing is lost or learned twice, and new clicks count on top.
        after = loop.answer_trained_on(USER, loop.click([BOUGHT]), lambda answer: counted(answer) == 4)
        assert after["version"]["number"] > before["version"]["number"]
        until(lambda: balanced(loop), "the accounts do not balance")
    finally:
        assert loop.stop() == 0
