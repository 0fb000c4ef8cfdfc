"""The typed door to Numba: kernels that touch every event or row are compiled.

A pure NumPy window kernel costs some 10 us a row, a compiled loop 1-2 us, and
integers give the same bits in both. Numba has no type stubs, so that strict
type checks need this one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile

Kernel = TypeVar("Kernel", bound=Callable[..., object])

_REGROUPED = {"reassoc", "contract", "nsz"}


def compiled(kernel: Kernel) -> Kernel:
    """Compiles `kernel` at its first call for each set of argument types.

    The machine code is cached beside the source file (or in the user's cache
    folder where that is read-only), so that a second process starts at once. It
    is compiled anew when the kernel's file has changed, or that of a kernel that
    it calls, a constant or a named tuple that it uses: define these above it.
    The kernel runs without the GIL; division follows NumPy, not Python.
    """
    return _cached(kernel, numba.njit(cache=True, nogil=True, error_model="numpy"))


def inlined(part: Kernel) -> Kernel:
    """A function that `compiled` kernels call, made a part of each of them.

    A call that passes many arrays costs some 50 ns, mostly for their descriptors. The rows of the window kernel took
    1.98 us with calls and 1.29 us without (15 events).
    """
    _STAMPS[part] = _stamp_of(part)
    return cast(Kernel, numba.njit(nogil=True, error_model="numpy", forceinline=True)(part))


def compiled_sums(kernel: Kernel) -> Kernel:
    """As `compiled`, for floating-point sums: their terms may be regrouped to fill the processor's vectors.

    The grouping is fixed when the kernel is compiled for a processor, so that
    the same calls give the same bits there, and other bits on another kind.
    What such a kernel calls must be a `part_of_sums`.
    """
    return _cached(kernel, numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_REGROUPED))


def part_of_sums(part: Kernel) -> Kernel:
    """A function that `compiled_sums` call, made a part of each of them.

    Called by its name, it would be one machine code in the process that compiled
    the kernel and another where the kernel came from the cache: the terms of its
    sums would be grouped by what was compiled when.
    """
    _STAMPS[part] = _stamp_of(part)
    return cast(Kernel, numba.njit(nogil=True, error_model="numpy", fastmath=_REGROUPED, forceinline=True)(part))


_STAMPS: dict[Any, str] = {}
"""What the machine code of each kernel was made from, by its Python function."""


def _cached(kernel: Kernel, compile: Callable[[Kernel], Any]) -> Kernel:
    """The compiled kernel, whose cache looks at all that it was made from; Numba alone looks at the kernel's own file."""
    found = compile(kernel)
    stamp, cache = _stamp_of(kernel), found._cache
    # A file of its own for each stamp: an index names classes, and one that is gone could not even be read.
    cache._cache_file = IndexDataCacheFile(cache._cache_path, f"{cache._impl.filename_base}-{stamp[:16]}", stamp)
    _STAMPS[kernel] = stamp
    return cast(Kernel, found)


def _stamp_of(kernel: Callable[..., object]) -> str:
    """A digest of the kernel's file, and of what the kernel takes from other files."""
    function = cast(FunctionType, kernel)
    digest = hashlib.sha256(_source(function.__code__.co_filename))
    used = {*function.__code__.co_names, *map(str, function.__annotations__.values())}
    for name in sorted(used & function.__globals__.keys()):
        value = function.__globals__[name]
        if isinstance(value, type):
            value = getattr(value, "_fields", "")
        elif not isinstance(value, (int, float, str, tuple, np.generic)):
            value = _STAMPS.get(getattr(value, "py_func", None), "")
        digest.update(f"{name} {value}".encode())
    return digest.hexdigest()


@lru_cache
def _source(file: str) -> bytes:
    return Path(file).read_bytes()
