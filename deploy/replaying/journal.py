"""How far a replay has come: what makes a second run go on where the first one ended.

One small file per recording, topic and options, written before each piece is
sent: what is acknowledged, what is being sent, and from which positions on to
look for it. After a kill the piece in flight is looked up in the topic, so
that it is neither lost nor sent twice. It holds numbers and no click.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.replaying.clock import Hand
from state import layout
from state.disk import files as durable
from state.errors import CorruptStore

FORMAT = 1
FILE = "journal.json"


@dataclass(frozen=True)
class Position:
    """Where a replay stands.

    Attributes:
        now_ms: Wall clock when its first run began.
        newest_ms: Latest time of the recording; NO_TIME where nobody asked for it.
        acknowledged: Rows of the recording that are done.
        sending: Rows that are done when the piece in flight has arrived; equal to `acknowledged` when none is.
        hand: The clock before the piece in flight.
        ends: Per partition a position before which nothing of the piece in flight can be.
        refused: Per reason the rows the stream makes dead letters of, so far.
        unsendable: Rows too large for a record, so far.
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

    def after(self, hand: Hand, ends: Mapping[int, int]) -> Position:
        """The position when the piece in flight has arrived."""
        return replace(self, acknowledged=self.sending, hand=hand, ends=dict(ends))


def key_of(identity: Mapping[str, Any]) -> str:
    """A name for a recording with its options: 16 hexadecimal digits.

    >>> key_of({"files": ["ab"], "sort": "memory"}) == key_of({"sort": "memory", "files": ["ab"]})
    True
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class ReplayJournal:
    """The position of one replay, on disk. One process at a time: hold a lock on `folder`.

    Args:
        folder: Its directory; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def read(self) -> Position | None:
        """The stored position; None where there is none.

        Raises:
            CorruptStore: It cannot be read, or another release wrote it.
        """
        try:
            fields = json.loads(self._path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError("another format")
            fields["hand"] = Hand(**fields["hand"])
            fields["ends"] = {int(partition): end for partition, end in fields["ends"].items()}
            return Position(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptStore(
                f"{self._path}: not readable ({error})", "--restart sends the recording again from its beginning"
            ) from None

    def write(self, position: Position) -> None:
        """Stores a position; durable when it returns."""
        draft = self._path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        durable.write(draft, json.dumps({"format": FORMAT, **asdict(position)}).encode())
        draft.replace(self._path)
        durable.sync_directory(self._path.parent)

    def forget(self) -> None:
        """Begins anew: nothing is stored."""
        self._path.unlink(missing_ok=True)
        durable.sync_directory(self._path.parent)


def folder_of(state_dir: Path, key: str) -> Path:
    """The journal's directory, made where it is missing."""
    folder = state_dir / layout.REPLAY / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder
