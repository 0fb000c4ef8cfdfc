"""Rows of files as records of attributes, judged as the stream judges them. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import orjson

from state.attributes.values import AttributeTable, id_of
from state.errors import DecodeError
from state.recordings.files import Recording
from state.recordings.rows import RecordedRows

Record = tuple[bytes, bytes]
Bad = tuple[int, str]


@dataclass(frozen=True)
class AttributeFiles:
    """The files of one side and what they are.

    Attributes:
        side: user or item.
        recording: The files.
        table: What a record says.
        topic: Where records go.
        key: The column of the id.
        most_bytes: Larger records are refused.
    """

    side: str
    recording: Recording
    table: AttributeTable
    topic: str
    key: str
    most_bytes: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys([self.key, *(one.path for one in self.table.fields)]))


@dataclass(frozen=True)
class AttributeRecords:
    """Rows as records.

    Attributes:
        records: Key and value of each that the stream takes.
        refused: Rows that it does not, with the reason.
        valued: Per attribute the records that have a value.
    """

    records: list[Record]
    refused: list[Bad]
    valued: Counter[str]


def encode(rows: RecordedRows, files: AttributeFiles) -> AttributeRecords:
    """The records of rows, judged as the stream judges them.

    Args:
        rows: With the columns of `files`.
        files: What they are.
    """
    table, made = files.table, AttributeRecords([], [], Counter())
    paths = tuple(dict.fromkeys(one.path for one in table.fields))
    columns = [rows.columns[path] for path in paths]
    for row, (one, *values) in enumerate(zip(rows.columns[files.key], *columns, strict=True)):
        try:
            key = None if type(one) not in (str, int) else str(one).encode()
            value = rows.text(row) if row in rows.broken else _value(dict(zip(paths, values, strict=True)), rows, row)
            texts = table.read(value, files.most_bytes)
            id_of(key)
        except DecodeError as error:
            made.refused.append((row, str(error.reason)))
            continue
        assert key is not None
        made.records.append((key, value))
        made.valued.update(name for name, text in zip(table.names, texts, strict=True) if text is not None)
    return made


def _value(fields: dict[str, object], rows: RecordedRows, row: int) -> bytes:
    try:
        return orjson.dumps(fields)
    except (TypeError, ValueError):
        # No JSON has such a value; as text it is refused.
        return rows.text(row)
