"""A trainer ahead of its log goes back to the newest version that the log still leads to: audited, and with the bits of the log that is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from state.errors import TruncatedLog
from state.registry.control import pin
from state.registry.registry import Registry
from tests.memory_log import MemoryLog
from tests.trainer.clicks import microbatch
from tests.trainer.logs import LOG, append, bits_of, learner, run_to_end, started, written
from tests.trainer.test_verify import asked, started_with_spec
from trainer import compactor, loop
from trainer.learner import Learner
from trainer.loop import recover

RECORDS = [microbatch(number) for number in range(20)]
# A record at each even offset, its marker behind it: six records are left.
KEPT = 12


def learned(registry: Registry, log: MemoryLog) -> Learner:
    running = learner(registry, log)
    run_to_end(running)
    running.close()
    return running


def entered(registry: Registry, log: MemoryLog) -> Learner:
    """A trainer as its process starts it."""
    try:
        return learner(registry, log)
    except TruncatedLog as lost:
        control = registry.control()
        assert control is not None
        recover(registry, control, lost, "trainer:test", 7)
        return entered(registry, log)


@pytest.mark.parametrize("again", [0, 3, 12], ids=["not grown", "shorter than before", "longer than before"])
def test_what_remains_and_what_replaced_lost_records_is_learned(tmp_path: Path, again: int) -> None:
    registry, log = started_with_spec(tmp_path / "registry"), written(RECORDS[:10])
    learned(registry, log)
    log.cut_back(LOG, {0: KEPT})
    # Other records came instead: what was in the lost ones is in the first of them, in another cut.
    append(log, RECORDS[6 : 6 + again])
    lost = [number for number in registry.versions() if registry.manifest(number).log.next > KEPT]
    assert lost
    # Which records become a durable version of their own is a matter of how fast the disk is.
    end = log.topics().ends(LOG)[0][1]
    within = [number for number in lost if registry.manifest(number).log.next <= end]

    running = entered(registry, log)
    control = registry.control()
    assert control is not None
    # Where the log is shorter than before, first its end is seen, then where it was cut, by a version that lies within it.
    assert control.epoch == control.generation == (3 if again == 3 and within else 2)
    assert (control.action, control.actor) == ("recover", "trainer:test")
    seen = KEPT if again != 3 or within else end
    said = rf"the training log was truncated to offset {seen}, below the stored position \d+; version {control.base} learned nothing beyond"
    assert re.fullmatch(said, control.reason)
    assert control.base == lost[0] - 1, "the newest that learned nothing beyond"
    assert control.serving.mode == "follow"
    run_to_end(running)
    running.close()
    assert running.place.epoch == control.epoch
    # As a trainer that never saw the lost records.
    clean = learner(started(tmp_path / "clean"), written([*RECORDS[:6], *RECORDS[6 : 6 + again]]))
    run_to_end(clean)
    assert bits_of(running) == bits_of(clean)
    clean.close()
    if again:
        found = asked(registry, log, registry.newest(control.epoch) or 0)
        assert found.outcome == "equal", found.text()
    # A second start goes on from there.
    assert learner(registry, log).place.epoch == control.epoch
    assert registry.control() == control


def test_a_pinned_version_stays_pinned(tmp_path: Path) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS[:10])
    learned(registry, log)
    newest = registry.newest(1) or 0
    registry.change(lambda now: pin(now, newest, actor="ann", reason="look", now_ms=5))
    log.cut_back(LOG, {0: KEPT})
    entered(registry, log).close()
    control = registry.control()
    assert control is not None
    assert (control.epoch, control.serving.mode, control.serving.version) == (2, "pin", newest)


def test_without_a_version_left_the_error_says_what_to_do(tmp_path: Path) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS[:10])
    newest = learned(registry, log).place.parent
    # Only the newest version is kept, as a base.
    compactor.compact(registry)
    registry.remove("base", 1)
    for version in registry.deltas():
        registry.remove("delta", version)
    assert registry.versions() == [newest]
    log.cut_back(LOG, {0: KEPT})
    with pytest.raises(
        TruncatedLog, match=r"the log that was read ends at 12.*every kept version learned.*restore the training log"
    ):
        entered(registry, log)
    control = registry.control()
    assert control is not None and control.generation == 1


def test_the_process_enters_what_is_left(tmp_path: Path) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS[:10])
    running = learned(registry, log)
    log.cut_back(LOG, {0: KEPT})
    append(log, RECORDS[6:18])
    control = registry.control()
    assert control is not None
    loop.enter(running, registry, control)
    assert (running.place.epoch, running.control.actor.partition(":")[0]) == (2, "trainer")
    assert running.place.next <= KEPT
