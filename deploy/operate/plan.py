"""What a rollback would do, worked out before anything changes; pure.

Also reads the operator's ways to write a time and a place in the clicks topic.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from state.errors import SettingsError, UnknownVersion
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.registry import log_line
from state.registry.control import Control
from state.registry.manifest import Manifest

UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@dataclass(frozen=True)
class Plan:
    """A rollback, before it is done.

    Attributes:
        to: The version gone back to.
        age_s: Its age.
        topic: Name of the training log.
        partition: Its partition.
        first: Offset that the trainer goes back to.
        end: End of the log now, or the newest version's offset where Kafka was not asked.
        end_is_exact: Whether Kafka was asked.
        rows: Rows trained since the version, on the newest version's line; None where it does not descend from it.
        mask: The events left out from now on.
    """

    to: int
    age_s: float
    topic: str
    partition: int
    first: int
    end: int
    end_is_exact: bool
    rows: int | None
    mask: Mask

    @property
    def records(self) -> int:
        """Log positions to be replayed; each transaction's marker takes one too."""
        return max(0, self.end - self.first)

    def lines(self) -> list[str]:
        """The plan for people, one line per fact.

        >>> Plan(40, 90.0, "log", 0, 100, 160, True, 5000, Mask.NONE).lines()[1]
        'replay        log, partition 0, offsets 100 to 160: 60 positions, 5,000 rows trained since'
        """
        end = f"{self.end}" if self.end_is_exact else f"at least {self.end} (Kafka was not asked)"
        rows = "" if self.rows is None else f", {self.rows:,} rows trained since"
        return [
            f"go back to    version {self.to}, {age(self.age_s)} old",
            f"replay        {self.topic}, partition {self.partition}, offsets {self.first} to {end}: {self.records:,} positions{rows}",
            f"leave out     {describe(self.mask)}",
            "answers       come from that version at once, and stay there until `springtide follow`",
        ]

    def document(self) -> dict[str, Any]:
        """The plan as JSON values; a mask's users are counted, not listed."""
        return {
            "to": self.to,
            "age_s": round(self.age_s, 3),
            "log": {"topic": self.topic, "partition": self.partition, "first": self.first, "end": self.end},
            "end_is_exact": self.end_is_exact,
            "records": self.records,
            "rows": self.rows,
            "mask": mask_document(self.mask),
        }


def rollback_plan(
    to: Manifest, newest: Manifest, mask: Mask, *, now_ms: int, log_end: int | None, topic: str = "", partition: int = 0
) -> Plan:
    """The plan of going back to `to` while `newest` is the newest version.

    Args:
        to: Manifest of the version gone back to.
        newest: Manifest of the newest version of control's epoch.
        mask: What to leave out.
        now_ms: Wall clock.
        log_end: End offset of the training log; None when Kafka does not answer.
        topic: Name of the training log where the manifest has none yet.
        partition: Partition likewise.
    """
    descends = any(low <= to.version <= high for low, high in newest.visible)
    return Plan(
        to=to.version,
        age_s=(now_ms - to.created_at_ms) / 1000,
        topic=to.log.topic or topic,
        partition=to.log.partition if to.log.topic else partition,
        first=to.log.next,
        end=max(newest.log.next, to.log.next) if log_end is None else log_end,
        end_is_exact=log_end is not None,
        rows=newest.rows - to.rows if descends else None,
        mask=mask,
    )


def newest_before(newest_first: Iterable[Manifest], before_ms: int) -> Manifest:
    """The newest version made before a moment; reads no further than it must.

    Raises:
        UnknownVersion: None is that old.
    """
    oldest: Manifest | None = None
    for one in newest_first:
        if one.created_at_ms < before_ms:
            return one
        oldest = one
    hint = "there is no version yet"
    if oldest is not None:
        hint = f"the oldest is version {oldest.version} of {iso(oldest.created_at_ms)}"
    raise UnknownVersion(f"no version was made before {iso(before_ms)}", hint)


def require_on_line(control: Control, to: Manifest) -> None:
    """Refuses a version that learned records which an exact rollback has abandoned since.

    Raises:
        UnknownVersion: It is one.
    """
    if not log_line.has(control.log, to.log.epoch, to.log.next):
        raise UnknownVersion(
            f"version {to.version} has learned records of the training log that an exact rollback abandoned since",
            "take a version from before that rollback, or one made after it: `springtide history` and `springtide versions`",
        )


def parse_time(text: str, now_ms: int) -> int:
    """A moment in ms: ISO 8601 (UTC unless it says otherwise), seconds or ms since 1970, `now`, or `10m` (ago).

    >>> parse_time("10m", 1_000_000), parse_time("1970-01-01T00:01", 0), parse_time("1700000000", 0)
    (400000, 60000, 1700000000000)

    Raises:
        SettingsError: It is none of these.
    """
    text = text.strip()
    if text == "now":
        return now_ms
    if relative := re.fullmatch(r"-?(\d+(?:\.\d+)?)(ms|s|m|h|d)", text):
        return now_ms - round(float(relative[1]) * UNITS_MS[relative[2]])
    if re.fullmatch(r"\d+", text):
        return int(text) if len(text) > 11 else int(text) * 1000
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(
            f"time {text!r}: write ISO 8601 such as 2026-05-01T12:00:00, now, or 10m for ten minutes ago"
        ) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def parse_times(text: str, now_ms: int) -> tuple[int, int]:
    """The half-open range of `A..B`.

    >>> parse_times("10m..now", 1_000_000)
    (400000, 1000000)

    Raises:
        SettingsError: It is no range, or B does not come after A.
    """
    first, dots, last = text.partition("..")
    if not dots:
        raise SettingsError(f"--skip-time {text}: write A..B, such as 10m..now")
    span = (parse_time(first, now_ms), parse_time(last, now_ms))
    if span[0] >= span[1]:
        raise SettingsError(f"--skip-time {text}: it ends before it begins", "write the earlier time first")
    return span


def parse_place(text: str, topic_ids: Collection[str]) -> tuple[int, int, int, int]:
    """A mask entry of `PARTITION:A-B` (both included), or `TOPIC_ID:PARTITION:A-B`.

    Args:
        text: What the operator wrote.
        topic_ids: Ids of the click topics that versions were trained on, 32 hexadecimal digits each.

    >>> parse_place("3:100-199", ["0000002a" + "0" * 24])
    (42, 3, 100, 200)

    Raises:
        SettingsError: It is not of that form, or the topic is not clear.
    """
    match = re.fullmatch(r"(?:([0-9a-f]+):)?(\d+):(\d+)-(\d+)", text.strip())
    if not match or int(match[3]) > int(match[4]):
        raise SettingsError(f"--skip {text}: write PARTITION:A-B with offsets A up to B, such as 3:1000-1999")
    found = sorted(one for one in topic_ids if one.startswith(match[1] or ""))
    if len(found) != 1:
        known = ", ".join(sorted(topic_ids)) or "none yet"
        raise SettingsError(
            f"--skip {text}: write TOPIC_ID:PARTITION:A-B with one of the topic ids trained on: {known}"
        )
    return int(found[0][:8], 16), int(match[2]), int(match[3]), int(match[4]) + 1


def describe(mask: Mask) -> str:
    """A mask in words, without a user's id.

    >>> describe(Mask(times=((0, 60_000),), users=MaskedUsers.of([7])))
    'clicks from 1970-01-01T00:00:00Z to 1970-01-01T00:01:00Z; all of 1 user'
    """
    parts = [
        f"topic {word:08x} partition {partition} offsets {first}-{last - 1}"
        for word, partition, first, last in mask.offsets
    ]
    parts += [f"clicks from {iso(first)} to {iso(last)}" for first, last in mask.times]
    if mask.users:
        parts.append(f"all of {len(mask.users):,} user{'s' if len(mask.users) > 1 else ''}")
    return "; ".join(parts) or "nothing"


def mask_document(mask: Mask) -> dict[str, Any]:
    """A mask as JSON values; users are counted, not listed."""
    return {**replace(mask, users=MaskedUsers.NOBODY).to_json(), "users": len(mask.users)}


def age(seconds: float) -> str:
    """A duration as people say it.

    >>> [age(seconds) for seconds in (0.24, 75, 3 * 3600 + 120, 200_000)]
    ['0.2 s', '1 min 15 s', '3 h 2 min', '2 d 7 h']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, size, below, smaller in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        if whole < size * {"min": 60, "h": 24, "d": 10**9}[unit]:
            return f"{whole // size} {unit} {whole % size // smaller} {below}"
    raise AssertionError("days have no bound")


def iso(time_ms: int) -> str:
    """A moment in UTC, to the second.

    >>> iso(61_000)
    '1970-01-01T00:01:01Z'
    """
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
