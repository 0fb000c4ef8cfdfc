"""Scores items for a user: a log-linear model over the shares of items in lists, learned online by softmax regression.

The candidates of a user are the items in the lists of `SOURCES` (`state/ranking/item_lists.py`). share(k, i) is the
decayed clicks of item i in list k, divided by all decayed clicks of that list, at half-life h:

    features   f(i) = [ log(1 + 1e5 share(k, i)) for each source and half-life
                        | OWN of the user's own items, else 0
                        | log(1 + minutes since the item was listed) / 5 ]
    score      s(i) = sum over features a and columns c of w[a, c] * f_a(i) * phi_c
    phi(u)     1 | share of repeats - 0.3 | log(1 + clicks) / 3 | log(1 + clicks after the newest item) / 3
               | 1 / (1 + clicks)
    p(i)       softmax of s over the candidates

There are two w: one for all candidates, and one for candidates that are new to the user, learned from clicks on such items.

A source with several lists, such as the categories of a user's interests, has the sum of their weighted shares. The
probability of all other categories is multiplied by the share in the lists of all clicks. The
trainer learns w from the clicked items, and serving ranks by s. Both use `gather` and `score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined, layout, logarithms, mix
from state.ranking.item_lists import LISTS_OF_EVERYTHING, LIVES, ItemLists, decays

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SOURCES = ("everything", "category", "interests", "context", "newest", "second", "own")
"""The sources of candidates: all clicks, the user's newest category, the likeliest categories, the context values, the
user's newest item and the one before it, and the user's own items."""

EVERYTHING_AT, CATEGORY_AT, INTERESTS_AT, CONTEXT_AT, NEWEST_AT, SECOND_AT, OWN_AT = range(len(SOURCES))

SHARES = len(SOURCES) * LIVES
OWN = ("recency", "own", "rank", "repeats", "clicks", "gap")
"""The features of the user's own items."""

AGE_AT = SHARES + len(OWN)
FEATURES = AGE_AT + 1
COLUMNS = 5
"""Columns of phi."""

INTERESTS = 8
"""The likeliest categories, whose lists are read."""

MOST = 2048
"""The maximum number of candidates of a user."""

WEIGHTS = "recommend.weights"
"""The tensor of both w in a version, `[KINDS, FEATURES, COLUMNS]` float64."""

KINDS = 2
ALL, UNSEEN = range(KINDS)
"""The w for all candidates, and the w for candidates that are new to the user."""

_SLOTS = 2 * MOST
_ENTRIES = 2 * MOST
"""The maximum number of entries of lists that are read for a user, besides those of the lists of everything."""
_WIDTH = MOST + 16
"""Not a power of two, so that the features of one candidate are in different sets of the processor's cache."""
_SCALE = np.float32(1e5)


def first_weights() -> F64:
    """The weights before any click is learned: each share counts the same, and for new users those of all clicks.

    >>> first_weights().shape, float(first_weights()[ALL, :SHARES, 0].sum().round(2))
    ((2, 28, 5), 3.15)
    """
    weights = np.zeros((KINDS, FEATURES, COLUMNS))
    weights[:, :SHARES, 0] = 0.15
    weights[:, LIVES * EVERYTHING_AT : LIVES * (EVERYTHING_AT + 1), -1] = 0.3
    weights[:, LIVES * INTERESTS_AT : LIVES * (INTERESTS_AT + 1), -1] = -0.1
    return weights


@layout(
    "u8[::1], i4[::1], i4[::1], f4[:, ::1], i4[::1], f4[::1], i4[::1], i4[::1], f4[:, ::1], i4[:, ::1], f4[:, ::1], "
    "f4[::1], i8[::1]"
)
class Workspace(NamedTuple):
    """Candidates of one user, and their features; reused for each user.

    Attributes:
        items: `[MOST]` uint64, the candidates, in the order of the lists.
        slots: `[2 MOST]` int32, an open-addressing index of the candidates: 1 + index, 0 for none.
        taken: `[MOST]` int32, the slots in use.
        features: `[FEATURES, MOST + 16]` float32; shares and ages until all lists are read.
        own: `[MOST]` int32, 1 + the rank among the user's own items; 0 for others.
        scores: `[MOST]` float32.
        entries: `[N]` int32, the candidate of each entry of a list, without `everything` and `interests`.
        sources: `[N]` int32, its source.
        values: `[LIVES + 1, M]` float32, the arguments of the logarithms of features; ages are last.
        bits: `values` viewed as int32.
        logs: `[LIVES + 1, M]` float32, these logarithms.
        factors: `[FEATURES]` float32, w phi.
        size: `[1]` int64, the number of candidates.
    """

    items: U64
    slots: I32
    taken: I32
    features: F32
    own: I32
    scores: F32
    entries: I32
    sources: I32
    values: F32
    bits: I32
    logs: F32
    factors: F32
    size: I64

    @classmethod
    def empty(cls) -> Workspace:
        """A new workspace."""
        values = np.ones((LIVES + 1, 2 * MOST + _ENTRIES), np.float32)
        return cls(
            np.zeros(MOST, np.uint64),
            np.zeros(_SLOTS, np.int32),
            np.zeros(MOST, np.int32),
            np.zeros((FEATURES, _WIDTH), np.float32),
            np.zeros(MOST, np.int32),
            np.zeros(MOST, np.float32),
            np.zeros(_ENTRIES, np.int32),
            np.zeros(_ENTRIES, np.int32),
            values,
            values.view(np.int32),
            np.zeros_like(values),
            np.zeros(FEATURES, np.float32),
            np.zeros(1, np.int64),
        )


@layout("i4[::1], i4[::1], f4[::1]")
class Reads(NamedTuple):
    """The lists of the table `clicked` that are read for one user.

    Attributes:
        rows: `[r]` int32; 0 for none. The lists of everything come first.
        sources: `[r]` int32, the source of each.
        weights: `[r]` float32, its weight.
    """

    rows: I32
    sources: I32
    weights: F32


@inlined
def _add_everything(lists: ItemLists, row: int, scales: F32, at_s: int, first: int, work: Workspace) -> int:
    """Adds the items of a list of everything, of which no other such list has any.

    scales: `[2, H]`, whose products with counts are shares of `everything` and of `interests`.
    first: The number of candidates. Returns their number afterwards.
    """
    ids, slots, items, taken, own = lists.ids, work.slots, work.items, work.taken, work.own
    mask, count = np.uint64(slots.shape[0] - 1), first
    for k in range(ids.shape[1]):
        item = ids[row, k]
        if item == np.uint64(0):
            break
        slot = mix(item) & mask
        while slots[slot] != 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot], taken[count], items[count], own[count] = count + 1, slot, item, 0
        count += 1
    for h in range(LIVES):
        shares = work.features[EVERYTHING_AT * LIVES + h, first:count]
        interests = work.features[INTERESTS_AT * LIVES + h, first:count]
        for k in range(count - first):
            shares[k] = lists.counts[row, h, k] * scales[0, h]
            interests[k] = lists.counts[row, h, k] * scales[1, h]
    ages, elapsed_s = work.features[AGE_AT, first:count], np.float32(max(0, at_s - lists.at_s[row]))
    for k in range(count - first):
        ages[k] = lists.ages[row, k] + elapsed_s
    return count


@inlined
def _add(
    lists: ItemLists, reads: Reads, scale: F32, at_s: int, counts: tuple[int, int], work: Workspace
) -> tuple[int, int]:
    """Adds the items of lists, but not of those of everything. Their decayed counts times `scale`, `[H]`, are shares.

    `counts`, the number of candidates and of entries, is returned as it is afterwards.
    """
    # Named before the loops, because `work.slots` in them would change a reference count.
    ids, clicks, ages, totals, times_s = lists.ids, lists.counts, lists.ages, lists.totals, lists.at_s
    slots, items, taken, own, features = work.slots, work.items, work.taken, work.own, work.features
    entry_items, entry_sources = work.entries, work.sources
    mask = np.uint64(slots.shape[0] - 1)
    count, entries = counts
    for r in range(reads.rows.shape[0]):
        row, source = reads.rows[r], reads.sources[r]
        if row == 0 or source == EVERYTHING_AT:
            continue
        elapsed_s = max(0, at_s - times_s[row])
        for h, kept in enumerate(decays(elapsed_s)):
            scale[h] = reads.weights[r] * kept / (totals[row, h] * kept + np.float32(0.5))
        for k in range(ids.shape[1]):
            item = ids[row, k]
            if item == np.uint64(0) or entries == entry_items.shape[0]:
                break
            slot = mix(item) & mask
            while slots[slot] != 0 and items[slots[slot] - 1] != item:
                slot = (slot + np.uint64(1)) & mask
            at = np.int64(slots[slot]) - 1
            if at < 0:
                if count == items.shape[0]:
                    continue
                at = np.int64(count)
                slots[slot], taken[count], items[count], own[count] = count + 1, slot, item, 0
                count += 1
            for h in range(LIVES):
                features[source * LIVES + h, at] += clicks[row, h, k] * scale[h]
            features[AGE_AT, at] = max(features[AGE_AT, at], ages[row, k] + np.float32(elapsed_s))
            if source != INTERESTS_AT:
                entry_items[entries], entry_sources[entries] = at, source
                entries += 1
            if source == OWN_AT:
                own[at] = k + 1
    return count, entries


@inlined
def _compute(listed: int, count: int, entries: int, work: Workspace) -> None:
    """Replaces shares and ages by their features.

    Those of `everything` are of the first `listed` candidates, those of `interests` and the age of all `count`, and
    others of the entries: most shares of these sources are 0.
    """
    features, values, logs, bits = work.features, work.values, work.logs, work.bits
    ages, ages_to_log, end = features[AGE_AT], values[LIVES], count + listed
    for h in range(LIVES):
        interests, everything = features[INTERESTS_AT * LIVES + h], features[EVERYTHING_AT * LIVES + h]
        to_log, everything_to_log, others_to_log = values[h, :count], values[h, count:end], values[h, end:]
        for i in range(count):
            to_log[i] = np.float32(1.0) + _SCALE * interests[i]
        for i in range(listed):
            everything_to_log[i] = np.float32(1.0) + _SCALE * everything[i]
        for e in range(entries):
            share = features[work.sources[e] * LIVES + h, work.entries[e]]
            others_to_log[e] = np.float32(1.0) + _SCALE * share
    for i in range(count):
        ages_to_log[i] = np.float32(1.0) + ages[i] / np.float32(60.0)
    logarithms(values[:LIVES], bits[:LIVES], logs[:LIVES], end + entries, 0)
    logarithms(values[LIVES:], bits[LIVES:], logs[LIVES:], count, 0)
    for h in range(LIVES):
        for i in range(count):
            features[INTERESTS_AT * LIVES + h, i] = logs[h, i]
        for i in range(listed):
            features[EVERYTHING_AT * LIVES + h, i] = logs[h, count + i]
        # An item may have several entries of a source. All have the features of their sum.
        for e in range(entries):
            features[work.sources[e] * LIVES + h, work.entries[e]] = logs[h, end + e]
    for i in range(count):
        ages[i] = logs[LIVES, i] / np.float32(5.0)


@compiled("ItemLists, ItemLists, ItemLists, Reads, i4[::1], i8, i8, f4[::1], Workspace")
def gather(
    clicked: ItemLists,
    followed: ItemLists,
    visited: ItemLists,
    reads: Reads,
    after: I32,
    user: int,
    at_s: int,
    phi: F32,
    work: Workspace,
) -> int:
    """Collects the candidates of one user with their features; returns their number.

    Args:
        clicked: Lists by category, context value, and of everything.
        followed: Lists by item.
        visited: Lists by user.
        reads: The lists of `clicked` to read.
        after: `[2]` int32, the lists of `followed` of the newest item and of the one before it; 0 for none.
        user: The list of `visited`; 0 for none.
        at_s: The time, in seconds.
        phi: `[COLUMNS]` float32, written by this function.
        work: Its candidates are replaced; call `clear` with their number afterwards.
    """
    features, scale, scales = work.features, np.empty(LIVES, np.float32), np.empty((2, LIVES), np.float32)
    for a in range(FEATURES):
        features[a, : work.size[0]] = np.float32(0.0)
    # 1. Shares. Those of the lists of everything are of the clicks of all of them.
    listed, everything, other = 0, np.full(LIVES, np.float32(0.5)), np.float32(1.0)
    for k in range(reads.rows.shape[0]):
        row = reads.rows[k]
        if reads.sources[k] == INTERESTS_AT and row != 0:
            other -= reads.weights[k]
        if reads.sources[k] == EVERYTHING_AT and row != 0:
            for h, kept in enumerate(decays(max(0, at_s - clicked.at_s[row]))):
                everything[h] += clicked.totals[row, h] * kept
    other = max(other, np.float32(0.0))
    for k in range(reads.rows.shape[0]):
        row = reads.rows[k]
        if reads.sources[k] == EVERYTHING_AT and row != 0:
            for h, kept in enumerate(decays(max(0, at_s - clicked.at_s[row]))):
                scales[0, h] = kept / everything[h]
                scales[1, h] = scales[0, h] * other
            listed = _add_everything(clicked, row, scales, at_s, listed, work)
    counts = _add(clicked, reads, scale, at_s, (listed, 0), work)
    rows, sources, weights = np.empty(3, np.int32), np.empty(3, np.int32), np.ones(3, np.float32)
    rows[0], rows[1], rows[2] = after[0], after[1], user
    sources[0], sources[1], sources[2] = NEWEST_AT, SECOND_AT, OWN_AT
    counts = _add(followed, Reads(rows[:2], sources[:2], weights[:2]), scale, at_s, counts, work)
    first_own = counts[1]
    counts = _add(visited, Reads(rows[2:], sources[2:], weights[2:]), scale, at_s, counts, work)
    # 2. Features.
    _compute(listed, counts[0], counts[1], work)
    clicks, repeats, gap_s, evidence = 0.0, 0.0, 0, 0.0
    if user != 0:
        # At the list's own time, because counts and totals decay alike.
        clicks, repeats = visited.totals[user, LIVES - 1], visited.known[user, LIVES - 1]
        gap_s = max(0, at_s - visited.at_s[user])
    if after[0] != 0:
        evidence = followed.totals[after[0], LIVES - 1] * decays(max(0, at_s - followed.at_s[after[0]]))[2]
    repeat_share, length = (repeats + 0.2) / (clicks + 1.0), np.log(1.0 + clicks) / 3.0
    phi[0], phi[1], phi[2], phi[3] = 1.0, repeat_share - 0.3, length, np.log(1.0 + evidence) / 3.0
    phi[4] = 1.0 if clicks == 0.0 else 0.0
    gap = np.log(1.0 + gap_s / 60.0) / 5.0
    for e in range(first_own, counts[1]):
        at = work.entries[e]
        rank = work.own[at] - 1
        features[SHARES, at] = np.log(1.0 + 1e5 / (3.0 + rank))
        features[SHARES + 1, at] = 1.0
        features[SHARES + 2, at] = np.log(1.0 + rank)
        features[SHARES + 3, at] = repeat_share
        features[SHARES + 4, at] = length
        features[SHARES + 5, at] = gap
    work.size[0] = counts[0]
    return counts[0]


@compiled("f8[:, ::1], f4[::1], i8, Workspace")
def score(weights: F64, phi: F32, count: int, work: Workspace) -> None:
    """Writes the scores of the first `count` candidates; `weights` is `[FEATURES, COLUMNS]`."""
    work.scores[:count] = np.float32(0.0)
    for a in range(FEATURES):
        total = 0.0
        for c in range(COLUMNS):
            total += weights[a, c] * phi[c]
        work.factors[a] = factor = np.float32(total)
        for i in range(count):
            work.scores[i] += factor * work.features[a, i]


def scores_without(source: int, work: Workspace) -> F32:
    """The scores of the candidates without a source, `[n]` float32; -inf for candidates of this source alone."""
    count = int(work.size[0])
    rows = np.arange(source * LIVES, (source + 1) * LIVES)
    others = np.delete(np.arange(SHARES), rows)
    proposed = work.features[others, :count].max(0) > 0.0
    if source == OWN_AT:
        rows = np.concatenate([rows, np.arange(SHARES, AGE_AT)])
    scores = work.scores[:count] - work.factors[rows] @ work.features[rows, :count]
    return np.where(proposed, scores, np.float32(-np.inf))


@compiled("i8, Workspace")
def clear(count: int, work: Workspace) -> None:
    """Empties the index of candidates."""
    for i in range(count):
        work.slots[work.taken[i]] = 0


def likeliest(logits: F32, ids: U64) -> tuple[U64, F32]:
    """The likeliest categories of n users, with their probabilities.

    Args:
        logits: `[n, c]` float32, of the candidate categories; far below all others in a slot without a candidate.
        ids: `[n, c]` uint64, the candidates.

    Returns:
        `[n, INTERESTS]` uint64, in any order, and `[n, INTERESTS]` float32.
    """
    if (lacking := INTERESTS - logits.shape[1]) > 0:
        logits = np.pad(logits, ((0, 0), (0, lacking)), constant_values=-np.inf)
        ids = np.pad(ids, ((0, 0), (0, lacking)))
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    best = np.argpartition(-shares, INTERESTS - 1, 1)[:, :INTERESTS]
    rows = np.arange(len(best))[:, None]
    found = shares[rows, best].astype(np.float32)
    return np.where(found > 0.0, ids[rows, best], np.uint64(0)), found


def sources_of(context_fields: int) -> I32:
    """The sources of the lists of `clicked` that are read for a user, `[r]` int32, see `Reads`."""
    return np.array(
        [
            *[EVERYTHING_AT] * LISTS_OF_EVERYTHING,
            CATEGORY_AT,
            *[INTERESTS_AT] * INTERESTS,
            *[CONTEXT_AT] * context_fields,
        ],
        np.int32,
    )
