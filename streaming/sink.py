"""The sink: cuts batches of rows, and commits the cuts in a thread of its own while the next rows are made.

The thread also shows what it committed, at most once a second; where no cut
comes it wakes for what is still to show or to sync, and then only for a cut.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from state.process.wall_clock import wall_ms
from streaming.commit import Committer
from streaming.context import Step, StreamContext
from streaming.cut import Cut, Cutter
from streaming.rows import Rows

# One cut is written while two wait; more would only make answers older.
QUEUED_CUTS = 2


class CommitThread:
    """Writes and commits cuts in the order in which they were put, in a thread of its own.

    `put`, `flush` and `close` are called by the Beam thread. An exception ends
    the thread and surfaces in the next call of `put`, `check` or `flush`.

    Args:
        committer: What the thread commits with.
    """

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._queue: deque[Cut] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def put(self, cut: Cut) -> None:
        """Queues a cut; waits while two are queued, which holds back the reading of clicks.

        Raises:
            SpringtideError: What ended the thread.
        """
        self._wait(lambda: len(self._queue) < QUEUED_CUTS)
        with self._changed:
            self._queue.append(cut)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Returns when all that was put is committed, and the group's offsets say so.

        Raises:
            SpringtideError: What ended the thread.
        """
        self._wait(lambda: not self._queue and not self._busy)
        self._committer.show()

    def close(self) -> None:
        """Ends the thread after the commit at hand; queued cuts are dropped and read again later."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or until())
        self.check()

    def _run(self) -> None:
        try:
            while (cuts := self._take()) is not None:
                if cuts:
                    self._committer.commit(cuts)
                else:
                    self._committer.catch_up()
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        # The edge of the thread: kept, and raised again in the Beam thread.
        except BaseException as failure:  # noqa: BLE001
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _take(self) -> list[Cut] | None:
        """Waits for cuts and takes all of them: none where something else is due, None when the thread should end."""
        due_s = self._committer.due_s
        with self._changed:
            self._changed.wait_for(
                lambda: self._queue or self._closing, None if due_s is None else max(0.0, due_s - time.monotonic())
            )
            if self._closing:
                return None
            cuts = list(self._queue)
            self._queue.clear()
            self._busy = True
            self._changed.notify_all()
            return cuts


class WriteMicroBatches(Step[StreamContext]):
    """Cuts by rows and time and hands the cuts to the commit thread; yields nothing."""

    _cutter: Cutter
    _commits: CommitThread

    def setup(self) -> None:
        """Starts the commit thread; Beam calls it once, for one process has one bundle."""
        context = self.handle.context
        self._cutter = Cutter(context.settings.stream.cut_rows, context.settings.stream.cut_ms)
        self._commits = CommitThread(Committer(context))
        context.closing.callback(self._commits.close)

    def process(self, rows: Rows) -> Iterator[None]:
        """Takes a batch; an empty one tells the time."""
        with self.handle.watched():
            self._commits.check()
            for cut in self._cutter.add(rows, wall_ms()):
                self._commits.put(cut)
        yield from ()

    def finish_bundle(self) -> None:
        """At a clean stop: commits what is gathered."""
        with self.handle.watched():
            for cut in self._cutter.flush(wall_ms()):
                self._commits.put(cut)
            self._commits.flush()
