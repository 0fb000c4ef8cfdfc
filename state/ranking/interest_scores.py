"""Corrects the model's interests by decayed counts: a log-linear model over categories, learned online.

The table `NEXT_CATEGORY` lists the categories that were clicked next, in the format of `state/ranking/item_lists.py`.
It has lists by the user's newest category, by the user's newest item, and in `EVERYTHING` over all clicks. The
candidates are those of the model, with logits s(c). share(k, c) is the decayed clicks of c in list k, divided by all
decayed clicks of that list:

    features   f(c) = [ s(c) | log(1 + 1000 share(k, c)) for each source k and each half-life of `LIVES_USED` | OWN ]
    logit      s'(c) = sum over features a and columns p of w[a, p] * f_a(c) * phi_p
    phi        1 | recency of the user's last event / 128 | 2, 4 of the latest 5 events have the newest category

OWN is 0 for categories that are not among the user's own. The initial w gives s' = s. The trainer learns w by softmax
regression (`trainer/engine/interest_counts.py`), and serving answers with the softmax of s'. Both use `gather` and
`score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, layout, logarithms, mix, part_of_sums, read_only
from state.features.arrays import NEVER
from state.features.spec import FeatureSpec
from state.ranking.item_lists import ENTRIES, LISTS_OF_EVERYTHING, NEXT_CATEGORY, ItemLists, decays

U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
I16 = NDArray[np.int16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LIVES_USED = (0, 2)
"""The half-lives that are features: 30 minutes and 36 hours."""

LIVES_READ = len(LIVES_USED)
"""Their number."""

SOURCES = 3
"""All clicks, the newest category, the newest item."""

OWN = ("newest", "second", "own", "rank")
"""The features of the user's own categories."""

FIRST_OWN = 1 + SOURCES * LIVES_READ
FEATURES = FIRST_OWN + len(OWN)
COLUMNS = 4
"""Columns of phi."""

WEIGHTS = "interests.weights"
"""The tensor of w in a version, `[FEATURES, COLUMNS]` float64."""

READ = SOURCES - 1
"""Number of lists that are read for a user besides those over all clicks: of the newest category and the newest item."""

MASKED = np.float32(-1e9)
"""The logit of a slot without a candidate."""

_THERE = MASKED / np.float32(2.0)
_ITEMS = np.uint64(0x5BF03635C1E3A1D7)
_SCALE = np.float32(1000.0)
_LISTED = ENTRIES[NEXT_CATEGORY]
COUNTED = LISTS_OF_EVERYTHING * _LISTED
_PLACES, _MARKS = 16 * COUNTED, 4096
"""Powers of two."""
FIRST_HIT = 1 + COUNTED
"""The column of `Workspace.logs` from which on it has the features of `hits`."""
_LAST_PLACE, _LAST_MARK = np.uint64(_PLACES - 1), np.uint64(_MARKS - 1)
_RECENCY_SCALE = np.float32(1.0 / 128.0)
"""Of a recency in phi. It has eight steps per octave of time: 69 after 30 minutes, 114 after a day, 255 without events."""


def first_weights() -> F64:
    """The weights before any click is learned: the model's logits.

    >>> first_weights().shape, float(first_weights().sum())
    ((11, 4), 1.0)
    """
    weights = np.zeros((FEATURES, COLUMNS))
    weights[0, 0] = 1.0
    return weights


@compiled("u8")
def key_of_item(item: np.uint64) -> np.uint64:
    """The key of an item's list; 0 for item 0. A category may have the same id as an item."""
    return mix(item ^ _ITEMS) if item != np.uint64(0) else np.uint64(0)


@layout("i8[::1], i8")
class ColumnInputs(NamedTuple):
    """The features that phi is computed from.

    Attributes:
        recency: `[A]` int64, columns of the features: the time since the last event of each action.
        latest: The window of a category that counts the latest 5 events.
    """

    recency: I64
    latest: int


@compiled("const(u2[:, ::1]), const(u2[:, :, ::1]), ColumnInputs, f4[:, ::1]")
def write_phi(features: U16, category_windows: U16, inputs: ColumnInputs, phi: F32) -> None:
    """Writes phi of n users, `[n, COLUMNS]` float32, from `[n, D]` and `[n, L, F]` uint16."""
    for i in range(phi.shape[0]):
        recency = NEVER
        for column in inputs.recency:
            recency = min(recency, int(features[i, column]))
        same = category_windows[i, 0, inputs.latest]
        phi[i, 0], phi[i, 1] = np.float32(1.0), np.float32(recency) * _RECENCY_SCALE
        phi[i, 2], phi[i, 3] = np.float32(same >= 2), np.float32(same >= 4)


class Columns:
    """Computes phi from the features of a spec.

    Attributes:
        inputs: For kernels that call `write_phi`.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        recency = np.array([spec.names.index(f"{action}.recency") for action in spec.actions])
        self.inputs = ColumnInputs(recency, spec.window_names.index("of_latest_5"))

    def phi(self, features: U16, category_windows: U16) -> F32:
        """Phi of n users, `[n, COLUMNS]` float32, from `[n, D]` and `[n, L, F]` uint16."""
        phi = np.empty((len(features), COLUMNS), np.float32)
        write_phi(read_only(features), read_only(category_windows), self.inputs, phi)
        return phi


@layout(
    "i2[::1], u8[::1], f4[:, ::1], u8[::1], i2[::1], f4[:, ::1], f4[::1], f4[:, ::1], i4[:, ::1], i4[::1], f4[::1], f4[::1], "
    "i8[::1]"
)
class Workspace(NamedTuple):
    """The features of the M candidate slots of one user; reused for each user.

    Attributes:
        places: `[_PLACES]` int16, an open-addressing index of the categories in the lists over all clicks, numbered from 1.
        counted: `[1 + COUNTED]` uint64, these categories.
        logs: `[LIVES_READ, 1 + COUNTED + READ * E]` float32: 0, the features of these categories, those of `hits`.
        candidates: `[M]` uint64, 0 in a slot without a candidate.
        marks: `[_MARKS]` int16, 1 + a slot with such low bits of its category; zeros after `gather`.
        features: `[5, M]` float32: s, the features by all clicks, 1 and log(1 + slot) / 3 in the user's own slots.
        scores: `[M]` float32, s'.
        values: `[LIVES_READ, 1 + COUNTED]` float32, 1 + 1000 share.
        bits: `values` viewed as int32.
        hits: `[READ * E]` int32, slots of the candidates in the lists of the user.
        factors: `[FEATURES]` float32, w phi.
        decays: `[LIVES_READ]` float32.
        at_s: `[1]` int64, the time of the features by all clicks; -1 before they are computed.
    """

    places: I16
    counted: U64
    logs: F32
    candidates: U64
    marks: I16
    features: F32
    scores: F32
    values: F32
    bits: I32
    hits: I32
    factors: F32
    decays: F32
    at_s: I64

    @classmethod
    def empty(cls, candidates: int, own: int) -> Workspace:
        """A new workspace for M slots, the first of which are for the user's own categories."""
        features, values = np.zeros((5, candidates), np.float32), np.ones((LIVES_READ, 1 + COUNTED), np.float32)
        features[3, :own], features[4, :own] = 1.0, np.log1p(np.arange(own)) / 3
        return cls(
            np.zeros(_PLACES, np.int16),
            np.zeros(1 + COUNTED, np.uint64),
            np.zeros((LIVES_READ, FIRST_HIT + READ * _LISTED), np.float32),
            np.zeros(candidates, np.uint64),
            np.zeros(_MARKS, np.int16),
            features,
            np.zeros(candidates, np.float32),
            values,
            values.view(np.int32),
            np.zeros(READ * _LISTED, np.int32),
            np.zeros(FEATURES, np.float32),
            np.zeros(LIVES_READ, np.float32),
            np.full(1, -1),
        )


@part_of_sums
def _decays(lists: ItemLists, row: int, at_s: int, factors: F32) -> None:
    """Writes by what the counts of a list are decayed at a time."""
    factors[0], _, factors[1] = decays(max(0, at_s - lists.at_s[row]))


@part_of_sums
def _place(category: np.uint64, work: Workspace) -> np.uint64:
    """The place of a category in the index, or the empty one where it belongs."""
    at = category & _LAST_PLACE
    while work.places[at] != 0 and work.counted[work.places[at]] != category:
        at = (at + np.uint64(1)) & _LAST_PLACE
    return at


@part_of_sums
def gather_everything(lists: ItemLists, rows: I32, at_s: int, work: Workspace) -> None:
    """Computes the features by all clicks, for the calls of `gather` that follow.

    Args:
        lists: `NEXT_CATEGORY`.
        rows: `[LISTS_OF_EVERYTHING]` int32, the lists; 0 for none.
        at_s: The time, in seconds.
        work: Changed.
    """
    work.at_s[0] = at_s
    work.places[:] = 0
    totals, count = work.factors, 1
    for h in range(LIVES_READ):
        totals[h] = np.float32(0.5)
    for row in rows:
        _decays(lists, row, at_s, work.decays)
        for h in range(LIVES_READ):
            totals[h] += lists.totals[row, LIVES_USED[h]] * work.decays[h]
        for k in range(_LISTED):
            category = lists.ids[row, k]
            if category == np.uint64(0):
                break
            work.places[_place(category, work)] = count
            work.counted[count] = category
            for h in range(LIVES_READ):
                work.values[h, count] = lists.counts[row, LIVES_USED[h], k] * work.decays[h]
            count += 1
    for h in range(LIVES_READ):
        work.values[h, 0] = np.float32(1.0)
        for k in range(1, count):
            work.values[h, k] = np.float32(1.0) + work.values[h, k] * (_SCALE / totals[h])
    logarithms(work.values, work.bits, work.logs, count, 0)


@part_of_sums
def take_candidate(j: int, category: np.uint64, logit: np.float32, work: Workspace) -> None:
    """Sets a slot: the category, its features by all clicks, and the model's logit, `MASKED` in a slot without a candidate."""
    there, slot = logit > _THERE, np.uint64(j)
    category = category if there else np.uint64(0)
    work.candidates[slot] = category
    work.features[0, slot] = logit if there else np.float32(0.0)
    work.marks[category & _LAST_MARK] = j + 1
    _take_all_clicks(slot, category, work)


@part_of_sums
def _take_all_clicks(slot: np.uint64, category: np.uint64, work: Workspace) -> None:
    """Writes a slot's features by all clicks. It has few branches, because categories are random."""
    number = work.places[category & _LAST_PLACE]
    if (number != 0) & (work.counted[number] != category):
        number = work.places[_place(category, work)]
    for h in range(LIVES_READ):
        work.features[1 + h, slot] = work.logs[h, number]


@part_of_sums
def place_popular(first: int, popular: U64, work: Workspace) -> None:
    """Computes the features by all clicks of the popular categories once, for `take_popular`; `first` is their first slot."""
    for j in range(popular.shape[0]):
        _take_all_clicks(np.uint64(first + j), popular[j], work)


@part_of_sums
def take_popular(first: int, popular: U64, logits: F32, i: int, work: Workspace) -> None:
    """Sets the slots of the popular categories, with the logits of row i, before `take_candidate` sets the other slots."""
    candidates, features = work.candidates[first:], work.features[0, first:]
    for j in range(popular.shape[0]):
        there = logits[i, j] > _THERE
        candidates[j] = popular[j] if there else np.uint64(0)
        features[j] = logits[i, j] if there else np.float32(0.0)
    for j in range(popular.shape[0]):
        work.marks[candidates[j] & _LAST_MARK] = first + j + 1


@part_of_sums
def gather(lists: ItemLists, rows: I32, at_s: int, i: int, work: Workspace) -> tuple[int, int]:
    """Computes the features of a user's candidates by the user's lists.

    Args:
        lists: `NEXT_CATEGORY`.
        rows: `[n, READ]` int32, the users' lists; 0 for none.
        at_s: The time, in seconds.
        i: The user.
        work: Changed.

    Returns:
        The number of `hits` in the first list, and in both.
    """
    first, count = 0, 0
    for source in range(READ):
        row = rows[i, source]
        if row != 0:
            _decays(lists, row, at_s, work.decays)
            for h in range(LIVES_READ):
                work.decays[h] *= _SCALE / (lists.totals[row, LIVES_USED[h]] * work.decays[h] + np.float32(0.5))
            for k in range(_LISTED):
                category = lists.ids[row, k]
                if category == np.uint64(0):
                    break
                slot = np.int64(work.marks[category & _LAST_MARK]) - 1
                if slot >= 0 and work.candidates[slot] != category:
                    # Another slot may have the same low bits.
                    slot = work.candidates.shape[0] - 1
                    while slot >= 0 and work.candidates[slot] != category:
                        slot -= 1
                # Overwritten by the next one if this is no candidate.
                work.hits[count] = slot
                for h in range(LIVES_READ):
                    work.values[h, count] = np.float32(1.0) + lists.counts[row, LIVES_USED[h], k] * work.decays[h]
                count += int(slot >= 0)
        if source == 0:
            first = count
    for category in work.candidates:
        work.marks[category & _LAST_MARK] = 0
    return first, count


@part_of_sums
def score(weights: F64, phi: F32, i: int, hits: tuple[int, int], work: Workspace) -> None:
    """Writes the logits s' of user i to `scores`, after `gather`, which returned `hits`; `phi`: `[n, COLUMNS]` float32."""
    logarithms(work.values, work.bits, work.logs, hits[1], FIRST_HIT)
    factors, features, scores = work.factors, work.features, work.scores
    for a in range(FEATURES):
        total = 0.0
        for p in range(COLUMNS):
            total += weights[a, p] * phi[i, p]
        factors[a] = np.float32(total)
    model, short, long = factors[0], factors[1], factors[2]
    own, rank = factors[FIRST_OWN + 2], factors[FIRST_OWN + 3]
    for j in range(scores.shape[0]):
        scores[j] = model * features[0, j] + short * features[1, j] + long * features[2, j]
    for j in range(scores.shape[0]):
        scores[j] += own * features[3, j] + rank * features[4, j]
    for j in range(2):
        scores[j] += factors[FIRST_OWN + j] * features[3, j]
    for k in range(hits[1]):
        first = 1 + LIVES_READ if k < hits[0] else 1 + 2 * LIVES_READ
        for h in range(LIVES_READ):
            scores[work.hits[k]] += factors[first + h] * work.logs[h, FIRST_HIT + k]
    for j in range(scores.shape[0]):
        scores[j] = scores[j] if work.candidates[j] != np.uint64(0) else MASKED


@compiled("ItemLists, i4[::1], i4[:, ::1], i8[::1], u8[:, ::1], f4[:, ::1], f8[:, ::1], f4[:, ::1], Workspace")
def correct(
    lists: ItemLists,
    everything: I32,
    rows: I32,
    at_s: I64,
    ids: U64,
    logits: F32,
    weights: F64,
    phi: F32,
    work: Workspace,
) -> None:
    """Replaces the logits of n users by s'.

    Args:
        lists: `NEXT_CATEGORY`.
        everything: `[LISTS_OF_EVERYTHING]` int32, the lists over all clicks; 0 for none.
        rows: `[n, READ]` int32, the lists of the users.
        at_s: `[n]` int64.
        ids: `[n, M]` uint64.
        logits: `[n, M]` float32, changed in place.
        weights: `[FEATURES, COLUMNS]` float64.
        phi: `[n, COLUMNS]` float32.
        work: For M slots.
    """
    for i in range(ids.shape[0]):
        if i == 0 or at_s[i] != at_s[i - 1]:
            gather_everything(lists, everything, at_s[i], work)
        for j in range(ids.shape[1]):
            take_candidate(j, ids[i, j], logits[i, j], work)
        score(weights, phi, i, gather(lists, rows, at_s[i], i, work), work)
        for j in range(ids.shape[1]):
            logits[i, j] = work.scores[j]
