"""Prefetching in compiled kernels that read rows of large arrays at random."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _prefetching(_context: Any, array: Any, row: Any) -> Any:
    """Prefetches the first cache line of a row for writing; the row must exist. It changes no data."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, zero = (
            context.make_array(signature.args[0])(context, builder, arguments[0]),
            context.get_constant(types.intp, 0),
        )
        first = [arguments[1], *[zero] * (signature.args[0].ndim - 1)]
        at = cgutils.get_item_pointer(context, builder, signature.args[0], array, first)
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        call = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        # Arguments: for writing, into all cache levels, data cache.
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [pointer], call),
            [builder.bitcast(at, pointer), number(1), number(3), number(1)],
        )
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


prefetch: Any = intrinsic(_prefetching)
