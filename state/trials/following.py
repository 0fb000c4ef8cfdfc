"""What a trial's control copies from the live control: masks, erasures, and whether training is paused.

The generation numbers are those of the live control, because records of the
training log name the live generation that their stream knew.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace as changed

from state.registry.control import Control, following, start

FOLLOWED = ("masks", "lifted", "mask_generation", "last_mask", "erased", "training")


def begun(
    live: Control, version: int | None, plan: dict[str, Any] | None, *, actor: str, reason: str, now_ms: int
) -> Control:
    """The first generation of a trial's control: its own epoch, from a version of the live branch or from scratch.

    Args:
        live: The control of the live trainer.
        version: The version to continue from; None to start from scratch.
        plan: Plan of an upgrade, if the trial has another model; see `state/registry/upgrades.py`.
        actor: Who began it.
        reason: Why.
        now_ms: Wall clock.

    >>> live = start(actor="trainer", reason="first start", now_ms=0)
    >>> own = begun(live, 40, None, actor="ann", reason="see", now_ms=5)
    >>> own.generation, own.epoch, own.base, own.action
    (1, 2, 40, 'start')
    """
    first = changed(start(actor=actor, reason=reason, now_ms=now_ms), epoch=live.epoch + 1, base=version, log=live.log)
    if plan is not None:
        first = changed(first, action="upgrade", upgraded=True, plan=plan)
    return changed(first, **{name: getattr(live, name) for name in FOLLOWED})


def followed(own: Control, live: Control) -> Control:
    """The next generation of a trial's control; the same one if the live control has nothing new.

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
