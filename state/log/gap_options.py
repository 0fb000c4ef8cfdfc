"""The options `--accept-gap`, `--accept-cut-back`, `--skip-record` and `--reason`, which accept a loss in a log."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from state.errors import SettingsError
from state.log.gaps import Consent, parse_allowance, parse_records


def add_options(parser: argparse.ArgumentParser, records: bool = False) -> None:
    """Adds `--accept-gap`, `--accept-cut-back` and `--reason` to a parser; with `records` also `--skip-record`."""
    parser.add_argument(
        "--accept-gap",
        action="append",
        default=[],
        metavar="[TOPIC_ID:]P:A-B",
        help="continue although positions A to B of partition P were deleted before they were read; repeatable",
    )
    parser.add_argument(
        "--accept-cut-back",
        action="store_true",
        help="continue although the clicks topic was truncated below our position, without clicks at reused offsets",
    )
    if records:
        parser.add_argument(
            "--skip-record",
            action="append",
            default=[],
            metavar="OFFSET",
            help="skip this record of the training log, or the records A-B, if it cannot be learned from; repeatable",
        )
    parser.add_argument(
        "--reason", default="", metavar="TEXT", help="reason for accepting the loss; recorded with your name"
    )


def as_options(asked: argparse.Namespace, records: bool = True) -> list[str]:
    """Converts the options back to words, for a process that a command starts; `--skip-record` only with `records`.

    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser, records=True)
    >>> asked = parser.parse_args(["--accept-gap", "0:5-9", "--skip-record", "7", "--reason", "old"])
    >>> as_options(asked)
    ['--accept-gap', '0:5-9', '--skip-record', '7', '--reason', 'old']
    >>> as_options(asked, records=False)
    ['--accept-gap', '0:5-9', '--reason', 'old']
    """
    words = [word for place in asked.accept_gap for word in ("--accept-gap", place)]
    words += ["--accept-cut-back"] if asked.accept_cut_back else []
    if records:
        words += [word for place in getattr(asked, "skip_record", ()) for word in ("--skip-record", place)]
    return [*words, "--reason", asked.reason] if words and asked.reason else words


def take_options(argv: Sequence[str], actor: str, records: bool = False) -> tuple[Consent, list[str]]:
    """Extracts the options of `add_options` from a command line; returns them and the remaining words.

    >>> consent, rest = take_options(["--accept-gap", "0:5-9", "--reason", "old", "--kafka.port", "9"], "ann")
    >>> consent.allowances[0].first, consent.reason, rest
    (5, 'old', ['--kafka.port', '9'])

    Raises:
        SettingsError: A loss has the wrong form, or there is no reason.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser, records)
    try:
        asked, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise SettingsError(
            str(error), "write --accept-gap P:A-B or --skip-record OFFSET, and --reason TEXT"
        ) from error
    skipped = asked.skip_record if records else []
    named = {"--accept-gap": asked.accept_gap, "--accept-cut-back": asked.accept_cut_back, "--skip-record": skipped}
    if any(named.values()) and not asked.reason.strip():
        option = next(name for name, value in named.items() if value)
        raise SettingsError(f"{option} needs --reason TEXT: a loss is accepted by somebody, for a reason")
    allowances = tuple(parse_allowance(text) for text in asked.accept_gap)
    return Consent(allowances, actor, asked.reason, tuple(map(parse_records, skipped)), asked.accept_cut_back), rest
