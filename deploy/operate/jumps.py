"""`springtide jumps`: finds users, items and categories whose share of the clicks jumped.

It reads the training log: the last minutes, and three times as long before them. Clicks that a mask leaves out do not
count. Each name comes from one click, which is read from the clicks topic; the name is unknown if that click is gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.formats import iso
from deploy.operate.branch import ServingBranch
from deploy.operate.control import Say, current
from deploy.operate.log_view import LogView, records, view_of
from deploy.operate.versions import open_registry, table
from state.config.settings import Settings
from state.config.sources import UNITS_MS
from state.errors import DecodeError, LogError, MissingSalt
from state.events.decoding import load_decoder
from state.events.identity import load_salt, public_id, user_id
from state.microbatch.batch import happened, log_times, masked
from state.registry.segments import segments_to_end

KINDS = {"users": "user", "items": "item", "categories": "category"}
"""By section of the output, the column that identifies what is counted."""
BEFORE = 3
"""How many times as long the earlier span is."""
LISTED, MOST_USERS = 5, 50
LEAST_SHARE, LEAST_GROWTH, LEAST_CLICKS = 0.005, 1.5, 20
LEAST_DEVIATION = 6.0
"""In standard deviations of the expected number of clicks, which is taken as Poisson distributed."""
MOST_ROWS = 1 << 20
"""Rows in memory, 44 MB. If there are more, every second one is kept, again and again: shares stay."""
MOST_RECORDS = 100_000
"""Offsets of the training log that are read at most: about 20 s."""
NONE = (math.inf, 0)
"""The kept offsets of a partition that does not exist."""
CLICK_S, POLL_S = 5.0, 0.5
"""Seconds to wait for all clicks that name something, and for one poll."""
ROW = np.dtype(
    [("user", "<u8"), ("item", "<u8"), ("category", "<u8"), ("at_ms", "<i8"), ("partition", "<u2"), ("offset", "<i8")]
)
Rows = NDArray[Any]


@dataclass
class Jump:
    """An id whose share of the clicks jumped.

    Attributes:
        id: The pseudonym of a user, or the hash of an item or a category.
        before: Its share in the earlier span.
        users: Pseudonyms of the users with most of its recent clicks, at most `MOST_USERS`; for a user, that one.
        covered: Share of its recent clicks that are of these users.
        name: The id as in the clicks; None if its click is no longer kept.
        user: The user id of the first of `users`, as in the clicks; likewise.
    """

    id: int
    clicks: int
    share: float
    before: float
    users: list[int]
    covered: float = 1.0
    name: str | None = None
    user: str | None = None

    def document(self) -> dict[str, Any]:
        """Returns the jump as JSON values; ids have 16 hexadecimal digits."""
        hexadecimal = {"id": f"{self.id:016x}", "users": [f"{user:016x}" for user in self.users]}
        return dataclasses.asdict(self) | hexadecimal


def jumps(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Prints the users, items and categories whose share of the clicks jumped in the last `args.minutes`."""
    span_ms = args.minutes * UNITS_MS["m"]
    recent_ms, first_ms = now_ms - span_ms, now_ms - (1 + BEFORE) * span_ms
    view = view_of(settings)
    if view is None:
        raise LogError("Kafka does not answer: the training log cannot be read", "start Kafka")
    rows, stride = _kept(_rows(settings, view, first_ms))
    rows = rows[(rows["at_ms"] >= first_ms) & (rows["at_ms"] < now_ms)]
    is_recent = rows["at_ms"] >= recent_ms
    recent, before = rows[is_recent], rows[~is_recent]
    sections = {section: _jumped(recent, before, kind, stride) for section, kind in KINDS.items()}
    _name(settings, view, recent, sections)
    begin_ms = int(before["at_ms"].min()) if len(before) else recent_ms
    document: dict[str, Any] = {
        "first_ms": begin_ms,
        "recent_ms": recent_ms,
        "end_ms": now_ms,
        "clicks": len(recent) * stride,
        "clicks_before": len(before) * stride,
    } | {section: [jump.document() for jump in listed] for section, listed in sections.items()}
    say(json.dumps(document, indent=2) if args.output == "json" else "\n".join(_lines(document)))


def _rows(settings: Settings, view: LogView, first_ms: int) -> Iterator[Rows]:
    registry = open_registry(settings)
    control = current(registry, None)
    branch = ServingBranch(registry, control)
    start = branch.last(lambda version: version.created_at_ms < first_ms) or branch.oldest() or branch.newest
    floor = max(view.begin, view.end - MOST_RECORDS)
    segments = segments_to_end(registry, control, start, branch.newest, view.end)
    with view.reader(max(floor, min(segments[0].first, view.end))) as reader:
        for segment in segments:
            first = max(floor, segment.first)
            for _, batch in records(reader, first, segment.next, segment.line):
                counted = happened(batch.kind) & ~masked(batch, control.mask)
                rows = np.empty(len(batch), ROW)
                for name in ("user", "item", "category", "offset"):
                    rows[name] = getattr(batch, name)
                partitions = [part.source.partition for part in batch.header.ranges] or [0]
                rows["partition"] = np.array(partitions, np.uint16)[batch.source]
                rows["at_ms"] = log_times(batch)
                yield rows[counted]


def _kept(parts: Iterator[Rows]) -> tuple[Rows, int]:
    kept, stride = np.empty(0, ROW), 1
    pending: list[Rows] = []
    seen = waiting = 0
    for part in parts:
        pending.append(part[-seen % stride :: stride])
        seen, waiting = seen + len(part), waiting + len(pending[-1])
        if len(kept) + waiting > MOST_ROWS:
            kept, pending, waiting, stride = np.concatenate([kept, *pending])[::2], [], 0, 2 * stride
    return np.concatenate([kept, *pending]), stride


def _jumped(recent: Rows, before: Rows, kind: str, stride: int) -> list[Jump]:
    if not len(before):
        return []
    ids, counts = np.unique(recent[kind], return_counts=True)
    old_ids, old_counts = np.unique(before[kind], return_counts=True)
    usual = np.zeros(len(ids))
    _, index, old_index = np.intersect1d(ids, old_ids, assume_unique=True, return_indices=True)
    usual[index] = old_counts[old_index] / len(before)
    share, expected = counts / max(1, len(recent)), usual * len(recent)
    jumped = (ids != 0) & (counts * stride >= LEAST_CLICKS) & (share >= np.maximum(LEAST_SHARE, LEAST_GROWTH * usual))
    jumped &= counts - expected >= LEAST_DEVIATION * np.sqrt(expected + 1)
    order = np.argsort(expected - counts, kind="stable")
    listed = []
    for number in order[jumped[order]][:LISTED].tolist():
        users, clicks = np.unique(recent["user"][recent[kind] == ids[number]], return_counts=True)
        most = np.argsort(-clicks, kind="stable")[:MOST_USERS]
        covered = float(clicks[most].sum() / counts[number])
        shares = float(share[number]), float(usual[number])
        listed.append(Jump(int(ids[number]), int(counts[number]) * stride, *shares, users[most].tolist(), covered))
    return listed


def _name(settings: Settings, view: LogView, recent: Rows, sections: Mapping[str, Sequence[Jump]]) -> None:
    try:
        salt = load_salt(settings.salt_path, create=False)
    except MissingSalt:
        # Without it, a click cannot be checked.
        return
    named: list[tuple[Jump, str, tuple[int, int]]] = []
    for section, kind in KINDS.items():
        for jump in sections[section]:
            own = recent[(recent[kind] == jump.id) & (recent["user"] == jump.users[0])]
            newest = own[np.argmax(own["at_ms"])]
            named.append((jump, kind, (int(newest["partition"]), int(newest["offset"]))))
    clicks = _clicks(settings, view, [position for _, _, position in named])
    for jump, kind, position in named:
        if (click := clicks.get(position)) is None or click.user is None or user_id(salt, click.user) != jump.users[0]:
            # It is gone, or a recreated topic has another click there.
            continue
        jump.user = str(click.user)
        name = getattr(click, kind)
        if kind == "user" or (name is not None and public_id(name) == jump.id):
            jump.name = str(name)


def _clicks(settings: Settings, view: LogView, positions: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Any]:
    """Reads clicks by partition and offset; those that are gone or cannot be decoded are left out."""
    kept = [(partition, offset) for partition, offset in positions if view.clicks.get(partition, NONE)[0] <= offset]
    decode, until_s = load_decoder(settings.events), time.monotonic() + CLICK_S
    clicks: dict[tuple[int, int], Any] = {}
    # The names are worth no failure: a broker may delete the clicks meanwhile.
    with suppress(LogError):
        if kept:
            partitions = sorted({partition for partition, _ in kept})
            with view.log.reader(settings.kafka.clicks_topic, partitions, dict(kept)) as reader:
                for partition, offset in kept:
                    reader.seek(partition, offset)
                    while reader.position(partition) <= offset and time.monotonic() < until_s:
                        for batch in reader.poll(POLL_S, 1, {partition: 1}):
                            for at, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                                with suppress(DecodeError, ValueError):
                                    clicks[partition, at] = decode(value or b"")
    return clicks


def _lines(document: dict[str, Any]) -> list[str]:
    recent, clicks, before = document["recent_ms"], document["clicks"], document["clicks_before"]
    summary = f"{clicks:,} clicks since {iso(recent)}, compared with {before:,} from {iso(document['first_ms'])} on"
    if not before:
        return [summary, "there are no earlier clicks to compare with"]
    head = ["", "name", "clicks", "share", "before", "users", "pseudonym of the first"]
    listed = [
        [
            kind,
            jump["name"] or "unknown: its click is no longer kept",
            f"{jump['clicks']:,}",
            f"{jump['share']:.1%}",
            f"{jump['before']:.1%}",
            f"{len(jump['users'])}",
            jump["users"][0],
        ]
        for section, kind in KINDS.items()
        for jump in document[section]
    ]
    return [summary, table([head, *listed]) if listed else "no share jumped"]
