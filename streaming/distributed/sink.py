"""The sink of a distributed job: what the buckets of a bundle made goes into micro-batches, acknowledged before the bundle ends.

    process        gathers
    finish_bundle  1. cuts and encodes   2. writes, acknowledged   3. tells the account

An engine that takes a bundle back makes its rows again, perhaps in other
bundles: readers drop them by their places. Whoever writes a bucket's rows began
at a checkpoint, before which all of them were acknowledged; so the log has all
of a bucket's positions up to the newest, whoever else still writes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from state.errors import UnreachableBroker
from state.events.dead_letters import DeadLetter
from state.log import LogWriter
from state.positions import to_json
from state.process.wall_clock import wall_ms
from streaming.commit import off_clocks
from streaming.cut import Cut, encode_cut
from streaming.distributed.bucket import BucketRows
from streaming.distributed.steps import WorkerStep
from streaming.distributed.wire import pack
from streaming.distributed.worker import JobWorker
from streaming.letters import send_letters

ACCOUNT = 0  # the one key of the step behind it
TRIES = 10
WAIT_S = 1.0
logger = logging.getLogger(__name__)


def records_of(made: Sequence[BucketRows], worker: JobWorker, now_ms: int) -> list[bytes]:
    """The micro-batches of a bundle; rows under different masks or epochs of the log are not mixed.

    Raises:
        MicroBatchError: A row is larger than a record may be.
    """
    groups: dict[tuple[int, int], list[BucketRows]] = {}
    for one in made:
        # One that read nothing only told its bucket of an erasure.
        if not one.rows.batch.ranges:
            continue
        groups.setdefault((one.mask_generation, one.log_epoch), []).append(one)
    stream, values = worker.settings.stream, list[bytes]()
    for (generation, epoch), group in groups.items():
        cut = Cut(tuple(one.rows for one in group), now_ms)
        limits = stream.cut_rows, stream.max_record_bytes
        values += encode_cut(cut, worker.spec.digest, worker.salt.fingerprint, *limits, generation, epoch)
    return values


def told(made: Sequence[BucketRows], records: int, seconds: float, truncated: Sequence[int]) -> bytes:
    """What the account is told of a bundle.

    Args:
        made: Of the bundle, written.
        records: Micro-batches.
        seconds: That it took to write them.
        truncated: The columns of features that say so.
    """
    batches = [one.rows.batch for one in made]
    head: dict[str, Any] = {
        "ranges": [to_json(part) for one in made for part in (*one.dropped, *one.rows.batch.ranges)],
        "letters": Counter(str(letter.reason) for batch in batches for letter in batch.dead),
        "off": [off for one in made for off in off_clocks(one.rows)],
        "appended_ms": max((one.appended_ms for one in made), default=0),
        "records": records,
        "rows": sum(len(one.rows) for one in made),
        "truncated": sum(int((one.rows.vectors.features[:, at] > 0).sum()) for one in made for at in truncated),
        "seconds": seconds,
        "users": {str(one.bucket): one.users for one in made},
        "erased": {str(one.bucket): one.erased for one in made},
    }
    return pack(head, {})


class WriteBuckets(WorkerStep):
    """Writes what a bundle made, and gives what the account is told."""

    _writer: LogWriter | None = None

    def start_bundle(self) -> None:
        """Nothing is gathered yet."""
        self._made: list[BucketRows] = []

    def process(self, element: BucketRows) -> Iterator[tuple[int, bytes]]:
        """Gathers."""
        self._made.append(element)
        yield from ()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Writes what was gathered.

        Raises:
            LogError: The cluster refused, or was away for long: the engine goes back to its checkpoint.
        """
        made, self._made = self._made, []
        if not made:
            return
        worker, begun_s = self.worker, time.perf_counter()
        now_ms = wall_ms()
        values = records_of(made, worker, now_ms)
        letters = [letter for one in made for letter in one.rows.batch.dead]
        self._write(worker, values, letters, now_ms)
        truncated = [at for at, name in enumerate(worker.spec.names) if name == "truncated"]
        value = told(made, len(values), time.perf_counter() - begun_s, truncated)
        yield WindowedValue((ACCOUNT, value), Timestamp.now(), (GlobalWindow(),))

    def teardown(self) -> None:
        """Closes the connection."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, worker: JobWorker, values: Sequence[bytes], letters: Sequence[DeadLetter], now_ms: int) -> None:
        """Writes, acknowledged when it returns; a broker that is away for a moment costs only time.

        Where the outcome is unknown a new writer writes again: what is there then comes twice, with the same places.
        """
        kafka = worker.settings.kafka
        for left in reversed(range(TRIES)):
            try:
                self._writer = writer = self._writer or worker.log.writer()
                for value in values:
                    writer.send(kafka.microbatches_topic, 0, None, value, [], now_ms)
                send_letters(writer, kafka.dead_letters_topic, letters, now_ms)
                writer.flush()
                return
            except UnreachableBroker as error:
                if self._writer is not None:
                    self._writer.close(0.0)
                self._writer = None
                if not left:
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                time.sleep(WAIT_S)
