"""Attributes of users and items out of files, into their compacted topics.

    python -m deploy.attributes --users FILE... --items FILE... [--columns A,B,...] [--format F] [--delimiter C]

    read -> encode -> judge -> send -> acknowledged

A row becomes a record: its key is the id, its fields are those that
`[attributes]` names. The stream's own code judges each record first. What it
would refuse is not sent, so that the record which the topic has of that id
stays; it is named and counted. The last row of an id wins, and a run that
ended early is simply run again.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from deploy.operate.options import SETTINGS_HELP
from deploy.replaying.attribute_records import AttributeFiles
from deploy.replaying.attribute_sending import BY_SIDE, REFUSED, article, send, summary
from deploy.replaying.progress import Progress
from deploy.replaying.sender import LARGEST_VALUE, Outbox
from state.attributes.values import SIDES, tables_of
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.log import Topics, topic_plan
from state.process.closed_output import while_read
from state.process.ending import stop_on_signals
from state.process.wall_clock import wall_ms
from state.recordings.files import Recording, find
from state.recordings.options import add_format_arguments

NOT_THERE = "correct [attributes]"


def parser() -> argparse.ArgumentParser:
    """The command's options; settings are taken out of the line before."""
    made = argparse.ArgumentParser(
        prog="springtide attributes",
        description="Write attributes of users and items to their compacted topics. [attributes] names the topics and "
        "the columns. The last row of an id wins; sending again changes nothing.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    for side, sides in BY_SIDE.items():
        made.add_argument(
            f"--{sides}", nargs="+", default=[], metavar="FILE", help=f"of {sides}: CSV, JSON lines or Parquet; .gz, .zst; globs"
        )  # fmt: skip
        made.add_argument(
            f"--{side}-id", default="", metavar="NAME", help=f"the column of the {side}'s id (default: events.{side})"
        )
    add_format_arguments(made, ", of one side")
    return made


def files_of(options: argparse.Namespace, settings: Settings) -> list[AttributeFiles]:
    """What the command line and `[attributes]` say to send.

    Raises:
        SettingsError: A side has no topic, no fields or no file, or its id no column.
    """
    asked = {side: getattr(options, sides) for side, sides in BY_SIDE.items()}
    if not any(asked.values()):
        raise SettingsError(
            "say what to send: --users FILE... or --items FILE...", "see `springtide attributes --help`"
        )
    if all(asked.values()) and options.columns:
        raise SettingsError("--columns is of the files of one side: run the command for users and for items")
    tables, found = tables_of(settings.attributes), []
    for side in SIDES:
        if not asked[side]:
            continue
        table, topic = tables.get(side), getattr(settings.attributes, f"{side}_topic")
        if table is None or not table.fields:
            missing = f"{side}_topic names no topic" if table is None else f"{side}_fields names no field"
            raise SettingsError(f"attributes.{missing}: nothing can be known of {BY_SIDE[side]}", "name it")
        key = getattr(options, f"{side}_id") or getattr(settings.events, side)
        if not key:
            raise SettingsError(f"events.{side} names no field: name the column of the id with --{side}-id")
        columns = tuple(options.columns.split(",")) if options.columns else ()
        files = find(asked[side], options.format, options.delimiter)
        remedy = f"{NOT_THERE}, or name the column of the id with --{side}-id"
        most_bytes = min(settings.events.max_event_bytes, LARGEST_VALUE)
        found.append(AttributeFiles(side, Recording(files, columns, remedy=remedy), table, topic, key, most_bytes))
    return found


def run(
    options: argparse.Namespace,
    settings: Settings,
    stopped: threading.Event,
    say: Callable[[str], None] = print,
    progress_to: TextIO = sys.stderr,
) -> None:
    """Sends the files of the command line.

    Raises:
        SpringtideError: Files, settings or Kafka are in the way.
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
    flags, words = split_settings(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(words)
    stopped = stop_on_signals()
    try:
        run(options, load(flags), stopped)
    except SpringtideError as problem:
        print(f"springtide attributes: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(while_read(main))
