"""A bad update is held: nobody is answered by it, the rollback that is proposed heals, and a false alarm is let go for good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from state.features.mask import Mask
from state.file_store import open_store
from state.microbatch.codec import decode, encode
from state.positions import Source
from state.registry import sharing
from state.registry.control import Control, HeldUpdate, release, roll_back
from state.registry.registry import Registry
from state.registry.sync import DurableSender, RecentSender
from tests.state.registry.hosts import CopyHost, away
from tests.trainer.clicks import TOPIC, microbatch
from tests.trainer.logs import append, bits_of, kill, learner, run_to_end, settle, started, without, written
from trainer import holding
from trainer.learner import IDLE_TICKS, Learner

GUARD = ("--guard.window_s", "1")


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "WINDOW_ROWS", 40)
    monkeypatch.setattr(holding, "WARM_UP", 6)
    monkeypatch.setattr(holding, "USERS", 5)


CLEAN = [microbatch(number) for number in range(30)]
FLOOD = range(12, 16)


def flooded(value: bytes, rows: int = 30) -> bytes:
    """The record, had one user made the first rows of it."""
    batch = decode(value)
    user = batch.user.copy()
    user[:rows] = np.uint64(0xF100D)
    return encode(batch.header, batch.columns | {"user": user})


POISONED = [flooded(value) if number in FLOOD else value for number, value in enumerate(CLEAN)]


def held_of(registry: Registry) -> HeldUpdate:
    control = registry.control()
    assert control is not None and control.held is not None
    return control.held


def mask_of(held: HeldUpdate) -> Mask:
    return Mask(offsets=tuple((Source(TOPIC, 0).topic, one.partition, one.first, one.next) for one in held.clicks))


def stopped(path: Path) -> tuple[Registry, Learner]:
    registry = started(path)
    running = learner(registry, written(POISONED), *GUARD)
    run_to_end(running)
    # A version that passed may still be on its way.
    settle(running)
    return registry, running


def test_a_flood_is_held_before_it_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry, running = stopped(tmp_path)
    held, control = held_of(registry), running.control
    assert (held.rule, control.action, control.actor) == ("user", "hold", "guard")
    assert held.signal > 10 and held.usual == 1.0
    assert (control.serving.mode, control.serving.version) == ("pin", held.version)
    assert registry.manifest(held.version).log.next <= held.first <= 2 * FLOOD[0]
    versions = [registry.manifest(number) for number in registry.versions()]
    assert max(one.log.next for one in versions) <= 2 * FLOOD[0], "no version has a row of the flood"
    assert {one.verdict for one in versions} == {"pass"}
    assert "springtide status" in caplog.text
    at = running.place.next
    for _ in range(5):
        assert running.tick(0.0) == 0
    assert running.place.next == at == held.next
    metrics = running._metrics
    assert metrics.held._value.get() == 1 and metrics.held_rule.labels("user")._value.get() == 1
    running.close()
    assert max(registry.versions()) == versions[-1].version, "nor is one made of it at the end"
    again = learner(registry, written(POISONED), *GUARD)
    assert again.tick(0.0) == 0, "a restart does not let it go"


def test_without_a_further_click_a_version_waits_for_an_unsure_guard_at_most_30_s(tmp_path: Path) -> None:
    registry, log, tick_s = started(tmp_path), written(CLEAN[: FLOOD[0]]), 0.25
    running = learner(registry, log, *GUARD, tick_s=tick_s)
    run_to_end(running)
    settle(running)
    withheld = running._metrics.withheld._value
    for record in POISONED[FLOOD[0] :]:
        append(log, [record])
        run_to_end(running)
        if withheld.get():
            break
    at, ticks = running.place.next, 0
    while (newest := registry.manifest(registry.versions()[-1])).log.next < at:
        assert withheld.get() == 1
        ticks += 1
        assert ticks < 30 / tick_s, "each tick reads the clock at least once"
        running.tick(0.0)
        settle(running)
    assert newest.verdict == "pass"
    for _ in range(IDLE_TICKS):
        running.tick(0.0)
    assert withheld.get() == 0
    # The windows are a function of the log alone, so the rest of the flood is held as ever.
    append(log, POISONED[FLOOD[0] + 1 :])
    run_to_end(running)
    assert held_of(registry).rule == "user"


def test_a_hold_that_cannot_be_written_holds_anyway_and_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, log = tmp_path / "place", written(CLEAN[: FLOOD[0]])
    registry = started(tmp_path / "trainer")
    place, claim, _ = sharing.own(registry.path, str(url), lambda: 7)
    registry.directory.shared = place
    durable = DurableSender(registry.path, place, claim)
    recent = RecentSender(registry.path, place, claim, lambda: durable.serial)
    host = CopyHost(tmp_path / "host", str(url), open_store(str(url)))

    def sent() -> list[int]:
        """The versions that another host has, after all that there is was sent."""
        recent.send()
        while durable.send():
            pass
        host.look()
        return host.registry.versions()

    running = learner(registry, log, *GUARD)
    run_to_end(running)
    settle(running)
    assert sent() == registry.versions()
    append(log, POISONED[FLOOD[0] :])
    with away(url):
        while not running._updates.waits:
            running.tick(0.0)
        at = running.place.next
        for _ in range(5):
            assert running.tick(0.0) == 0, "training rests"
        assert running.place.next == at < 2 * len(POISONED)
        assert running.control.held is None and "nothing is published until it is" in caplog.text
        metrics = running._metrics
        assert (metrics.hold_waits._value.get(), metrics.held._value.get()) == (1, 1)
        assert metrics.held_rule.labels("user")._value.get() == 1
        running.close()
        # One that is started again comes to the same verdict, and waits likewise.
        running = learner(registry, log, *GUARD)
        while not running._updates.waits:
            running.tick(0.0)
        assert running.place.next == at
    versions = [registry.manifest(number) for number in sent()]
    assert max(one.log.next for one in versions) <= 2 * FLOOD[0], "no host has a row of the flood"
    while running._updates.waits:
        running.tick(0.0)
    running.tick(0.0)
    assert running.control.held is not None and running.control.held.next == at
    assert running._metrics.hold_waits._value.get() == 0 and running._metrics.held._value.get() == 1
    host.look()
    found = host.registry.control()
    assert found is not None and found == running.control
    assert found.serving.version == running.control.held.version


def test_the_rollback_that_is_proposed_leaves_no_trace_of_the_flood(tmp_path: Path) -> None:
    registry, ours = stopped(tmp_path / "ours")

    def back(control: Control) -> Control:
        assert control.held is not None
        mask = mask_of(control.held)
        return roll_back(control, control.held.version, mask, actor="ann", reason="a flood", now_ms=5)

    # Where the flood goes on behind the hold it is found again.
    while ours.control.held is not None:
        registry.change(back)
        ours.tick(0.0)
        run_to_end(ours)
        assert ours.place.epoch < 4
    assert ours.place.next >= 2 * len(POISONED) - 1
    masks = ours.control.mask
    other = started(tmp_path / "theirs")
    theirs = learner(other, written([without(value, masks) for value in POISONED]))
    run_to_end(theirs)
    assert bits_of(ours) == bits_of(theirs)


def test_a_released_false_alarm_stays_released(tmp_path: Path) -> None:
    registry, running = stopped(tmp_path)
    before = registry.versions()
    registry.change(lambda control: release(control, actor="ann", reason="a sale", now_ms=5))
    running.tick(0.0)
    run_to_end(running)
    assert running.place.next == 2 * len(POISONED) and running._updates.passes
    # Killed before any of it was kept: what comes again is not held again.
    kill(running)
    for number in sorted({*registry.versions()} - {*before}):
        registry.remove("delta", number)
    for number in registry.recents():
        registry.remove("recent", number)
    again = learner(Registry(tmp_path), written(POISONED), *GUARD)
    assert again.place.next < 2 * FLOOD[0]
    run_to_end(again)
    assert again.place.next == 2 * len(POISONED)
    control = registry.control()
    assert control is not None and control.held is None and control.serving.mode == "follow"
    assert len(control.released) == 1


def test_the_guard_changes_no_bit_of_what_is_learned(tmp_path: Path) -> None:
    digests = set()
    for name, flags in (("on", GUARD), ("off", ("--guard.mode", "off"))):
        registry = started(tmp_path / name)
        running = learner(registry, written(CLEAN), *flags)
        run_to_end(running)
        digests.add(bits_of(running))
        running.close()
        verdict = registry.manifest(registry.versions()[-1]).verdict
        assert verdict == ("pass" if name == "on" else "")
    assert len(digests) == 1


def test_a_restart_remembers_the_windows(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(POISONED[:11])
    running = learner(registry, log, *GUARD)
    run_to_end(running)
    running.close()
    append(log, POISONED[11:])
    again = learner(registry, log, *GUARD)
    run_to_end(again)
    found = held_of(registry)
    _, whole = stopped(tmp_path / "whole")
    expected = whole.control.held
    assert expected is not None
    assert (found.rule, found.first, found.next, found.signal, found.clicks) == (
        expected.rule, expected.first, expected.next, expected.signal, expected.clicks
    )  # fmt: skip
