"""Typed wrappers of Numba: kernels that touch every event or row are compiled. Integers give the same bits as in NumPy.

A kernel that Python calls declares its argument types, so that a process can compile it, or load it from the cache,
before the first call:

    @compiled("i8[:, ::1], const(u8[::1]), i8, Tables")
    def kernel(events: I64, ids: U64, at_ms: int, tables: Tables) -> None: ...

Types are Numba's short names: `i8[:, ::1]` is a contiguous two-dimensional array of int64, and `const(...)` is a
read-only array. A named tuple is named by its class, whose fields declare their types with `@layout`. `plain(Tables)` is
a plain tuple of the same fields. A kernel that is called for one row takes plain tuples: for each named tuple, Numba loads
the class again at every call, which takes 1 us.
`state.kernels` prepares all declared kernels of a process. A kernel that only kernels call declares nothing:
it is compiled as a part of them.

Numba lets a negative index count from the end. If an index of an inner loop is a signed sum such as `first + j`, the
compiler cannot exclude negative ones, and loads each entry by itself. Index a slice by `j` instead, or add unsigned numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast, overload

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, runtime
from numba.core.caching import IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numpy.typing import NDArray

Kernel = TypeVar("Kernel", bound=Callable[..., object])
Class = TypeVar("Class", bound=type)
Scalar = TypeVar("Scalar", bound=np.generic)

_logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a process waits for another process that compiles the same kernel. After that it compiles the kernel too."""
POLL_S = 0.02

_njit: Any = numba.njit
"""Typed as Any: Numba's own types lack the options of wrappers."""
_runtime: Any = runtime
_REGROUPED = {"reassoc", "contract", "nsz"}


@overload
def compiled(kernel: Kernel, /) -> Kernel: ...
@overload
def compiled(signature: str, /, *signatures: str) -> Callable[[Kernel], Kernel]: ...
def compiled(kernel: Any, /, *signatures: str) -> Any:
    """Compiles a kernel: for declared argument types at the start of the process, for other types at the first call.

    The machine code is cached in `__pycache__` next to the source file, or in the user's cache folder if `__pycache__`
    is read-only. All processes share the cache: one compiles, the others wait and load.

    A kernel is compiled again if its file changes, the file of a kernel that it calls, or a constant or named tuple
    that it uses. Define these above the kernel. The kernel runs without the GIL. Division follows NumPy, not Python.

    Args:
        kernel: The kernel, or the types of its arguments.
        signatures: Further types that it is called with.
    """
    return _decorated(kernel, signatures, _njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True))


def inlined(part: Kernel) -> Kernel:
    """Inlines a function into each `compiled` kernel that calls it. It must not allocate arrays."""
    return _part(part, _nrt=False)


@overload
def compiled_sums(kernel: Kernel, /) -> Kernel: ...
@overload
def compiled_sums(signature: str, /, *signatures: str) -> Callable[[Kernel], Kernel]: ...
def compiled_sums(kernel: Any, /, *signatures: str) -> Any:
    """Like `compiled`, for floating-point sums: their terms may be regrouped to fill the processor's vectors.

    The grouping is fixed when the kernel is compiled for a processor. The same calls give the same bits on that kind of
    processor, and other bits on another kind. Every function that such a kernel calls must be a `part_of_sums`.
    """
    return _decorated(
        kernel,
        signatures,
        _njit(cache=True, fastmath=_REGROUPED, nogil=True, error_model="numpy", no_cfunc_wrapper=True),
    )


def part_of_sums(part: Kernel) -> Kernel:
    """Inlines a function into each `compiled_sums` kernel that calls it. It must not allocate arrays or call `np.dot`.

    If it were called by name, the grouping of its sums would depend on the order of compilation. Its machine code would
    then differ between the process that compiled the kernel and one that loaded the kernel from the cache.
    """
    return _part(part, _nrt=False, fastmath=_REGROUPED)


def allocating_part_of_sums(part: Kernel) -> Kernel:
    """Like `part_of_sums`, for a part that allocates arrays, calls `np.dot`, or calls a part that does."""
    return _part(part, fastmath=_REGROUPED)


def _part(part: Kernel, **options: Any) -> Kernel:
    """A part that only kernels call. With wrappers, it would be compiled three times: alone and in each wrapper.

    Without `_nrt`, it does not count references of the arrays in its arguments: for two pairs of a step, counting took
    four times as long as computing.
    """
    _STAMPS[part] = _stamp_of(part)
    inline = _njit(
        nogil=True,
        error_model="numpy",
        forceinline=True,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        **options,
    )
    return cast(Kernel, inline(part))


def layout(types: str) -> Callable[[Class], Class]:
    """Declares the types of a named tuple's fields, for kernels that take one."""

    def declare(tuple_class: Class) -> Class:
        _LAYOUTS[tuple_class] = types
        return tuple_class

    return declare


def read_only(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """A contiguous read-only view, for kernels that take arrays of either kind: columns of log records are read-only.

    A kernel that is declared for both kinds is compiled twice.
    """
    view = np.ascontiguousarray(values).view()
    view.flags.writeable = False
    return view


class Declared(NamedTuple):
    """A kernel that declares its argument types: Numba's dispatcher, the signatures, and its module's global names."""

    dispatcher: Any
    signatures: tuple[str, ...]
    names: dict[str, Any]

    @property
    def module(self) -> str:
        """The module that defines the kernel."""
        return str(self.dispatcher.py_func.__module__)

    @property
    def size(self) -> int:
        """Bytes of bytecode of the kernel and its callees, times signatures; compile time is proportional to it."""
        return len(self.signatures) * _size_of(self.dispatcher.py_func)

    @property
    def types(self) -> list[tuple[Any, ...]]:
        """The argument types, one tuple for each signature."""
        return [_types_of(signature, self.names) for signature in self.signatures]

    @property
    def busy(self) -> bool:
        """Whether another process is compiling it now."""
        try:
            handle = os.open(_LOCKS[self.dispatcher], os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def prepare(self) -> None:
        """Loads its machine code from the cache, or compiles it."""
        for types in self.types:
            _compile_once(self.dispatcher, types)


def declared() -> list[Declared]:
    """The kernels with declared types in all modules that this process has imported."""
    return list(_DECLARED)


_STAMPS: dict[Any, str] = {}
"""Python function of a kernel -> digest of the sources of its machine code."""
_DECLARED: list[Declared] = []
_LAYOUTS: dict[type, str] = {}
FIRST_CALLS: list[str] = []
"""Kernels compiled at their first call because their types were not prepared; for tests and diagnosis."""
_LOCKS: dict[Any, Path] = {}
"""The lock file of each kernel. All kernels of a source file share one, because they consist of the same parts."""
_LOCKED: set[Path] = set()
"""Lock files that this process holds. Only the thread that is compiling changes it."""


class _CacheFile(IndexDataCacheFile):
    """Numba's cache file of a kernel. New machine code is written to `folder`.

    `installed`, which may be read-only, is the fallback for reads.
    """

    def __init__(self, folder: str, installed: str, name: str, stamp: str) -> None:
        super().__init__(folder, name, stamp)
        self._installed = IndexDataCacheFile(installed, name, stamp)

    def load(self, key: Any) -> Any:
        """The machine code for the types and processor of `key`; None if there is none."""
        code = super().load(key)
        if code is None:
            # Another user's files may be unreadable.
            with suppress(OSError):
                code = self._installed.load(key)
        return code


def _size_of(function: FunctionType) -> int:
    called = (getattr(function.__globals__.get(name), "py_func", None) for name in function.__code__.co_names)
    return len(function.__code__.co_code) + sum(_size_of(part) for part in called if part is not None)


def _decorated(kernel: Any, signatures: tuple[str, ...], compile: Callable[[Any], Any]) -> Any:
    if isinstance(kernel, str):
        return partial(_cached, compile=compile, signatures=(kernel, *signatures))
    return _cached(kernel, compile)


def _cached(kernel: Kernel, compile: Callable[[Kernel], Any], signatures: tuple[str, ...] = ()) -> Kernel:
    """Compiles a kernel with a cache that checks all its sources; Numba's own checks only the kernel's file."""
    dispatcher = compile(kernel)
    stamp, cache, function = _stamp_of(kernel), dispatcher._cache, cast(FunctionType, kernel)
    base = cache._impl.filename_base
    # Uses one file per stamp, because an index names classes, and an index with a removed class cannot be read.
    installed = Path(function.__code__.co_filename).with_name("__pycache__")
    cache._cache_file = _CacheFile(cache._cache_path, str(installed), f"{base}-{stamp[:16]}", stamp)
    cache.load_overload = partial(_load, cache)
    _STAMPS[kernel] = stamp
    dispatcher.compile = partial(_compile_at_call, dispatcher)
    _LOCKS[dispatcher] = Path(cache._cache_path, f"{Path(function.__code__.co_filename).stem}.lock")
    if signatures:
        _DECLARED.append(Declared(dispatcher, signatures, function.__globals__))
    return cast(Kernel, dispatcher)


def _compile_at_call(dispatcher: Any, signature: Any) -> Any:
    """Replaces Numba's `compile`. It runs when Python, or a kernel being compiled, needs new argument types."""
    if not _LOCKED:
        FIRST_CALLS.append(f"{dispatcher.py_func.__module__}.{dispatcher.py_func.__name__}{signature}")
        _logger.info("%s was not prepared: its first call waits for it", FIRST_CALLS[-1])
    return _compile_once(dispatcher, signature)


def _compile_once(dispatcher: Any, signature: Any) -> Any:
    """Compiles a kernel while no other process compiles it; loads it if another process has compiled it."""
    # Takes Numba's own lock first, because a thread that holds it may need the kernel's lock.
    with global_compiler_lock, _locked(_LOCKS[dispatcher]):
        return type(dispatcher).compile(dispatcher, signature)


def _load(cache: Any, signature: Any, context: Any) -> Any:
    """Loads a kernel from the cache; None if it is not there.

    Numba's own `load_overload` initializes the compiler first. That takes as long as loading all kernels of a process,
    and only compiling needs it. Machine code needs the runtime, which allocates arrays.
    """
    _runtime.rtsys.initialize(context)
    return cache._load_overload(signature, context)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; continues without the lock if it cannot be taken."""
    if path in _LOCKED:
        yield
        return
    handle = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline_s = time.monotonic() + PATIENCE_S
    while handle is not None and time.monotonic() < deadline_s:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(POLL_S)
    _LOCKED.add(path)
    try:
        yield
    finally:
        _LOCKED.discard(path)
        if handle is not None:
            os.close(handle)


def _const(array: Any) -> Any:
    return array.copy(readonly=True)


def _plain(tuple_class: type) -> tuple[Any, ...]:
    return _types_of(_LAYOUTS[tuple_class], vars(sys.modules[tuple_class.__module__]))


_TYPE_NAMES: dict[str, Any] = {
    "const": _const,
    "plain": _plain,
    "bool": numba.types.boolean,
    **{name: getattr(numba.types, name) for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")},
}


def _types_of(signature: str, names: dict[str, Any]) -> tuple[Any, ...]:
    """Parses a signature into Numba's types.

    >>> _types_of("i8[:, ::1], const(u8[::1]), bool", {})
    (Array(int64, 2, 'C', False, aligned=True), Array(uint64, 1, 'C', True, aligned=True), bool)
    """
    types = eval(f"({signature},)", {**names, **_TYPE_NAMES, "__builtins__": {}})
    return tuple(_type_of(type_) for type_ in types)


def _type_of(type_: Any) -> Any:
    """Numba's type of a named tuple's class or of a tuple of types; returns other values unchanged."""
    if isinstance(type_, tuple):
        return numba.types.BaseTuple.from_types([_type_of(member) for member in type_])
    if not isinstance(type_, type):
        return type_
    return numba.types.BaseTuple.from_types(_plain(type_), type_)


def _stamp_of(kernel: Callable[..., object]) -> str:
    """A digest of the kernel's file, and of the names that the kernel uses from other files."""
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


@compiled("u8")
def mix(value: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each of `[n]` uint64, computed by NumPy, for callers that need one call per batch and no kernel.

    >>> values = np.array([1, 2**63], np.uint64)
    >>> mixed(values).tolist() == [int(mix(value)) for value in values]
    True
    """
    mixed_values: NDArray[np.uint64] = cast(Any, mix).py_func(values)
    return mixed_values


F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_LN2 = np.float32(np.log(2.0))


@part_of_sums
def logarithms(values: F32, bits: I32, logs: F32, count: int, first: int) -> None:
    """Writes the logarithms of the first `count` values of each row to `logs`, from column `first` on.

    Args:
        values: `[A, n]` float32, at least 1; overwritten.
        bits: `values` viewed as int32.
        logs: `[A, m]` float32; the error is below 2e-6.
        count: The number of values of a row.
        first: A column of `logs`.
    """
    for a in range(values.shape[0]):
        to = logs[a, first : first + count]
        # In two loops, because `bits` is a view of `values`.
        for j in range(count):
            exponent = (bits[a, j] >> np.int32(23)) - np.int32(127)
            to[j] = np.float32(exponent) * _LN2
            bits[a, j] -= exponent << np.int32(23)
        for j in range(count):
            # log m = 2 artanh t for m in [1, 2).
            t = (values[a, j] - np.float32(1.0)) / (values[a, j] + np.float32(1.0))
            u = t * t
            series = np.float32(1 / 3) + u * (np.float32(1 / 5) + u * (np.float32(1 / 7) + u * np.float32(1 / 9)))
            to[j] += np.float32(2.0) * t * (np.float32(1.0) + u * series)


def _prefetching(_context: Any, array: Any, index: Any) -> Any:
    """Prefetches the cache line of an element for writing; the element must exist. It changes no data.

    index: Its index, or a tuple of the first indices of several; the others are 0. `prefetch(array[row], k)` would create
    a view, and counting its references costs more than the prefetch.
    """
    given = (
        numba.types.UniTuple(numba.types.intp, len(index))
        if isinstance(index, numba.types.BaseTuple)
        else numba.types.intp
    )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, zero = (
            context.make_array(signature.args[0])(context, builder, arguments[0]),
            context.get_constant(numba.types.intp, 0),
        )
        is_tuple = isinstance(signature.args[1], numba.types.BaseTuple)
        first = cgutils.unpack_tuple(builder, arguments[1]) if is_tuple else [arguments[1]]
        first = [*first, *[zero] * (signature.args[0].ndim - len(first))]
        at = cgutils.get_item_pointer(context, builder, signature.args[0], array, first)
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        call = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        # Arguments: for writing, into all cache levels, data cache.
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [pointer], call),
            [builder.bitcast(at, pointer), number(1), number(3), number(1)],
        )
        return context.get_dummy_value()

    return numba.types.none(array, given), generate


prefetch: Any = intrinsic(_prefetching)
