"""Reads rows from Parquet, row group by row group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from state.config.sources import nearest
from state.errors import SettingsError
from state.recordings.rows import RecordedRows
from state.recordings.text import REMEDY

CHUNK_ROWS = 8192


def parquet_rows(
    path: Path, wanted: Sequence[str], chunk_rows: int = CHUNK_ROWS, remedy: str = REMEDY
) -> Iterator[RecordedRows]:
    """Reads Parquet; only the wanted columns are decoded.

    Raises:
        SettingsError: The file has no column for a wanted field.
        pyarrow.ArrowException: The file is not Parquet, or is damaged.
        OSError: Likewise.
    """
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in wanted:
            if name not in names:
                raise SettingsError(
                    f"{path}: no column {name!r} (the nearest is {nearest(name, dict.fromkeys(names or ['none']))!r}); "
                    f"it has {', '.join(names[:30])}",
                    remedy,
                )
        first = 1
        for batch in file.iter_batches(batch_size=chunk_rows, columns=list(wanted)):
            columns = {name: as_values(batch.column(name)) for name in wanted}
            yield RecordedRows(
                columns, np.arange(first, first + len(batch), dtype=np.int64), frozenset(), _text_of(columns)
            )
            first += len(batch)


def as_values(column: pa.Array) -> list[Any]:
    """Converts a column to Python values that JSON can represent; nulls and NaN become None.

    pandas writes a column of integers with gaps as floats. So 7.0 becomes 7, because
    it is likely an id.

    >>> as_values(pa.array([7.0, float("nan"), 0.5])), as_values(pa.array([b"a", None]))
    ([7, None, 0.5], ['a', None])
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_timestamp(kind):
        # Python has no type for nanoseconds.
        return list(column.cast(pa.timestamp("us", kind.tz), safe=False).to_pylist())
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(kind):
        return [None if value is None or math.isnan(value) else _whole(value) for value in values]
    if pa.types.is_decimal(kind):
        return [None if value is None else _exact(value) for value in values]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [None if value is None else _as_text(value) for value in values]
    return values


def _whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _exact(value: Decimal) -> int | str:
    return int(value) if value == value.to_integral_value() else str(value)


def _as_text(value: bytes) -> str | bytes:
    """Decodes bytes as UTF-8. Other bytes stay bytes: JSON cannot represent them, so the row becomes a dead letter."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _text_of(columns: Mapping[str, Sequence[Any]]) -> Callable[[int], bytes]:
    return lambda row: "; ".join(f"{name}: {values[row]!r}" for name, values in columns.items()).encode()
