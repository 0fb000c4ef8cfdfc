"""The masks of control, each with a number by which it is listed and lifted. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import msgspec
from msgspec.structs import replace as changed

from state.features.mask import Mask
from state.features.masked_users import MaskedUsers

Place = tuple[int, int, int, int]


class MaskEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One mask, from one option of a rollback: a range of offsets, a time span, or users.

    Attributes:
        id: Its number; numbers are never reused.
        generation: Generation of the control that set it.
        offsets: (topic word, partition, first, next), or None.
        times: (from, to) of event time in milliseconds, or None.
        users: Pseudonyms; empty for a mask of offsets or times.
        lifted: The generation that lifted it; 0 while it is in force.
        excluded: Whether the training log has none of its events, because an exact rollback rewrote the log under it.
    """

    id: int
    generation: int
    offsets: Place | None = None
    times: tuple[int, int] | None = None
    users: MaskedUsers = MaskedUsers.NOBODY
    lifted: int = 0
    excluded: bool = False

    @property
    def mask(self) -> Mask:
        """This entry alone, as a mask."""
        return joined((self,), self.generation)


def entries(mask: Mask) -> list[MaskEntry]:
    """Splits a mask into entries, numbered from 1.

    >>> [one.id for one in entries(Mask(3, times=((0, 9), (20, 30)), users=MaskedUsers.of([7])))]
    [1, 2, 3]
    """
    parts: list[MaskEntry] = [MaskEntry(0, mask.generation, offsets=part) for part in sorted(set(mask.offsets))]
    parts += [MaskEntry(0, mask.generation, times=part) for part in sorted(set(mask.times))]
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
    known = {(one.offsets, one.times) for one in held}
    users = reduce(lambda all_users, one: all_users | one.users, held, MaskedUsers.NOBODY)
    new: list[MaskEntry] = []
    for part in entries(mask):
        if part.users:
            fresh = part.users.ids[~users.has(part.users.ids)]
            if not len(fresh):
                continue
            part = changed(part, users=part.users if len(fresh) == len(part.users) else MaskedUsers(fresh))
        elif (part.offsets, part.times) in known:
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
        tuple(sorted(one.offsets for one in held if one.offsets is not None)),
        tuple(sorted(one.times for one in held if one.times is not None)),
        reduce(lambda users, one: users | one.users, held, MaskedUsers.NOBODY),
    )
