"""Same clicks, same bits: buckets, bundles, tasks, lost caches and replays change no row, no history and no account."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.config.settings import Settings
from state.events.identity import load_salt
from state.features.mask import Mask
from state.features.spec import EVENT
from state.history.appends import Appends
from streaming.attributes import Join
from streaming.distributed.account import Account
from streaming.distributed.bucket import BucketStore, Cells, Delta, restored, stored
from streaming.distributed.worker import JobPlan, JobWorker, close_workers, worker_of
from tests.memory_log import MemoryLog
from tests.streaming.distributed.engine import Engine
from tests.streaming.distributed.shop import (
    TOPIC,
    Click,
    Outcome,
    clicks,
    known_attributes,
    local_form,
    mask_one_user,
    rows_of,
    settings_of,
    users_of,
    written,
)

acts = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "read", "deliver", "deliver", "finish", "keep", "crash", "die"]),
        st.integers(0, 1 << 16),
    ),
    min_size=20,
    max_size=60,
)


class Shop:
    """A log of clicks, and what both forms of the stream have in common."""

    def __init__(self, folder: Path, log: list[Click], partitions: int, masks: bool) -> None:
        self.folder, self.masks = folder, masks
        settings = self.settings()
        self.salt = load_salt(settings.salt_path)
        self.mask = mask_one_user(settings) if masks else Mask.NONE
        self.log: MemoryLog = written(log, partitions, settings)
        self.join: Join = known_attributes(folder / "attributes", settings, self.salt)

    def settings(self, buckets: int = 1, sources: int = 1, cut_rows: int = 1) -> Settings:
        return settings_of(self.folder, buckets, sources, cut_rows, self.masks)

    def local(self, batch_events: int) -> Outcome:
        return local_form(self.folder / "local", self.settings(), self.log, self.join, self.mask, batch_events)

    def plan(self, number: int, settings: Settings) -> JobPlan:
        """A plan whose worker reads this log."""
        plan = JobPlan(f"job-{number}", settings, self.salt.fingerprint, until=self.ends)
        worker_of(plan, self.log, self.join)
        return plan

    @property
    def ends(self) -> dict[int, int]:
        found = self.log.topics().ends(self.settings().kafka.clicks_topic)
        return {partition: end for partition, (_, end) in found.items()}

    def values(self) -> list[bytes]:
        """What is in the training log."""
        return [one.value or b"" for one in self.log.records(self.settings().kafka.microbatches_topic)]

    def letters(self) -> set[bytes | None]:
        """The keys of the dead letters: what was written again has the same."""
        found = self.log.records(self.settings().kafka.dead_letters_topic)
        assert len({one.key for one in found}) == len({tuple(one.headers) for one in found})
        return {one.key for one in found}

    def close(self) -> None:
        close_workers()
        self.join.close()


def distributed(shop: Shop, acts: list[tuple[str, int]], buckets: int, sources: int, sinks: int) -> Outcome:
    """What the distributed form makes of the clicks, whatever happens to it."""
    plan = shop.plan(0, shop.settings(buckets, sources))
    engine = Engine(plan, sinks)
    for number, (act, chance) in enumerate(acts):
        if act == "read":
            engine.read(chance % sources)
        elif act == "deliver":
            engine.deliver(chance % buckets, 1 + chance // buckets % 3)
        elif act == "finish":
            engine.finish(chance % sinks)
        elif act == "keep":
            engine.checkpoint()
        else:
            # A process that lives on has a cache that is ahead of the state; one that died has none.
            dead = act == "die"
            engine.crash(shop.plan(1 + number, shop.settings(buckets, sources, 1 + chance % 3)) if dead else None)
    while len(engine.ended) < sources:
        for source in range(sources):
            if source not in engine.ended:
                engine.read(source)
    engine.checkpoint()
    made = outcome(shop, engine)
    engine.close()
    return made


def outcome(shop: Shop, engine: Engine) -> Outcome:
    """What there is at the end, out of the engine's state alone."""
    worker: JobWorker = worker_of(engine._plan)
    histories: dict[int, bytes] = {}
    waiting: list[tuple[bytes, bytes]] = []
    for state in engine.now.buckets.values():
        cells = Cells(state.head, state.snapshot, state.deltas)
        store = restored(cells, worker.spec.history)
        store.name_actions(worker.spec.actions)
        users = [*users_of(shop.salt)]
        for user, events in zip(users, store.read_many(users), strict=True):
            if len(events):
                assert user not in histories, "a user is in one bucket"
                histories[user] = events.tobytes()
        waiting += store.waiting()
    account = stored(engine.now.account, Account)
    assert account.faults() == ()
    assert account.reached(TOPIC) == {one: end for one, end in shop.ends.items() if end}
    totals = {name: count for name, count in account.totals.items() if name != "elsewhere"}
    return Outcome(rows_of(shop.values()), histories, sorted(waiting), totals)


@given(
    log=clicks,
    acts=acts,
    partitions=st.integers(1, 3),
    buckets=st.sampled_from([1, 2, 4, 8]),
    sources=st.integers(1, 2),
    sinks=st.integers(1, 2),
    batch_events=st.integers(1, 20),
    masks=st.booleans(),
)
# An example takes half a second.
@settings(max_examples=settings().max_examples // 4, deadline=None)
def test_however_it_is_divided_and_taken_back_the_rows_are_those_of_the_local_form(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[Click],
    acts: list[tuple[str, int]],
    partitions: int,
    buckets: int,
    sources: int,
    sinks: int,
    batch_events: int,
    masks: bool,
) -> None:
    shop = Shop(tmp_path_factory.mktemp("shop"), log, partitions, masks)
    try:
        expected = shop.local(batch_events)
        made = distributed(shop, acts, buckets, sources, sinks)
        assert made.rows.keys() == expected.rows.keys()
        assert made.rows == expected.rows
        assert made.histories == expected.histories
        assert made.waiting == expected.waiting
        assert made.totals == expected.totals
        broken = sum(one.action == -1 for one in log)
        assert len(shop.letters()) == broken == expected.totals["dead"]
    finally:
        shop.close()


def test_a_bucket_forgets_what_no_row_can_see_and_its_rows_stay_the_same(tmp_path: Path) -> None:
    """Hours pass: snapshots leave out what lies behind the longest window, and histories are shorter, not other."""
    hours = 3_600_000
    log = [Click(turn % 4, 0, turn % 5, at_ms=turn * hours // 10) for turn in range(400)]
    shop = Shop(tmp_path, log, 2, masks=False)
    try:
        expected = shop.local(7)
        made = distributed(shop, [("read", 0), ("keep", 0), ("die", 4)] * 60, 2, 1, 1)
        assert made.rows == expected.rows
        for user, events in made.histories.items():
            assert expected.histories[user].endswith(events)
    finally:
        shop.close()


def test_leading_events_that_are_old_go_and_none_behind_one_that_is_not() -> None:
    store = BucketStore(16)
    events = np.zeros(5, EVENT)
    events["at_ms"] = [1, 9, 1, 1, 1]
    store.take(Delta(Appends.of(np.array([7, 7, 7, 8, 8], np.uint64), events)))
    assert store.leave_old(lambda some: some["at_ms"] < 5) == 1
    assert store.read_many([7])[0]["at_ms"].tolist() == [9, 1]
    assert (store.users, len(store.read_many([8])[0])) == (1, 0)
