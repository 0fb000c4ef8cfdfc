"""Divides the events of a bundle into buckets of users, and encodes the part of each bucket. Pure.

Each bucket gets a part, even one without events. Its ranges cover all offsets that were read of the partitions, so that
the bucket's positions advance.

Columns travel between steps, and in an engine's state, as a line of JSON and the bytes of the arrays (`pack`). This
uses no pickle, and no Arrow schema for each of a thousand small messages a second: Arrow takes about 200 us for one
message, this format about 20. Both ends run the same release: a job is upgraded from a savepoint, which drains messages
in flight first. Data in the engine's state carries its format version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.events.dead_letters import DeadLetter, Reason
from state.events.parser import EventBatch
from state.positions import SHARES, Range, Source, from_json, share_of, to_json
from streaming.cut import merge_all
from streaming.event_clock import Moves, OffClock, Told
from streaming.rows import COLUMNS

_LENGTH_BYTES = 4


def pack(head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Encodes JSON values and arrays of numbers as one value.

    >>> head, arrays = unpack(pack({"a": 1}, {"b": np.arange(3)}))
    >>> head, arrays["b"].tolist()
    ({'a': 1}, [0, 1, 2])

    Args:
        head: JSON values.
        arrays: By name, each of any shape.
    """
    shapes = [(name, one.dtype.str, one.shape) for name, one in arrays.items()]
    line = json.dumps([head, shapes], separators=(",", ":")).encode()
    parts = [np.ascontiguousarray(one).tobytes() for one in arrays.values()]
    return b"".join((len(line).to_bytes(_LENGTH_BYTES, "little"), line, *parts))


def unpack(value: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Decodes the result of `pack`; the arrays are writable and contiguous, as compiled code requires."""
    at = _LENGTH_BYTES + int.from_bytes(value[:_LENGTH_BYTES], "little")
    head, shapes = json.loads(value[_LENGTH_BYTES:at])
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind, shape in shapes:
        dtype, count = np.dtype(kind), int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(value, dtype, count, at).copy().reshape(shape)
        at += count * dtype.itemsize
    return head, arrays


def joined(values: list[bytes]) -> dict[str, NDArray[Any]]:
    """Encodes values of any lengths as two arrays, for `pack`.

    >>> parted(joined([b"ab", b"", b"c"]))
    [b'ab', b'', b'c']
    """
    return {
        "lengths": np.array([len(one) for one in values], np.int64),
        "bytes": np.frombuffer(b"".join(values), np.uint8),
    }


def parted(arrays: Mapping[str, NDArray[Any]]) -> list[bytes]:
    """Decodes the result of `joined`."""
    data, lengths = arrays["bytes"].tobytes(), arrays["lengths"]
    ends = np.cumsum(lengths)
    return [data[start:end] for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """The part of a bundle that one bucket receives.

    Attributes:
        batch: Its users' events; the ranges are the bucket's.
        told: The event clock; `state` is empty, because it stays with the positions of the source.
        control: The generation of control whose mask left events out; 0 for none.
        log_epoch: The epoch of the training log that is written.
        appended_ms: When Kafka received the newest record of the bundle; 0 for none.
    """

    batch: EventBatch
    told: Told
    control: int = 0
    log_epoch: int = 1
    appended_ms: int = 0


def gathered(events: EventBatch) -> EventBatch:
    """Merges the ranges of several polls to one range for each partition."""
    if len({part.source for part in events.ranges}) == len(events.ranges):
        return events
    ranges = merge_all(events.ranges)
    number = {part.source: at for at, part in enumerate(ranges)}
    numbers = np.array([number[part.source] for part in events.ranges], np.uint16)
    return replace(events, ranges=ranges, source=numbers[events.source])


def divide(events: EventBatch, told: Told, buckets: int) -> list[tuple[EventBatch, Told]]:
    """Divides a batch; returns the parts in the order of the buckets.

    Args:
        events: The batch, with one range for each partition.
        told: Its event clock.
        buckets: Number of buckets, a divisor of `SHARES`.
    """
    mine, parts = share_of(events.user) % buckets, len(events.ranges)
    order = np.argsort(mine, kind="stable")
    ends = np.cumsum(np.bincount(mine, minlength=buckets)).tolist()
    rows = np.bincount(mine * parts + events.source, minlength=buckets * parts).reshape(buckets, parts).tolist()
    categories, items = dict(events.names), dict(events.item_names)
    found = []
    for bucket, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        keep = order[start:end]
        columns = {name: column[keep] for name in COLUMNS if len(column := getattr(events, name)) == len(events)}
        batch = replace(
            events,
            **columns,
            ranges=tuple(
                _of_bucket(part, bucket, buckets, count)
                for part, count in zip(events.ranges, rows[bucket], strict=True)
            ),
            dead=() if bucket else events.dead,
            names=_named(categories, columns["category"]),
            item_names=_named(items, columns["item"]),
        )
        off = () if bucket else told.off
        moves = _of_turns(told.moves, events.ranges, bucket, buckets)
        found.append((batch, Told(told.clock_ms[keep], moves, told.clocks, {}, off)))
    # Names without an event go to the first bucket.
    first, clock = found[0]
    found[0] = replace(first, names=first.names | categories, item_names=first.item_names | items), clock
    return found


def _of_bucket(part: Range, bucket: int, buckets: int, rows: int) -> Range:
    """A bucket's range; offsets without a user are counted by the first bucket."""
    source = part.source._replace(bucket=bucket, buckets=buckets)
    if bucket:
        return Range(source, part.first, part.next, rows=rows, elsewhere=part.next - part.first - rows)
    return replace(part, source=source, rows=rows, elsewhere=part.rows - rows)


def _of_turns(moves: Moves, ranges: Sequence[Range], bucket: int, buckets: int) -> Moves:
    """The clock moves as seen by a bucket's shares, whose turns are at each `buckets`th offset.

    See `streaming.attribution`.
    """
    ends = np.array([part.next for part in ranges], np.int64)[moves.source]
    offset = moves.offset + (bucket - moves.offset) % buckets
    seen = offset < ends
    seen[:-1] &= (offset[1:] != offset[:-1]) | (moves.source[1:] != moves.source[:-1])
    return Moves(moves.source[seen], offset[seen], moves.clock_ms[seen])


def _named(left: dict[int, str], ids: NDArray[np.uint64]) -> dict[int, str]:
    """Removes the names of ids that occur in a bucket from the remaining names, and returns them."""
    return {one: left.pop(one) for one in left.keys() & {*ids.tolist()}} if left else {}


def encode(portion: Portion) -> bytes:
    """Encodes a portion; dead letters keep only their coordinates and reason."""
    batch, told = portion.batch, portion.told
    head = {
        "ranges": [to_json(part) for part in batch.ranges],
        "dead": [(one.source.topic_id, one.source.partition, one.offset, str(one.reason)) for one in batch.dead],
        "names": _texts(batch.names),
        "item_names": _texts(batch.item_names),
        "clocks": told.clocks,
        "off": told.off,
        "control": portion.control,
        "log_epoch": portion.log_epoch,
        "appended_ms": portion.appended_ms,
    }
    moves = {f"move_{name}": column for name, column in told.moves._asdict().items()}
    return pack(head, {name: getattr(batch, name) for name in COLUMNS} | {"clock_ms": told.clock_ms} | moves)


def decode(value: bytes) -> Portion:
    """Decodes the result of `encode`."""
    head, arrays = unpack(value)
    clock_ms = arrays.pop("clock_ms")
    moves = Moves(**{name: arrays.pop(f"move_{name}") for name in Moves._fields})
    batch = EventBatch(
        **arrays,
        ranges=tuple(map(from_json, head["ranges"])),
        dead=tuple(
            DeadLetter(Source(topic_id, partition), offset, Reason(reason), None, None)
            for topic_id, partition, offset, reason in head["dead"]
        ),
        names=_of_texts(head["names"]),
        item_names=_of_texts(head["item_names"]),
    )
    clocks = tuple((begin, end) for begin, end in head["clocks"])
    told = Told(clock_ms, moves, clocks, {}, tuple(OffClock(*one) for one in head["off"]))
    return Portion(batch, told, head["control"], head["log_epoch"], head["appended_ms"])


def _texts(names: Mapping[int, str]) -> dict[str, str]:
    return {str(one): text for one, text in names.items()}


def _of_texts(names: Mapping[str, Any]) -> dict[int, str]:
    return {int(one): text for one, text in names.items()}


def allowed(buckets: int) -> bool:
    """Whether users can be divided into this many buckets, so that each of their shares belongs to one bucket.

    >>> [count for count in range(1, 100) if allowed(count)]
    [1, 2, 4, 8, 16, 32, 64]
    """
    return buckets >= 1 and SHARES % buckets == 0
