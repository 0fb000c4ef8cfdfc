"""Runs the whole loop on one machine: `springtide up`, `make run`.

1. Check Python, the state directory's lock, disk and ports.
2. Create the salt.
3. Start a local Kafka, or connect to the configured one.
4. Create the topics.
5. Start synthetic shoppers, stream and the slow starters after them, all at once.
6. Wait for the bootstrap on the first clicks.
7. Wait for the trainer's first version.
8. Wait for the first answer.
9. Print hints, then watch: restart processes that die, update the live view, and stop everything in order.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from deploy.startup.checks import require_python

if TYPE_CHECKING:
    import argparse


class AcceptedLosses(NamedTuple):
    """The data losses that the operator accepts, as arguments for stream and trainer."""

    stream: Sequence[str] = ()
    trainer: Sequence[str] = ()

    @classmethod
    def of(cls, args: argparse.Namespace) -> AcceptedLosses:
        """Returns what the options accept.

        >>> from state.process.commands import parser_of
        >>> AcceptedLosses.of(parser_of("up").parse_args(["--skip-record", "7", "--reason", "a test wrote it"]))
        AcceptedLosses(stream=[], trainer=['--skip-record', '7', '--reason', 'a test wrote it'])

        Raises:
            SettingsError: A loss has an invalid form, a gap names no topic, or there is no reason.
        """
        from state.errors import SettingsError
        from state.log import accepted_gaps

        if any(not allowance.topic for allowance in accepted_gaps.consent_of(args, actor="").allowances):
            raise SettingsError(
                "--accept-gap: write TOPIC_ID:PARTITION:A-B as the error did",
                "stream and trainer read different topics",
            )
        return cls(accepted_gaps.as_options(args, records=False), accepted_gaps.as_options(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the loop until it is stopped; returns the exit code."""
    from state.errors import SettingsError, SpringtideError

    try:
        require_python(sys.version_info)
        # Imported here, because these modules need a supported Python.
        from deploy.experiments import processes
        from deploy.startup import prometheus
        from deploy.startup.model_checks import upgrade_or_refuse
        from deploy.startup.steps import Startup
        from deploy.watch.panel import Screen
        from state.config.loading import load
        from state.process.commands import parser_of
        from state.process.part import Signals
        from state.process.private_files import keep_private
        from state.segments import segments_of

        keep_private()
        args, flags = parser_of("up").parse_known_args(argv)
        accepted = AcceptedLosses.of(args)
        if args.upgrade and not args.reason.strip():
            raise SettingsError("--upgrade needs --reason TEXT, which is recorded in the history")
        settings = load(flags)
        others = processes.plans(settings)
        others += [prometheus.plan(settings, prometheus.require_program())] if args.prometheus else []
        # Before anything starts, check the segment expressions, and that the settings can load the newest version.
        segments_of(settings)
        upgrade_or_refuse(settings, args.reason if args.upgrade else None, functools.partial(print, flush=True))
        return Startup(settings, not args.no_shoppers, Screen(), Signals(), accepted, others).run()
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
