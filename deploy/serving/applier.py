"""The one process per serving host that writes: versions into rows, micro-batches into histories.

    thread      what it follows                        what it writes
    main        registry and control, each poll_ms     rows, pointer, mask     host_rows.py, following.py
    clicks      the micro-batch topic                  histories, event clock  clicks.py
    attributes  their topics, where there are any      attributes              attributes.py
    exposures   what workers kept, where there may be  their topic             splitting/forwarding.py

Each goes on without the other: with Kafka away new versions still arrive, with
the registry away new clicks do, one whose store or disk is full waits for room
alone, and answers go on in any case.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pyarrow as pa
from prometheus_client import CollectorRegistry

from deploy.serving import currency
from deploy.serving.attributes import AttributesFollower
from deploy.serving.cadence import Every
from deploy.serving.clicks import HistoryFollower
from deploy.serving.currency import Currency, LogCheck
from deploy.serving.erasing import HostErasures
from deploy.serving.following import VersionFollower
from deploy.serving.gauges import show_ages
from deploy.serving.host_rows import HostRows
from deploy.serving.splitting.forwarding import ExposureForwarder
from state.attributes.values import tables_of
from state.compiled.preparing import Kernels
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import (
    GapError,
    LogError,
    RegistryError,
    StoreFull,
    UnknownTopic,
)
from state.events.identity import fingerprint_at
from state.features.spec import FeatureSpec
from state.history import opening
from state.history.actions import ACTIONS, numbered
from state.history.appends import Appends
from state.layout import ATTRIBUTES, CURRENT, EXPOSURES, GAPS
from state.log import KERNELS, KafkaLog, Reader, Topics
from state.log.accepted_gaps import Journal
from state.metrics import ApplierMetrics, served
from state.process.ending import stop_on_signals
from state.process.garbage import Holes, keep_what_is_there
from state.process.part import run_part
from state.process.said_once import SaidOnce
from state.process.wall_clock import wall_ms
from state.registry.control_look import ControlLook
from state.registry.sharing.running import copying, reached_ms
from state.registry.spec_actions import SpecActions
from state.storage.measuring import offer
from state.storage.shares import SERVING
from state.storage.waiting import Room, is_full

SAMPLE_S = 0.1
HOUSE_S = 1.0
RETRY_S = 1.0
FETCH_S = 0.5
VERSIONS, CLICKS = "taking versions into the rows", "taking clicks into the histories"
_log = logging.getLogger(__name__)


class Applier:
    """The followers and their upkeep. `run` until `stop` is set.

    Args:
        settings: Of the whole system.
        registry: Where the metrics go.
        stop: Ends all threads; the one that fails sets it.
        now_ms: The wall clock.
    """

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
        self._histories = opening.open_anew(settings, SERVING, folder)
        wanted = tables_of(settings.attributes)
        self._attributes = (
            AttributesFollower(settings, folder / ATTRIBUTES, self.metrics, self._room()) if wanted else None
        )
        self._control, spec = ControlLook(settings.registry_dir), FeatureSpec.from_settings(settings)
        actions = SpecActions(settings.registry_dir, spec)
        self._number_actions(spec, actions)
        self.clicks = HistoryFollower(
            self._histories,
            spec,
            settings.events.max_age_s,
            self.metrics,
            now_ms,
            Journal(settings.registry_dir / GAPS).accepted,
            actions.of,
            fingerprint_at(settings.salt_path),
            settings.serving,
        )
        self._currency = Currency(folder, CURRENT)
        where = (folder, settings.registry_dir, self._histories)
        self.erasures = HostErasures(*where, lambda: self.versions.erased, now_ms)

    @property
    def versions(self) -> VersionFollower:
        """What brings versions to the rows that answers read."""
        return self._rows.versions

    def _number_actions(self, spec: FeatureSpec, known: SpecActions) -> None:
        """Histories that 0.1.0 kept have the actions of the version that answered last."""
        store, served = self._histories, self.versions.served
        before = None if served is None else known.of(served.spec)
        store.numbering, extra = numbered(store.extra(ACTIONS), spec.actions, before)
        if extra:
            store.commit(Appends.none(), (), extra)

    def run(self) -> None:
        """Follows until `stop`; then everything applied is durable and the stores are closed.

        Raises:
            SpringtideError: A follower cannot go on.
        """
        threads = [threading.Thread(target=self._guarded, args=(self._follow_clicks,), name="clicks")]
        if self._attributes is not None:
            follow = partial(self._attributes.run, self._stop)
            threads.append(threading.Thread(target=self._guarded, args=(follow,), name="attributes"))
        if self._settings.rollout.address:
            threads.append(threading.Thread(target=self._guarded, args=(self._forward,), name="exposures"))
        keep_what_is_there()
        # Arrow's own pool keeps what records took; in libc's heap it is used again.
        pa.set_memory_pool(pa.system_memory_pool())
        for thread in threads:
            thread.start()
        with ExitStack() as closing:
            # Each is closed, also where another one's disk is full.
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
        ExposureForwarder(folder, KafkaLog(kafka), kafka.exposures_topic, self._now_ms).run(self._stop)

    def _room(self) -> Room:
        """The room that one thread needs."""
        return Room(SERVING, self._storage, self._stop.wait, _log.warning)

    def _registry_ms(self) -> int:
        """Up to when the registry's directory has all versions: now, or when the place it is shared at was reached last."""
        now_ms = self._now_ms()
        if not self._settings.paths.shared_registry:
            return now_ms
        return min(now_ms, reached_ms(self._settings.registry_dir))

    def _follow_versions(self) -> None:
        sample, house, room = Every(SAMPLE_S), Every(HOUSE_S), self._room()
        say, holes = SaidOnce(_log.error), Holes()
        while not self._stop.is_set():
            more, pause_s = False, self._settings.serving.poll_ms / 1000
            try:
                looked_ms = self._registry_ms()
                more = self._rows.step()
                room.found(VERSIONS)
                if not more and looked_ms:
                    self._currency.note(currency.VERSIONS, looked_ms)
            except (StoreFull, RegistryError, OSError) as error:
                if is_full(error):
                    room.refused(error, VERSIONS)
                else:
                    say(f"the registry cannot be followed: {error}; answers go on as they are")
                pause_s = RETRY_S
            now_s = time.monotonic()
            if sample(now_s):
                show_ages(self.versions.served, self.clicks.newest_ms, self._now_ms(), self.metrics)
            holes.tick()
            if house(now_s):
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
        say, room = SaidOnce(_log.warning), self._room()
        kafka, partition = self._settings.kafka, self._settings.trainer.partition
        check = LogCheck(max(1000, round(250 * self._settings.serving.max_age_s)))

        def open_at(offset: int) -> Reader:
            return Reader(kafka, kafka.microbatches_topic, [partition], {partition: offset})

        while not self._stop.is_set():
            try:
                control = self._control.look()
                if control is not None:
                    self.clicks.turn(control.log, control.mask, partition, open_at)
                    self.erasures.take_up(control.erased)
                if not self.clicks.connected:
                    self._connect()
                    say.clear()
                if self.clicks.step(FETCH_S):
                    # What was refused is read again; a look that finds nothing yet says nothing of room.
                    room.found(CLICKS)
                if self._settings.serving.max_age_s:
                    self._check_log(check)
            except StoreFull as error:
                # Read again from where the histories end.
                self.clicks.disconnect()
                room.refused(error, CLICKS)
                self._stop.wait(RETRY_S)
            except (GapError, UnknownTopic, LogError) as error:
                self.clicks.disconnect()
                self.metrics.log_failures.inc()
                say(f"{error}; serving goes on with the clicks it has, and tries again")
                self._stop.wait(RETRY_S)
        self.clicks.disconnect()

    def _check_log(self, check: LogCheck) -> None:
        """Notes up to when the histories hold what the log held."""
        now_ms, kafka = self._now_ms(), self._settings.kafka
        if check.due(now_ms):
            with Topics(kafka) as topics:
                ends = topics.ends(kafka.microbatches_topic, committed_only=True)
            check.asked(now_ms, {partition: end for partition, (_, end) in ends.items()})
        at_ms = check.reached(self.clicks.positions)
        if at_ms is not None:
            self._currency.note(currency.CLICKS, at_ms)

    def _connect(self) -> None:
        kafka = self._settings.kafka
        topic = kafka.microbatches_topic
        with Topics(kafka) as topics:
            info, ends = topics.describe(topic), topics.ends(topic)
        self.clicks.connect(
            info.topic_id, ends, lambda positions, leaders: Reader(kafka, topic, None, positions, leaders=leaders)
        )
        _log.info("following %s (%d partitions)", topic, info.partitions)


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
        Kernels(registry, _log, uses=[KERNELS]).prepare(stop.is_set)
        Applier(settings, registry, stop).run()


if __name__ == "__main__":
    sys.exit(main())
