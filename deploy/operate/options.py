"""Arguments of `springtide rollback`, `erase`, `masks`, `unmask` and `schema`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Add = Callable[..., argparse.ArgumentParser]
"""Adds a command with its name, help and description."""

WAIT_S = 10.0
SETTINGS_HELP = (
    "Settings are written --section.name VALUE (also --config FILE, --bootstrap-servers HOST:PORT, --state DIRECTORY); "
    "`springtide config` lists them. Exit codes: 0 done, 1 failed, 2 wrong use."
)


def rollback(add: Add) -> argparse.ArgumentParser:
    """Adds `rollback` and returns its parser."""
    command = add(
        "rollback",
        "Go back to a version, and train on from it without the clicks you name.",
        "Answers turn first, and stay at the version until `springtide follow`; then the plan is counted in the training log "
        "and told. The version has learned none of the clicks named, or the command is refused with the newest that has not. "
        "Nothing is deleted. With --mode fast the trainer replays the log without the masked rows, and rows after them keep "
        "the windows they were written with; with --mode exact the stream goes back too, and reads its clicks again without "
        "them.",
    )
    target = command.add_mutually_exclusive_group()
    target.add_argument("--to", type=positive, metavar="V", help="the version to go back to")
    target.add_argument(
        "--before",
        metavar="TIME",
        help="the newest clean version made before TIME: ISO 8601, or 10m for ten minutes ago",
    )
    target.add_argument(
        "--before-mask",
        action="store_true",
        help="the newest version that has learned none of the clicks named; with --mode exact, the newest whose training log has "
        "none of them, nor of those that earlier fast rollbacks left out (so without --to and --before)",
    )
    _skips(command)
    command.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="fast: the trainer goes back; exact: the stream and all histories too (default fast)",
    )
    command.add_argument(
        "--follow-when-caught-up",
        action="store_true",
        help="let answers follow the newest version again once the trainer has caught up",
    )
    command.add_argument(
        "--wait",
        type=seconds,
        default=WAIT_S,
        metavar="S",
        help=f"how long to wait for answers of this host to turn (default {WAIT_S:.0f}; 0: not at all)",
    )
    command.add_argument("--reason", required=True, metavar="TEXT", help="why; kept with your name in the history")
    command.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    if_generation(command)
    return command


def _skips(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="P:A-B",
        help="leave out offsets A to B of partition P of the clicks; repeatable",
    )
    command.add_argument(
        "--skip-time",
        action="append",
        default=[],
        metavar="A..B",
        help="leave out clicks with times from A until before B, such as 10m..now; repeatable",
    )
    command.add_argument("--skip-users", type=Path, metavar="FILE", help="leave out the users of FILE, one id a line")
    command.add_argument(
        "--minutes", type=positive, metavar="N", help="leave out the last N minutes: --skip-time Nm..now"
    )


def if_generation(command: argparse.ArgumentParser) -> None:
    """Adds `--if-generation`, which prevents two operators from overwriting each other's change."""
    command.add_argument(
        "--if-generation",
        type=positive,
        metavar="N",
        help="only where N is the newest generation of `springtide history`; refused where somebody changed control since",
    )


def erase(add: Add) -> argparse.ArgumentParser:
    """Adds `erase` and returns its parser."""
    command = add(
        "erase",
        "Forget users: their clicks so far, and all that is kept of them; or show what still holds something.",
        "Answers know nobody of them within 2 s. What they click later makes new users. No rollback, restart or rebuild brings "
        "them back, and no `unmask`. The ids are written nowhere; a shell keeps what is typed, so prefer --users.",
    )
    who = command.add_mutually_exclusive_group()
    who.add_argument("--user", metavar="ID", help="the user, as clicks name it")
    who.add_argument(
        "--users", type=Path, metavar="FILE", help="the users of FILE, one id a line; - reads them from a pipe"
    )
    who.add_argument(
        "--status", action="store_true", help="show what still holds something of erased users, and until when"
    )
    command.add_argument("--reason", default="", metavar="TEXT", help="why; kept with your name in the history")
    return command


def masks(add: Add) -> list[argparse.ArgumentParser]:
    """Adds `masks` and `unmask` and returns their parsers."""
    listing = add("masks", "List what rollbacks left out: each mask with its rows and users, who set it, and why.")
    lifting = add(
        "unmask",
        "Lift masks: what they name counts again.",
        "New clicks count at once; what was left out comes back at the next exact rollback.",
    )
    lifting.add_argument("masks", type=positive, nargs="+", metavar="N", help="a mask, of `springtide masks`")
    lifting.add_argument("--reason", required=True, metavar="TEXT", help="why; kept with your name in the history")
    if_generation(lifting)
    return [listing, lifting]


def schema(add: Add) -> argparse.ArgumentParser:
    """Adds `schema` and returns its parser."""
    command = add(
        "schema",
        "Show what live clicks are held against, compare the newest window with it, or accept that as the new baseline.",
        "Types, domains, presence and thresholds are a Schema of TensorFlow Metadata, as TensorFlow Data Validation has it.",
    )
    command.add_argument(
        "what",
        choices=("show", "diff", "accept"),
        help="show the baseline; diff the newest window against it, the farthest first; accept that window as the baseline",
    )
    command.add_argument("--pbtxt", action="store_true", help="show: print schema.pbtxt, to edit and accept")
    command.add_argument(
        "--schema", type=Path, metavar="FILE", help="accept: domains and thresholds of this schema.pbtxt"
    )
    command.add_argument("--reason", default="", metavar="TEXT", help="accept: why; kept with your name in the history")
    return command


def positive(text: str) -> int:
    """Parses an integer that is at least 1.

    >>> positive("7")
    7
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parses seconds, 0 or more.

    >>> seconds("2.5")
    2.5
    """
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise argparse.ArgumentTypeError(f"must be seconds from 0 on, not {text!r}")
    return found
