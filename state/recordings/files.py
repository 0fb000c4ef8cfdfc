"""Finds files of clicks, detects their format, reads their rows as columns in chunks; and the options that name them.

    CSV         .csv .tsv .txt
    JSON lines  .json .jsonl .ndjson
    Parquet     .parquet .pq

CSV and JSON lines may be compressed (.gz .zst .bz2 .lz4). Only the columns
that `[events]` names are read, so an outcome that nobody mapped cannot become
a feature.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from state.config.sections import Events
from state.errors import SettingsError, UnreadableRecording
from state.recordings.formats import CHUNK_ROWS, REMEDY, csv_rows, json_rows, parquet_rows
from state.recordings.rows import EncodedRows, Encoder, RecordedRows, mapped_fields

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
        files: The files in read order.
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
            UnreadableRecording: The file is truncated or damaged.
        """
        file = self.files[number]
        wanted = [name for name in fields if name not in (self.constants or {})]
        last = 0
        try:
            if file.format == "parquet":
                chunks = parquet_rows(file.path, wanted, chunk_rows, self.remedy)
            else:
                stream = _opened(file.path)
                where = str(file.path)
                chunks = (
                    csv_rows(stream, where, wanted, self.columns, file.delimiter, chunk_rows, self.remedy)
                    if file.format == "csv"
                    else json_rows(stream, where, wanted, chunk_rows)
                )
            for rows in chunks:
                yield rows
                last = int(rows.lines[-1])
        except (OSError, pa.ArrowException) as error:
            unit = "row" if file.format == "parquet" else "line"
            raise UnreadableRecording(
                f"{file.path}: not readable as {file.format} after {unit} {last}: {error}",
                "repair the file, leave it out, or name its format with --format",
            ) from None

    def encoded(self, encoder: Encoder, events: Events) -> Iterator[EncodedRows]:
        """Encodes all rows of all files as records, in the order of the files.

        Raises:
            SettingsError: As `rows`.
            UnreadableRecording: As `rows`.
        """
        fields = mapped_fields(events)
        for number in range(len(self.files)):
            for rows in self.rows(number, fields):
                yield encoder.encode(rows, number)


def _opened(path: Path) -> BinaryIO:
    """Opens a file decompressed. Unlike the gzip and zstandard readers, it refuses a truncated file and reads all frames."""
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="detect"), BUFFER_BYTES))


def find(patterns: Sequence[str], format: str = "", delimiter: str = "") -> tuple[RecordedFile, ...]:
    """Finds the files that paths and globs name, each once, those of one glob sorted by name.

    Args:
        patterns: Paths, or globs that the shell did not expand.
        format: One of FORMATS; if empty, the file name decides.
        delimiter: Delimiter of CSV; if empty, a tab for .tsv, else a comma.

    Raises:
        SettingsError: A pattern matches no file, or a file name does not reveal a format.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
        if not found:
            raise SettingsError(f"{pattern}: no such file", "check the path")
        paths |= dict.fromkeys(map(Path, found))
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
        raise SettingsError(f"{path}: its name does not tell its format", f"say --format {'|'.join(FORMATS)}")
    return RecordedFile(path, kind, delimiter or ("\t" if suffix == ".tsv" else ","))


def constants_of(written: Sequence[str], events: Events) -> dict[str, str]:
    """Parses constants written as `field=value`.

    Raises:
        SettingsError: A constant is malformed, or names a field that `[events]` does not have.
    """
    constants: dict[str, str] = {}
    fields = mapped_fields(events)
    for one in written:
        name, equals, value = one.partition("=")
        if not equals:
            raise SettingsError(f"constant {one!r}: write FIELD=VALUE, such as action=view")
        if name not in fields:
            raise SettingsError(f"constant {one!r}: [events] names no field {name!r}, only {', '.join(fields)}")
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
            "sort them by time and say --sort assume, or read fewer at once"
        )


def add_file_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds `FILE...` and the options for reading the files; `about` tells in the help what the command does with the rows."""
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="files or globs: CSV, JSON lines or Parquet; .gz, .zst"
    )
    group = parser.add_argument_group(
        "files", f"Columns are mapped by the names in [events], as for the topic. {about}"
    )
    add_format_arguments(group)
    group.add_argument(
        "--constant", action="append", default=[], metavar="FIELD=VALUE", help="field with the same value in every row"
    )
    group.add_argument(
        "--allow-outcome",
        action="append",
        default=[],
        metavar="NAME",
        help="allow an outcome (events.outcomes) as a feature",
    )
    group.add_argument(
        "--sort",
        choices=("memory", "assume"),
        default="memory",
        help="memory: read everything and sort it by time (default); assume: the files are already sorted",
    )


def add_format_arguments(parser: argparse._ActionsContainer, of: str = "") -> None:
    """Adds the options for the format of the files; `of` tells in the help which files `--columns` applies to."""
    parser.add_argument(
        "--format", choices=FORMATS, default="", help="format of all files (default: from the name of each file)"
    )
    parser.add_argument("--delimiter", default="", metavar="C", help="CSV delimiter (default , or a tab for .tsv)")
    parser.add_argument(
        "--columns",
        default="",
        metavar="A,B,...",
        help=f"column names of CSV files without a header{of}; - skips a column",
    )


def as_settings(options: argparse.Namespace) -> list[str]:
    """Converts the options that are settings to their flags.

    >>> as_settings(argparse.Namespace(columns="user,time", constant=["action=view"], allow_outcome=[]))
    ['--events.columns=user,time', '--events.constants=action=view']
    """
    flags = []
    for name, values in (
        ("columns", options.columns.split(",") if options.columns else []),
        ("constants", options.constant),
        ("allow_outcomes", options.allow_outcome),
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
