"""A whole loop on a disk of 1 GB that is filled to the last byte: answers go on, the rest waits and says so, and then nothing is missing.

The disk is an image of a file system, mounted as a loop device: real blocks that
run out, also for Kafka's segments and its mapped indexes. What is removed while
it is full is taken again at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import cli
from deploy.watch import scrape
from tests.e2e.loop.test_restart import balanced
from tests.e2e.running import SHORT, Loop, until
from tests.e2e.watching import Watching, beside

DISK_BYTES = 1 << 30
FULL_S = 5.0
USER = "one-of-the-full-disk"
LASTING = ("stream", "trainer", "applier", "worker")


@contextlib.contextmanager
def disk_of_blocks(path: Path) -> Iterator[Path]:
    """A disk of 1 GB, made of a file; skips the test where none can be mounted."""
    image, place = path / "image", path / "disk"
    place.mkdir()
    with image.open("wb") as made:
        made.truncate(DISK_BYTES)
    for command in (["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, place]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no disk can be made and mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Filler:
    """Takes all room of a disk, and what others give back meanwhile, until it is told to end."""

    def __init__(self, disk: Path) -> None:
        self._disk, self._stopping = disk, threading.Event()
        self._thread = threading.Thread(target=self._run, name="filler", daemon=True)

    def __enter__(self) -> Filler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        (self._disk / "filler").unlink()

    def _run(self) -> None:
        with (self._disk / "filler").open("wb") as filler:
            size = 0
            while not self._stopping.wait(0.01):
                for piece in (1 << 26, 1 << 20, 1 << 16, 1 << 12):
                    with contextlib.suppress(OSError):
                        while True:
                            os.posix_fallocate(filler.fileno(), size, piece)
                            size += piece


def waiting(loop: Loop) -> set[str]:
    """The parts that wait for room."""
    scrapes = scrape.scrape(scrape.watched_urls(loop.settings))
    return {
        part
        for one in scrapes.values()
        for part, count in one.by("springtide_storage_waiting", "part").items()
        if count
    }


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    with disk_of_blocks(tmp_path) as disk:
        made = Loop(
            tmp_path, {**SHORT, "paths.state": disk / "state", "storage.budget_gb": 1, "kafka.request_timeout_s": 10}
        )
        made.start()
        yield made
        # All of it is thrown away: nobody needs an end in order.
        for process in made.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if made.process is not None:
            made.process.wait()


@pytest.fixture
def watching(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    # Its own data lie elsewhere: on the full disk it would see nothing.
    with beside(loop.settings, tmp_path_factory.mktemp("prometheus")) as found:
        yield found


@pytest.mark.nightly
def test_answers_go_on_the_rest_waits_and_nothing_is_lost_or_doubled(
    loop: Loop, watching: Watching, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.answer_trained_on(USER, loop.click([(USER, "tent", "outdoors", "purchase")] * 3))
    before = {part: loop.pid(part) for part in LASTING}
    said = len(loop.said())

    def told() -> dict[str, Any] | None:
        found: dict[str, Any] = loop.springtide("status")
        return found if any("waits for space" in words for words in found["figures"]["full"]) else None

    with Filler(loop.settings.state_dir.parent):
        # Who waits first: publishing, the stream or Kafka. Without clicks there is nothing to publish.
        until(lambda: waiting(loop), "nobody waits")
        watching.wait_for("SpringtideStorageFull")
        until(lambda: "kafka" in waiting(loop) or loop.pid("kafka") is None, "Kafka does not wait")
        # 1. Answers go on, all of them.
        end_s = time.monotonic() + FULL_S
        while time.monotonic() < end_s:
            assert loop.get(f"/v1/profiles/{USER}")[0] == 200
        # 2. Nobody ends for it but the broker, which `up` looks after.
        assert {part: loop.pid(part) for part in LASTING} == before
        assert loop.running
        # 3. It is said: by an alert, by `status`, and by a command that needs room.
        status = until(told, "status does not say who waits")
        assert status["storage"]["free_bytes"] < 1 << 20
        # What others remove leaves room for a moment.
        until(lambda: cli.main(["hold", "--reason", "test", *loop.flags]) == 1, "a full disk takes it")
        assert "No space left on device" in (refused := capsys.readouterr().err) and "free space" in refused
    # 4. Room: all goes on by itself.
    loop.springtide("release", "--reason", "where a moment's room took the hold")
    until(lambda: not waiting(loop) and loop.pid("kafka") is not None, "something waits on")
    watching.wait_until_over("SpringtideStorageFull")
    newest = loop.springtide("status")["registry"]["newest"]
    ends = until(lambda: clicked(loop), "no click is taken")
    answer = loop.answer_trained_on(USER, ends)
    assert answer["version"]["number"] > newest
    # 5. Nothing is lost or doubled.
    known = until(lambda: counted(loop), "the histories of serving lack a click")
    assert known["purchase.count_7d"] == 5
    until(lambda: balanced(loop), "the accounts do not balance")
    assert {part: loop.pid(part) for part in LASTING} == before
    lines = loop.said()[said:].splitlines()
    for beginning in ("Kafka waits for space: ", "Kafka continues: "):
        assert sum(line.startswith(beginning) for line in lines) == 1, lines


def clicked(loop: Loop) -> dict[str, int] | None:
    """The ends after two more clicks; None while Kafka does not take them."""
    with contextlib.suppress(Exception):
        return loop.click([(USER, "tent", "outdoors", "purchase")] * 2)
    return None


def counted(loop: Loop) -> dict[str, float] | None:
    """What serving counts of the user, once it has the last clicks."""
    answer = loop.profile(USER)
    features: dict[str, float] = answer["features"] if answer else {}
    return features if features.get("purchase.count_7d", 0) >= 5 else None
