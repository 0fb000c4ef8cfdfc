"""The content of a version's files: tensors by name, how they are encoded, merged, and cleared of erased users.

    serving.safetensors    <table>.ids, .rows, .removed; dense.<name>; popular; probe.<output>, see `state/probe.py`
                           churn.<name>, see `state/churn.py`; only if churn is learned
    training.safetensors   <table>.accum, .last_seen_ms, .pending_ids, .pending_counts, .pending_seen_ms;
                           slots.<name> of the dense optimizer; state.<name>: counters, guard, metrics, churn;
                           guard.<name>: the windows by which updates are judged, see `trainer/guard`;
                           quality.<name>: metrics that affect nothing, which 0.1.0 did not have

A delta lists the rows that changed and the ids that were removed, and contains everything else completely. Durable
versions are compressed (`state/registry/tensor_files.py`). A recent version has the first file only, uncompressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from state.churn import PREFIX as CHURN
from state.features.erased import MaskedUsers
from state.probe import PREFIX
from state.ranking.crosses import Crosses
from state.registry import tensor_files
from state.registry.registry import SERVING, TRAINING
from state.rows.tables import INTEREST_SCORE, ITEM_SCORE, UNSERVED, tables_in
from state.rows.tables import TABLES as TABLES

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

ROWS = ("rows", "accum", "last_seen_ms")
PENDING = ("pending_ids", "pending_counts", "pending_seen_ms")
COLUMNS = ("ids", "removed", *ROWS, *PENDING)
SERVED = ("ids", "rows", "removed")
QUALITY = "quality."
"""Prefix of tensors of metrics."""
GUARDED = "guard."
"""Prefix of the windows by which updates are judged."""
SCORES = (ITEM_SCORE, INTEREST_SCORE)
ADDED = ("clicked.", "followed.", "visited.", "next_category.", *(f"state.{name}" for name in SCORES), *SCORES)
"""Prefixes of the item lists and the scores by them, which 0.1.0 lacks. Nothing else is learned from them."""
BESIDE = (QUALITY, GUARDED)
"""Tensors that do not affect what is learned. Digests omit them, because a release without them learns the same."""

_FOLD_ROWS = 1_000_000


def encode(tensors: Tensors) -> dict[str, bytes]:
    """The files of a durable version; equal tensors give equal bytes."""
    files: dict[str, dict[str, Array]] = {SERVING: {}, TRAINING: {}}
    tables = [table for table in tables_in(tensors) if table not in UNSERVED]
    served = {f"{table}.{name}" for table in tables for name in SERVED} | {"popular"}
    for name, tensor in tensors.items():
        file = SERVING if name in served or name.startswith(("dense.", PREFIX, CHURN, *SCORES)) else TRAINING
        files[file][name] = tensor
    return {name: tensor_files.pack(tensors_of_file) for name, tensors_of_file in files.items()}


def encode_served(tensors: Tensors) -> dict[str, bytes]:
    """The file of a recent version, of the tensors that serving needs."""
    return {SERVING: tensor_files.save(tensors)}


def decode(files: Iterable[bytes]) -> dict[str, Array]:
    """The tensors in the files of a version."""
    return {name: tensor for data in files for name, tensor in tensor_files.unpack(data).items()}


def digest(tensors: Tensors) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes in the order of the names, without BESIDE and empty item lists."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.startswith(BESIDE) or (name.startswith(ADDED) and tensor.size == 0):
            continue
        sha.update(f"{name} {tensor.dtype.str} {tensor.shape} ".encode())
        sha.update(tensor.tobytes())
    return sha.hexdigest()


def merge(parts: Iterable[Tensors], full: bool = True) -> dict[str, Array]:
    """Merges the tensors of versions, the oldest first.

    Args:
        parts: A base and deltas; or, for a delta over several versions, only deltas.
        full: Whether the result is a full state, which does not list removed ids. Otherwise they stay listed.

    Returns:
        The newest row of each id, ordered by id; bit-equal to the state of a trainer
        that did the same steps.
    """
    # Merging deltas in between bounds memory; a large base is copied once.
    iterator = iter(parts)
    first = next(iterator)
    later: list[Tensors] = []
    rows = 0
    for part in iterator:
        later.append(part)
        rows += sum(len(part.get(f"{table}.ids", ())) for table in tables_in(part))
        if rows > _FOLD_ROWS:
            later, rows = [_merged(later, full=False)], 0
    return _merged([first, *later], full)


def _merged(parts: Sequence[Tensors], full: bool) -> dict[str, Array]:
    tables = tables_in({name for part in parts for name in part})
    tabled = {f"{table}.{name}" for table in tables for name in COLUMNS}
    # 1. Tensors that each version contains completely.
    merged = {name: tensor for name, tensor in parts[-1].items() if name not in tabled}
    for table in tables:
        # A release without this table wrote nothing of it, which equals an empty one. Rows of another width are of a
        # release in which rows had another meaning: a trainer that continued from there used none of them.
        present = [part for part in parts if f"{table}.ids" in part]
        present = [
            part for part in present if part[f"{table}.rows"].shape[1:] == present[-1][f"{table}.rows"].shape[1:]
        ]
        if not present:
            continue
        # 2. Rows: the last entry of an id counts, be it a row or its removal.
        ids = [part[f"{table}.{name}"] for part in present for name in ("removed", "ids")]
        is_removal = [
            np.full(len(part[f"{table}.{name}"]), name == "removed") for part in present for name in ("removed", "ids")
        ]
        last = _last_of_each(np.concatenate(ids))
        all_ids, all_removed = np.concatenate(ids), np.concatenate(is_removal)
        live = last[~all_removed[last]]
        merged[f"{table}.ids"] = all_ids[live]
        merged[f"{table}.removed"] = np.zeros(0, np.uint64) if full else all_ids[last[all_removed[last]]]
        row_of = np.cumsum(~all_removed) - 1
        for name in ROWS:
            merged[f"{table}.{name}"] = np.concatenate([part[f"{table}.{name}"] for part in present])[row_of[live]]
        # 3. Occurrences of ids without a row; a count of 0 removes one.
        columns = [np.concatenate([part[f"{table}.{name}"] for part in present]) for name in PENDING]
        last = _last_of_each(columns[0])
        if full:
            last = last[columns[1][last] != 0]
        merged |= {f"{table}.{name}": column[last] for name, column in zip(PENDING, columns, strict=True)}
    return merged


def _last_of_each(ids: Array) -> npt.NDArray[np.int64]:
    """The index of the last occurrence of each id, in the order of the ids.

    >>> _last_of_each(np.array([5, 3, 5, 4], np.uint64)).tolist()
    [1, 3, 2]
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    ends = np.ones(len(ids), np.bool_)
    ends[:-1] = ordered[1:] != ordered[:-1]
    return order[ends].astype(np.int64)


U64 = npt.NDArray[np.uint64]
CROSS, CROSSED = "cross", ("item", "category", "context")
OTHERS = frozenset({*CROSSED, "transition", "clicked", "followed", "next_category"})
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
        ids = np.concatenate([tensors[f"{CROSS}.{field}"] for field in ("ids", "removed", PENDING[0])])
        crosses = [np.empty(0, np.uint64)]
        for user in users if len(ids) else ():
            crosses_of_user = self._crosses.of_user(user, *(self._ids[table] for table in CROSSED))
            crosses.append(crosses_of_user[np.isin(crosses_of_user, ids)])
        return np.concatenate(crosses)


def without(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> dict[str, Array]:
    """Removes users from the tensors of a base, or of a delta from before their erasure. `known` must have seen these tensors."""
    remaining = dict(tensors)
    for table, removing in _named(tensors, users, known):
        keep = ~np.isin(tensors[f"{table}.ids"], removing)
        remaining |= {f"{table}.{field}": tensors[f"{table}.{field}"][keep] for field in ("ids", *ROWS)}
        removed = tensors[f"{table}.removed"]
        remaining[f"{table}.removed"] = removed[~np.isin(removed, removing)]
        waits = ~np.isin(tensors[f"{table}.{PENDING[0]}"], removing)
        remaining |= {f"{table}.{field}": tensors[f"{table}.{field}"][waits] for field in PENDING}
    return remaining | _without_waiting(remaining, users)


def without_tombstones(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> dict[str, Array]:
    """Removes the entries that list users as removed, from the delta that erased them. Rows are of users who came back.

    Use it only once no earlier version has their rows; `known` must have seen those versions.
    """
    remaining = dict(tensors)
    for table, removing in _named(tensors, users, known):
        removed = tensors[f"{table}.removed"]
        remaining[f"{table}.removed"] = removed[~np.isin(removed, removing)]
        ended = np.isin(tensors[f"{table}.{PENDING[0]}"], removing) & (tensors[f"{table}.{PENDING[1]}"] == 0)
        remaining |= {f"{table}.{field}": tensors[f"{table}.{field}"][~ended] for field in PENDING}
    return remaining


def _without_waiting(tensors: Tensors, users: MaskedUsers) -> dict[str, Array]:
    """The churn examples that wait for their label (`trainer/churn.py`), without users; may be empty."""
    if f"{WAITING}user" not in tensors:
        return {}
    keep = ~users.has(tensors[f"{WAITING}user"])
    return {name: tensor[keep] for name, tensor in tensors.items() if name.startswith(WAITING) and name != NO_ROWS}


def _named(tensors: Tensors, users: MaskedUsers, known: CrossedIds) -> list[tuple[str, U64]]:
    named: list[tuple[str, U64]] = []
    for table in tables_in(tensors) if users else ():
        if table not in OTHERS and f"{table}.ids" in tensors:
            named.append((table, known.crosses_of(users, tensors) if table == CROSS else users.ids))
    return named
