"""The command line: `springtide COMMAND [options] [--section.name VALUE ...]`.

A command either becomes a process of the loop (the interpreter is replaced, so
that signals reach it), or is a command of the operator, done here. Settings
may stand anywhere on the line, as in every process: `--kafka.port 9192`,
`--config FILE`. Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from deploy.command_line import OWN_HELP, PROCESSES, READERS, parser, with_times
from deploy.operate.settings_table import as_json, as_lines, as_markdown, as_pages, changed, chosen
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.process.closed_output import while_read
from state.process.import_path import for_children
from state.process.private_files import keep_private
from state.process.wall_clock import wall_ms

Command = Callable[[Settings, argparse.Namespace, int, Callable[[str], None]], None]


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
    """Checks the functions of the user's own, and that the newest version fits the model."""
    from deploy.startup import own_model
    from state.registry.model_fit import require_same_model

    require_same_model(settings)
    if not own_model.is_own(settings) and not settings.model.options:
        say("model.ranker, model.tower and model.preprocessing are the default ones: there is nothing to check")
    own_model.check(settings, say)


def operator_command(name: str) -> Command:
    """The function of an operator's command; its imports wait until it is asked for."""
    if name in ("config", "check-model"):
        return config if name == "config" else check_model
    if name == "rollback":
        # On its own: it reads the training log.
        from deploy.operate import rollback

        return rollback.rollback
    if name in ("backup", "restore"):
        from deploy.backup import commands as backing_up

        return backing_up.backup if name == "backup" else backing_up.restore
    if name == "erase":
        # Likewise: it asks Kafka where clicks end.
        from deploy.operate import erase

        return erase.erase
    if name == "trial":
        # Likewise: it compares numbers.
        from deploy.trials import commands as trials

        return trials.trial
    if name == "schema":
        # Likewise: it loads TensorFlow's protos.
        from deploy.operate import schema

        return schema.schema
    from deploy.operate import control, history, versions

    commands: dict[str, Command] = {
        "versions": versions.versions,
        "pin": control.pin,
        "follow": control.follow,
        "label": control.label,
        "unmask": control.unmask,
        **dict.fromkeys(control.SWITCHES, control.switch),
        "history": history.history,
        "masks": history.masks,
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
    asked, unknown = parser(words).parse_known_args(with_times(words))
    if unknown and asked.command not in OWN_HELP and not getattr(asked, "runner", None):
        raise SettingsError(f"unknown argument {unknown[0]}", f"see `springtide {asked.command} --help`")
    if asked.command in PROCESSES:
        # A mistake is said here, with status 2, before anything starts.
        settings = load(flags)
        if asked.command == "bootstrap" and not {"--help", "-h"} & {*words}:
            # The preprocessing is checked by the bootstrap itself.
            _check_tower(settings)
        become(PROCESSES[asked.command][0], [*_accepted(asked), *_runner(asked), *unknown, *flags])
        return
    operator_command(asked.command)(load(flags), asked, now_ms, say)


def _accepted(asked: argparse.Namespace) -> list[str]:
    """The words of the gaps that the operator accepts; what is wrong with them is said here too."""
    if asked.command not in READERS:
        return []
    from state.log import gap_options

    options = gap_options.as_options(asked)
    gap_options.take_options(options, actor="", records=True)
    if not getattr(asked, "upgrade", False):
        return options
    return ["--upgrade", *options, *([] if "--reason" in options else ["--reason", asked.reason])]


def _runner(asked: argparse.Namespace) -> list[str]:
    """The words that name another runner of the stream."""
    runner = getattr(asked, "runner", None)
    return [] if runner is None else ["--runner", runner]


def _check_tower(settings: Settings) -> None:
    from deploy.startup import own_model

    own_model.check_tower(settings)


def become(module: str, flags: list[str]) -> None:
    """Replaces this process by a module's main; the process id and the terminal stay."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *flags], for_children(os.environ))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `springtide`; returns the exit status."""
    keep_private()
    return while_read(lambda: _status(sys.argv[1:] if argv is None else argv))


def _status(argv: Sequence[str]) -> int:
    try:
        run(argv, become, wall_ms(), print)
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
