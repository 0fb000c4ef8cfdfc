"""Removes erased users from a version's tensors: rows, pending counts, crosses, churn examples, and removed ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.features.masked_users import MaskedUsers
from state.ranking.crosses import Crosses
from state.rows.tables import tables_in
from trainer.versions.content import PENDING, ROWS, Array, Tensors

U64 = npt.NDArray[np.uint64]
CROSS, CROSSED = "cross", ("item", "category", "context")
OTHERS = frozenset({*CROSSED, "transition"})
"""Tables without rows of users. In a ranker's own tables only users' ids match, since 64-bit hashes do not collide."""
WAITING, NO_ROWS = "state.churn.waiting.", "state.churn.waiting.counts"


class CrossedIds:
    """The items, categories and context values of versions, which may occur in a cross with a user."""

    def __init__(self, crosses: Crosses) -> None:
        self._crosses = crosses
        self._ids = {table: np.empty(0, np.uint64) for table in CROSSED}

    def see(self, tensors: Tensors) -> CrossedIds:
        """Adds the ids of some tensors; returns itself."""
        for table, known in self._ids.items():
            if f"{table}.ids" in tensors:
                parts = [tensors[f"{table}.{field}"] for field in ("ids", PENDING[0])]
                self._ids[table] = np.union1d(known, np.concatenate(parts))
        return self

    def crosses_of(self, users: MaskedUsers, tensors: Tensors) -> U64:
        """The crosses of users that occur in tensors."""
        held = np.concatenate([tensors[f"{CROSS}.{field}"] for field in ("ids", "removed", PENDING[0])])
        found = [np.empty(0, np.uint64)]
        for user in users if len(held) else ():
            made = self._crosses.of_user(user, *(self._ids[table] for table in CROSSED))
            found.append(made[np.isin(made, held)])
        return np.concatenate(found)


def without(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> dict[str, Array]:
    """Removes users from the tensors of a base, or of a delta from before their erasure. `known` must have seen these tensors."""
    found = dict(tensors)
    for table, gone in _named(tensors, users, known):
        keep = ~np.isin(tensors[f"{table}.ids"], gone)
        found |= {f"{table}.{field}": tensors[f"{table}.{field}"][keep] for field in ("ids", *ROWS)}
        removed = tensors[f"{table}.removed"]
        found[f"{table}.removed"] = removed[~np.isin(removed, gone)]
        waits = ~np.isin(tensors[f"{table}.{PENDING[0]}"], gone)
        found |= {f"{table}.{field}": tensors[f"{table}.{field}"][waits] for field in PENDING}
    return found | _without_waiting(found, users)


def without_tombstones(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> dict[str, Array]:
    """Removes the entries that list users as removed, from the delta that erased them. Rows are of users who came back.

    Use it only once no earlier version has their rows; `known` must have seen those versions.
    """
    found = dict(tensors)
    for table, gone in _named(tensors, users, known):
        removed = tensors[f"{table}.removed"]
        found[f"{table}.removed"] = removed[~np.isin(removed, gone)]
        ended = np.isin(tensors[f"{table}.{PENDING[0]}"], gone) & (tensors[f"{table}.{PENDING[1]}"] == 0)
        found |= {f"{table}.{field}": tensors[f"{table}.{field}"][~ended] for field in PENDING}
    return found


def _without_waiting(tensors: Tensors, users: MaskedUsers) -> dict[str, Array]:
    """The churn examples that wait for their label (`trainer/churn/learning.py`), without users; may be empty."""
    if f"{WAITING}user" not in tensors:
        return {}
    keep = ~users.has(tensors[f"{WAITING}user"])
    return {name: one[keep] for name, one in tensors.items() if name.startswith(WAITING) and name != NO_ROWS}


def _named(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> list[tuple[str, U64]]:
    """By table, the ids in it that may belong to users or to their crosses."""
    found: list[tuple[str, U64]] = []
    for table in tables_in(tensors) if users else ():
        if table not in OTHERS and f"{table}.ids" in tensors:
            found.append((table, known.crosses_of(users, tensors) if table == CROSS else users.ids))
    return found
