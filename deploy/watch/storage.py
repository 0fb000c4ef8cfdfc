"""Disk usage of each part against `storage.budget_gb`: measured on this machine, or, for problems, from /metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deploy.watch.scrape import Scrape
from state.config.settings import Settings
from state.storage import shares
from state.storage.measuring import free_bytes, used_bytes

NEAR = 0.9
WAITS = {
    shares.REGISTRY: "publishing",
    shares.STREAM: "the stream",
    shares.SERVING: "serving",
    shares.KAFKA: "Kafka",
    shares.LOGS: "a log",
}


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the usage of each part on this machine as JSON values; None if nothing is stored here."""
    there = {part: [one for one in shares.folders(settings, part) if one.is_dir()] for part in shares.SHARES}
    parts = {
        part: {"used_bytes": used_bytes(folders), "limit_bytes": shares.limit_bytes(settings, part)}
        for part, folders in there.items()
        if folders
    }
    if not parts:
        return None
    return {
        "used_bytes": sum(one["used_bytes"] for one in parts.values()),
        "budget_bytes": shares.budget_bytes(settings),
        "free_bytes": min(free_bytes(folder) for folders in there.values() for folder in folders),
        "parts": parts,
    }


def as_text(kept: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the usage for `springtide status`: a keyword and a description.

    >>> parts = {"logs": {"used_bytes": 2e8, "limit_bytes": 5e8}, "kafka": {"used_bytes": 0, "limit_bytes": 4e9}}
    >>> as_text({"used_bytes": 2e8, "budget_bytes": 10e9, "free_bytes": 7e9, "parts": parts})
    ('2%', '0.20 of 10.00 GB, 7.00 GB free on the disk; logs 0.20 of 0.50, kafka 0.00 of 4.00')
    """
    whole = (
        f"{_gb(kept['used_bytes'])} of {_gb(kept['budget_bytes'])} GB, {_gb(kept['free_bytes'])} GB free on the disk"
    )
    listed = (f"{part} {_gb(one['used_bytes'])} of {_gb(one['limit_bytes'])}" for part, one in kept["parts"].items())
    return f"{kept['used_bytes'] / kept['budget_bytes']:.0%}", f"{whole}; {', '.join(listed)}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def full(scrapes: Iterable[Scrape]) -> list[str]:
    r"""Describes which parts wait for disk space, and which ones use almost all of their share; the worst first.

    >>> from deploy.watch.scrape import parsed
    >>> name = "springtide_storage_"
    >>> trainer = f'{name}waiting{{part="registry"}} 1\n{name}used_bytes{{part="registry"}} 99\n'
    >>> full([Scrape(parsed(trainer + f'{name}limit_bytes{{part="registry"}} 100')), Scrape()])
    ['publishing waits for room', 'registry takes 99% of its share of the disk']
    """
    found = {name: dict[str, float]() for name in ("waiting", "used_bytes", "limit_bytes")}
    for one in scrapes:
        for name, parts in found.items():
            for part, value in one.by(f"springtide_storage_{name}", "part").items():
                parts[part] = parts.get(part, 0.0) + value
    waits = [f"{WAITS.get(part, part)} waits for room" for part, count in found["waiting"].items() if count]
    taken = {part: found["used_bytes"].get(part, 0.0) / limit for part, limit in found["limit_bytes"].items() if limit}
    near = sorted(((share, part) for part, share in taken.items() if share > NEAR), reverse=True)
    return [*waits, *(f"{part} takes {share:.0%} of its share of the disk" for share, part in near)]
