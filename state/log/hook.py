"""Makes the Kafka client hand over whole record batches instead of single records.

A private hook into kafka-python, so that its version is pinned below 3.1 and a
test compares both ways. Part of `state.log`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from kafka.structs import TopicPartition

from state.log.chunks import Chunk


class BatchRecords:
    """Takes the place of kafka-python's `Fetcher.PartitionRecords`: yields chunks, not records.

    Called by the fetcher in the thread of `poll`. It always gives all it has:
    how many records one poll delivers is the reader's business.
    """

    def __init__(
        self,
        fetch_offset: int,
        tp: TopicPartition,
        records: Any,
        aborted_transactions: Iterable[Any] | None = None,
        on_drain: Callable[[BatchRecords], object] = lambda _: None,
        isolation_level: Any = None,
        **_: object,
    ) -> None:
        self.fetch_offset = self.next_fetch_offset = fetch_offset
        self.topic_partition = tp
        self.leader_epoch = -1
        self.bytes_read = 0
        self._records = records
        self._aborted = [(each.producer_id, each.first_offset) for each in aborted_transactions or ()]
        self._committed_only = getattr(isolation_level, "name", "READ_COMMITTED") == "READ_COMMITTED"
        self._on_drain = on_drain

    def __bool__(self) -> bool:
        return self._records is not None

    def take(self, n: int | None = None) -> list[Chunk]:
        """All chunks; a second call has none."""
        del n
        if self._records is None:
            return []
        data = bytes(self._records._buffer)
        self.bytes_read = len(data)
        # Not at the top: it loads the compiler, and commands that ask for a topic's ends only are typed in a hurry.
        from state.log.batch_decoder import decode_batches

        chunks = decode_batches(data, self.fetch_offset, self._aborted, self._committed_only)
        if chunks:
            self.next_fetch_offset = chunks[-1].next
            self.leader_epoch = chunks[-1].leader_epoch
        self.drain()
        return chunks

    def drain(self) -> None:
        """Says to the fetcher that this piece is done."""
        if self._records is not None:
            self._records = None
            self._on_drain(self)


def install(consumer: Any, on_error: Callable[[], None]) -> bool:
    """Puts `BatchRecords` into the client; False where this client has no such place."""
    fetcher: Any = getattr(consumer, "_fetcher", None)
    parse = getattr(fetcher, "_parse_fetched_data", None)
    if parse is None or not hasattr(fetcher, "PartitionRecords"):
        return False
    # Now, and not at the first records.
    importlib.import_module("state.log.batch_decoder")

    def watched(completed: Any) -> Any:
        if completed.partition_data.error_code:
            on_error()
        return parse(completed)

    fetcher._parse_fetched_data = watched
    fetcher.PartitionRecords = BatchRecords
    return True
