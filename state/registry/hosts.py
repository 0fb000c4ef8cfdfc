"""What each host reports to the registry: the shares of users that it holds, and how far it has applied erasures.

The routing table of serving: which hosts hold which shares of users, from entries that hosts renew in the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.registry.directory import all_documents, own_documents
from state.registry.registry import Registry
from state.user_shares import SHARES, UserShares

RENEW_S = 2.0
"""Interval at which a host renews its entry, and at which entries are exchanged over a shared registry."""
LIVE_S = 12.0
"""A host whose entry is older takes no requests of other hosts."""
GONE_S = 3600.0
"""An entry that is older is removed."""


class HostEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A serving host that is ready.

    Attributes:
        name: Name of the host, unique; also the name of its file.
        address: URL under which other hosts and clients reach it.
        shares: The shares of users that it holds, in the form of `serving.shares`.
    """

    name: str
    address: str
    shares: str
    at_ms: int

    def __post_init__(self) -> None:
        # An entry whose shares are none is unreadable.
        UserShares.parse(self.shares)

    def is_live(self, now_ms: int) -> bool:
        """Whether the entry was renewed lately."""
        return now_ms - self.at_ms < LIVE_S * 1000


@dataclass(frozen=True)
class RoutingTable:
    """The live hosts, and the hosts that hold each share."""

    hosts: tuple[HostEntry, ...] = ()
    holders: Sequence[tuple[HostEntry, ...]] = ((),) * SHARES

    @classmethod
    def of(cls, entries: Iterable[HostEntry], now_ms: int) -> RoutingTable:
        """Builds the table from the entries that are live.

        >>> entries = [HostEntry("a", "http://a", "0-31", 9000), HostEntry("b", "http://b", "0-63", 0)]
        >>> table = RoutingTable.of(entries, 13_000)
        >>> [host.name for host in table.holders[31]], str(table.held_by(0)), str(table.held_by(1))
        (['a'], '32-63', '0-31')
        """
        hosts = tuple(sorted((entry for entry in entries if entry.is_live(now_ms)), key=lambda host: host.name))
        shares_of_hosts = [UserShares.parse(host.shares) for host in hosts]
        holders = [
            tuple(host for host, shares in zip(hosts, shares_of_hosts, strict=True) if share in shares)
            for share in range(SHARES)
        ]
        return cls(hosts, holders)

    def held_by(self, count: int) -> UserShares:
        """The shares that exactly `count` live hosts hold."""
        return UserShares.of(share for share, hosts in enumerate(self.holders) if len(hosts) == count)


def renew(registry: Path, entry: HostEntry) -> None:
    """Writes a host's entry.

    Raises:
        OSError: The registry cannot be written.
    """
    path = registry / layout.HOSTS / f"{entry.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, msgspec.json.encode(entry), durable.unique(path))


def withdraw(registry: Path, name: str) -> None:
    """Removes a host's entry, if any.

    Raises:
        OSError: The registry cannot be written.
    """
    (registry / layout.HOSTS / f"{name}.json").unlink(missing_ok=True)


def entries(registry: Path) -> list[HostEntry]:
    """The entries in a registry's directory, by name, live or not; unreadable ones are skipped."""
    folder, fetched = registry / layout.HOSTS, list[HostEntry]()
    with suppress(OSError, ValueError):
        fetched = documents.decode((folder / layout.FETCHED).read_bytes(), list[HostEntry])
    return _by_name([*fetched, *own_documents(folder, HostEntry).values()])


def all_entries(registry: Registry) -> list[HostEntry]:
    """The entries of all hosts, including those in the object store of a shared registry.

    Raises:
        UnusableRegistry: The object store cannot be reached.
    """
    return _by_name(all_documents(registry.directory, layout.HOSTS, HostEntry))


def _by_name(entries: Iterable[HostEntry]) -> list[HostEntry]:
    by_name = {entry.name: entry for entry in entries}
    return [by_name[name] for name in sorted(by_name)]


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


def write_erasure_report(registry: Path, progress: ErasureReport) -> None:
    """Replaces the report of a process; durable when this returns.

    Raises:
        OSError: The registry cannot be written.
    """
    path = registry / layout.ERASURES / f"{progress.part}.json"
    path.parent.mkdir(exist_ok=True)
    durable.replace(path, msgspec.json.encode(progress), durable.unique(path))


def erasure_reports(registry: Path) -> list[ErasureReport]:
    """The reports of all processes of this host, sorted by name; unreadable ones are skipped."""
    return _by_part(own_documents(registry / layout.ERASURES, ErasureReport).values())


def all_erasure_reports(registry: Registry) -> list[ErasureReport]:
    """The reports of the processes of all hosts, by name.

    Raises:
        UnusableRegistry: The object store of the shared registry cannot be reached.
    """
    return _by_part(all_documents(registry.directory, layout.ERASURES, ErasureReport))


def _by_part(reports: Iterable[ErasureReport]) -> list[ErasureReport]:
    return sorted(reports, key=lambda report: report.part)
