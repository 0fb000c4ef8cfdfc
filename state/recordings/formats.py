"""Reads rows from CSV, JSON lines and Parquet, as columns in chunks.

In CSV and JSON lines, a line that cannot be split into fields becomes a broken row of the result. It never raises an
exception and never affects other lines, so neither pyarrow's readers nor those of pandas can be used. Blank lines are
skipped. Parquet is read row group by row group.
"""

from __future__ import annotations

import csv
import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from state.config.sources import nearest
from state.errors import SettingsError
from state.recordings.rows import RecordedRows

CHUNK_ROWS = 8192
LONGEST_RECORD_LINES = 100  # a quoted field with more lines is a stray quote
REMEDY = "correct [events], or say --constant FIELD=VALUE"
BOM = b"\xef\xbb\xbf"

Record = tuple[int, bytes, list[str] | None]


def csv_rows(
    stream: BinaryIO,
    where: str,
    wanted: Sequence[str],
    columns: Sequence[str] = (),
    delimiter: str = ",",
    chunk_rows: int = CHUNK_ROWS,
    remedy: str = REMEDY,
) -> Iterator[RecordedRows]:
    """Reads CSV.

    Args:
        stream: The bytes.
        where: The file's name, for messages.
        wanted: The fields to read.
        columns: Column names of a file without a header; if empty, the first line is the header.
        delimiter: One character.
        chunk_rows: Rows at a time.
        remedy: Advice for the error about a missing column.

    Raises:
        SettingsError: The file has no column for a wanted field.
    """
    names, records = _named(stream, where, columns, delimiter)
    places = {name: names.index(name) for name in wanted if name in names}
    missing = [name for name in wanted if name not in places]
    if missing:
        if columns:
            raise SettingsError(f"--columns {','.join(names)}: has no {missing[0]!r}", f"name the column, or {remedy}")
        raise SettingsError(
            _no_column(where, missing[0], names), f"{remedy}, or give --columns if the file has no header"
        )
    nothing = [None] * len(names)

    def rows_of(chunk: list[Record]) -> RecordedRows:
        cells = [one[2] or nothing for one in chunk]
        return RecordedRows(
            columns={name: [row[place] for row in cells] for name, place in places.items()},
            lines=np.array([one[0] for one in chunk], np.int64),
            broken=frozenset(row for row, one in enumerate(chunk) if one[2] is None),
            text=lambda row: chunk[row][1],
        )

    yield from (rows_of(chunk) for chunk in _chunks(records, chunk_rows))


def _named(stream: BinaryIO, where: str, columns: Sequence[str], delimiter: str) -> tuple[list[str], Iterator[Record]]:
    """Returns the column names and the rows below the header."""
    lines = enumerate(stream, 1)
    for number, line in lines:
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            break
    else:
        return list(columns), iter(())
    first = _split(text.rstrip(b"\r\n"), delimiter) or []
    if not columns:
        return [name.strip() for name in first], _records(lines, delimiter, len(first))
    names = list(columns)
    if [name.strip() for name in first] == names:
        return names, _records(lines, delimiter, len(names))
    if len(first) != len(names):
        raise SettingsError(
            f"{where}:{number}: {len(first)} columns, but --columns names {len(names)}: {','.join(names)}",
            "name each, `-` for one not needed",
        )

    def from_first() -> Iterator[tuple[int, bytes]]:
        yield number, text
        yield from lines

    return names, _records(from_first(), delimiter, len(names))


def _no_column(where: str, missing: str, names: Sequence[str]) -> str:
    near = nearest(missing, dict.fromkeys(names or ["none"]))
    return f"{where}: no column {missing!r} (the nearest is {near!r}); it has {', '.join(names[:30])}"


def _split(text: bytes, delimiter: str) -> list[str] | None:
    """Splits one line into cells; None if it is not UTF-8 or its quotes are wrong.

    >>> _split(b'1,"a, b",c', ","), _split(b'1,"a', ",")
    (['1', 'a, b', 'c'], None)
    """
    try:
        line = text.decode()
    except UnicodeDecodeError:
        return None
    return _quoted(line, delimiter) if '"' in line else line.split(delimiter)


def _quoted(text: str, delimiter: str) -> list[str] | None:
    r"""Splits `text`, which must be one record, into cells; None if its quotes are wrong.

    >>> _quoted('1,"two\nlines"', ",")
    ['1', 'two\nlines']
    """
    try:
        found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return found[0] if len(found) == 1 else None


def _records(lines: Iterator[tuple[int, bytes]], delimiter: str, width: int) -> Iterator[Record]:
    """Yields line number, text and cells of each row; cells are None unless the text has `width` cells."""
    waiting: deque[tuple[int, bytes]] = deque()
    while (found := waiting.popleft() if waiting else next(lines, None)) is not None:
        number, text = found
        text = text.rstrip(b"\r\n")
        if not text.strip(b" "):
            continue
        cells = None
        if b'"' not in text or text.count(b'"') % 2 == 0:
            cells = _split(text, delimiter)
        else:
            # A quoted field may continue in the next lines. If no quote ends it, or the result is not a row, the quote
            # is a stray one and only its line is broken.
            held = [found]
            while len(held) < LONGEST_RECORD_LINES and (more := waiting.popleft() if waiting else next(lines, None)):
                held.append(more)
                if more[1].count(b'"') % 2:
                    whole = b"".join(line for _, line in held).rstrip(b"\r\n")
                    cells = _split(whole, delimiter)
                    break
            if cells is not None and len(cells) == width:
                text = whole
            else:
                waiting.extendleft(reversed(held[1:]))
        yield number, text, cells if cells is not None and len(cells) == width else None


def json_rows(
    stream: BinaryIO, where: str, wanted: Sequence[str], chunk_rows: int = CHUNK_ROWS
) -> Iterator[RecordedRows]:
    """Reads JSON lines: one object a line.

    Args:
        stream: The bytes.
        where: The file's name, for messages.
        wanted: The fields to read; other fields are skipped.
        chunk_rows: Rows at a time.

    Raises:
        SettingsError: The file is one JSON array.
    """
    decode = _decoder(wanted)
    numbered = ((number, line.removeprefix(BOM) if number == 1 else line) for number, line in enumerate(stream, 1))
    lines = ((number, line) for number, line in numbered if line.strip())
    first = True
    for chunk in _chunks(lines, chunk_rows):
        if first and chunk[0][1].lstrip().startswith(b"["):
            raise SettingsError(
                f"{where}: a JSON array", "a recording has one object a line: `jq -c '.[]' FILE` makes one"
            )
        yield _json_chunk(chunk, wanted, decode)
        first = False


def _decoder(wanted: Sequence[str]) -> Callable[[bytes], tuple[Any, ...]]:
    """Returns a decoder that reads the wanted fields of one object, in their order."""
    fields: list[Any] = [(f"field_{place}", Any, None) for place in range(len(wanted))]
    rename = {f"field_{place}": name for place, name in enumerate(wanted)}
    decode = msgspec.json.Decoder(msgspec.defstruct("Row", fields, rename=rename, gc=False)).decode
    return lambda line: msgspec.structs.astuple(decode(line))


def _json_chunk(
    chunk: list[tuple[int, bytes]], wanted: Sequence[str], decode: Callable[[bytes], tuple[Any, ...]]
) -> RecordedRows:
    nothing = (None,) * len(wanted)
    rows: list[tuple[Any, ...]] = []
    broken: list[int] = []
    for row, (_, line) in enumerate(chunk):
        try:
            rows.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            rows.append(nothing)
            broken.append(row)
    return RecordedRows(
        columns=dict(zip(wanted, zip(*rows, strict=True), strict=True)),
        lines=np.array([number for number, _ in chunk], np.int64),
        broken=frozenset(broken),
        text=lambda row: chunk[row][1].strip(),
    )


def _chunks(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == count:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


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
                raise SettingsError(_no_column(str(path), name, names), remedy)
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
