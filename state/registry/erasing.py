"""Erasure of users: the control transition that requests it, and each process's report of its progress."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from state import layout
from state.disk import files as durable
from state.features.masked_users import MaskedUsers
from state.registry.control import Control, following


@dataclass(frozen=True)
class ErasureReport:
    """How far one process has applied erasures to its own copies of user data.

    Attributes:
        part: Name of the process, such as `stream-0`; also the name of its file.
        host: Host of the process.
        path: The directory of its copies.
        through: The last erasure whose users' records are deleted there.
        pages: Likewise, including free pages of the store's file, which hold old bytes until the file is rewritten.
        version: For the compactor: versions up to this one were checked.
        at_ms: Wall clock time of the report.
    """

    part: str
    host: str
    path: str
    through: int
    pages: int
    version: int = 0
    at_ms: int = 0


def report(registry: Path, told: ErasureReport) -> None:
    """Replaces the report of a process; durable when this returns.

    Raises:
        OSError: The registry cannot be written.
    """
    folder = registry / layout.ERASURES
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{told.part}.{os.urandom(4).hex()}"
    durable.write(temporary, json.dumps(asdict(told)).encode())
    temporary.replace(folder / f"{told.part}.json")
    durable.sync_directory(folder)


def reports(registry: Path) -> list[ErasureReport]:
    """The reports of all processes, sorted by name; unreadable ones are skipped."""
    found = []
    for path in sorted((registry / layout.ERASURES).glob("*.json")):
        try:
            found.append(ErasureReport(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return found


def erase(
    control: Control,
    users: MaskedUsers,
    until: Iterable[tuple[int, int, int]],
    *,
    actor: str,
    reason: str,
    now_ms: int,
) -> Control:
    """Erases users: their clicks before `until`, and everything that is stored about them.

    Erasing the same users again erases what they have clicked since.

    Args:
        control: The control to start from.
        users: Their pseudonyms.
        until: (topic word, partition, next offset) of each source of clicks.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> gone = erase(first, MaskedUsers.of([7]), [(42, 0, 100)], actor="ann", reason="asked to", now_ms=9)
    >>> gone.generation, gone.mask_generation, gone.erased.last, bool(gone.mask)
    (2, 2, 1, True)
    """
    generation = control.generation + 1
    erased = control.erased.and_also(users, until, generation, now_ms)
    return following(control, "erase", actor, reason, now_ms, mask_generation=generation, erased=erased)
