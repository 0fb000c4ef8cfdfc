"""Applies control's erasures between two records: removes the users' rows and crosses, and records the offset.

From that offset on, the mask excludes these users' rows of the training log. A
version records which erasures it has applied and at which offsets, so that a
replay applies them at the same offsets. After a rollback to a version, later
erasures are applied before a record is read.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from state.registry.control import Control
from trainer.engine.build import EMBEDDINGS
from trainer.engine.engine import CROSS
from trainer.engine.step import Trainer
from trainer.place import TrainingPlace
from trainer.tables.index import U64

REMEMBERED = 32
"""The most erasures of an epoch that a version records with their offsets."""

logger = logging.getLogger(__name__)


def take_up(trainer: Trainer, place: TrainingPlace, control: Control) -> TrainingPlace:
    """Forgets the users of new erasures. Returns the new place, marked as changed so that a version records it."""
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
    """Removes all data of users (`[n]` uint64): own rows, rows of a ranker's user tables, crosses, churn examples.

    Returns:
        The number of removed rows and examples.
    """
    tables, crosses = trainer.tables, trainer.crosses
    known = {name: tables[name].known() for name in ("item", "category", "context")}
    # Every known user has the cross of the user alone. Without it there are no other crosses of that user.
    alone = [crosses.of_user(user, *(known["item"][:0],) * 3) for user in users.tolist()]
    theirs = [
        crosses.of_user(user, known["item"], known["category"], known["context"])
        for user, first in zip(users.tolist(), alone, strict=True)
        if tables[CROSS].has(first)
    ]
    gone = tables[CROSS].forget(np.concatenate([np.empty(0, np.uint64), *theirs]))
    # User ids occur in no other table's ids: 64-bit hashes do not collide.
    named = [name for name in tables if name == "user" or name not in (*EMBEDDINGS, CROSS, trainer.transitions.name)]
    waiting = 0 if trainer.churn is None else trainer.churn.forget(users)
    return gone + waiting + sum(tables[name].forget(users) for name in named)
