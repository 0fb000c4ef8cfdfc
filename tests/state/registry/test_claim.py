"""One trainer for each registry's directory: a free claim is taken, a silent one is taken over, and its holder publishes nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from state import layout
from state.disk.files import HOST
from state.disk.lock import DirectoryLock, is_held
from state.errors import LockHeld, UnusableRegistry
from state.log.accepted_gaps import Accepted, Journal
from state.positions import Gap, Source
from state.process import killpoints
from state.registry import control, privacy_ledger
from state.registry.directory import LEASE_S, Claim, StandbyFile, standbys
from state.registry.registry import Registry
from tests import forked
from tests.reading import eventually
from tests.state.registry.hosts import Elapsed
from tests.state.registry.test_registry import WHO, draft, publish, started


def main() -> None:
    """A trainer that takes the claim, stops in the middle of a publication or before it, and goes on when it is woken."""
    path, point = Path(sys.argv[1]), sys.argv[2]
    claim = Claim(path)
    claim.take()
    registry = Registry(path, claim)
    late = privacy_ledger.PrivacyLedger("late", "user")
    attempts: dict[str, Callable[[], object]] = {
        "recent.checked": lambda: registry.publish(replace(draft(2), kind="recent"), {"a": b"late"}),
        "publish.checked": lambda: publish(registry, 2),
        "control.written": lambda: registry.change(lambda now: control.train(now, False, **WHO)),
        "ledger": lambda: privacy_ledger.write(registry.directory, path / "privacy" / "ledger.json", late),
        "gap": lambda: Journal(path / "gaps", claim.staging).add(
            Accepted(Gap(Source("ab" * 16, 0), 1, 2), "a", "b", 5)
        ),
        "sweep": lambda: registry.sweep_recent(boot="another"),
    }
    print("claimed", flush=True)
    if point in ("recent.checked", "publish.checked", "control.written"):
        killpoints.armed = killpoints.parse(f"{point}:1:stop", killpoints._stop)
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        attempts[point]()
        print("published", flush=True)
    except (UnusableRegistry, OSError):
        print("refused", flush=True)
    try:
        claim.check()
    except LockHeld as error:
        print(error, flush=True)


POINTS = ("recent.checked", "publish.checked", "control.written", "ledger", "gap", "sweep")


@contextmanager
def frozen(path: Path, point: str) -> Iterator[forked.Popen]:
    """A trainer that has the claim and is frozen in the middle of a publication, or before it."""
    command = [sys.executable, "-m", __name__, str(path), point]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        try:
            assert eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
            yield process
        finally:
            process.kill()


def content(path: Path) -> dict[str, bytes]:
    """All files of a registry that any process reads as published, by name."""
    passing = {layout.TEMPORARY, layout.TRAINER_LOCK, layout.TAKEOVER_LOCK}
    files = (one for one in path.rglob("*") if one.is_file())
    return {str(one): one.read_bytes() for one in files if one.relative_to(path).parts[0] not in passing}


def test_setting_the_clock_takes_nothing_from_a_running_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path, 2)
    claim = Claim(tmp_path)
    claim.take()
    # The time at which a process started is that of the machine's start, which Linux derives from the clock.
    later_s = psutil.boot_time() + 1.0
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: later_s)
    own = Registry(tmp_path, claim)
    assert own.directory.sweep() == [] and is_held(tmp_path, layout.TRAINER_LOCK)
    claim.check()
    assert publish(own, 2).version == 3


@pytest.mark.parametrize("point", POINTS)
def test_a_frozen_trainer_loses_its_claim_and_publishes_nothing_when_it_wakes(tmp_path: Path, point: str) -> None:
    registry, elapsed = started(tmp_path, 2), Elapsed()
    standby = Claim(tmp_path, elapsed)
    with frozen(tmp_path, point) as process:
        with pytest.raises(LockHeld, match=f"process {process.pid} "):
            standby.take()
        while not standby.held:
            elapsed.now_s += 1.0
            with suppress(LockHeld):
                standby.take()
        assert standby.took_over
        own = Registry(tmp_path, standby)
        own.sweep_recent()
        assert publish(own, 2).version == 3
        privacy_ledger.write(own.directory, tmp_path / "privacy" / "ledger.json", privacy_ledger.PrivacyLedger("", ""))
        before = content(tmp_path)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert output.startswith("refused\nthis trainer lost its claim"), output
    assert content(tmp_path) == before
    assert registry.control() == own.control()
    standby.check()
    standby.release()


def test_a_claim_is_refused_while_it_is_renewed_and_free_once_it_is_released(tmp_path: Path) -> None:
    elapsed = Elapsed()
    holder, other = Claim(tmp_path), Claim(tmp_path, elapsed)
    holder.take()
    lock = DirectoryLock(tmp_path, layout.TRAINER_LOCK)
    for _ in range(int(3 * LEASE_S)):
        elapsed.now_s += 1.0
        os.utime(tmp_path / layout.TRAINER_LOCK)
        with pytest.raises(LockHeld):
            other.take()
    holder.release()
    other.take()
    assert not other.took_over
    other.release()
    # A command has no lease: nothing takes the lock from it.
    with lock:
        for _ in range(int(3 * LEASE_S)):
            elapsed.now_s += 1.0
            with pytest.raises(LockHeld):
                other.take()


def test_a_standby_that_was_frozen_itself_does_not_count_that_time_as_silence_of_the_trainer(tmp_path: Path) -> None:
    elapsed = Elapsed()
    holder, standby = Claim(tmp_path), Claim(tmp_path, elapsed)
    holder.take()
    for _ in range(2):
        with pytest.raises(LockHeld):
            standby.take()
        elapsed.now_s += 100 * LEASE_S
    holder.check()
    holder.release()


def test_standbys_are_listed_while_they_wait(tmp_path: Path) -> None:
    waiting = StandbyFile(tmp_path)
    waiting.renew()
    now_s = time.time()
    assert standbys(tmp_path, now_s) == [f"process {os.getpid()} on {HOST}"]
    assert standbys(tmp_path, now_s + 60.0) == []
    waiting.remove()
    assert standbys(tmp_path, now_s) == []
