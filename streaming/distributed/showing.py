"""Shows what is committed: the gauges of the account, the lag, and the group's offsets for lag tools.

The process that has the account's one key does so, in a thread, once a second:
where clicks stop coming, what is shown at rest is what is committed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from state import metrics
from state.config.settings import Settings
from state.errors import PortTaken, SpringtideError
from state.log import Log
from state.metrics import StreamMetrics
from state.positions import UNPLACED, from_json
from streaming.accounts import show_faults, show_totals
from streaming.commit import show_off_clock
from streaming.distributed.account import Account
from streaming.distributed.worker import JobWorker
from streaming.event_clock import OffClock

SHOW_S = 1.0
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
        self._users: dict[str, int] = {}
        self._appended_ms = 0
        self._shown: Mapping[int, int] = {}
        self._faults: tuple[str, ...] = ()
        self._said = ""
        self._stopping = threading.Event()
        self._serve()
        self._thread = threading.Thread(target=self._run, name="account", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Serves the metrics, where no other process of this host does for this job, or did just now."""
        port = self._settings.stream.metrics_port
        if not port:
            return
        try:
            self._worker.closing.callback(metrics.serve(self._worker.registry, port, self._settings.metrics.host))
        except PortTaken as error:
            logger.warning("the stream's metrics are not shown here: %s", error)

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
        self._latest = account

    def close(self) -> None:
        """Shows the last, and ends the thread."""
        self._stopping.set()
        self._thread.join()
        self.show()

    def show(self) -> None:
        """Sets the gauges and tells the group; a cluster that does not answer is said once, and tried again."""
        account = self._latest
        if account is None:
            return
        shown = self._metrics
        show_totals(shown, account.totals, account.waiting)
        shown.history_users.set(sum(self._users.values()))
        shown.cached_users.set(self._worker.cache.users)
        self._faults = show_faults(shown, account.faults(), self._faults)
        self._tell(account)

    def _tell(self, account: Account) -> None:
        """Tells the group what all buckets have, and says how far that is behind."""
        kafka = self._settings.kafka
        try:
            with self._log.topics() as topics:
                reached = account.reached(topics.describe(kafka.clicks_topic).topic_id)
                if reached and reached != self._shown:
                    topics.commit(kafka.group, kafka.clicks_topic, reached)
                    self._shown = reached
                ends = topics.ends(kafka.clicks_topic)
        except SpringtideError as error:
            if str(error) != self._said:
                logger.warning("offsets of group %s are not up to date: %s", kafka.group, error)
            self._said = str(error)
            return
        self._said = ""
        lag = sum(max(0, end - reached.get(one, begin)) for one, (begin, end) in ends.items())
        self._metrics.lag_events.set(lag)
        self._metrics.lag_seconds.set(max(0.0, time.time() - self._appended_ms / 1000) if lag else 0.0)

    def _run(self) -> None:
        while not self._stopping.wait(SHOW_S):
            try:
                self.show()
            # The edge of the thread: what is shown is no reason to end a job.
            except Exception:
                logger.exception("the account cannot be shown")
