"""Encodes micro-batches: an Arrow IPC stream (zstd) with one record batch.

The schema's metadata contains a JSON header. It names the feature spec, the salt, the mask and, per source, the
contiguous range of positions of the rows. A micro-batch has format 3 if its rows contain sequences, else format 2.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from state.errors import MicroBatchError
from state.microbatch.batch import (
    ATTRIBUTES,
    DTYPES,
    KIND_COUNT,
    LISTS,
    NAMES,
    SCALARS,
    SEQUENCES,
    WAITING,
    WRITTEN,
    Columns,
    Header,
    MicroBatch,
    absent_column,
    counts,
    counts_by_range,
)
from state.positions import Range, from_json, split_range, to_json

FORMAT, WITH_SEQUENCES = 2, 3
METADATA = b"springtide"

_WRITE = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
ALL, EVENTS = (*NAMES, *SEQUENCES), tuple(SCALARS)


def encode(header: Header, columns: Columns) -> bytes:
    """Encodes one micro-batch.

    `columns` are shaped as in `MicroBatch`, with the types of `SCALARS` and `LISTS`. Columns of `WAITING` may be missing and
    are then 0; those of `ATTRIBUTES` are then empty. Those of `SEQUENCES` are all present or all missing.

    Raises:
        MicroBatchError: A column is missing, of another type or length, or does not fit the ranges.
    """
    if "user" in columns:
        columns = {name: absent_column(name, len(columns["user"])) for name in (*WAITING, *ATTRIBUTES)} | dict(columns)
    _check(header, columns)
    rows = len(columns["user"])
    arrays, fields = [], []
    for name in SCALARS:
        arrays.append(arrow_array(columns[name]))
        fields.append(pa.field(name, arrays[-1].type, nullable=False))
    sequences = _sequences(columns)
    for name in (*LISTS, *sequences):
        column = columns[name]
        width = int(np.prod(column.shape[1:], dtype=np.int64))
        kind = pa.list_(pa.field("item", pa.from_numpy_dtype(column.dtype), nullable=False), width)
        # FixedSizeListArray.from_arrays cannot determine the number of empty lists.
        arrays.append(pa.Array.from_buffers(kind, rows, [None], children=[arrow_array(column.reshape(-1))]))
        fields.append(pa.field(WRITTEN.get(name, name), kind, nullable=False))
    document = {
        "format": WITH_SEQUENCES if sequences else FORMAT,
        "spec": header.spec,
        "salt": header.salt,
        "mask_generation": header.mask_generation,
        "ranges": [to_json(part) for part in header.ranges],
        "created_ms": header.created_ms,
        "label_shape": list(columns["category_windows"].shape[1:]),
        "names": {f"{key:016x}": name for key, name in header.names.items()},
        "attributes": header.attributes,
        **({} if header.log_epoch == 1 else {"log_epoch": header.log_epoch}),
        **({"clocks": header.clocks} if header.clocks else {}),
    }
    schema = pa.schema(fields, metadata={METADATA: json.dumps(document, separators=(",", ":")).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_WRITE) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue())


def decode(value: bytes, names: tuple[str, ...] = ALL) -> MicroBatch:
    """Decodes a micro-batch; its arrays are read-only views of the decoded buffers.

    Only the columns `names` are decoded, which must include user and source; the others are zero or empty.

    Raises:
        MicroBatchError: The value is not a micro-batch, or is damaged.
    """
    with damage_reported(value), pa.ipc.open_stream(pa.py_buffer(value), options=_reading(names)) as reader:
        document = document_of(reader.schema)
        batch = reader.read_next_batch()
        # Damage can make lists longer than their buffers.
        batch.validate()
        header = header_of(document)
        has_sequences = document["format"] == WITH_SEQUENCES
        columns = {name: _column(batch, name, document) for name in names if has_sequences or name not in SEQUENCES}
    rows = len(columns["user"])
    columns |= {name: absent_column(name, rows) for name in NAMES if name not in names}
    _check(header, columns, names)
    return MicroBatch(header, **columns)


@cache
def _reading(names: tuple[str, ...]) -> pa.ipc.IpcReadOptions:
    # A micro-batch without sequences has fewer columns than `ALL`.
    numbers = None if names == ALL else [number for number, name in enumerate(ALL) if name in names]
    return pa.ipc.IpcReadOptions(use_threads=False, included_fields=numbers)


def decode_events(value: bytes) -> MicroBatch:
    """Decodes what the rows of a micro-batch say of their events. Their features take nine tenths of the time."""
    return decode(value, EVENTS)


def arrow_array(values: NDArray[Any]) -> pa.Array:
    """`[n]` as an Arrow array. `pa.array` and `Array.to_numpy` would import pandas, which takes a third of a second."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


@contextmanager
def damage_reported(value: bytes) -> Iterator[None]:
    """Converts the errors that Arrow raises in the block for a damaged `value` to `MicroBatchError`."""
    try:
        yield
    # For a damaged stream, Arrow raises its own errors, OSError, StopIteration and KeyError.
    except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError, TypeError) as error:
        raise MicroBatchError(
            f"a value of {len(value)} bytes is no micro-batch: {error or type(error).__name__}",
            "check that the topic holds only what the stream wrote",
        ) from error


def _column(batch: pa.RecordBatch, name: str, document: Mapping[str, Any]) -> NDArray[Any]:
    column = batch.column(WRITTEN.get(name, name))
    if name in SCALARS:
        return np.from_dlpack(column)
    if not pa.types.is_fixed_size_list(column.type):
        raise MicroBatchError(f"column {name} is {column.type}, expected lists of one length")
    shape = document["label_shape"] if name == "category_windows" else [column.type.list_size]
    return np.from_dlpack(column.flatten()).reshape(len(column), *shape)


def document_of(schema: pa.Schema) -> dict[str, Any]:
    """The JSON header in a schema's metadata."""
    document = json.loads((schema.metadata or {}).get(METADATA, b"null"))
    if not isinstance(document, dict):
        raise MicroBatchError("an Arrow stream without a springtide header is no micro-batch", "check the topic's name")
    if document.get("format") not in (FORMAT, WITH_SEQUENCES):
        raise MicroBatchError(
            f"a micro-batch of format {document.get('format')!r}",
            f"this release reads {FORMAT} and {WITH_SEQUENCES}: upgrade the reader before the stream",
        )
    return document


def header_of(document: Mapping[str, Any]) -> Header:
    """Decodes a header from its JSON form."""
    return Header(
        spec=str(document["spec"]),
        salt=str(document["salt"]),
        ranges=tuple(from_json(part) for part in document["ranges"]),
        created_ms=int(document["created_ms"]),
        mask_generation=int(document["mask_generation"]),
        names={int(key, 16): str(name) for key, name in document["names"].items()},
        attributes=_names(*document.get("attributes", ((), ()))),
        clocks=tuple((int(begin), int(end)) for begin, end in document.get("clocks", ())),
        log_epoch=int(document.get("log_epoch", 1)),
    )


def _names(users: Iterable[str], items: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(map(str, users)), tuple(map(str, items))


def _check(header: Header, columns: Columns, names: Collection[str] = ALL) -> None:
    if missing := [name for name in NAMES if name not in columns]:
        raise MicroBatchError(f"a micro-batch without the columns {', '.join(missing)}")
    rows = len(columns["user"])
    for name in (*NAMES, *_sequences(columns)):
        column, kind = columns[name], DTYPES[name]
        depth = 1 if name in SCALARS else 3 if name == "category_windows" else 2
        if column.dtype != kind or len(column) != rows or column.ndim != depth:
            raise MicroBatchError(
                f"column {name} is {column.dtype}{list(column.shape)}, expected {kind} with {rows} rows "
                f"and {depth} dimensions"
            )
    for name, named in zip(ATTRIBUTES, header.attributes, strict=True):
        if name in names and columns[name].shape[1] != len(named):
            raise MicroBatchError(
                f"column {name} has {columns[name].shape[1]} attributes, the header names {len(named)}"
            )
    if header.clocks and len(header.clocks) != len(header.ranges):
        raise MicroBatchError(f"the header has {len(header.ranges)} ranges and {len(header.clocks)} clocks")
    sources, offsets = columns["source"], columns["offset"]
    if rows and int(sources.max()) >= len(header.ranges):
        raise MicroBatchError(f"a row names range {int(sources.max())}, the header has {len(header.ranges)}")
    kinds = columns["kind"]
    if rows and int(kinds.max()) >= KIND_COUNT:
        raise MicroBatchError(f"a row is of kind {int(kinds.max())}, there are {KIND_COUNT}")
    if "kind" not in names:
        return
    for part, counted in zip(header.ranges, counts_by_range(kinds, sources, len(header.ranges)), strict=True):
        for name, count in counted.items():
            if getattr(part, name) != count:
                raise MicroBatchError(
                    f"the header counts {getattr(part, name)} {name} of {part.source} in [{part.first}, {part.next}), "
                    f"there are {count}"
                )
    if rows:
        firsts = np.array([part.first for part in header.ranges], np.int64)[sources]
        nexts = np.array([part.next for part in header.ranges], np.int64)[sources]
        if not ((firsts <= offsets) & (offsets < nexts)).all():
            raise MicroBatchError("a row's offset lies outside of its source's range")


def _sequences(columns: Columns) -> list[str]:
    present = [name for name in SEQUENCES if name in columns]
    widths = {columns[name].shape[1:] for name in present}
    if present and (len(present) < len(SEQUENCES) or len(widths) > 1 or (0,) in widths):
        raise MicroBatchError(f"the columns {', '.join(SEQUENCES)} are there together, of one width, or not at all")
    return present


def split(header: Header, columns: Columns, max_record_bytes: int, max_rows: int = 2**31) -> list[bytes]:
    """Encodes the rows, in this order, as micro-batches within both limits.

    A batch that does not fit is halved by rows until its parts fit. Each part's ranges end where the next part's begin.
    Rows with the same offset stay together, even if they exceed `max_rows`.

    Raises:
        MicroBatchError: The rows of a single offset exceed the limit, or the columns do not fit the header.
    """
    rows = len(columns["user"])
    if rows <= max_rows:
        value = encode(header, columns)
        if len(value) <= max_record_bytes:
            return [value]
    middle = _middle(columns)
    if not middle:
        value = encode(header, columns)
        if len(value) <= max_record_bytes:
            return [value]
        raise MicroBatchError(
            f"a micro-batch of {rows} rows takes {len(value)} bytes, more than the {max_record_bytes} of a record",
            "configure fewer or shorter features.sequence, attributes or context fields",
        )
    parts = []
    for part_header, part_columns in _halves(header, columns, middle):
        parts.extend(split(part_header, part_columns, max_record_bytes, max_rows))
    return parts


def _middle(columns: Columns) -> int:
    """The index nearest to the middle at which a new offset begins; 0 if all rows share one offset."""
    sources, offsets = columns["source"], columns["offset"]
    begins = np.flatnonzero((sources[1:] != sources[:-1]) | (offsets[1:] != offsets[:-1])) + 1
    return int(begins[np.argmin(np.abs(begins - len(offsets) // 2))]) if len(begins) else 0


def _halves(header: Header, columns: Columns, middle: int) -> list[tuple[Header, Columns]]:
    """The two halves of a batch cut before row `middle`; each half leaves out its empty ranges."""
    sources, offsets = columns["source"], columns["offset"]
    parts_of_rows, halves = (slice(None, middle), slice(middle, None)), list[tuple[Header, Columns]]()
    ranges: tuple[list[Range], list[Range]] = ([], [])
    for index, source_range in enumerate(header.ranges):
        of_source = np.flatnonzero(sources == index)
        later = of_source[of_source >= middle]
        at = int(offsets[later[0]]) if len(later) else source_range.next
        below = counts(columns["kind"][of_source[: len(of_source) - len(later)]])
        before, after = split_range(source_range, at, below.pop("rows"), below)
        ranges[0].append(before)
        ranges[1].append(after)
    # A name stays with its first row; a name without a row stays with the first half.
    first, second = ({*columns["item"][rows].tolist(), *columns["category"][rows].tolist()} for rows in parts_of_rows)
    late = {identity: text for identity, text in header.names.items() if identity in second - first}
    early = {identity: text for identity, text in header.names.items() if identity not in late}
    for parts, rows, names in zip(ranges, parts_of_rows, (early, late), strict=True):
        used = [index for index, part in enumerate(parts) if part.next > part.first]
        index_of = np.zeros(max(len(parts), 1), np.uint16)
        index_of[used] = np.arange(len(used), dtype=np.uint16)
        half = {name: column[rows] for name, column in columns.items()}
        half["source"] = index_of[half["source"]]
        clocks = tuple(header.clocks[index] for index in used) if header.clocks else ()
        halves.append((replace(header, ranges=tuple(parts[index] for index in used), names=names, clocks=clocks), half))
    return halves


_LENGTH = struct.Struct("<I")
END = _LENGTH.pack(0)
"""The end marker."""


def framed(value: bytes) -> bytes:
    """Frames an encoded micro-batch."""
    return _LENGTH.pack(len(value)) + value


class Frames:
    """Parses framed micro-batches from a pipe's bytes as they arrive.

    Attributes:
        ended: Whether the end marker has arrived.
    """

    def __init__(self) -> None:
        self._buffer, self.ended = b"", False

    def take(self, data: bytes) -> Iterator[bytes]:
        """The micro-batches that are complete now, each once."""
        self._buffer += data
        at = 0
        while at + _LENGTH.size <= len(self._buffer):
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + length
            if not length:
                self.ended = True
            if end > len(self._buffer):
                break
            if length:
                yield self._buffer[at + _LENGTH.size : end]
            at = end
        self._buffer = self._buffer[at:]
