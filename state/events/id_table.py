"""Caches the ids of recent texts, so that a column of texts becomes a column of ids in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.errors import DecodeError
from state.events.dead_letters import Reason

ANNOUNCE_MS = 600_000
CACHED_IDS = 200_000
CACHED_CHARACTERS = 256  # longer texts are hashed each time, to bound the table
NAME_CHARACTERS = 200

_ID_TYPES = frozenset((str, int))


class IdTable:
    """Ids by text, and the last time each text was announced. For one thread.

    Args:
        make: Computes the id of a text.
        announced: Whether `news` announces texts.
        whole: Whether texts longer than `NAME_CHARACTERS` are not announced; otherwise they are cut.
    """

    def __init__(self, make: Callable[[str | int], int], announced: bool = True, whole: bool = False) -> None:
        self._make, self._announced, self._whole = make, announced, whole
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._texts: list[str] = []
        self._ids = np.empty(1024, np.uint64)
        self._announced_ms = np.empty(1024, np.int64)
        self._met: list[NDArray[np.int64]] = []
        self._met_singly: list[int] = []
        # Texts by id, for long texts, which have no number.
        self._met_long: dict[int, str] = {}
        self._announced_long: dict[int, int] = {}

    def begin(self) -> None:
        """Starts a batch; a full table is cleared, and its texts are announced again."""
        if max(len(self._texts), len(self._announced_long)) >= CACHED_IDS:
            self._forget()

    def column(self, values: Sequence[Any]) -> NDArray[np.uint64] | None:
        """The ids of n values, `[n]` uint64; None if the values must be read one by one.

        Raises:
            DecodeError: A text is empty.
        """
        if not {*map(type, values)} <= _ID_TYPES:
            return None
        try:
            numbers = np.fromiter(map(self._numbers.get, values), np.int64, len(values))
        # `get` returns None for an unknown value.
        except TypeError:
            if any(value not in self._numbers and self._add(value) is None for value in values):
                return None
            numbers = np.fromiter(map(self._numbers.__getitem__, values), np.int64, len(values))
        if self._announced:
            self._meet(numbers)
        return self._ids[numbers]

    def id_of(self, value: str | int) -> int:
        """The id of one value.

        Raises:
            DecodeError: The text is empty.
        """
        number = self._numbers.get(value)
        if number is None:
            number = self._add(value)
        if number is None:
            made = self._make(value)
            if self._announced:
                self._met_long[made] = str(value)
            return made
        if self._announced:
            self._met_singly.append(number)
        return int(self._ids[number])

    def news(self, newest_ms: int) -> dict[int, str]:
        """Announces the texts seen since the last call that were not announced within `ANNOUNCE_MS`, and returns them.

        An earlier time also counts as distant: otherwise one wrong clock would suppress the names for years.
        """
        self._meet(np.empty(0, np.int64))
        met, self._met = np.concatenate(self._met), []
        due = met[np.abs(newest_ms - self._announced_ms[met]) >= ANNOUNCE_MS]
        self._announced_ms[due] = newest_ms
        texts = {int(self._ids[number]): self._texts[number] for number in dict.fromkeys(due.tolist())}
        if self._met_long:
            announced, long, self._met_long = self._announced_long, self._met_long, {}
            late = {
                made: text
                for made, text in long.items()
                if abs(newest_ms - announced.get(made, -ANNOUNCE_MS)) >= ANNOUNCE_MS
            }
            announced.update(dict.fromkeys(late, newest_ms))
            texts |= late
        if self._whole:
            return {made: text for made, text in texts.items() if len(text) <= NAME_CHARACTERS}
        return {made: text[:NAME_CHARACTERS] for made, text in texts.items()}

    def _meet(self, numbers: NDArray[np.int64]) -> None:
        if self._met_singly:
            self._met.append(np.array(self._met_singly, np.int64))
            self._met_singly = []
        self._met.append(numbers)

    def _add(self, value: str | int) -> int | None:
        """Assigns a number to a value; None for a text that is too long."""
        text = str(value)
        if not text:
            raise DecodeError(Reason.EMPTY_ID)
        if len(text) > CACHED_CHARACTERS:
            return None
        number = self._numbers.get(text)
        if number is None:
            number = len(self._texts)
            if number == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._announced_ms = np.concatenate((self._announced_ms, np.empty_like(self._announced_ms)))
            self._ids[number], self._announced_ms[number] = self._make(value), -ANNOUNCE_MS
            self._texts.append(text)
            self._numbers[text] = number
        # 7 and "7" have one id.
        self._numbers[value] = number
        return number
