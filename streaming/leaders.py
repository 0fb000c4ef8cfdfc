"""Stores which leader epoch wrote the newest click before each position of the shard, next to the histories.

    leaders.json   {"<topic id>:<partition>": [[first offset, leader's epoch], ...]}

At the next start it shows whether the clicks were truncated before a position (`state/log/records.py`). It is
written when a partition gets another leader, before anything of that leader is committed. So it also holds for
positions that result from a rebuild or a rollback.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from state.disk import files as durable
from state.layout import LEADERS
from state.log import Reader
from state.log.records import Known, epoch_before, noted
from state.positions import Range, Source


class Leaders:
    """The leader epochs of one shard. Only one thread may call `note`.

    Args:
        folder: The shard's directory, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEADERS
        kept = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        self._known: dict[Source, Known] = {
            Source.parse(source): tuple((int(first), int(epoch)) for first, epoch in known)
            for source, known in kept.items()
        }

        self._unwritten = False

    def at(self, topic_id: str, positions: Mapping[int, int]) -> dict[int, int]:
        """By partition the epoch of the record before its position, for those where it is known."""
        found = {
            partition: epoch_before(self._known.get(Source(topic_id, partition), ()), offset)
            for partition, offset in positions.items()
        }
        return {partition: epoch for partition, epoch in found.items() if epoch >= 0}

    def note(self, ranges: Iterable[Range], reader: Reader) -> None:
        """Stores the epochs of the last records of `ranges`, as `reader` read them; durable when this returns.

        Raises:
            OSError: The file cannot be written.
        """
        for part in ranges:
            known = self._known.get(part.source, ())
            epoch = reader.leader_epoch(part.source.partition, part.next)
            if epoch >= 0 and epoch_before(known, part.next) != epoch:
                # From the first record on: a rollback may end inside the range, and an epoch that ended before that
                # position would look like a truncated log.
                self._known[part.source] = noted(known, part.first, epoch)
                self._unwritten = True
        if self._unwritten:
            data = json.dumps({str(source): known for source, known in self._known.items()}, sort_keys=True)
            durable.replace(self._path, data.encode())
            self._unwritten = False
