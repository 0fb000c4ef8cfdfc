"""Arguments of `springtide rollback`, `erase`, `masks`, `unmask`, `jumps`, `schema`, `backup` and `restore`."""

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
        "Roll back to a version, and continue training from it without the named clicks.",
        "Answers switch to the version first and stay there until `springtide follow`. Then the command counts the plan in the "
        "training log and prints it. If the version has learned any of the named clicks, the command is refused and suggests "
        "the newest version that has not. Nothing is deleted. With --mode fast the trainer replays the log without the masked "
        "examples; later examples keep the windows they were written with. With --mode exact the stream rewinds too and reads its "
        "clicks again without the named ones.",
    )
    target = command.add_mutually_exclusive_group()
    target.add_argument("--to", type=positive, metavar="V", help="version to roll back to")
    target.add_argument(
        "--before",
        metavar="TIME",
        help="roll back to the newest clean version created before TIME: ISO 8601, or 10m for ten minutes ago",
    )
    target.add_argument(
        "--before-mask",
        action="store_true",
        help="roll back to the newest version that has learned none of the named clicks (default). With --mode exact: the newest "
        "whose training log contains none of them, nor any that earlier fast rollbacks excluded",
    )
    _skips(command)
    command.add_argument(
        "--mode",
        choices=("fast", "exact"),
        default="fast",
        help="fast: rewind the trainer; exact: also rewind the stream and all histories (default fast)",
    )
    command.add_argument(
        "--follow-when-caught-up",
        action="store_true",
        help="make answers follow the newest version again once the trainer has caught up",
    )
    command.add_argument(
        "--wait",
        type=seconds,
        default=WAIT_S,
        metavar="S",
        help=f"seconds to wait for the answers of this host to switch (default {WAIT_S:.0f}; 0: do not wait)",
    )
    reason(command, required=True)
    command.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    if_generation(command)
    return command


def _skips(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PARTITION:A-B",
        help="exclude offsets A to B of a partition of the clicks topic; repeatable",
    )
    command.add_argument(
        "--skip-time",
        action="append",
        default=[],
        metavar="A..B",
        help="exclude clicks with times from A to before B, such as 10m..now; repeatable",
    )
    command.add_argument("--skip-users", type=Path, metavar="FILE", help="exclude the users in FILE, one id per line")
    command.add_argument(
        "--skip-pseudonym",
        action="append",
        default=[],
        metavar="PSEUDONYM",
        help="exclude the user with this pseudonym, 16 hexadecimal digits as in `springtide jumps`; repeatable",
    )
    for column in ("item", "category"):
        command.add_argument(
            f"--skip-{column}",
            action="append",
            default=[],
            metavar=f"{column.upper()}=A..B",
            help=f"exclude clicks on this {column} with times from A to before B, such as NAME=20m..now; repeatable",
        )
    command.add_argument(
        "--minutes", type=positive, metavar="N", help="exclude the last N minutes: --skip-time Nm..now"
    )


def if_generation(command: argparse.ArgumentParser) -> None:
    """Adds `--if-generation`, which prevents two operators from overwriting each other's change."""
    command.add_argument(
        "--if-generation",
        type=positive,
        metavar="N",
        help="require that N is the newest generation of `springtide history`; refused if control has changed since",
    )


def reason(command: argparse.ArgumentParser, required: bool = False, default: str = "", of: str = "") -> None:
    """Adds `--reason`; `of` names the verb that it belongs to, if the command has several."""
    help = f"{of}reason; recorded with your name in the history"
    command.add_argument("--reason", required=required, default=default, metavar="TEXT", help=help)


def output(command: argparse.ArgumentParser, of: str = "") -> None:
    """Adds `-o text|json`; `of` names the verb that it belongs to, if the command has several."""
    help = f"{of}output format (default text)"
    command.add_argument("-o", "--output", choices=("text", "json"), default="text", help=help)


def erase(add: Add) -> argparse.ArgumentParser:
    """Adds `erase` and returns its parser."""
    command = add(
        "erase",
        "Erase users: their clicks so far and all their stored data; or show where data remains.",
        "Answers treat them as unknown within 2 s. Later clicks create new users. No rollback, restart, rebuild or `unmask` "
        "restores them. The ids are not stored. A shell records commands, so prefer --users.",
    )
    who = command.add_mutually_exclusive_group()
    who.add_argument("--user", metavar="ID", help="user id, as in the clicks")
    who.add_argument(
        "--users", type=Path, metavar="FILE", help="file with user ids, one per line; - reads standard input"
    )
    who.add_argument("--status", action="store_true", help="show where data of erased users remains, and until when")
    reason(command)
    return command


def masks(add: Add) -> list[argparse.ArgumentParser]:
    """Adds `masks` and `unmask` and returns their parsers."""
    listing = add("masks", "List the masks of rollbacks, with examples, users, actor and reason.")
    lifting = add(
        "unmask",
        "Remove masks, so that their clicks count again.",
        "New clicks count at once. Excluded clicks are learned from at the next exact rollback.",
    )
    lifting.add_argument(
        "masks", type=positive, nargs="+", metavar="N", help="mask number, as listed by `springtide masks`"
    )
    reason(lifting, required=True)
    if_generation(lifting)
    return [listing, lifting]


def jumps(add: Add) -> argparse.ArgumentParser:
    """Adds `jumps` and returns its parser."""
    command = add(
        "jumps",
        "List users, items and categories whose share of the clicks jumped, to find the cause of bad versions.",
        "Compares the clicks of the training log in the last minutes with three times as long before. Clicks that masks exclude "
        "do not count. Prints user ids.",
    )
    command.add_argument("--minutes", type=positive, default=5, metavar="N", help="the last N minutes (default 5)")
    return command


def schema(add: Add) -> argparse.ArgumentParser:
    """Adds `schema` and returns its parser."""
    command = add(
        "schema",
        "Show the baseline of live clicks, compare the newest window with it, or accept that window as the new baseline.",
        "Types, domains, presence and thresholds are a TensorFlow Metadata Schema, as in TensorFlow Data Validation.",
    )
    command.add_argument(
        "what",
        choices=("show", "diff", "accept"),
        help="show the baseline; diff: compare the newest window with it, largest distance first; accept that window as the baseline",
    )
    command.add_argument("--pbtxt", action="store_true", help="show: print schema.pbtxt, for editing and accepting")
    command.add_argument(
        "--schema", type=Path, metavar="FILE", help="accept: use the domains and thresholds of this schema.pbtxt"
    )
    reason(command, of="accept: ")
    return command


def backups(add: Add) -> list[argparse.ArgumentParser]:
    """Adds `backup` and `restore` and returns their parsers."""
    keeping = add(
        "backup",
        "Back up the learned state to a directory or an object store, while the system runs.",
        "A backup is one consistent cut of versions, control with its history, masks, feature specs, programs, and the stream's "
        "histories with their positions. Backups are incremental. A backup contains personal data under pseudonyms. It does not "
        "contain serving's row store, attributes and Kafka's data.",
    )
    keeping.add_argument("to", metavar="TO", help="directory, or object store such as s3://bucket/folder")
    keeping.add_argument(
        "--with-salt",
        action="store_true",
        help="include the salt, a secret: with it and a list of user ids the pseudonyms can be reversed",
    )
    keeping.add_argument(
        "--versions",
        choices=("all", "newest"),
        default="all",
        help="back up all kept versions, or only those needed to continue and those named in control (default all)",
    )
    keeping.add_argument("--keep", type=positive, metavar="N", help="then delete all but the newest N backups there")
    keeping.add_argument("--list", action="store_true", help="list the existing backups; creates none")
    keeping.add_argument("--check", action="store_true", help="verify every digest of a backup; creates none")
    keeping.add_argument("--at", default="", metavar="ID", help="backup that --check verifies (default the newest)")
    bringing = add(
        "restore",
        "Restore a backup on an empty machine.",
        "Every file is compared with its digest before anything is installed. `springtide up` then continues from Kafka.",
    )
    bringing.add_argument("source", metavar="FROM", help="destination of `springtide backup`")
    bringing.add_argument(
        "--at",
        default="",
        metavar="ID",
        help="backup, as listed by `springtide backup FROM --list` (default the newest)",
    )
    bringing.add_argument(
        "--erasures-from",
        type=Path,
        metavar="REGISTRY",
        help="registry that was not lost; its erasures that the backup lacks are applied again, as are those of newer "
        "backups",
    )
    bringing.add_argument(
        "--kafka-lost",
        action="store_true",
        help="the topics are lost too: the trainer continues from the version in a new training log, in a new epoch",
    )
    return [keeping, bringing]


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
