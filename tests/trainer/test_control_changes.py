"""What the trainer does on each change of control, also along a log that branched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from state.features.mask import Mask
from state.log import Log
from state.microbatch.codec import decode, encode
from state.registry import log_line, sharing
from state.registry.control import Control, Decision, pin, publish, roll_back, train, unmask
from state.registry.manifest import LogRange
from state.registry.registry import Registry
from tests.state.registry.hosts import away
from tests.trainer.clicks import microbatch
from tests.trainer.logs import LOG, account_in, append, kill, learner, run_to_end, settle, started, without, written
from tests.trainer.test_learner import POISON, state
from tests.trainer.test_verify import asked, started_with_spec
from trainer.learner import Learner

RECORDS = [microbatch(number) for number in range(24)]
WHO: Decision = {"actor": "ann", "reason": "test", "now_ms": 5}


def under(value: bytes, generation: int) -> bytes:
    """The record as a stream writes it that knows the mask of this control generation."""
    batch = decode(value)
    return encode(replace(batch.header, mask_generation=generation), batch.columns)


def rolled_back(to: int, **more: Any) -> Callable[[Control], Control]:
    return lambda control: roll_back(control, to, POISON, **WHO, **more)


def test_a_lifted_mask_ends_at_a_record_whenever_the_trainer_looks(tmp_path: Path) -> None:
    """Records that the stream wrote before it knew stay without the masked rows, later ones have them."""
    registry, log = started_with_spec(tmp_path / "ours"), written(RECORDS[:8])
    running = learner(registry, log)
    to = published(running)
    registry.change(rolled_back(to))
    append(log, [under(value, 2) for value in RECORDS[8:12]])
    run_to_end(running)
    before = running.place.masked
    registry.change(lambda control: unmask(control, [one.id for one in control.masks], **WHO))
    append(log, [under(value, 2) for value in RECORDS[12:15]] + [under(value, 3) for value in RECORDS[15:]])
    run_to_end(running)
    assert running.place.masked > before > 0

    filtered = [*RECORDS[:8], *(without(value, POISON) for value in RECORDS[8:15]), *RECORDS[15:]]
    theirs = learner(started(tmp_path / "theirs"), written(filtered))
    run_to_end(theirs)
    assert state(running) == state(theirs)
    running.close()
    newest = registry.newest(2) or 0
    assert asked(registry, log, newest, base=1).outcome == "equal", "verify knows where it ended"
    registry.remove("delta", newest)
    late = learner(Registry(tmp_path / "ours"), log)
    run_to_end(late)
    assert state(late) == state(theirs), "one that starts only now, too"


def test_a_paused_trainer_takes_no_record_and_a_resumed_one_has_the_same_bits(tmp_path: Path) -> None:
    registry, log = started(tmp_path / "ours"), written(RECORDS[:8])
    running = learner(registry, log)
    run_to_end(running)
    registry.change(lambda control: train(control, False, **WHO))
    running.tick(0.0)
    append(log, RECORDS[8:])
    at = running.place.next
    assert [running.tick(0.0) for _ in range(5)] == [0] * 5
    assert running.place.next == at
    running.close()
    running = learner(registry, log)
    assert running.tick(0.0) == 0, "a restart does not let it go"
    registry.change(lambda control: train(control, True, **WHO))
    run_to_end(running)
    whole = learner(started(tmp_path / "whole"), written(RECORDS))
    run_to_end(whole)
    assert state(running) == state(whole)


def test_a_trainer_with_held_publishing_learns_on_and_publishes_everything_at_the_release(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(RECORDS[:4])
    running = learner(registry, log)
    last = published(running)
    registry.change(lambda control: publish(control, False, **WHO))
    running.tick(0.0)
    append(log, RECORDS[4:])
    run_to_end(running)
    for _ in range(5):
        running.tick(0.0)
    assert registry.versions()[-1] == last
    registry.change(lambda control: publish(control, True, **WHO))
    made = registry.manifest(published(running))
    assert (made.version, made.parent, made.rows) == (last + 1, last, 24 * 40)
    registry.change(lambda control: publish(control, False, **WHO))
    running.close()
    assert registry.versions()[-1] == last + 1


def test_when_the_rollback_is_learned_its_outcome_is_written_once(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(RECORDS[:8])
    running = learner(registry, log)
    to = published(running)
    append(log, RECORDS[8:])
    published(running)
    registry.change(rolled_back(to))
    while not running.place.masked:
        running.tick(0.0, stopping=lambda: True)
    running.close()
    assert registry.generations.outcome(2, "learned") is None
    running = learner(registry, log)
    run_to_end(running)
    found = registry.generations.outcome(2, "learned")
    assert found is not None, "with what was read before the restart"
    assert (found["rows"], found["masked"], found["next"]) == (16 * 40, running.place.masked, running.place.next)
    append(log, [microbatch(24)])
    run_to_end(running)
    running.close()
    run_to_end(learner(registry, log))
    assert registry.generations.outcome(2, "learned") == found
    assert registry.generations.outcome(1, "learned") is None, "the first epoch was no rollback"


def test_while_a_shared_registry_is_away_serving_waits_and_follows_later(tmp_path: Path) -> None:
    registry, log, url = started(tmp_path / "trainer"), written(RECORDS[:8]), tmp_path / "place"
    registry.directory.shared, *_ = sharing.own(registry.path, str(url), lambda: 7)
    running = learner(registry, log)
    to = published(running)
    append(log, RECORDS[8:])
    published(running)
    registry.change(rolled_back(to, then_follow=True))
    with away(url):
        run_to_end(running)
        for _ in range(20):
            running.tick(0.0)
        control = registry.control()
        assert control is not None and control.serving.mode == "pin" and running.place.next == 2 * len(RECORDS)
    while (control := registry.control()) is not None and control.serving.mode == "pin":
        running.tick(0.0)
    assert control is not None
    assert (control.action, control.epoch, control.actor.startswith("trainer")) == ("follow", 2, True)
    assert registry.manifest(registry.newest(2) or 0).rows == 24 * 40 - running.place.masked, "everything is published"


def test_a_version_pinned_meanwhile_stays_pinned(tmp_path: Path) -> None:
    registry, log = started(tmp_path), written(RECORDS[:8])
    running = learner(registry, log)
    to = published(running)
    registry.change(rolled_back(to, then_follow=True))
    registry.change(lambda control: pin(control, to, **WHO))
    append(log, RECORDS[8:])
    published(running)
    for _ in range(5):
        running.tick(0.0)
    control = registry.control()
    assert control is not None and control.serving.version == to


def test_a_rollback_that_interrupts_another_is_done_when_all_is_learned_that_was_learned_before_both(
    tmp_path: Path,
) -> None:
    registry, log = started(tmp_path), written(RECORDS[:8])
    running = learner(registry, log)
    to = published(running)
    append(log, RECORDS[8:])
    published(running)
    # The first one has learned two records again when the second one comes.
    registry.change(turned(registry, log, to, POISON))
    append(log, [of_epoch(without(value, POISON), 2) for value in RECORDS[8:10]])
    published(running)
    assert registry.generations.outcome(2, "learned") is None
    registry.change(turned(registry, log, to, Mask(times=((1, 2),))))
    append(log, [of_epoch(without(value, POISON), 3) for value in RECORDS[8:12]])
    published(running)
    assert registry.generations.outcome(3, "learned") is None, "only as far as the first one had come"
    append(log, [of_epoch(without(value, POISON), 3) for value in RECORDS[12:]])
    run_to_end(running)
    assert registry.generations.outcome(3, "learned") is not None
    assert registry.generations.outcome(2, "learned") is None


EXACT_ROLLBACK_RECORDS = [microbatch(number) for number in range(14)]
TURN = 6


def of_epoch(value: bytes, epoch: int) -> bytes:
    batch = decode(value)
    return encode(replace(batch.header, log_epoch=epoch), batch.columns)


def published(running: Learner) -> int:
    run_to_end(running)
    settle(running)
    if running.place.changed:
        running.publish()
        settle(running)
    return running.place.parent


def turned(registry: Registry, log: Log, to: int, mask: Mask) -> Callable[[Control], Control]:
    at, end = registry.manifest(to), log.topics().ends(LOG)[0][1]

    def change(control: Control) -> Control:
        line = log_line.turned(control.log, at.log.epoch, at.log.next, end, at.sources)
        return roll_back(control, to, mask, actor="ann", reason="poison", now_ms=5, log=line)

    return change


def test_after_an_exact_rollback_the_bits_are_those_of_a_log_without_the_poison(tmp_path: Path) -> None:
    # 1. Eight records are poisoned; the trainer has learned four of them.
    registry, log = started_with_spec(tmp_path / "ours"), written(EXACT_ROLLBACK_RECORDS[:3])
    ours = learner(registry, log)
    early = published(ours)
    append(log, EXACT_ROLLBACK_RECORDS[3:TURN])
    to = published(ours)
    append(log, EXACT_ROLLBACK_RECORDS[TURN : TURN + 4])
    poisoned = published(ours)
    # 2. An exact rollback. The stream goes on for a moment before it sees it, and then writes anew.
    registry.change(turned(registry, log, to, POISON))
    append(log, EXACT_ROLLBACK_RECORDS[TURN + 4 : TURN + 6])
    kill(ours)
    ours = learner(registry, log)
    run_to_end(ours)
    clean = [without(value, POISON) for value in EXACT_ROLLBACK_RECORDS[TURN:]]
    append(log, [of_epoch(value, 2) for value in clean])
    newest = published(ours)

    theirs = learner(started_with_spec(tmp_path / "theirs"), written([*EXACT_ROLLBACK_RECORDS[:TURN], *clean]))
    run_to_end(theirs)
    expected = (state(theirs)[0], state(theirs)[2])
    assert (state(ours)[0], state(ours)[2]) == expected
    assert account_in(ours) == account_in(theirs)
    found = asked(registry, log, newest)
    assert found.outcome == "equal", found.text()
    # 3. What the log abandoned is off the line; what it kept is on it.
    control = registry.control()
    assert control is not None
    assert control.mode == "exact"
    on_line = [log_line.has(control.log, at.epoch, at.next) for at in _logs(registry, early, to, poisoned, newest)]
    assert on_line == [True, True, False, True]
    # 4. A fast rollback to before the turn reads over it.
    registry.change(lambda now: roll_back(now, early, Mask.NONE, actor="ann", reason="more", now_ms=6))
    again = published(ours)
    assert (state(ours)[0], state(ours)[2]) == expected
    found = asked(registry, log, again)
    assert (found.outcome, found.base) == ("equal", early if early in registry.bases() else 1), found.text()


def _logs(registry: Registry, *versions: int) -> list[LogRange]:
    return [registry.manifest(one).log for one in versions]
