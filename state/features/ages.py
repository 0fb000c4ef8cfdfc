"""Quantises ages: 64 steps per octave inside the kernel, for its sums, and 8 steps per octave in a row."""

from __future__ import annotations

import decimal

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


def ages_of_steps(longest_ms: int) -> list[int]:
    """The minimum age of each step of the quantiser, in units, up to the step of `longest_ms`.

    >>> ages = ages_of_steps(604_800_000)
    >>> len(ages), [quantise(age) for age in ages] == list(range(len(ages)))
    (905, True)
    """
    steps = quantise(longest_ms >> 10) + 1
    return [q if q < EXACT else (q % 64 + 64) << (q // 64 - 1) for q in range(steps)]


def decay_column(half_life_s: int, ages: list[int]) -> list[int]:
    """65536 * 2^(-age / half life) for ages in units of 1.024 s.

    Decimal arithmetic is correctly rounded everywhere; a platform's exp2 is not.
    """
    with decimal.localcontext(decimal.Context(prec=34)):
        rate = -decimal.Decimal(2).ln() * 1024 / (1000 * half_life_s)
        return [int((65536 * (rate * age).exp()).to_integral_value()) for age in ages]
