"""Stores the items and names that a host has seen, and removes those that have not been seen for long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.serving.host_files import DAY_MS, SEEN, item_extra, item_value, name_extra
from state.features.spec import Events
from state.history.appends import Appends
from state.history.store import HistoryStore

ITEMS_REMEMBERED = 1_000_000
AT_ONCE = 500
KINDS = ("item:", "name:")
SPARE = 50  # a pass over a full store removes 1/SPARE of the limit more than necessary


def is_remembered(name: str) -> bool:
    """Whether an extra is one of an item or a name."""
    return name.removeprefix(SEEN).startswith(KINDS)


@dataclass
class _Kind:
    """The state of items or of names: an upper bound on their number, and what the next pass removes."""

    kept: Counter[int] = field(default_factory=Counter)
    count: int = 0
    before: int = 0
    more: int = 0

    def end(self, most: int) -> None:
        """Ends a pass: computes the day before which all entries are removed, and how many more of that day."""
        self.count, self.before, self.more = self.kept.total(), 0, 0
        going = self.count - most + most // SPARE if self.count > most else 0
        for day in sorted(self.kept):
            if going <= 0:
                break
            self.before, self.more = day, going
            going -= self.kept[day]
        self.kept.clear()

    def goes(self, day: int) -> bool:
        """Whether to remove an entry that was last seen on `day`."""
        if day == self.before and self.more:
            self.more -= 1
            return True
        return day < self.before


class Remembered:
    """The items and names in one host's histories. Used by the thread that commits to them.

    They are extras of the histories, committed with the clicks that contain them, each with the day of log time on which
    it was last seen. With each day a pass over all begins. It removes entries not seen for `keep_days` and, above the
    limit, those seen longest ago. An entry without a day, from an older release, counts as seen at the first pass.

    Args:
        keep_days: Entries that have not been seen for more days of log time are removed.
        most: The maximum number of items, and of names.
    """

    def __init__(self, store: HistoryStore, keep_days: int, most: int) -> None:
        self._store, self._keep_days, self._most = store, keep_days, most
        # Item to twice its category, plus 1 if the item has a name.
        self._known: dict[int, int] = {}
        self._today: set[int] = set()
        self._day = 0
        self._kinds = {kind: _Kind() for kind in KINDS}
        self._walk: tuple[int, str] | None = None
        self._walked_day = -1

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of items and names; they may be too high until the next pass has counted."""
        return {kind.rstrip(":"): self._kinds[kind].count for kind in KINDS}

    def news(self, events: Events, names: Mapping[int, str], clock_ms: int) -> dict[str, bytes]:
        """Returns the extras to commit with clicks: new or changed categories, names, and entries first seen today.

        `events` are `[m]` EVENT, and `names` are the names in their record, by id.
        """
        self._begin_day(clock_ms)
        day, extras = self._day.to_bytes(4, "big"), dict[str, bytes]()
        categories = dict(zip(events["item"].tolist(), events["category"].tolist(), strict=True))
        for item, category in categories.items():
            if not (item and category):
                continue
            known, text = self._known.get(item, 0), names.get(item)
            if known >> 1 != category or (text is not None and not known & 1):
                name = (self._store.extra(item_extra(item)) or b"")[8:] if text is None else text.encode()
                self._known[item] = category << 1 | bool(name)
                extras[item_extra(item)] = item_value(category, name)
                self._kinds["item:"].count += not known
            if item not in self._today:
                self._today.add(item)
                extras[SEEN + item_extra(item)] = day
        named = {*events["category"].tolist()}
        for identity, text in names.items():
            if categories.get(identity) and identity not in named:
                continue
            extras[name_extra(identity)] = text.encode()
            self._kinds["name:"].count += identity not in self._today
            self._today.add(identity)
            extras[SEEN + name_extra(identity)] = day
        return extras

    def forget(self) -> None:
        """Clears the in-memory caches, after a rewind of the store."""
        self._known.clear()
        self._today.clear()

    def sweep(self, clock_ms: int) -> int:
        """Scans a few hundred items or names, and removes those that are due; returns the number of removed entries."""
        self._begin_day(clock_ms)
        if self._walk is None:
            if self._walked_day == self._day and all(kind.count <= self._most for kind in self._kinds.values()):
                return 0
            self._walk, self._walked_day = (0, ""), self._day
        number, start = self._walk
        prefix = KINDS[number]
        removed, following = self._take(prefix, start)
        if following is not None:
            self._walk = number, following
            return removed
        self._kinds[prefix].end(self._most)
        self._walk = (number + 1, "") if number + 1 < len(KINDS) else None
        return removed

    def _take(self, prefix: str, start: str) -> tuple[int, str | None]:
        """Scans entries from `start`; returns the number of removed entries, and where to continue."""
        kind, changes = self._kinds[prefix], dict[str, bytes | None]()
        entries = self._store.extras(prefix, start, AT_ONCE + 1)
        following = entries[AT_ONCE][0] if len(entries) > AT_ONCE else None
        seen = dict(self._store.extras(SEEN + prefix, SEEN + start if start else "", AT_ONCE))
        removed = 0
        for name, _ in entries[:AT_ONCE]:
            stored = seen.get(SEEN + name)
            day = self._day if stored is None else int.from_bytes(stored, "big")
            if day < self._day - self._keep_days or kind.goes(day):
                changes |= {name: None, SEEN + name: None}
                identity = int(name.removeprefix(prefix), 16)
                self._known.pop(identity, None)
                self._today.discard(identity)
                removed += 1
                continue
            kind.kept[day] += 1
            if stored is None:
                changes[SEEN + name] = self._day.to_bytes(4, "big")
        if changes:
            self._store.commit(Appends.none(), (), changes)
        return removed, following

    def _begin_day(self, clock_ms: int) -> None:
        """Starts a new day of log time if it is due, and clears caches that are too large."""
        if clock_ms // DAY_MS != self._day or len(self._today) > ITEMS_REMEMBERED:
            self._day = clock_ms // DAY_MS
            self._today.clear()
        if len(self._known) > ITEMS_REMEMBERED:
            self._known.clear()
