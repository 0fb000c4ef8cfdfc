"""The command line: `springtide COMMAND [options] [--section.name VALUE ...]`.

A command either becomes a process of the loop (the interpreter is replaced, so
that signals reach it), or is a command of the operator, done here. Settings
may stand anywhere on the line, as in every process: `--kafka.port 9192`,
`--config FILE`. Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from deploy.operate.settings_table import as_json, as_lines, as_markdown, as_pages, changed, chosen
from state.config.settings import Settings, load
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.log import gap_options

Command = Callable[[Settings, argparse.Namespace, int, Callable[[str], None]], None]

PROCESSES = {
    "up": (
        "deploy.up",
        "Start the whole loop on this machine: Kafka, stream, trainer, serving, shoppers. Ctrl-C stops it.",
    ),
    "stream": ("streaming.pipeline", "Run the Beam job: clicks in, histories, windows, micro-batches out."),
    "train": ("trainer.loop", "Run the trainer: micro-batches in, versions out."),
    "serve": ("deploy.serve", "Run serving on this host: one applier and serving.workers workers."),
    "status": ("deploy.status", "Show what runs, its lag, versions and freshness."),
    "verify": ("trainer.verify", "Recompute a version from its base and the training log, and compare every bit."),
    "rebuild-history": (
        "streaming.rebuild",
        "Rebuild a stream's lost histories from Kafka: --shard N; --from COPY begins with a copy.",
    ),
    "bootstrap": (
        "streaming.bootstrap",
        "Analyse past clicks once, for the constants of the preprocessing: files, or the topic's beginning. --examples DIR "
        "also writes tf.Examples.",
    ),
    "replay": (
        "deploy.replay",
        "Send clicks into the clicks topic: of files (CSV, JSON lines, Parquet), or of --synthetic shoppers.",
    ),
    "attributes": (
        "deploy.attributes",
        "Write the attributes in files (CSV, JSON lines, Parquet) to their topics: --users FILE... --items FILE...",
    ),
}
OWN_HELP = (
    "up",
    "status",
    "verify",
    "replay",
    "attributes",
    "bootstrap",
    "rebuild-history",
)  # their modules have options of their own and explain them
READERS = ("stream", "train", "up")  # stop at a gap, and go on where the loss is accepted
SETTINGS_HELP = (
    "Settings are written --section.name VALUE (also --config FILE, --bootstrap-servers HOST:PORT, --state DIRECTORY); "
    "`springtide config` lists them. Exit codes: 0 done, 1 failed, 2 wrong use."
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    """Prints the release; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *asked: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"springtide {version('springtide')}")
        except PackageNotFoundError:
            print("springtide, run from its source and not installed")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command line's parser; settings are taken out of the line before."""
    whole = _Parser(
        prog="springtide",
        description="User profiles that learn from every click.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="show the release and exit")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def add(name: str, help: str, description: str = "", own_help: bool = True) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=f"{help} {description}",
            epilog=SETTINGS_HELP,
            allow_abbrev=False,
            add_help=own_help,
        )

    for name, (_, help) in PROCESSES.items():
        process = add(name, help, own_help=name not in OWN_HELP)
        if name in READERS:
            gap_options.add_options(process)

    versions = add("versions", "List the versions: age, log range, log loss, AUC, and which one serves.")
    versions.add_argument(
        "--last", type=positive, default=20, metavar="N", help="how many of the newest to list (default 20)"
    )
    versions.add_argument("--all", action="store_true", help="list all of them")

    pin = add("pin", "Let answers stay at one version; training goes on.", "`springtide follow` undoes it.")
    pin.add_argument("version", type=positive, metavar="V", help="the version, of `springtide versions`")
    follow = add("follow", "Let answers follow the newest version again, after a pin or a rollback.")
    for one in (pin, follow):
        one.add_argument(
            "--reason", default="none given", metavar="TEXT", help="why; kept with your name in the history"
        )

    rollback = add(
        "rollback",
        "Go back to a version, and train on from it without the clicks you name.",
        "The plan is printed first. Answers use the version at once and stay there until `springtide follow`; the trainer "
        "loads it and replays the training log without the masked rows. Nothing is deleted. Rows after the masked ones "
        "keep the windows they were written with.",
    )
    target = rollback.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=positive, metavar="V", help="the version to go back to")
    target.add_argument(
        "--before", metavar="TIME", help="the newest version made before TIME: ISO 8601, or 10m for ten minutes ago"
    )
    rollback.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="P:A-B",
        help="leave out offsets A to B of partition P of the clicks; repeatable",
    )
    rollback.add_argument(
        "--skip-time",
        action="append",
        default=[],
        metavar="A..B",
        help="leave out clicks with times from A until before B, such as 10m..now; repeatable",
    )
    rollback.add_argument("--skip-users", type=Path, metavar="FILE", help="leave out the users of FILE, one id a line")
    rollback.add_argument("--reason", required=True, metavar="TEXT", help="why; kept with your name in the history")
    rollback.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")

    add(
        "check-model",
        "Check model.tower and model.preprocessing of your own: shapes, repeatability, lowering to LiteRT, parity.",
        "In seconds, and nothing is started or changed; up, bootstrap and train do the same before they start.",
    )
    history = add("history", "List every change of control: who, when, what and why.")
    config = add("config", "Show the effective settings and where each comes from; secrets are masked.")
    config.add_argument(
        "names", nargs="*", metavar="NAME", help="sections and settings, such as kafka or kafka.port; default all"
    )
    config.add_argument("--changed", action="store_true", help="only those that somebody has set")
    config.add_argument("--explain", action="store_true", help="each in full: help, default, what is allowed")
    config.add_argument("--markdown", action="store_true", help="print the documentation of all settings instead")
    for one in (versions, pin, follow, rollback, history, config):
        one.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    return whole


def positive(text: str) -> int:
    """A whole number from 1 on.

    >>> positive("7")
    7
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def with_times(words: Sequence[str]) -> list[str]:
    """Joins an option and a relative time, which argparse would take for another option.

    >>> with_times(["rollback", "--before", "-10m", "--dry-run"])
    ['rollback', '--before=-10m', '--dry-run']
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--before", "--skip-time") and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def config(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Callable[[str], None]) -> None:
    """Shows the settings."""
    if asked.markdown:
        say(as_markdown())
        return
    listed = chosen(asked.names)
    if asked.changed:
        listed = changed(settings, listed)
    # One setting alone is asked for to be understood.
    explain = asked.explain or any("." in name for name in asked.names)
    show = as_json if asked.output == "json" else as_pages if explain else as_lines
    say(show(settings, listed) or "every setting has its default")


def check_model(settings: Settings, asked: argparse.Namespace, now_ms: int, say: Callable[[str], None]) -> None:
    """Checks the functions of the user's own."""
    from deploy.startup import own_model

    if not own_model.is_own(settings):
        say("model.tower and model.preprocessing are the default ones: there is nothing to check")
    own_model.check(settings, say)


def operator_command(name: str) -> Command:
    """The function of an operator's command; its imports wait until it is asked for."""
    if name in ("config", "check-model"):
        return config if name == "config" else check_model
    from deploy.operate import control, versions

    commands: dict[str, Command] = {
        "versions": versions.versions,
        "pin": control.pin,
        "follow": control.follow,
        "rollback": control.rollback,
        "history": control.history,
    }
    return commands[name]


def run(argv: Sequence[str], become: Callable[[str, list[str]], None], now_ms: int, say: Callable[[str], None]) -> None:
    """Does one command line.

    Args:
        argv: The words after `springtide`.
        become: Replaces this process by `python -m MODULE FLAGS`.
        now_ms: Wall clock.
        say: Takes what is printed.

    Raises:
        SpringtideError: What went wrong; the message is for the operator.
    """
    flags, words = split_settings(argv)
    asked, unknown = parser().parse_known_args(with_times(words))
    if unknown and asked.command not in OWN_HELP:
        raise SettingsError(f"unknown argument {unknown[0]}; see `springtide {asked.command} --help`")
    if asked.command in PROCESSES:
        # A mistake is said here, with status 2, before anything starts.
        settings = load(flags)
        if asked.command == "bootstrap" and not {"--help", "-h"} & {*words}:
            # The preprocessing is checked by the bootstrap itself.
            _check_tower(settings)
        options = gap_options.as_options(asked) if asked.command in READERS else []
        gap_options.take_options(options, actor="")
        become(PROCESSES[asked.command][0], [*options, *unknown, *flags])
        return
    operator_command(asked.command)(load(flags), asked, now_ms, say)


def _check_tower(settings: Settings) -> None:
    from deploy.startup import own_model

    own_model.check_tower(settings)


def become(module: str, flags: list[str]) -> None:
    """Replaces this process by a module's main; the process id and the terminal stay."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *flags])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `springtide`; returns the exit status."""
    try:
        run(sys.argv[1:] if argv is None else argv, become, time.time_ns() // 1_000_000, print)
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        # `springtide versions | head` is no failure; nothing more may be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
