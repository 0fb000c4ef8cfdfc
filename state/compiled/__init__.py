"""The typed door to Numba: kernels that touch every event or row are compiled.

A pure NumPy window kernel costs some 10 us a row, a compiled loop 1-2 us, and
integers give the same bits in both. Numba has no type stubs, so that strict
type checks need this one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., object])

_REGROUPED = {"reassoc", "contract", "nsz"}


def compiled(kernel: Kernel) -> Kernel:
    """Compiles `kernel` at its first call for each set of argument types.

    The machine code is cached beside the source file (or in the user's cache
    folder where that is read-only), so that a second process starts at once.
    The kernel runs without the GIL; division follows NumPy, not Python.
    """
    return cast(Kernel, numba.njit(cache=True, nogil=True, error_model="numpy")(kernel))


def compiled_sums(kernel: Kernel) -> Kernel:
    """As `compiled`, for floating-point sums: their terms may be regrouped to fill the processor's vectors.

    The grouping is fixed when the kernel is compiled for a processor, so that
    the same calls give the same bits there, and other bits on another kind.
    What such a kernel calls must be a `part_of_sums`.
    """
    return cast(Kernel, numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_REGROUPED)(kernel))


def part_of_sums(part: Kernel) -> Kernel:
    """A function that `compiled_sums` call, made a part of each of them.

    Called by its name, it would be one machine code in the process that compiled
    the kernel and another where the kernel came from the cache: the terms of its
    sums would be grouped by what was compiled when.
    """
    return cast(Kernel, numba.njit(nogil=True, error_model="numpy", fastmath=_REGROUPED, forceinline=True)(part))
