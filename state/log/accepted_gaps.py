"""The losses in a log that an operator accepts: options, consent, and the journal of accepted losses."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from state.disk import files as durable
from state.errors import GapError, SettingsError, TruncatedLog
from state.positions import Gap, Source
from state.process.commands import add_options

_RECORDS = re.compile(r"(\d+)(?:-(\d+))?")
_FORM = re.compile(r"(?:([0-9a-f]{8,32}):)?(\d+):(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Allowance:
    """A loss that an operator accepts in advance: any missing part of `[first, next)` of a partition.

    `topic` is a prefix of the topic's id; empty for the topic that the process reads.
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
        """
        source = gap.source
        return (
            source.topic_id.startswith(self.topic or read_topic)
            and source.partition == self.partition
            and self.first <= gap.first
            and gap.next <= self.next
        )


def parse_allowance(text: str) -> Allowance:
    """Parses `PARTITION:A-B` or `TOPIC_ID:PARTITION:A-B`, both ends included; SettingsError if the text has another form."""
    match = _FORM.fullmatch(text.strip())
    if not match or int(match[3]) > int(match[4]):
        raise SettingsError(
            f"--accept-gap {text}: write PARTITION:A-B with the first and the last missing position, as the error says"
        )
    return Allowance(int(match[2]), int(match[3]), int(match[4]) + 1, match[1] or "")


def parse_records(text: str) -> range:
    """Parses `OFFSET`, or `A-B` with both ends included, as a range of offsets; SettingsError for any other form."""
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
        records: Offsets of training log records that may be skipped if they cannot be learned from.
        cut_back: Whether any truncation of the clicks is accepted.
    """

    allowances: tuple[Allowance, ...] = ()
    actor: str = ""
    reason: str = ""
    records: tuple[range, ...] = ()
    cut_back: bool = False

    def covers(self, gap: Gap, read_topic: str) -> bool:
        """Whether `gap` may be skipped by a process that reads the topic with the id `read_topic`."""
        return any(allowance.covers(gap, read_topic) for allowance in self.allowances)

    def leaves_out(self, offset: int) -> bool:
        """Whether the record at `offset` of the training log may be skipped."""
        return any(offset in records for records in self.records)


def in_words(lost: TruncatedLog) -> str:
    """Describes the loss of a truncated log, short enough for a reason."""
    return f"was truncated to offset {lost.kept}, below the stored position {lost.gaps[0].next}"


def how_to_go_on(error: GapError, command: str) -> GapError:
    """Adds to the error the command that accepts the loss.

    >>> from state.positions import Source
    >>> gap = Gap(Source("ab" * 16, 3), 10, 20)
    >>> print(how_to_go_on(GapError("10 positions are gone", "restore them", [gap]), "springtide stream (or up)"))
    10 positions are gone; restore them; to go on without them: springtide stream (or up) --accept-gap abababab:3:10-19 --reason TEXT
    """
    if not error.gaps:
        return error
    flags = " ".join(f"--accept-gap {gap.place}" for gap in error.gaps)
    return GapError(error.what, f"{error.do}; to go on without them: {command} {flags} --reason TEXT", error.gaps)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A gap that was skipped permanently.

    Attributes:
        at_ms: Wall clock time of the acceptance.
        marks: The reader's position in each source of the rows that the gap contained, as text: rows that follow each
            position may be missing too. Only for a gap in the training log.
        record: Why the record could not be learned from; empty if there was no record.
    """

    gap: Gap
    actor: str
    reason: str
    at_ms: int
    marks: Mapping[str, int] = field(default_factory=dict)
    record: str = ""

    def to_json(self) -> dict[str, Any]:
        """Converts the gap to JSON values."""
        gap = {"source": str(self.gap.source), "first": self.gap.first, "next": self.gap.next}
        who = {"actor": self.actor, "reason": self.reason, "at_ms": self.at_ms}
        record = {"record": self.record} if self.record else {}
        return {**gap, **who, **record, "marks": dict(self.marks)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Accepted:
        """Decodes the output of `to_json`."""
        gap = Gap(Source.parse(document["source"]), int(document["first"]), int(document["next"]))
        marks = {str(name): int(mark) for name, mark in document.get("marks", {}).items()}
        who = (str(document["actor"]), str(document["reason"]))
        return cls(gap, *who, int(document["at_ms"]), marks, str(document.get("record", "")))


def encode(accepted: Iterable[Accepted]) -> bytes:
    """Encodes accepted gaps."""
    return json.dumps([gap.to_json() for gap in accepted], sort_keys=True).encode()


def decode(data: bytes | None) -> list[Accepted]:
    """Decodes the output of `encode`; no data means none."""
    return [Accepted.from_json(value) for value in json.loads(data or b"[]")]


class Journal:
    """The gaps that the trainer skipped: one immutable file per gap in a directory. One writer, under its lock.

    `staging` is the folder of the trainer's claim, for temporary files.
    """

    def __init__(self, path: Path, staging: Path | None = None) -> None:
        self.path, self._staging = path, staging

    def accepted(self) -> list[Accepted]:
        """All accepted gaps, in the order of acceptance."""
        files = sorted(path for path in self.path.glob("*.json") if path.stem.isdecimal())
        return [Accepted.from_json(json.loads(path.read_bytes())) for path in files]

    def add(self, gap: Accepted) -> None:
        """Stores a gap durably; leaves a gap that is stored already unchanged."""
        stored_gaps = self.accepted()
        if any(stored.gap == gap.gap for stored in stored_gaps):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        final = self.path / f"{len(stored_gaps) + 1:08d}.json"
        data = json.dumps(gap.to_json(), sort_keys=True).encode()
        if not durable.create(final, data, durable.unique((self._staging or self.path) / final.name)):
            raise FileExistsError(final)


def past(accepted: Iterable[Accepted], source: Source, offset: int) -> int:
    """The offset at which reading resumes from `offset`, after the losses accepted there.

    >>> one = Accepted(Gap(Source("ab" * 16, 0), 10, 20), "ann", "old", 5)
    >>> [past([one], Source("ab" * 16, 0), offset) for offset in (9, 10, 15, 20)]
    [9, 20, 20, 20]
    """
    for gap in sorted(accepted, key=lambda accepted_gap: accepted_gap.gap.first):
        if gap.gap.source == source and gap.gap.first <= offset < gap.gap.next:
            offset = gap.gap.next
    return offset


def left_out(accepted: Iterable[Accepted], source: Source, offset: int) -> bool:
    """Whether the record at `offset` is skipped regardless of its content."""
    return any(
        bool(gap.record) and gap.gap.source == source and gap.gap.first <= offset < gap.gap.next for gap in accepted
    )


def explained(accepted: Iterable[Accepted], gap: Gap) -> bool:
    """Whether the loss of `gap` was accepted, directly or as a consequence of a gap in the training log.

    >>> log, clicks = Source("cd" * 16, 0), Source("ab" * 16, 1)
    >>> one = Accepted(Gap(log, 10, 20), "ann", "old", 5, {str(clicks): 300})
    >>> explained([one], Gap(clicks, 300, 340)), explained([one], Gap(clicks, 301, 340))
    (True, False)
    """
    return any(
        passed.marks.get(str(gap.source)) == gap.first
        or (passed.gap.source == gap.source and passed.gap.first <= gap.first and gap.next <= passed.gap.next)
        for passed in accepted
    )


def accept(
    gap: Gap, consent: Consent, now_ms: int, marks: Mapping[Source, int] | None = None, record: str = ""
) -> Accepted:
    """The record of `gap` accepted by `consent`; see `Accepted`."""
    named_marks = {str(source): mark for source, mark in (marks or {}).items()}
    return Accepted(gap, consent.actor, consent.reason, now_ms, named_marks, record)


def as_options(args: argparse.Namespace, records: bool = True) -> list[str]:
    """Converts the options back to words, for a process that a command starts; `--skip-record` only with `records`.

    >>> from state.process.commands import parser_of
    >>> asked = parser_of("train").parse_args(["--accept-gap", "0:5-9", "--skip-record", "7", "--reason", "old"])
    >>> as_options(asked, records=False)
    ['--accept-gap', '0:5-9', '--reason', 'old']
    """
    words = [word for gap in args.accept_gap for word in ("--accept-gap", gap)]
    words += ["--accept-cut-back"] if args.accept_cut_back else []
    if records:
        words += [word for offsets in getattr(args, "skip_record", ()) for word in ("--skip-record", offsets)]
    return [*words, "--reason", args.reason] if words and args.reason else words


def take_options(argv: Sequence[str], actor: str, records: bool = False) -> tuple[Consent, list[str]]:
    """Extracts these options from a command line, `--skip-record` only with `records`; returns them and the other words.

    >>> consent, rest = take_options(["--accept-gap", "0:5-9", "--reason", "old", "--kafka.port", "9"], "ann")
    >>> consent.allowances[0].first, consent.reason, rest
    (5, 'old', ['--kafka.port', '9'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser, {"*losses" if records else "*gaps": {}})
    try:
        args, words = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise SettingsError(
            str(error), "write --accept-gap PARTITION:A-B or --skip-record OFFSET, and --reason TEXT"
        ) from error
    return consent_of(args, actor), words


def consent_of(args: argparse.Namespace, actor: str) -> Consent:
    """Returns what the parsed options accept.

    Raises:
        SettingsError: An option has an invalid form, or there is no reason.
    """
    skipped = getattr(args, "skip_record", [])
    named = {"--accept-gap": args.accept_gap, "--accept-cut-back": args.accept_cut_back, "--skip-record": skipped}
    if any(named.values()) and not args.reason.strip():
        option = next(name for name, value in named.items() if value)
        raise SettingsError(f"{option} needs --reason TEXT: a loss is accepted by somebody, for a reason")
    allowances = tuple(parse_allowance(text) for text in args.accept_gap)
    return Consent(allowances, actor, args.reason, tuple(map(parse_records, skipped)), args.accept_cut_back)
