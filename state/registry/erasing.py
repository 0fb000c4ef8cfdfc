"""Reports in the registry of how far each process has applied erasures to its own copies of user data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from state import layout
from state.disk import files as durable
from state.registry.directory import all_documents, own_documents
from state.registry.registry import Registry


class ErasureReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far one process has applied erasures to its own copies of user data.

    Attributes:
        part: Name of the process, such as `stream-0`; also the name of its file.
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


def report(registry: Path, progress: ErasureReport) -> None:
    """Replaces the report of a process; durable when this returns.

    Raises:
        OSError: The registry cannot be written.
    """
    path = registry / layout.ERASURES / f"{progress.part}.json"
    path.parent.mkdir(exist_ok=True)
    durable.replace(path, msgspec.json.encode(progress), durable.unique(path))


def reports(registry: Path) -> list[ErasureReport]:
    """The reports of all processes of this host, sorted by name; unreadable ones are skipped."""
    return _by_part(own_documents(registry / layout.ERASURES, ErasureReport).values())


def all_reports(registry: Registry) -> list[ErasureReport]:
    """The reports of the processes of all hosts, by name.

    Raises:
        UnusableRegistry: The object store of the shared registry cannot be reached.
    """
    return _by_part(all_documents(registry.directory, layout.ERASURES, ErasureReport))


def _by_part(reports: Iterable[ErasureReport]) -> list[ErasureReport]:
    return sorted(reports, key=lambda report: report.part)
