"""Builds the parsers of the commands from `commands.toml`, which has their help and their options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from state.config.sources import span_ms
from state.errors import SettingsError

SETTINGS_HELP = (
    "Settings are written --section.name VALUE (also --config FILE, --bootstrap-servers HOST:PORT, --state DIRECTORY); "
    "`springtide config` lists them. Exit codes: 0 done, 1 failed, 2 wrong use."
)
_UNKNOWN = re.compile(r"argument .+: invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)
"""argparse's message for a word that is not one of its choices."""
Options = Mapping[str, Mapping[str, Any]]
"""By the names of an option, the keywords of `add_argument`; `commands.toml` describes the others."""


class OptionGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options that several commands have; with a title they are apart in the help."""

    options: dict[str, dict[str, Any]]
    title: str = ""
    description: str = ""


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command as `commands.toml` describes it."""

    help: str
    more: str = ""
    description: str = ""
    epilog: str = SETTINGS_HELP
    options: dict[str, dict[str, Any]] = {}

    @property
    def about(self) -> str:
        """The description at the beginning of its help."""
        return self.description or f"{self.help} {self.more}".strip()


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of `commands.toml`."""

    options: dict[str, dict[str, Any]]
    groups: dict[str, OptionGroup]
    commands: dict[str, Command]


@cache
def source() -> Source:
    """Returns the contents of `commands.toml`."""
    return msgspec.toml.decode(Path(__file__).with_name("commands.toml").read_bytes(), type=Source)


class RefusingParser(argparse.ArgumentParser):
    """An argument parser that raises Springtide's errors, and suggests the nearest word for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raises a `SettingsError`.

        >>> RefusingParser(prog="springtide").error("argument COMMAND: invalid choice: 'statsu' (choose from 'up', 'status')")
        Traceback (most recent call last):
        state.errors.SettingsError: 'statsu' is unknown; did you mean `status`? `springtide --help` lists all
        """
        if (unknown := _UNKNOWN.fullmatch(message)) is None:
            raise SettingsError(message, f"see `{self.prog} --help`")
        choice, choices = unknown.groups()
        near = difflib.get_close_matches(choice, re.findall(r"'([^']*)'", choices), 1)
        do = f"did you mean `{near[0]}`? `{self.prog} --help` lists all" if near else f"`{self.prog} --help` lists all"
        raise SettingsError(f"{choice!r} is unknown", do)


def parser_of(name: str) -> RefusingParser:
    """Returns the parser of a command; settings are parsed separately.

    >>> parser_of("probe").parse_args(["--url", "http://host:8501"]).url
    'http://host:8501'
    """
    command = source().commands[name]
    parser = RefusingParser(
        prog=f"springtide {name}", description=command.about, epilog=command.epilog, allow_abbrev=False
    )
    add_options(parser, command.options)
    return parser


def add_commands(parser: RefusingParser, dest: str, names: Iterable[str], own_help: Container[str] = ()) -> None:
    """Adds commands to a parser, which stores the last word of the given one's name at `dest`.

    Those of `own_help` parse their options themselves, and explain them.
    """
    commands = parser.add_subparsers(dest=dest, metavar=dest.upper(), required=True, title="commands")
    for name in names:
        command, has_own = source().commands[name], name in own_help
        added = commands.add_parser(
            name.rpartition(" ")[2],
            help=command.help,
            description=command.help if has_own else command.about,
            epilog=SETTINGS_HELP,
            allow_abbrev=False,
            add_help=not has_own,
        )
        add_options(added, {} if has_own else command.options)


def add_options(parser: argparse._ActionsContainer, options: Options, changes: Options | None = None) -> None:
    """Adds options to a parser or a group; `changes` has other keywords for some of them."""
    exclusive: dict[str, argparse._ActionsContainer] = {}
    for names, declared in options.items():
        keywords = {**declared, **(changes or {}).get(names, {})}
        if names.startswith("*"):
            _add_group(parser, source().groups[names[1:]], keywords)
            continue
        keywords = {**source().options.get(keywords.pop("like", ""), {}), **keywords}
        target = parser
        if kind := keywords.pop("one_of", ""):
            if kind not in exclusive:
                exclusive[kind] = parser.add_mutually_exclusive_group()
            target = exclusive[kind]
        if keywords.get("action") == "append":
            keywords.setdefault("default", [])
        if "type" in keywords:
            keywords["type"] = TYPES[keywords["type"]]
        if isinstance(keywords.get("metavar"), list):
            keywords["metavar"] = tuple(keywords["metavar"])
        keywords.setdefault("help", argparse.SUPPRESS)
        target.add_argument(*names.split(), **keywords)


def _add_group(parser: argparse._ActionsContainer, group: OptionGroup, changes: dict[str, Any]) -> None:
    title, description = (changes.pop(name, getattr(group, name)) for name in ("title", "description"))
    target = parser.add_argument_group(title, description) if title else parser
    add_options(target, group.options, changes)


def positive(text: str) -> int:
    """Parses an integer that is at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parses seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be seconds from 0 on, not {text!r}")
    return value


def amount(text: str) -> float:
    """Parses a number above 0, also written as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def span_s(text: str) -> float:
    """Parses a duration to seconds."""
    if not (span := span_ms(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 30m, 2h or 90s")
    return span / 1000


TYPES: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "path": Path,
    "amount": amount,
    "positive": positive,
    "seconds": seconds,
    "span": span_s,
}
"""The types of options by their name in `commands.toml`."""
