"""Control transitions for a restored backup, with the training log that it was learned from or without it.

If Kafka's data is lost too, training continues from the version in a new epoch,
on a new log from its beginning. The plan of the generation that begins it has
`log`, `anew`, and `lost`. `lost` is the number of click positions that the
histories had and the version had not learned; nobody can learn them any more.
Pure, except for reading.
"""

from __future__ import annotations

from dataclasses import replace

from state.registry.control import Control, following
from state.registry.controls import Controls
from state.registry.log_line import WHOLE
from state.registry.manifest import LogRange, Manifest

ACTION = "restore"


def restored(control: Control, *, actor: str, reason: str, now_ms: int) -> Control:
    """Records that a full backup was restored: a generation that changes nothing else.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = restored(first, actor="ann", reason="the disk was lost", now_ms=5)
    >>> back.generation, back.action, back.epoch
    (2, 'restore', 1)
    """
    return following(control, "restore", actor, reason, now_ms)


def restored_without_log(
    control: Control, version: int | None, lost: int, *, actor: str, reason: str, now_ms: int
) -> Control:
    """Records that a backup was restored without its log: a new epoch continues from `version` on the new log.

    Args:
        control: The control to start from.
        version: The version to continue from; None if there was none yet.
        lost: Click positions between the version and the histories.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = restored_without_log(first, 40, 7, actor="ann", reason="all was lost", now_ms=5)
    >>> back.epoch, back.base, back.plan
    (2, 40, {'log': 'anew', 'lost': 7})
    """
    made = restored(control, actor=actor, reason=reason, now_ms=now_ms)
    plan = {"log": "anew", "lost": lost}
    return replace(made, epoch=made.epoch + 1, base=version, lifted=(), mode="fast", log=WHOLE, plan=plan)


def without_lost_log(controls: Controls, control: Control, version: Manifest) -> Manifest:
    """A version as control's epoch continues from it. If its log was lost, it has no log position and counts the loss.

    Raises:
        CorruptVersion: Control is damaged.
    """
    began = controls.beginning_of(control.epoch)
    if began is None or began.action != ACTION or began.plan is None or version.epoch == control.epoch:
        return version
    gap = version.metrics.get("account.gap", 0.0) + int(began.plan["lost"])
    return replace(
        version,
        log=LogRange(version.log.topic, partition=version.log.partition),
        metrics={**version.metrics, "account.gap": gap},
    )
