"""The micro-batch: its Arrow schema, encoding, decoding, splitting and trimming.

One micro-batch is one record of the micro-batch log and one training step. Its
value is an Arrow IPC stream (zstd) with one record batch; the schema's metadata
holds a JSON header that names the feature spec, the salt, the mask and, per
source, the contiguous range of positions that the rows came from.

Format 2 also holds rows that only histories gain and rows that only the trainer
learns from (`state/microbatch/row_kinds.py`). The latter stand at the place where their label
became known, beside the event that made it known; so several rows can have one
place, and no micro-batch ends between them. Format 1 knew one kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from state.errors import MicroBatchError
from state.microbatch.row_kinds import KINDS, Known, counts, counts_by_range
from state.positions import Range, Source, from_json, split_range, to_json

if TYPE_CHECKING:
    from state.attributes.values import Joined
    from state.events.event_batch import EventBatch
    from state.history.store import Appends

FORMAT = 2
METADATA = b"springtide"

# Order and types are the format: a change needs a new FORMAT and a golden file.
SCALARS: dict[str, np.dtype[Any]] = {
    "user": np.dtype("<u8"),
    "item": np.dtype("<u8"),
    "category": np.dtype("<u8"),
    "action": np.dtype("u1"),
    "at_ms": np.dtype("<i8"),
    "label": np.dtype("<f4"),
    "weight": np.dtype("<f4"),
    "source": np.dtype("<u2"),
    "offset": np.dtype("<i8"),
    "kind": np.dtype("u1"),
    "waited": np.dtype("<i8"),
    "delay_ms": np.dtype("<i8"),
    "request": np.dtype("<u8"),
}
SINCE_2 = ("kind", "waited", "delay_ms", "request")  # all 0 in a row whose label needed no waiting
LISTS: dict[str, np.dtype[Any]] = {
    "context": np.dtype("<u8"),
    "features": np.dtype("<u2"),
    "recent_categories": np.dtype("<u8"),
    "category_windows": np.dtype("<u2"),
    "user_attributes": np.dtype("<u8"),
    "item_attributes": np.dtype("<u8"),
}
NAMES = (*SCALARS, *LISTS)
WRITTEN = {
    "recent_categories": "labels",
    "category_windows": "label_windows",
}  # what the formats call a column, where not by its name
ATTRIBUTES = ("user_attributes", "item_attributes")  # a micro-batch of format 1 has none of them

_WRITE = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)

Columns = Mapping[str, NDArray[Any]]


_UNSAID: NDArray[Any] = np.empty(0, np.uint8)


def absent_column(name: str, rows: int) -> NDArray[Any]:
    """What a column since format 2 holds where nothing is said: zeros, or no attributes, `[rows, 0]`."""
    return np.zeros(rows, SCALARS[name]) if name in SCALARS else np.empty((rows, 0), LISTS[name])


def _unsaid() -> NDArray[Any]:
    return _UNSAID


@dataclass(frozen=True, slots=True)
class Header:
    """What a micro-batch says about itself.

    Attributes:
        spec: Digest of the feature spec.
        salt: Fingerprint of the users' salt.
        ranges: One contiguous range of positions per source; `source` of a row is an index into it.
        created_ms: When the batch was cut, wall clock.
        mask_generation: The mask its windows were computed under; 0 for none.
        names: Names of ids, of categories and measured attributes, that the stream had not announced lately.
        attributes: Names of the attributes of users and of items, in the order of their columns.
    """

    spec: str
    salt: str
    ranges: tuple[Range, ...]
    created_ms: int
    mask_generation: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    attributes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The rows of one training step, in the order of the log within each source.

    Attributes:
        header: What the batch says about itself.
        user: `[n]` uint64 ids; 0 is none.
        item: `[n]` uint64 ids.
        category: `[n]` uint64 ids.
        action: `[n]` uint8 index into the configured actions.
        at_ms: `[n]` int64 event time, ms.
        label: `[n]` float32; NaN is unknown.
        weight: `[n]` float32 weight of the action.
        source: `[n]` uint16 index into `header.ranges`.
        offset: `[n]` int64 offset within the source: the row's place.
        context: `[n, K]` uint64 ids.
        features: `[n, D]` uint16.
        recent_categories: `[n, L]` uint64 category ids, newest first; 0 pads.
        category_windows: `[n, L, F]` uint16.
        kind: `[n]` uint8 `Kind`.
        waited: `[n]` int64, how many offsets before its place the row's event lies.
        delay_ms: `[n]` int64, how much later than the row's event its label became known, event time, ms.
        request: `[n]` uint64 id by which an impression and its outcome are paired; 0 is none.
        user_attributes: `[n, Au]` uint64 ids, see `state/attributes/values.py`.
        item_attributes: `[n, Ai]` uint64 ids; never shown to the interest head.
    """

    header: Header
    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    context: NDArray[np.uint64]
    features: NDArray[np.uint16]
    recent_categories: NDArray[np.uint64]
    category_windows: NDArray[np.uint16]
    kind: NDArray[np.uint8] = field(default_factory=_unsaid)
    waited: NDArray[np.int64] = field(default_factory=_unsaid)
    delay_ms: NDArray[np.int64] = field(default_factory=_unsaid)
    request: NDArray[np.uint64] = field(default_factory=_unsaid)
    user_attributes: NDArray[np.uint64] = field(default_factory=_unsaid)
    item_attributes: NDArray[np.uint64] = field(default_factory=_unsaid)

    def __post_init__(self) -> None:
        """Rows of which nothing else is said needed no waiting, and have no attributes."""
        for name in (*SINCE_2, *ATTRIBUTES):
            if getattr(self, name) is _UNSAID:
                object.__setattr__(self, name, absent_column(name, len(self.user)))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.user)

    @property
    def opened(self) -> NDArray[np.int64]:
        """`[n]` int64 offset of each row's own event; with `trained`, no two rows have one."""
        return self.offset - self.waited

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by name, as `encode` takes them."""
        return {name: getattr(self, name) for name in NAMES}

    def take(self, keep: NDArray[np.bool_]) -> MicroBatch:
        """The batch with only the rows that `keep` (`[n]` bool) names; the header stays."""
        if keep.all():
            return self
        return MicroBatch(self.header, **{name: column[keep] for name, column in self.columns.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch of events with their windows and what the histories gain by them.

    Attributes:
        batch: The events, in the order of arrival.
        features: `[n, D]` uint16.
        recent_categories: `[n, L]` uint64.
        category_windows: `[n, L, F]` uint16.
        appends: The events by user, for `HistoryStore.commit`.
        kind: `[n]` uint8 `Kind`; by default each event is a row.
        known: Impressions of before whose label became known.
        attributes: What is known of users and items; None where nothing is configured.
    """

    batch: EventBatch
    features: NDArray[np.uint16]
    recent_categories: NDArray[np.uint64]
    category_windows: NDArray[np.uint16]
    appends: Appends
    kind: NDArray[np.uint8] = field(default_factory=_unsaid)
    known: Known | None = None
    attributes: Joined | None = None

    def __len__(self) -> int:
        """The number of rows of a micro-batch."""
        return len(self.batch.offset) + (0 if self.known is None else len(self.known))

    def __bool__(self) -> bool:
        """None of them still moves positions."""
        return True

    @property
    def events(self) -> dict[str, NDArray[Any]]:
        """The columns of the events alone."""
        batch, rows = self.batch, len(self.batch.offset)
        added: dict[str, NDArray[Any]] = {"kind": self.kind, "request": batch.request}
        none = absent_column("user_attributes", rows)
        return {
            **{name: getattr(batch, name) for name in (*SCALARS, "context") if name not in SINCE_2},
            **{name: absent_column(name, rows) for name in SINCE_2},
            **{name: column for name, column in added.items() if len(column) == rows},
            "features": self.features,
            "recent_categories": self.recent_categories,
            "category_windows": self.category_windows,
            "user_attributes": none if self.attributes is None else self.attributes.user,
            "item_attributes": none if self.attributes is None else self.attributes.item,
        }

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of a micro-batch by name, each event before what it made known; `source` counts in the batch's ranges."""
        events = self.events
        if self.known is None or not len(self.known):
            return events
        assert self.known.columns is not None, "looked up before they are written"
        order = np.argsort(np.concatenate([np.arange(len(self.batch.offset)), self.known.by]), kind="stable")
        return {name: np.concatenate([events[name], self.known.columns[name]])[order] for name in events}


def encode(header: Header, columns: Columns) -> bytes:
    """The bytes of one micro-batch.

    Args:
        header: What the batch says about itself.
        columns: The arrays by name, shaped as in `MicroBatch`, with the types of `SCALARS` and `LISTS`; those of
            `SINCE_2` may be missing, and are 0 then, those of `ATTRIBUTES` empty.

    Raises:
        MicroBatchError: A column is missing, of another type or length, or does not fit the ranges.
    """
    if "user" in columns:
        columns = {name: absent_column(name, len(columns["user"])) for name in (*SINCE_2, *ATTRIBUTES)} | dict(columns)
    _check(header, columns)
    rows = len(columns["user"])
    arrays, fields = [], []
    for name in SCALARS:
        arrays.append(pa.array(columns[name]))
        fields.append(pa.field(name, arrays[-1].type, nullable=False))
    for name in LISTS:
        column = np.ascontiguousarray(columns[name])
        width = int(np.prod(column.shape[1:], dtype=np.int64))
        kind = pa.list_(pa.field("item", pa.from_numpy_dtype(column.dtype), nullable=False), width)
        # FixedSizeListArray.from_arrays cannot tell how many lists of nothing there are.
        arrays.append(pa.Array.from_buffers(kind, rows, [None], children=[pa.array(column.reshape(-1))]))
        fields.append(pa.field(WRITTEN.get(name, name), kind, nullable=False))
    document = {
        "format": FORMAT,
        "spec": header.spec,
        "salt": header.salt,
        "mask_generation": header.mask_generation,
        "ranges": [to_json(part) for part in header.ranges],
        "created_ms": header.created_ms,
        "label_shape": list(columns["category_windows"].shape[1:]),
        "names": {f"{key:016x}": name for key, name in header.names.items()},
        "attributes": header.attributes,
    }
    schema = pa.schema(fields, metadata={METADATA: json.dumps(document, separators=(",", ":")).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=_WRITE) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return bytes(sink.getvalue())


def decode(value: bytes) -> MicroBatch:
    """The micro-batch in `value`; its arrays are read-only views of the decoded buffers.

    Raises:
        MicroBatchError: `value` is no micro-batch of a format that this release reads, or contradicts itself.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(value), options=_READ) as reader:
            document = _document(reader.schema)
            batch = reader.read_next_batch()
        header = _header(document)
        columns: dict[str, NDArray[Any]] = {}
        for name in SCALARS:
            if name in SINCE_2 and document["format"] == 1:
                columns[name] = absent_column(name, batch.num_rows)
            else:
                columns[name] = batch.column(name).to_numpy(zero_copy_only=True)
        for name in LISTS:
            if name in ATTRIBUTES and document["format"] == 1:
                columns[name] = absent_column(name, batch.num_rows)
                continue
            lists = batch.column(WRITTEN.get(name, name))
            shape = document["label_shape"] if name == "category_windows" else [lists.type.list_size]
            columns[name] = lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), *shape)
    except MicroBatchError:
        raise
    # Arrow raises its own tree, OSError, StopIteration and KeyError for a damaged stream.
    except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError, TypeError) as error:
        raise MicroBatchError(
            f"a value of {len(value)} bytes is no micro-batch: {error or type(error).__name__}; "
            "check that the topic holds only what the stream wrote"
        ) from error
    _check(header, columns)
    return MicroBatch(header, **columns)


def split(header: Header, columns: Columns, max_record_bytes: int, max_rows: int = 2**31) -> list[bytes]:
    """The micro-batches within both limits that hold these rows in this order.

    Most batches fit at once. One that does not is halved by rows until its
    parts do; each part's ranges end where the next part's begin. The rows of
    one place stay together, even where they are more than `max_rows`.

    Raises:
        MicroBatchError: The rows of a single place exceed the limit, or the columns do not fit the header.
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
            f"a micro-batch of {rows} rows takes {len(value)} bytes, more than the {max_record_bytes} of a record; "
            "raise stream.max_record_bytes, and max.message.bytes of the topic"
        )
    parts = []
    for part_header, part_columns in _halves(header, columns, middle):
        parts.extend(split(part_header, part_columns, max_record_bytes, max_rows))
    return parts


def trim(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[NDArray[np.bool_], dict[Source, int]]:
    """Which rows are new to a reader that has everything below `marks`, and its marks afterwards.

    After a crash the stream writes rows again; their source positions tell.
    A source that `marks` does not name is new: all of its rows are.

    Returns:
        `[n]` bool, and the next offset of each source.
    """
    floors = np.array([marks.get(part.source, 0) for part in batch.header.ranges] or [0], np.int64)
    after = dict(marks)
    for part in batch.header.ranges:
        after[part.source] = max(part.next, marks.get(part.source, 0))
    return batch.offset >= floors[batch.source], after


def gaps(header: Header, marks: Mapping[Source, int]) -> list[tuple[Source, int, int]]:
    """The positions that no micro-batch covered: (source, the reader's mark, where the range begins)."""
    return [
        (part.source, marks[part.source], part.first)
        for part in header.ranges
        if part.source in marks and part.first > marks[part.source]
    ]


def _middle(columns: Columns) -> int:
    """The row nearest to the middle that begins a place; 0 where only the first one does."""
    sources, offsets = columns["source"], columns["offset"]
    begins = np.flatnonzero((sources[1:] != sources[:-1]) | (offsets[1:] != offsets[:-1])) + 1
    return int(begins[np.argmin(np.abs(begins - len(offsets) // 2))]) if len(begins) else 0


def _halves(header: Header, columns: Columns, middle: int) -> list[tuple[Header, Columns]]:
    """Both halves of a batch cut before row `middle`; empty ranges are left out of a half."""
    sources, offsets = columns["source"], columns["offset"]
    halves: list[tuple[Header, Columns]] = []
    ranges: tuple[list[Range], list[Range]] = ([], [])
    for index, whole in enumerate(header.ranges):
        of_source = np.flatnonzero(sources == index)
        later = of_source[of_source >= middle]
        at = int(offsets[later[0]]) if len(later) else whole.next
        below = counts(columns["kind"][of_source[: len(of_source) - len(later)]])
        before, after = split_range(whole, at, below.pop("rows"), below)
        ranges[0].append(before)
        ranges[1].append(after)
    for parts, rows, names in ((ranges[0], slice(None, middle), header.names), (ranges[1], slice(middle, None), {})):
        kept = [index for index, part in enumerate(parts) if part.next > part.first]
        index_of = np.zeros(max(len(parts), 1), np.uint16)
        index_of[kept] = np.arange(len(kept), dtype=np.uint16)
        half = {name: column[rows] for name, column in columns.items()}
        half["source"] = index_of[half["source"]]
        halves.append((replace(header, ranges=tuple(parts[index] for index in kept), names=names), half))
    return halves


def _document(schema: pa.Schema) -> dict[str, Any]:
    """The JSON header in a schema's metadata."""
    document = json.loads((schema.metadata or {}).get(METADATA, b"null"))
    if not isinstance(document, dict):
        raise MicroBatchError("an Arrow stream without a springtide header is no micro-batch; check the topic's name")
    if document.get("format") not in range(1, FORMAT + 1):
        raise MicroBatchError(
            f"a micro-batch of format {document.get('format')!r}; this release reads 1 and {FORMAT}: "
            "upgrade the reader before the stream"
        )
    return document


def _header(document: Mapping[str, Any]) -> Header:
    """The header in its JSON form."""
    return Header(
        spec=str(document["spec"]),
        salt=str(document["salt"]),
        ranges=tuple(from_json(part) for part in document["ranges"]),
        created_ms=int(document["created_ms"]),
        mask_generation=int(document["mask_generation"]),
        names={int(key, 16): str(name) for key, name in document["names"].items()},
        attributes=_names(*document.get("attributes", ((), ()))),
    )


def _names(users: Iterable[str], items: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(map(str, users)), tuple(map(str, items))


def _check(header: Header, columns: Columns) -> None:
    """Raises MicroBatchError unless columns agree with each other and with the ranges."""
    if missing := [name for name in NAMES if name not in columns]:
        raise MicroBatchError(f"a micro-batch without the columns {', '.join(missing)}")
    rows = len(columns["user"])
    for name, kind in (*SCALARS.items(), *LISTS.items()):
        column = columns[name]
        depth = 1 if name in SCALARS else 3 if name == "category_windows" else 2
        if column.dtype != kind or len(column) != rows or column.ndim != depth:
            raise MicroBatchError(
                f"column {name} is {column.dtype}{list(column.shape)}, expected {kind} with {rows} rows "
                f"and {depth} dimensions"
            )
    for name, names in zip(ATTRIBUTES, header.attributes, strict=True):
        if columns[name].shape[1] != len(names):
            raise MicroBatchError(
                f"column {name} has {columns[name].shape[1]} attributes, the header names {len(names)}"
            )
    sources, offsets = columns["source"], columns["offset"]
    if rows and int(sources.max()) >= len(header.ranges):
        raise MicroBatchError(f"a row names range {int(sources.max())}, the header has {len(header.ranges)}")
    kinds = columns["kind"]
    if rows and int(kinds.max()) >= KINDS:
        raise MicroBatchError(f"a row is of kind {int(kinds.max())}, there are {KINDS}")
    for part, found in zip(header.ranges, counts_by_range(kinds, sources, len(header.ranges)), strict=True):
        for name, count in found.items():
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
