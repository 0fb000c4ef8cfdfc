"""The journal of a replay: its progress on disk, from which a second run continues.

There is one small file per recording, topic and options. It is written before each piece is sent. After a kill, the
next run searches the topic for the piece in flight, so that the piece is neither lost nor sent twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from deploy.replaying.clock import Hand
from state import layout
from state.disk import files as durable
from state.errors import CorruptStore

FILE = "journal.json"


@dataclass(frozen=True)
class Position:
    """The position of a replay.

    Attributes:
        now_ms: Wall clock at the start of its first run.
        newest_ms: Latest time of the recording; NO_TIME if it was not needed.
        acknowledged: Rows of the recording that are done.
        sending: Rows that are done when the piece in flight has arrived; equal to `acknowledged` if there is none.
        hand: The clock's state before the piece in flight.
        ends: By partition, a position before which nothing of the piece in flight can be.
        refused: By reason, the rows so far that become dead letters in the stream.
        unsendable: Rows so far that are too large for a record.
        complete: Whether the recording has ended.
    """

    now_ms: int
    newest_ms: int
    acknowledged: int
    sending: int
    hand: Hand
    ends: Mapping[int, int]
    refused: Mapping[str, int]
    unsendable: int = 0
    complete: bool = False
    format: Literal[1] = 1

    def after(self, hand: Hand, ends: Mapping[int, int]) -> Position:
        """The position once the piece in flight has arrived."""
        return replace(self, acknowledged=self.sending, hand=hand, ends=dict(ends))


def key_of(identity: Mapping[str, Any]) -> str:
    """The key of a recording with its options: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ReplayJournal:
    """The position of one replay, on disk. For one process at a time: hold a lock on `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> Position | None:
        """The stored position; None if there is none.

        Raises:
            CorruptStore: The file cannot be read, or another release wrote it.
        """
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Position)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CorruptStore(
                f"{self._path}: not readable ({error})", "--restart sends the recording again from its beginning"
            ) from None

    def write(self, position: Position) -> None:
        """Stores a position durably."""
        durable.replace(self._path, msgspec.json.encode(position))

    def forget(self) -> None:
        """Removes the stored position, so that the replay starts again from the beginning."""
        self._path.unlink(missing_ok=True)
        durable.sync_directory(self._path.parent)


def folder_of(state_dir: Path, key: str) -> Path:
    """The journal's directory; creates it if it is missing."""
    folder = state_dir / layout.REPLAY / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder
