"""What a sizing costs a month, by prices that are given; the defaults are round numbers and nobody's offer. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.capacity.load import MONTH_S
from deploy.capacity.sizes import KAFKA, REGISTRY, WORKERS, Need, Sizing

GB = 1e9
RESERVE = 1.25
"""Of memory, as `storage.memory_dir` asks for; of disks, for `storage.budget_gb` keeps parts at 80 % of their share."""
PASSED = (KAFKA, REGISTRY, WORKERS)
"""Every byte that goes from one machine to another comes to one of these or leaves it."""


@dataclass(frozen=True)
class Prices:
    """Of a month, in one currency.

    Attributes:
        core: A core.
        memory_gb: A GB of memory.
        disk_gb: A GB of disk.
        network_gb: A GB between machines; 0 where nobody counts it.
    """

    core: float = 25.0
    memory_gb: float = 3.0
    disk_gb: float = 0.1
    network_gb: float = 0.01


@dataclass(frozen=True)
class Bill:
    """What is to be ordered of one part, all of its instances together, and what it costs a month.

    Attributes:
        count: Instances.
        cores: Whole ones, with the reserve.
        memory_gb: With the reserve.
        disk_gb: With the reserve.
        network_mb_s: MB a second, in and out.
        cost: A month.
    """

    count: int
    cores: int
    memory_gb: float
    disk_gb: float
    network_mb_s: float
    cost: float


def bill(need: Need, use: float, prices: Prices) -> Bill:
    """One part's.

    >>> one = bill(Need(0.9, 8e9, 0.0, 1e6, count=2), 0.6, Prices(network_gb=0))
    >>> one.cores, one.memory_gb, one.cost
    (4, 20.0, 160.0)
    """
    cores = need.count * math.ceil(need.cores / use)
    memory_gb, disk_gb = (need.count * RESERVE * size / GB for size in (need.memory_bytes, need.disk_bytes))
    network = need.count * need.network_bytes_s
    cost = cores * prices.core + memory_gb * prices.memory_gb + disk_gb * prices.disk_gb
    return Bill(need.count, cores, memory_gb, disk_gb, network / 1e6, cost + network * MONTH_S / GB * prices.network_gb)


def bills(sizing: Sizing, prices: Prices) -> Mapping[str, Bill]:
    """Part -> its bill; bytes are paid for where they pass."""
    free = Prices(prices.core, prices.memory_gb, prices.disk_gb, 0.0)
    return {part: bill(need, sizing.use, prices if part in PASSED else free) for part, need in sizing.needs().items()}


def total(parts: Mapping[str, Bill]) -> Bill:
    """All of them together."""
    all_of = list(parts.values())
    return Bill(
        count=sum(one.count for one in all_of),
        cores=sum(one.cores for one in all_of),
        memory_gb=sum(one.memory_gb for one in all_of),
        disk_gb=sum(one.disk_gb for one in all_of),
        network_mb_s=sum(parts[part].network_mb_s for part in PASSED),
        cost=sum(one.cost for one in all_of),
    )
