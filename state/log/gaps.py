"""Parses the losses in a log that an operator accepts in advance: gaps and bad records. No side effects.

A gap is a range of positions that can never be read: deleted by retention
before we read it, or covered by no record of the training log. A process that
meets a gap stops and reports it. Restarted with `--accept-gap P:A-B --reason
TEXT` it skips the gap, and records who accepted what, when and why
(`state/log/accepted_gaps.py`). `--skip-record OFFSET --reason TEXT` likewise
skips a record of the training log that is no micro-batch of this system's
stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from state.errors import GapError, SettingsError, TruncatedLog
from state.positions import Gap

_RECORDS = re.compile(r"(\d+)(?:-(\d+))?")
_FORM = re.compile(r"(?:([0-9a-f]{8,32}):)?(\d+):(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Allowance:
    """A loss that an operator accepts in advance: any missing part of `[first, next)`.

    Attributes:
        partition: The partition.
        first: The first position.
        next: The position after the last.
        topic: Prefix of the topic's id; empty for the topic that the process reads.
    """

    partition: int
    first: int
    next: int
    topic: str = ""

    def covers(self, gap: Gap, read_topic: str) -> bool:
        """Whether `gap` may be skipped.

        >>> from state.positions import Source
        >>> gap = Gap(Source("ab" * 16, 3), 10, 20)
        >>> parse_allowance("3:10-19").covers(gap, "ab" * 16), parse_allowance("3:10-18").covers(gap, "ab" * 16)
        (True, False)
        >>> parse_allowance("abababab:3:0-99").covers(gap, "cd" * 16), parse_allowance("3:0-99").covers(gap, "cd" * 16)
        (True, False)

        Args:
            gap: The missing range.
            read_topic: Id of the topic that the process reads.
        """
        source = gap.source
        return (
            source.topic_id.startswith(self.topic or read_topic)
            and source.partition == self.partition
            and self.first <= gap.first
            and gap.next <= self.next
        )


def parse_allowance(text: str) -> Allowance:
    """Parses `P:A-B` or `TOPIC_ID:P:A-B`, both ends included.

    Raises:
        SettingsError: The text has another form.
    """
    match = _FORM.fullmatch(text.strip())
    if not match or int(match[3]) > int(match[4]):
        raise SettingsError(
            f"--accept-gap {text}: write PARTITION:A-B with the first and the last missing position, as the error says"
        )
    return Allowance(int(match[2]), int(match[3]), int(match[4]) + 1, match[1] or "")


def parse_records(text: str) -> range:
    """Parses `OFFSET`, or `A-B` with both ends included, as a range of offsets.

    >>> parse_records("7"), parse_records("7-9")
    (range(7, 8), range(7, 10))

    Raises:
        SettingsError: The text has another form.
    """
    match = _RECORDS.fullmatch(text.strip())
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise SettingsError(
            f"--skip-record {text}: write the record's OFFSET in the training log, as the error says, or A-B"
        )
    return range(int(match[1]), int(match[2] or match[1]) + 1)


@dataclass(frozen=True, slots=True)
class Consent:
    """The losses that an operator accepts when starting a process.

    Attributes:
        allowances: The gaps.
        actor: Who accepts them.
        reason: Why, in the actor's words.
        records: Offsets of training log records that may be skipped if they cannot be learned from.
        cut_back: Whether any truncation of the clicks is accepted.
    """

    allowances: tuple[Allowance, ...] = ()
    actor: str = ""
    reason: str = ""
    records: tuple[range, ...] = ()
    cut_back: bool = False

    def covers(self, gap: Gap, read_topic: str) -> bool:
        """Whether `gap` may be skipped."""
        return any(one.covers(gap, read_topic) for one in self.allowances)

    def leaves_out(self, offset: int) -> bool:
        """Whether the record at `offset` of the training log may be skipped.

        >>> Consent(records=(parse_records("7-9"),)).leaves_out(9)
        True
        """
        return any(offset in one for one in self.records)


def in_words(lost: TruncatedLog) -> str:
    """Describes what a truncated log lost, short enough for a reason.

    >>> from state.positions import Source
    >>> in_words(TruncatedLog("", "", [Gap(Source("ab" * 16, 0), 60, 90)]))
    'was cut back to offset 60, and we were at 90'
    """
    return f"was cut back to offset {lost.kept}, and we were at {lost.gaps[0].next}"


def how_to_go_on(error: GapError, command: str) -> GapError:
    """Adds to the error the command that accepts the loss.

    >>> from state.positions import Source
    >>> gap = Gap(Source("ab" * 16, 3), 10, 20)
    >>> print(how_to_go_on(GapError("10 positions are gone", "restore them", [gap]), "springtide stream (or up)"))
    10 positions are gone; restore them; to go on without them: springtide stream (or up) --accept-gap abababab:3:10-19 --reason TEXT

    Args:
        error: The error that stopped the process.
        command: The command that starts the process, to which the options are added.
    """
    if not error.gaps:
        return error
    flags = " ".join(f"--accept-gap {gap.place}" for gap in error.gaps)
    return GapError(error.what, f"{error.do}; to go on without them: {command} {flags} --reason TEXT", error.gaps)
