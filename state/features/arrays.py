"""The arrays that the window kernel reads and writes, the constants of its counts, and the steps of ages.

An event is five 64-bit words, the bytes of `EVENT`: time, category, item, offset, and topic | partition << 32 | action
<< 48 | flags << 56.
"""

from __future__ import annotations

import decimal
import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]

WORDS = 5
SOURCE_BITS = 0xFFFFFFFFFFFF
GAPS = 4  # gaps between the latest events that are features
SLOTS = 5  # latest categories whose windows are features
SWITCHES = 16  # events among which changes of category are counted
FEW = 5  # latest events among which each category is counted
MANY = 20
OF_ORDER = 3  # windows of a category by order of events instead of time; the last ones of its windows
NEVER = 255  # the recency of an event that never happened
EXACT = 128  # each age below this many units has its own step; then 64 steps per octave
DAY_MS = 86_400_000
HOUR_MS = 3_600_000


def quantise(age: int) -> int:
    """The step of an age in units of 1.024 s, exact below 128 units.

    >>> [quantise(age) for age in (0, 127, 128, 129, 130, 256)]
    [0, 127, 128, 128, 129, 192]
    """
    shift = 0
    while (age >> shift) >= EXACT:
        shift += 1
    return 64 * shift + (age >> shift)


def recency_step(age: int) -> int:
    """The recency of an age in units of 1.024 s: eight steps per octave, at most 254.

    >>> [recency_step(age) for age in (0, 15, 16, 3515, 590_625, 10**12)]
    [0, 15, 16, 77, 137, 254]
    """
    shift = max(0, age.bit_length() - 4)
    return min(8 * shift + (age >> shift), NEVER - 1)


def ages_of_steps(longest_ms: int) -> tuple[int, ...]:
    """The minimum age of each step of the quantiser, in units, up to the step of `longest_ms`.

    >>> ages = ages_of_steps(604_800_000)
    >>> len(ages), [quantise(age) for age in ages] == list(range(len(ages)))
    (905, True)
    """
    steps = quantise(longest_ms >> 10) + 1
    return tuple(q if q < EXACT else (q % 64 + 64) << (q // 64 - 1) for q in range(steps))


@functools.lru_cache(maxsize=64)
def decay_column(half_life_s: int, ages: tuple[int, ...]) -> tuple[int, ...]:
    """65536 * 2^(-age / half life) for ages in units of 1.024 s.

    Decimal arithmetic is correctly rounded everywhere; a platform's exp2 is not. It takes some 15 ms, so specs that
    share a half-life share the result.
    """
    with decimal.localcontext(decimal.Context(prec=34)):
        rate = -decimal.Decimal(2).ln() * 1024 / (1000 * half_life_s)
        return tuple(int((65536 * (rate * age).exp()).to_integral_value()) for age in ages)


class Tables(NamedTuple):
    """The constants of a spec, as the kernel reads them."""

    windows_ms: I64  # [W], ascending
    decay: I64  # [Q, H]: 65536 is one fresh event
    recency: I64  # [Q]: quantised age -> step, 0..254
    hour: I64  # [24, 2]: sine and cosine, 0..2000
    weekday: I64  # [7, 2]
    actions: int
    history: int


class Rings(NamedTuple):
    """The latest events of several users, each in a ring buffer.

    Attributes:
        events: `[users, N, 5]` int64.
        ends: `[users]` int64, the position of each user's next event.
        counts: `[users]` int64, the number of events.
    """

    events: I64
    ends: I64
    counts: I64


class Vector(NamedTuple):
    """One row of integers, or `[n, ...]` of each array for n rows.

    Attributes:
        features: `[D]` uint16.
        recent_categories: `[L]` uint64 ids, newest first; 0 pads.
        category_windows: `[L, F]` uint16.
        sequence_items: `[T]` uint64 ids of the latest events, newest first; see `state/features/kernel.py`.
        sequence_categories: `[T]` uint64 ids.
        sequence_actions: `[T]` uint16, 1 and up; 0 pads.
        sequence_ages: `[T]` uint16 recencies of the events.
    """

    features: U16
    recent_categories: U64
    category_windows: U16
    sequence_items: U64
    sequence_categories: U64
    sequence_actions: U16
    sequence_ages: U16


def words(events: NDArray[Any]) -> I64:
    """Views `[n]` EVENT as the `[n, 5]` int64 that the kernels read."""
    # Twice as fast as a view of another type, which NumPy checks field by field.
    return np.ndarray((len(events), WORDS), np.int64, np.ascontiguousarray(events))
