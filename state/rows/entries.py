"""What a version writes: its rows as entries of the store, its dense weights, and how the beginning of one is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from state.churn.weights import PREFIX as CHURN
from state.churn.weights import STORED
from state.rows.keys import TOP, row_keys, stem, u64
from state.rows.reader import Databases, required, stored
from state.rows.tables import CODES, tables_in

BEGUN = b"begun"
"""In `meta`: version u64, lane u64, and u64[2, k] (table, id) of a version whose rows are written in several transactions."""


class Entries(NamedTuple):
    """The rows of one version.

    Attributes:
        pairs: Key and value of each, those of a table in the order of their keys.
        changes: `[2, k]` uint64, table and id of each.
        dims: By table the width of its rows, of tables that have some.
    """

    pairs: list[tuple[bytes, bytes]]
    changes: NDArray[np.uint64]
    dims: dict[str, int]


def entries_of(tensors: Mapping[str, NDArray[Any]], lane: int, version: int) -> Entries:
    """The entries of a version's rows, and empty ones of those that it removed.

    Args:
        tensors: `<table>.ids` `[k]` uint64, `<table>.rows` `[k, dim]` float32, `<table>.removed` `[r]` uint64.
        lane: Where they go.
        version: That wrote them.
    """
    pairs, dims = list[tuple[bytes, bytes]](), dict[str, int]()
    changes = [np.empty((2, 0), np.uint64)]
    for name in tables_in(tensors):
        ids = np.asarray(tensors.get(f"{name}.ids", ()), np.uint64)
        removed = np.asarray(tensors.get(f"{name}.removed", ()), np.uint64)
        values: list[bytes] = []
        if len(ids):
            rows = np.ascontiguousarray(tensors[f"{name}.rows"], "<f4")
            dims[name] = rows.shape[1]
            order = np.argsort(ids, kind="stable")
            ids, values = ids[order], pieces(rows[order].tobytes(), 4 * rows.shape[1])
        every = np.concatenate((ids, removed))
        keys = row_keys(lane, CODES[name], every, version)
        pairs += zip(pieces(keys.tobytes(), keys.shape[1]), [*values, *[b""] * len(removed)], strict=True)
        changes.append(np.stack((np.full(len(every), CODES[name], np.uint64), every)))
    return Entries(pairs, np.concatenate(changes, axis=1), dims)


def pieces(text: bytes, size: int) -> list[bytes]:
    """`text` in pieces of `size` bytes.

    >>> pieces(b"abcdef", 2)
    [b'ab', b'cd', b'ef']
    """
    return [text[at : at + size] for at in range(0, len(text), size)]


def begin(
    transaction: lmdb.Transaction, databases: Databases, version: int, lane: int, changes: NDArray[np.uint64]
) -> None:
    """Notes that a version's rows are being written, before the first of them is."""
    transaction.put(BEGUN, u64(version) + u64(lane) + changes.tobytes(), db=databases["meta"])


def take_back(transaction: lmdb.Transaction, databases: Databases) -> None:
    """Deletes the rows of a version that was begun and is not here: the process, or the room, ended in between."""
    begun = stored(transaction, BEGUN, databases["meta"])
    if begun is None:
        return
    version, lane = begun[:8], int.from_bytes(begun[8:16], "big")
    if transaction.get(version, db=databases["versions"]) is None:
        tail = u64(TOP - int.from_bytes(version, "big"))
        for table, identity in np.frombuffer(begun[16:], np.uint64).reshape(2, -1).T.tolist():
            transaction.delete(stem(lane, table, identity) + tail, db=databases["rows"])
    transaction.delete(BEGUN, db=databases["meta"])


def put_dense(
    transaction: lmdb.Transaction,
    databases: Databases,
    version: int,
    tensors: Mapping[str, NDArray[Any]],
    parent: int | None,
) -> None:
    """Writes a version's dense weights and popular categories; what it does not have is its parent's.

    What it tells of churn stands beside its dense weights.
    """
    dense = {name[6:]: np.ascontiguousarray(value) for name, value in tensors.items() if name.startswith("dense.")}
    dense |= {f"{STORED}{name}": value for name, value in tensors.items() if name.startswith(CHURN)}
    popular = tensors.get("popular")
    if parent is not None:
        # Those of a model that an upgrade left do not stay among the ones that are given.
        dense = dense or load_tensors(required(transaction, parent, databases["dense"]))
        if popular is None:
            popular = np.frombuffer(required(transaction, parent, databases["popular"]), "<u8")
    transaction.put(u64(version), save_tensors(dense), db=databases["dense"])
    listed = np.asarray(() if popular is None else popular, "<u8")
    transaction.put(u64(version), listed.tobytes(), db=databases["popular"])
