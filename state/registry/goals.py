"""The clicks to learn again after a rollback: from the version rolled back to, up to the last one learned before."""

from __future__ import annotations

from collections.abc import Mapping

from state.errors import CorruptVersion, UnknownVersion
from state.positions import Source
from state.registry.registry import Registry

ClickRanges = Mapping[Source, tuple[int, int]]
"""By source: the first click, and the offset after the last one."""


def learned_before(registry: Registry, epoch: int) -> dict[Source, int]:
    """For each source, the first click that was not learned when `epoch` began.

    If the previous epoch had not caught up, the epochs before it count too.

    Args:
        registry: Holds versions, control and outcomes.
        epoch: Epoch of control; its versions and those of later epochs do not count.

    Raises:
        CorruptVersion: A control generation or an outcome fails its digest.
    """
    goal: dict[Source, int] = {}
    for number in sorted({*registry.versions(), *registry.recents()}, reverse=True):
        try:
            found = registry.either(number)
        except (UnknownVersion, CorruptVersion):
            continue
        if found.epoch < epoch:
            epoch = found.epoch
            goal |= {source: max(mark, goal.get(source, 0)) for source, mark in found.marks.items()}
            if has_caught_up(registry, epoch):
                break
    return goal


def has_caught_up(registry: Registry, epoch: int) -> bool:
    """Whether an epoch has caught up: the trainer recorded that, or it is the first epoch, or began with an upgrade.

    Raises:
        CorruptVersion: A control generation or the outcome fails its digest.
    """
    began = registry.generations.beginning_of(epoch)
    if began is None or began.base is None or began.action == "upgrade":
        return True
    return registry.generations.outcome(epoch, "learned") is not None


def clicks_in(ranges: ClickRanges) -> int:
    """The number of clicks in ranges; a click of a partition that is in several buckets counts once.

    >>> zero, one = Source("ab" * 16, 0, 0, 2), Source("ab" * 16, 0, 1, 2)
    >>> clicks_in({zero: (4, 9), one: (5, 10)})
    6
    """
    whole: dict[tuple[str, int], tuple[int, int]] = {}
    for source, (first, after) in ranges.items():
        low, high = whole.get((source.topic_id, source.partition), (first, after))
        whole[source.topic_id, source.partition] = min(low, first), max(high, after)
    return sum(high - low for low, high in whole.values())


def to_json(ranges: ClickRanges) -> dict[str, list[int]]:
    """Converts ranges to JSON values.

    >>> from_json(to_json({Source("ab" * 16, 0): (4, 9)}))[Source("ab" * 16, 0)]
    (4, 9)
    """
    return {str(source): [first, after] for source, (first, after) in sorted(ranges.items())}


def from_json(document: Mapping[str, list[int]]) -> dict[Source, tuple[int, int]]:
    """Reads the ranges that `to_json` returned."""
    return {Source.parse(source): (int(first), int(after)) for source, (first, after) in document.items()}
