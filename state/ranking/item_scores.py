"""Scores items for a user: a log-linear model over the shares of items in lists, learned online by softmax regression.

The candidates of a user are the items in the lists of `SOURCES` (`state/ranking/item_lists.py`). share(k, i) is the
decayed clicks of item i in list k, divided by all decayed clicks of that list, at half-life h:

    features   f(i) = [ log(share(k, i) + 1e-5) + 11.5 for each source and half-life
                        | OWN of the user's own items, else 0
                        | log(1 + minutes since the item was listed) / 5 ]
    score      s(i) = sum over features a and columns c of w[a, c] * f_a(i) * phi_c
    phi(u)     1 | share of repeats - 0.3 | log(1 + clicks) / 3 | log(1 + clicks after the newest item) / 3
    p(i)       softmax of s over the candidates

A source with several lists, such as the categories of a user's interests, has the sum of their weighted shares. The
trainer learns w from the clicked items, and serving ranks by s. Both use `gather` and `score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, layout
from state.compiled.mixing import mix
from state.ranking.item_lists import HALF_LIVES_S, LISTS_OF_EVERYTHING, LIVES, ItemLists

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
COLUMNS = 4
"""Columns of phi."""

INTERESTS = 8
"""The likeliest categories, whose lists are read."""

MOST = 2048
"""The maximum number of candidates of a user."""

WEIGHTS = "recommend.weights"
"""The tensor of w in a version, `[FEATURES, COLUMNS]` float64."""

_SLOTS = 2 * MOST
_EPS, _SHIFT = np.float32(1e-5), np.float32(11.5)
_NO_SHARE = np.float32(np.log(_EPS) + _SHIFT)


def first_weights() -> F64:
    """The weights before any click is learned: each share counts the same.

    >>> first_weights().shape, float(first_weights()[:SHARES, 0].sum().round(2))
    ((28, 4), 3.15)
    """
    weights = np.zeros((FEATURES, COLUMNS))
    weights[:SHARES, 0] = 0.15
    return weights


@layout("u8[::1], i4[::1], i4[::1], f4[:, ::1], f4[:, ::1], i4[::1], f4[::1], f4[::1]")
class Workspace(NamedTuple):
    """Candidates of one user, and their features; reused for each user.

    Attributes:
        items: `[MOST]` uint64, the candidates, in the order of the lists.
        slots: `[2 MOST]` int32, an open-addressing index of the candidates: 1 + index, 0 for none.
        taken: `[MOST]` int32, the slots in use.
        shares: `[MOST, SHARES]` float32.
        features: `[MOST, FEATURES]` float32.
        own: `[MOST]` int32, 1 + the rank among the user's own items; 0 for others.
        ages: `[MOST]` float32, the largest age in the lists, in seconds.
        scores: `[MOST]` float32.
    """

    items: U64
    slots: I32
    taken: I32
    shares: F32
    features: F32
    own: I32
    ages: F32
    scores: F32

    @classmethod
    def empty(cls) -> Workspace:
        """A new workspace."""
        return cls(
            np.zeros(MOST, np.uint64),
            np.zeros(_SLOTS, np.int32),
            np.zeros(MOST, np.int32),
            np.zeros((MOST, SHARES), np.float32),
            np.zeros((MOST, FEATURES), np.float32),
            np.zeros(MOST, np.int32),
            np.zeros(MOST, np.float32),
            np.zeros(MOST, np.float32),
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


@compiled
def _find(item: np.uint64, count: int, work: Workspace) -> int:
    """The index of a candidate, which is added if it is new; -1 if there is no space."""
    mask = np.uint64(work.slots.shape[0] - 1)
    slot = mix(item) & mask
    while work.slots[slot] != 0:
        at = work.slots[slot] - 1
        if work.items[at] == item:
            return int(at)
        slot = (slot + np.uint64(1)) & mask
    if count >= work.items.shape[0]:
        return -1
    work.slots[slot] = count + 1
    work.taken[count] = slot
    work.items[count] = item
    work.own[count], work.ages[count] = 0, np.float32(0.0)
    for a in range(SHARES):
        work.shares[count, a] = 0.0
    return count


@compiled
def _add(
    lists: ItemLists, row: int, source: int, weight: float, totals: F32, at_s: int, count: int, work: Workspace
) -> int:
    """Adds the items of a list; returns the number of candidates. `totals`, `[H]`, are the list's clicks."""
    elapsed_s = max(0, at_s - lists.at_s[row])
    scale = np.empty(LIVES, np.float32)
    for h in range(LIVES):
        scale[h] = np.float32(weight * 2.0 ** (-elapsed_s / HALF_LIVES_S[h]) / (totals[h] + 0.5))
    for k in range(lists.ids.shape[1]):
        item = lists.ids[row, k]
        if item == np.uint64(0):
            break
        at = _find(item, count, work)
        if at < 0:
            continue
        if at == count:
            count += 1
        for h in range(LIVES):
            work.shares[at, source * LIVES + h] += lists.counts[row, k, h] * scale[h]
        work.ages[at] = max(work.ages[at], lists.ages[row, k] + np.float32(elapsed_s))
        if source == OWN_AT:
            work.own[at] = k + 1
    return count


@compiled
def _total(lists: ItemLists, row: int, at_s: int, totals: F32) -> None:
    """Adds a list's totals, decayed to a time."""
    elapsed_s = max(0, at_s - lists.at_s[row])
    for h in range(LIVES):
        totals[h] += np.float32(lists.totals[row, h] * 2.0 ** (-elapsed_s / HALF_LIVES_S[h]))


@compiled("ItemLists, ItemLists, ItemLists, Reads, i4[::1], i4, i8, f4[::1], Workspace")
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
    count = 0
    totals, everything = np.zeros(LIVES, np.float32), np.zeros(LIVES, np.float32)
    for k in range(reads.rows.shape[0]):
        if reads.sources[k] == EVERYTHING_AT and reads.rows[k] != 0:
            _total(clicked, reads.rows[k], at_s, everything)
    for k in range(reads.rows.shape[0]):
        row = reads.rows[k]
        if row == 0:
            continue
        if reads.sources[k] == EVERYTHING_AT:
            count = _add(clicked, row, EVERYTHING_AT, 1.0, everything, at_s, count, work)
        else:
            totals[:] = 0.0
            _total(clicked, row, at_s, totals)
            count = _add(clicked, row, reads.sources[k], reads.weights[k], totals, at_s, count, work)
    evidence = 0.0
    for k in range(2):
        if after[k] != 0:
            totals[:] = 0.0
            _total(followed, after[k], at_s, totals)
            if k == 0:
                evidence = totals[LIVES - 1]
            count = _add(followed, after[k], NEWEST_AT + k, 1.0, totals, at_s, count, work)
    clicks, repeats, gap_s = 0.0, 0.0, 0
    if user != 0:
        totals[:] = 0.0
        _total(visited, user, at_s, totals)
        count = _add(visited, user, OWN_AT, 1.0, totals, at_s, count, work)
        # At the list's own time, because counts and totals decay alike.
        clicks, repeats = visited.totals[user, LIVES - 1], visited.known[user, LIVES - 1]
        gap_s = max(0, at_s - visited.at_s[user])
    repeat_share, length = (repeats + 0.2) / (clicks + 1.0), np.log(1.0 + clicks) / 3.0
    phi[0], phi[1], phi[2], phi[3] = 1.0, repeat_share - 0.3, length, np.log(1.0 + evidence) / 3.0
    gap = np.log(1.0 + gap_s / 60.0) / 5.0
    for i in range(count):
        for a in range(SHARES):
            share = work.shares[i, a]
            # Most shares are 0.
            work.features[i, a] = np.log(share + _EPS) + _SHIFT if share > 0.0 else _NO_SHARE
        own = work.own[i] > 0
        rank = work.own[i] - 1
        work.features[i, SHARES] = np.log(np.float32(1.0 / (3.0 + rank)) + _EPS) + _SHIFT if own else 0.0
        work.features[i, SHARES + 1] = 1.0 if own else 0.0
        work.features[i, SHARES + 2] = np.log(1.0 + rank) if own else 0.0
        work.features[i, SHARES + 3] = repeat_share if own else 0.0
        work.features[i, SHARES + 4] = length if own else 0.0
        work.features[i, SHARES + 5] = gap if own else 0.0
        work.features[i, AGE_AT] = np.log(np.float32(1.0) + work.ages[i] / np.float32(60.0)) / np.float32(5.0)
    return count


@compiled("f8[:, ::1], f4[::1], i8, Workspace")
def score(weights: F64, phi: F32, count: int, work: Workspace) -> None:
    """Writes the scores of the first `count` candidates."""
    mixed = np.zeros(FEATURES, np.float32)
    for a in range(FEATURES):
        total = 0.0
        for c in range(COLUMNS):
            total += weights[a, c] * phi[c]
        mixed[a] = total
    for i in range(count):
        found = np.float32(0.0)
        for a in range(FEATURES):
            found += mixed[a] * work.features[i, a]
        work.scores[i] = found


@compiled("i8, Workspace")
def clear(count: int, work: Workspace) -> None:
    """Empties the index of candidates."""
    for i in range(count):
        work.slots[work.taken[i]] = 0


@compiled("u8, i8, f4[::1], f8, f8[:, ::1], f8[:, ::1], Workspace")
def learn(item: np.uint64, count: int, phi: F32, rate: float, weights: F64, squares: F64, work: Workspace) -> bool:
    """One step of softmax regression towards the clicked item, with Adagrad; False if the item is not a candidate.

    Args:
        item: The clicked item.
        count: Number of candidates; their scores are already computed.
        phi: `[COLUMNS]` float32.
        rate: The learning rate.
        weights: `[FEATURES, COLUMNS]` float64, changed in place.
        squares: The sums of squared gradients, changed in place.
        work: The candidates.
    """
    clicked, highest = -1, np.float32(-1e30)
    for i in range(count):
        if work.items[i] == item:
            clicked = i
        highest = max(highest, work.scores[i])
    if clicked < 0:
        return False
    expected, total = np.zeros(FEATURES), 0.0
    for i in range(count):
        probability = np.exp(work.scores[i] - highest)
        total += probability
        for a in range(FEATURES):
            expected[a] += probability * work.features[i, a]
    for a in range(FEATURES):
        difference = work.features[clicked, a] - expected[a] / total
        for c in range(COLUMNS):
            gradient = difference * phi[c]
            if gradient != 0.0:
                squares[a, c] += gradient * gradient
                weights[a, c] += rate * gradient / np.sqrt(squares[a, c] + 1e-3)
    return True


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
