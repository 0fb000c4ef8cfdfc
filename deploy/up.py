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

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

from deploy.startup.checks import require_python

HELP = """usage: springtide up [--no-shoppers] [--prometheus] [--bootstrap-servers HOST:PORT] [--section.name VALUE ...]

Runs the whole loop on this machine until Ctrl-C: Kafka, stream, trainer, serving and
synthetic shoppers. A second run resumes where the last one stopped.

  --no-shoppers                   no synthetic clicks
  --prometheus                    also run a Prometheus with the rules of Springtide, if it is installed
  --bootstrap-servers HOST:PORT   use this Kafka instead of a local one
  --accept-gap TOPIC_ID:PARTITION:A-B --reason TEXT
                                  continue although these positions were deleted before they were read;
                                  repeatable
  --accept-cut-back --reason TEXT
                                  continue although the clicks topic was truncated below our position;
                                  implied with a local Kafka
  --skip-record OFFSET --reason TEXT
                                  skip this record of the training log, or the records A-B, if it cannot
                                  be learned from; repeatable
  --upgrade --reason TEXT         continue from the learned state with another model or other features, in a
                                  new epoch; without it such settings are refused, with what would be kept
  --section.name VALUE            any setting; `springtide config` lists them
"""


class AcceptedLosses(NamedTuple):
    """The data losses that the operator accepts, as arguments for stream and trainer."""

    stream: Sequence[str] = ()
    trainer: Sequence[str] = ()


def take_accepted(words: Sequence[str]) -> tuple[AcceptedLosses, list[str]]:
    """Removes the accepted losses from a command line; returns them and the remaining arguments.

    >>> accepted, rest = take_accepted(["--no-shoppers", "--accept-gap", "abababab:3:10-19", "--reason", "old"])
    >>> accepted.stream, rest
    (['--accept-gap', 'abababab:3:10-19', '--reason', 'old'], ['--no-shoppers'])
    >>> take_accepted(["--skip-record", "7", "--reason", "a test wrote it"])[0]
    AcceptedLosses(stream=[], trainer=['--skip-record', '7', '--reason', 'a test wrote it'])

    Raises:
        SettingsError: A loss has an invalid form, a gap names no topic, or there is no reason.
    """
    from state.errors import SettingsError
    from state.log import accepted_gaps

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    accepted_gaps.add_options(parser, records=True)
    consent, remaining = accepted_gaps.take_options(words, actor="", records=True)
    if any(not allowance.topic for allowance in consent.allowances):
        raise SettingsError(
            "--accept-gap: write TOPIC_ID:PARTITION:A-B as the error did", "stream and trainer read different topics"
        )
    args = parser.parse_known_args(list(words))[0]
    return AcceptedLosses(accepted_gaps.as_options(args, records=False), accepted_gaps.as_options(args)), remaining


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the loop until it is stopped; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return 0
    from state.errors import SpringtideError

    try:
        require_python(sys.version_info)
        # Imported here, because these modules need a supported Python.
        from deploy.experiments import processes
        from deploy.startup import prometheus
        from deploy.startup.model_checks import take_upgrade, upgrade_or_refuse
        from deploy.startup.steps import Startup
        from deploy.watch.panel import Screen
        from state.config.loading import load
        from state.process.ending import Signals
        from state.process.private_files import keep_private
        from state.segments.expression import segments_of

        keep_private()
        upgrade, words = take_upgrade(words)
        accepted, words = take_accepted(words)
        shoppers, watched = "--no-shoppers" not in words, "--prometheus" in words
        settings = load([word for word in words if word not in ("--no-shoppers", "--prometheus")])
        others = processes.plans(settings)
        others += [prometheus.plan(settings, prometheus.require_program())] if watched else []
        # Before anything starts, check the segment expressions, and that the settings can load the newest version.
        segments_of(settings)
        upgrade_or_refuse(settings, upgrade, functools.partial(print, flush=True))
        return Startup(settings, shoppers, Screen(), Signals(), accepted, others).run()
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
