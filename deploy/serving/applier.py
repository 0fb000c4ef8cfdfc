"""The one process per serving host that writes its stores. Its threads are independent.

An unreachable registry, an unreachable Kafka or a full store stops only the thread that needs it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
from prometheus_client import CollectorRegistry

from deploy.serving import host_files
from deploy.serving.following.clicks import HistoryFollower
from deploy.serving.following.snapshots import SnapshotTaker, load_if_behind
from deploy.serving.following.versions import VersionFollower
from deploy.serving.host_files import DEGRADED_S, Currency, make_room, name_of, settled
from state.attributes.follower import AttributeFollower, keep_following
from state.attributes.values import AttributeStore, tables_of
from state.config.settings import Settings
from state.disk import documents
from state.disk import memory_place as place
from state.disk.files import HOST, Noted
from state.disk.lmdb_store import MAP_BYTES, PAGES_MS
from state.disk.lock import DirectoryLock
from state.errors import GapError, LogError, RegistryError, StoreFull, UnknownTopic, UnusablePlace
from state.events.identity import fingerprint_at, load_salt
from state.features.erased import Erased
from state.features.spec import KERNELS as FEATURE_KERNELS
from state.features.spec import FeatureSpec
from state.history.appends import ACTIONS, Appends, numbered
from state.history.store import ForgottenUsers, HistoryStore, open_or_replace
from state.kernels import Kernels
from state.layout import ATTRIBUTES, EXPOSURES, ROWS
from state.log import KERNELS, Log, Reader, Topics, Writer
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import ApplierMetrics, served
from state.process import killpoints
from state.process.environment import Holes, freeze_objects, wall_ms
from state.process.log_lines import SaidOnce
from state.process.part import run_part, stop_on_signals
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.hosts import ErasureReport, write_erasure_report
from state.registry.log_line import WHOLE, LogLine
from state.registry.sharing import copying, reached
from state.registry.specs import SpecActions
from state.rows.reader import Served
from state.rows.store import RowStore
from state.storage import SERVING, Room, is_full, map_bytes, offer

POLL_S = 0.02
LOOK_S = 0.1
SAMPLE_S = 0.1
HOUSE_S = 1.0
RETRY_S = 1.0
FETCH_S = 0.5
VERSIONS, CLICKS = "taking versions into the rows", "taking clicks into the histories"
_log = logging.getLogger(__name__)


class HostErasures:
    """Applies erasures to the histories of one host. Used by the thread that writes the histories.

    `rows` returns the number of the erasure up to which the row store is done.
    """

    def __init__(
        self, folder: Path, registry: Path, histories: HistoryStore, rows: Callable[[], int], now_ms: Callable[[], int]
    ) -> None:
        self._folder, self._registry, self._histories = folder, registry, histories
        self._rows, self._now_ms = rows, now_ms
        self._done, self._reported = histories.forgotten, ErasureReport("", "", "", -1, -1)
        self._warn_once = SaidOnce(_log.warning)

    def apply(self, erased: Erased, may_compact: bool = True) -> bool:
        """Erases newly erased users, and reports the progress if it has changed; returns whether users were erased.

        It is cheap if there is nothing to do. With `may_compact` False, because a view of the histories is open, they
        are not compacted yet.

        Raises:
            StoreFull: Nothing was changed.
        """
        is_new = self._done.through < erased.last
        if is_new:
            self._done = self._histories.forget(erased)
            killpoints.reach("follow.forgotten")
            _log.info("erasure %d: users are forgotten in the histories", erased.last)
        due_ms = self._done.due_ms()
        if may_compact and due_ms is not None and self._now_ms() >= due_ms:
            try:
                self._done = self._histories.compact_if_due(self._now_ms())
                self._warn_once.clear()
            except StoreFull as full:
                self._warn_once(f"free pages keep bytes of erased users: {full}")
        self._report(self._done)
        return is_new

    def _report(self, forgotten: ForgottenUsers) -> None:
        through = min(forgotten.through, self._rows())
        if (through, forgotten.pages) == (self._reported.through, self._reported.pages):
            return
        name, pages = name_of(self._folder), min(forgotten.pages, through)
        progress = ErasureReport(name, HOST, str(self._folder), through, pages, 0, self._now_ms())
        try:
            write_erasure_report(self._registry, progress)
        except OSError as error:
            self._warn_once(f"the progress of erasures cannot be reported in {self._registry}: {error}")
            return
        self._reported = progress


class HostRows:
    """The rows that this host's workers read. It is used by one thread that holds the lock of the serving directory.

    Raises:
        StoreError: The store cannot be opened.
    """

    def __init__(self, settings: Settings, metrics: ApplierMetrics, now_ms: Callable[[], int]) -> None:
        self._metrics = metrics
        link, memory = settings.serving_dir / ROWS, settings.storage.memory_dir
        for folder in place.remove_forgotten(memory):
            _log.info("%s is removed: its state directory is gone, or has its store elsewhere", folder)
        chosen = place.choose(link, memory)
        place.settle(link, chosen)
        if chosen.why:
            _log.warning("the rows lie on the disk, %s: %s. Each version is written there", chosen.path, chosen.why)
        # In memory, the map may be larger than the rows' share of the disk.
        size = MAP_BYTES if chosen.in_memory else map_bytes(settings, SERVING, ROWS, chosen.path)
        self._location, self._store = (
            chosen,
            RowStore.open_or_rebuild(chosen.path, size, shares=settings.serving.user_shares),
        )
        self.versions = VersionFollower(self._store, settings, metrics, now_ms)

    def step(self) -> bool:
        """Follows and removes old versions once; returns whether there may be more to do at once.

        Raises:
            StoreFull: There is not enough space now. Nothing was changed, and the next call tries again.
            RegistryError, OSError: The registry cannot be followed now.
        """
        try:
            more = self.versions.step()
        except StoreFull:
            # A sweep may free enough space.
            with suppress(StoreFull):
                self.versions.sweep()
            raise
        self.versions.sweep()
        return more

    def keep_house(self) -> None:
        """Frees the slots of readers that died, and updates metrics; called about once a second."""
        self._store.clear_stale_readers()
        used = place.size(self._location.path)
        self._metrics.rows_bytes.labels("memory").set(used if self._location.in_memory else 0)
        self._metrics.rows_bytes.labels("disk").set(0 if self._location.in_memory else used)

    def close(self) -> None:
        """Closes the store."""
        self._store.close()


class ExposureForwarder:
    """Sends the exposures that workers keep, until `stop` is set."""

    def __init__(self, folder: Path, log: Log, topic: str, now_ms: Callable[[], int]) -> None:
        self._folder, self._log, self._topic, self._now_ms = folder, log, topic, now_ms
        self._writer: Writer | None = None

    def run(self, stop: threading.Event) -> None:
        """Sends until `stop` is set. Remaining files are sent after the next start."""
        say = SaidOnce(_log.warning)
        try:
            while not stop.is_set():
                try:
                    self.step()
                    stop.wait(LOOK_S)
                except (LogError, OSError) as error:
                    self._close()
                    say(f"exposures wait on the disk: {error}")
                    if removed := make_room(self._folder):
                        _log.error(
                            "%d files of exposures were removed unsent: Kafka was unreachable for too long", removed
                        )
                    stop.wait(RETRY_S)
        finally:
            self._close()

    def step(self) -> int:
        """Sends the files that workers have finished; returns the number of exposures.

        1. All records of a file are sent, keyed by their user. 2. Kafka acknowledges them. 3. The file is removed.

        Raises:
            LogError: Kafka is unreachable or has no such topic; the file stays.
            OSError: A file cannot be read or removed.
        """
        sent = 0
        for path, records in settled(self._folder, self._now_ms()):
            # 1.
            writer = self._writer = self._writer or self._log.writer()
            for record in records:
                user = documents.decode(record, _Keyed).user
                writer.send(self._topic, None, user.encode(), record)
            # 2.
            writer.flush()
            # 3.
            path.unlink()
            sent += len(records)
        return sent

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Keyed(msgspec.Struct):
    user: str


class AttributesFollower:
    """Follows both topics of attributes into the host's store. Call `run` in its own thread, then `close`.

    `room` is the space that the store needs.

    Raises:
        MissingSalt: The salt's file is missing.
    """

    def __init__(self, settings: Settings, path: Path, metrics: ApplierMetrics, room: Room) -> None:
        wanted, self._metrics, self._room = settings.attributes, metrics, room
        self._removed, self._due_s = 0, float("-inf")
        salt = load_salt(settings.salt_path, create=False)
        most = map_bytes(settings, SERVING, ATTRIBUTES, path)
        self.store = AttributeStore.open_or_rebuild(path, most, shares=settings.serving.user_shares)
        topics = {"user": wanted.user_topic, "item": wanted.item_topic}
        # The stream writes dead letters for refused records; here they are ignored.
        self._followers = [
            AttributeFollower(settings.kafka, topics[side], table, salt, self.store, lambda bad: None)
            for side, table in tables_of(wanted).items()
        ]

    def run(self, stop: threading.Event) -> None:
        """Follows until `stop`; raises StoreError if the store cannot be written."""
        for follower in self._followers:
            self._count(follower.side)
        keep_following(self._followers, stop, self._took, "answers use the attributes they have", self._room)

    def close(self) -> None:
        """Closes the topics and the store."""
        for follower in self._followers:
            follower.disconnect()
        self.store.close()

    def _took(self, side: str, _: list[int]) -> None:
        self._count(side)
        removed, now_s = sum(follower.position.counts["removed"] for follower in self._followers), time.monotonic()
        if removed != self._removed and now_s >= self._due_s:
            # Erased data stays on free pages of the file. Compact once for many erasures, because a copy is expensive.
            self._removed, self._due_s = removed, now_s + PAGES_MS / 1000
            try:
                self.store.compact()
            except StoreFull as full:
                _log.warning("free pages keep bytes of attributes that were taken out: %s", full)

    def _count(self, side: str) -> None:
        self._metrics.attributes_known.labels(side).set(self.store.count(side))


def show_ages(served: Served | None, newest_ms: int, now_ms: int, metrics: ApplierMetrics) -> None:
    """Records the age of the version (None: there is none) and of the newest click (time 0: there is none)."""
    if served is not None:
        metrics.version_age_seconds.set((now_ms - served.created_at_ms) / 1000)
    if served is not None and served.event_time_ms:
        age_s = (now_ms - served.event_time_ms) / 1000
        metrics.weight_freshness_seconds.set(age_s)
        metrics.weight_age_seconds.observe(age_s, {"version": str(served.version)})
    if newest_ms:
        age_s = (now_ms - newest_ms) / 1000
        metrics.feature_freshness_seconds.set(age_s)
        metrics.feature_age_seconds.observe(age_s)


class LogCheck:
    """Checks whether histories have reached the end offsets that the log last reported. Used by one thread.

    `every_ms` is the interval between requests for the end offsets.
    """

    def __init__(self, every_ms: int) -> None:
        self._every_ms = every_ms
        self._asked_ms = 0
        self._wanted: tuple[int, Mapping[int, int]] | None = None

    def due(self, now_ms: int) -> bool:
        """Whether to request the end offsets now."""
        return self._wanted is None and not 0 <= now_ms - self._asked_ms < self._every_ms

    def asked(self, now_ms: int, ends: Mapping[int, int]) -> None:
        """Records the end offsets by partition, requested at `now_ms`."""
        self._asked_ms, self._wanted = now_ms, (now_ms, ends)

    def reached(self, positions: Mapping[int, int]) -> int | None:
        """Returns the time of the request, once, when all positions have reached the end offsets; else None.

        >>> check = LogCheck(1000)
        >>> check.asked(5000, {0: 10})
        >>> check.reached({0: 9}), check.reached({0: 10}), check.reached({0: 10})
        (None, 5000, None)
        """
        if self._wanted is None or any(positions.get(partition, 0) < end for partition, end in self._wanted[1].items()):
            return None
        at_ms, self._wanted = self._wanted[0], None
        return at_ms


class Applier:
    """Runs the followers and their maintenance until `stop` is set. A thread that fails sets it."""

    def __init__(
        self,
        settings: Settings,
        registry: CollectorRegistry,
        stop: threading.Event,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._settings, self._stop, self._now_ms = settings, stop, now_ms
        self._failure: BaseException | None = None
        self.metrics = ApplierMetrics(registry)
        self.metrics.segments.set(len(settings.segments.expressions))
        self._storage = offer(registry, settings, [SERVING])
        folder = settings.serving_dir
        self._rows = HostRows(settings, self.metrics, now_ms)
        # Kafka still has the micro-batches, and the registry the versions.
        self._histories = open_or_replace(settings, SERVING, folder)
        wanted = tables_of(settings.attributes)
        self._attributes = (
            AttributesFollower(settings, folder / ATTRIBUTES, self.metrics, self._room()) if wanted else None
        )
        self._control, spec = ControlPoll(settings.registry_dir), FeatureSpec.from_settings(settings)
        self._spec, self._actions = spec, SpecActions(settings.registry_dir, spec)
        self._number_actions()
        self._salt = fingerprint_at(settings.salt_path)
        self.clicks = HistoryFollower(self._histories, settings, self.metrics, now_ms, self._actions.of, self._salt)
        self._snapshots = None
        if settings.history.snapshot_every_s:
            self._snapshots = SnapshotTaker(settings, self._histories, self.metrics, stop, now_ms)
            self.clicks.committed = self._snapshots.take
        self.metrics.snapshot_every_seconds.set(settings.history.snapshot_every_s)
        self._currency = Currency(folder)
        for part in (host_files.VERSIONS, host_files.CLICKS):
            # Computed when it is read: the thread of the part may hang in a file system that does not respond.
            self.metrics.degraded.labels(part).set_function(partial(self._is_degraded, part))
        where = (folder, settings.registry_dir, self._histories)
        self.erasures = HostErasures(*where, lambda: self.versions.erased, now_ms)

    @property
    def versions(self) -> VersionFollower:
        """Applies versions to the rows that workers read."""
        return self._rows.versions

    def _is_degraded(self, part: str) -> bool:
        return part in self._currency.degraded(self._now_ms())

    def _number_actions(self) -> None:
        """Adds action names to histories written by 0.1.0, from the version that answered last."""
        store, served = self._histories, self.versions.served
        before = None if served is None else self._actions.of(served.spec)
        store.numbering, extra = numbered(store.extra(ACTIONS), self._spec.actions, before)
        if extra:
            store.commit(Appends.none(), (), extra)

    def run(self) -> None:
        """Runs until `stop` is set. On return, everything applied is durable and the stores are closed.

        Raises:
            SpringtideError: A follower cannot continue.
        """
        threads = [threading.Thread(target=self._guarded, args=(self._follow_clicks,), name="clicks")]
        if self._attributes is not None:
            follow = partial(self._attributes.run, self._stop)
            threads.append(threading.Thread(target=self._guarded, args=(follow,), name="attributes"))
        if self._snapshots is not None:
            threads.append(threading.Thread(target=self._guarded, args=(self._snapshots.run,), name="snapshots"))
        if self._settings.rollout.address:
            threads.append(threading.Thread(target=self._guarded, args=(self._forward,), name="exposures"))
        freeze_objects()
        # Arrow's own pool does not return the memory of records; libc's heap reuses it.
        pa.set_memory_pool(pa.system_memory_pool())
        for thread in threads:
            thread.start()
        with ExitStack() as closing:
            # Close each store even if the disk of another one is full.
            closing.callback(self._rows.close)
            closing.callback(self._histories.close)
            if self._attributes is not None:
                closing.callback(self._attributes.close)
            try:
                self._follow_versions()
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join()
        if self._failure is not None:
            raise self._failure

    def _forward(self) -> None:
        kafka = self._settings.kafka
        folder = self._settings.serving_dir / EXPOSURES
        ExposureForwarder(folder, Log(kafka), kafka.exposures_topic, self._now_ms).run(self._stop)

    def _room(self) -> Room:
        return Room(SERVING, self._storage, self._stop.wait, _log.warning)

    def _registry(self) -> Noted:
        """Until when the registry's directory has all versions: now, or the last contact with its shared location."""
        now_ms = self._now_ms()
        if not self._settings.paths.shared_registry:
            return Noted(now_ms, "")
        noted = reached(self._settings.registry_dir)
        return noted._replace(at_ms=min(now_ms, noted.at_ms))

    def _follow_versions(self) -> None:
        sample_s, house_s, room = 0.0, 0.0, self._room()
        say, holes = SaidOnce(_log.error), Holes()
        while not self._stop.is_set():
            more, pause_s = False, POLL_S
            try:
                registry = self._registry()
                more = self._rows.step()
                room.found(VERSIONS)
                self._currency.fail(host_files.VERSIONS, registry.problem)
                if not more and registry.at_ms and not registry.problem:
                    self._currency.note(host_files.VERSIONS, registry.at_ms)
            except (StoreFull, RegistryError, OSError) as error:
                self._currency.fail(host_files.VERSIONS, str(error))
                if is_full(error):
                    room.refused(error, VERSIONS)
                else:
                    say(f"the registry cannot be followed: {error}; answers go on as they are")
                pause_s = RETRY_S
            now_s = time.monotonic()
            if now_s >= sample_s:
                sample_s = now_s + SAMPLE_S
                show_ages(self.versions.served, self.clicks.newest_ms, self._now_ms(), self.metrics)
            holes.tick()
            if now_s >= house_s:
                house_s = now_s + HOUSE_S
                self._rows.keep_house()
                self._histories.clear_stale_readers()
                if self._attributes is not None:
                    self._attributes.store.clear_stale_readers()
            if not more:
                self._stop.wait(pause_s)

    def _guarded(self, follow: Callable[[], None]) -> None:
        try:
            follow()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._stop.set()

    def _follow_clicks(self) -> None:
        say, room, begun = SaidOnce(_log.warning), self._room(), False
        kafka = self._settings.kafka
        check = LogCheck(max(1000, round(250 * (self._settings.serving.max_age_s or DEGRADED_S))))

        def open_at(offset: int) -> Reader:
            return Reader(kafka, kafka.microbatches_topic, [TRAINING_PARTITION], {TRAINING_PARTITION: offset})

        while not self._stop.is_set():
            try:
                control = self._control.poll()
                if not begun:
                    self._load_snapshot(WHOLE if control is None else control.log)
                    begun = True
                if control is not None:
                    self._follow_control(control, open_at)
                if not self.clicks.connected:
                    self.clicks.connect(Log(kafka), kafka.microbatches_topic)
                    say.clear()
                    _log.info("following %s", kafka.microbatches_topic)
                if self.clicks.step(FETCH_S):
                    # Refused records are read again. A poll without records does not show that there is free space.
                    room.found(CLICKS)
                if self._snapshots is not None:
                    self._snapshots.poll(self.clicks.caught_up)
                if self.clicks.away:
                    self._currency.fail(host_files.CLICKS, f"no broker of {kafka.microbatches_topic} is reachable")
                else:
                    self._currency.fail(host_files.CLICKS, "")
                    self._check_log(check)
            except StoreFull as error:
                self._currency.fail(host_files.CLICKS, str(error))
                # Resume from the end of the histories.
                self.clicks.disconnect()
                room.refused(error, CLICKS)
                self._stop.wait(RETRY_S)
            except UnusablePlace as error:
                self._currency.fail(host_files.CLICKS, str(error))
                say(f"{error}; the histories wait for their snapshot")
                self._stop.wait(RETRY_S)
            except (GapError, UnknownTopic, LogError) as error:
                self._currency.fail(host_files.CLICKS, str(error))
                self.clicks.disconnect()
                self.metrics.log_failures.inc()
                say(f"{error}; serving continues with the clicks it has, and tries again")
                self._stop.wait(RETRY_S)
        self.clicks.disconnect()

    def _load_snapshot(self, branch: LogLine) -> None:
        """Loads a snapshot if the histories are empty or far behind; without one they are read from the training log.

        Raises:
            LogError: The training log cannot be described.
            UnusablePlace: The location of the registry cannot be reached, and the histories are empty.
        """
        try:
            loaded = load_if_behind(self._settings, self._histories, self._salt, branch, Log(self._settings.kafka))
        except UnusablePlace as error:
            if self._histories.is_loading or not self._histories.positions():
                raise
            _log.warning("%s; the histories go on as they are", error)
            return
        if loaded:
            self._number_actions()
            self.clicks.begin()

    def _follow_control(self, control: Control, open_at: Callable[[int], Reader]) -> None:
        """Rolls the histories back and erases users, as control requires.

        If that changed the histories, the next snapshot is written from scratch.
        """
        snapshots = self._snapshots
        rewound = self.clicks.follow_branch(control.log, control.mask, open_at)
        erased = self.erasures.apply(control.erased, snapshots is None or not snapshots.reading)
        if snapshots is not None and (rewound or erased):
            snapshots.start_over()

    def _check_log(self, check: LogCheck) -> None:
        """Records until when the histories have what the log has."""
        now_ms, kafka = self._now_ms(), self._settings.kafka
        if check.due(now_ms):
            with Topics(kafka) as topics:
                ends = topics.ends(kafka.microbatches_topic, committed_only=True)
            check.asked(now_ms, {partition: end for partition, (_, end) in ends.items()})
        at_ms = check.reached(self.clicks.positions)
        if at_ms is not None:
            self._currency.note(host_files.CLICKS, at_ms)


def main(argv: list[str] | None = None) -> int:
    """`python -m deploy.serving.applier [flags]`; returns the exit code."""
    stop = stop_on_signals()
    return run_part("applier", lambda settings: _run(settings, stop), argv, _log)


def _run(settings: Settings, stop: threading.Event) -> None:
    port, host = settings.serving.metrics_port, settings.metrics.host
    with (
        DirectoryLock(settings.serving_dir),
        served(port, host) as registry,
        copying(settings, registry),
    ):
        Kernels(registry, _log, uses=[KERNELS, FEATURE_KERNELS]).prepare(stop.is_set)
        Applier(settings, registry, stop).run()


if __name__ == "__main__":
    sys.exit(main())
