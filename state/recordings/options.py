"""Options of commands that read files of clicks: the files, their format, and how columns map to fields."""

from __future__ import annotations

import argparse

from state.config.sections import Events
from state.errors import SettingsError
from state.recordings.files import FORMATS, Recording, constants_of, find


def add_file_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds `FILE...` and the options for reading the files.

    Args:
        parser: The parser to extend.
        about: What the command does with the rows, one or two sentences for its help.
    """
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
    """Adds the options for the format of the files.

    Args:
        parser: The parser, or a group of its options.
        of: Text for the help that says which files `--columns` applies to; empty for all.
    """
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
