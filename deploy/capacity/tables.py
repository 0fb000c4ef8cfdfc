"""A sizing in words: its parts with what they take and cost, and its limits, as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deploy.capacity.limits import Limit, limits
from deploy.capacity.prices import Bill, Prices, bills, total
from deploy.capacity.sizes import Sizing

UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def short(value: float) -> str:
    """A number as people say it, two or three digits of it.

    >>> [short(value) for value in (0.284, 12.0, 2_345.0, 1e6, 1.23e13)]
    ['0.28', '12', '2,340', '1,000,000', '12,300,000,000,000']
    """
    if value == float("inf"):
        return "never"
    if value < 10:
        return f"{value:.2g}"
    digits = len(f"{value:.0f}")
    return f"{round(value, min(0, 3 - digits)):,.0f}"


def size(value: float) -> str:
    """Bytes in words.

    >>> [size(value) for value in (304.0, 4.9e8, 1.25e13)]
    ['304 B', '490 MB', '12.5 TB']
    """
    for unit, least in UNITS:
        if value >= least:
            return f"{value / least:.3g} {unit}B" if value / least < 1000 else f"{value / least:,.0f} {unit}B"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """A time in words.

    >>> [duration(seconds) for seconds in (0.4, 90.0, 7200.0, 1e6)]
    ['0.4 s', '1.5 min', '2 h', '12 d']
    """
    for unit, least in (("d", 172_800.0), ("h", 5_400.0), ("min", 60.0)):
        if seconds >= least:
            return f"{seconds / {'d': 86_400.0, 'h': 3_600.0, 'min': 60.0}[unit]:.2g} {unit}"
    return f"{seconds:.2g} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def ordered(name: str, one: Bill) -> list[str]:
    """A row of what is to be ordered."""
    sizes = (one.memory_gb * 1e9, one.disk_gb * 1e9)
    return [
        name,
        str(one.count),
        f"{one.cores:,}",
        *map(size, sizes),
        f"{size(one.network_mb_s * 1e6)}/s",
        f"{one.cost:,.0f}",
    ]


def parts(sizing: Sizing, prices: Prices) -> list[str]:
    """The table of all parts, and of the sum."""
    found = bills(sizing, prices)
    rows = [ordered(part, one) for part, one in found.items()]
    head = ["part", "instances", "cores", "memory", "disk", "network", "cost a month"]
    return table(head, [*rows, ordered("**all**", total(found))])


def told(one: Limit) -> str:
    """What a limit is asked for, in its unit."""
    if one.unit.startswith("bytes"):
        return f"{size(one.asked)} of {size(one.most)}{one.unit.removeprefix('bytes')}"
    if one.unit == "s":
        return f"{duration(one.asked)} of {duration(one.most)}"
    return f"{short(one.asked)} of {short(one.most)} {one.unit}"


def broken(sizing: Sizing) -> list[Limit]:
    """The limits that this load is beyond, the worst first."""
    return [one for one in limits(sizing) if one.share > 1]
