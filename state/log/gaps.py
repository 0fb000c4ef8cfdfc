"""Gaps in a log: what is missing, what loss an operator accepts, and the record of what was accepted.

A gap is a range of positions that nobody will ever read: deleted by retention
before we came, or covered by no record of the training log. A process that
meets one stops and says so. Started again with `--accept-gap P:A-B --reason
TEXT` it goes on behind it, and keeps who accepted what, when and why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from state.disk import files as durable
from state.errors import GapError, SettingsError
from state.positions import Gap, Source

_FORM = re.compile(r"(?:([0-9a-f]{8,32}):)?(\d+):(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Allowance:
    """A loss that an operator accepts in advance: whatever of `[first, next)` is missing.

    Attributes:
        partition: The partition.
        first: The first position.
        next: The one after the last.
        topic: How the topic's id begins; empty for the topic that the process reads.
    """

    partition: int
    first: int
    next: int
    topic: str = ""

    def covers(self, gap: Gap, read_topic: str) -> bool:
        """Whether `gap` may be passed.

        >>> gap = Gap(Source("ab" * 16, 3), 10, 20)
        >>> parse_allowance("3:10-19").covers(gap, "ab" * 16), parse_allowance("3:10-18").covers(gap, "ab" * 16)
        (True, False)
        >>> parse_allowance("abababab:3:0-99").covers(gap, "cd" * 16), parse_allowance("3:0-99").covers(gap, "cd" * 16)
        (True, False)

        Args:
            gap: What is missing.
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
    """The allowance of `P:A-B` or `TOPIC_ID:P:A-B`, both ends included.

    Raises:
        SettingsError: It is of another form.
    """
    match = _FORM.fullmatch(text.strip())
    if not match or int(match[3]) > int(match[4]):
        raise SettingsError(
            f"--accept-gap {text}: write PARTITION:A-B with the first and the last missing position, as the error says"
        )
    return Allowance(int(match[2]), int(match[3]), int(match[4]) + 1, match[1] or "")


@dataclass(frozen=True, slots=True)
class Consent:
    """What an operator accepts, said at a process's start.

    Attributes:
        allowances: The losses.
        actor: Who.
        reason: Why, in the actor's words.
    """

    allowances: tuple[Allowance, ...] = ()
    actor: str = ""
    reason: str = ""

    def covers(self, gap: Gap, read_topic: str) -> bool:
        """Whether `gap` may be passed."""
        return any(one.covers(gap, read_topic) for one in self.allowances)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A gap that was passed, for good.

    Attributes:
        gap: What was missing.
        actor: Who accepted it.
        reason: Why.
        at_ms: When, wall clock.
        marks: Where the reader was in each source of the rows that the gap held, as text: what
            follows each of them may be missing too. Only for a gap in the training log.
    """

    gap: Gap
    actor: str
    reason: str
    at_ms: int
    marks: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values.

        >>> one = Accepted(Gap(Source("ab" * 16, 3), 10, 20), "ann", "old", 5)
        >>> Accepted.from_json(one.to_json()) == one
        True
        """
        gap = {"source": str(self.gap.source), "first": self.gap.first, "next": self.gap.next}
        who = {"actor": self.actor, "reason": self.reason, "at_ms": self.at_ms}
        return {**gap, **who, "marks": dict(self.marks)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Accepted:
        """What `to_json` gave."""
        gap = Gap(Source.parse(document["source"]), int(document["first"]), int(document["next"]))
        marks = {str(name): int(mark) for name, mark in document.get("marks", {}).items()}
        return cls(gap, str(document["actor"]), str(document["reason"]), int(document["at_ms"]), marks)


def encode(accepted: Iterable[Accepted]) -> bytes:
    """All of them as bytes.

    >>> decode(encode([])), decode(None)
    ([], [])
    """
    return json.dumps([one.to_json() for one in accepted], sort_keys=True).encode()


def decode(data: bytes | None) -> list[Accepted]:
    """What `encode` wrote; none where there is nothing."""
    return [Accepted.from_json(one) for one in json.loads(data or b"[]")]


class Journal:
    """The gaps that the trainer passed: one file each in a directory, never changed. One writer, under its lock.

    Args:
        path: The directory; made with the first gap.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def accepted(self) -> list[Accepted]:
        """All of them, in the order in which they were accepted."""
        files = sorted(path for path in self.path.glob("*.json") if path.stem.isdecimal())
        return [Accepted.from_json(json.loads(path.read_bytes())) for path in files]

    def add(self, one: Accepted) -> None:
        """Keeps `one`, durably; a gap that is kept already stays as it is."""
        known = self.accepted()
        if any(each.gap == one.gap for each in known):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        final = self.path / f"{len(known) + 1:08d}.json"
        temporary = self.path / f"{final.name}~{durable.owner_mark()}"
        temporary.unlink(missing_ok=True)
        durable.write(temporary, json.dumps(one.to_json(), sort_keys=True).encode())
        os.link(temporary, final)
        temporary.unlink()
        durable.sync_directory(self.path)


def past(accepted: Iterable[Accepted], source: Source, offset: int) -> int:
    """Where reading goes on from `offset`, behind what was accepted as lost there.

    >>> one = Accepted(Gap(Source("ab" * 16, 0), 10, 20), "ann", "old", 5)
    >>> [past([one], Source("ab" * 16, 0), offset) for offset in (9, 10, 15, 20)]
    [9, 20, 20, 20]
    """
    for one in sorted(accepted, key=lambda each: each.gap.first):
        if one.gap.source == source and one.gap.first <= offset < one.gap.next:
            offset = one.gap.next
    return offset


def explained(accepted: Iterable[Accepted], gap: Gap) -> bool:
    """Whether the loss of `gap` was accepted: by itself, or because it followed where the training log lost records.

    >>> log, clicks = Source("cd" * 16, 0), Source("ab" * 16, 1)
    >>> one = Accepted(Gap(log, 10, 20), "ann", "old", 5, {str(clicks): 300})
    >>> explained([one], Gap(clicks, 300, 340)), explained([one], Gap(clicks, 301, 340))
    (True, False)
    """
    return any(
        one.marks.get(str(gap.source)) == gap.first
        or (one.gap.source == gap.source and one.gap.first <= gap.first and gap.next <= one.gap.next)
        for one in accepted
    )


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
        raise SettingsError(f"{error}; write --accept-gap P:A-B --reason TEXT") from error
    if asked.accept_gap and not asked.reason.strip():
        raise SettingsError("--accept-gap needs --reason TEXT: a loss is accepted by somebody, for a reason")
    allowances = tuple(parse_allowance(text) for text in asked.accept_gap)
    return Consent(allowances, actor, asked.reason), rest


def how_to_go_on(error: GapError, command: str) -> str:
    """The error's message with the command that accepts the loss.

    >>> gap = Gap(Source("ab" * 16, 3), 10, 20)
    >>> print(how_to_go_on(GapError("10 positions are gone", gap), "springtide stream"))
    10 positions are gone; to go on without them: springtide stream (or up) --accept-gap abababab:3:10-19 --reason TEXT

    Args:
        error: What stopped the process.
        command: The command that starts it.
    """
    if not error.gaps:
        return str(error)
    flags = " ".join(f"--accept-gap {gap.place}" for gap in error.gaps)
    return f"{error}; to go on without them: {command} (or up) {flags} --reason TEXT"


def accept(gap: Gap, consent: Consent, now_ms: int, marks: Mapping[Source, int] | None = None) -> Accepted:
    """The record of `gap`, accepted by `consent`."""
    known = {str(source): mark for source, mark in (marks or {}).items()}
    return replace(Accepted(gap, consent.actor, consent.reason, now_ms), marks=known)
