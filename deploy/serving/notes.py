"""Names and formats of the metadata that the applier writes to a host's stores for workers; see also `state.layout`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from state.disk import files as durable
from state.layout import CURRENT

CONTROL_NOTE = "control"
MASK_NOTE = "mask"
"""Notes in the row store: the control generation that answers respect, and its mask."""

REFUSED_NOTE = "refused"
"""A note in the row store: the reason why each refused version is not served, as JSON by version number."""

CLOCK_EXTRA = "clock"
CAUGHT_UP_EXTRA = "caught_up"
"""Extras of the histories: the event clock, and whether the micro-batch topic was ever read to its end."""

SEEN = "seen:"
"""Prefix of the extra with the day of log time, 4 bytes big-endian, on which an item or a name was last seen."""

ITEM = "item:"
"""Prefix of the extra with an item's category, 8 bytes big-endian, and its name, if any."""

DAY_MS = 86_400_000


def refused_versions(note: bytes | None) -> dict[int, str]:
    """Parses the value of `REFUSED_NOTE`.

    >>> refused_versions(b'{"7": "it answers otherwise"}'), refused_versions(None)
    ({7: 'it answers otherwise'}, {})
    """
    return {} if note is None else {int(version): why for version, why in json.loads(note).items()}


def name_extra(category: int) -> str:
    """Returns the key of the extra with a category's name.

    >>> name_extra(7)
    'name:0000000000000007'
    """
    return f"name:{category:016x}"


def item_extra(item: int) -> str:
    """Returns the key of the extra with an item's category id and name.

    >>> item_extra(7)
    'item:0000000000000007'
    """
    return f"{ITEM}{item:016x}"


def item_value(category: int, name: bytes = b"") -> bytes:
    """Encodes the value of an item's extra.

    >>> item_parts(item_value(7, b"i1"))
    (7, 'i1')
    """
    return category.to_bytes(8, "big") + name


def item_parts(value: bytes) -> tuple[int, str]:
    """Decodes an item's category and name; the name is empty if unknown, as in values from older releases."""
    return int.from_bytes(value[:8], "big"), value[8:].decode()


class EventClock(NamedTuple):
    """The value of `CLOCK_EXTRA`.

    Attributes:
        event_ms: The newest accepted event's time.
        accepted_ms: The wall clock when it was accepted.
    """

    event_ms: int
    accepted_ms: int

    @classmethod
    def parse(cls, stored: bytes | None) -> EventClock | None:
        """Parses the clock; None before the first event.

        >>> EventClock.parse(b'{"event_ms": 100, "accepted_ms": 5000}')
        EventClock(event_ms=100, accepted_ms=5000)
        """
        if stored is None:
            return None
        values = json.loads(stored)
        return cls(int(values["event_ms"]), int(values["accepted_ms"]))

    def now(self, now_ms: int) -> int:
        """Returns the newest accepted event's time plus the wall time since it was accepted.

        >>> EventClock(100, 5000).now(5030)
        130
        """
        return self.event_ms + max(0, now_ms - self.accepted_ms)


VERSIONS, CLICKS = "version", "histories"
"""The parts, named as in /readyz."""

NOTE_MS = 1000


class Currency:
    """Records in files up to which time the stores of one host are complete.

    The applier writes that time, and workers read it. It is not the age of the data: without new clicks, old
    histories are current. Histories that reach the log's end offsets hold all that the log held when these were
    requested. A poll of the registry that finds nothing new counts in the same way.

    The time is the modification time of a file, so recording it is cheap.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = {part: folder / f"{CURRENT}.{part}" for part in (VERSIONS, CLICKS)}
        self._noted_ms = dict.fromkeys(self._paths, 0)

    def note(self, part: str, at_ms: int) -> None:
        """Records that the part is complete up to `at_ms`; written at most once a second."""
        if 0 <= at_ms - self._noted_ms[part] < NOTE_MS:
            return
        self._noted_ms[part] = at_ms
        # If the disk is full before the file exists, readiness reports it.
        durable.note_time(self._paths[part], at_ms)

    def ages_s(self, now_ms: int) -> dict[str, float | None]:
        """Returns, by part, the time in seconds since it was last complete; None if that was never recorded."""
        ages = dict[str, float | None]()
        for part, path in self._paths.items():
            try:
                ages[part] = (now_ms - path.stat().st_mtime_ns // 1_000_000) / 1000
            except FileNotFoundError:
                ages[part] = None
        return ages

    def older_than(self, max_age_s: float, now_ms: int) -> dict[str, str]:
        """Returns a message for each part that was last complete more than `max_age_s` ago, or never."""
        messages = {}
        for part, age_s in self.ages_s(now_ms).items():
            if age_s is None:
                messages[part] = "the applier has not yet confirmed that this part is up to date"
            elif age_s > max_age_s:
                messages[part] = (
                    f"what came in the last {age_s:.0f} s is not all taken up (serving.max_age_s {max_age_s:g})"
                )
        return messages
