"""The report of a training step: its scores, the guard's verdict and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.engine.engine import Scores
from trainer.engine.guard import Verdict
from trainer.engine.record import Record, joined_records
from trainer.measures.step_scores import Judged, StepScores, joined_scores

F64 = npt.NDArray[np.float64]


class Update(NamedTuple):
    """One update of a record: rows that were scored, judged and learned together.

    Attributes:
        record: The rows.
        scores: Before learning.
        verdict: The guard's verdict.
        norm: Norm of the gradient.
    """

    record: Record
    scores: Scores
    verdict: Verdict
    norm: float


def joined_updates(updates: Sequence[Update]) -> Update:
    """Joins the rows of several updates into one update, with the worst verdict and the largest norm."""
    if len(updates) == 1:
        return updates[0]
    order = list(Verdict)
    verdict = max((update.verdict for update in updates), key=order.index)
    scores = Scores(*(np.concatenate(parts) for parts in zip(*(update.scores for update in updates), strict=True)))
    halves = [len(update.record) for update in updates]
    scores = scores._replace(
        engagement=joined_pairs([update.scores.engagement for update in updates], halves),
        engagement_loss=joined_pairs([update.scores.engagement_loss for update in updates], halves),
    )
    return Update(
        joined_records([update.record for update in updates]), scores, verdict, max(update.norm for update in updates)
    )


def joined_pairs(parts: Sequence[npt.NDArray[Any]], rows: Sequence[int]) -> npt.NDArray[Any]:
    """Joins the pairs of several parts, `[2 n]`: first the rows' own pairs of all parts, then their negatives."""
    own = [part[:count] for part, count in zip(parts, rows, strict=True)]
    return np.concatenate([*own, *(part[count:] for part, count in zip(parts, rows, strict=True))])


def candidates_of(scores: Scores) -> int:
    """The number of candidate slots of a row, including the last one."""
    return 1 + sum(
        int(part.shape[1]) for part in (scores.recent_logits, scores.popular_logits, scores.successor_logits)
    )


@dataclass(frozen=True)
class Report:
    """The outcome of one training step.

    Attributes:
        rows: Rows of the step.
        skipped: Of them, rows of updates that the guard skipped.
        verdict: The guard's verdict; weights change only after ACCEPT. The worst one if there are several updates.
        interest_log_loss: Mean over rows with a category, before learning; NaN without any.
        engagement_log_loss: Mean over scored pairs, before learning.
        top1: Rows whose category was the best candidate.
        top5: Rows whose category was among the best five.
        targets: Rows with a category.
        scores: `[m]` float32 engagement logits, before learning.
        positive: `[m]` bool, their outcomes.
        grad_norm: Norm of the whole gradient; the largest one if there are several updates.
        event_time_ms: Newest event time of the step.
        seconds: Duration of the step.
        quality: Scores of the model and of simple baselines before learning, as sums.
        slices: `[loss, dimension, place, 3]` float64, see `Breakdown.update`; None if the step was skipped.
        judged: The predictions for its rows: of accepted updates, and of skipped ones.
        order: `[n]` int64, the place in the record of each row of `judged`.
    """

    rows: int
    skipped: int
    verdict: Verdict
    interest_log_loss: float
    engagement_log_loss: float
    top1: int
    top5: int
    targets: int
    scores: npt.NDArray[np.float32]
    positive: npt.NDArray[np.bool_]
    grad_norm: float
    event_time_ms: int
    seconds: float
    quality: StepScores
    slices: F64 | None
    judged: tuple[Judged, ...]
    order: npt.NDArray[np.int64]


def joined(updates: Sequence[Report]) -> Report:
    """Joins the reports of a record that was learned in several updates."""
    if len(updates) == 1:
        return updates[0]
    order, slices = list(Verdict), [one.slices for one in updates if one.slices is not None]
    return Report(
        rows=sum(one.rows for one in updates),
        skipped=sum(one.skipped for one in updates),
        verdict=max((one.verdict for one in updates), key=order.index),
        interest_log_loss=_mean([(one.interest_log_loss, one.targets) for one in updates]),
        engagement_log_loss=_mean([(one.engagement_log_loss, one.scores.size) for one in updates]),
        top1=sum(one.top1 for one in updates),
        top5=sum(one.top5 for one in updates),
        targets=sum(one.targets for one in updates),
        scores=np.concatenate([one.scores for one in updates]),
        positive=np.concatenate([one.positive for one in updates]),
        grad_norm=max(one.grad_norm for one in updates),
        event_time_ms=max(one.event_time_ms for one in updates),
        seconds=sum(one.seconds for one in updates),
        quality=joined_scores([one.quality for one in updates]),
        slices=np.sum(slices, axis=0) if slices else None,
        judged=tuple(said for one in updates for said in one.judged),
        order=np.concatenate([one.order for one in updates]),
    )


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """The overall mean of (mean, count) pairs.

    >>> _mean([(1.0, 1), (float("nan"), 0), (4.0, 2)])
    3.0
    """
    count = sum(some for _, some in parts)
    return sum(mean * some for mean, some in parts if some) / count if count else float("nan")
