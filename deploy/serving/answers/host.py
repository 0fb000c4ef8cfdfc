"""A serving host as a worker reads it: opens the stores, and answers queries of any protocol between other work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.predictor import Predictor, Stores
from deploy.serving.answers.query import Query, iso
from deploy.serving.answers.queue import Batcher, Profiles, QueueLimits, StepQueue
from deploy.serving.host_files import CAUGHT_UP_EXTRA, CLOCK_EXTRA, REFUSED_NOTE, Currency, refused_versions
from springtide_client.answers import (
    About,
    ListPrecision,
    Lookalike,
    Profile,
    SegmentLookalikes,
    SegmentMember,
    SegmentPage,
    SegmentSize,
    SegmentSizes,
    UserSegment,
)
from state.attributes.values import AttributeStore, tables_of
from state.config.settings import Settings
from state.errors import BadRequest, NotHeld, NotReady, SpringtideError, StoreError
from state.events.identity import Salt, user_id
from state.history.appends import ACTIONS, numbered
from state.history.store import HistoryStore
from state.kernels import Kernels
from state.layout import ATTRIBUTES, DATA, HISTORIES, LOOKALIKES, ROWS, SEGMENTS
from state.metrics import WorkerMetrics
from state.rows.store import RowStore
from state.segments import Membership, SegmentStore, read_lookalikes, texts_of
from state.user_shares import SHARES

READ_S = 0.1
"""Interval between updates of the item sources, after the first request for items."""
MORE_S = 0.005
"""The interval while there is more to read."""
_CHECK_MS = 1000

Found = TypeVar("Found", bound=About)


class HostSegments:
    """Reads segments, members and lookalikes. Used by one thread."""

    def __init__(self, settings: Settings, salt: Salt) -> None:
        self._path = settings.serving_dir / SEGMENTS
        self._lists, self._listed = settings.serving_dir / LOOKALIKES, settings.segments.lookalikes
        self._texts, self._salt = texts_of(settings), salt
        self._store: SegmentStore | None = None
        self._file = (0, 0)

    def sizes(self) -> SegmentSizes:
        """Returns all segments with their sizes; raises NotReady if this host has no store of members."""
        sizes = self._opened().sizes() if self._texts else {}
        return SegmentSizes([self._size(name, sizes) for name in self._texts])

    def page(self, segment: str, start: int, most: int) -> SegmentPage:
        """Returns a page of at most `most` members of a segment, from pseudonym `start` on.

        Raises:
            BadRequest: No segment has this name.
            NotReady: This host has no store of members.
        """
        self._require(segment)
        store = self._opened()
        members = store.page(segment, start, most + 1)
        return SegmentPage(
            name=segment,
            expression=self._texts[segment],
            size=store.sizes().get(segment, 0),
            members=[_member(user, membership) for user, membership in members[:most]],
            next=f"{members[most][0]:016x}" if len(members) > most else None,
        )

    def of_user(self, segment: str, user: str) -> UserSegment:
        """Returns whether the user with this raw id is in a segment; raises the errors of `page`."""
        self._require(segment)
        (membership,) = self._opened().memberships([(segment, user_id(self._salt, user))])
        if membership is None:
            return UserSegment(segment, user, False, None, None, None)
        return UserSegment(segment, user, True, iso(membership.since_ms), membership.since_ms, membership.version)

    def lookalikes(self, segment: str, most: int) -> SegmentLookalikes:
        """Returns at most `most` lookalikes of a segment's members.

        Raises:
            BadRequest: No segment has this name.
            NotReady: This host has no store of members, or no list of lookalikes yet.
            CorruptStore: The list is damaged.
        """
        self._require(segment)
        store, listed = self._opened(), read_lookalikes(self._lists, segment)
        if listed is None:
            do = "try again later: they are computed each hour, once a user is in the segment"
            raise NotReady(
                f"no lookalikes of {segment} are listed here",
                do if self._listed else "set segments.lookalikes, and restart",
            )
        joined = store.memberships([(segment, int(user.pseudonym, 16)) for user in listed.lookalikes])
        near = [user for user, membership in zip(listed.lookalikes, joined, strict=True) if membership is None]
        return SegmentLookalikes(
            segment=segment,
            version=listed.version,
            at=iso(listed.at_ms),
            at_ms=listed.at_ms,
            members=listed.members,
            users=listed.users,
            lookalikes=[Lookalike(*user) for user in near[:most]],
            precision=[ListPrecision(*point) for point in listed.precision],
        )

    def close(self) -> None:
        """Closes the store; the next query reopens it."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _opened(self) -> SegmentStore:
        file = _file_at(self._path)
        if self._store is None or file != self._file:
            self.close()
            try:
                self._store = SegmentStore(self._path, readonly=True)
            except StoreError as error:
                raise NotReady(error.what, error.do) from error
            self._file = file
        return self._store

    def _require(self, segment: str) -> None:
        if segment not in self._texts:
            listed = ", ".join(self._texts)
            do = f"ask for one of {listed}" if listed else "name it in [segments], and start again"
            raise BadRequest(f"there is no segment {segment[:80]!r}", do, http_status=404)

    def _size(self, name: str, sizes: dict[str, int]) -> SegmentSize:
        return SegmentSize(name, self._texts[name], sizes.get(name, 0))


def _member(user: int, membership: Membership) -> SegmentMember:
    return SegmentMember(f"{user:016x}", iso(membership.since_ms), membership.since_ms, membership.version)


class Host:
    """The stores of one serving host, as a worker reads them; reopened if the applier rebuilt them. Used by one thread.

    Attributes:
        impressions: The numbers of the actions that are impressions (`labels.impressions`).
        serving: The section `serving` of the settings.
        require: Raises NotHeld if this host does not hold a user, by pseudonym; None if it holds all users.
        kernels: The kernels that this process compiles; None if answers do not wait for them.
        warm: Whether answers of each kind have been computed once to warm up.
        others_wait: Whether a worker that is not prepared still accepts connections of the same port.
    """

    COLD = "the first answers are being prepared"
    OTHERS = "another worker of this host, which is not prepared, still accepts connections"

    def __init__(
        self, settings: Settings, salt: Salt, now_ms: Callable[[], int], pseudonym: Callable[[str], int] | None = None
    ) -> None:
        self._settings, self._salt, self._pseudonym, self._now_ms = settings, salt, pseudonym, now_ms
        self.segments = HostSegments(settings, salt)
        impressions = settings.labels.impressions
        self.impressions = tuple(n for n, name in enumerate(settings.events.actions) if name in impressions)
        self.serving, self.shares = settings.serving, settings.serving.user_shares
        self.require: Callable[[int], None] | None = None if self.shares.is_all else self._require
        self.kernels: Kernels | None = None
        self.warm = True
        self.others_wait: Callable[[], bool] = lambda: False
        self._rows: RowStore | None = None
        self._histories: HistoryStore | None = None
        self._attributes: AttributeStore | None = None
        self._predictor: Predictor | None = None
        self._sources: ItemSources | None = None
        self._files: tuple[tuple[int, int], ...] = ()
        self._check_at_ms = 0
        self._currency = Currency(settings.serving_dir)

    def predictor(self) -> Predictor:
        """Returns the predictor; checks once a second whether a store's file was replaced, and then reopens all stores.

        Raises:
            NotReady: A store does not exist yet, or kernels are still being compiled.
        """
        if self.kernels is not None and not self.kernels.done:
            raise NotReady(self.kernels.progress, "wait until /readyz answers 200")
        now_ms = self._now_ms()
        if self._predictor is None or not self._check_at_ms - _CHECK_MS <= now_ms < self._check_at_ms:
            self._check_at_ms = now_ms + _CHECK_MS
            files = tuple(_file_at(self._settings.serving_dir / name) for name in (ROWS, HISTORIES, ATTRIBUTES))
            if self._predictor is None or files != self._files:
                self.close()
                self._predictor = self._open()
                self._files = files
        return self._predictor

    @property
    def version(self) -> int | None:
        """The version of the last answer, if any."""
        return None if self._predictor is None else self._predictor.version

    def sources(self) -> ItemSources:
        """Returns the sources of candidate items, rebuilt when the stores are reopened; the caller reads them.

        Raises:
            NotReady: A store does not exist yet.
        """
        histories = self.predictor().histories
        if self._sources is None:
            assert self._rows is not None
            self._sources = ItemSources(histories, self._rows)
        return self._sources

    def answers(self) -> bool:
        """Whether this worker can compute answers, however old: it has kernels, stores, a version and its program."""
        try:
            predictor = self.predictor()
            with predictor.reading() as reader:
                predictor.load_version(reader)
        except SpringtideError:
            return False
        return True

    def missing(self) -> dict[str, str]:
        """Returns why this worker cannot answer, by part (histories, version, program); empty when ready.

        With `serving.max_age_s`, parts that are too old are included.
        """
        if self.kernels is not None and not self.kernels.done:
            return {"program": self.kernels.progress}
        try:
            predictor = self.predictor()
        except SpringtideError as error:
            return {"histories" if self._rows is not None else "version": str(error)}
        missing = {}
        if predictor.histories.extra(CLOCK_EXTRA) is None:
            missing["histories"] = "no micro-batch has been taken into the histories yet; is the stream running?"
        elif predictor.histories.extra(CAUGHT_UP_EXTRA) is None:
            missing["histories"] = (
                "the histories are still being rebuilt from the micro-batch topic; wait for the applier"
            )
        try:
            with predictor.reading() as reader:
                predictor.load_version(reader)
        except NotReady as error:
            missing["version"] = str(error)
        except SpringtideError as error:
            missing["program"] = str(error)
        if max_age_s := self.serving.max_age_s:
            missing = self._currency.older_than(max_age_s, self._now_ms()) | missing
        if not missing and not self.warm:
            return {"program": self.COLD}
        return missing or ({"program": self.OTHERS} if self.others_wait() else {})

    def degraded(self) -> dict[str, str]:
        """Returns why a part (histories, version) does not get updates; empty if both do."""
        return self._currency.degraded(self._now_ms())

    def refused(self) -> tuple[int, str] | None:
        """Returns the newest version after the served one that failed its probe, with the reason; None without one."""
        if self._rows is None:
            return None
        with self._rows.reader() as reader:
            served, refused = reader.served(), refused_versions(reader.note(REFUSED_NOTE))
        return max((entry for entry in refused.items() if served is None or entry[0] > served.version), default=None)

    def close(self) -> None:
        """Closes the stores."""
        self.segments.close()
        for store in (self._rows, self._histories, self._attributes):
            if store is not None:
                store.close()
        self._rows = self._histories = self._attributes = self._predictor = self._sources = None

    def _open(self) -> Predictor:
        settings, folder, shares = self._settings, self._settings.serving_dir, self.shares
        try:
            self._rows = RowStore(folder / ROWS, readonly=True, shares=shares)
            self._histories = HistoryStore(folder / HISTORIES, settings.features.history, readonly=True, shares=shares)
            self._histories.numbering, _ = numbered(self._histories.extra(ACTIONS), settings.events.actions)
            if tables_of(settings.attributes):
                self._attributes = AttributeStore(folder / ATTRIBUTES, readonly=True, shares=shares)
        except StoreError as error:
            raise NotReady(error.what, error.do) from error
        stores = Stores(self._rows, self._histories, self._attributes)
        return Predictor(stores, settings, self._salt, self._now_ms, self._pseudonym, self.require)

    def _require(self, user: int) -> None:
        if user not in self.shares:
            raise NotHeld(f"the user is of share {user % SHARES}, and this host holds {self.shares}")


def _file_at(folder: Path) -> tuple[int, int]:
    """Returns the device and inode of a store's file; inode numbers are unique only within one device."""
    try:
        status = (folder / DATA).stat()
        return status.st_dev, status.st_ino
    except FileNotFoundError:
        return 0, 0


class Answers:
    """Answers the queries of all protocols from one host, and counts cold starts. Used by one event loop.

    `profiles` answers profile queries in batches, and `steps` runs long answers in steps.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics) -> None:
        self.host, self._metrics = host, metrics
        limits = QueueLimits(host.serving.max_queue_ms / 1000, host.serving.timeout_s)
        self.steps = StepQueue(limits)
        self.profiles = Batcher(self._snapshot, limits)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, steps: Generator[None, None, Found]) -> Found:
        """Runs an answer in steps; raises Overloaded, TookTooLong, and the errors of the answer."""
        return self.counted(await self.steps.run(steps))

    def counted(self, answer: Found) -> Found:
        """Counts an answer if it is a cold start."""
        self._metrics.cold_starts.inc(answer.cold_start)
        return answer

    def sources(self) -> ItemSources:
        """Returns the sources of candidate items, nearly up to date; they follow the stores after the first call.

        Raises:
            NotReady: A store does not exist yet.
        """
        sources = self.host.sources()
        sources.read_more()
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() < loop.time() - READ_S:
            self._timer = loop.call_later(READ_S, self._read_more)
        return sources

    def _read_more(self) -> None:
        more = False
        with suppress(SpringtideError):
            more = self.host.sources().read_more()
        self._timer = asyncio.get_running_loop().call_later(MORE_S if more else READ_S, self._read_more)

    @contextmanager
    def _snapshot(self) -> Iterator[Profiles]:
        predictor = self.host.predictor()

        def answer(queries: Sequence[Query]) -> list[Profile]:
            answers = predictor.profiles(queries, reader)
            if cold := sum(answer.cold_start for answer in answers):
                self._metrics.cold_starts.inc(cold)
            return answers

        with predictor.reading() as reader:
            yield answer
