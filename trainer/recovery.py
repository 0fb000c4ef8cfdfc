"""A trainer ahead of its log: it goes back to the newest version that the log still leads to.

A version is on disk when it is published; the newest records of the training
log may not be: a broker that loses power without other replicas, or a leader
that is elected without them, takes them away, and others come in their place.
Weights that learned the lost records are no function of the log any more. So
the trainer takes control on by a generation of its own: an epoch more, from
the newest version of the line that learned nothing beyond what is left, with
everything else as it was. What comes after is recomputed bit for bit by
`springtide verify`, and `springtide history` says who went back and why.
"""

from __future__ import annotations

import logging

from state.errors import TruncatedLog, UnknownVersion
from state.log.gaps import in_words
from state.registry import control as transitions
from state.registry.control import Control
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

logger = logging.getLogger(__name__)


def recover(registry: Registry, control: Control, lost: TruncatedLog, actor: str, now_ms: int) -> Control:
    """Control's next generation, which goes back behind what was lost; durable when this returns.

    Args:
        registry: Where versions and control are.
        control: That the trainer wanted to enter.
        lost: What the log said.
        actor: Who is named in the history.
        now_ms: Wall clock.

    Raises:
        TruncatedLog: No version can be learned on from; with what to do.
        ControlConflict: Somebody else changed control all the time.
    """
    kept = lost.kept
    if control.log[-1].first > kept:
        raise _hopeless(
            lost,
            f"the last exact rollback begins at {control.log[-1].first}, which is gone: repeat it with "
            "`springtide rollback --to V --mode exact --reason TEXT`, and look at `springtide history`",
        )
    found = newest_within(registry, control, lost)
    if found is None:
        raise _hopeless(
            lost,
            "no version is kept that learned only what is left: restore the training log, or learn what it holds from its "
            "beginning: `springtide upgrade --learn-anew --reason TEXT`",
        )
    reason = f"the training log {in_words(lost)}; version {found.version} learned nothing beyond"
    logger.warning("%s: going back to version %d, epoch %d", lost.what, found.version, control.epoch + 1)
    return registry.change(
        lambda now: (
            now
            if now.epoch != control.epoch
            else transitions.recover(now, found.version, actor=actor, reason=reason, now_ms=now_ms)
        )
    )


def newest_within(registry: Registry, control: Control, lost: TruncatedLog) -> Manifest | None:
    """The newest version on control's line that learned nothing beyond what is left of the log; None where there is none."""
    (gap,) = lost.gaps
    newest = registry.newest_good(control.epoch)
    start = control.base if newest is None else newest
    if start is None:
        return None
    visible = registry.manifest(start).visible
    for number in reversed(registry.versions()):
        if not sees(visible, number):
            continue
        one = registry.manifest(number)
        if (one.log.topic_id, one.log.partition) != (gap.source.topic_id, gap.source.partition):
            continue
        try:
            if one.log.next <= lost.kept and registry.chain(number):
                return one
        except UnknownVersion:
            # Its base was given up: an older one may have its own.
            continue
    return None


def _hopeless(lost: TruncatedLog, do: str) -> TruncatedLog:
    return TruncatedLog(lost.what, do, lost.gaps)
