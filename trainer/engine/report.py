"""The report of a training step, and the running measures that its rows are added to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums, part_of_sums
from state.config.settings import Settings
from state.microbatch.batch import MicroBatch
from trainer.engine.compiled.rows import exponentials, highest_of
from trainer.engine.engine import F32, Scores
from trainer.engine.guard import Verdict
from trainer.engine.record import Record, joined_records
from trainer.measures.evaluation import Evaluation
from trainer.measures.progressive import (
    NONE,
    CategoryPrediction,
    Judged,
    Progressive,
    ScoredPairs,
    StepScores,
    of_popular,
    of_previous,
)
from trainer.measures.slices import Breakdown, Scored, SliceMeasures, Slices, shown_of
from trainer.model.attributes import Columns
from trainer.model.model import MASKED
from trainer.tables.id_table import MISSING
from trainer.tables.index import I32, U64

F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


LOGIT_MOST = 50.0
"""Beyond plus and minus this a probability is 0 or 1."""

_THERE = np.float32(MASKED / 2)


def judged(
    progressive: Progressive,
    record: Record,
    scores: Scores,
    came_next: CategoryPrediction,
    known: Flags,
    categories: int,
    scored: Flags,
) -> Judged:
    """Scores the predictions of the model and the baselines for a record of n rows, before anything learns from it.

    `known` is `[n]`, whether the user is known; `scored` is `[2 n]`, whether the engagement of each pair counts: first the
    pairs of rows, then of their negatives.
    """
    targets = record.targets
    rows = targets.slot >= 0
    aimed, newest = record.ids["category"][rows], np.ascontiguousarray(record.ids["recent"][rows, 0])
    predictions = {
        "model": of_model(scores, targets.slot),
        "popular": of_popular(progressive.popular, aimed),
        "previous": of_previous(newest, aimed),
        "came_next": CategoryPrediction(*(part[rows] for part in came_next)),
    }
    shift = np.concatenate([targets.label_shift, targets.negative_shift])[scored]
    labels = np.concatenate([targets.label, np.zeros_like(targets.label)])[scored]
    logits = np.clip((scores.engagement[scored] + shift).astype(np.float64), -LOGIT_MOST, LOGIT_MOST)
    losses = scores.engagement_loss[scored].astype(np.float64)
    pairs = ScoredPairs(scored, logits, 1.0 / (1.0 + np.exp(-logits)), labels >= 0.5, losses)
    return progressive.score(predictions, rows, known, categories, pairs)


def of_model(scores: Scores, slot: I32) -> CategoryPrediction:
    """The model's prediction for the rows with a category: softmax over the candidates that serving has.

    `slot` is that of `Candidates.target`; the last slot is no candidate.
    """
    rows = np.flatnonzero(slot >= 0)
    prediction = CategoryPrediction(np.empty(rows.size, np.int32), np.empty(rows.size), np.empty(rows.size, np.int32))
    recent, popular = np.ascontiguousarray(scores.recent_logits), np.ascontiguousarray(scores.popular_logits)
    successor = np.ascontiguousarray(scores.successor_logits)
    _model(recent, popular, successor, np.ascontiguousarray(slot), rows, prediction)
    if not (finite := np.isfinite(prediction.log_share)).all():
        # Without finite logits there is no best candidate.
        prediction.rank[~finite], prediction.log_share[~finite], prediction.candidates[~finite] = NONE, 0.0, 0
    return prediction


@part_of_sums
def _join(recent: F32, popular: F32, successor: F32, out: F32) -> None:
    of_popular, of_successors = out[recent.shape[0] :], out[recent.shape[0] + popular.shape[0] :]
    for j in range(recent.shape[0]):
        out[j] = recent[j]
    for j in range(popular.shape[0]):
        of_popular[j] = popular[j]
    for j in range(successor.shape[0]):
        of_successors[j] = successor[j]


@compiled_sums("f4[:, ::1], f4[:, ::1], f4[:, ::1], i4[::1], i8[::1], CategoryPrediction")
def _model(
    recent: F32,
    popular: F32,
    successor: F32,
    slot: I32,
    at: npt.NDArray[np.int64],
    prediction: CategoryPrediction,
) -> None:
    rank, log_share, candidates = prediction
    slots, ranks, last = recent.shape[1], popular.shape[1], successor.shape[1]
    logits, shares = np.empty(slots + ranks + last, np.float32), np.empty(slots + ranks + last, np.float32)
    bits = np.empty(slots + ranks + last, np.int32)
    scale = bits.view(np.float32)
    for i in range(at.shape[0]):
        row, count = at[i], 0
        _join(recent[row], popular[row], successor[row], logits)
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


class Update(NamedTuple):
    """One update of a record, rows that were scored, judged and learned together; or several ones, joined.

    Attributes:
        norms: The norm of the whole gradient of each update.
    """

    record: Record
    scores: Scores
    verdict: Verdict
    norms: tuple[float, ...]


def joined_updates(updates: Sequence[Update]) -> Update:
    """Joins the rows of several updates, with the worst verdict."""
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
    norms = tuple(norm for update in updates for norm in update.norms)
    return Update(joined_records([update.record for update in updates]), scores, verdict, norms)


def joined_pairs(parts: Sequence[npt.NDArray[Any]], rows: Sequence[int]) -> npt.NDArray[Any]:
    """Joins the pairs of several parts, `[2 n]`: first the rows' own pairs of all parts, then their negatives."""
    firsts = [part[:count] for part, count in zip(parts, rows, strict=True)]
    return np.concatenate([*firsts, *(part[count:] for part, count in zip(parts, rows, strict=True))])


def candidates_of(scores: Scores) -> int:
    """The number of candidate slots of a row, including the last one."""
    return 1 + sum(
        int(part.shape[1]) for part in (scores.recent_logits, scores.popular_logits, scores.successor_logits)
    )


@dataclass(frozen=True)
class Report:
    """The outcome of one training step.

    Attributes:
        skipped: Rows of updates that the guard skipped.
        verdict: The guard's verdict, the worst one of several updates. Weights change only after ACCEPT.
        interest_log_loss: Mean over rows with a category, before learning; NaN without any.
        grad_norm: Norm of the whole gradient, the largest one of several updates.
        squared_norm: Sum of the squared norms of the gradients of all updates.
        slices: `[loss, dimension, place, 3]` float64, see `Breakdown.update`; None if the step was skipped.
        judged: The predictions for its rows: of accepted updates, and of skipped ones.
        order: `[n]` int64, the place in the record of each row of `judged`.
    """

    rows: int
    skipped: int
    verdict: Verdict
    interest_log_loss: float
    grad_norm: float
    squared_norm: float
    seconds: float
    quality: StepScores
    slices: F64 | None
    judged: tuple[Judged, ...]
    order: npt.NDArray[np.int64]


def joined(updates: Sequence[Report]) -> Report:
    """Joins the reports of a record that was learned in several updates."""
    if len(updates) == 1:
        return updates[0]
    order, slices = list(Verdict), [update.slices for update in updates if update.slices is not None]
    return Report(
        rows=sum(update.rows for update in updates),
        skipped=sum(update.skipped for update in updates),
        verdict=max((update.verdict for update in updates), key=order.index),
        interest_log_loss=_mean([(update.interest_log_loss, update.quality.total("rows")) for update in updates]),
        grad_norm=max(update.grad_norm for update in updates),
        squared_norm=sum(update.squared_norm for update in updates),
        seconds=sum(update.seconds for update in updates),
        quality=reduce(StepScores.__add__, (update.quality for update in updates)),
        slices=np.sum(slices, axis=0) if slices else None,
        judged=tuple(judgement for update in updates for judgement in update.judged),
        order=np.concatenate([update.order for update in updates]),
    )


def _mean(parts: Sequence[tuple[float, float]]) -> float:
    """The overall mean of (mean, count) pairs.

    >>> _mean([(1.0, 1), (float("nan"), 0), (4.0, 2)])
    3.0
    """
    count = sum(part_rows for _, part_rows in parts)
    return sum(mean * part_rows for mean, part_rows in parts if part_rows) / count if count else float("nan")


class Measures:
    """The running measures of a trainer: of the model against baselines, and of slices. They decide nothing.

    Attributes:
        evaluation, slices: Sums that are part of a version's digest.
        progressive, breakdown: Measures that a durable version stores separately.
    """

    def __init__(self, settings: Settings, columns: Columns) -> None:
        self._columns, self._actions = columns, settings.events.actions
        self.evaluation, self.progressive = Evaluation(), Progressive()
        self.slices = Slices(settings.attributes, columns)
        self.breakdown = Breakdown.of(settings, self.slices)

    def shown(self) -> dict[str, Sequence[str]]:
        """The present names of the slices, by dimension."""
        return shown_of(self._actions, self.slices)

    def of_slices(self) -> list[SliceMeasures]:
        """The present measures of slices."""
        return self.breakdown.measures(self.shown())

    def report(
        self,
        batch: MicroBatch,
        updates: Sequence[Update],
        came_next: CategoryPrediction,
        new_users: U64,
        categories: int,
        log_ms: int,
    ) -> Report:
        """Adds the rows of a step's updates, accepted ones and skipped ones separately, and reports on them.

        Rows after the last update were not scored; `new_users` had no row before the step.
        """
        kinds = [update.verdict is Verdict.ACCEPT for update in updates]
        numbers = np.arange(len(batch))
        of_rows = np.repeat(kinds, [len(update.record) for update in updates])
        known = batch.recent_categories[:, 0] != MISSING
        known[~known] = ~np.isin(batch.user[~known], new_users)
        reports = []
        for accepted in dict.fromkeys(kinds):
            joined_update = joined_updates(
                [update for update, kind in zip(updates, kinds, strict=True) if kind is accepted]
            )
            accepted_rows = numbers[: len(of_rows)][of_rows == accepted]
            if accepted_rows.size == len(batch):
                reports.append(self._add(batch, joined_update, came_next, known, categories, log_ms, accepted_rows))
                continue
            part = CategoryPrediction(*(column[accepted_rows] for column in came_next))
            rows = np.isin(numbers, accepted_rows)
            reports.append(
                self._add(batch.take(rows), joined_update, part, known[rows], categories, log_ms, accepted_rows)
            )
        return joined(reports)

    def _add(
        self,
        batch: MicroBatch,
        update: Update,
        came_next: CategoryPrediction,
        known: Flags,
        categories: int,
        log_ms: int,
        order: npt.NDArray[np.int64],
    ) -> Report:
        record, scores, accepted = update.record, update.scores, update.verdict is Verdict.ACCEPT
        targets, pairs = record.targets.slot >= 0, record.targets
        scored = np.concatenate([pairs.label_weight, pairs.negative_weight]) > 0
        losses, engagement_losses = scores.interest_loss[targets], scores.engagement_loss[scored]
        loss = float(losses.mean()) if losses.size else float("nan")
        top1, top5 = (scores.rank[targets] < most for most in (1, 5))
        if not accepted:
            # The measures count rows of skipped steps too. A row without a finite loss counts as a random guess; a pair
            # without one is left out.
            finite = np.isfinite(losses)
            losses = np.where(finite, losses, np.float32(math.log(candidates_of(scores))))
            top1, top5 = top1 & finite, top5 & finite
            scored &= np.isfinite(scores.engagement_loss)
            engagement_losses = scores.engagement_loss[scored]
        labels = np.concatenate([pairs.label, np.zeros(len(batch), np.float32)])
        logits, positive = scores.engagement[scored], labels[scored] >= 0.5
        judgement = judged(self.progressive, record, scores, came_next, known, categories, scored)
        self.progressive.update(judgement.scores, batch.category, log_ms, accepted)
        self.evaluation.update(losses, top1, top5, known[targets], logits, positive, engagement_losses)
        values: list[npt.NDArray[Any]] = [batch.action, known]
        if self.slices:
            scored_pairs = Scored(targets, losses, top1, scored, record.partner, logits, positive, engagement_losses)
            users, items = self._columns.users_of(batch), self._columns.items_of(batch)
            values += self.slices.update(users, items, batch.header.names, scored_pairs)
        slices = self.breakdown.update(values, record.partner, judgement)
        return Report(
            rows=len(batch),
            skipped=0 if accepted else len(batch),
            verdict=update.verdict,
            interest_log_loss=loss,
            grad_norm=max(update.norms),
            squared_norm=sum(norm * norm for norm in update.norms),
            seconds=0.0,
            quality=judgement.scores,
            slices=slices if accepted else None,
            judged=(judgement,),
            order=order,
        )
