"""What the stream takes from control: masks, the branch of the log, and erasures."""

from __future__ import annotations

from pathlib import Path

import pytest

from state import layout
from state.disk.lmdb_store import PAGES_MS, LmdbStore
from state.errors import StoreError, StoreFull
from state.features.erased import Erased, MaskedUsers
from state.features.mask import Mask
from state.history.rewinding import branch_of
from state.layout import CONTROL, HISTORIES
from state.registry.control import Decision, follow, pin, roll_back, start
from state.registry.controls import Controls
from state.registry.hosts import erasure_reports
from state.registry.log_line import WHOLE, turned
from streaming.control import POLL_S, ControlWatch, apply_erasures, compaction_is_due
from tests.kills import killed_at
from tests.state.history.test_forgetting import OTHER, SOURCE, USER, filled

WHO: Decision = {"actor": "ann", "reason": "bots", "now_ms": 5}
LINE = turned(WHOLE, 1, 4, 9, ())


class Seconds:
    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def test_without_a_registry_nothing_is_masked_and_the_epoch_stays(tmp_path: Path) -> None:
    watch = ControlWatch(tmp_path / "registry", LINE, Seconds())
    assert (watch.desired.mask, watch.desired.log_epoch, watch.changed()) == (Mask.NONE, 2, False)
    assert not (tmp_path / "registry").exists(), "it is the trainer's to make"


def test_only_a_mask_or_another_line_asks_for_something_else(tmp_path: Path) -> None:
    controls = Controls(tmp_path)
    controls.propose(start(**WHO))
    watch = ControlWatch(tmp_path, WHOLE, Seconds())
    for calm in (
        lambda now: pin(now, 3, **WHO),
        lambda now: follow(now, **WHO),
        lambda now: roll_back(now, 3, Mask.NONE, **WHO),
    ):
        controls.change(calm)
        assert not watch.changed()
    controls.change(lambda now: roll_back(now, 3, Mask(times=((0, 9),)), **WHO))
    assert watch.changed()
    masked = ControlWatch(tmp_path, WHOLE, Seconds())
    assert (masked.desired.mask.times, masked.changed()) == (((0, 9),), False)
    controls.change(lambda now: roll_back(now, 3, Mask.NONE, **WHO, log=LINE))
    assert masked.changed()


def test_it_looks_ten_times_a_second_and_goes_on_where_control_cannot_be_read(tmp_path: Path) -> None:
    controls, looked = Controls(tmp_path), [0.0]
    controls.propose(start(**WHO))
    watch = ControlWatch(tmp_path, WHOLE, lambda: looked[0])
    controls.change(lambda now: roll_back(now, 3, Mask(times=((0, 9),)), **WHO))
    assert watch.changed()
    looked[0] = POLL_S / 2
    assert not watch.changed()
    path = tmp_path / layout.CONTROL / "00000003.json"
    path.write_bytes(b"no control")
    looked[0] = 2 * POLL_S
    assert watch.changed(), "what was seen last still holds"


def test_histories_of_a_later_epoch_than_control_knows_are_refused(tmp_path: Path) -> None:
    Controls(tmp_path).propose(start(**WHO))
    with pytest.raises(StoreError, match=r"epoch 2 of the training log.*another registry"):
        ControlWatch(tmp_path, LINE)


def erased(*users: int) -> Erased:
    found = Erased.NOBODY
    for number, user in enumerate(users):
        found = found.and_also(MaskedUsers.of([user]), [(SOURCE.topic, 1, 100)], 2 + number, 3)
    return found


def test_a_shard_forgets_and_tells_and_writes_its_store_anew_at_most_each_ten_minutes(tmp_path: Path) -> None:
    store = filled(tmp_path / "stream-0" / HISTORIES)
    registry = tmp_path / "registry"
    registry.mkdir()
    assert apply_erasures(store, registry, Erased.NOBODY, PAGES_MS) is None and erasure_reports(registry) == []
    assert compaction_is_due(store, erased(USER), PAGES_MS)
    assert apply_erasures(store, registry, erased(USER), PAGES_MS) is None
    (told,) = erasure_reports(registry)
    assert (told.part, told.path, told.through, told.pages) == ("stream-0", str(tmp_path / "stream-0"), 1, 1)
    assert (len(store.read(USER)), store.waiting_rows()) == (0, 1)
    # Another one a second later: gone at once, from free pages when the ten minutes are over.
    both, later_ms = erased(USER, OTHER), PAGES_MS + 1000
    assert not compaction_is_due(store, both, later_ms)
    assert apply_erasures(store, registry, both, later_ms) == (PAGES_MS - 1000) / 1000
    (told,) = erasure_reports(registry)
    assert (told.through, told.pages, store.users()) == (2, 1, 0)
    assert apply_erasures(store, registry, both, 2 * PAGES_MS) is None
    assert erasure_reports(registry)[0].pages == 2
    store.close()


def test_a_shard_that_dies_having_forgotten_tells_it_at_its_next_start(
    tmp_path: Path,
) -> None:
    store = filled(tmp_path / "stream-0" / HISTORIES)
    registry = tmp_path / "registry"
    registry.mkdir()
    with killed_at("stream.forgotten"):
        apply_erasures(store, registry, erased(USER), PAGES_MS)
    assert (len(store.read(USER)), erasure_reports(registry)) == (0, [])
    assert apply_erasures(store, registry, erased(USER), PAGES_MS) is None
    (told,) = erasure_reports(registry)
    assert (told.through, told.pages, len(store.read(USER))) == (1, 1, 0)
    store.close()


def test_a_store_that_has_no_room_for_its_copy_is_tried_again_and_a_registry_that_is_gone_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path / "stream-0" / HISTORIES)

    def full(store: LmdbStore) -> None:
        raise StoreFull("the disk is full", "free space")

    monkeypatch.setattr(LmdbStore, "compact", full)
    assert apply_erasures(store, tmp_path / "nowhere", erased(USER), PAGES_MS) == PAGES_MS / 1000
    assert len(store.read(USER)) == 0
    store.close()


def test_the_job_ends_in_order_when_the_shard_is_to_be_opened_again(tmp_path: Path) -> None:
    store, now_s = filled(tmp_path / HISTORIES), [100.0]
    (tmp_path / "registry" / CONTROL).mkdir(parents=True)
    watch = ControlWatch(tmp_path / "registry", branch_of(store), lambda: now_s[0])
    watch.open_again_in(None)
    now_s[0] += 1e6
    assert not watch.changed()
    watch.open_again_in(9.0)
    now_s[0] += 8.5
    assert not watch.changed()
    now_s[0] += 0.5
    assert watch.changed()
    store.close()
