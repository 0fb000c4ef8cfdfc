"""What dies next, and at which kill point: everything follows from a seed and the order of questions."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

POINTS: Mapping[str, Sequence[str]] = {
    "stream": (
        "stream.fenced",
        "back.found",
        "back.committed",
        "stream.opened",
        "stream.taken",
        "stream.sent",
        "stream.acknowledged",
        "stream.committed",
        "stream.grouped",
    ),
    "trainer": (
        "enter.restored",
        "enter.opened",
        "caught.written",
        "loop.stepped",
        "publish.file",
        "publish.written",
        "publish.checked",
        "publish.renamed",
        "publish.synced",
    ),
    "applier": (
        "apply.steered",
        "apply.read",
        "apply.applied",
        "back.found",
        "back.committed",
        "follow.taken",
        "follow.committed",
    ),
    "command": ("control.written", "control.linked", "rollback.proposed", "rollback.answered"),
}
# Reached once by a part that is started, or with the next rollback.
ONCE = ("back.", "enter.", "caught.", "control.", "rollback.", "apply.steered", "stream.fenced", "stream.opened")
# Where attributes are followed, stream and applier have a sequence of their own for them.
ATTRIBUTE_POINTS: Mapping[str, Sequence[str]] = {
    part: (*points, *(("attributes.reported", "attributes.committed") if part in ("stream", "applier") else ()))
    for part, points in POINTS.items()
}
# A trainer needs seconds to come back; it would never train if it died as often as the others.
WEIGHTS: Mapping[str, float] = {
    "stream": 26,
    "trainer": 16,
    "applier": 22,
    "worker": 20,
    "kafka": 5,
    "compactor": 6,
}
SHORTEST_S, LONGEST_S = 0.1, 1.2
# How often one dies that has yet to come up, of the times that it is chosen.
EARLY_SHARES: Mapping[str, float] = {"worker": 0.4, "applier": 0.3, "stream": 0.15, "trainer": 0.04}
ARMED_SHARE = 0.6
MOST_TIMES = 3


class Violence:
    """A seeded plan.

    Args:
        seed: Of every choice.
        rounds: How often each kill point must have struck.
        points: By part its kill points.

    Attributes:
        arms_always: Whether each part that is started gets a kill point as long as it has one left.
    """

    def __init__(self, seed: int, rounds: int = 1, points: Mapping[str, Sequence[str]] = POINTS) -> None:
        self.arms_always = False
        self._chance = random.Random(seed)
        self._decks = {part: list(named) * rounds for part, named in points.items()}
        for deck in self._decks.values():
            self._chance.shuffle(deck)

    @property
    def left(self) -> list[str]:
        """The kill points that have yet to strike."""
        return [point for deck in self._decks.values() for point in deck]

    def has_left(self, part: str) -> bool:
        """Whether a kill point of a part has yet to strike."""
        return bool(self._decks.get(part))

    def wait_s(self) -> float:
        """How long until the next kill."""
        return self._chance.uniform(SHORTEST_S, LONGEST_S)

    def away_s(self) -> float:
        """How long the broker stays dead before it is started again."""
        return self._chance.uniform(0.0, 1.5)

    def victim(self, candidates: Collection[str], ready: Collection[str]) -> str | None:
        """Which part dies: mostly one that does its work, now and then one that has yet to come up; None for none."""
        chosen = self._chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        early = self._chance.random() < EARLY_SHARES.get(chosen, 0.0)
        return chosen if chosen in candidates and (early or chosen in ready) else None

    def arm(self, part: str) -> str:
        """The kill point to arm in a part that is started; empty for none."""
        deck = self._decks.get(part)
        if not deck or (not self.arms_always and self._chance.random() >= ARMED_SHARE):
            return ""
        # Left in the deck until it has struck: the process may die of something else first.
        self._chance.shuffle(deck)
        return f"{deck[0]}:{1 if deck[0].startswith(ONCE) else self._chance.randint(1, MOST_TIMES)}"

    def struck(self, part: str, at: str) -> None:
        """Notes that a kill point (as `arm` gave it) has struck."""
        point = at.partition(":")[0]
        if point in self._decks[part]:
            self._decks[part].remove(point)
