"""Takes a host's histories back to where control's line of the training log turned off, with all that is noted beside them."""

from __future__ import annotations

import json

from deploy.serving.notes import CLOCK_EXTRA, SEEN, item_extra, item_value
from state.features.mask import Mask
from state.history.before import Before
from state.history.rewinding import OpenAt, WentBack, go_back
from state.history.store import HistoryStore
from state.microbatch.log_time import log_times
from state.registry.log_line import LogLine, onward

POSITION_EXTRA = "microbatches"


def clock_of(store: HistoryStore) -> int:
    """The event clock that the store has, ms; 0 for none."""
    clock = store.extra(CLOCK_EXTRA)
    return 0 if clock is None else int(json.loads(clock)["event_ms"])


def take_back(
    store: HistoryStore, line: LogLine, mask: Mask, partition: int, open_at: OpenAt, reach_ms: int, now_ms: int
) -> WentBack | None:
    """Takes `store` to `line`, in one transaction with the topic's position, the event clock and items' categories.

    An item that none but masked clicks named since has the category again that
    it had before; where none is found near, it has none until the next click.

    Args:
        store: The host's histories.
        line: What control names.
        mask: The clicks that do not come again.
        partition: Of the topic, which the line is of.
        open_at: Opens that partition at an offset.
        reach_ms: How much older than the newest event one can be that still matters.
        now_ms: Wall clock.

    Raises:
        GapError: The log no longer reaches back to where the line turned off.
        LogError: The broker refused.
        StoreFull: Nothing was changed.
    """
    stored = json.loads(store.extra(POSITION_EXTRA) or b"{}")
    # Restored histories know no position in the log; what they have may lie anywhere in it.
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
