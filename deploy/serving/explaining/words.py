"""What lies behind the parts of an explanation, in words: "viewed phones 14 times in 7 days, last 3 min ago"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deploy.serving.answer import iso
from deploy.serving.explaining.explanation import Behind
from deploy.serving.explaining.groups import Group
from state.features.spec import LABELLED, POSITIVE, Events, FeatureSpec

EVENTS_SHOWN = 3
NAMES_SHOWN = 3
DAY_MS = 86_400_000
UNITS = ((DAY_MS, "day"), (3_600_000, "h"), (60_000, "min"), (1000, "s"))

VERBS = {
    "view": "viewed {}",
    "click": "clicked {}",
    "favorite": "marked {} as favourite",
    "cart": "put {} into the cart",
    "purchase": "bought {}",
    "buy": "bought {}",
    "like": "liked {}",
    "play": "played {}",
}
"""What somebody did who did an action, by its name; any other is named."""


def duration(ms: int) -> str:
    """A length of time in its largest whole unit.

    >>> [duration(ms) for ms in (604_800_000, 86_400_000, 200_000, 400)]
    ['7 days', '1 day', '3 min', '0 s']
    """
    size, unit = next((one for one in UNITS if ms >= one[0]), UNITS[-1])
    count = ms // size
    return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"


def times(count: int) -> str:
    """How often.

    >>> times(1), times(14)
    ('once', '14 times')
    """
    return "once" if count == 1 else f"{count} times"


def listed(names: Sequence[str]) -> str:
    """Some names, and how many others there are.

    >>> listed(["a", "b", "c", "d"]), listed(["a", "b"]), listed([])
    ('a, b, c and 1 more', 'a, b', 'none')
    """
    more = len(names) - NAMES_SHOWN
    return (", ".join(names[:NAMES_SHOWN]) or "none") + f" and {more} more" * (more > 0)


class Words:
    """Tells of one user's events.

    Args:
        events: `[m]` EVENT, newest first, those that windows count.
        at_ms: The time that is answered for.
        spec: Names actions and windows.
        name_of: The name of a category.
        recent_categories: The user's, newest first.
        attributes: Of the user, as names and texts.
    """

    def __init__(
        self,
        events: Events,
        at_ms: int,
        spec: FeatureSpec,
        name_of: Callable[[int], str],
        recent_categories: Sequence[int],
        attributes: Sequence[tuple[str, str | None]],
    ) -> None:
        self._events, self._at_ms, self._spec, self._name_of = events, at_ms, spec, name_of
        self._recent, self._attributes = recent_categories, attributes
        self._span = duration(spec.windows_s[-1] * 1000)

    def of(self, group: Group) -> Behind:
        """What lies behind a group of inputs."""
        events = self._events
        names = [self._name_of(one) for one in self._recent]
        newest = names[0] if names else "none"
        if group.kind == "category":
            name = names[group.place] if group.place < len(names) else "none"
            of_category = events[np.isin(events["category"], self._recent[group.place : group.place + 1])]
            return self._told(of_category, name, name)
        if group.kind == "action":
            return self._told(events[events["action"] == group.place], "", self._spec.actions[group.place])
        labelled, positive = ((events["flags"] & bit != 0) for bit in (LABELLED, POSITIVE))
        items, days = len(set(events["item"].tolist()) - {0}), len(set((events["at_ms"] // DAY_MS).tolist()))
        words = {
            "outcomes": f"engaged with {int(positive.sum())} of {int(labelled.sum())} items whose outcome is known in {self._span}",
            "variety": f"{len(set(events['category'].tolist()) - {0})} categories and {items} items in {self._span}",
            "rhythm": f"{len(events)} events on {days} {'day' if days == 1 else 'days'} of the last {self._span}{self._last(events)}",
            "succession": f"what over all users comes next after {newest}, the latest category",
            "sequence": f"the order of the latest {self._spec.sequence} events",
            "user": "what was learned from this user's clicks so far",
            "context": "attributes: " + listed([f"{name}={text}" for name, text in self._attributes if text is not None]),
            "crosses": "what was learned of this user and such users with this item and such items",
        }  # fmt: skip
        shown = {"outcomes": events[positive], "rhythm": events, "sequence": events}.get(group.kind, events[:0])
        return Behind(words.get(group.kind, "the item and its category"), None, self._shown(shown))

    def _told(self, events: Events, what: str, about: str) -> Behind:
        """What was done, how often and when last: with one category, or one action with all."""
        counts = np.bincount(events["action"], minlength=len(self._spec.actions)).tolist()
        done = [
            f"{' '.join(VERBS.get(name, f'did {name} with {{}}' if what else f'did {name}').format(what).split())} {times(count)}"
            for name, count in zip(self._spec.actions, counts, strict=False)
            if count
        ]
        words = f"{' and '.join(done) or 'nothing'} in {self._span}{self._last(events)}"
        return Behind(words, about, self._shown(events))

    def _last(self, events: Events) -> str:
        if not len(events):
            return ""
        return f", last {duration(self._at_ms - int(events['at_ms'][0]))} ago"

    def _shown(self, events: Events) -> list[dict[str, str | None]]:
        """The newest of them."""
        return [
            {
                "at": iso(int(one["at_ms"])),
                "action": self._spec.actions[int(one["action"])] if one["action"] < len(self._spec.actions) else None,
                "category": self._name_of(int(one["category"])) if one["category"] else None,
                "item": f"{int(one['item']):016x}" if one["item"] else None,
            }
            for one in events[:EVENTS_SHOWN]
        ]
