"""Sends attributes of users and items from files to their compacted Kafka topics: `springtide attributes`."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import orjson

from deploy.replaying.sender import LARGEST_VALUE, Outbox, Piece, Progress, rows_within
from state.attributes.values import SIDES, AttributeTable, id_of, tables_of
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import DecodeError, SettingsError
from state.log import Topics, topic_plan
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.part import run_command, stop_on_signals
from state.recordings.files import Recording, find
from state.recordings.rows import RecordedRows, shown_reasons

Record = tuple[bytes, bytes]
Bad = tuple[int, str]
ENOUGH_ROWS = 10  # if so many rows give no record, the mapping is wrong
REFUSED = "refused row"
BY_SIDE = {"user": "users", "item": "items"}
NOT_THERE = "correct [attributes]"


@dataclass(frozen=True)
class AttributeFiles:
    """The files of one side (user or item), the topic of their records, and `key`, the column of the id."""

    side: str
    recording: Recording
    table: AttributeTable
    topic: str
    key: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys([self.key, *(attribute.path for attribute in self.table.fields)]))


@dataclass(frozen=True)
class AttributeRecords:
    """Key and value of each record that the stream accepts, and the refused rows with the reason.

    Attributes:
        valued: By attribute, the number of records that have a value.
    """

    records: list[Record]
    refused: list[Bad]
    valued: Counter[str]


def encode(rows: RecordedRows, files: AttributeFiles) -> AttributeRecords:
    """Encodes rows as records, and validates them as the stream does. The rows have the columns of `files`."""
    table, encoded = files.table, AttributeRecords([], [], Counter())
    paths = tuple(dict.fromkeys(attribute.path for attribute in table.fields))
    columns = [rows.columns[path] for path in paths]
    for row, (identity, *values) in enumerate(zip(rows.columns[files.key], *columns, strict=True)):
        try:
            key = None if type(identity) not in (str, int) else str(identity).encode()
            value = rows.text(row) if row in rows.broken else _value(dict(zip(paths, values, strict=True)), rows, row)
            texts = table.read(value, LARGEST_VALUE)
            id_of(key)
        except DecodeError as error:
            encoded.refused.append((row, str(error.reason)))
            continue
        assert key is not None
        encoded.records.append((key, value))
        encoded.valued.update(name for name, text in zip(table.names, texts, strict=True) if text is not None)
    return encoded


def _value(fields: dict[str, object], rows: RecordedRows, row: int) -> bytes:
    try:
        return orjson.dumps(fields)
    except (TypeError, ValueError):
        # JSON cannot represent this value; as text it is refused.
        return rows.text(row)


@dataclass
class SentAttributes:
    """The result of sending one side: records sent, rows refused by reason, and whether all files were read.

    Attributes:
        valued: By attribute, the number of records that have a value.
    """

    sent: int
    refused: Counter[str]
    valued: Counter[str]
    complete: bool = False


def send(
    files: AttributeFiles,
    deliver: Callable[[Piece], object],
    progress: Progress,
    stopped: threading.Event,
    wall_ms: Callable[[], int],
) -> SentAttributes:
    """Sends the records of all files of one side, until their ends or `stopped`.

    Raises:
        SettingsError: The columns do not fit, or none of the first rows is a record.
        SpringtideError: A file is truncated or damaged.
        LogError: Kafka refused a record, or did not answer. Run the command again.
    """
    outcome = SentAttributes(0, Counter(), Counter())
    for number, rows in rows_of_files(files):
        encoded = encode(rows, files)
        reasons = Counter(reason for _, reason in encoded.refused)
        if not outcome.sent and not encoded.records and len(rows) >= ENOUGH_ROWS:
            raise SettingsError(
                f"none of the first {len(rows):,} rows of {files.recording.files[number].path} is a record of "
                f"{article(files.side)}: {shown_reasons(reasons, REFUSED)}",
                f"{files.recording.remedy}; nothing was sent",
            )
        for row, reason in encoded.refused:
            progress.name(f"{files.recording.files[number].path}:{int(rows.lines[row])}", reason)
        outcome.refused += reasons
        outcome.valued += encoded.valued
        unsent = encoded.records
        while unsent:
            if stopped.is_set():
                return outcome
            count = rows_within([len(key) + len(value) for key, value in unsent])
            keys, values = zip(*unsent[:count], strict=True)
            deliver(Piece(keys, values, np.full(count, wall_ms(), np.int64)))
            unsent = unsent[count:]
            outcome.sent += count
            rows_read = outcome.sent + outcome.refused.total()
            progress.show(rows_read, rows_read, None, outcome.refused.total())
    outcome.complete = True
    return outcome


def rows_of_files(files: AttributeFiles) -> Iterator[tuple[int, RecordedRows]]:
    """The rows of all files, each part with the number of its file."""
    for number in range(len(files.recording.files)):
        for rows in files.recording.rows(number, files.columns):
            yield number, rows


def article(side: str) -> str:
    """Returns a side with its article, such as `an item`."""
    return f"an {side}" if side == "item" else f"a {side}"


def summary(files: AttributeFiles, outcome: SentAttributes, took_s: float) -> str:
    """Describes the result of a run.

    A name without a value in any record may be misspelled; JSON lines have no header to check.
    """
    rows_read = outcome.sent + outcome.refused.total()
    parts = [
        f"sent {outcome.sent:,} records of {BY_SIDE[files.side]} to {files.topic} in {took_s:.1f} s "
        f"({rows_read / took_s:,.0f} rows/s), {shown_reasons(outcome.refused, REFUSED)}",
    ]
    parts += [
        f"no record has a value for {attribute.name}: is the field {attribute.path!r} spelled so?"
        for attribute in files.table.fields
        if outcome.sent and not outcome.valued[attribute.name]
    ]
    parts.append(
        "complete" if outcome.complete else "stopped before the end: run the same command again to send everything"
    )
    return "; ".join(parts)


def files_of(options: argparse.Namespace, settings: Settings) -> list[AttributeFiles]:
    """Returns what to send, according to the command line and `[attributes]`.

    Raises:
        SettingsError: A side has no topic, no fields or no file, or its id no column.
    """
    patterns = {side: getattr(options, sides) for side, sides in BY_SIDE.items()}
    if not any(patterns.values()):
        raise SettingsError(
            "name what to send: --users FILE... or --items FILE...", "see `springtide attributes --help`"
        )
    if all(patterns.values()) and options.columns:
        raise SettingsError("--columns is for the files of one side: run the command once for users and once for items")
    tables, side_files = tables_of(settings.attributes), []
    for side in SIDES:
        if not patterns[side]:
            continue
        table, topic = tables.get(side), getattr(settings.attributes, f"{side}_topic")
        if table is None or not table.fields:
            missing = f"{side}_topic names no topic" if table is None else f"{side}_fields names no field"
            raise SettingsError(f"attributes.{missing}: nothing can be known of {BY_SIDE[side]}", "name it")
        key = getattr(options, f"{side}_id") or getattr(settings.events, side)
        if not key:
            raise SettingsError(f"events.{side} names no field: name the column of the id with --{side}-id")
        columns = tuple(options.columns.split(",")) if options.columns else ()
        files = find(patterns[side], options.format, options.delimiter)
        remedy = f"{NOT_THERE}, or name the column of the id with --{side}-id"
        side_files.append(AttributeFiles(side, Recording(files, columns, remedy=remedy), table, topic, key))
    return side_files


def run(
    options: argparse.Namespace,
    settings: Settings,
    stopped: threading.Event,
    say: Callable[[str], None] = print,
    progress_to: TextIO = sys.stderr,
) -> None:
    """Sends the files named on the command line.

    Raises:
        SpringtideError: Files, settings or Kafka cannot be used.
    """
    for files in files_of(options, settings):
        with Topics(settings.kafka) as topics:
            topics.ensure(*topic_plan.attributes_of(settings, files.topic))
        progress = Progress(progress_to, time.monotonic, f"record of {article(files.side)}", REFUSED)
        with Outbox(settings.kafka, files.topic) as outbox:
            outcome = send(files, outbox.send, progress, stopped, wall_ms)
        say(summary(files, outcome, progress.took_s))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""

    def work(arguments: Sequence[str]) -> None:
        flags, words = split_settings(arguments)
        options = parser_of("attributes").parse_args(words)
        stopped = stop_on_signals()
        run(options, load(flags), stopped)

    return run_command("springtide attributes", work, argv)


if __name__ == "__main__":
    sys.exit(main())
