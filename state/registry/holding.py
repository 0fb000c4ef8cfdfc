"""What control does about an update that the trainer's guard holds: answers stay before it, until an operator decides. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from state.registry.control import Control, ServingChoice, following
from state.registry.held_update import MOST_RELEASED, HeldUpdate


def hold(control: Control, held: HeldUpdate, *, actor: str, reason: str, now_ms: int) -> Control:
    """Training rests, and answers that followed stay at the version before what is suspect.

    The same control where something is held already, or where an operator let go on at this place before.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> found = HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000)
    >>> stopped = hold(first, found, actor="guard", reason="a flood", now_ms=5)
    >>> stopped.action, stopped.serving.version, stopped.held == found
    ('hold', 7, True)
    >>> gone_on = release(stopped, actor="ann", reason="a sale", now_ms=6)
    >>> gone_on.action, gone_on.serving.mode, gone_on.held, gone_on.released
    ('release', 'follow', None, (90,))
    >>> hold(gone_on, found, actor="guard", reason="a flood", now_ms=7) is gone_on
    True
    """
    if control.held is not None or held.next in control.released:
        return control
    follows = control.serving.mode == "follow" and held.version > 0
    changes: dict[str, Any] = {"held": replace(held, followed=follows)}
    if follows:
        changes["serving"] = ServingChoice("pin", held.version)
    return following(control, "hold", actor, reason, now_ms, **changes)


def release(
    control: Control, *, actor: str, reason: str, now_ms: int, action: Literal["release", "resume"] = "release"
) -> Control:
    """Training goes on with what was held, and it is remembered that this place is good. The same control where nothing is held.

    Answers follow again where they did before, and nobody chose another version meanwhile.
    """
    held = control.held
    if held is None:
        return control
    changes: dict[str, Any] = {"held": None, "released": (*control.released, held.next)[-MOST_RELEASED:]}
    changes["publishing" if action == "release" else "training"] = True
    if held.followed and control.serving == ServingChoice("pin", held.version):
        changes["serving"] = ServingChoice()
    return following(control, action, actor, reason, now_ms, **changes)
