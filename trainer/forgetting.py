"""Takes erasures of control into account between two records: the users' rows and crosses go, and the place remembers where.

From that place on the rows of the training log that are theirs are left out,
by the mask. A version says which erasures it has taken into account, and where
in the log, so that a replay does it there too; one that is gone back to takes
those that came later into account before it reads a record.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from state.registry.control import Control
from trainer.engine.engine import CROSS
from trainer.engine.own_tables import EMBEDDINGS
from trainer.engine.step import Trainer
from trainer.place import TrainingPlace
from trainer.tables.index import U64

REMEMBERED = 32
"""Erasures of an epoch that a version names with their places."""

logger = logging.getLogger(__name__)


def take_up(trainer: Trainer, place: TrainingPlace, control: Control) -> TrainingPlace:
    """Forgets the users of erasures that are new; returns the place afterwards, changed so that a version tells it."""
    new = control.erased.after(place.erased)
    if not new:
        return place
    rows = forget(trainer, new.users.ids)
    logger.info(
        "erasure %d: %d users are forgotten, %d rows of theirs at offset %d", new.last, len(new.users), rows, place.next
    )
    erasures = (*place.erasures, (new.last, place.next))[-REMEMBERED:]
    return replace(place, erased=new.last, erasures=erasures).stepped()


def forget(trainer: Trainer, users: U64) -> int:
    """Removes all rows of users (`[n]` uint64): their own, those of a ranker's tables of users, their crosses, those that wait.

    Returns:
        How many.
    """
    tables, crosses = trainer.tables, trainer.crosses
    known = {name: tables[name].known() for name in ("item", "category", "context")}
    # Who has no cross of the user alone has none with anything.
    alone = [crosses.of_user(user, *(known["item"][:0],) * 3) for user in users.tolist()]
    theirs = [
        crosses.of_user(user, known["item"], known["category"], known["context"])
        for user, first in zip(users.tolist(), alone, strict=True)
        if tables[CROSS].has(first)
    ]
    gone = tables[CROSS].forget(np.concatenate([np.empty(0, np.uint64), *theirs]))
    # No id of anything else is a user's: 64 bits do not collide.
    named = [name for name in tables if name == "user" or name not in (*EMBEDDINGS, CROSS, trainer.transitions.name)]
    waiting = 0 if trainer.churn is None else trainer.churn.forget(users)
    return gone + waiting + sum(tables[name].forget(users) for name in named)
