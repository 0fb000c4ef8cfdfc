"""The routing table of serving: which hosts hold which shares of users.

It is built from the entries that hosts renew in the registry:

    hosts/<name>.json   the entry of one host, renewed by its workers while they are ready
    hosts/fetched       the entries of other hosts, as JSON; the copier of a shared registry writes it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from state import layout
from state.disk import files as durable
from state.registry.directory import sharing
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
        at_ms: Wall clock time of the last renewal.
    """

    name: str
    address: str
    shares: str
    at_ms: int

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
    folder, by_name = registry / layout.HOSTS, dict[str, HostEntry]()
    for path in (folder / layout.FETCHED, *folder.glob("*.json")):
        try:
            for entry in decoded(path.read_bytes()):
                by_name[entry.name] = entry
        except (OSError, ValueError):
            continue
    return [by_name[name] for name in sorted(by_name)]


def all_entries(registry: Registry) -> list[HostEntry]:
    """The entries of all hosts, including those in the object store of a shared registry.

    Raises:
        UnusableRegistry: The object store cannot be reached.
    """
    known = {entry.name: entry for entry in entries(registry.path)}
    if (store := registry.directory.shared) is not None:
        with sharing():
            for name in store.names(layout.HOSTS):
                try:
                    remote = decoded(store.read(f"{layout.HOSTS}/{name}"))
                except (FileNotFoundError, ValueError):
                    continue
                newer = (entry for entry in remote if entry.name not in known or known[entry.name].at_ms < entry.at_ms)
                known |= {entry.name: entry for entry in newer}
    return [known[name] for name in sorted(known)]


def decoded(data: bytes) -> list[HostEntry]:
    """Decodes an entry or a list of entries; raises ValueError if it is neither, or an entry names no shares."""
    decoded_value = msgspec.json.decode(data, type=HostEntry | list[HostEntry])
    listed = decoded_value if isinstance(decoded_value, list) else [decoded_value]
    for entry in listed:
        UserShares.parse(entry.shares)
    return listed
