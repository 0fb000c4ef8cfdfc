"""The argument parser of `springtide`: its commands, their options and help texts."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from state.config.settings import Settings
from state.config.sources import span_ms
from state.errors import SettingsError, SpringtideError, of_disk
from state.process.part import while_read

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


EXPERIMENT_VERBS = ("start", "status", "rollout", "halt", "resume", "back", "report", "promote", "stop")
READERS = ("stream", "train", "up")  # stop at a gap; continue if the loss is accepted
_UNKNOWN = re.compile(r"argument .+: invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)
"""argparse's message for a word that is not one of its choices."""


def experiment(add: Add) -> argparse.ArgumentParser:
    """Adds `experiment` and returns its parser."""
    command = add(
        "experiment",
        "Try other settings on the same examples next to the live trainer, then on a share of the users, and promote them.",
        "`springtide up` runs the experiment's trainer on at most trials.cores cores. Both trainers score each example before they "
        "learn from it. The difference of their losses has an anytime-valid confidence interval.",
    )
    command.add_argument(
        "what",
        choices=EXPERIMENT_VERBS,
        help="start: start an experiment; status: compare it with the live trainer; rollout: answer a growing share of the users "
        "with it, at rollout.address, until the rollout is over (run it again to resume); its gate continues, halts or rolls back by "
        "engagements, failures, latency and the sample ratio; halt: keep the share; resume: restart the step; "
        "back: answer all users with the live versions, or confirm that the gate did; report: compare the arms of the rollout; "
        "promote: start an epoch in which the live trainer continues from it (`springtide rollback` undoes that); stop: delete "
        "what it learned",
    )
    command.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="name of the experiment (status: default all)"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="start: a different value of a setting in [model], [trainer] or [guard]; repeatable",
    )
    command.add_argument(
        "--from",
        dest="origin",
        choices=("live", "nothing", "clicks"),
        help="start: live: from the newest durable version (default); nothing: from scratch, from the start of the training log; "
        "clicks: from scratch, with the clicks of the last retrain.days and then the training log",
    )
    command.add_argument(
        "--steps",
        type=_percentages,
        metavar="P,P,...",
        help="rollout: share of the users in each step, in percent (default 1,5,50,100)",
    )
    command.add_argument("--every", type=_span_s, metavar="T", help="rollout: duration of a step (default 30m)")
    command.add_argument(
        "--reason", default="", metavar="TEXT", help="start, promote, stop: required; reason; recorded with your name"
    )
    return command


def _percentages(text: str) -> tuple[float, ...]:
    from state.experiments.experiment import require_steps

    try:
        steps = tuple(float(share) for share in text.split(","))
        require_steps(steps)
    except (ValueError, SettingsError):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no steps: give ascending percentages such as 1,5,50,100"
        ) from None
    return steps


def _span_s(text: str) -> float:
    if not (span := span_ms(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 30m, 2h or 90s")
    return span / 1000


PROCESSES = {
    "up": (
        "deploy.up",
        "Start the whole loop on this machine: Kafka, stream, trainer, serving, shoppers. Ctrl-C stops it.",
    ),
    "stream": (
        "streaming.pipeline",
        "Run the stream, a Beam job that reads clicks, updates histories and windows, and writes micro-batches.",
    ),
    "train": ("trainer.loop", "Run the trainer, which reads micro-batches and publishes versions."),
    "train-worker": (
        "trainer.worker",
        "Run one of the other workers of a trainer with trainer.workers above 1, on another machine: --index K.",
    ),
    "serve": ("deploy.serve", "Run serving on this host: an applier and serving.workers workers."),
    "console": (
        "deploy.console.server",
        "Run the console, a web page that shows and controls the loop, on console.port.",
    ),
    "validate": (
        "deploy.validation.process",
        "Compute statistics of the training log, window by window, and detect anomalies and drift. Runs in parallel to the trainer.",
    ),
    "segments": (
        "deploy.segments.command",
        "Maintain, list and export segments of users, and find lookalikes: segments run, list, export, lookalikes.",
    ),
    "webhook": (
        "deploy.webhook",
        "Receive Alertmanager notifications, and pin answers to a version from before the alert.",
    ),
    "flink": (
        "deploy.flink.command",
        "Run a Flink cluster on this machine, for the stream on a distributed runner: flink up, flink down, flink status.",
    ),
    "status": ("deploy.status", "Show the running parts, their lag, versions and freshness."),
    "probe": (
        "deploy.probe",
        "Send a click of a probe user through the loop, and measure the latency to features and weights; --continuously repeats it.",
    ),
    "verify": ("trainer.verify", "Recompute a version from its base and the training log, and compare every bit."),
    "compact": (
        "trainer.compactor",
        "Write a base of the newest version and remove the versions that [registry] does not retain, once. Safe while the trainer runs.",
    ),
    "rebuild-history": (
        "streaming.rebuild",
        "Rebuild a stream's lost histories from Kafka; --from COPY starts from a copy.",
    ),
    "export": (
        "trainer.exporting.command",
        "Export a version as a SavedModel for TensorFlow Serving, or with --tflite FILE as one file for a device.",
    ),
    "upgrade": (
        "trainer.upgrade",
        "Continue from the learned state with another model, preprocessing or feature spec; --dry-run shows what is carried over.",
    ),
    "capacity": (
        "deploy.capacity",
        "Report the resources that a deployment needs for a number of clicks, users and answers, and the limit it reaches first.",
    ),
    "bootstrap": (
        "streaming.bootstrap",
        "Analyse past clicks once, from files or the start of the topic, for the constants of the preprocessing. --examples DIR "
        "also writes tf.Examples.",
    ),
    "replay": (
        "deploy.replay",
        "Send clicks to the clicks topic, from files (CSV, JSON lines, Parquet) or from --synthetic shoppers.",
    ),
    "evaluate": (
        "evaluation.command",
        "Score interests, engagement and recommendations on recorded clicks, next to simple baselines. Needs no Kafka.",
    ),
    "attributes": (
        "deploy.attributes",
        "Write attributes from files (CSV, JSON lines, Parquet) to their topics: --users FILE... --items FILE...",
    ),
}
_CONTROL = ("pin", "follow", "label", "unmask", "hold", "release", "pause", "resume")
OPERATIONS = {
    "config": "deploy.cli:config",
    "check-model": "deploy.cli:check_model",
    "versions": "deploy.operate.versions:versions",
    **dict.fromkeys(_CONTROL, "deploy.operate.control:change"),
    "history": "deploy.operate.control:history",
    "masks": "deploy.operate.control:masks",
    "rollback": "deploy.operate.rollback:rollback",
    "jumps": "deploy.operate.jumps:jumps",
    "erase": "deploy.operate.erase:erase",
    "schema": "deploy.operate.schema:schema",
    "backup": "deploy.backup.commands:backup",
    "restore": "deploy.backup.commands:restore",
    "experiment": "deploy.experiments.commands:experiment",
}
"""An operator's command -> its function, whose modules are imported only if the command is given."""
Command = Callable[[Settings, argparse.Namespace, int, Callable[[str], None]], None]
"""Settings, options, the wall clock in ms, and what prints. It raises a SpringtideError that is for the operator."""


def operation(name: str) -> Command:
    """Returns the function of an operator's command."""
    module, _, function = OPERATIONS[name].partition(":")
    command: Command = getattr(importlib.import_module(module), function)
    return command


OWN_HELP = [
    name for name in PROCESSES if name not in ("stream", "train", "serve", "console", "validate", "webhook", "compact")
]
"""Commands whose modules have options of their own and explain them."""


def run_command(program: str, work: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Runs a command and prints the error that ends it; returns the exit code.

    Args:
        program: Name of the command in its errors.
        work: Runs the command with its arguments; returns the exit code, None for 0.
        argv: The arguments; None for those of this process.
    """

    def run() -> int:
        try:
            return work(sys.argv[1:] if argv is None else argv) or 0
        except BrokenPipeError:
            raise
        except (SpringtideError, OSError) as problem:
            error = of_disk(problem)
            print(f"{program}: {error}", file=sys.stderr, flush=True)
            return error.exit_code
        except KeyboardInterrupt:
            return 1

    return while_read(run)


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


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *values: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"springtide {version('springtide')}")
        except PackageNotFoundError:
            print("springtide, run from its source and not installed")
        parser.exit()


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Returns the parser of the command line; settings have been removed from the arguments before.

    Args:
        words: The arguments to parse. Options whose import takes long (those of the log) are only added to commands
            that these words name; without words they are added to all.
    """
    root = RefusingParser(
        prog="springtide",
        description="User profiles that learn from every click.",
        epilog=SETTINGS_HELP,
        allow_abbrev=False,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="show the release and exit")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

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
            from state.log import accepted_gaps

            accepted_gaps.add_options(process, records=name != "stream")
        if name == "stream":
            process.add_argument(
                "--runner",
                metavar="RUNNER",
                help="local (default; runs in this process), flink, prism, or another Beam runner; runner options are passed through",
            )
        if name == "up":
            process.add_argument(
                "--upgrade", action="store_true", help="upgrade to these settings; requires --reason TEXT"
            )
    printing = [
        _versions(add),
        *_verbs(add),
        rollback(add),
        erase(add),
        *masks(add),
        jumps(add),
        schema(add),
        *backups(add),
    ]
    add(
        "check-model",
        "Check a custom model.ranker, model.tower or model.preprocessing: shapes, repeatability, lowering to LiteRT, parity.",
        "Takes seconds and starts or changes nothing. up, bootstrap and train run the same check before they start.",
    )
    printing += [experiment(add), _history(add), _config(add)]
    for command in printing:
        output(command)
    return root


def _versions(add: Add) -> argparse.ArgumentParser:
    return _lists(
        add("versions", "List the versions with age, log range, log loss and AUC, and mark the one that serves.")
    )


def _history(add: Add) -> argparse.ArgumentParser:
    return _lists(add("history", "List the changes of control with actor, time, action and reason."))


def _lists(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--last", type=positive, default=20, metavar="N", help="list the newest N (default 20)")
    command.add_argument("--all", action="store_true", help="list all of them")
    return command


def _verbs(add: Add) -> list[argparse.ArgumentParser]:
    pin = add("pin", "Pin answers to a version. Training continues.", "`springtide follow` undoes it.")
    pin.add_argument("version", type=positive, metavar="V", help="version, as listed by `springtide versions`")
    label = add("label", "Label a version. A labelled version is retained and can be requested by its label.")
    label.add_argument("name", metavar="NAME", help="label: stable, previous, canary or a custom name")
    label.add_argument(
        "version", nargs="?", type=positive, metavar="V", help="version, as listed by `springtide versions`"
    )
    label.add_argument("--remove", action="store_true", help="remove the label")
    verbs = [
        pin,
        label,
        add("follow", "Make answers follow the newest version again, after a pin or a rollback."),
        add(
            "hold",
            "Hold publishing. The trainer continues to learn but publishes no versions.",
            "`springtide release` undoes it.",
        ),
        add("release", "Resume publishing after a hold, or accept an update that the guard holds."),
        add("pause", "Pause training. Answers continue.", "`springtide resume` undoes it."),
        add("resume", "Resume training after a pause, or after a hold by the guard."),
    ]
    for verb in verbs:
        reason(verb, default="none given")
        if_generation(verb)
    return verbs


def _config(add: Add) -> argparse.ArgumentParser:
    config = add("config", "Show the effective settings and their origins. Secrets are masked.")
    config.add_argument(
        "names", nargs="*", metavar="NAME", help="sections or settings, such as kafka or kafka.port (default all)"
    )
    config.add_argument("--changed", action="store_true", help="only settings that are set explicitly")
    config.add_argument("--explain", action="store_true", help="show help, default and allowed values of each setting")
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
