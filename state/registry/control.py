"""What should be: a control generation, and the pure transitions from one to the next.

The operator writes the next generation; serving and trainer converge to it and
report what they run. A generation is never changed: the sequence of all of
them is the audit log. `state/registry/registry.py` stores them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from state.features.mask import Mask
from state.registry import log_line
from state.registry.log_line import WHOLE, LogLine

Action = Literal["start", "pin", "follow", "rollback"]
Mode = Literal["fast", "exact"]
FORMAT, WITH_LINE = 1, 2  # 2 where an exact rollback was: a release that knows no line would learn what it abandoned


@dataclass(frozen=True, slots=True)
class ServingChoice:
    """Which version answers should use.

    Attributes:
        mode: `follow` the newest version of the control's epoch, or stay at the `pin`.
        version: The pinned version; None while following.
    """

    mode: Literal["follow", "pin"] = "follow"
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """The desired state of the whole system.

    Attributes:
        generation: Its number; the newest generation counts.
        created_at_ms: When it was decided, wall clock.
        actor: Who decided.
        reason: Why, in the actor's words.
        action: What was decided.
        epoch: The trainer's life since a rollback; versions of another epoch are refused.
        base: The version that the epoch starts from; None where it starts from nothing.
        serving: Which version answers should use.
        mask: The events that training and windows leave out; its generation is the one that decided it.
        mode: Of the rollback that the epoch began with: `exact` where the stream went back too.
        log: The records of the training log that count.
    """

    generation: int
    created_at_ms: int
    actor: str
    reason: str
    action: Action
    epoch: int
    base: int | None = None
    serving: ServingChoice = field(default_factory=ServingChoice)
    mask: Mask = Mask.NONE
    mode: Mode = "fast"
    log: LogLine = WHOLE


def start(*, actor: str, reason: str, now_ms: int) -> Control:
    """Generation 1: train from nothing, serve the newest version.

    >>> start(actor="trainer", reason="first start", now_ms=0).epoch
    1
    """
    return Control(1, now_ms, actor, reason, "start", epoch=1)


def pin(control: Control, version: int, *, actor: str, reason: str, now_ms: int) -> Control:
    """Answers stay at `version`; training goes on. The same control where that is so already.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> pinned = pin(first, 7, actor="ann", reason="odd answers", now_ms=5)
    >>> pinned.generation, pinned.serving.version, pinned.epoch
    (2, 7, 1)
    >>> pin(pinned, 7, actor="bob", reason="again", now_ms=6) is pinned
    True
    """
    return _next(control, "pin", actor, reason, now_ms, serving=ServingChoice("pin", version))


def follow(control: Control, *, actor: str, reason: str, now_ms: int) -> Control:
    """Answers follow the newest version of the epoch. The same control where they do already.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> follow(first, actor="ann", reason="no need", now_ms=5) is first
    True
    """
    return _next(control, "follow", actor, reason, now_ms, serving=ServingChoice())


def roll_back(
    control: Control, to: int, mask: Mask, *, actor: str, reason: str, now_ms: int, log: LogLine | None = None
) -> Control:
    """The whole system goes back: answers pinned to version `to`, a new epoch that trains on from it.

    What was masked before stays masked, so that an old poison does not come
    back with a second rollback. Where the epoch started from `to` already,
    with nothing new to mask, only the pin may change: the trainer need not
    learn the same again.

    Args:
        control: The control to start from.
        to: The version to go back to.
        mask: What to leave out from now on, beside what is left out already.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.
        log: The line that turns off at `to`, for an exact rollback; None for a fast one, which reads on as before.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = roll_back(first, 40, Mask.NONE, actor="ann", reason="poison", now_ms=9)
    >>> back.epoch, back.base, back.serving.version
    (2, 40, 40)
    >>> roll_back(back, 40, Mask.NONE, actor="ann", reason="retry", now_ms=10) is back
    True
    """
    joined = join(control.mask, mask, control.generation + 1)
    serving = ServingChoice("pin", to)
    done = control.action != "start" and control.base == to and joined == control.mask
    if done and (log is None or control.mode == "exact"):
        return _next(control, "rollback", actor, reason, now_ms, serving=serving)
    return replace(
        _next(control, "rollback", actor, reason, now_ms, serving=serving, force=True),
        epoch=control.epoch + 1,
        base=to,
        mask=joined,
        mode="fast" if log is None else "exact",
        log=control.log if log is None else log,
    )


def join(mask: Mask, more: Mask, generation: int) -> Mask:
    """Both masks as one of `generation`; `mask` itself where `more` adds nothing.

    >>> join(Mask.NONE, Mask.NONE, 4) is Mask.NONE
    True
    """
    offsets = tuple(sorted({*mask.offsets, *more.offsets}))
    times = tuple(sorted({*mask.times, *more.times}))
    users = mask.users | more.users
    if set(offsets) == set(mask.offsets) and set(times) == set(mask.times) and users == mask.users:
        return mask
    return replace(mask, generation=generation, offsets=offsets, times=times, users=users)


def encode(control: Control) -> bytes:
    """`control` as canonical JSON: the same control gives the same bytes."""
    document: dict[str, Any] = {
        "format": FORMAT if control.log == WHOLE else WITH_LINE,
        "generation": control.generation,
        "created_at_ms": control.created_at_ms,
        "actor": control.actor,
        "reason": control.reason,
        "action": control.action,
        "epoch": control.epoch,
        "base": control.base,
        "serving": {"mode": control.serving.mode, "version": control.serving.version},
        "mask": control.mask.to_json(),
    }
    if control.log != WHOLE:
        document |= {"mode": control.mode, "log": log_line.to_json(control.log)}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def decode(document: Mapping[str, Any]) -> Control:
    """The control that `encode` wrote, after JSON parsing; fields of later releases are left out.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> decode(json.loads(encode(first))) == first
    True

    Raises:
        ValueError: It is of a format that this release does not read, or a field is missing.
    """
    if document.get("format") not in (FORMAT, WITH_LINE):
        raise ValueError(f"control of format {document.get('format')!r}; this release reads 1 to {WITH_LINE}")
    try:
        serving = document["serving"]
        return Control(
            generation=int(document["generation"]),
            created_at_ms=int(document["created_at_ms"]),
            actor=str(document["actor"]),
            reason=str(document["reason"]),
            action=document["action"],
            epoch=int(document["epoch"]),
            base=document["base"],
            serving=ServingChoice(serving["mode"], serving["version"]),
            mask=Mask.from_json(document["mask"]),
            mode=document.get("mode", "fast"),
            log=log_line.from_json(document["log"]) if "log" in document else WHOLE,
        )
    except KeyError as error:
        raise ValueError(f"control without the field {error}") from error


def _next(
    control: Control,
    action: Action,
    actor: str,
    reason: str,
    now_ms: int,
    *,
    serving: ServingChoice,
    force: bool = False,
) -> Control:
    """The next generation with another `serving`; `control` itself where that changes nothing."""
    if control.serving == serving and not force:
        return control
    return replace(
        control,
        generation=control.generation + 1,
        created_at_ms=now_ms,
        actor=actor,
        reason=reason,
        action=action,
        serving=serving,
    )
