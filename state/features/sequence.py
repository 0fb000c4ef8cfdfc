"""The latest events themselves, newest first, for a ranker that looks at them one by one.

Each has an item, a category, an action (1 and up, in the order of
`events.actions`; one that is not named counts as the next number) and the age
that it had at the row's time, as a recency: eight steps an octave of 1.024 s,
0 to 254. An event without an item or without a category has 0 there. Places
beyond the visible events are 0 in all four; the action tells them apart.
"""

from __future__ import annotations

from state.compiled import inlined
from state.features.arrays import I64, Tables, Vector
from state.features.order import step_of
from state.features.scratch import Scratch


@inlined
def write_sequence(ring: I64, at_ms: int, visible: int, tables: Tables, work: Scratch, rows: Vector, n: int) -> None:
    """Writes the four `sequence_*` of row `n`; nothing where they have no places."""
    for k in range(rows.sequence_items.shape[1]):
        if k >= visible:
            rows.sequence_items[n, k] = 0
            rows.sequence_categories[n, k] = 0
            rows.sequence_actions[n, k] = 0
            rows.sequence_ages[n, k] = 0
            continue
        place = work.order[k]
        rows.sequence_items[n, k] = ring[place, 2]
        rows.sequence_categories[n, k] = ring[place, 1]
        rows.sequence_actions[n, k] = 1 + min((ring[place, 4] >> 48) & 0xFF, tables.actions)
        rows.sequence_ages[n, k] = tables.recency[step_of((at_ms - ring[place, 0]) >> 10)]
