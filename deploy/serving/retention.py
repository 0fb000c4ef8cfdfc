"""Which versions a host has, and which of them it forgets."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from state.rows.store import RowStore

RECENT_MS = 10_000
"""How long versions stay that are not durable."""


def applied_ms(rows: RowStore) -> dict[int, int]:
    """When each version in the store was applied, by its number."""
    with rows.reader() as reader:
        return {record.version: record.applied_at_ms for record in reader.versions()}


def too_old(
    here: Mapping[int, int], now_ms: int, keep_ms: int, durable: Collection[int], needed: Collection[int]
) -> list[int]:
    """The versions that go.

    >>> too_old({1: 0, 2: 0, 3: 0, 4: 15_000}, 20_000, 60_000, durable={1}, needed={3})
    [2]

    Args:
        here: When each was applied, by number.
        now_ms: Now.
        keep_ms: How long durable ones stay.
        durable: Those that are.
        needed: Those that stay in any case.
    """
    recent_ms = min(RECENT_MS, keep_ms)
    return [
        version
        for version, applied_ms in here.items()
        if now_ms - applied_ms > (keep_ms if version in durable else recent_ms) and version not in needed
    ]
