"""Control: the desired state of the system in numbered generations, and the pure transitions between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Literal, TypedDict, Unpack

import msgspec
from msgspec.structs import replace as changed

from state.disk import documents
from state.errors import UnfitMask, UnfitVersion
from state.features.erased import Erased, MaskedUsers
from state.features.mask import Mask, Named
from state.registry.log_line import WHOLE, LogLine, from_json, to_json

FORMAT, EXTENDED = 1, 2
"""FORMAT is the format of 0.1.0. EXTENDED has content that a release that reads only format 1 would misinterpret."""

MOST_RELEASED = 32
"""Number of newest released updates that are remembered, so that they are not held again when the log is reread."""
LABEL_FORM, MOST_LABELS = re.compile(r"[a-z][a-z0-9_-]{0,31}"), 16
RESTORE = "restore"

Mode = Literal["fast", "exact"]


@dataclass(frozen=True, slots=True)
class ServingChoice:
    """The version that serving uses.

    Attributes:
        then_follow: Whether the trainer switches serving to `follow` once it has caught up.
    """

    mode: Literal["follow", "pin"] = "follow"
    version: int | None = None
    then_follow: bool = False


@dataclass(frozen=True, slots=True)
class SuspectClicks:
    """The offsets `[first, next)` of one partition of clicks that a held update contains.

    Attributes:
        topic_id: The topic's id, 32 hexadecimal digits.
    """

    topic_id: str
    partition: int
    first: int
    next: int


@dataclass(frozen=True, slots=True)
class HeldUpdate:
    """The update that the guard holds.

    Attributes:
        rule: Name of the rule.
        meaning: The quantity that the rule checks, in words.
        version: The newest durable version before the suspect window; 0 if there is none.
        first: Offset of the training log where the window begins.
        next: Offset after the record at which the update was held; training pauses there.
        first_ms: Log time where the window begins.
        next_ms: Log time where training pauses.
        clicks: The update's clicks by partition.
        followed: Whether serving followed the newest version, so that a release lets it follow again.
    """

    rule: str
    meaning: str
    signal: float
    usual: float
    version: int
    first: int
    next: int
    first_ms: int
    next_ms: int
    clicks: tuple[SuspectClicks, ...] = ()
    followed: bool = True

    def in_words(self) -> str:
        """Rule, numbers and offsets in one line.

        >>> HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000, (SuspectClicks("ab" * 16, 2, 5, 80),)).in_words()
        'user: share of one user is 30, usually 1, from partition 2 offset 5 on (training log 40 to 89)'
        """
        numbers = f"{self.meaning} is {self.signal:.3g}, usually {self.usual:.3g}"
        starts = ", ".join(f"partition {clicks.partition} offset {clicks.first}" for clicks in self.clicks)
        since = f", from {starts} on" if starts else ""
        return f"{self.rule}: {numbers}{since} (training log {self.first} to {self.next - 1})"


class MaskEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One mask, from one option of a rollback: a range of offsets, a time span, users, an item or a category.

    Attributes:
        id: Its number; numbers are never reused.
        generation: Generation of the control that set it.
        offsets: (topic word, partition, first, next), or None.
        times: (from, to) of event time in milliseconds, or None.
        users: Pseudonyms; empty for any other mask.
        named: An item or a category and a time span, or None.
        lifted: The generation that lifted it; 0 while it is in force.
        excluded: Whether the training log contains none of its events, because an exact rollback rewrote the log under
            this mask.
    """

    id: int
    generation: int
    offsets: tuple[int, int, int, int] | None = None
    times: tuple[int, int] | None = None
    users: MaskedUsers = MaskedUsers.NOBODY
    lifted: int = 0
    excluded: bool = False
    named: Named | None = None

    @property
    def span(self) -> tuple[int, int] | None:
        """The event times to which it is limited, (from, to); None if it is not limited to times."""
        return self.times if self.named is None else (self.named.first_ms, self.named.next_ms)

    @property
    def mask(self) -> Mask:
        """This entry alone, as a mask."""
        return joined((self,), self.generation)


def entries(mask: Mask) -> list[MaskEntry]:
    """Splits a mask into entries, numbered from 1.

    >>> [entry.id for entry in entries(Mask(3, times=((0, 9), (20, 30)), users=MaskedUsers.of([7])))]
    [1, 2, 3]
    """
    parts: list[MaskEntry] = [MaskEntry(0, mask.generation, offsets=part) for part in sorted(set(mask.offsets))]
    parts += [MaskEntry(0, mask.generation, times=part) for part in sorted(set(mask.times))]
    parts += [MaskEntry(0, mask.generation, named=part) for part in sorted(set(mask.named))]
    if mask.users:
        parts.append(MaskEntry(0, mask.generation, users=mask.users))
    return [changed(part, id=number) for number, part in enumerate(parts, 1)]


def added(held: Sequence[MaskEntry], mask: Mask, last: int, generation: int) -> list[MaskEntry]:
    """The parts of `mask` that `held` does not have.

    Args:
        held: The entries in force.
        mask: What to leave out in addition.
        last: The last number given.
        generation: Generation of the control that sets them.

    >>> held = entries(Mask(times=((0, 9),)))
    >>> [(entry.id, entry.times) for entry in added(held, Mask(times=((0, 9), (5, 7))), 4, 3)]
    [(5, (5, 7))]
    """
    known = {(entry.offsets, entry.times, entry.named) for entry in held}
    users = reduce(lambda all_users, entry: all_users | entry.users, held, MaskedUsers.NOBODY)
    new: list[MaskEntry] = []
    for part in entries(mask):
        if part.users:
            fresh = part.users.ids[~users.has(part.users.ids)]
            if not len(fresh):
                continue
            part = changed(part, users=part.users if len(fresh) == len(part.users) else MaskedUsers(fresh))
        elif (part.offsets, part.times, part.named) in known:
            continue
        new.append(changed(part, id=last + len(new) + 1, generation=generation))
    return new


def joined(held: Iterable[MaskEntry], generation: int) -> Mask:
    """Joins all of `held` into one mask."""
    held = tuple(held)
    if not held:
        return replace(Mask.NONE, generation=generation)
    return Mask(
        generation,
        tuple(sorted(entry.offsets for entry in held if entry.offsets is not None)),
        tuple(sorted(entry.times for entry in held if entry.times is not None)),
        reduce(lambda users, entry: users | entry.users, held, MaskedUsers.NOBODY),
        named=tuple(sorted(entry.named for entry in held if entry.named is not None)),
    )


class Control(msgspec.Struct, frozen=True, dict=True, omit_defaults=True):
    """One generation of the desired state of the whole system.

    Attributes:
        generation: Its number; the newest generation is in force.
        created_at_ms: Wall clock time of the decision.
        action: The kind of decision: start, pin, follow, rollback, unmask, erase, hold, release, pause, resume,
            recover, upgrade, restore, label, or accept.
        epoch: Number of the trainer's epoch; a rollback begins a new one. Versions of another epoch are refused.
        base: The version that the epoch starts from; None if it starts from scratch.
        serving: The version that serving uses.
        masks: Masks in force, by number; training and windows leave out their events.
        lifted: Masks that were lifted since the epoch began.
        mask_generation: Generation of the last change of `masks` or `erased`.
        last_mask: The last number that was assigned to a mask.
        mode: `exact` if the rollback that began the epoch rolled the stream back too.
        log: The branch of the training log: the records that count.
        upgraded: Whether the epoch began with an upgrade, so that its versions have another model than its base.
        publishing: Whether the trainer publishes versions.
        training: Whether the trainer consumes records.
        labels: Names of versions, each with its version, in order.
        erased: Erased users; no generation restores one.
        held: The update that the trainer's guard holds. Training pauses at its end.
        released: End offsets, in the training log, of held updates that an operator released. They are not held again.
        plan: Facts that the command recorded, see `docs/reference/formats.md`.
    """

    generation: int
    created_at_ms: int
    actor: str
    reason: str
    action: str
    epoch: int
    base: int | None = None
    serving: ServingChoice = ServingChoice()
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
    plan: Mapping[str, Any] | None = None

    def __hash__(self) -> int:
        return hash((self.generation, self.created_at_ms, self.actor))

    @cached_property
    def mask(self) -> Mask:
        """The events that windows, stream and serving leave out."""
        return replace(joined(self.masks, self.mask_generation), erased=self.erased)

    def mask_at(self, generation: int) -> Mask:
        """The mask that training applies to a record that the stream wrote under the mask of `generation`.

        A mask that was lifted since the epoch began still applies to records written before it was lifted. So the
        offset at which it ends does not depend on when the trainer polled control.
        """
        masks = tuple(mask for mask in self.lifted if mask.lifted > generation)
        if not masks:
            return self.mask
        if masks not in self._masks_at:
            self._masks_at[masks] = replace(joined((*self.masks, *masks), self.mask_generation), erased=self.erased)
        return self._masks_at[masks]

    @cached_property
    def _masks_at(self) -> dict[tuple[MaskEntry, ...], Mask]:
        return {}


RELEASED = ("generation", "created_at_ms", "actor", "reason", "action", "epoch", "base", "serving")
"""The fields of format 1, apart from its single mask."""

UsersOf = Callable[[str], MaskedUsers]
"""Reads the users' file of this SHA-256."""
ErasedOf = Callable[[str], Erased]
"""Reads the erasures up to and including the file with this SHA-256."""


def encode(control: Control) -> bytes:
    """Encodes `control` as canonical JSON: equal controls give equal bytes. Users are named by their files' digests."""
    document: dict[str, Any] = msgspec.to_builtins(changed(control, erased=Erased.NOBODY), enc_hook=_file_of)
    serving = document.setdefault("serving", {"mode": "follow", "version": None})
    if serving.pop("then_follow", False):
        document["then_follow"] = True
    document.setdefault("base", None)
    document.pop("log", None)
    if control.log != WHOLE:
        document["log"] = to_json(control.log)
    if control.erased:
        document["erased"] = {"last": control.erased.last, "sha256": control.erased.digest}
    if control.labels:
        document["labels"] = dict(control.labels)
    if document.keys() <= {*RELEASED}:
        document |= {"format": FORMAT, "mask": Mask.NONE.to_json()}
    else:
        document["format"] = EXTENDED
    return msgspec.json.encode(document, order="deterministic")


def decode(data: bytes, users_of: UsersOf, erased_of: ErasedOf) -> Control:
    """Decodes the control that `encode` wrote; fields of later releases are ignored.

    Raises:
        ValueError: This release does not read its format, a field is missing or has another type, or a file is missing.
    """
    try:
        document = upgraded(documents.decode(data, dict[str, Any]))
        erased = document.pop("erased", None)
        control = documents.convert(document, Control, dec_hook=lambda kind, users: users_of(users["sha256"]))
        return control if erased is None else changed(control, erased=erased_of(erased["sha256"]))
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise ValueError(f"no control: {error}") from error


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """Converts a document of any format to the fields of `Control`; the single mask of format 1 is split into entries.

    Raises:
        ValueError: This release does not read its format.
    """
    if document.get("format") not in (FORMAT, EXTENDED):
        raise ValueError(f"control of format {document.get('format')!r}; this release reads {FORMAT} and {EXTENDED}")
    if document["format"] == FORMAT:
        mask = Mask.from_json(document["mask"])
        masks = tuple(entries(mask))
        return document | {"masks": masks, "mask_generation": mask.generation, "last_mask": len(masks)}
    if "then_follow" in document:
        document["serving"]["then_follow"] = document["then_follow"]
    if "log" in document:
        document["log"] = from_json(document["log"])
    if "labels" in document:
        document["labels"] = tuple(sorted(document["labels"].items()))
    return document


def _file_of(users: MaskedUsers) -> dict[str, Any]:
    return {"sha256": users.digest, "count": len(users)}


class Decision(TypedDict):
    """The keyword arguments of all transitions: the actor, the reason, and the wall clock time of the decision."""

    actor: str
    reason: str
    now_ms: int


def start(*, actor: str, reason: str, now_ms: int) -> Control:
    """Generation 1: train from scratch, serve the newest version."""
    return Control(1, now_ms, actor, reason, "start", epoch=1)


def pin(control: Control, version: int, **decision: Unpack[Decision]) -> Control:
    """Pins serving to `version`; training continues. Returns the same control if nothing changes.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> pinned = pin(first, 7, actor="ann", reason="odd answers", now_ms=5)
    >>> pinned.generation, pinned.serving.version, pinned.epoch
    (2, 7, 1)
    >>> pin(pinned, 7, actor="bob", reason="again", now_ms=6) is pinned
    True
    """
    return _next(control, "pin", decision, serving=ServingChoice("pin", version))


def follow(control: Control, **decision: Unpack[Decision]) -> Control:
    """Makes serving follow the newest version of the epoch. Returns the same control if nothing changes."""
    return _next(control, "follow", decision, serving=ServingChoice())


def roll_back(
    control: Control,
    to: int,
    mask: Mask,
    *,
    log: LogLine | None = None,
    then_follow: bool = False,
    **decision: Unpack[Decision],
) -> Control:
    """Rolls the whole system back: serving is pinned to version `to`, and a new epoch trains from it.

    Masks in force stay in force, so that a second rollback does not restore poisoned events. If the epoch already
    started from `to`, with nothing new to mask and no mask lifted, only the pin may change: the trainer does not repeat
    its work. An exact rollback rewrites the log under all masks, so `to` must be older than all masked events.

    Args:
        control: The control to start from.
        to: The version to roll back to.
        mask: The events to leave out from now on, in addition to the masks in force.
        log: The log branch that starts at `to`, for an exact rollback; None for a fast one, which stays on its branch.
        then_follow: Whether serving follows again once the trainer has caught up.
        **decision: See `Decision`.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = roll_back(first, 40, Mask.NONE, actor="ann", reason="poison", now_ms=9)
    >>> back.epoch, back.base, back.serving.version
    (2, 40, 40)
    """
    generation = control.generation + 1
    new = added(control.masks, mask, control.last_mask, generation)
    serving = ServingChoice("pin", to, then_follow)
    masks = (*control.masks, *new)
    same = control.action != "start" and not control.upgraded
    is_repeated = same and control.base == to and not new and not control.lifted
    if is_repeated and (log is None or control.mode == "exact"):
        return _next(control, "rollback", decision, serving=serving)
    return _next(
        control,
        "rollback",
        decision,
        serving=serving,
        epoch=control.epoch + 1,
        base=to,
        masks=masks if log is None else tuple(changed(entry, excluded=True) for entry in masks),
        lifted=(),
        mask_generation=generation if new else control.mask_generation,
        last_mask=control.last_mask + len(new),
        mode="fast" if log is None else "exact",
        log=control.log if log is None else log,
        upgraded=False,
        held=None,
    )


def recover(control: Control, to: int, **decision: Unpack[Decision]) -> Control:
    """Rewinds the trainer to `to`, the newest that it can continue from; serving choice and masks stay.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> back = recover(first, 40, actor="trainer", reason="the training log ends before version 41", now_ms=9)
    >>> back.epoch, back.base, back.serving.mode
    (2, 40, 'follow')
    """
    changes: dict[str, Any] = {"epoch": control.epoch + 1, "base": to, "lifted": (), "mode": "fast", "upgraded": False}
    return _next(control, "recover", decision, **changes, held=None)


def take_over(control: Control, **decision: Unpack[Decision]) -> Control:
    """Records that a standby trainer took over; a former trainer that still runs cannot create this generation then."""
    return following(control, "take over", **decision)


def unmask(control: Control, numbers: Collection[int], **decision: Unpack[Decision]) -> Control:
    """Lifts masks. Returns the same control if all were lifted already.

    This does not learn events that were left out meanwhile; only an exact rollback restores them.

    Raises:
        UnfitMask: One of the numbers was never assigned.
    """
    unknown = [number for number in numbers if not 1 <= number <= control.last_mask]
    if unknown:
        known = ", ".join(str(mask.id) for mask in control.masks) or "none is set"
        raise UnfitMask(f"there is no mask {unknown[0]}", f"use one of `springtide masks`: {known}")
    generation = control.generation + 1
    lifted = tuple(changed(mask, lifted=generation) for mask in control.masks if mask.id in numbers)
    if not lifted:
        return control
    return _next(
        control,
        "unmask",
        decision,
        masks=tuple(mask for mask in control.masks if mask.id not in numbers),
        lifted=(*control.lifted, *lifted),
        mask_generation=generation,
    )


def publish(control: Control, publishing: bool, **decision: Unpack[Decision]) -> Control:
    """Lets the trainer publish versions, or hold them while it trains. Returns the same control if nothing changes."""
    return _next(control, "release" if publishing else "hold", decision, publishing=publishing)


def train(control: Control, training: bool, **decision: Unpack[Decision]) -> Control:
    """Lets the trainer consume records, or pauses it. Returns the same control if nothing changes."""
    return _next(control, "resume" if training else "pause", decision, training=training)


def hold(control: Control, held: HeldUpdate, **decision: Unpack[Decision]) -> Control:
    """Pauses training, and pins serving, if it followed, to the version before the suspect window.

    Returns the same control if an update is held already, or if an operator released this one before.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> held = HeldUpdate("user", "share of one user", 30.0, 1.0, 7, 40, 90, 0, 9000)
    >>> stopped = hold(first, held, actor="guard", reason="a flood", now_ms=5)
    >>> stopped.action, stopped.serving.version, stopped.held == held
    ('hold', 7, True)
    >>> resumed = release(stopped, actor="ann", reason="a sale", now_ms=6)
    >>> resumed.action, resumed.serving.mode, resumed.held, resumed.released
    ('release', 'follow', None, (90,))
    >>> hold(resumed, held, actor="guard", reason="a flood", now_ms=7) is resumed
    True
    """
    if control.held is not None or held.next in control.released:
        return control
    follows = control.serving.mode == "follow" and held.version > 0
    changes: dict[str, Any] = {"held": replace(held, followed=follows)}
    if follows:
        changes["serving"] = ServingChoice("pin", held.version)
    return following(control, "hold", **decision, **changes)


def release(
    control: Control, *, action: Literal["release", "resume"] = "release", **decision: Unpack[Decision]
) -> Control:
    """Lets training continue with the held update, and remembers it as good. No change if nothing is held.

    Serving follows again if it followed before and no operator chose another version meanwhile.
    """
    held = control.held
    if held is None:
        return control
    changes: dict[str, Any] = {"held": None, "released": (*control.released, held.next)[-MOST_RELEASED:]}
    changes["publishing" if action == "release" else "training"] = True
    if held.followed and control.serving == ServingChoice("pin", held.version):
        changes["serving"] = ServingChoice()
    return following(control, action, **decision, **changes)


def label(control: Control, name: str, version: int | None, **decision: Unpack[Decision]) -> Control:
    """Assigns a label to a version, or removes the label if `version` is None.

    Returns the same control if nothing changes.

    Raises:
        UnfitVersion: The label is malformed, or there would be too many.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> named = label(first, "canary", 7, actor="ann", reason="try it", now_ms=5)
    >>> named.generation, named.labels
    (2, (('canary', 7),))
    >>> label(named, "canary", 7, actor="bob", reason="again", now_ms=6) is named
    True
    >>> label(named, "canary", None, actor="ann", reason="done", now_ms=7).labels
    ()
    """
    if not LABEL_FORM.fullmatch(name):
        raise UnfitVersion(
            f"{name[:100]!r} is no label", "use up to 32 of a-z, 0-9, - and _, a letter first, such as stable or canary"
        )
    labels = {known: number for known, number in control.labels if known != name}
    if version is not None:
        labels[name] = version
    if len(labels) > MOST_LABELS:
        raise UnfitVersion(
            f"there are {MOST_LABELS} labels already", "remove one with `springtide label NAME --remove`"
        )
    if dict(control.labels) == labels:
        return control
    return following(control, "label", **decision, labels=tuple(sorted(labels.items())))


def named(control: Control) -> frozenset[int]:
    """The versions that control names: the epoch's base, the pinned one, labelled ones. They are kept at any age."""
    versions = {control.base, control.serving.version, *(version for _, version in control.labels)}
    return frozenset(version for version in versions if version is not None)


def erase(
    control: Control, users: MaskedUsers, until: Iterable[tuple[int, int, int]], **decision: Unpack[Decision]
) -> Control:
    """Erases users: their clicks before `until`, and all data that is stored about them.

    Erasing the same users again erases their clicks since the last erasure.

    Args:
        control: The control to start from.
        users: Their pseudonyms.
        until: (topic word, partition, next offset) of each source of clicks.
        **decision: See `Decision`.

    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> gone = erase(first, MaskedUsers.of([7]), [(42, 0, 100)], actor="ann", reason="asked to", now_ms=9)
    >>> gone.generation, gone.mask_generation, gone.erased.last, bool(gone.mask)
    (2, 2, 1, True)
    """
    generation = control.generation + 1
    erased = control.erased.and_also(users, until, generation, decision["now_ms"])
    return following(control, "erase", **decision, mask_generation=generation, erased=erased)


def restored(control: Control, **decision: Unpack[Decision]) -> Control:
    """Records that a full backup was restored: a generation that changes nothing else."""
    return following(control, "restore", **decision)


def restored_without_log(control: Control, version: int | None, lost: int, **decision: Unpack[Decision]) -> Control:
    """Records that a backup was restored without its log: a new epoch continues from `version` on the new log.

    `version` is None if there was none yet. `lost` is the number of clicks between the version and the histories.
    """
    after = restored(control, **decision)
    plan = {"log": "anew", "lost": lost}
    return changed(after, epoch=after.epoch + 1, base=version, lifted=(), mode="fast", log=WHOLE, plan=plan)


def _next(control: Control, action: str, decision: Decision, **changes: Any) -> Control:
    """The next generation with these changes; `control` itself if they change nothing."""
    if all(getattr(control, name) == value for name, value in changes.items()):
        return control
    return following(control, action, **decision, **changes)


def following(control: Control, action: str, actor: str, reason: str, now_ms: int, **changes: Any) -> Control:
    """The next generation with these changes. Its plan is None unless `changes` has one."""
    decided: dict[str, Any] = {
        "created_at_ms": now_ms,
        "actor": actor,
        "reason": reason,
        "action": action,
        "plan": None,
    }
    return changed(control, generation=control.generation + 1, **decided | changes)
