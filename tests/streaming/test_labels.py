"""Impressions and their outcomes through profiler, labels, micro-batches and store: cuts and crashes change no row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.attributes.values import Joined
from state.config.sections import Events, LabelSettings
from state.config.settings import Settings
from state.errors import CorruptStore
from state.events.parser import EventBatch
from state.features.erased import Erased, MaskedUsers
from state.features.spec import FeatureSpec
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, RowFormat, key_of
from state.microbatch.batch import Kind, MicroBatch, erased_rows, happened, new_ranges, trained, trim
from state.microbatch.codec import decode
from state.positions import Source
from state.user_shares import SHARES
from streaming import labels as streaming_labels
from streaming.accounts import faults
from streaming.event_clock import PREFIX, EventClock
from streaming.labels import open_labels
from streaming.profile import Profiler
from streaming.rebuild import Waits
from streaming.rows import Cut, Encoding, Rows, encode_cut, merge_all, merge_appends
from tests.disks import crash
from tests.streaming import pieces
from tests.streaming.pieces import SOURCES
from tests.streaming.test_attribution import NOTHING, Event, Resolved, by_hand

SPEC = FeatureSpec(windows_s=(60, 600, 7200), half_lives_s=(30, 900), history=16, recent_categories=5)
ACTIONS = ("view", "impression", "click")
WEIGHTS = np.array([1.0, 0.25, 3.0], np.float32)
SETTINGS = Settings(
    events=Events(actions=ACTIONS, action_weights=(1.0, 0.25, 3.0)),
    labels=LabelSettings(impressions=("impression",), outcomes=("click",), wait_s=0.1, max_waiting=8 * SHARES),
)
ROLE_OF = {0: streaming_labels.PLAIN, 1: streaming_labels.IMPRESSION, 2: streaming_labels.OUTCOME, NOTHING: NOTHING}
BASE_MS = 1_700_000_000_000
NOW_MS = BASE_MS + 1_000_000

logs = st.lists(
    st.builds(
        Event,
        role=st.sampled_from([0, 1, 1, 2, NOTHING]),
        source=st.integers(0, 1),
        at_ms=st.integers(0, 60) | st.integers(0, 400),
        pair=st.integers(0, 3),
        user=st.sampled_from([0, 0, 9, 9 + SHARES]),
    ),
    min_size=1,
    max_size=50,
)
sizes = st.lists(st.integers(1, 20), min_size=1, max_size=5)


def user_of(event: Event) -> int:
    """Whose it is: one user a partition, where it does not say."""
    return event.user or event.source + 7


def batch_of(positions: list[Event], following: list[int], context: int = 0) -> EventBatch:
    """A batch, `pair` as item; `following` keeps the next offsets."""
    log = [event for event in positions if event.role != NOTHING]
    pair, action = np.array([event.pair for event in log], np.uint64), [event.role for event in log]
    return pieces.batch_of(
        [event.source for event in positions],
        following,
        [event.role == NOTHING for event in positions],
        user=[user_of(event) for event in log],
        item=pair + np.uint64(1),
        category=pair + np.uint64(100),
        action=action,
        at_ms=BASE_MS + np.array([event.at_ms for event in log], np.int64),
        weight=WEIGHTS[np.array(action, np.int64)],
        context=np.full((len(log), context), 5, np.uint64),
    )


@dataclass
class Run:
    """A stream without Kafka: what it wrote, and its store, which a crash closes and opens again."""

    path: Path
    settings: Settings = SETTINGS
    values: list[bytes] = field(default_factory=list)

    def open(self) -> None:
        self.store = HistoryStore(self.path, SPEC.history, 16 << 20)
        self.profiler = Profiler(self.store, SPEC, 1)
        self.clock = EventClock(self.store.extra)
        self.labels = open_labels(self.settings, self.store, SOURCES[0].topic_id)
        self.queue: deque[Rows] = deque()

    def crash(self) -> None:
        crash(self.store)
        self.open()

    def update(self, batch: EventBatch, attributes: Joined | None = None) -> None:
        told = self.clock.follow(batch, batch.ranges, NOW_MS)
        rows = replace(self.profiler.update(batch), attributes=attributes, clock=told)
        self.queue.append(rows if self.labels is None else self.labels.attribute(rows))

    def commit(self, cuts: int = 1, dies: bool = False) -> None:
        """Writes what is queued as `cuts` cuts of one commit; with `dies` the store never hears of it."""
        pieces = [list(part) for part in np.array_split(np.arange(len(self.queue)), cuts)]
        rows = list(self.queue)
        made = [Cut(tuple(rows[index] for index in part), NOW_MS) for part in pieces if len(part)]
        if not made:
            return
        waiting: Changes = {}
        extra: Extra = {}
        if self.labels is not None:
            complete = self.labels.complete
            made = [Cut(tuple(complete(piece, waiting, extra) for piece in cut.pieces), NOW_MS) for cut in made]
        self.values += [value for cut in made for value in encode_cut(cut, Encoding("spec", "salt", 5, 900_000))]
        if dies:
            return
        ready = [piece for cut in made for piece in cut.pieces]
        ranges = merge_all(part for piece in ready for part in piece.batch.ranges)
        clocks = {name: value for piece in ready if piece.clock for name, value in piece.clock.state.items()}
        self.store.commit(merge_appends([piece.appends for piece in ready]), ranges, {**extra, **clocks}, waiting)
        for piece in ready:
            self.profiler.committed(piece)
        self.queue.clear()

    def take(self, batch: EventBatch, attributes: Joined | None = None) -> None:
        self.update(batch, attributes)
        self.commit()

    def rows(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        """What is learned from: (partition, own offset) -> all it says; each once."""
        found: dict[tuple[int, int], tuple[Any, ...]] = {}
        for batch in self.new():
            for index in np.flatnonzero(trained(batch.kind)).tolist():
                place = (batch.header.ranges[batch.source[index]].source.partition, int(batch.opened[index]))
                assert place not in found
                found[place] = (
                    Kind(int(batch.kind[index])),
                    int(batch.offset[index]),
                    float(np.nan_to_num(batch.label[index], nan=-1)),
                    float(batch.weight[index]),
                    int(batch.delay_ms[index]),
                    batch.features[index].tobytes() + batch.category_windows[index].tobytes(),
                    int(batch.item[index]),
                )
        return found

    def new(self) -> list[MicroBatch]:
        """The micro-batches without what was written twice."""
        marks: dict[Source, int] = {}
        kept = []
        for value in self.values:
            batch = decode(value)
            keep, marks = trim(batch, marks)
            kept.append(batch.take(keep))
        return kept


def ran(
    path: Path,
    log: list[Event],
    cuts: list[int],
    fates: list[str],
    options: Settings = SETTINGS,
) -> Run:
    """Runs `log` in batches of `cuts`; after each batch it may commit, die, or let it wait."""
    run = Run(path, options)
    run.open()
    committed = at = turn = deaths = 0
    following = [0, 0]
    while at < len(log):
        size = cuts[turn % len(cuts)]
        run.update(batch_of(log[at : at + size], following))
        at += size
        fate = fates[turn % len(fates)]
        turn += 1
        if fate != "wait" and (fate == "commit" or deaths > 10):
            run.commit(cuts=1 + turn % 2)
            committed = at
        elif fate != "wait":
            deaths += 1
            run.commit(dies=fate == "die after the log")
            run.crash()
            at = committed
            following = [run.store.positions().get(source, 0) for source in SOURCES]
    run.commit()
    return run


fates = st.lists(st.sampled_from(["commit", "commit", "wait", "die after the log"]), min_size=1, max_size=6)


@given(log=logs, cuts=sizes, fates=fates)
@settings(max_examples=25, deadline=None)
def test_however_it_is_cut_and_dies_each_row_is_learned_once_as_a_join_by_hand_labels_it(
    tmp_path_factory: pytest.TempPathFactory, log: list[Event], cuts: list[int], fates: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run = ran(folder / "run", log, cuts, fates)
    calm = ran(folder / "calm", log, [len(log)], ["commit"])
    assert run.rows() == calm.rows()

    kinds, resolved = by_hand(
        [
            event._replace(role=ROLE_OF[event.role], pair=event.pair + 100 * user_of(event), user=user_of(event))
            for event in log
        ],
        most=8,
    )
    reached, places = [0, 0], []
    for event in log:
        if event.role != NOTHING:
            places.append((event.source, reached[event.source]))
        reached[event.source] += 1
    at_once = {place for place, kind in zip(places, kinds, strict=True) if kind == Kind.ROW}
    expected = {(one.source, one.opened): one for one in resolved}
    assert set(run.rows()) == at_once | set(expected)
    for place, (kind, offset, label, weight, *_) in run.rows().items():
        one = expected.get(place, Resolved(place[0], place[1], place[1], int(Kind.ROW)))
        assert (kind, offset) == (one.kind, one.by)
        assert (label, weight) == {Kind.ROW: (-1, 1.0), Kind.JOINED: (1, 3.0), Kind.EXPIRED: (0, 0.25)}[kind]

    # The windows are those that a stream without labels computes at the impression's place.
    plain = ran(folder / "plain", log, [9], ["commit"], replace(SETTINGS, labels=LabelSettings()))
    assert {place: row[5] for place, row in run.rows().items()} == {
        place: row[5] for place, row in plain.rows().items() if place in run.rows()
    }
    assert run.store.digest() == plain.store.digest()

    # Every impression has one fate, and the store can be made anew from the log.
    assert faults(run.store) == ()
    assert run.store.waiting_rows() == kinds.count(Kind.OPENED) - len(resolved)
    held = rebuilt(folder / "rebuilt", run.values)
    assert list(held.waiting()) == list(run.store.waiting()) == list(calm.store.waiting())
    for name in map(str, SOURCES):
        assert witnesses(held, name) == witnesses(run.store, name) == witnesses(calm.store, name)
    assert (held.counts(), held.digest()) == (run.store.counts(), run.store.digest())
    assert faults(held) == ()
    for store in (run.store, calm.store, plain.store, held):
        store.close()


def witnesses(store: HistoryStore, name: str) -> bytes:
    """Turns, clock and witnesses of a source, nothing where nobody was heard; what readers were told depends on the batches."""
    value = store.extra(PREFIX + name) or b""
    # Before the first turn, a clock is stored if another source was heard in the same batch.
    return value[:16] + value[24:] if any(value[:8]) else b""


def rebuilt(path: Path, values: list[bytes], erased: Erased = Erased.NOBODY) -> HistoryStore:
    """A store made from micro-batches, one commit each."""
    store = HistoryStore(path, SPEC.history, 16 << 20)
    waits, clock = Waits(store), EventClock(store.extra)
    marks: dict[Source, int] = {}
    for value in values:
        batch = decode(value)
        keep, after = trim(batch, marks)
        parts, _ = new_ranges(batch, marks)
        gone = erased_rows(batch, erased)
        parts = waits.follow(batch.take(keep), gone[keep], parts)
        kept = batch.take(keep & ~gone & happened(batch.kind))
        changes, extra = waits.to_commit()
        extra |= clock.follow(kept, kept.header.ranges, kept.header.created_ms).state
        store.commit(Appends.of(kept.user, events_of(kept, kept.header.ranges)), merge_all(parts), extra, changes)
        marks = after
    store.commit(Appends.none(), waits.dropped(marks))
    return store


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run")
    made.open()
    yield made
    made.store.close()


SHOWN, CLICKED, PASSED = Event(1, 0, 0, 3), Event(2, 0, 50, 3), Event(0, 0, 500, 0)


def test_a_closing_whose_opening_the_log_no_longer_holds_leaves_the_account_balanced(run: Run, tmp_path: Path) -> None:
    following = [0, 0]
    for event in (SHOWN, CLICKED):
        run.take(batch_of([event], following))
    held = rebuilt(tmp_path / "rebuilt", run.values[1:])
    assert (held.totals["feedback"], held.totals.get("joined", 0), faults(held)) == (1, 0, ())
    held.close()


def test_what_an_erased_user_was_shown_waits_no_more_and_the_account_says_so(run: Run, tmp_path: Path) -> None:
    following = [0, 0]
    another = SHOWN._replace(pair=4)
    for event in (SHOWN, another, CLICKED, SHOWN._replace(source=1)):
        run.take(batch_of([event], following))
    assert run.store.waiting_rows() == 2
    erased = Erased.NOBODY.and_also(MaskedUsers.of([7]), [(SOURCES[0].topic, 0, 3)], 2, 3)
    held = rebuilt(tmp_path / "rebuilt", run.values, erased)
    assert (held.totals["opened"], held.totals["joined"], held.totals["dropped"]) == (3, 1, 1)
    assert (held.waiting_rows(), faults(held)) == (1, ())
    assert (len(held.read(7)), len(held.read(8))) == (0, 1)
    run.store.forget(erased)
    assert list(held.waiting()) == list(run.store.waiting())
    assert held.counts() == run.store.counts()
    held.close()


def test_an_outcome_with_a_label_of_its_own_gives_it_and_an_impression_with_one_does_not_wait(run: Run) -> None:
    batch = batch_of([SHOWN, CLICKED, SHOWN._replace(at_ms=60)], [0, 0])
    batch.label[1:] = [0.5, 0.0]
    run.take(batch)
    assert [(row[0], row[2]) for row in run.rows().values()] == [(Kind.JOINED, 0.5), (Kind.ROW, 0.0)]


def test_the_request_pairs_where_there_is_one(run: Run) -> None:
    batch = replace(batch_of([SHOWN, SHOWN, CLICKED], [0, 0]), request=np.array([8, 9, 8], np.uint64))
    run.take(batch)
    assert list(run.rows()) == [(0, 0)]
    run.crash()
    # The other one waits on over a restart, under its own request.
    run.take(replace(batch_of([CLICKED, CLICKED], [3, 0]), request=np.array([8, 9], np.uint64)))
    assert {place: row[1] for place, row in run.rows().items()} == {(0, 0): 2, (0, 1): 4}


def test_without_labels_nothing_waits_and_what_waited_before_still_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, replace(SETTINGS, labels=LabelSettings()))
    run.open()
    assert run.labels is None
    run.settings = SETTINGS
    run.crash()
    run.take(batch_of([SHOWN], [0, 0]))
    run.settings = replace(SETTINGS, labels=LabelSettings(wait_s=0.1))
    run.crash()
    run.take(batch_of([SHOWN, PASSED], [1, 0]))
    assert {place: row[0] for place, row in run.rows().items()} == {
        (0, 0): Kind.EXPIRED,
        (0, 1): Kind.ROW,
        (0, 2): Kind.ROW,
    }
    assert run.store.waiting_rows() == 0
    run.crash()
    assert run.labels is None
    run.store.close()


def test_rows_wait_on_where_a_field_of_context_was_added(run: Run) -> None:
    run.take(batch_of([SHOWN], [0, 0]))
    run.crash()
    run.update(batch_of([SHOWN, CLICKED], [1, 0], context=2))
    run.take(batch_of([CLICKED], [3, 0], context=2))
    assert set(run.rows()) == {(0, 0), (0, 1)}
    contexts = {
        int(at): row.tolist() for batch in run.new() for at, row in zip(batch.opened, batch.context, strict=True)
    }
    assert (contexts[0], contexts[1]) == ([0, 0], [5, 5])


def test_an_impression_keeps_the_attributes_of_its_own_moment(run: Run) -> None:
    """What became of the user until the click is not what the impression was shown to."""

    def known(user: int) -> Joined:
        return Joined(
            np.full((1, 2), user, np.uint64), np.full((1, 1), 9, np.uint64), {}, (("age", "city"), ("brand",))
        )

    run.take(batch_of([SHOWN], [0, 0]), known(3))
    run.crash()
    run.take(batch_of([CLICKED], [1, 0]), known(4))
    (joined,) = [batch.take(batch.kind == Kind.JOINED) for batch in run.new() if (batch.kind == Kind.JOINED).any()]
    assert joined.header.attributes == (("age", "city"), ("brand",))
    assert joined.user_attributes.tolist() == [[3, 3]] and joined.item_attributes.tolist() == [[9]]


def test_impressions_of_a_topic_that_was_made_anew_are_dropped(run: Run) -> None:
    run.take(batch_of([SHOWN, SHOWN], [0, 0]))
    assert streaming_labels.forget_other_topics(run.store, "cd" * 16) == 2
    assert (run.store.waiting_rows(), run.store.totals["dropped"], faults(run.store)) == (0, 2, ())
    assert streaming_labels.forget_other_topics(run.store, "cd" * 16) == 0


def test_a_row_that_is_lost_from_the_store_is_a_fault_and_ends_the_stream_when_it_is_needed(run: Run) -> None:
    run.take(batch_of([SHOWN], [0, 0]))
    run.store.commit(Appends.none(), waiting={key_of(SOURCES[0], 0): None})
    (fault,) = faults(run.store)
    assert "1 impressions must be waiting" in fault
    run.update(batch_of([CLICKED], [1, 0]))
    with pytest.raises(CorruptStore, match="1 rows that wait are not in the store"):
        run.commit()


def test_rows_of_a_later_release_are_refused() -> None:
    with pytest.raises(CorruptStore, match="later release"):
        RowFormat({"mood": ()})
