"""What a trial's control takes over from the live one: who is left out, who is forgotten, and whether an operator pauses training.

All of it is said with the live numbers: records of the training log name the
generation of the live control that their stream knew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from state.registry.control import Control, following, start

FOLLOWED = ("masks", "lifted", "mask_generation", "last_mask", "erased", "training")


def begun(
    live: Control, version: int | None, plan: dict[str, Any] | None, *, actor: str, reason: str, now_ms: int
) -> Control:
    """The first generation of a trial's control: an epoch of its own, from a version of the live line or from nothing.

    Args:
        live: The control of the live trainer.
        version: To go on from; None for nothing.
        plan: Of an upgrade, where the trial's model is another one; see `state/registry/upgrades.py`.
        actor: Who began it.
        reason: Why.
        now_ms: Wall clock.

    >>> live = start(actor="trainer", reason="first start", now_ms=0)
    >>> own = begun(live, 40, None, actor="ann", reason="see", now_ms=5)
    >>> own.generation, own.epoch, own.base, own.action
    (1, 2, 40, 'start')
    """
    first = replace(start(actor=actor, reason=reason, now_ms=now_ms), epoch=live.epoch + 1, base=version, log=live.log)
    if plan is not None:
        first = replace(first, action="upgrade", upgraded=True, plan=plan)
    return replace(first, **{name: getattr(live, name) for name in FOLLOWED})


def followed(own: Control, live: Control) -> Control:
    """The next generation of a trial's control; the same one where the live control wants nothing new.

    >>> from state.registry.control import train
    >>> live = start(actor="trainer", reason="first start", now_ms=0)
    >>> own = begun(live, 40, None, actor="ann", reason="see", now_ms=5)
    >>> followed(own, live) is own
    True
    >>> paused = followed(own, train(live, False, actor="bob", reason="look", now_ms=6))
    >>> paused.generation, paused.epoch, paused.training, paused.actor
    (2, 2, False, 'bob')
    """
    wanted = {name: getattr(live, name) for name in FOLLOWED}
    if all(getattr(own, name) == value for name, value in wanted.items()):
        return own
    return following(own, live.action, live.actor, live.reason, live.created_at_ms, **wanted)
