"""Writes a row out of its sums, saturated to 16 bits, in the order of the names of `FeatureSpec`."""

from __future__ import annotations

from state.compiled import inlined
from state.features.ages import DAY_MS, HOUR_MS, NEVER
from state.features.arrays import GAPS, OF_ORDER, SLOTS, U16, Tables
from state.features.order import Course, step_of
from state.features.scratch import Scratch
from state.features.sums import Totals


@inlined
def write_categories(tables: Tables, work: Scratch, category_count: int, any_last: bool, category_windows: U16) -> None:
    """What each category did; in the order of `FeatureSpec.window_names`."""
    width, lives = tables.windows_ms.shape[0], tables.decay.shape[1]
    of_order, first = work.of_order, category_windows.shape[1] - OF_ORDER
    for slot in range(category_windows.shape[0]):
        if slot >= category_count:
            category_windows[slot, width + lives] = NEVER
            continue
        total = 0
        for w in range(width):
            total += work.category_sums[slot, w]
            category_windows[slot, w] = min(total, 65535)
        for h in range(lives):
            category_windows[slot, width + h] = min(work.category_sums[slot, width + h] >> 8, 65535)
        # The recency at `width + lives` was written at first sight.
        for action in range(tables.actions):
            category_windows[slot, width + lives + 2 + action] = min(
                work.category_sums[slot, width + lives + action], 65535
            )
        category_windows[slot, first] = of_order[0, slot]
        category_windows[slot, first + 1] = of_order[0, slot] + of_order[1, slot]
        category_windows[slot, first + 2] = of_order[2, slot]
    category_windows[0, width + lives + 1] = any_last


@inlined
def write_features(
    at_ms: int,
    tables: Tables,
    work: Scratch,
    course: Course,
    found: Totals,
    truncated: bool,
    category_windows: U16,
    features: U16,
) -> None:
    """The row; in the order of `FeatureSpec.names`."""
    f = _write_sums(tables, work, features)
    f = _write_distinct(tables, work, found.categories, features, f)
    for k in range(GAPS):
        features[f] = work.gaps[k]
        f += 1
    recency = tables.recency
    features[f] = course.session_events
    features[f + 1] = recency[step_of((at_ms - course.session_start) >> 10)] if course.session_events else NEVER
    features[f + 2] = found.session_categories
    features[f + 3] = found.session_items
    features[f + 4] = course.sessions
    features[f + 5] = course.same_category
    features[f + 6] = course.switches
    features[f + 7] = course.visible
    features[f + 8] = truncated
    features[f + 9] = recency[found.oldest_step] if course.visible else NEVER
    features[f + 10] = course.days
    f = _write_clock(at_ms, tables, features, f + 11)
    for slot in range(SLOTS):
        for k in range(category_windows.shape[1] - OF_ORDER):
            features[f] = category_windows[slot, k]
            f += 1


@inlined
def _write_sums(tables: Tables, work: Scratch, features: U16) -> int:
    """Actions first, then events with a known label, then with a positive one; returns where the next feature goes."""
    width, lives, actions = tables.windows_ms.shape[0], tables.decay.shape[1], tables.actions
    f = 0
    sums = work.sums
    sums[:] = 0
    for kind in range(4 * (actions + 1)):
        action = kind >> 2
        events = 0
        for w in range(width):
            events += work.kind_sums[kind, w]
        if events == 0:
            continue
        total = 0
        for w in range(width + lives):
            if w < width:
                total += work.kind_sums[kind, w]
            else:
                total = work.kind_sums[kind, w]
            if action < actions:
                sums[action, w] += total
            if kind & 1:
                sums[actions, w] += total
            if kind & 2:
                sums[actions + 1, w] += total
    for part in range(actions + 2):
        for w in range(width + lives):
            features[f] = min(sums[part, w] if w < width else sums[part, w] >> 8, 65535)
            f += 1
        if part < actions:
            features[f] = work.action_recency[part]
            f += 1
    return f


@inlined
def _write_distinct(tables: Tables, work: Scratch, category_count: int, features: U16, f: int) -> int:
    """How many categories and items there were, and the share of the top category in thousandths."""
    width = tables.windows_ms.shape[0]
    for kind in range(2):
        total = 0
        for w in range(width):
            total += work.distinct[kind, w]
            features[f] = min(total, 65535)
            f += 1
    work.tops[:] = 0
    for slot in range(category_count):
        total = 0
        for w in range(width):
            total += work.category_sums[slot, w]
            work.tops[0, w] = max(work.tops[0, w], total)
            work.tops[1, w] += total
    for w in range(width):
        features[f] = work.tops[0, w] * 1000 // work.tops[1, w] if work.tops[1, w] > 0 else 0
        f += 1
    return f


@inlined
def _write_clock(at_ms: int, tables: Tables, features: U16, f: int) -> int:
    hour = at_ms // HOUR_MS % 24
    weekday = (at_ms // DAY_MS + 3) % 7  # the first of January 1970 was a Thursday
    features[f] = tables.hour[hour, 0]
    features[f + 1] = tables.hour[hour, 1]
    features[f + 2] = tables.weekday[weekday, 0]
    features[f + 3] = tables.weekday[weekday, 1]
    return f + 4
