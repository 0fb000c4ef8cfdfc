"""Writes rows of users to a Parquet file atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from state.disk import files as durable
from state.segments.store import SegmentStore, all_members

MEMBERS = pa.schema(
    [
        pa.field("pseudonym", pa.string(), nullable=False),
        pa.field("since", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
    ]
)
"""Columns of members: the pseudonym in 16 hexadecimal digits, entry time of the log, and the version at entry."""
LOOKALIKES = pa.schema(
    [pa.field("pseudonym", pa.string(), nullable=False), pa.field("similarity", pa.float32(), nullable=False)]
)
ROWS_AT_ONCE = 10_000


def members(store: SegmentStore, segment: str) -> Iterator[pa.RecordBatch]:
    """Yields the members of a segment, in the order of their pseudonyms."""
    for page in all_members(store, segment, ROWS_AT_ONCE):
        columns = [
            [f"{user:016x}" for user, _ in page],
            [one.since_ms for _, one in page],
            [one.version for _, one in page],
        ]
        yield pa.record_batch([pa.array(one, kind) for one, kind in zip(columns, MEMBERS.types, strict=True)], MEMBERS)


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], wrote: Callable[[int], None]) -> int:
    """Writes a file, or replaces an existing one; returns the number of rows.

    Args:
        path: The file.
        schema: Schema of the rows.
        batches: The rows.
        wrote: Called with the number of rows written so far, after each batch.

    Raises:
        OSError: The file cannot be written; an existing file stays as it was.
    """
    temporary, rows = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows
                wrote(rows)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        durable.sync_directory(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
    return rows
