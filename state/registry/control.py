"""Control: the desired state of the system in numbered generations, with pure transitions from one to the next.

The operator writes the next generation. Serving and trainer converge to it and
report what they run. A generation never changes, so the sequence of all
generations is the audit log. `state/registry/controls.py` stores them in the
format of `state/registry/control_codec.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from state.errors import UnfitMask
from state.features.erased import Erased
from state.features.mask import Mask
from state.registry.held_update import HeldUpdate
from state.registry.log_line import WHOLE, LogLine
from state.registry.mask_entries import MaskEntry, added, joined

Action = Literal[
    "start", "pin", "follow", "rollback", "unmask", "erase", "hold", "release", "pause", "resume", "recover", "upgrade",
    "restore", "label", "accept",
]  # fmt: skip
Mode = Literal["fast", "exact"]


@dataclass(frozen=True, slots=True)
class ServingChoice:
    """The version that serving uses.

    Attributes:
        mode: `follow` the newest version of the control's epoch, or stay at a pinned version with `pin`.
        version: The pinned version; None while following.
        then_follow: Whether the trainer switches serving to `follow` once it has caught up.
    """

    mode: Literal["follow", "pin"] = "follow"
    version: int | None = None
    then_follow: bool = False


@dataclass(frozen=True)
class Control:
    """One generation of the desired state of the whole system.

    Attributes:
        generation: Its number; the newest generation is in force.
        created_at_ms: Wall clock time of the decision.
        actor: Who decided.
        reason: Why, in the actor's words.
        action: The kind of decision.
        epoch: Number of the trainer's epoch; a rollback begins a new one. Versions of another epoch are refused.
        base: The version that the epoch starts from; None if it starts from scratch.
        serving: The version that serving uses.
        masks: Masks in force: what training and windows leave out, by number.
        lifted: Masks that were lifted since the epoch began, each with the generation that lifted it.
        mask_generation: Generation of the last change of `masks` or `erased`.
        last_mask: The last number given to a mask.
        mode: Mode of the rollback that began the epoch: `exact` if the stream was rolled back too.
        log: The branch of the training log: the records that count.
        upgraded: Whether the epoch began with an upgrade, so that its versions have another model than its base.
        publishing: Whether the trainer publishes versions.
        training: Whether the trainer consumes records.
        labels: Names of versions, each with its version, in order.
        erased: Erased users; no generation restores one.
        held: The update that the trainer's guard holds, None for none. Training pauses at its end.
        released: End offsets, in the training log, of held updates that an operator released. They are not held again.
        plan: Facts that the command recorded, None if there are none. A rollback records `end`, the end of the training
            log; an exact one also `again`, the clicks that are learned again, see `state/registry/goals.py`. An upgrade
            records its target, see `state/registry/upgrades.py`. An accepted baseline records its number.
    """

    generation: int
    created_at_ms: int
    actor: str
    reason: str
    action: Action
    epoch: int
    base: int | None = None
    serving: ServingChoice = field(default_factory=ServingChoice)
    masks: tuple[MaskEntry, ...] = ()
    lifted: tuple[MaskEntry, ...] = ()
    mask_generation: int = 0
    last_mask: int = 0
    mode: Mode = "fast"
    log: LogLine = WHOLE
    upgraded: bool = False
    publishing: bool = True
    training: bool = True
    labels: tuple[tuple[str, int], ...] = ()
    erased: Erased = Erased.NOBODY
    held: HeldUpdate | None = None
    released: tuple[int, ...] = ()
    plan: Mapping[str, Any] | None = field(default=None, hash=False)

    @cached_property
    def mask(self) -> Mask:
        """The events that windows, stream and serving leave out. Its generation is that of the last change of masks."""
        return replace(joined(self.masks, self.mask_generation), erased=self.erased)

    def mask_at(self, generation: int) -> Mask:
        """The mask that training applies to a record that the stream wrote under the mask of `generation`.

        A mask that was lifted since the epoch began still applies to records written
        before that. So the offset at which it ends does not depend on when the trainer
        polled control.
        """
        kept = tuple(one for one in self.lifted if one.lifted > generation)
        if not kept:
            return self.mask
        if kept not in self._masks_at:
            self._masks_at[kept] = replace(joined((*self.masks, *kept), self.mask_generation), erased=self.erased)
        return self._masks_at[kept]

    @cached_property
    def _masks_at(self) -> dict[tuple[MaskEntry, ...], Mask]:
        return {}


def start(*, actor: str, reason: str, now_ms: int) -> Control:
    """Generation 1: train from scratch, serve the newest version.

    >>> start(actor="trainer", reason="first start", now_ms=0).epoch
    1
    """
    return Control(1, now_ms, actor, reason, "start", epoch=1)


def pin(control: Control, version: int, *, actor: str, reason: str, now_ms: int) -> Control:
    """Pins serving to `version`; training continues. Returns the same control if nothing changes.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> pinned = pin(first, 7, actor="ann", reason="odd answers", now_ms=5)
    >>> pinned.generation, pinned.serving.version, pinned.epoch
    (2, 7, 1)
    >>> pin(pinned, 7, actor="bob", reason="again", now_ms=6) is pinned
    True
    """
    return _next(control, "pin", actor, reason, now_ms, serving=ServingChoice("pin", version))


def follow(control: Control, *, actor: str, reason: str, now_ms: int) -> Control:
    """Makes serving follow the newest version of the epoch. Returns the same control if nothing changes.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> follow(first, actor="ann", reason="no need", now_ms=5) is first
    True
    """
    return _next(control, "follow", actor, reason, now_ms, serving=ServingChoice())


def roll_back(
    control: Control,
    to: int,
    mask: Mask,
    *,
    actor: str,
    reason: str,
    now_ms: int,
    log: LogLine | None = None,
    then_follow: bool = False,
) -> Control:
    """Rolls the whole system back: serving is pinned to version `to`, and a new epoch trains from it.

    Masks in force stay in force, so that a second rollback does not bring poisoned
    events back. If the epoch already started from `to`, with nothing new to mask
    and no mask lifted, only the pin may change. The trainer then does not repeat
    its work.

    An exact rollback rewrites the log under all masks, so that the log has none of
    the masked events. The caller must choose a `to` from before all of them.

    Args:
        control: The control to start from.
        to: The version to roll back to.
        mask: What to leave out from now on, in addition to the masks in force.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.
        log: The log branch that starts at `to`, for an exact rollback; None for a fast one, which stays on its branch.
        then_follow: Whether serving follows again once the trainer has caught up.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = roll_back(first, 40, Mask.NONE, actor="ann", reason="poison", now_ms=9)
    >>> back.epoch, back.base, back.serving.version
    (2, 40, 40)
    >>> roll_back(back, 40, Mask.NONE, actor="ann", reason="retry", now_ms=10) is back
    True
    """
    generation = control.generation + 1
    new = added(control.masks, mask, control.last_mask, generation)
    serving = ServingChoice("pin", to, then_follow)
    masks = (*control.masks, *new)
    same = control.action != "start" and not control.upgraded
    done = same and control.base == to and not new and not control.lifted
    if done and (log is None or control.mode == "exact"):
        return _next(control, "rollback", actor, reason, now_ms, serving=serving)
    return _next(
        control,
        "rollback",
        actor,
        reason,
        now_ms,
        serving=serving,
        epoch=control.epoch + 1,
        base=to,
        masks=masks if log is None else tuple(replace(one, excluded=True) for one in masks),
        lifted=(),
        mask_generation=generation if new else control.mask_generation,
        last_mask=control.last_mask + len(new),
        mode="fast" if log is None else "exact",
        log=control.log if log is None else log,
        upgraded=False,
        held=None,
    )


def recover(control: Control, to: int, *, actor: str, reason: str, now_ms: int) -> Control:
    """Rewinds the trainer to version `to`, the newest that it can continue from; serving choice and masks stay.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = recover(first, 40, actor="trainer", reason="the training log ends before version 41", now_ms=9)
    >>> back.epoch, back.base, back.serving.mode
    (2, 40, 'follow')
    """
    changes: dict[str, Any] = {"epoch": control.epoch + 1, "base": to, "lifted": (), "mode": "fast", "upgraded": False}
    return _next(control, "recover", actor, reason, now_ms, **changes, held=None)


def unmask(control: Control, numbers: Collection[int], *, actor: str, reason: str, now_ms: int) -> Control:
    """Lifts masks: from now on nothing that they name is left out. Returns the same control if all were lifted already.

    Events that were left out meanwhile are not learned by this. Only an exact
    rollback brings them back.

    Raises:
        UnfitMask: One of the numbers was never given.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = roll_back(first, 40, Mask(times=((0, 9),)), actor="ann", reason="poison", now_ms=9)
    >>> free = unmask(back, [1], actor="ann", reason="it was none", now_ms=10)
    >>> bool(free.mask), bool(free.mask_at(2)), bool(free.mask_at(3))
    (False, True, False)
    """
    unknown = [number for number in numbers if not 1 <= number <= control.last_mask]
    if unknown:
        known = ", ".join(str(one.id) for one in control.masks) or "none is set"
        raise UnfitMask(f"there is no mask {unknown[0]}", f"take one of `springtide masks`: {known}")
    generation = control.generation + 1
    gone = tuple(replace(one, lifted=generation) for one in control.masks if one.id in numbers)
    if not gone:
        return control
    return _next(
        control,
        "unmask",
        actor,
        reason,
        now_ms,
        masks=tuple(one for one in control.masks if one.id not in numbers),
        lifted=(*control.lifted, *gone),
        mask_generation=generation,
    )


def publish(control: Control, publishing: bool, *, actor: str, reason: str, now_ms: int) -> Control:
    """Lets the trainer publish versions, or hold them while it trains. Returns the same control if nothing changes."""
    return _next(control, "release" if publishing else "hold", actor, reason, now_ms, publishing=publishing)


def train(control: Control, training: bool, *, actor: str, reason: str, now_ms: int) -> Control:
    """Lets the trainer consume records, or pauses it. Returns the same control if nothing changes."""
    return _next(control, "resume" if training else "pause", actor, reason, now_ms, training=training)


def _next(control: Control, action: Action, actor: str, reason: str, now_ms: int, **changes: Any) -> Control:
    """The next generation with these changes; `control` itself if they change nothing."""
    if all(getattr(control, name) == value for name, value in changes.items()):
        return control
    return following(control, action, actor, reason, now_ms, **changes)


def following(control: Control, action: Action, actor: str, reason: str, now_ms: int, **changes: Any) -> Control:
    """The next generation with these changes. Its plan is None unless `changes` has one."""
    decided: dict[str, Any] = {
        "created_at_ms": now_ms,
        "actor": actor,
        "reason": reason,
        "action": action,
        "plan": None,
    }
    return replace(control, generation=control.generation + 1, **decided | changes)
