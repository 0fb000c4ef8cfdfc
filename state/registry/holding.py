"""Control transitions for an update that the guard holds: serving stays before it until an operator decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from state.registry.control import Control, ServingChoice, following
from state.registry.held_update import MOST_RELEASED, HeldUpdate


def hold(control: Control, held: HeldUpdate, *, actor: str, reason: str, now_ms: int) -> Control:
    """Pauses training, and pins serving, if it followed, to the version before the suspect window.

    Returns the same control if an update is held already, or if an operator released this one before.

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
    """Lets training continue with the held update, and remembers it as good. No change if nothing is held.

    Serving follows again if it did before and nobody chose another version meanwhile.
    """
    held = control.held
    if held is None:
        return control
    changes: dict[str, Any] = {"held": None, "released": (*control.released, held.next)[-MOST_RELEASED:]}
    changes["publishing" if action == "release" else "training"] = True
    if held.followed and control.serving == ServingChoice("pin", held.version):
        changes["serving"] = ServingChoice()
    return following(control, action, actor, reason, now_ms, **changes)
