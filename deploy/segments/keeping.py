"""Keeps who is in which segment: those who clicked at once, all users now and then, and all at once where control changed.

1. Control, the mask and the pointer are looked at: after a rollback, a pin, a mask or an erasure everybody is judged anew,
   erased users first.
2. Users whose clicks came into the histories are due.
3. Some of who is due are judged, as a worker would answer them now, and some of the walk over all users.
4. Who came in or left is written to the topic, then to the store that workers read.
5. Where all erased users have left, the store is written anew without their bytes, and the registry is told.
6. Now and then a child lists lookalikes; where 1. finds a change all lists go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from deploy.segments.clicked import ClickedUsers
from deploy.segments.judging import ProfileJudge
from deploy.segments.lookalike_lists import LookalikeLists
from deploy.segments.members import Members
from deploy.segments.sweep import UserSweep
from deploy.serving.erasing import name_of
from deploy.serving.notes import CONTROL_NOTE, MASK_NOTE
from deploy.serving.predictor import Predictor
from state.config.settings import Settings
from state.disk.files import HOST
from state.errors import SettingsError
from state.features.mask import Mask
from state.layout import SEGMENTS
from state.log import Log, topic_plan
from state.metrics import SegmentMetrics
from state.registry.erasing import ErasureReport, report
from state.segments.configured import segments_of
from state.segments.store import SegmentStore
from state.storage.shares import SERVING, map_bytes

AT_ONCE = 256
"""Users who are judged in a round, of either kind; some 70 ms."""
FETCH_S, SOON_S = 0.1, 0.01
MOST_DUE = 200_000
"""Users who clicked and were not judged yet, some 100 bytes each; with more all are looked at instead."""
CLICK, SWEEP, CHANGE = "click", "sweep", "change"
_log = logging.getLogger(__name__)


class SegmentKeeper:
    """Keeps the segments of one deployment on one of its serving hosts; used by one thread.

    Args:
        settings: Of the loop; they name segments.
        predictor: Gives what answers on this host; its questions call users by their pseudonyms.
        log: Where the topics are.
        metrics: Of the process.
        now_ms: The wall clock.
        clock_s: A monotonic clock.

    Raises:
        SettingsError: An expression is none.
        StoreError: The store of members cannot be opened.
    """

    def __init__(
        self,
        settings: Settings,
        predictor: Callable[[], Predictor],
        log: Log,
        metrics: SegmentMetrics,
        now_ms: Callable[[], int],
        clock_s: Callable[[], float],
    ) -> None:
        segments = segments_of(settings)
        self._settings, self._predictor, self._kafka = settings, predictor, log
        self._metrics, self._now_ms = metrics, now_ms
        self._path: Path = settings.serving_dir / SEGMENTS
        self._store = SegmentStore.open_anew(self._path, map_bytes(settings, SERVING, SEGMENTS, self._path))
        self._judge = ProfileJudge(segments)
        self._members = Members(log, settings.segments.topic, self._store, segments, metrics)
        self._clicked = ClickedUsers(settings, log, metrics)
        every_s = settings.segments.sweep_s
        self._sweep = UserSweep(lambda: predictor().histories, self._store, segments, every_s, clock_s, AT_ONCE)
        self._lists = LookalikeLists(settings, clock_s)
        self._begun = False
        self._due: dict[int, None] = {}
        self._seen: tuple[bytes | None, int, int] = (None, 0, 0)
        # Erased users who are to be judged, and the erasure that is done then; -1 before control was seen.
        self._leaving: set[int] = set()
        self._erased, self._told = -1, 0

    def step(self) -> None:
        """One round; waits for clicks `FETCH_S` at most where there is nothing else to do.

        Raises:
            SpringtideError: Something that this needs is away; come again.
            OSError: Likewise.
        """
        if not self._begun:
            with self._kafka.topics() as topics:
                topics.ensure(*topic_plan.segments(self._settings))
            self._members.read_topic()
            self._begun = True
        predictor = self._predictor()
        # 1.
        self._look(predictor)
        # 2.
        busy = bool(self._due) or self._sweep.hurried
        wait_s = 0.0 if busy else SOON_S if self._clicked.waits else FETCH_S
        self._due.update(dict.fromkeys(self._clicked.take(predictor.histories, wait_s)))
        if self._clicked.missed or len(self._due) > MOST_DUE:
            self._due = dict.fromkeys(self._leaving)
            self._clicked.missed = False
            self._sweep.hurry()
        # 3. 4.
        self._take(list(islice(self._due, AT_ONCE)), CLICK)
        cause = CHANGE if self._sweep.hurried else SWEEP
        self._take(self._sweep.users(), cause)
        self._metrics.waiting.set(len(self._due))
        self._metrics.sweep_seconds.set(self._sweep.took_s)
        # 5.
        if self._erased > self._told and not self._leaving:
            self._tell_erased()
        # 6.
        if not self._sweep.hurried and not self._leaving:
            self._lists.tick()

    def disconnect(self) -> None:
        """Ends the connections to the log; the next step makes others."""
        self._clicked.disconnect()
        self._members.disconnect()

    def close(self) -> None:
        """Ends the connections, and closes the store of members."""
        self.disconnect()
        self._lists.close()
        self._store.close()

    def _look(self, predictor: Predictor) -> None:
        with predictor.reading() as reader:
            served, control = reader.served(), reader.note(CONTROL_NOTE)
            mask = reader.note(MASK_NOTE) if control != self._seen[0] else None
        if served is None:
            return
        known, epoch, version = self._seen
        self._seen = (control, served.epoch, served.version)
        if (control, served.epoch) == (known, epoch) and served.version >= version:
            return
        self._lists.drop()
        if control != known:
            erased = Mask.from_bytes(mask or b"{}").erased
            if erased.last > self._erased:
                self._leaving.update(user for one in erased.after(max(self._erased, 0)) for user in one.users)
                self._due = dict.fromkeys(self._leaving) | self._due
                self._erased = erased.last
        self._sweep.hurry()

    def _take(self, users: list[int], cause: str) -> None:
        """Judges users, and takes them in and out."""
        if not users:
            return
        # Asked for anew: each time the stores may be opened again, and those of before are closed then.
        self._members.take(self._judge.judge(self._predictor(), users))
        for user in users:
            self._due.pop(user, None)
            self._leaving.discard(user)
        self._metrics.judged.labels(cause).inc(len(users))

    def _tell_erased(self) -> None:
        self._members.compact()
        last, now_ms = self._erased, self._now_ms()
        part = name_of(self._path, "segments")
        report(self._settings.registry_dir, ErasureReport(part, HOST, str(self._path), last, last, 0, now_ms))
        self._told = last
        self._metrics.erased.set(last)
        _log.info("erasure %d: users have left all segments", last)


def require_segments(settings: Settings) -> None:
    """Refuses expressions that are none, and settings without any.

    Raises:
        SettingsError: Says which, and where.
    """
    if not segments_of(settings):
        raise SettingsError("[segments] names no segment: there is nothing to keep", 'write NAME = "EXPRESSION" there')
