"""What a host remembers of items and names beside its histories: since when nobody named one, and which have to go.

    item:<id>        the category that it was last seen in, and its name
    name:<id>        the text of a category, of a measured attribute value, or of an item without a category
    seen:item:<id>   the day of log time on which it was last named, 4 bytes; so for names

All are extras of the histories, and committed with the clicks that name them. A
pass over all of them begins with each day of log time. It takes out what nobody
named for so many days; and where there are too many, as many of those that were
named longest ago, of one day those with the lowest ids. What an older release
left without a day counts from the first pass on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.serving.notes import DAY_MS, SEEN, item_extra, item_value, name_extra
from state.features.spec import Events
from state.history.appends import Appends
from state.history.store import HistoryStore

ITEMS_REMEMBERED = 1_000_000
AT_ONCE = 500
KINDS = ("item:", "name:")
SPARE = 50  # one in so many goes beyond what has to


@dataclass
class _Kind:
    """Items, or names: how many there are at most, and what the next pass takes out."""

    kept: Counter[int] = field(default_factory=Counter)
    count: int = 0
    before: int = 0
    more: int = 0

    def end(self, most: int) -> None:
        """After a pass: which day everything has to go before, and how many more of that day."""
        self.count, self.before, self.more = self.kept.total(), 0, 0
        going = self.count - most + most // SPARE if self.count > most else 0
        for day in sorted(self.kept):
            if going <= 0:
                break
            self.before, self.more = day, going
            going -= self.kept[day]
        self.kept.clear()

    def goes(self, day: int) -> bool:
        """Whether one that was last named on `day` has to go."""
        if day == self.before and self.more:
            self.more -= 1
            return True
        return day < self.before


class Remembered:
    """Items and names of one host's histories; used by the thread that commits to them.

    Args:
        store: The histories.
        keep_days: Days of log time without being named after which one goes.
        most: The most items, and the most names.
    """

    def __init__(self, store: HistoryStore, keep_days: int, most: int) -> None:
        self._store, self._keep_days, self._most = store, keep_days, most
        # Twice the category, and 1 more of those that have a name.
        self._known: dict[int, int] = {}
        self._today: set[int] = set()
        self._day = 0
        self._kinds = {kind: _Kind() for kind in KINDS}
        self._walk: tuple[int, str] | None = None
        self._walked_day = -1

    @property
    def counts(self) -> dict[str, int]:
        """How many items and names there are; too many rather than too few until the next pass has counted them."""
        return {kind.rstrip(":"): self._kinds[kind].count for kind in KINDS}

    def news(self, events: Events, names: Mapping[int, str], clock_ms: int) -> dict[str, bytes]:
        """The extras to commit with some clicks: categories that are new or have changed, names, and today's first sightings.

        Args:
            events: `[m]` EVENT.
            names: That came with them.
            clock_ms: Log time.
        """
        self._turn(clock_ms)
        day, found = self._day.to_bytes(4, "big"), dict[str, bytes]()
        categories = dict(zip(events["item"].tolist(), events["category"].tolist(), strict=True))
        for item, category in categories.items():
            if not (item and category):
                continue
            known, text = self._known.get(item, 0), names.get(item)
            if known >> 1 != category or (text is not None and not known & 1):
                name = (self._store.extra(item_extra(item)) or b"")[8:] if text is None else text.encode()
                self._known[item] = category << 1 | bool(name)
                found[item_extra(item)] = item_value(category, name)
                self._kinds["item:"].count += not known
            if item not in self._today:
                self._today.add(item)
                found[SEEN + item_extra(item)] = day
        named = {*events["category"].tolist()}
        for one, text in names.items():
            if categories.get(one) and one not in named:
                continue
            found[name_extra(one)] = text.encode()
            self._kinds["name:"].count += one not in self._today
            self._today.add(one)
            found[SEEN + name_extra(one)] = day
        return found

    def forget(self) -> None:
        """Forgets what is in memory: the store went back."""
        self._known.clear()
        self._today.clear()

    def look(self, clock_ms: int) -> int:
        """Looks at some hundred items or names, and takes out those that have to go; returns how many."""
        self._turn(clock_ms)
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
        """Looks at those from `start` on; returns how many went, and where to go on."""
        kind, changes = self._kinds[prefix], dict[str, bytes | None]()
        found = self._store.extras(prefix, start, AT_ONCE + 1)
        following = found[AT_ONCE][0] if len(found) > AT_ONCE else None
        seen = dict(self._store.extras(SEEN + prefix, SEEN + start if start else "", AT_ONCE))
        removed = 0
        for name, _ in found[:AT_ONCE]:
            stored = seen.get(SEEN + name)
            day = self._day if stored is None else int.from_bytes(stored, "big")
            if day < self._day - self._keep_days or kind.goes(day):
                changes |= {name: None, SEEN + name: None}
                one = int(name.removeprefix(prefix), 16)
                self._known.pop(one, None)
                self._today.discard(one)
                removed += 1
                continue
            kind.kept[day] += 1
            if stored is None:
                changes[SEEN + name] = self._day.to_bytes(4, "big")
        if changes:
            self._store.commit(Appends.none(), (), changes)
        return removed, following

    def _turn(self, clock_ms: int) -> None:
        """Begins a new day of log time, and forgets what does not fit into memory."""
        if clock_ms // DAY_MS != self._day or len(self._today) > ITEMS_REMEMBERED:
            self._day = clock_ms // DAY_MS
            self._today.clear()
        if len(self._known) > ITEMS_REMEMBERED:
            self._known.clear()
