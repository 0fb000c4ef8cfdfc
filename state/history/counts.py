"""The counts that the histories keep per source: the position, and the outcomes of the offsets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import lmdb

from state.errors import PositionConflict
from state.positions import RARE, Range, Source

OUTCOMES = ("rows", "dead", "filtered", "absent")

Counts = dict[str, int]


def advanced(counts: Mapping[str, int] | None, part: Range, holder: str) -> Counts:
    """The counts of a source after reading `part`; PositionConflict if the range begins at another offset."""
    after = {"first": part.first, "next": part.first, **dict.fromkeys(OUTCOMES, 0)} if counts is None else dict(counts)
    if after["next"] != part.first:
        raise PositionConflict(
            f"{holder} has read {part.source} up to {after['next']}, and the batch begins at {part.first}",
            "stop the second writer and start again: reading continues at the stored position",
        )
    after["next"] = part.next
    for name, count in part.outcomes.items():
        after[name] = after.get(name, 0) + count
    return after


def returned(counts: Mapping[str, int], removed: Mapping[str, int], at: int) -> Counts:
    """The counts of a source after a rollback to offset `at`, which removes the outcomes `removed` since then."""
    remaining = {name: count - removed.get(name, 0) for name, count in counts.items()}
    named = {name: count for name, count in remaining.items() if count or name not in RARE}
    return {**named, "first": counts["first"], "next": at}


def key_of(source: Source) -> bytes:
    """The key under which the store keeps the counts of a source."""
    return b"p:" + str(source).encode()


def move(cursor: lmdb.Cursor, part: Range, holder: str) -> None:
    """Advances the stored counts of the range's source; see `advanced`."""
    key = key_of(part.source)
    stored = cursor.get(key)
    counts = advanced(None if stored is None else json.loads(bytes(stored)), part, holder)
    cursor.put(key, json.dumps(counts).encode())


def summed(sources: Iterable[Mapping[str, int]]) -> Counts:
    """Outcomes summed over all sources, with `positions`, the offsets passed. Counts of `RARE` occur only if not 0."""
    counts = list(sources)
    sums = {name: sum(count[name] for count in counts) for name in OUTCOMES}
    sums |= {name: total for name in RARE if (total := sum(count.get(name, 0) for count in counts))}
    passed = sum(count["next"] - count["first"] for count in counts)
    return {"positions": passed - sums.get("elsewhere", 0), **sums}
