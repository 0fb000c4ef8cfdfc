"""The argument parser of `springtide`: its commands, their options and help texts."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from deploy.operate import options as operating
from deploy.operate.options import SETTINGS_HELP, Add, positive
from state.config.settings import Settings
from state.config.sources import span_ms
from state.errors import SettingsError, SpringtideError, of_disk
from state.process.ending import while_read

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
_CONTROL = ("pin", "follow", "label", "unmask")
OPERATIONS = {
    "config": "deploy.cli:config",
    "check-model": "deploy.cli:check_model",
    "versions": "deploy.operate.versions:versions",
    **{name: f"deploy.operate.control:{name}" for name in _CONTROL},
    **dict.fromkeys(("hold", "release", "pause", "resume"), "deploy.operate.control:switch"),
    "history": "deploy.operate.history:history",
    "masks": "deploy.operate.history:masks",
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


OWN_HELP = (
    "up",
    "train-worker",
    "flink",
    "status",
    "probe",
    "verify",
    "replay",
    "evaluate",
    "attributes",
    "bootstrap",
    "rebuild-history",
    "upgrade",
    "export",
    "capacity",
    "segments",
)  # their modules have options of their own and explain them


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
        operating.rollback(add),
        operating.erase(add),
        *operating.masks(add),
        operating.jumps(add),
        operating.schema(add),
        *operating.backups(add),
    ]
    add(
        "check-model",
        "Check a custom model.ranker, model.tower or model.preprocessing: shapes, repeatability, lowering to LiteRT, parity.",
        "Takes seconds and starts or changes nothing. up, bootstrap and train run the same check before they start.",
    )
    printing += [experiment(add), _history(add), _config(add)]
    for command in printing:
        operating.output(command)
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
        operating.reason(verb, default="none given")
        operating.if_generation(verb)
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
