"""Divides `storage.budget_gb` among the parts, and limits each store and topic. Pure.

| part | share | contents | enforced by |
|---|---|---|---|
| `kafka` | 40 % | the local Kafka: clicks, training log, dead letters, attributes | each topic's `retention.bytes` |
| `registry` | 25 % | versions, bases, control, snapshots of histories | the compactor thins, and drops the oldest first |
| `stream` | 15 % | attributes; histories, while stopped or if memory has no space | the stores' maps |
| `serving` | 15 % | attributes, segments; likewise histories; rows if memory has no space | the stores' maps |
| `logs` | 5 % | one log per process, and older ones | rotation by size |

Stores in memory take no disk space until a clean stop writes them to disk. A part is kept at `KEPT` of its share, so a
part above 90 % shows that its mechanism fails. An external Kafka cluster is not limited.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from state import layout
from state.disk import memory_place

if TYPE_CHECKING:
    from state.config.settings import Settings

KAFKA, REGISTRY, STREAM, SERVING, LOGS = "kafka", "registry", "stream", "serving", "logs"
SHARES: Mapping[str, float] = {KAFKA: 0.40, REGISTRY: 0.25, STREAM: 0.15, SERVING: 0.15, LOGS: 0.05}
KEPT = 0.8

# Shares of a part's share; the rest is for small files.
_STORES: Mapping[str, Mapping[str, float]] = {
    STREAM: {layout.HISTORIES: 0.85, layout.ATTRIBUTES: 0.15},
    SERVING: {layout.HISTORIES: 0.65, layout.ATTRIBUTES: 0.1, layout.ROWS: 0.2, layout.SEGMENTS: 0.04},
}
_PAGE = 4096
# A store that was larger than its share before limits existed keeps working, and gets this much space to shrink.
_SLACK, _SLACK_BYTES = 1.05, 64 << 20


def budget_bytes(settings: Settings) -> int:
    """The whole budget."""
    return int(settings.storage.budget_gb * 1e9)


def limit_bytes(settings: Settings, part: str) -> int:
    """The share of a part."""
    return int(budget_bytes(settings) * SHARES[part])


def kept_bytes(settings: Settings, part: str) -> int:
    """The target size of a part, for code that removes the oldest data."""
    return int(limit_bytes(settings, part) * KEPT)


def store_bytes(settings: Settings, part: str, store: str) -> int:
    """Maximum size of a store of a part, in whole pages."""
    return int(limit_bytes(settings, part) * _STORES[part][store]) // _PAGE * _PAGE


def map_bytes(settings: Settings, part: str, store: str, folder: Path) -> int:
    """The map size with which the writer opens a store: its share, or slightly more than its present size.

    `part` is `stream` or `serving`, `store` a name in `state/layout.py`, and `folder` the store's directory, if it exists.
    """
    present_bytes = memory_place.size(folder)
    wanted = max(store_bytes(settings, part, store), int(present_bytes * _SLACK) + _SLACK_BYTES if present_bytes else 0)
    return -(-wanted // _PAGE) * _PAGE


def folders(settings: Settings, part: str) -> list[Path]:
    """The directories of a part; for the stream, those of all streams under this state directory."""
    if part == STREAM:
        return [path.parent for path in layout.streams(settings.state_dir)]
    named = {
        KAFKA: settings.kafka_dir,
        REGISTRY: settings.registry_dir,
        SERVING: settings.serving_dir,
        LOGS: settings.logs_dir,
    }
    return [named[part]]
