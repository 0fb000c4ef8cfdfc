"""Which entries of an embedding row a sweep must keep, so that each retained version reads as before.

Version numbers only grow; a rollback to version 30 makes the next epoch begin
at, say, 51 with parent 30. What version 52 may see is then written as closed
intervals, newest first: `((51, 52), (1, 30))`. Versions 31 to 50 are abandoned:
their rows may still be stored, and no reader of 52 sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from state.registry.manifest import Visible, sees


class RetainedRun(NamedTuple):
    """Retained versions that follow each other on one line of descent.

    Attributes:
        first: The oldest retained version of the run.
        last: The newest.
        visible: What `first` may see.
    """

    first: int
    last: int
    visible: Visible


def newest_visible(versions: Iterable[int], visible: Visible) -> int | None:
    """The first of `versions` (newest first) that lies inside `visible`, or None.

    >>> newest_visible([52, 44, 12, 3], ((51, 51), (1, 30)))
    12
    """
    for version in versions:
        if sees(visible, version):
            return version
    return None


def segments(retained: Mapping[int, Visible]) -> tuple[RetainedRun, ...]:
    """Groups `retained` versions into runs without a gap on one line of descent.

    >>> segments({7: ((1, 7),), 8: ((1, 8),), 3: ((1, 3),)})
    (RetainedRun(first=3, last=3, visible=((1, 3),)), RetainedRun(first=7, last=8, visible=((1, 7),)))
    """
    runs: list[RetainedRun] = []
    for version in sorted(retained):
        visible = retained[version]
        if runs and runs[-1].last == version - 1 and runs[-1].visible[0][0] == visible[0][0]:
            runs[-1] = runs[-1]._replace(last=version)
        else:
            runs.append(RetainedRun(version, version, visible))
    return tuple(runs)


def needed(versions: Sequence[int], runs: Sequence[RetainedRun]) -> set[int]:
    """Which entries of one id (their versions, newest first) some retained version reads.

    >>> needed([9, 7, 5, 2], [RetainedRun(6, 8, ((1, 6),))]) == {7, 5}
    True
    """
    kept: set[int] = set()
    for run in runs:
        kept.update(version for version in versions if run.first < version <= run.last)
        oldest = newest_visible((version for version in versions if version <= run.first), run.visible)
        if oldest is not None:
            kept.add(oldest)
    return kept
