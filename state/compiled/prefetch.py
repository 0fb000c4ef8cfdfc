"""Prefetching in compiled kernels that read rows of large arrays at random."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _prefetching(_context: Any, array: Any, index: Any) -> Any:
    """Prefetches the cache line of an element for writing; the element must exist. It changes no data.

    index: Its index, or a tuple of the first indices of several; the others are 0. `prefetch(array[row], k)` would create
    a view, and counting its references costs more than the prefetch.
    """
    given = types.UniTuple(types.intp, len(index)) if isinstance(index, types.BaseTuple) else types.intp

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, zero = (
            context.make_array(signature.args[0])(context, builder, arguments[0]),
            context.get_constant(types.intp, 0),
        )
        is_tuple = isinstance(signature.args[1], types.BaseTuple)
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

    return types.none(array, given), generate


prefetch: Any = intrinsic(_prefetching)
