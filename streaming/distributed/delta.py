"""A change to a bucket's store (events, waiting rows, values of its owner), and its encoding in an engine's state.

A snapshot has the same form: it is the change to an empty store, in parts. An engine may return parts in another order,
so each one is numbered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.errors import CorruptStore
from state.features.spec import EVENT
from state.history.appends import Appends
from streaming.distributed.wire import joined, pack, parted, unpack

FORMAT = 1
_NONE = -1  # the length of a removed value


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """One change to a bucket's store.

    Attributes:
        appends: New events by user.
        waiting: Rows that begin to wait, by key; None for a row whose wait ends.
        extra: Values of the owner to replace; None removes one.
    """

    appends: Appends = field(default_factory=Appends.none)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)
    extra: Mapping[str, bytes | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(len(self.appends.events) or self.waiting or self.extra)


def encode(delta: Delta, number: int) -> bytes:
    """Encodes a delta; deltas are applied in the order of `number`."""
    appends = delta.appends
    keys, rows = [*delta.waiting], [*delta.waiting.values()]
    values = [*rows, *delta.extra.values()]
    arrays: dict[str, NDArray[Any]] = {
        "users": appends.users,
        "counts": appends.lengths,
        "events": np.frombuffer(appends.events.tobytes(), np.uint8),
        **{f"key.{name}": one for name, one in joined(keys).items()},
        **joined([value or b"" for value in values]),
    }
    arrays["lengths"] = np.array([_NONE if value is None else len(value) for value in values], np.int64)
    return pack({"format": FORMAT, "number": number, "extra": [*delta.extra]}, arrays)


def decode(value: bytes) -> tuple[int, Delta]:
    """Decodes the number and the delta that `encode` wrote.

    Raises:
        CorruptStore: A later release wrote it.
    """
    head, arrays = unpack(value)
    if head["format"] != FORMAT:
        raise CorruptStore(
            f"the state of a bucket has format {head['format']}, this release reads {FORMAT}",
            "resume the job with the release that wrote its savepoint",
        )
    lengths = arrays["counts"]
    appends = Appends(arrays["users"], np.cumsum(lengths) - lengths, lengths, arrays["events"].view(EVENT))
    keys = parted({name: arrays[f"key.{name}"] for name in ("lengths", "bytes")})
    gone = arrays["lengths"] == _NONE
    values = parted({"lengths": np.maximum(arrays["lengths"], 0), "bytes": arrays["bytes"]})
    told = [None if is_gone else one for one, is_gone in zip(values, gone.tolist(), strict=True)]
    return head["number"], Delta(
        appends,
        dict(zip(keys, told[: len(keys)], strict=True)),
        dict(zip(head["extra"], told[len(keys) :], strict=True)),
    )
