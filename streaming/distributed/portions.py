"""Divides the events of a bundle into buckets of users, and encodes what travels between steps or stays in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from state.disk import documents
from state.events.parser import EventBatch
from state.features.spec import EVENT
from state.positions import Range, share_of
from state.user_shares import SHARES
from streaming.cut import merge_all
from streaming.event_clock import BatchClock, Moves
from streaming.rows import COLUMNS

Value = TypeVar("Value")


def _as_values(array: object) -> tuple[str, Sequence[int], Any]:
    if not isinstance(array, np.ndarray):
        raise NotImplementedError(f"a {type(array).__name__} cannot be encoded")
    return array.dtype.str, array.shape, array.tobytes()


def _as_array(kind: object, values: Any) -> NDArray[Any]:
    name, shape, data = values
    return np.frombuffer(data, EVENT if name == EVENT.str else name).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_values)
_decoders: dict[object, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: object) -> bytes:
    """Encodes dataclasses, tuples and dictionaries of numbers, texts and arrays."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[Value]) -> Value:
    """Decodes the result of `encode`; arrays are writable and contiguous, as compiled code requires.

    Raises:
        msgspec.ValidationError: The data is not of that type.
    """
    if kind not in _decoders:
        # Worker threads share this module.
        with documents.analysing:
            _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_as_array)
    return cast(Value, _decoders[kind].decode(data))


def stored(state: Any, kind: type[Value]) -> Value:
    """Decodes a value of the engine's state; an empty one is `kind()`."""
    data = state.read()
    return kind() if data is None else decode(data, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """The part of a bundle that one bucket receives.

    Attributes:
        batch: Its users' events; the ranges are the bucket's.
        clock: The event clock; `state` is empty, because it stays with the positions of the source.
        control: The generation of control whose mask left events out; 0 for none.
        log_epoch: The epoch of the training log that is written.
        appended_ms: When Kafka received the newest record of the bundle; 0 for none.
    """

    batch: EventBatch
    clock: BatchClock
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


def divide(events: EventBatch, clock: BatchClock, buckets: int) -> list[tuple[EventBatch, BatchClock]]:
    """Divides a batch with one range for each partition; returns the parts in the order of the buckets.

    Dead letters go to the first bucket.
    """
    bucket_of, parts = share_of(events.user) % buckets, len(events.ranges)
    order = np.argsort(bucket_of, kind="stable")
    ends = np.cumsum(np.bincount(bucket_of, minlength=buckets)).tolist()
    rows = np.bincount(bucket_of * parts + events.source, minlength=buckets * parts).reshape(buckets, parts).tolist()
    categories, items = dict(events.names), dict(events.item_names)
    pieces = []
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
        moves = _moves_at_turns(clock.moves, events.ranges, bucket, buckets)
        pieces.append((batch, BatchClock(clock.clock_ms[keep], moves, clock.believed, {}, () if bucket else clock.off)))
    # Names without an event go to the first bucket.
    first, first_clock = pieces[0]
    pieces[0] = replace(first, names=first.names | categories, item_names=first.item_names | items), first_clock
    return pieces


def _of_bucket(part: Range, bucket: int, buckets: int, rows: int) -> Range:
    """A bucket's range; offsets without a user are counted by the first bucket."""
    source = part.source._replace(bucket=bucket, buckets=buckets)
    if bucket:
        return Range(source, part.first, part.next, rows=rows, elsewhere=part.next - part.first - rows)
    return replace(part, source=source, rows=rows, elsewhere=part.rows - rows)


def _moves_at_turns(moves: Moves, ranges: Sequence[Range], bucket: int, buckets: int) -> Moves:
    """The clock moves at the turns of a bucket's shares, one at each `buckets`th offset; see `streaming.labels`."""
    ends = np.array([part.next for part in ranges], np.int64)[moves.source]
    offset = moves.offset + (bucket - moves.offset) % buckets
    was_read = offset < ends
    was_read[:-1] &= (offset[1:] != offset[:-1]) | (moves.source[1:] != moves.source[:-1])
    return Moves(moves.source[was_read], offset[was_read], moves.clock_ms[was_read])


def _named(names: dict[int, str], ids: NDArray[np.uint64]) -> dict[int, str]:
    return {key: names.pop(key) for key in names.keys() & {*ids.tolist()}} if names else {}


def allowed(buckets: int) -> bool:
    """Whether users can be divided into this many buckets, so that each of their shares belongs to one bucket.

    >>> [count for count in range(1, 100) if allowed(count)]
    [1, 2, 4, 8, 16, 32, 64]
    """
    return buckets >= 1 and SHARES % buckets == 0
