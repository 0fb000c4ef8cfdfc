"""Builds the model program's inputs for a batch of queries, from the host's data and the version's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving import crosses
from deploy.serving.answer import Query
from deploy.serving.known_attributes import AttributeValues
from deploy.serving.loaded_version import LoadedVersion, VersionRows
from deploy.serving.program import batch_of
from state.features.arrays import Vector
from state.ranking.crosses import Crosses, Values

F32 = NDArray[np.float32]
Inputs = dict[str, F32]


class Asked(NamedTuple):
    """A query with the host's data about its user and item.

    Attributes:
        query: The query.
        user: The pseudonym; 0 if the version must treat the user as unknown.
        at_ms: The time at which the answer is evaluated.
        recent_categories: The user's categories, newest first, without padding.
        user_attributes: The user's attributes.
        item: The item's id; 0 if the query has no item.
        category: The item's category; 0 if unknown.
        item_attributes: The item's attributes.
        context: One id per context field; 0 if the field is not given.
        churn: The probability that the user churns; None if unknown.
    """

    query: Query
    user: int
    at_ms: int
    recent_categories: list[int]
    user_attributes: AttributeValues
    item: int
    category: int
    item_attributes: AttributeValues
    context: list[int]
    churn: float | None = None


def program_inputs(
    version: LoadedVersion, rows: VersionRows, asked: Sequence[Asked], vectors: Vector, columns: Crosses
) -> tuple[Inputs, list[bool]]:
    """Builds the inputs for all queries, except those for transitions between categories.

    Args:
        version: The loaded version.
        rows: The version's rows.
        asked: n queries.
        vectors: The windows of their users, n rows.
        columns: The columns of the crosses.

    Returns:
        The inputs by name, float32, padded with zeros to the program's batch size; and n flags, whether each user has
        a row.
    """
    shapes, count = version.program.shapes, batch_of(len(asked))
    inputs = {name: np.zeros((count, *shape[1:]), np.float32) for name, shape in shapes.items() if shape[0] < 0}
    if "popular_rows" in shapes:
        inputs["popular_rows"] = version.popular_rows
    for name, values in (("features", vectors.features), ("category_windows", vectors.category_windows)):
        if name in inputs:
            inputs[name][: len(asked)] = values
    _add_categories(inputs, version, rows, len(asked), vectors)
    has_row, with_sequence = [], vectors.sequence_actions.shape[1] > 0
    for place, one in enumerate(asked):
        row = rows.user(one.user)
        has_row.append(row is not None)
        if row is not None and "user_row" in inputs:
            inputs["user_row"][place] = row
        if with_sequence:
            _add_sequence(inputs, place, vectors, rows)
        if "context_row" in inputs:
            _add_context(inputs, place, one, rows)
    add_items(inputs, version, rows, asked, vectors, columns)
    return inputs, has_row


def add_items(
    inputs: Inputs,
    version: LoadedVersion,
    rows: VersionRows,
    asked: Sequence[Asked],
    vectors: Vector,
    columns: Crosses,
) -> None:
    """Adds the inputs for the item of each query that has one; see `program_inputs` for the arguments."""
    about = [place for place, one in enumerate(asked) if one.query.item is not None]
    if about and "item_row" in inputs:
        inputs["item_row"][about] = item_rows(rows, [asked[place] for place in about])
    named = [place for place, one in enumerate(asked) if one.category]
    if named and "category_row" in inputs:
        inputs["category_row"][named] = rows.categories([asked[place].category for place in named])
    if about and "cross" in inputs and version.cross_shares.size:
        pairs, features = [asked[place] for place in about], vectors.features[about]
        inputs["cross"][about] = cross_logits(version, rows, pairs, features, columns)


def item_rows(rows: VersionRows, asked: Sequence[Asked]) -> F32:
    """Returns the rows of n items plus the mean of each item's attribute rows, `[n, dim]` float32; 0 without rows."""
    found = rows.items([one.item for one in asked])
    if any(one.item_attributes.ids for one in asked):
        found = found.copy()
        for place, one in enumerate(asked):
            if ids := one.item_attributes.ids:
                found[place] += rows.context_sum(ids) / np.float32(len(ids))
    return found


def _add_categories(inputs: Inputs, version: LoadedVersion, rows: VersionRows, count: int, vectors: Vector) -> None:
    """Adds the users' own categories, and masks them out of the popular ones."""
    recent = vectors.recent_categories
    if "recent_rows" in inputs:
        # 0 is padding and has no row.
        inputs["recent_rows"][:count] = rows.categories(recent.reshape(-1).tolist()).reshape(*recent.shape, -1)
    inputs["recent_mask"][:count] = recent != 0
    own = (recent[:, :, None] == version.popular).any(1)
    inputs["popular_mask"][:count] = np.where(own, np.float32(0.0), version.popular_known)


def _add_sequence(inputs: Inputs, place: int, vectors: Vector, rows: VersionRows) -> None:
    """Adds the user's latest events, for a program that reads them."""
    vector = Vector(*[column[place] for column in vectors])
    known = int((vector.sequence_actions != 0).sum())
    if "sequence_item_rows" in inputs:
        for k, item in enumerate(vector.sequence_items[:known].tolist()):
            inputs["sequence_item_rows"][place, k] = rows.item(item)
    if "sequence_category_rows" in inputs:
        inputs["sequence_category_rows"][place, :known] = rows.categories(vector.sequence_categories[:known].tolist())
    for name in ("sequence_actions", "sequence_ages"):
        if name in inputs:
            inputs[name][place] = getattr(vector, name)
    if "sequence_mask" in inputs:
        inputs["sequence_mask"][place, :known] = 1.0


def _add_context(inputs: Inputs, place: int, one: Asked, rows: VersionRows) -> None:
    """Adds the mean of the rows of the context fields and the user's attributes."""
    given = [field for field in one.context if field]
    if given or one.user_attributes.ids:
        # As in training, a field that is not given counts as zeros.
        count = len(one.context) + len(one.user_attributes.ids)
        inputs["context_row"][place] = rows.context_sum([*given, *one.user_attributes.ids]) / np.float32(count)


def add_own_rows(
    inputs: Inputs,
    version: LoadedVersion,
    rows: VersionRows,
    asked: Sequence[Asked],
    vectors: Vector,
    successors: NDArray[np.uint64],
) -> None:
    """Adds rows of the ranker's custom tables, for a program that uses some.

    Args:
        inputs: Zeros, with at least one row per query.
        version: The loaded version.
        rows: The version's rows.
        asked: n queries.
        vectors: The windows of their users, n rows.
        successors: `[n, S]` uint64, padded with 0.
    """
    inputs |= version.own_popular
    own = [one for one in version.own if one.ids != "popular"]
    for place, question in enumerate(asked if own else ()):
        ids = _ids_of(question, Vector(*[column[place] for column in vectors]), successors[place])
        for one in own:
            if wanted := ids[one.ids]:
                found = rows.own(one.table, wanted, one.width)
                if one.averaged:
                    inputs[one.name][place] = found.sum(0) / np.float32(len(wanted))
                elif inputs[one.name].ndim == 2:
                    inputs[one.name][place] = found[0]
                else:
                    inputs[one.name][place, : len(wanted)] = found


def _ids_of(one: Asked, vector: Vector, successors: NDArray[np.uint64]) -> dict[str, list[int]]:
    """Returns the ids of a query by name; those of the item only if the query has one."""
    about_item = one.query.item is not None
    return {
        "user": [one.user],
        "item": [one.item] if about_item else [],
        "category": [one.category],
        "context": [*one.context, *one.user_attributes.ids],
        "item_attributes": one.item_attributes.ids if about_item else [],
        "recent": one.recent_categories,
        "successor": successors.tolist(),
        "sequence_items": vector.sequence_items.tolist(),
        "sequence_categories": vector.sequence_categories.tolist(),
        "sequence_actions": vector.sequence_actions.tolist(),
    }


def cross_logits(
    version: LoadedVersion, rows: VersionRows, asked: Sequence[Asked], features: NDArray[np.uint16], columns: Crosses
) -> F32:
    """Returns the cross logits of n user-item pairs, `[n]` float32; a cross without a row contributes nothing.

    Args:
        version: The loaded version, which must have learned crosses.
        rows: The version's rows.
        asked: The pairs.
        features: `[n, D]` uint16, the features of their users.
        columns: The columns of the crosses.
    """
    values = Values(
        user=np.array([one.user for one in asked], np.uint64),
        item=np.array([one.item for one in asked], np.uint64),
        category=np.array([one.category for one in asked], np.uint64),
        context=_table([one.context for one in asked]),
        user_attributes=_table([one.user_attributes.ids for one in asked]),
        item_attributes=_table([one.item_attributes.ids for one in asked]),
        features=features,
    )
    return crosses.logits(rows.reader, version.served, columns, version.cross_shares, values)


def _table(ids: Sequence[Sequence[int]]) -> NDArray[np.uint64]:
    """Converts ids to an array `[n, k]` uint64; k may be 0."""
    return np.array(ids, np.uint64).reshape(len(ids), -1)
