"""The compactor: a base is bit-equal to the trainer's state, and what can be listed can be restored."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state import layout
from state.disk import documents
from state.disk.lock import DirectoryLock
from state.file_store import DirectoryStore
from state.history import snapshots
from state.history.snapshots import HistorySnapshot, SnapshotFile, UserRange
from state.registry.control import Decision, start
from state.registry.manifest import FileEntry, Manifest, complete, extend, sees
from state.registry.registry import Registry
from tests.kills import killed_at
from tests.trainer.clicks import SPEC, batches, small_settings
from tests.trainer.logs import draft, publish, started
from trainer import compactor
from trainer.compactor import DAY_MS, HOUR_MS, Tiers, compact, plan, thin
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content

WHO: Decision = {"actor": "test", "reason": "test", "now_ms": 0}
TIERS = Tiers(each_ms=HOUR_MS, thin_ms=DAY_MS, sparse_ms=7 * DAY_MS)


def test_a_base_is_the_trainers_state_bit_for_bit(tmp_path: Path) -> None:
    registry = started(tmp_path)
    trainer = Trainer(small_settings("--trainer.admit_after", "2", "--trainer.expire_s", "3600"), SPEC)
    version = publish(registry, trainer, None)
    for number, batch in enumerate(batches(0, 60)):
        trainer.step(batch)
        if number % 5 == 4:
            version = publish(registry, trainer, version)
        if number == 30:
            compact(registry)
    made = compact(registry)
    assert made is not None and made.version == version
    assert registry.chain(version).deltas == []
    state = checkpoint.full(trainer)
    # Measures that decide nothing are in a base too, and no part of the state.
    quality = {name: held for name, held in checkpoint.changes(trainer).items() if name.startswith(content.QUALITY)}
    expected = content.encode(state | quality)
    assert {name: registry.read(made, name) for name in expected} == expected
    assert compact(registry) is None, "there is nothing new"


def manifest(
    version: int, parent: int | None, created_at_ms: int, visible: tuple[tuple[int, int], ...], size: int = 100
) -> Manifest:
    made = complete(draft(parent, created_at_ms=created_at_ms), version, visible, {})
    return replace(made, visible=visible, files={"a": FileEntry("", size)})


class Line:
    """Versions on which a plan is carried out, as the compactor does."""

    def __init__(self) -> None:
        self.deltas: dict[int, Manifest] = {}
        self.bases = {1: manifest(1, None, 0, ((1, 1),))}

    def add(self, version: int, parent: int, created_at_ms: int, visible: tuple[tuple[int, int], ...]) -> None:
        self.deltas[version] = manifest(version, parent, created_at_ms, visible)

    def thin(self, tiers: Tiers, now_ms: int, keep: frozenset[int] = frozenset()) -> None:
        found = plan(
            [one for _, one in sorted(self.deltas.items())],
            [one for _, one in sorted(self.bases.items())],
            keep,
            tiers,
            now_ms,
        )
        for version in found.bases:
            del self.bases[version]
        for merge in found.merges:
            parts = [self.deltas[one] for one in merge.path]
            assert [part.parent for part in parts] == [merge.parent, *merge.path[:-1]]
            self.deltas[merge.path[-1]] = replace(parts[-1], parent=merge.parent)
        for version in found.deltas:
            del self.deltas[version]

    def made_from(self, version: int) -> list[int] | None:
        """The base and the deltas of a version as `Versions.chain` finds them; None where one lacks."""
        line = (self.deltas.get(version) or self.bases[version]).visible
        start = max((one for one in self.bases if one <= version and sees(line, one)), default=None)
        found, at = [], version
        while at != start:
            if start is None or at not in self.deltas or at < start:
                return None
            found.append(at)
            at = self.deltas[at].parent or 0
        return [start, *reversed(found)]


def test_versions_are_thinned_after_an_hour_and_again_after_a_day() -> None:
    """Ten days of a version each five minutes, thinned each twenty minutes."""
    line, version = Line(), 1
    last: tuple[tuple[int, int], ...] = ((1, 1),)
    tiers = replace(TIERS, load_bytes=5_000)
    end = 10 * DAY_MS
    for now in range(0, end + 1, 1_200_000):
        for at in range(now - 1_200_000 + 300_000, now + 1, 300_000):
            if at >= 0:
                version += 1
                last = extend(last, version - 1, version)
                line.add(version, version - 1, at, last)
        chain = line.made_from(version) or []
        if 100 * (len(chain) - 1) > tiers.load_bytes:
            line.bases[version] = manifest(version, version - 1, now, last)
        line.thin(tiers, now)
    ages = sorted(end - one.created_at_ms for one in {**line.bases, **line.deltas}.values())
    for longest, spacing in ((HOUR_MS, 300_000), (DAY_MS, 900_000), (7 * DAY_MS, HOUR_MS + 300_000)):
        within = [age for age in ages if age <= longest]
        assert max(after - before for before, after in pairwise(within)) <= spacing
    assert len([age for age in ages if HOUR_MS < age <= DAY_MS]) < 24 * 7
    assert len([age for age in ages if DAY_MS < age <= 7 * DAY_MS]) < 24 * 8
    assert ages[-1] < 9.5 * DAY_MS, "with the base that the oldest start from"
    chains = [line.made_from(one) for one in {**line.bases, **line.deltas}]
    assert all(chain is not None and len(chain) < 53 for chain in chains)
    assert len(line.bases) < 14


@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 40)), min_size=2, max_size=40),
    st.sets(st.integers(2, 40), max_size=6),
    st.sets(st.integers(1, 40), max_size=2),
    st.integers(1, 60),
    st.integers(100, 4000),
    st.integers(100, 1000),
)
def test_every_kept_version_can_be_restored(
    steps: list[int], based: set[int], keep: set[int], now: int, most: int, load: int
) -> None:
    """A line of deltas with rollbacks (numbers of `steps`), one a millisecond, and bases at `based`; thinned three times."""
    line, head = Line(), 1
    visible: dict[int, tuple[tuple[int, int], ...]] = {1: ((1, 1),)}
    for number in steps:
        if number:
            head = sorted(visible)[number % len(visible)]
            continue
        version = max(visible) + 1
        visible[version] = extend(visible[head], head, version)
        line.add(version, head, version, visible[version])
        head = version
    for version in based & line.deltas.keys():
        line.bases[version] = line.deltas[version]
    must = frozenset({*(keep & visible.keys()), max(visible)})
    tiers = Tiers(5, 15, 30, 3, 6, most_bytes=most, load_bytes=load)
    for later in (0, 4, 11):
        line.thin(tiers, max(visible) + now - 20 + later, must)
        there = {*line.deltas, *line.bases}
        assert must <= there
        for version in there:
            assert line.made_from(version) is not None, version
        if most >= 4000:
            young = {one for one in visible if max(visible) + now - 20 + later - one <= 5 and one > 1}
            assert young <= there


@pytest.mark.parametrize("point", ["publish.renamed:1", "compact.merged:1", "compact.removed:9"])
def test_a_compactor_killed_while_it_merges_leaves_every_version_loadable(tmp_path: Path, point: str) -> None:
    registry = started(tmp_path)
    trainer = Trainer(small_settings(), SPEC)
    version = publish(registry, trainer, None)
    digests = {}
    for number, batch in enumerate(batches(0, 24)):
        trainer.step(batch)
        version = publish(registry, trainer, version, created_at_ms=number * 150_000)
        digests[version] = checkpoint.digest(trainer)
    with killed_at(point):
        thin(registry, TIERS, now_ms=HOUR_MS + 24 * 150_000)
    for again in (False, True):
        if again:
            thin(Registry(tmp_path), TIERS, now_ms=HOUR_MS + 24 * 150_000)
        reader = Registry(tmp_path)
        for one in reader.versions()[1:]:
            checkpoint.restore(reader, one, trainer, SPEC.digest)
            assert checkpoint.digest(trainer) == digests[one]
    # Of 24 in an hour one in ten minutes is left, and the newest.
    assert len(Registry(tmp_path).deltas()) <= 8
    assert len(list((tmp_path / "versions").iterdir())) + len(list((tmp_path / "merged").iterdir())) <= 8


def test_an_operators_compactor_waits_until_the_trainers_own_is_done_and_says_what_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.propose(start(**WHO))
    trainer = Trainer(small_settings(), SPEC)
    first = publish(registry, trainer, None)
    trainer.step(batches(0, 1)[0])
    second = publish(registry, trainer, first, created_at_ms=10**15)
    at_work = DirectoryLock(registry.path, layout.COMPACTOR_LOCK).acquire()
    monkeypatch.setattr("trainer.compactor.time.sleep", lambda _: at_work.release())
    settings = small_settings("--paths.state", str(tmp_path))
    tiers = replace(compactor.tiers_of(settings), load_bytes=1000)
    monkeypatch.setattr(compactor, "tiers_of", lambda _: tiers)
    with caplog.at_level(logging.INFO):
        compactor.run_after_others(settings)
    assert "waiting for it" in caplog.text and f"base of version {second}" in caplog.text
    assert registry.bases()[-1] == second


def test_snapshots_of_histories_are_thinned_and_leave_with_the_users_that_they_have(tmp_path: Path) -> None:
    """The newest two stay, and one of each six hours of a day; none from before an erasure."""
    location, hour_ms = DirectoryStore(tmp_path), 3_600_000

    def write(number: int, erased: int = 0) -> None:
        file = SnapshotFile("base", number, (0, 63), 0, 1, "a" * 64, 100)
        ranges = (UserRange(0, number, 1),)
        made = HistorySnapshot(
            number, number, "h", 256, "0-63", "salt", "t", ((0, 1),), [], {}, erased, 1, ranges, (file,)
        )
        location.write(file.name, b"x" * 100)
        location.write(snapshots.document_name(number), documents.encode_sealed(made))

    def kept() -> list[int]:
        files = {int(name.partition("/")[0]) for name in location.names(snapshots.FILES)}
        assert files == {*snapshots.numbers(location)}
        return [number // hour_ms for number in snapshots.numbers(location)]

    for hour in range(60, 100):
        write(hour * hour_ms)
    compactor.thin_snapshots(location, 0, 1 << 40, 100 * hour_ms)
    assert kept() == [77, 83, 89, 95, 98, 99]
    compactor.thin_snapshots(location, 0, 350, 100 * hour_ms)
    assert kept() == [95, 98, 99]
    write(100 * hour_ms, erased=1)
    compactor.thin_snapshots(location, 1, 1 << 40, 100 * hour_ms)
    assert kept() == [100]
    compactor.thin_snapshots(location, 2, 1 << 40, 100 * hour_ms)
    assert kept() == []
