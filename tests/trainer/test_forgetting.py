"""An erased user leaves the trainer and all versions: at once, over restarts and rollbacks, and bit for bit again in a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state.features.erased import MaskedUsers
from state.features.mask import Mask
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.control import Decision, erase, roll_back
from state.registry.registry import Registry
from tests.kills import killed_at
from tests.trainer.clicks import TOPIC, microbatch
from tests.trainer.logs import append, bits_of, fresh, kill, learner, run_to_end, trainer_of, written
from tests.trainer.test_control_changes import published
from tests.trainer.test_learner import state
from tests.trainer.test_verify import asked, started_with_spec
from trainer import compactor
from trainer.compactor import rewrite
from trainer.learner import Learner
from trainer.versions import checkpoint, content

RECORDS = [microbatch(number) for number in range(24)]
BATCHES = [decode(value) for value in RECORDS]
WHO: Decision = {"actor": "ann", "reason": "asked to", "now_ms": 5}
KNOWN, READ = 10, 12
"""Records that were learned when the user was erased, and those that were written then."""

UNTIL = [(Source(TOPIC, part).topic, part, 20 * READ) for part in (0, 1)]


def clicks_of(user: int, first: int, last: int) -> int:
    return sum(int((batch.user == user).sum()) for batch in BATCHES[first:last])


def chosen() -> int:
    """A user with labelled clicks before the erasure, some that were written and not learned, and some after it."""
    users = {int(user) for batch in BATCHES[:KNOWN] for user in batch.user[~np.isnan(batch.label)]}
    found = [one for one in sorted(users) if clicks_of(one, KNOWN, READ) and clicks_of(one, READ, 24)]
    return found[0]


USER = chosen()


def crosses_of(running: Learner) -> set[int]:
    """All crosses that the user's clicks made."""
    found: set[int] = set()
    for batch in BATCHES:
        theirs = batch.take(batch.user == USER)
        ids = trainer_of(running)._recorder.crosses_of(theirs)
        mine = [place for place, name in enumerate(trainer_of(running).crosses.names) if name.startswith("user")]
        found |= set(ids[:, [one for one in mine if ids.shape[1]]].reshape(-1).tolist())
    return found - {0}


def held(running: Learner) -> tuple[bool, int]:
    """Whether the user has a row, and how many crosses."""
    tables = trainer_of(running).tables
    crosses = np.array(sorted(crosses_of(running)), np.uint64)
    return bool(tables["user"].find(np.array([USER], np.uint64)).any()), int((tables["cross"].find(crosses) != 0).sum())


def files_with(registry: Registry, ids: set[int]) -> set[str]:
    """The files of versions and bases in which one of the ids stands, in either order of bytes."""
    forms = [one.to_bytes(8, order) for one in ids for order in ("little", "big")]
    paths = [path for folder in ("versions", "bases") for path in (registry.path / folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(registry.path))
        for path in paths
        if any(form in (data := path.read_bytes()) for form in forms) and data
    }


def erased(path: Path) -> tuple[Registry, Any, Learner, int]:
    """A learner whose user was erased after `KNOWN` records, with `READ` written; and the version of before."""
    registry, log = started_with_spec(path), written(RECORDS[:6])
    running = learner(registry, log)
    run_to_end(running)
    published(running)
    compactor.compact(registry)
    append(log, RECORDS[6:KNOWN])
    run_to_end(running)
    before = published(running)
    assert held(running)[0] and held(running)[1] > 2
    append(log, RECORDS[KNOWN:READ])
    registry.change(lambda control: erase(control, MaskedUsers.of([USER]), UNTIL, **WHO))
    return registry, log, running, before


def test_an_erased_users_rows_and_crosses_are_removed_and_older_clicks_are_not_learned(tmp_path: Path) -> None:
    registry, log, running, before = erased(tmp_path)
    running.tick(0.0)
    assert held(running) == (False, 0) and running.place.erased == 1
    run_to_end(running)
    assert (held(running), running.place.masked) == ((False, 0), clicks_of(USER, KNOWN, READ))
    made = registry.manifest(published(running))
    assert (made.erased, [number for number, _ in made.erasures]) == (1, [1])
    told = {
        int(user)
        for version in registry.deltas()
        if version > before
        for user in content.decode([registry.read(version, "serving.safetensors")])["user.removed"]
    }
    assert USER in told, "answers are told that the row went"
    append(log, RECORDS[READ:])
    run_to_end(running)
    assert held(running)[0], "who comes back is a new user"
    newest = published(running)
    assert asked(registry, log, newest, base=1).outcome == "equal", "a replay forgets at the same place"
    again = learner(registry, log)
    assert state(again)[0] == state(running)[0], "a restart takes nothing away that came after"
    running.close()


def test_a_user_is_forgotten_without_a_new_record(tmp_path: Path) -> None:
    registry, _, running, before = erased(tmp_path)
    run_to_end(running)
    published(running)
    registry.change(lambda control: erase(control, MaskedUsers.of([int(BATCHES[0].user[0])]), UNTIL, **WHO))
    at = running.place.next
    running.tick(0.0)
    newest = registry.manifest(published(running))
    assert (newest.erased, newest.log.next) == (2, at) and newest.version > before
    running.close()


@pytest.mark.parametrize("rewritten", [False, True])
def test_an_earlier_version_is_restored_without_the_user(tmp_path: Path, rewritten: bool) -> None:
    registry, log, running, before = erased(tmp_path)
    append(log, RECORDS[READ:])
    run_to_end(running)
    published(running)
    if rewritten:
        assert rewrite(registry, trainer_of(running).crosses)
    registry.change(lambda control: roll_back(control, before, Mask.NONE, **WHO))
    while running.place.epoch == 1:
        running.tick(0.0)
    assert held(running) == (False, 0), "before a record is read"
    run_to_end(running)
    assert running.place.masked == clicks_of(USER, KNOWN, READ), "nor are the clicks of before learned again"
    newest = published(running)
    assert asked(registry, log, newest, base=before).outcome == "equal"
    running.close()


def test_a_trainer_killed_before_its_version_forgets_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, log, running, before = erased(tmp_path)
    monkeypatch.setattr(running, "_publish_if_due", lambda has_stepped: None)
    run_to_end(running)
    assert running.place.erased == 1 and registry.newest(1) == before
    kill(running)
    again = learner(registry, log)
    run_to_end(again)
    assert held(again) == (False, 0)
    assert asked(registry, log, published(again), base=1).outcome == "equal"
    again.close()


def test_nothing_that_is_kept_has_the_user_once_the_compactor_ran(tmp_path: Path) -> None:
    registry, log, running, before = erased(tmp_path)
    theirs = crosses_of(running)
    run_to_end(running)
    newest = published(running)
    bits = bits_of(running)
    assert len(files_with(registry, {USER})) > 2 and files_with(registry, theirs)
    assert rewrite(registry, trainer_of(running).crosses) > 2
    assert files_with(registry, {USER} | theirs) == set()
    assert rewrite(registry, trainer_of(running).crosses) == 0, "nothing is left to do"
    for version in registry.versions():
        for part in registry.chain(version).deltas:
            registry.verify(part)
    restored = fresh()
    checkpoint.restore(registry, newest, restored, registry.manifest(newest).spec)
    assert checkpoint.digest(restored) == bits
    assert asked(registry, log, newest).outcome == "not comparable"
    said = asked(registry, log, before)
    assert said.outcome == "not comparable" and "erased since" in said.text() and str(USER) not in said.text()
    append(log, RECORDS[READ:])
    run_to_end(running)
    compactor.compact(registry)
    assert asked(registry, log, published(running), base=newest).outcome == "equal"
    running.close()


@pytest.mark.parametrize("at", ["rewrite.written", "rewrite.exchanged"])
def test_a_compactor_killed_while_it_rewrites_leaves_every_version_whole(tmp_path: Path, at: str) -> None:
    registry, _, running, _ = erased(tmp_path)
    run_to_end(running)
    newest = published(running)
    bits = bits_of(running)
    with killed_at(at):
        rewrite(Registry(tmp_path), trainer_of(running).crosses)
    # One that had read the manifests before does not take the new files for damaged ones.
    for registry_now in (registry, Registry(tmp_path)):
        restored = fresh()
        checkpoint.restore(registry_now, newest, restored, registry_now.manifest(newest).spec)
        assert checkpoint.digest(restored) == bits
    assert rewrite(Registry(tmp_path), trainer_of(running).crosses) > 0
    assert files_with(registry, {USER}) == set()
    running.close()
