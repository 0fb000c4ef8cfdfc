"""Shows what is committed: the gauges of the account, the lag, the group's offsets for lag tools, and how far erasures are done.

The process that has the account's one key does so, in a thread, once a second:
where clicks stop coming, what is shown at rest is what is committed. Where the
key has moved to another process, the group says more than this one knows: it
leaves the port of the metrics to that one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from state import metrics
from state.config.settings import Settings
from state.disk.files import HOST
from state.errors import PortTaken, SpringtideError
from state.log import Log
from state.metrics import StreamMetrics
from state.positions import UNPLACED, from_json
from state.process.wall_clock import wall_ms
from state.registry.erasing import ErasureReport
from streaming.accounts import show_faults, show_totals
from streaming.commit import show_off_clock
from streaming.distributed.account import Account
from streaming.distributed.worker import JobWorker
from streaming.erasing import tell
from streaming.event_clock import OffClock

SHOW_S = 1.0
PART, WHERE = "stream-job", "the engine's state"  # of the report of erasures
logger = logging.getLogger(__name__)


class Showing:
    """The account as it is shown. `take` is called by one thread at a time, `close` by any.

    Args:
        worker: Of this process: its metrics, and where they are served.
    """

    def __init__(self, worker: JobWorker) -> None:
        self._settings: Settings = worker.settings
        self._log: Log = worker.log
        self._metrics: StreamMetrics = worker.metrics
        self._worker = worker
        self._latest: Account | None = None
        self._is_new = False
        self._users: dict[str, int] = {}
        self._appended_ms = 0
        self._shown: Mapping[int, int] = {}
        self._faults: tuple[str, ...] = ()
        self._said: dict[str, str] = {}
        self._forgotten: int | None = None
        self._stop_offering: Callable[[], None] | None = None
        self._stopping = threading.Event()
        metrics.add_process(worker.registry)
        self._thread = threading.Thread(target=self._run, name="account", daemon=True)
        self._thread.start()

    def take(self, account: Account, told: Mapping[str, Any]) -> None:
        """Takes the account after a bundle, and counts what the bundle was."""
        counted = self._metrics
        counted.microbatches.inc(told["records"])
        counted.commit_seconds.observe(told["seconds"])
        if told["records"]:
            counted.microbatch_rows.observe(told["rows"] / told["records"])
        counted.truncated_histories.inc(told["truncated"])
        for reason, count in told["letters"].items():
            counted.dead_letters.labels(reason).inc(count)
        for part in told["ranges"]:
            for outcome, count in from_json(part).outcomes.items():
                if outcome not in (*UNPLACED, "elsewhere"):
                    counted.events.labels(outcome).inc(count)
        for off in told["off"]:
            show_off_clock(counted, OffClock(*off))
        self._users |= told["users"]
        self._appended_ms = max(self._appended_ms, told["appended_ms"])
        self._latest, self._is_new = account, True

    def close(self) -> None:
        """Shows the last, and ends the thread."""
        self._stopping.set()
        self._thread.join()
        self.show()
        self._leave_port()

    def show(self) -> None:
        """Sets the gauges and tells the group; a cluster that does not answer is said once, and tried again."""
        account, is_new = self._latest, self._is_new
        if account is None:
            return
        self._is_new = False
        self._take_port()
        shown = self._metrics
        show_totals(shown, account.totals, account.waiting)
        shown.history_users.set(sum(self._users.values()))
        shown.cached_users.set(self._worker.cache.users)
        self._faults = show_faults(shown, account.faults(), self._faults)
        self._report(account.forgotten(self._settings.stream.buckets))
        self._tell(account, is_new)

    def _report(self, through: int) -> None:
        """Reports the last erasure that all buckets have taken into account; also that it is none, so that they are known."""
        registry = self._settings.registry_dir
        if through == self._forgotten or not registry.is_dir():
            return
        told = ErasureReport(PART, HOST, WHERE, through, through, 0, wall_ms())
        if tell(registry, told, partial(self._say, "erasures")):
            self._forgotten = through
            self._said.pop("erasures", None)

    def _take_port(self) -> None:
        """Offers the metrics, as soon as no other process of this host does on their port."""
        port = self._settings.stream.metrics_port
        if not port or self._stop_offering is not None:
            return
        try:
            self._stop_offering = metrics.offer(self._worker.registry, port, self._settings.metrics.host)
            self._said.pop("port", None)
        except PortTaken as error:
            self._say("port", f"the stream's metrics are not shown yet: {error}")

    def _leave_port(self) -> None:
        if self._stop_offering is not None:
            self._stop_offering()
            self._stop_offering = None

    def _tell(self, account: Account, is_new: bool) -> None:
        """Tells the group what all buckets have, and says how far that is behind."""
        kafka = self._settings.kafka
        try:
            with self._log.topics() as topics:
                reached = account.reached(topics.describe(kafka.clicks_topic).topic_id)
                if not is_new and _is_behind(reached, topics.committed(kafka.group, kafka.clicks_topic)):
                    self._let_go(account)
                    return
                if reached and reached != self._shown:
                    topics.commit(kafka.group, kafka.clicks_topic, reached)
                    self._shown = reached
                ends = topics.ends(kafka.clicks_topic)
        except SpringtideError as error:
            self._say("group", f"offsets of group {kafka.group} are not up to date: {error}")
            return
        self._said.pop("group", None)
        lag = sum(max(0, end - reached.get(one, begin)) for one, (begin, end) in ends.items())
        self._metrics.lag_events.set(lag)
        self._metrics.lag_seconds.set(max(0.0, time.time() - self._appended_ms / 1000) if lag else 0.0)

    def _let_go(self, account: Account) -> None:
        """Shows nothing any more, unless clicks come here again."""
        if self._latest is account:
            self._latest = None
        self._leave_port()
        logger.info("another process has the account now, and shows it")

    def _say(self, what: str, warning: str) -> None:
        """Says what is wrong with something, once as long as it stays the same."""
        if warning != self._said.get(what):
            logger.warning("%s", warning)
        self._said[what] = warning

    def _run(self) -> None:
        while not self._stopping.wait(SHOW_S):
            try:
                self.show()
            # The edge of the thread: what is shown is no reason to end a job.
            except Exception:
                logger.exception("the account cannot be shown")


def _is_behind(ours: Mapping[int, int], group: Mapping[int, int]) -> bool:
    """Whether a group has more than we do of a partition that we know.

    >>> _is_behind({0: 5}, {0: 7, 1: 9}), _is_behind({0: 5}, {0: 5, 1: 9}), _is_behind({}, {0: 1})
    (True, False, False)
    """
    return any(group.get(partition, 0) > at for partition, at in ours.items())
