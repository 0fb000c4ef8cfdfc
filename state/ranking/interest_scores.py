"""Corrects the model's interests by decayed counts: a log-linear model over categories, learned online.

The table `NEXT_CATEGORY` lists the categories that were clicked next, in the format of `state/ranking/item_lists.py`.
It has lists by the user's newest category, by the user's newest item, and in `EVERYTHING` over all clicks. The
candidates are those of the model, with logits s(c). share(k, c) is the decayed clicks of c in list k, divided by all
decayed clicks of that list:

    features   f(c) = [ s(c) | log(1 + 1000 share(k, c)) for each source k and each of `LIVES_READ` half-lives | OWN ]
    logit      s'(c) = sum over features a and columns p of w[a, p] * f_a(c) * phi_p
    phi        1 | the user's last event is 30 minutes old | 2, 4 of the latest 5 events have the newest category

OWN is 0 for categories that are not among the user's own. The initial w gives s' = s. The trainer learns w by softmax
regression (`trainer/engine/interest_counts.py`), and serving answers with the softmax of s'. Both use `gather` and
`score`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined, layout, part_of_sums
from state.compiled.mixing import mixed
from state.features.spec import FeatureSpec
from state.ranking.item_lists import EVERYTHING, HALF_LIVES_S, ItemLists

U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LIVES_READ = 2
"""The half-lives that are features: 30 minutes and 4 hours."""

SOURCES = 3
"""All clicks, the newest category, the newest item."""

OWN = ("newest", "second", "own", "rank")
"""The features of the user's own categories."""

SHARES = SOURCES * LIVES_READ
FEATURES = 1 + SHARES + len(OWN)
COLUMNS = 4
"""Columns of phi."""

WEIGHTS = "interests.weights"
"""The tensor of w in a version, `[FEATURES, COLUMNS]` float64."""

READ = len(EVERYTHING) + 2
"""Number of lists that are read for a user: over all clicks, of the newest category, and of the newest item."""

MASKED = np.float32(-1e9)
"""The logit of a slot without a candidate."""

_THERE = MASKED / np.float32(2.0)
_ITEMS = np.uint64(0x5BF03635C1E3A1D7)
_SCALE = np.float32(1000.0)
_LN2 = np.float32(np.log(2.0))
_DECAYS = READ * LIVES_READ
_PAUSE = np.uint16(86)
"""30 minutes, in eight steps an octave of 1.024 s."""


def first_weights() -> F64:
    """The weights before any click is learned: the model's logits.

    >>> first_weights().shape, float(first_weights().sum())
    ((11, 4), 1.0)
    """
    weights = np.zeros((FEATURES, COLUMNS))
    weights[0, 0] = 1.0
    return weights


def keys_of_items(items: U64) -> U64:
    """The keys of the lists of items, `[n]` uint64; 0 for item 0.

    Keys are not the ids themselves, because a category may have the same id as an item.
    """
    return np.where(items != 0, mixed(items ^ _ITEMS), np.uint64(0))


class Columns:
    """Computes phi from the features of a spec."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._recency = [spec.names.index(f"{action}.recency") for action in spec.actions]
        self._latest = spec.window_names.index("of_latest_5")

    def phi(self, features: U16, category_windows: U16) -> F32:
        """Phi of n users, `[n, COLUMNS]` float32, from `[n, D]` and `[n, L, F]` uint16."""
        latest = category_windows[:, 0, self._latest]
        pause = features[:, self._recency].min(1) >= _PAUSE
        phi = np.ones((len(features), COLUMNS), np.float32)
        phi[:, 1], phi[:, 2], phi[:, 3] = pause, latest >= 2, latest >= 4
        return phi


@layout("i4[::1], i4[::1], f4[:, ::1], i4[:, ::1], f4[:, ::1], f4[::1], i4[::1], f4[::1], f4[::1], f4[::1]")
class Workspace(NamedTuple):
    """The features of the M candidate slots of one user; reused for each user.

    Attributes:
        slots: `[k]` int32, an open-addressing index of the candidates: 1 + slot, 0 for none; k is a power of two above
            2 M.
        taken: `[M]` int32, the indices of `slots` in use.
        shares: `[SHARES, M]` float32, 1 + 1000 share.
        bits: `shares` viewed as int32.
        features: `[FEATURES, M]` float32.
        decays: `[_DECAYS]` float32.
        decay_bits: `[_DECAYS]` int32.
        totals: `[LIVES_READ]` float32.
        ranks: `[M]` float32, log(1 + slot) / 3.
        scores: `[M]` float32.
    """

    slots: I32
    taken: I32
    shares: F32
    bits: I32
    features: F32
    decays: F32
    decay_bits: I32
    totals: F32
    ranks: F32
    scores: F32

    @classmethod
    def empty(cls, candidates: int) -> Workspace:
        """A new workspace for M slots."""
        shares = np.empty((SHARES, candidates), np.float32)
        return cls(
            np.zeros(2 << candidates.bit_length(), np.int32),
            np.zeros(candidates, np.int32),
            shares,
            shares.view(np.int32),
            np.zeros((FEATURES, candidates), np.float32),
            np.zeros(_DECAYS, np.float32),
            np.zeros(_DECAYS, np.int32),
            np.zeros(LIVES_READ, np.float32),
            (np.log1p(np.arange(candidates)) / 3).astype(np.float32),
            np.zeros(candidates, np.float32),
        )


@part_of_sums
def _halved(decays: F32, bits: I32, scale: F32) -> None:
    """Replaces each x in [0, 126] by 2 ** -x. `scale` is `bits` viewed as float32."""
    for k in range(decays.shape[0]):
        whole = np.floor(decays[k])
        y = (whole - decays[k]) * _LN2
        bits[k] = (np.int32(127) - np.int32(whole)) << np.int32(23)
        # The Taylor series: the error is below 2e-6 for y in (-0.7, 0].
        poly = np.float32(1.0)
        for n in (7, 6, 5, 4, 3, 2, 1):
            poly = np.float32(1.0) + poly * y * np.float32(1.0 / n)
        decays[k] = poly
    for k in range(decays.shape[0]):
        decays[k] *= scale[k]


@part_of_sums
def _logarithms(values: F32, bits: I32, out: F32, first: int) -> None:
    """Writes the logarithms of `values`, `[a, M]` and at least 1, to the rows of `out` from `first` on."""
    for a in range(values.shape[0]):
        # In two loops, because `bits` is a view of `values`.
        for j in range(values.shape[1]):
            exponent = (bits[a, j] >> np.int32(23)) - np.int32(127)
            out[first + a, j] = np.float32(exponent) * _LN2
            bits[a, j] -= exponent << np.int32(23)
        for j in range(values.shape[1]):
            # log m = 2 artanh t for m in [1, 2); the error of the series is below 2e-6.
            t = (values[a, j] - np.float32(1.0)) / (values[a, j] + np.float32(1.0))
            u = t * t
            series = np.float32(1 / 3) + u * (np.float32(1 / 5) + u * (np.float32(1 / 7) + u * np.float32(1 / 9)))
            out[first + a, j] += np.float32(2.0) * t * (np.float32(1.0) + u * series)


@inlined
def _place(category: np.uint64, ids: U64, slots: I32) -> int:
    """The position of a category in the index of candidates, or the empty position where it belongs."""
    last = np.uint64(slots.shape[0] - 1)
    at = category & last
    while slots[at] != 0 and ids[slots[at] - 1] != category:
        at = (at + np.uint64(1)) & last
    return int(at)


@inlined
def _add(lists: ItemLists, row: int, source: int, first: int, totals: F32, ids: U64, work: Workspace) -> None:
    """Adds the shares of a list, whose decays begin at `first`; `totals`, `[LIVES_READ]`, are the list's clicks."""
    for k in range(lists.ids.shape[1]):
        category = lists.ids[row, k]
        if category == np.uint64(0):
            break
        slot = work.slots[_place(category, ids, work.slots)] - 1
        if slot >= 0:
            for h in range(LIVES_READ):
                share = lists.counts[row, k, h] * work.decays[first + h] / (totals[h] + np.float32(0.5))
                work.shares[source * LIVES_READ + h, slot] = np.float32(1.0) + _SCALE * share


@compiled("ItemLists, i4[::1], i8, u8[::1], f4[::1], i8, Workspace")
def gather(lists: ItemLists, rows: I32, at_s: int, ids: U64, logits: F32, own: int, work: Workspace) -> None:
    """Writes the features of one user's candidates.

    Args:
        lists: `NEXT_CATEGORY`.
        rows: `[READ]` int32, the lists to read; 0 for none.
        at_s: The time, in seconds.
        ids: `[M]` uint64, the candidates: the user's own, newest first, then others.
        logits: `[M]` float32, the model's; `MASKED` in a slot without a candidate.
        own: The number of slots of the user's own categories.
        work: Its features are replaced.
    """
    used = 0
    for j in range(ids.shape[0]):
        if logits[j] > _THERE:
            at = _place(ids[j], ids, work.slots)
            work.slots[at] = j + 1
            work.taken[used] = at
            used += 1
    for a in range(SHARES):
        for j in range(ids.shape[0]):
            work.shares[a, j] = np.float32(1.0)
    for k in range(READ):
        elapsed_s = max(0, at_s - lists.at_s[rows[k]])
        for h in range(LIVES_READ):
            work.decays[k * LIVES_READ + h] = min(np.float32(elapsed_s / HALF_LIVES_S[h]), np.float32(126.0))
    _halved(work.decays, work.decay_bits, work.decay_bits.view(np.float32))
    totals = work.totals
    totals[:] = np.float32(0.0)
    for k in range(READ - 2):
        for h in range(LIVES_READ):
            totals[h] += lists.totals[rows[k], h] * work.decays[k * LIVES_READ + h]
    for k in range(READ):
        source = max(0, k - READ + 3)
        if source:
            for h in range(LIVES_READ):
                totals[h] = lists.totals[rows[k], h] * work.decays[k * LIVES_READ + h]
        if rows[k] != 0:
            _add(lists, rows[k], source, k * LIVES_READ, totals, ids, work)
    for k in range(used):
        work.slots[work.taken[k]] = 0
    _logarithms(work.shares, work.bits, work.features, 1)
    first = 1 + SHARES
    for j in range(ids.shape[0]):
        there = logits[j] > _THERE
        mine = there and j < own
        work.features[0, j] = logits[j] if there else np.float32(0.0)
        work.features[first, j] = np.float32(1.0) if mine and j == 0 else np.float32(0.0)
        work.features[first + 1, j] = np.float32(1.0) if mine and j == 1 else np.float32(0.0)
        work.features[first + 2, j] = np.float32(1.0) if mine else np.float32(0.0)
        work.features[first + 3, j] = work.ranks[j] if mine else np.float32(0.0)


@compiled("f8[:, ::1], f4[::1], f4[::1], Workspace")
def score(weights: F64, phi: F32, logits: F32, work: Workspace) -> None:
    """Writes the logits s' of the slots to `work.scores`; `logits`: `[M]` float32, the model's."""
    work.scores[:] = np.float32(0.0)
    for a in range(FEATURES):
        mixed_weight = 0.0
        for p in range(COLUMNS):
            mixed_weight += weights[a, p] * phi[p]
        factor = np.float32(mixed_weight)
        for j in range(logits.shape[0]):
            work.scores[j] += factor * work.features[a, j]
    for j in range(logits.shape[0]):
        work.scores[j] = work.scores[j] if logits[j] > _THERE else MASKED


@compiled("ItemLists, i4[:, ::1], i8[::1], u8[:, ::1], f4[:, ::1], i8, f8[:, ::1], f4[:, ::1], Workspace")
def correct(
    lists: ItemLists,
    rows: I32,
    at_s: I64,
    ids: U64,
    logits: F32,
    own: int,
    weights: F64,
    phi: F32,
    work: Workspace,
) -> None:
    """Replaces the logits of n users by s'; see `gather` and `score`.

    Args:
        lists: `NEXT_CATEGORY`.
        rows: `[n, READ]` int32.
        at_s: `[n]` int64.
        ids: `[n, M]` uint64.
        logits: `[n, M]` float32, changed in place.
        own: The number of slots of the user's own categories.
        weights: `[FEATURES, COLUMNS]` float64.
        phi: `[n, COLUMNS]` float32.
        work: For M slots.
    """
    for i in range(ids.shape[0]):
        gather(lists, rows[i], at_s[i], ids[i], logits[i], own, work)
        score(weights, phi[i], logits[i], work)
        logits[i] = work.scores
