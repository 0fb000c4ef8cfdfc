"""The transition of control by which users are forgotten. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from state.features.masked_users import MaskedUsers
from state.registry.control import Control


def erase(
    control: Control,
    users: MaskedUsers,
    until: Iterable[tuple[int, int, int]],
    *,
    actor: str,
    reason: str,
    now_ms: int,
) -> Control:
    """Users are forgotten: their clicks before `until`, and all that is kept of them.

    Asked again it forgets what they have clicked since.

    Args:
        control: The control to start from.
        users: Their pseudonyms.
        until: (topic word, partition, next offset) of each source of clicks.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> gone = erase(first, MaskedUsers.of([7]), [(42, 0, 100)], actor="ann", reason="asked to", now_ms=9)
    >>> gone.generation, gone.mask_generation, gone.erased.last, bool(gone.mask)
    (2, 2, 1, True)
    """
    generation = control.generation + 1
    erased = control.erased.and_also(users, until, generation, now_ms)
    return replace(
        control,
        generation=generation,
        created_at_ms=now_ms,
        actor=actor,
        reason=reason,
        action="erase",
        plan=None,
        mask_generation=generation,
        erased=erased,
    )
