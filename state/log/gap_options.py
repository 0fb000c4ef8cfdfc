"""`--accept-gap` and `--reason`: how an operator says which loss a process may pass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from state.errors import SettingsError
from state.log.gaps import Consent, parse_allowance


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--accept-gap` and `--reason` to a process's parser."""
    parser.add_argument(
        "--accept-gap",
        action="append",
        default=[],
        metavar="[TOPIC_ID:]P:A-B",
        help="go on although positions A to B of partition P were deleted unread; repeatable",
    )
    parser.add_argument("--reason", default="", metavar="TEXT", help="why the loss is accepted; kept with your name")


def as_options(asked: argparse.Namespace) -> list[str]:
    """The options again as words, for the process that a command becomes.

    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser)
    >>> as_options(parser.parse_args(["--accept-gap", "0:5-9", "--reason", "old"]))
    ['--accept-gap', '0:5-9', '--reason', 'old']
    """
    words = [word for place in asked.accept_gap for word in ("--accept-gap", place)]
    return [*words, "--reason", asked.reason] if asked.reason else words


def take_options(argv: Sequence[str], actor: str) -> tuple[Consent, list[str]]:
    """Takes `--accept-gap` and `--reason` out of a command line; returns them and the rest.

    >>> consent, rest = take_options(["--accept-gap", "0:5-9", "--reason", "old", "--kafka.port", "9"], "ann")
    >>> consent.allowances[0].first, consent.reason, rest
    (5, 'old', ['--kafka.port', '9'])

    Raises:
        SettingsError: A gap is not written as it should be, or there is no reason.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser)
    try:
        asked, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise SettingsError(str(error), "write --accept-gap P:A-B --reason TEXT") from error
    if asked.accept_gap and not asked.reason.strip():
        raise SettingsError("--accept-gap needs --reason TEXT: a loss is accepted by somebody, for a reason")
    allowances = tuple(parse_allowance(text) for text in asked.accept_gap)
    return Consent(allowances, actor, asked.reason), rest
