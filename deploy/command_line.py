"""Defines the argument parser of `springtide`: its commands, including `springtide trial`, their options and help texts.

Settings are removed from the arguments before parsing; see `state.config.sources`.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from deploy.backup import options as backing_up
from deploy.operate import options as operating
from deploy.operate.options import SETTINGS_HELP, Add, positive
from state.errors import SettingsError

VERBS = ("start", "list", "stop", "promote", "report")
READERS = ("stream", "train", "up")  # stop at a gap; continue if the loss is accepted
_UNKNOWN = re.compile(r"argument .+: invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)
"""argparse's message for a word that is not one of its choices."""


def trial(add: Add) -> argparse.ArgumentParser:
    """The command about trials."""
    command = add(
        "trial",
        "Let a second trainer with other settings learn from the same rows, and compare it with the live one, row by row.",
        "`springtide up` runs its trainer, on trials.cores at most. Both score each row before they learn it; what their losses "
        "differ by is told with an interval that holds however often one looks. promote lets the live trainer go on from what "
        "the trial learned, in a new epoch; `springtide rollback` takes that back.",
    )
    command.add_argument(
        "what",
        choices=VERBS,
        help="start one; list all; stop one, which removes what it learned; promote one; report how the arms of its rollout compare",
    )
    command.add_argument("name", nargs="?", default="", metavar="NAME", help="the trial's name")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="start: a setting of [model], [trainer] or [guard] in which it differs; repeatable",
    )
    command.add_argument(
        "--from",
        dest="origin",
        choices=("live", "nothing", "clicks"),
        default="live",
        help="start: from the newest durable version (the default), from nothing and the training log's beginning, or from the clicks "
        "of the last retrain.days and the training log behind them",
    )
    command.add_argument("--reason", default="", metavar="TEXT", help="why; kept with your name")
    return command


PROCESSES = {
    "up": (
        "deploy.up",
        "Start the whole loop on this machine: Kafka, stream, trainer, serving, shoppers. Ctrl-C stops it.",
    ),
    "stream": ("streaming.pipeline", "Run the Beam job: clicks in, histories, windows, micro-batches out."),
    "train": ("trainer.loop", "Run the trainer: micro-batches in, versions out."),
    "serve": ("deploy.serve", "Run serving on this host: one applier and serving.workers workers."),
    "console": ("deploy.console.server", "Run the page that shows the loop and steers it, on console.port."),
    "validate": (
        "deploy.validation.process",
        "Take statistics of what is learned from, window by window, and look for anomalies and drift, beside the trainer.",
    ),
    "segments": (
        "deploy.segments.command",
        "Keep, list and export segments of users, and find lookalikes: segments run, list, export, lookalikes.",
    ),
    "webhook": (
        "deploy.alerting.receiver",
        "Take Alertmanager's notifications, and pin answers to a version from before the alert.",
    ),
    "flink": (
        "deploy.flink.command",
        "Run a Flink cluster on this machine, for the stream on a distributed runner: flink up, flink down, flink status.",
    ),
    "rollout": (
        "deploy.rollouts.command",
        "Answer a growing share of the users by a trial, and go on, halt or go back by what they do.",
    ),
    "status": ("deploy.status", "Show what runs, its lag, versions and freshness."),
    "probe": (
        "deploy.probe",
        "Send a click of a probe user through the loop, and say how long features and weights took; --continuously: again and again.",
    ),
    "verify": ("trainer.verify", "Recompute a version from its base and the training log, and compare every bit."),
    "compact": (
        "trainer.compactor",
        "Make a base of the newest version and remove the versions that [registry] need not keep, once, beside the trainer.",
    ),
    "rebuild-history": (
        "streaming.rebuild",
        "Rebuild a stream's lost histories from Kafka; --from COPY begins with a copy.",
    ),
    "export": (
        "trainer.exporting.command",
        "Write a version as a SavedModel for TensorFlow Serving, or with --tflite FILE as one file for a device.",
    ),
    "upgrade": (
        "trainer.upgrade",
        "Go on from what was learned with another model, preprocessing or feature spec: --dry-run says what is carried over.",
    ),
    "capacity": (
        "deploy.capacity.command",
        "Report what a deployment takes for so many clicks, users and answers, and which limit it meets first.",
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
    "flink",
    "rollout",
    "status",
    "probe",
    "verify",
    "replay",
    "attributes",
    "bootstrap",
    "rebuild-history",
    "upgrade",
    "export",
    "capacity",
    "segments",
)  # their modules have options of their own and explain them


class RefusingParser(argparse.ArgumentParser):
    """An argument parser that raises our errors, and suggests the nearest word for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raises it.

        >>> RefusingParser(prog="springtide").error("argument COMMAND: invalid choice: 'statsu' (choose from 'up', 'status')")
        Traceback (most recent call last):
        state.errors.SettingsError: 'statsu' is unknown; did you mean `status`? `springtide --help` lists all
        """
        if (found := _UNKNOWN.fullmatch(message)) is None:
            raise SettingsError(message, f"see `{self.prog} --help`")
        word, choices = found.groups()
        near = difflib.get_close_matches(word, re.findall(r"'([^']*)'", choices), 1)
        do = f"did you mean `{near[0]}`? `{self.prog} --help` lists all" if near else f"`{self.prog} --help` lists all"
        raise SettingsError(f"{word!r} is unknown", do)


class _Version(argparse.Action):
    """Prints the release; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *asked: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"springtide {version('springtide')}")
        except PackageNotFoundError:
            print("springtide, run from its source and not installed")
        parser.exit()


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; settings are removed from the arguments before.

    Args:
        words: The arguments to parse. Options whose import takes long (those of the log) are only added to commands
            that these words name; without words they are added to all.
    """
    whole = RefusingParser(
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
        if name in READERS and (words is None or name in words):
            from state.log import gap_options

            gap_options.add_options(process, records=name != "stream")
        if name == "stream":
            process.add_argument(
                "--runner",
                metavar="RUNNER",
                help="local (the default: this process), flink, prism, or another of Beam's runners, whose options pass through",
            )
        if name == "up":
            process.add_argument(
                "--upgrade", action="store_true", help="go on with these settings; needs --reason TEXT"
            )
    printing = [
        _versions(add),
        *_verbs(add),
        operating.rollback(add),
        operating.erase(add),
        *operating.masks(add),
        operating.schema(add),
        *backing_up.commands(add),
    ]
    add(
        "check-model",
        "Check model.ranker, model.tower and model.preprocessing of your own: shapes, repeatability, lowering to LiteRT, parity.",
        "In seconds, and nothing is started or changed; up, bootstrap and train do the same before they start.",
    )
    printing += [trial(add), _history(add), _config(add)]
    for one in printing:
        one.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (default text)")
    return whole


def _versions(add: Add) -> argparse.ArgumentParser:
    return _lists(add("versions", "List the versions: age, log range, log loss, AUC, and which one serves."))


def _history(add: Add) -> argparse.ArgumentParser:
    return _lists(add("history", "List changes of control: who, when, what and why."))


def _lists(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "--last", type=positive, default=20, metavar="N", help="how many of the newest to list (default 20)"
    )
    command.add_argument("--all", action="store_true", help="list all of them")
    return command


def _verbs(add: Add) -> list[argparse.ArgumentParser]:
    pin = add("pin", "Let answers stay at one version; training goes on.", "`springtide follow` undoes it.")
    pin.add_argument("version", type=positive, metavar="V", help="the version, of `springtide versions`")
    label = add("label", "Give a name to a version, which is then kept and can be asked for by that name.")
    label.add_argument("name", metavar="NAME", help="the label: stable, previous, canary or one of your own")
    label.add_argument("version", nargs="?", type=positive, metavar="V", help="the version, of `springtide versions`")
    label.add_argument("--remove", action="store_true", help="take the label away")
    verbs = [
        pin,
        label,
        add("follow", "Let answers follow the newest version again, after a pin or a rollback."),
        add("hold", "Let the trainer learn on without publishing versions.", "`springtide release` undoes it."),
        add("release", "Let the trainer publish versions again, after a hold, or go on with what its guard holds."),
        add("pause", "Let the trainer take no record; answers go on.", "`springtide resume` undoes it."),
        add("resume", "Let the trainer take records again, after a pause or where its guard holds training."),
    ]
    for one in verbs:
        one.add_argument(
            "--reason", default="none given", metavar="TEXT", help="why; kept with your name in the history"
        )
        operating.if_generation(one)
    return verbs


def _config(add: Add) -> argparse.ArgumentParser:
    config = add("config", "Show the effective settings and where each comes from; secrets are masked.")
    config.add_argument(
        "names", nargs="*", metavar="NAME", help="sections and settings, such as kafka or kafka.port; default all"
    )
    config.add_argument("--changed", action="store_true", help="only those that somebody has set")
    config.add_argument("--explain", action="store_true", help="each in full: help, default, what is allowed")
    config.add_argument("--markdown", action="store_true", help="print the documentation of all settings instead")
    return config


def with_times(words: Sequence[str]) -> list[str]:
    """Joins an option and a relative time, which argparse would mistake for another option.

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
