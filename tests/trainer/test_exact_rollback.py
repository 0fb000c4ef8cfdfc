"""The learner along a log that turned off: what the stream abandoned is not learned, whoever restarts or goes back further."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from state.features.mask import Mask
from state.log import Log
from state.microbatch.codec import decode, encode
from state.registry import log_line
from state.registry.control import Control, roll_back
from state.registry.manifest import LogRange
from state.registry.registry import Registry
from tests.trainer.clicks import microbatch
from tests.trainer.logs import LOG, account_in, append, kill, learner, run_to_end, settle, without, written
from tests.trainer.test_learner import POISON, state
from tests.trainer.test_verify import asked, started_with_spec
from trainer.learner import Learner

RECORDS = [microbatch(number) for number in range(14)]
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
    registry, log = started_with_spec(tmp_path / "ours"), written(RECORDS[:3])
    ours = learner(registry, log)
    early = published(ours)
    append(log, RECORDS[3:TURN])
    to = published(ours)
    append(log, RECORDS[TURN : TURN + 4])
    poisoned = published(ours)
    # 2. An exact rollback. The stream goes on for a moment before it sees it, and then writes anew.
    registry.change(turned(registry, log, to, POISON))
    append(log, RECORDS[TURN + 4 : TURN + 6])
    kill(ours)
    ours = learner(registry, log)
    run_to_end(ours)
    clean = [without(value, POISON) for value in RECORDS[TURN:]]
    append(log, [of_epoch(value, 2) for value in clean])
    newest = published(ours)

    theirs = learner(started_with_spec(tmp_path / "theirs"), written([*RECORDS[:TURN], *clean]))
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
