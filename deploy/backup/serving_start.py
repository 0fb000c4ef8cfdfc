"""Builds the state of a restored serving host from the stream's histories and serving's own notes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from deploy.serving.following.clicks import KINDS
from deploy.serving.following.parity import WHOLE_EXTRA
from deploy.serving.host_files import CLOCK_EXTRA, SEEN
from deploy.serving.host_files import EXTRAS as FEED_EXTRAS
from state.history.appends import Appends
from state.history.snapshots import SHARED_EXTRAS
from state.history.store import HistoryStore
from state.layout import HISTORIES, SERVING

NOTES = "notes"
NOTES_PATH = f"{SERVING}/{NOTES}"
PREFIXES = (CLOCK_EXTRA, SEEN, *KINDS, *FEED_EXTRAS)
"""Name prefixes of serving's notes, apart from those that depend on the host's own position in the log."""
WAIT_S, POLL_S = 10.0, 0.05
AT_ONCE = 10_000
_LENGTH = struct.Struct(">I")


def await_clicks(store: HistoryStore, positions: Mapping[str, int]) -> None:
    """Waits until serving's histories have reached the backup's positions, so that the notes know all its items.

    It waits at most `WAIT_S`, and not at all for a store that no process writes.
    """
    deadline_s = time.monotonic() + WAIT_S
    while True:
        positions_reached = {str(source): after for source, after in store.positions().items()}
        # Clicks of a source that serving has never seen precede the beginning of its log.
        if all(positions_reached.get(source, after) >= after for source, after in positions.items()):
            return
        if store.closed_in_order() or time.monotonic() > deadline_s:
            return
        time.sleep(POLL_S)


def write_notes(store: HistoryStore, file: BinaryIO) -> None:
    """Writes the notes of a host's histories to `file`."""
    for prefix in PREFIXES:
        for name, value in _extras(store, prefix):
            for part in (name.encode(), value):
                file.write(_LENGTH.pack(len(part)) + part)


def _read_notes(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yields the notes that `write_notes` wrote; the file's digest has been verified."""

    def part() -> bytes:
        return file.read(_LENGTH.unpack(length)[0])

    while length := file.read(_LENGTH.size):
        name = part().decode()
        length = file.read(_LENGTH.size)
        yield name, part()


def begin(stream: Path, serving: Path, history: int, created_at_ms: int) -> None:
    """Creates serving's histories from the stream's, in a directory that has none.

    Args:
        stream: The stream's histories, closed cleanly.
        serving: Serving's directory; its notes file is read and removed.
        history: Number of events kept per user.
        created_at_ms: When the backup was made, wall clock.

    Raises:
        StoreError: The disk is full, or the operating system refused the access.
    """
    path, notes = serving / HISTORIES, serving / NOTES
    HistoryStore.copied(stream, path, history)
    store = HistoryStore(path, history)
    try:
        # 1. Remove what belongs to the stream alone.
        foreign = [name for name, _ in _extras(store, "") if name not in SHARED_EXTRAS]
        _commit(store, ((name, None) for name in foreign))
        waiting = [key for key, _ in store.waiting()]
        for first in range(0, len(waiting), AT_ONCE):
            store.commit(Appends.none(), waiting=dict.fromkeys(waiting[first : first + AT_ONCE]))
        # 2. Add serving's notes. The stream's histories lack no event, so serving's do not either.
        _commit(store, [(WHOLE_EXTRA, b"0")])
        if notes.exists():
            with notes.open("rb") as file:
                _commit(store, _read_notes(file))
            notes.unlink()
        if store.extra(CLOCK_EXTRA) is None and (newest_ms := _newest_ms(store)):
            clock = {"event_ms": min(newest_ms, created_at_ms), "accepted_ms": created_at_ms}
            _commit(store, [(CLOCK_EXTRA, json.dumps(clock).encode())])
    finally:
        store.close()
    (path / "lock.mdb").unlink(missing_ok=True)


def _extras(store: HistoryStore, prefix: str) -> Iterator[tuple[str, bytes]]:
    start = prefix
    while extras := store.extras(prefix, start, AT_ONCE):
        yield from extras
        start = extras[-1][0] + "\0"


def _commit(store: HistoryStore, extras: Iterable[tuple[str, bytes | None]]) -> None:
    some: dict[str, bytes | None] = {}
    for name, value in extras:
        some[name] = value
        if len(some) == AT_ONCE:
            store.commit(Appends.none(), extra=some)
            some = {}
    if some:
        store.commit(Appends.none(), extra=some)


def _newest_ms(store: HistoryStore) -> int:
    """The newest event time of all users, ms; 0 if there are none."""
    newest_ms, start = 0, 0
    while True:
        ends = store.ends(start, AT_ONCE)
        newest_ms = max(newest_ms, int(ends.newest["at_ms"].max(initial=0)))
        if ends.following is None:
            return newest_ms
        start = ends.following
