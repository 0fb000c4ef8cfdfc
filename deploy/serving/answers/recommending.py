"""Candidates of a recommendation with their scores, from the item lists and the weights of one version."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.predictor import KINDS, Asked, Prepared
from springtide_client.answers import Reason
from state.features.spec import Events
from state.ranking import item_scores
from state.ranking.item_lists import CLICKED, EVERYTHING, FOLLOWED, LIVES, ItemLists, count_visits
from state.ranking.item_scores import (
    COLUMNS,
    INTERESTS,
    INTERESTS_AT,
    NEWEST_AT,
    SECOND_AT,
    SHARES,
    SOURCES,
    Reads,
    Workspace,
    clear,
    gather,
    score,
)

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]

_REASONS: dict[str, Reason] = {
    "everything": "popular",
    "category": "category",
    "interests": "category",
    "context": "popular",
    "newest": "next",
    "second": "next",
    "own": "again",
}


def scored(
    prepared: Prepared,
    outputs: Mapping[str, F32],
    clicks: Events,
    category: int | None,
    kind: int,
    work: Workspace,
) -> NDArray[np.intp]:
    """Scores the candidates of the only query of `prepared`, whose version must have item weights.

    Returns their indices in `work`, best first. `clicks` are the user's, newest first. `category` is the only one to take
    items from; None for all. `kind` is `ALL`, or `UNSEEN` if only items that are new to the user are wanted.
    """
    version, question = prepared.version, prepared.asked[0]
    assert version.item_weights is not None
    # 1. The user's own items: all in the history. A trainer's list holds fewer.
    visited = ItemLists.empty(2, max(2, len(clicks)))
    ordered = clicks[::-1]
    count_visits(np.ascontiguousarray(ordered["item"]), np.ascontiguousarray(ordered["at_ms"]) // 1000, 1, visited)
    # 2. The lists of the version.
    keys, reads = _reads(prepared, outputs, question, category)
    clicked = prepared.rows.item_lists(CLICKED, keys)
    followed = prepared.rows.item_lists(FOLLOWED, [0, *visited.ids[1, :2].tolist()])
    # 3. Scores.
    phi = np.zeros(COLUMNS, np.float32)
    after = np.array([1, 2], np.int32) * (visited.ids[1, :2] != 0).astype(np.int32)
    count = gather(
        clicked, followed, visited, reads, after, int(visited.ids[1, 0] != 0), question.at_ms // 1000, phi, work
    )
    score(version.item_weights[kind], phi, count, work)
    clear(count, work)
    order = np.argsort(-work.scores[:count], kind="stable")
    if category is not None:
        category_items = clicked.ids[1 + len(EVERYTHING)]
        order = order[np.isin(work.items[order], category_items)]
    return order


def _reads(
    prepared: Prepared, outputs: Mapping[str, F32], question: Asked, category: int | None
) -> tuple[list[int], Reads]:
    """The keys of the lists of `clicked` that are read, and how; list 0 is that of no key."""
    if category is None:
        recent = prepared.vectors.recent_categories[0]
        parts = [outputs[f"{kind}_logits"][0] for kind in KINDS if f"{kind}_logits" in outputs]
        ids = [recent, prepared.version.popular, prepared.successors[0]][: len(parts)]
        likely, shares = item_scores.likeliest(np.concatenate(parts)[None], np.concatenate(ids)[None])
        newest, interests, weights = int(recent[0]), likely[0].tolist(), shares[0]
    else:
        newest, interests = category, [category, *[0] * (INTERESTS - 1)]
        weights = np.eye(1, INTERESTS, dtype=np.float32)[0]
    keys = [0, *EVERYTHING.tolist(), newest, *interests, *question.context]
    sources = item_scores.sources_of(len(question.context))
    every = np.ones(len(sources), np.float32)
    every[sources == INTERESTS_AT] = weights
    rows = np.arange(1, len(keys), dtype=np.int32) * (np.array(keys[1:], np.uint64) != 0)
    return keys, Reads(rows.astype(np.int32), sources, every)


def reasons_of(order: NDArray[np.intp], work: Workspace) -> list[Reason]:
    """Returns the source with the largest share of each candidate, given by its index in `work`."""
    shares = work.features[:SHARES, order].T.reshape(len(order), len(SOURCES), LIVES).max(2)
    # That an item followed the user's item is a stronger reason than its popularity.
    shares[:, [NEWEST_AT, SECOND_AT]] *= (work.own[order] == 0)[:, None]
    best = np.where(work.own[order] > 0, len(SOURCES) - 1, shares[:, :-1].argmax(1))
    return [_REASONS[SOURCES[source]] for source in best.tolist()]
