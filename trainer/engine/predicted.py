"""What the model and the baselines say of a record, in the arrays that `trainer/measures` judges them by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums
from trainer.engine.compiled.softmax import exponentials, highest_of
from trainer.engine.engine import Scores
from trainer.engine.record import Record
from trainer.measures.predictions import NONE, CategoryPrediction, of_came_next, of_popular, of_previous
from trainer.measures.progressive import Progressive
from trainer.measures.step_scores import Judged, ScoredPairs
from trainer.model.ranker import MASKED
from trainer.tables.count_table import CountTable
from trainer.tables.index import I32

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LOGIT_MOST = 50.0
"""Beyond plus and minus this a probability is 0 or 1."""

_THERE = np.float32(MASKED / 2)


def judged(
    progressive: Progressive,
    record: Record,
    scores: Scores,
    transitions: CountTable,
    known: Flags,
    categories: int,
    scored: Flags,
) -> Judged:
    """What was said of a record before anybody learns from it; changes nothing.

    Args:
        progressive: The running measures, with what is simple.
        record: Of n rows.
        scores: Of the model.
        transitions: What came next, before these rows.
        known: `[n]` bool, whether the user is known.
        categories: That are known, those that the record brought too: else what is new would cost nothing.
        scored: `[2 n]` bool, the pairs whose engagement counts, of rows and then of their negatives.
    """
    targets = record.targets
    rows = targets.slot >= 0
    aimed, newest = record.ids["category"][rows], np.ascontiguousarray(record.ids["recent"][rows, 0])
    said = {
        "model": of_model(scores, targets.slot),
        "popular": of_popular(progressive.popular, aimed),
        "previous": of_previous(newest, aimed),
        "came_next": of_came_next(transitions, np.ascontiguousarray(record.newest[rows]), aimed),
    }
    shift = np.concatenate([targets.label_shift, targets.negative_shift])[scored]
    labels = np.concatenate([targets.label, np.zeros_like(targets.label)])[scored]
    logits = np.clip((scores.engagement[scored] + shift).astype(np.float64), -LOGIT_MOST, LOGIT_MOST)
    losses = scores.engagement_loss[scored].astype(np.float64)
    pairs = ScoredPairs(scored, logits, 1.0 / (1.0 + np.exp(-logits)), labels >= 0.5, losses)
    return progressive.score(said, rows, known, categories, pairs)


def of_model(scores: Scores, slot: I32) -> CategoryPrediction:
    """What the model said of the rows that have a category: softmax over the candidates that serving has.

    Args:
        scores: Of n rows.
        slot: `[n]` int32, see `trainer/model/candidates.py`; the last slot is no candidate.
    """
    at = np.flatnonzero(slot >= 0)
    found = CategoryPrediction(np.empty(at.size, np.int32), np.empty(at.size), np.empty(at.size, np.int32))
    width = sum(part.shape[1] for part in (scores.recent_logits, scores.popular_logits, scores.successor_logits))
    bits = np.empty(width, np.int32)
    recent, popular = np.ascontiguousarray(scores.recent_logits), np.ascontiguousarray(scores.popular_logits)
    successor = np.ascontiguousarray(scores.successor_logits)
    _model(recent, popular, successor, np.ascontiguousarray(slot), at, bits, bits.view(np.float32), *found)
    if not (finite := np.isfinite(found.log_share)).all():
        # Logits that are not finite name no candidate.
        found.rank[~finite], found.log_share[~finite], found.candidates[~finite] = NONE, 0.0, 0
    return found


@compiled_sums("f4[:, ::1], f4[:, ::1], f4[:, ::1], i4[::1], i8[::1], i4[::1], f4[::1], i4[::1], f8[::1], i4[::1]")
def _model(
    recent: F32,
    popular: F32,
    successor: F32,
    slot: I32,
    at: npt.NDArray[np.int64],
    bits: I32,
    scale: F32,
    rank: I32,
    log_share: F64,
    candidates: I32,
) -> None:
    own, ranks, last = recent.shape[1], popular.shape[1], successor.shape[1]
    logits, shares = np.empty(own + ranks + last, np.float32), np.empty(own + ranks + last, np.float32)
    for i in range(at.shape[0]):
        row, count = at[i], 0
        logits[:own] = recent[row]
        logits[own : own + ranks] = popular[row]
        logits[own + ranks :] = successor[row]
        for j in range(logits.shape[0]):
            if logits[j] > _THERE:
                count += 1
        candidates[i], rank[i], log_share[i] = count, NONE, 0.0
        target = slot[row]
        if target < logits.shape[0]:
            highest = highest_of(logits)
            total = exponentials(logits, highest, shares, bits, scale)
            log_share[i] = float(logits[target] - highest) - np.log(float(total))
            before = 0
            for j in range(logits.shape[0]):
                if logits[j] > logits[target] or (logits[j] == logits[target] and j < target):
                    before += 1
            rank[i] = before
