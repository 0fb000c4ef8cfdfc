"""Interests of a version: the model's logits, corrected by decayed counts (`state/ranking/interest_scores.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.version import LoadedVersion, VersionRows
from state.compiled import compiled
from state.features.arrays import Vector
from state.features.mask import Mask
from state.features.spec import LABELLED, POSITIVE, Events
from state.ranking.interest_scores import (
    COLUMNS,
    MASKED,
    READ,
    ColumnInputs,
    Workspace,
    gather,
    gather_everything,
    key_of_item,
    score,
    take_candidate,
    write_phi,
)
from state.ranking.item_lists import EVERYTHING, LISTS_OF_EVERYTHING, ItemLists

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
F64 = NDArray[np.float64]
_LABEL = LABELLED | POSITIVE
_EVERY = (0, *EVERYTHING.tolist())
_THERE = MASKED / np.float32(2.0)
_NOTHING_HIDDEN = np.zeros(0, np.bool_)


class Correction(NamedTuple):
    """The correction of the logits of n queries: `factor` times the logit plus `offset`.

    Attributes:
        factor: `[n, 1]` float32.
        offset: `[n, M]` float32.
    """

    factor: F32
    offset: F32

    def apply(self, logits: F32) -> F32:
        """Returns corrected logits, `[n, M]` float32; masked ones stay masked."""
        corrected = np.empty_like(logits)
        _apply(logits, self.factor, self.offset, corrected)
        return corrected


@compiled("f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1]", "f4[:, ::1], f4[:, :], f4[:, :], f4[:, ::1]")
def _apply(logits: F32, factor: F32, offset: F32, corrected: F32) -> None:
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            logit = logits[i, j]
            corrected[i, j] = factor[i, 0] * logit + offset[i, j] if logit > _THERE else logit


def newest_key(events: Events, at_ms: int, mask: Mask, user: int) -> int:
    """Returns the key of the list of a user's latest visible item up to `at_ms`; 0 without a click on one.

    `events` are in append order.
    """
    hidden = mask.events(events, user) if mask else _NOTHING_HIDDEN
    return int(_newest_key(events["at_ms"], events["item"], events["flags"], hidden, at_ms))


@compiled(
    "const(i8[:]), const(u8[:]), const(u1[:]), bool[::1], i8",
    "const(i8[::1]), const(u8[::1]), const(u1[::1]), bool[::1], i8",
)
def _newest_key(
    at_ms: I64, items: U64, flags: NDArray[np.uint8], hidden: NDArray[np.bool_], until_ms: int
) -> np.uint64:
    newest_ms, newest = np.int64(-1), np.uint64(0)
    for i in range(at_ms.shape[0]):
        is_click = items[i] != 0 and flags[i] & _LABEL != LABELLED
        if is_click and newest_ms <= at_ms[i] <= until_ms and (hidden.shape[0] == 0 or not hidden[i]):
            newest_ms, newest = at_ms[i], items[i]
    return key_of_item(newest)


def correction_of(
    version: LoadedVersion,
    rows: VersionRows,
    vectors: Vector,
    successors: U64,
    newest_keys: Sequence[int],
    at_ms: Sequence[int],
) -> Correction:
    """Returns the correction for n queries; the version must have one.

    `successors` is `[n, S]` uint64, with S = 0 for a program without successors. `newest_keys` are the users' keys from
    `newest_key`, and `at_ms` the times of the queries.
    """
    weights, recent = version.interest_weights, vectors.recent_categories
    assert weights is not None
    lists, indices = rows.next_categories([*_EVERY, *recent[:, 0].tolist(), *newest_keys])
    count, candidates = len(newest_keys), recent.shape[1] + version.popular.size + successors.shape[1]
    correction = Correction(np.empty((count, 1), np.float32), np.empty((count, candidates), np.float32))
    _correct(
        lists,
        np.array(indices, np.int32),
        np.array(at_ms),
        recent,
        version.popular,
        successors,
        vectors.features,
        vectors.category_windows,
        version.features.interest_columns.inputs,
        weights,
        *correction,
        version.interest_work,
    )
    return correction


@compiled(
    "ItemLists, i4[::1], i8[::1], u8[:, ::1], u8[::1], u8[:, ::1], u2[:, ::1], u2[:, :, ::1], ColumnInputs, "
    "f8[:, ::1], f4[:, ::1], f4[:, ::1], Workspace"
)
def _correct(
    lists: ItemLists,
    indices: I32,
    at_ms: I64,
    recent: U64,
    popular: U64,
    successors: U64,
    features: U16,
    category_windows: U16,
    inputs: ColumnInputs,
    weights: F64,
    factor: F32,
    offset: F32,
    work: Workspace,
) -> None:
    """`indices`: the lists of no key, over all clicks, of the n newest categories, of the n newest items."""
    count, slots, ranks = recent.shape[0], recent.shape[1], popular.shape[0]
    everything, rows = indices[1 : 1 + LISTS_OF_EVERYTHING], np.empty((count, READ), np.int32)
    phi = np.empty((count, COLUMNS), np.float32)
    write_phi(features, category_windows, inputs, phi)
    for i in range(count):
        at_s = at_ms[i] // 1000
        # The lists of a version do not change, and `work` is the version's.
        if at_s != work.at_s[0]:
            gather_everything(lists, everything, at_s, work)
        for k in range(READ):
            rows[i, k] = indices[1 + LISTS_OF_EVERYTHING + k * count + i]
        for j in range(offset.shape[1]):
            category = recent[i, j] if j < slots else (popular[j - slots] if j < slots + ranks else np.uint64(0))
            if j >= slots + ranks:
                category = successors[i, j - slots - ranks]
            # A popular category that is also the user's own is one candidate, the user's own.
            for k in range(slots if slots <= j < slots + ranks else 0):
                category = np.uint64(0) if recent[i, k] == category else category
            take_candidate(j, category, MASKED if category == np.uint64(0) else np.float32(0.0), work)
        score(weights, phi, i, gather(lists, rows, at_s, i, work), work)
        factor[i, 0] = work.factors[0]
        for j in range(offset.shape[1]):
            offset[i, j] = work.scores[j]
