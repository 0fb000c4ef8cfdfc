"""Rewinds a host's histories, and the metadata stored with them, to the branch point of the training log."""

from __future__ import annotations

import json

from deploy.serving.notes import CLOCK_EXTRA, SEEN, item_extra, item_value
from state.features.mask import Mask
from state.history.rewind import Before
from state.history.rewinding import OpenAt, WentBack, go_back
from state.history.store import HistoryStore
from state.microbatch.log_time import log_times
from state.registry.log_line import LogLine, onward

POSITION_EXTRA = "microbatches"


def clock_of(store: HistoryStore) -> int:
    """Returns the store's event clock in milliseconds; 0 if it has none."""
    clock = store.extra(CLOCK_EXTRA)
    return 0 if clock is None else int(json.loads(clock)["event_ms"])


def take_back(
    store: HistoryStore, line: LogLine, mask: Mask, partition: int, open_at: OpenAt, reach_ms: int, now_ms: int
) -> WentBack | None:
    """Rewinds `store` to the branch `line`.

    One transaction also sets the topic's position, the event clock and items' categories. An item that only
    masked clicks have named since the branch point gets its previous category back. If none is found nearby,
    the item has no category until the next click.

    Args:
        store: The host's histories.
        line: The branch that control names.
        mask: The clicks that are not read again.
        partition: The partition of the topic that the branch belongs to.
        open_at: Opens that partition at an offset.
        reach_ms: The maximum age, relative to the newest event, of an event that still matters.
        now_ms: The wall clock.

    Raises:
        GapError: The log no longer reaches back to the branch point.
        LogError: The broker refused a request.
        StoreFull: Nothing was changed.
    """
    stored = json.loads(store.extra(POSITION_EXTRA) or b"{}")
    # Restored histories have no position in the log; their events may come from anywhere in it.
    at = stored.get("next", {}).get(str(partition))

    def extra(offset: int, before: Before) -> dict[str, bytes | None]:
        gone = [item_extra(item) for item in before.items if item not in before.categories]
        found: dict[str, bytes | None] = {name: None for one in gone for name in (one, SEEN + one)}
        for item, one in before.categories.items():
            found[item_extra(item)] = item_value(one, (store.extra(item_extra(item)) or b"")[8:])
        if at is not None and at > offset:
            moved = {**stored["next"], str(partition): onward(line, offset)}
            found[POSITION_EXTRA] = json.dumps({**stored, "next": moved}).encode()
        if newest_ms := max((int(log_times(one).max(initial=0)) for one in before.latest), default=0):
            found[CLOCK_EXTRA] = json.dumps({"event_ms": newest_ms, "accepted_ms": now_ms}).encode()
        return found

    return go_back(store, line, open_at, partition, reach_ms, at, mask, extra)
