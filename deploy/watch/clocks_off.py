"""Clicks whose clock is off, from the stream's metrics: how many, and the position of the newest one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.watch.messages import seconds, shown
from deploy.watch.scrape import Scrape

LATELY_S = 600.0
DAY_S, YEAR_S = 86_400.0, 31_536_000.0
SERIES = "springtide_stream_clock_off"
WORDS = {"ahead": "ahead", "behind": "behind, or it came late", "refused": "refused"}


@dataclass(frozen=True)
class ClocksOff:
    """Clicks whose clock is off in one direction.

    Attributes:
        clicks: Their number since the stream's start.
        partition: Partition of the newest one.
        offset: Offset of the newest one.
        by_s: How far the newest one is off, seconds; 0 if unknown.
        age_s: How long ago the newest one was read, seconds.
    """

    clicks: float
    partition: int
    offset: int
    by_s: float
    age_s: float


def clocks_off(stream: Scrape, wall_s: float) -> dict[str, ClocksOff]:
    """Returns the clocks that are off, by direction.

    >>> from deploy.watch.scrape import parsed
    >>> lines = (f'springtide_stream_clock{name}{{direction="ahead"}} {value}' for name, value in (
    ...     ("s_off_total", 2), ("_off_partition", 1), ("_off_offset", 70), ("_off_seconds", 3000), ("_off_time_seconds", 5)))
    >>> clocks_off(Scrape(parsed(chr(10).join(lines))), wall_s=9.0)
    {'ahead': ClocksOff(clicks=2.0, partition=1, offset=70, by_s=3000.0, age_s=4.0)}

    Args:
        stream: The stream's metrics.
        wall_s: Seconds since 1970.
    """
    clicks = stream.by("springtide_stream_clocks_off_total", "direction")
    partition, offset, by_s, at_s = (
        stream.by(f"{SERIES}_{name}", "direction") for name in ("partition", "offset", "seconds", "time_seconds")
    )
    return {
        one: ClocksOff(clicks[one], int(partition[one]), int(offset[one]), by_s[one], max(0.0, wall_s - at_s[one]))
        for one in WORDS
        if clicks.get(one) and one in at_s
    }


def lines_of(found: Mapping[str, ClocksOff]) -> list[Sequence[str]]:
    """Returns the cells of a line for each direction: a label, the count, and the position of the newest click.

    >>> lines_of({"ahead": ClocksOff(2.0, 1, 70, 3000.0, 4.0)})
    [('clocks ahead', '2', 'partition 1 offset 70: 50 min ahead')]
    """
    return [
        (f"clocks {name}", shown(one.clicks), f"partition {one.partition} offset {one.offset}: {_how(name, one)}")
        for name, one in found.items()
    ]


def troubles_of(found: Mapping[str, ClocksOff]) -> Iterator[str]:
    """Yields a problem if a clock was recently ahead of all others; a click with a clock behind may only be late.

    >>> list(troubles_of({"ahead": ClocksOff(2.0, 1, 70, 3000.0, 4.0), "behind": ClocksOff(9.0, 0, 7, 3000.0, 4.0)}))
    ['a clock is 50 min ahead (partition 1 offset 70)']
    """
    one = found.get("ahead")
    if one is not None and one.age_s < LATELY_S:
        yield f"a clock is {far(one.by_s)} ahead (partition {one.partition} offset {one.offset})"


def far(span_s: float) -> str:
    """Formats a time span that can be long.

    >>> far(3000.0), far(260_000.0), far(2.5e9)
    ('50 min', '3 days', '79 years')
    """
    if span_s < 2 * DAY_S:
        return seconds(span_s)
    return f"{span_s / DAY_S:.0f} days" if span_s < 2 * YEAR_S else f"{span_s / YEAR_S:.0f} years"


def _how(name: str, one: ClocksOff) -> str:
    return f"{far(one.by_s)} {WORDS[name]}" if one.by_s else WORDS[name]
