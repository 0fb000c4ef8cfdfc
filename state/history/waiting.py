"""The rows that wait for their label, as the history store keeps them: one key and one value each.

    key     topic id (16 bytes), partition (4, BE), offset (8, BE)
    value   the row's columns of a micro-batch, concatenated, with fixed widths

The store keeps the widths as an extra. If they have changed since (feature spec, context fields, release), each row is
read with the old widths. A column that was missing, or had another shape, is 0, as for an event without a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from state.errors import CorruptStore
from state.features.erased import Erased
from state.microbatch.batch import DTYPES, WRITTEN, Columns
from state.positions import Range, Source

WIDTHS = "waiting"  # name of the store's extra
CLOCKS = "clocks"  # name of the extra in which release 0.1.0 kept the newest event time of each source

KEY_BYTES = 28

Changes = dict[bytes, bytes | None]
Extra = dict[str, bytes]


def key_of(source: Source, offset: int) -> bytes:
    """The key of the row at `offset`."""
    return bytes.fromhex(source.topic_id) + source.partition.to_bytes(4, "big") + offset.to_bytes(8, "big")


def place_of(key: bytes) -> tuple[Source, int]:
    """The source and offset in a key."""
    return Source(key[:16].hex(), int.from_bytes(key[16:20], "big")), int.from_bytes(key[20:KEY_BYTES], "big")


class RowFormat:
    """The column widths of waiting rows, by column without the row dimension; encodes and decodes rows.

    Raises:
        CorruptStore: This release does not know a column.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if unknown := shapes.keys() - DTYPES.keys():
            raise CorruptStore(
                f"rows wait with columns of a later release: {', '.join(sorted(unknown))}", "use that one"
            )
        self.shapes = {name: tuple(shapes[name]) for name in DTYPES if name in shapes}
        self.dtype = np.dtype([(name, DTYPES[name], shape) for name, shape in self.shapes.items()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFormat) and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(tuple(self.shapes.items()))

    @classmethod
    def of(cls, columns: Columns) -> RowFormat:
        """The format for rows with these columns."""
        return cls({name: columns[name].shape[1:] for name in DTYPES if name in columns})

    def to_json(self) -> bytes:
        """Encodes the format as the store keeps it."""
        return json.dumps({WRITTEN.get(name, name): list(shape) for name, shape in self.shapes.items()}).encode()

    @classmethod
    def from_json(cls, value: bytes) -> RowFormat:
        """Decodes the output of `to_json`; CorruptStore if a later release wrote it."""
        names = {written: name for name, written in WRITTEN.items()}
        return cls({names.get(name, name): shape for name, shape in json.loads(value).items()})

    def pack(self, columns: Columns) -> list[bytes]:
        """A value for each row, without the column `source`, which is valid only within one micro-batch."""
        rows = np.zeros(len(columns["user"]), self.dtype)
        for name in self.shapes:
            if name != "source":
                rows[name] = columns[name]
        data, size = rows.tobytes(), self.dtype.itemsize
        return [data[at : at + size] for at in range(0, len(data), size)]

    def unpack(self, values: Sequence[bytes]) -> dict[str, NDArray[Any]]:
        """Decodes rows to columns; CorruptStore if a value has another length."""
        if any(len(value) != self.dtype.itemsize for value in values):
            raise CorruptStore(
                f"a row that waits has not {self.dtype.itemsize} bytes",
                "`springtide rebuild-history` rebuilds the store",
            )
        rows = np.frombuffer(b"".join(values), self.dtype)
        return {name: np.ascontiguousarray(rows[name]) for name in self.shapes}

    def convert(self, values: Sequence[bytes], target: RowFormat) -> list[bytes]:
        """Converts rows to another format."""
        old = self.unpack(values)
        return target.pack(
            {
                name: old[name] if self.shapes.get(name) == shape else np.zeros((len(values), *shape), DTYPES[name])
                for name, shape in target.shapes.items()
            }
        )


class WaitingStore(Protocol):
    """The interface of a store of waiting rows: that of a stream, or of one bucket of its users."""

    def extra(self, name: str) -> bytes | None:
        """The value of an extra; None if there is none."""
        ...

    def waiting(self) -> Iterator[tuple[bytes, bytes]]:
        """The waiting rows in the order of their keys."""
        ...

    def waiting_values(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The waiting rows under `keys`; None for a key without one."""
        ...


class WaitingRows:
    """The waiting rows of a store in one format, whichever release and settings wrote them. Not thread-safe."""

    def __init__(self, store: WaitingStore) -> None:
        self._store = store
        stored = store.extra(WIDTHS)
        self.format = None if stored is None else RowFormat.from_json(stored)

    def adopt(self, columns: Columns, changes: Changes, extra: Extra) -> RowFormat:
        """The format of `columns`; if it differs from the stored format, all waiting rows are converted."""
        now = RowFormat.of(columns)
        if now != self.format:
            if self.format is not None:
                for key, value in {**dict(self._store.waiting()), **changes}.items():
                    changes[key] = None if value is None else self.format.convert([value], now)[0]
            extra[WIDTHS] = now.to_json()
            self.format = now
        return now

    def values(self, keys: Sequence[bytes], changes: Mapping[bytes, bytes | None]) -> list[bytes | None]:
        """The waiting rows under `keys`, from `changes` or else the store; None for a key without one."""
        unchanged = [key for key in keys if key not in changes]
        stored = dict(zip(unchanged, self._store.waiting_values(unchanged), strict=True)) if unchanged else {}
        return [changes[key] if key in changes else stored[key] for key in keys]

    def of_erased(self, erased: Erased) -> list[bytes]:
        """The keys of the waiting rows of erased users; CorruptStore if a row cannot be read."""
        rows = dict(self._store.waiting()) if self.format is not None else {}
        if self.format is None or not rows:
            return []
        keys, positions = [*rows], [place_of(key) for key in rows]
        sources = {source: number for number, source in enumerate(dict.fromkeys(source for source, _ in positions))}
        is_erased = erased.rows(
            self.format.unpack([*rows.values()])["user"],
            np.array([sources[source] for source, _ in positions], np.uint16),
            np.array([offset for _, offset in positions], np.int64),
            [Range(source, 0, 0) for source in sources],
        )
        return [keys[row] for row in np.flatnonzero(is_erased).tolist()]


def keys_of(sources: Sequence[Source], source: NDArray[np.uint16], offset: NDArray[np.int64]) -> list[bytes]:
    """The store's keys of rows; `source` is an index of `sources`."""
    return [
        key_of(sources[number], position) for number, position in zip(source.tolist(), offset.tolist(), strict=True)
    ]


def decode_clocks(value: bytes | None) -> dict[Source, int]:
    """Decodes the newest event time of each source, as release 0.1.0 kept it."""
    return {Source.parse(source): int(at_ms) for source, at_ms in json.loads(value or b"{}").items()}
