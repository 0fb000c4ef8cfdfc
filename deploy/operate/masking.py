"""Masks as operators write them: parses the options, validates them against clock and topics, and describes masks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

from deploy.formats import iso, parse_times
from state.config.settings import Settings
from state.config.sources import UNITS_MS
from state.errors import SaltMismatch, SettingsError
from state.events.identity import ids_in, load_salt, user_id
from state.features.erased import MaskedUsers
from state.features.mask import Column, Mask, Named
from state.registry.manifest import Manifest

Ends = Mapping[int, tuple[int, int]]
"""Of the clicks topic: by partition, the first kept offset and the offset of the next record."""


def mask_of(settings: Settings, args: argparse.Namespace, newest: Manifest, now_ms: int) -> Mask:
    """Builds the mask from the options --skip, --skip-time, --minutes, --skip-users and so on.

    Raises:
        SettingsError: An option has an invalid form, or ends in the future.
    """
    topic_ids = {source.topic_id for source, _ in newest.sources}
    times = [_past(text, "--skip-time", now_ms) for text in args.skip_time]
    if args.minutes is not None:
        times.append((now_ms - args.minutes * UNITS_MS["m"], now_ms))
    users = MaskedUsers.of(parse_pseudonym(text) for text in args.skip_pseudonym)
    if args.skip_users is not None:
        users |= pseudonyms(settings, ids_in(args.skip_users, "--skip-users"), newest.salt)
    offsets = tuple(parse_place(text, topic_ids) for text in args.skip)
    return Mask(offsets=offsets, times=tuple(times), users=users, named=named_in(args, now_ms))


def named_in(wanted: Any, now_ms: int) -> tuple[Named, ...]:
    """Parses the items and categories in `skip_item` and `skip_category`, lists of texts; raises as `parse_named`."""
    columns: tuple[Column, ...] = get_args(Column)
    return tuple(parse_named(text, column, now_ms) for column in columns for text in getattr(wanted, f"skip_{column}"))


def parse_named(text: str, column: Column, now_ms: int) -> Named:
    """Parses `NAME=A..B`, the clicks on an item or in a category within a time span.

    >>> parse_named("shoes=10m..now", "category", 1_000_000)
    Named(column='category', name='shoes', first_ms=400000, next_ms=1000000)

    Raises:
        SettingsError: The text has another form, or ends in the future.
    """
    name, _, span = text.rpartition("=")
    if not name:
        raise SettingsError(f"--skip-{column} {text}: write NAME=A..B, such as NAME=20m..now")
    return Named(column, name, *_past(span, f"--skip-{column}", now_ms))


def _past(text: str, option: str, now_ms: int) -> tuple[int, int]:
    first, end = parse_times(text, now_ms, option)
    if end > now_ms:
        raise SettingsError(
            f"{option} {text}: it ends in the future, {iso(end)}, so future clicks would be left out too",
            "end it at the current time, and mask later clicks when they have arrived",
        )
    return first, end


def require_positions(mask: Mask, topic_id: str, ends: Ends) -> None:
    """Checks that the clicks topic has all offsets of a mask; offsets of other topics are not checked.

    >>> require_positions(Mask(offsets=((42, 3, 5, 20),)), "0000002a" + "0" * 24, {3: (0, 20)})

    Raises:
        SettingsError: A partition or an offset does not exist.
    """
    for topic, partition, first, last in mask.offsets:
        if topic != int(topic_id[:8], 16):
            continue
        option = f"--skip {partition}:{first}-{last - 1}"
        if partition not in ends:
            known = ", ".join(map(str, sorted(ends)))
            raise SettingsError(f"{option}: the clicks topic has no partition {partition}", f"it has {known}")
        if last > ends[partition][1]:
            raise SettingsError(
                f"{option}: partition {partition} ends before offset {ends[partition][1]}: clicks to come would be left out too",
                f"name offsets up to {ends[partition][1] - 1}",
            )


def parse_place(text: str, topic_ids: Collection[str]) -> tuple[int, int, int, int]:
    """Parses a mask entry from `PARTITION:A-B` (both included), or `TOPIC_ID:PARTITION:A-B`.

    `topic_ids` are those that versions were trained on, 32 hexadecimal digits each.

    >>> parse_place("3:100-199", ["0000002a" + "0" * 24])
    (42, 3, 100, 200)

    Raises:
        SettingsError: The text has another form, or the topic is ambiguous.
    """
    match = re.fullmatch(r"(?:([0-9a-f]+):)?(\d+):(\d+)-(\d+)", text.strip())
    if not match or int(match[3]) > int(match[4]):
        raise SettingsError(f"--skip {text}: write PARTITION:A-B with offsets A up to B, such as 3:1000-1999")
    matches = sorted(topic_id for topic_id in topic_ids if topic_id.startswith(match[1] or ""))
    if len(matches) != 1:
        known = ", ".join(sorted(topic_ids)) or "none yet"
        raise SettingsError(
            f"--skip {text}: write TOPIC_ID:PARTITION:A-B with one of the topic ids trained on: {known}"
        )
    return int(matches[0][:8], 16), int(match[2]), int(match[3]), int(match[4]) + 1


def parse_pseudonym(text: str) -> int:
    """Parses the pseudonym of a user, 16 hexadecimal digits.

    >>> parse_pseudonym("00000000000000ab")
    171

    Raises:
        SettingsError: The text has another form.
    """
    if not re.fullmatch(r"[0-9a-f]{16}", text):
        raise SettingsError(
            "--skip-pseudonym: it does not have 16 hexadecimal digits", "copy it from `springtide jumps`"
        )
    return int(text, 16)


def pseudonyms(settings: Settings, ids: Iterable[str], fingerprint: str) -> MaskedUsers:
    """Returns the pseudonyms of user ids.

    Raises:
        MissingSalt: The salt file is missing.
        SaltMismatch: The salt is not that of `fingerprint`, with which the versions were trained.
    """
    salt = load_salt(settings.salt_path, create=False)
    if salt.fingerprint != fingerprint:
        raise SaltMismatch.between(f"the registry {settings.registry_dir}", fingerprint, salt.fingerprint)
    return MaskedUsers.of(user_id(salt, plain) for plain in ids)


def describe(mask: Mask) -> str:
    """Describes a mask in words, without user ids.

    >>> describe(Mask(times=((0, 60_000),), users=MaskedUsers.of([7])))
    'clicks from 1970-01-01T00:00:00Z to 1970-01-01T00:01:00Z; all of 1 user'
    """
    parts = [
        f"topic {topic:08x} partition {partition} offsets {first}-{last - 1}"
        for topic, partition, first, last in mask.offsets
    ]
    parts += [f"clicks from {iso(first)} to {iso(last)}" for first, last in mask.times]
    parts += [f"clicks of {column} {name} from {iso(first)} to {iso(last)}" for column, name, first, last in mask.named]
    if mask.users:
        parts.append(f"all of {len(mask.users):,} user{'s' if len(mask.users) > 1 else ''}")
    return "; ".join(parts) or "nothing"


def mask_document(mask: Mask) -> dict[str, Any]:
    """Returns a mask as JSON values; users are counted, not listed."""
    return {**replace(mask, users=MaskedUsers.NOBODY).to_json(), "users": len(mask.users)}
