"""`springtide up --trainer.workers 2`, with the real processes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.e2e.running import SHORT, Loop, until


def worker(loop: Loop) -> psutil.Process:
    """The other worker of the trainer."""
    (found,) = [each for each in loop.processes() if "trainer.worker" in each.cmdline()]
    return found


@pytest.mark.nightly
def test_up_trains_with_several_workers_and_starts_them_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {**SHORT, "trainer.workers": 2, "stream.cut_ms": 1000})
    loop.start()
    try:
        for lost in (False, True):
            if lost:
                worker(loop).kill()
            user, category = f"ada-{lost}", "category-of-her-own"
            ends = loop.click([(user, f"item-{number}", category, "purchase") for number in range(20)])
            answer = loop.answer_trained_on(user, ends)
            assert answer["interests"][0]["label"] == category
            shares = until(lambda: loop.springtide("status")["figures"]["trainer_workers"], "status shows no workers")
            assert sorted(shares) == ["0", "1"]
        assert worker(loop).is_running()
        assert loop.stop() == 0
    finally:
        if loop.running:
            loop.stop()
