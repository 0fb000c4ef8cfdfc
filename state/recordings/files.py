"""Finds files of clicks (CSV, JSON lines, Parquet), detects their format and reads their rows as columns in chunks."""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import io
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from state.config.sections import Events
from state.config.sources import nearest
from state.errors import SettingsError, SpringtideError
from state.recordings.rows import (
    EncodedRows,
    Encoder,
    RecordedRows,
    RecordedTimes,
    Span,
    described,
    mapped_fields,
    time_of,
)

FORMATS = ("csv", "json", "parquet")
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
BUFFER_BYTES = 1 << 20
MEMORY_PER_BYTE = {"csv": 6, "json": 3, "parquet": 30}
COMPRESSION = 6
MEMORY_SHARE = 0.7


CHUNK_ROWS = 8192
LONGEST_RECORD_LINES = 100  # a quoted field with more lines is a stray quote
REMEDY = "correct [events], or say --constant FIELD=VALUE"
BOM = b"\xef\xbb\xbf"

Record = tuple[int, bytes, list[str] | None]


def csv_rows(
    stream: BinaryIO,
    file: RecordedFile,
    wanted: Sequence[str],
    columns: Sequence[str] = (),
    chunk_rows: int = CHUNK_ROWS,
    remedy: str = REMEDY,
) -> Iterator[RecordedRows]:
    """Reads the fields `wanted` of a CSV file, `chunk_rows` rows at a time.

    `stream` has the file's uncompressed content. If `columns` is empty, the first line is the header. `remedy` is the advice for the
    error about a missing column.

    Raises:
        SettingsError: The file has no column for a wanted field.
    """
    names, records = _named(stream, str(file.path), columns, file.delimiter)
    index_of = {name: names.index(name) for name in wanted if name in names}
    missing = [name for name in wanted if name not in index_of]
    if missing:
        if columns:
            raise SettingsError(f"--columns {','.join(names)}: has no {missing[0]!r}", f"name the column, or {remedy}")
        raise SettingsError(
            _no_column(str(file.path), missing[0], names), f"{remedy}, or give --columns if the file has no header"
        )
    nothing = [None] * len(names)

    def rows_of(chunk: list[Record]) -> RecordedRows:
        cells = [record[2] or nothing for record in chunk]
        return RecordedRows(
            columns={name: [row[index] for row in cells] for name, index in index_of.items()},
            lines=np.array([record[0] for record in chunk], np.int64),
            broken=frozenset(row for row, record in enumerate(chunk) if record[2] is None),
            text=lambda row: chunk[row][1],
        )

    while chunk := list(islice(records, chunk_rows)):
        yield rows_of(chunk)


def _named(stream: BinaryIO, where: str, columns: Sequence[str], delimiter: str) -> tuple[list[str], Iterator[Record]]:
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
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None


def _records(lines: Iterator[tuple[int, bytes]], delimiter: str, width: int) -> Iterator[Record]:
    """Yields line number, text and cells of each row; cells are None unless the text has `width` cells."""
    waiting: deque[tuple[int, bytes]] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        number, text = line
        text = text.rstrip(b"\r\n")
        if not text.strip(b" "):
            continue
        cells = None
        if b'"' not in text or text.count(b'"') % 2 == 0:
            cells = _split(text, delimiter)
        else:
            # A quoted field may continue in the next lines. If no quote ends it, or the result is not a row, the quote
            # is stray and only its line is broken.
            pieces = [line]
            while len(pieces) < LONGEST_RECORD_LINES and (after := waiting.popleft() if waiting else next(lines, None)):
                pieces.append(after)
                if after[1].count(b'"') % 2:
                    joined = b"".join(line for _, line in pieces).rstrip(b"\r\n")
                    cells = _split(joined, delimiter)
                    break
            if cells is not None and len(cells) == width:
                text = joined
            else:
                waiting.extendleft(reversed(pieces[1:]))
        yield number, text, cells if cells is not None and len(cells) == width else None


def json_rows(
    stream: BinaryIO, where: str, wanted: Sequence[str], chunk_rows: int = CHUNK_ROWS
) -> Iterator[RecordedRows]:
    """Reads JSON lines, one object per line, `chunk_rows` at a time; fields other than `wanted` are skipped.

    Raises:
        SettingsError: The file is one JSON array.
    """
    decode = _decoder(wanted)
    numbered = ((number, line.removeprefix(BOM) if number == 1 else line) for number, line in enumerate(stream, 1))
    lines = ((number, line) for number, line in numbered if line.strip())
    first = True
    while chunk := list(islice(lines, chunk_rows)):
        if first and chunk[0][1].lstrip().startswith(b"["):
            raise SettingsError(
                f"{where}: a JSON array", "a recording has one object a line: `jq -c '.[]' FILE` makes one"
            )
        yield _json_chunk(chunk, wanted, decode)
        first = False


def _decoder(wanted: Sequence[str]) -> Callable[[bytes], tuple[Any, ...]]:
    fields: list[Any] = [(f"field_{index}", Any, None) for index in range(len(wanted))]
    rename = {f"field_{index}": name for index, name in enumerate(wanted)}
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


def _parquet_rows(path: Path, wanted: Sequence[str], chunk_rows: int, remedy: str) -> Iterator[RecordedRows]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for name in wanted:
            if name not in names:
                raise SettingsError(_no_column(str(path), name, names), remedy)
        first = 1
        for batch in file.iter_batches(batch_size=chunk_rows, columns=list(wanted)):
            columns = {name: _as_values(batch.column(name)) for name in wanted}

            def text(row: int, columns: Mapping[str, Sequence[Any]] = columns) -> bytes:
                return "; ".join(f"{name}: {values[row]!r}" for name, values in columns.items()).encode()

            yield RecordedRows(columns, np.arange(first, first + len(batch), dtype=np.int64), frozenset(), text)
            first += len(batch)


def _as_values(column: pa.Array) -> list[Any]:
    """Converts a column to Python values that JSON can represent; nulls and NaN become None.

    pandas writes a column of integers with gaps as floats. So 7.0 becomes 7, because it is likely an id.
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
        values = [None if value is None or math.isnan(value) else value for value in values]
        return [int(value) if value is not None and value.is_integer() else value for value in values]
    if pa.types.is_decimal(kind):
        values = [int(value) if value is not None and value == value.to_integral_value() else value for value in values]
        return [str(value) if isinstance(value, Decimal) else value for value in values]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [None if value is None else _as_text(value) for value in values]
    return values


def _as_text(value: bytes) -> str | bytes:
    """Decodes bytes as UTF-8. Other bytes stay bytes: JSON cannot represent them, so the row becomes a dead letter."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


@dataclass(frozen=True)
class RecordedFile:
    """A file of clicks: its path, its format (csv, json or parquet), and the delimiter of a CSV file."""

    path: Path
    format: str
    delimiter: str = ","


@dataclass(frozen=True)
class Recording:
    """Files of clicks, and how their columns map to fields.

    Attributes:
        columns: Column names of CSV files without a header; empty if they have one.
        constants: Field -> the value that each row has.
        remedy: Advice for the error about a field without a column.
    """

    files: tuple[RecordedFile, ...]
    columns: tuple[str, ...] = ()
    constants: Mapping[str, str] | None = None
    remedy: str = REMEDY

    def rows(self, number: int, fields: Sequence[str], chunk_rows: int = CHUNK_ROWS) -> Generator[RecordedRows]:
        """Reads the rows of file `number`, their `fields` as columns; constants are not read.

        Raises:
            SettingsError: The file has no column for a field.
            SpringtideError: The file is truncated or damaged.
        """
        file = self.files[number]
        wanted = [name for name in fields if name not in (self.constants or {})]
        last = 0
        try:
            if file.format == "parquet":
                chunks = _parquet_rows(file.path, wanted, chunk_rows, self.remedy)
            else:
                stream = _opened(file.path)
                chunks = (
                    csv_rows(stream, file, wanted, self.columns, chunk_rows, self.remedy)
                    if file.format == "csv"
                    else json_rows(stream, str(file.path), wanted, chunk_rows)
                )
            for rows in chunks:
                yield rows
                last = int(rows.lines[-1])
        except (OSError, pa.ArrowException) as error:
            unit = "row" if file.format == "parquet" else "line"
            raise SpringtideError(
                f"{file.path}: not readable as {file.format} after {unit} {last}: {error}",
                "repair the file, leave it out, or name its format with --format",
            ) from None

    def encoded(self, encoder: Encoder, events: Events, chunk_rows: int = CHUNK_ROWS) -> Generator[EncodedRows]:
        """Encodes all rows of all files as records, in the order of the files; raises the errors of `rows`."""
        fields = mapped_fields(events)
        for number in range(len(self.files)):
            with closing(self.rows(number, fields, chunk_rows)) as chunks:
                yield from (encoder.encode(rows, number) for rows in chunks)

    def times(self, events: Events, latest_ms: int) -> RecordedTimes:
        """Reads the time column of all files; a time after `latest_ms` counts as none. Raises the errors of `rows`."""
        field, unit, times = events.time, events.time_unit, RecordedTimes()
        if not field:
            return times
        if (constant := (self.constants or {}).get(field)) is not None:
            times.add(np.array([time_of(constant, unit, latest_ms)], np.int64), 0, np.ones(1, np.int64))
            return times
        for number in range(len(self.files)):
            with closing(self.rows(number, (field,))) as chunks:
                for rows in chunks:
                    at_ms = np.array([time_of(value, unit, latest_ms) for value in rows.columns[field]], np.int64)
                    times.add(at_ms, number, rows.lines)
        return times

    def described(self, span: Span, far_ms: int) -> str:
        """Describes the strays of a span of this recording; empty without any."""
        if span.first is None:
            return ""
        file, line = span.first
        return described(span, f"{self.files[file].path}:{line}", far_ms)


def _opened(path: Path) -> BinaryIO:
    """Opens a file decompressed; unlike gzip and zstandard readers, it refuses truncated files and reads all frames."""
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="detect"), BUFFER_BYTES))


def find(patterns: Sequence[str], format: str = "", delimiter: str = "") -> tuple[RecordedFile, ...]:
    """Finds the files that paths and globs name, each once, those of one glob sorted by name.

    An empty `format` is determined by the file's name. An empty `delimiter` of CSV is a tab for .tsv, else a comma.

    Raises:
        SettingsError: A pattern matches no file, or a file name does not reveal a format.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
        if not matches:
            raise SettingsError(f"{pattern}: no such file", "check the path")
        paths |= dict.fromkeys(map(Path, matches))
    return tuple(_described(path, format, delimiter) for path in paths)


def _described(path: Path, format: str, delimiter: str) -> RecordedFile:
    if not path.is_file():
        raise SettingsError(f"{path}: no file", f"name files, or a glob such as '{path}/*.csv'")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    kind = format or SUFFIXES.get(suffix, "")
    if not kind:
        raise SettingsError(f"{path}: its name has no known suffix", f"use --format {'|'.join(FORMATS)}")
    return RecordedFile(path, kind, delimiter or ("\t" if suffix == ".tsv" else ","))


def constants_of(written: Sequence[str], events: Events) -> dict[str, str]:
    """Parses constants written as `field=value`.

    Raises:
        SettingsError: A constant is malformed, or names a field that `[events]` does not have.
    """
    constants: dict[str, str] = {}
    fields = mapped_fields(events)
    for constant in written:
        name, equals, value = constant.partition("=")
        if not equals:
            raise SettingsError(f"constant {constant!r}: write FIELD=VALUE, such as action=view")
        if name not in fields:
            raise SettingsError(f"constant {constant!r}: [events] names no field {name!r}, only {', '.join(fields)}")
        constants[name] = value
    return constants


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_beyond_memory(recording: Recording, available: int) -> None:
    """Refuses to sort files that do not fit into memory.

    Raises:
        SettingsError: The files are too large.
    """
    needed = sum(
        file.path.stat().st_size
        * MEMORY_PER_BYTE[file.format]
        * (COMPRESSION if file.path.suffix.lower() in COMPRESSED else 1)
        for file in recording.files
    )
    if needed > available * MEMORY_SHARE:
        raise SettingsError(
            f"the files would take about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: "
            "sort them by time and use --sort assume, or read fewer at once"
        )


def as_settings(options: argparse.Namespace) -> list[str]:
    """Converts the options that are settings to their flags.

    >>> as_settings(argparse.Namespace(columns="user,time", constant=["action=view"]))
    ['--events.columns=user,time', '--events.constants=action=view']
    """
    flags = []
    for name, values in (
        ("columns", options.columns.split(",") if options.columns else []),
        ("constants", options.constant),
    ):
        if values:
            flags.append(f"--events.{name}={','.join(values)}")
    return flags


def chosen(options: argparse.Namespace, events: Events) -> Recording:
    """Builds the recording that the options and `[events]` describe.

    Raises:
        SettingsError: A file does not exist, its format is unknown, or `[events]` names no user.
    """
    recording = Recording(
        files=find(options.files, options.format, options.delimiter),
        columns=events.columns,
        constants=constants_of(events.constants, events),
    )
    if not events.user:
        raise SettingsError("events.user names no field: every click is some user's", "name it")
    return recording
