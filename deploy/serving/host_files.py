"""What the applier and the workers of a host leave for each other: metadata, items clicked, programs and exposures.

- Notes in the stores of rows and histories, and the times up to which both are complete.
- Copies of programs and feature specs, which the applier fetches from the registry and workers read.
- A feed of the clicked items, without users, which is committed with the clicks. A reader that falls behind lacks some.
- Exposures of a rollout: workers do not use Kafka and write files, which the applier sends.

See also `state.layout`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from state.disk import files as durable
from state.disk.files import HOST, Noted, Progress, noted_at
from state.errors import CorruptVersion, RegistryError, SpecMismatch
from state.features.spec import Events, FeatureSpec
from state.history.store import HistoryStore
from state.layout import CURRENT
from state.process.log_lines import SaidOnce
from state.registry.registry import Registry

CONTROL_NOTE = "control"
MASK_NOTE = "mask"
"""Notes in the row store: the control generation that answers respect, and its mask."""

REFUSED_NOTE = "refused"
"""A note in the row store: the reason why each refused version is not served, as JSON by version number."""

CLOCK_EXTRA = "clock"
CAUGHT_UP_EXTRA = "caught_up"
"""Extras of the histories: the event clock, and whether the micro-batch topic was ever read to its end."""

SEEN = "seen:"
"""Prefix of the extra with the day of log time, 4 bytes big-endian, on which an item or a name was last seen."""

ITEM = "item:"
"""Prefix of the extra with an item's category, 8 bytes big-endian, and its name, if any."""

DAY_MS = 86_400_000


def name_of(folder: Path, part: str = "serving") -> str:
    """Returns the name under which a host reports; it contains the host name and a digest of the path.

    >>> name_of(Path("/srv/state/serving")).startswith(f"serving-{HOST}-")
    True
    """
    return f"{part}-{HOST}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"


def refused_versions(note: bytes | None) -> dict[int, str]:
    """Parses the value of `REFUSED_NOTE`.

    >>> refused_versions(b'{"7": "it answers otherwise"}'), refused_versions(None)
    ({7: 'it answers otherwise'}, {})
    """
    return {} if note is None else {int(version): why for version, why in json.loads(note).items()}


def name_extra(category: int) -> str:
    """Returns the key of the extra with a category's name.

    >>> name_extra(7)
    'name:0000000000000007'
    """
    return f"name:{category:016x}"


def item_extra(item: int) -> str:
    """Returns the key of the extra with an item's category id and name.

    >>> item_extra(7)
    'item:0000000000000007'
    """
    return f"{ITEM}{item:016x}"


def item_value(category: int, name: bytes = b"") -> bytes:
    """Encodes the value of an item's extra.

    >>> item_parts(item_value(7, b"i1"))
    (7, 'i1')
    """
    return category.to_bytes(8, "big") + name


def item_parts(value: bytes) -> tuple[int, str]:
    """Decodes an item's category and name; the name is empty if unknown, as in values from older releases."""
    return int.from_bytes(value[:8], "big"), value[8:].decode()


class EventClock(NamedTuple):
    """The value of `CLOCK_EXTRA`.

    Attributes:
        event_ms: The newest accepted event's time.
        accepted_ms: The wall clock when it was accepted.
    """

    event_ms: int
    accepted_ms: int

    @classmethod
    def parse(cls, stored: bytes | None) -> EventClock | None:
        """Parses the clock; None before the first event.

        >>> EventClock.parse(b'{"event_ms": 100, "accepted_ms": 5000}')
        EventClock(event_ms=100, accepted_ms=5000)
        """
        if stored is None:
            return None
        values = json.loads(stored)
        return cls(int(values["event_ms"]), int(values["accepted_ms"]))

    def now(self, now_ms: int) -> int:
        """Returns the newest accepted event's time plus the wall time since it was accepted.

        >>> EventClock(100, 5000).now(5030)
        130
        """
        return self.event_ms + max(0, now_ms - self.accepted_ms)


VERSIONS, CLICKS = "version", "histories"
"""The parts, named as in /readyz."""

DEGRADED_S = 60.0
"""The delay before a part counts as degraded without a known reason; also that of the alert `SpringtideSharedAway`."""


class Currency:
    """Records in files up to which time the stores of one host are complete, and why they are not complete since.

    The applier writes this, and workers read it. The time is not the age of the data: without new clicks, old
    histories are current. Histories that reach the log's end offsets hold all that the log held when these were
    requested. A poll of the registry that finds nothing new counts in the same way.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = {part: folder / f"{CURRENT}.{part}" for part in (VERSIONS, CLICKS)}
        self._progress = {part: Progress(path) for part, path in self._paths.items()}

    def note(self, part: str, at_ms: int) -> None:
        """Records that the part is complete up to `at_ms`; written at most once a second."""
        # If the disk is full before the file exists, readiness reports it.
        self._progress[part].note(at_ms)

    def fail(self, part: str, problem: str) -> None:
        """Records why the part cannot be completed now; an empty `problem`: it can be again."""
        self._progress[part].fail(problem)

    def degraded(self, now_ms: int) -> dict[str, str]:
        """Returns a message for each part with a problem, or that was last complete more than `DEGRADED_S` ago."""
        messages = {}
        for part, (at_ms, problem) in self._read().items():
            late = _late(at_ms, now_ms) if at_ms and now_ms - at_ms > DEGRADED_S * 1000 else ""
            if reasons := [reason for reason in (problem, late) if reason]:
                messages[part] = "; ".join(reasons)
        return messages

    def older_than(self, max_age_s: float, now_ms: int) -> dict[str, str]:
        """Returns a message for each part that was last complete more than `max_age_s` ago, or never."""
        messages = {}
        for part, (at_ms, problem) in self._read().items():
            if not at_ms:
                messages[part] = problem or "the applier has not yet confirmed that this part is up to date"
            elif now_ms - at_ms > max_age_s * 1000:
                late = f"{_late(at_ms, now_ms)} (serving.max_age_s {max_age_s:g})"
                messages[part] = f"{problem}; {late}" if problem else late
        return messages

    def _read(self) -> dict[str, Noted]:
        return {part: noted_at(path) for part, path in self._paths.items()}


def _late(at_ms: int, now_ms: int) -> str:
    return f"what came in the last {(now_ms - at_ms) / 1000:.0f} s is not all taken up"


class VersionFiles:
    """Copies programs and feature specs from the registry, so that workers read only this host's disk.

    `folder` is created if it is missing.
    """

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder, self._registry = folder, registry
        self._fetched: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def fetch_program(self, digest: str) -> None:
        """Copies a program if it is missing or its copy is damaged. The copy is durable when this returns.

        Raises:
            CorruptVersion, UnknownVersion: The registry's file is damaged or missing.
        """
        path = program_path(self._folder, digest)
        if path in self._fetched:
            return
        if not path.exists() or durable.digest(path.read_bytes()) != digest:
            durable.replace(path, self._registry.specs.program(digest))
        self._fetched.add(path)

    def fetch_spec(self, digest: str) -> None:
        """Copies a missing spec durably; does nothing if the registry lacks it, because `read_spec` reports that."""
        path = _spec_path(self._folder, digest)
        if path in self._fetched:
            return
        try:
            document = self._registry.specs.spec(digest)["spec"]
        except (SpecMismatch, RegistryError, KeyError):
            return
        if not path.exists():
            durable.replace(path, json.dumps(document, sort_keys=True).encode())
        self._fetched.add(path)


def program_path(folder: Path, digest: str) -> Path:
    """Returns the path of a program's file.

    >>> program_path(Path("programs"), "ab").as_posix()
    'programs/ab.tflite'
    """
    return folder / f"{digest}.tflite"


def _spec_path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.spec.json"


def read_program(folder: Path, digest: str) -> bytes:
    """Reads the program with this SHA-256.

    Raises:
        CorruptVersion: The file is missing, or its digest does not match.
    """
    path = program_path(folder, digest)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptVersion(f"the program {path} is missing", "the applier copies it from the registry") from None
    if durable.digest(data) != digest:
        raise CorruptVersion(f"the program {path} fails its digest", "remove the file, and the applier copies it again")
    return data


def read_spec(folder: Path, digest: str) -> FeatureSpec:
    """Reads a feature spec.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError, KeyError: It is not this spec, or belongs to a release that computes other windows.
    """
    spec = FeatureSpec.from_json(_spec_path(folder, digest).read_text())
    if spec.digest != digest:
        raise ValueError("the file has another spec")
    return spec


FEED = "feed"
EXTRAS = (FEED, "clicked:")
"""The names of the extras, or their prefixes."""
SLOTS = 256
MOST_ITEMS = 4096
"""The maximum number of items in a commit's entry; those with the most clicks are kept."""
KEPT_MS = 86_400_000
"""How long an entry is kept."""
GONE_AT_ONCE = 64
"""The maximum number of entries that one commit deletes."""

CLICKED = np.dtype([("item", "<u8"), ("category", "<u8"), ("clicks", "<u4")])
_NOTE = struct.Struct(">Qq")


def entries_in(store: HistoryStore) -> int:
    """Reads the number of entries that were ever written."""
    return int.from_bytes(store.extra(FEED) or b"", "big")


class Clicked(NamedTuple):
    """The clicks of one commit: log time, and `[k]` CLICKED."""

    at_ms: int
    items: np.ndarray[tuple[int], np.dtype[np.void]]


class ItemFeed:
    """Writes the feed. Used by the thread that commits to the histories."""

    def __init__(self, store: HistoryStore) -> None:
        self._store, self._next = store, entries_in(store)
        self._oldest = max(0, self._next - SLOTS)

    def news(self, events: Events, clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit together with clicks, `[m]` EVENT."""
        clicked = _clicked(events)
        if not len(clicked):
            return {}
        extras = self._expired(clock_ms)
        extras[f"clicked:{self._next % SLOTS}"] = _NOTE.pack(self._next, clock_ms) + clicked.tobytes()
        self._next += 1
        return extras | {FEED: self._next.to_bytes(8, "big")}

    def _expired(self, clock_ms: int) -> dict[str, bytes | None]:
        """Returns at most `GONE_AT_ONCE` entries that are too old, each with None so that it is deleted."""
        extras: dict[str, bytes | None] = {}
        for seq in range(self._oldest, min(self._next, self._oldest + GONE_AT_ONCE)):
            clicked = clicked_at(self._store, seq)
            if clicked is not None and clicked.at_ms > clock_ms - KEPT_MS:
                break
            if clicked is not None:
                extras[f"clicked:{seq % SLOTS}"] = None
            self._oldest = seq + 1
        return extras


def _clicked(events: Events) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Counts the clicks of each item with a category, `[k]` CLICKED; its category is that of its last click."""
    clicks_of_items = events[(events["item"] != 0) & (events["category"] != 0)][::-1]
    items, first, clicks = np.unique(clicks_of_items["item"], return_index=True, return_counts=True)
    clicked = np.zeros(len(items), CLICKED)
    clicked["item"], clicked["category"], clicked["clicks"] = items, clicks_of_items["category"][first], clicks
    return clicked if len(clicked) <= MOST_ITEMS else clicked[np.argsort(-clicks, kind="stable")[:MOST_ITEMS]]


def clicked_at(store: HistoryStore, seq: int) -> Clicked | None:
    """Reads one entry of clicks; None if it was overwritten or never committed."""
    note = store.extra(f"clicked:{seq % SLOTS}")
    if note is None or _NOTE.unpack_from(note)[0] != seq:
        return None
    return Clicked(_NOTE.unpack_from(note)[1], np.frombuffer(note, CLICKED, offset=_NOTE.size))


FILE_MS = 250

SETTLED_MS = 500
"""The age after which a file is no longer written."""

MOST_BYTES = 256 << 20
"""The maximum size of all files; if Kafka is unreachable, the oldest files beyond it are removed."""

_ENDING = ".jsonl"


class ExposureSpool:
    """Writes the exposures of one worker. Used by one thread."""

    def __init__(self, folder: Path, now_ms: Callable[[], int], say: Callable[[str, str], object]) -> None:
        self._folder, self._now_ms, self._log_once = folder, now_ms, SaidOnce(say)
        self._handle, self._opened_ms = -1, 0

    def write(self, record: bytes) -> None:
        """Writes an exposure; a disk error is only logged, and does not affect the answer."""
        now_ms = self._now_ms()
        try:
            if self._handle < 0 or not self._opened_ms <= now_ms < self._opened_ms + FILE_MS:
                self._open(now_ms)
            os.write(self._handle, record + b"\n")
        except OSError as error:
            self.close()
            self._log_once(f"exposures are lost: {error}")

    def close(self) -> None:
        """Closes the current file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _open(self, now_ms: int) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{now_ms:015d}-{os.getpid()}{_ENDING}"
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._opened_ms = now_ms


def settled(folder: Path, now_ms: int) -> Iterator[tuple[Path, list[bytes]]]:
    """Yields the files that are no longer written, oldest first, with their records, without a torn last record."""
    for path in _files(folder):
        if int(path.name.partition("-")[0]) <= now_ms - SETTLED_MS:
            lines = path.read_bytes().split(b"\n")
            yield path, [line for line in lines[:-1] if line]


def make_room(folder: Path, most_bytes: int = MOST_BYTES) -> int:
    """Removes the oldest files until at most `most_bytes` are left; returns the number of removed files."""
    files = _files(folder)
    bytes_left, removed = sum(path.stat().st_size for path in files), 0
    for path in files:
        if bytes_left <= most_bytes:
            break
        bytes_left -= path.stat().st_size
        path.unlink()
        removed += 1
    return removed


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_ENDING}"))
