"""Opens the micro-batch topic where the histories end, or, where it was cut back behind that, where what is left ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from state.errors import TruncatedLog
from state.log import LogReader

Open = Callable[[Mapping[int, int], Mapping[int, int]], LogReader]
"""Makes a reader at positions, told the leaders' epochs of the records before them."""

_log = logging.getLogger(__name__)


def open_kept(positions: dict[int, int], leaders: dict[int, int], open_at: Open) -> LogReader:
    """A reader at `positions`, which are moved back to where the log is the one that was read.

    Args:
        positions: By partition where the histories end.
        leaders: By partition the leader's epoch of the record before, where it is known.
        open_at: Makes a reader.

    Raises:
        LogError: The log cannot be read.
    """
    while True:
        try:
            return open_at(positions, leaders)
        except TruncatedLog as lost:
            (gap,) = lost.gaps
            _log.error("%s; reading goes on at %d, and what the histories have is left out", lost.what, gap.first)
            positions[gap.source.partition] = gap.first
            leaders.pop(gap.source.partition, None)


def as_stored(topic_id: str, positions: Mapping[int, int], reader: LogReader) -> bytes:
    """Where the histories end, as they keep it: JSON of the topic's id and, by partition, `next` and the `leaders` that are known.

    Args:
        topic_id: Of the micro-batch topic.
        positions: By partition where the histories end.
        reader: Which read up to there.
    """
    leaders = {str(partition): reader.leader_epoch(partition, at) for partition, at in positions.items()}
    document = {
        "topic_id": topic_id,
        "next": {str(partition): at for partition, at in positions.items()},
        "leaders": {partition: epoch for partition, epoch in leaders.items() if epoch >= 0},
    }
    return json.dumps(document).encode()
