"""One training step: predict, score, measure, judge, apply; the only code that changes weights.

A step takes one micro-batch, already trimmed and unmasked:

1. Sightings: ids are counted, those due get a row, old ones expire by log time (`state/microbatch/batch.py`), and
   the least used leave a full table.
2. The record is learned in equal updates of about `trainer.rows_per_update` rows. For each, candidates, negatives and rows are
   found on the host. The engine scores the rows without dropout and computes the gradients with it.
3. The guard judges the loss and the gradient of the update.
4. If it accepts, the engine applies the gradients: Adagrad to the rows used, Adam to the dense weights. Crosses and the
   fast weights were learned while rows were scored. Clicks are added to the popular categories and the transitions.
   If it skips, no bit of a weight changes. Sightings and churn examples stay, because they are facts of the log and
   not of the gradient. Rows admitted by a skipped update have their initial values.
5. The scores of all updates are added to the progressive measures, once a record. `judged` puts the predictions of the
   model and the baselines into the arrays that `trainer/measures` reads.

The loss is a sum over rows divided by 1,024, so that learning does not depend on how traffic was cut. The same state,
batch and environment give the same bits.

`Counters` is what a trainer counts over its steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.compiled import compiled_sums
from state.config.settings import Settings
from state.errors import TrainingHeld
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking.crosses import Crosses
from trainer.churn.learning import ChurnLearner
from trainer.device import prepare
from trainer.engine.build import engine_name, engine_of, optimizer_of, ranker_of, tables_of, transitions_of
from trainer.engine.compiled.softmax import exponentials, highest_of
from trainer.engine.engine import CROSS, Measured, Scores
from trainer.engine.guard import GuardState, Verdict, judge
from trainer.engine.own_tables import Growth
from trainer.engine.record import Record, Recorder, parts
from trainer.engine.report import Report, Update, candidates_of, joined, joined_updates
from trainer.measures.breakdown import Breakdown
from trainer.measures.evaluation import Evaluation
from trainer.measures.predictions import NONE, CategoryPrediction, of_came_next, of_popular, of_previous
from trainer.measures.progressive import Progressive
from trainer.measures.slices import Scored, Slices
from trainer.measures.step_scores import Judged, ScoredPairs
from trainer.model.attributes import Columns
from trainer.model.preprocessing import Preprocessing
from trainer.model.ranker import MASKED
from trainer.privacy.place import NoisePlace
from trainer.tables.id_table import MISSING, IdTable
from trainer.tables.index import I32, U64
from trainer.tables.popular import HOUR_MS, Popular

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
    """What was said of a record before anybody learns from it; changes nothing.

    Args:
        progressive: The running measures, with what is simple.
        record: Of n rows.
        scores: Of the model.
        came_next: What transitions say of the n rows.
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
        "came_next": CategoryPrediction(*(part[rows] for part in came_next)),
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


@dataclass
class Counters:
    """What a trainer did since its epoch began from nothing; part of each version.

    Attributes:
        steps: Steps taken, skipped ones included.
        trained: Rows learned from.
        skipped: Rows of skipped steps.
        log_ms: Newest log time seen, ms.
        event_time_ms: Newest event time learned from, ms.
        expired_hour: Hour of log time of the last expiry.
    """

    steps: int = 0
    trained: int = 0
    skipped: int = 0
    log_ms: int = 0
    event_time_ms: int = 0
    expired_hour: int = 0


F32 = npt.NDArray[np.float32]


class Trainer:
    """Tables, dense weights, optimizers, guard and measures, and the step over them.

    Args:
        settings: All settings; `[model]` and `[trainer]` are used.
        spec: The feature spec of the micro-batches.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.
        clock: Seconds, for the duration in the report only.

    Attributes:
        transitions, crosses: What came next after each category; how crosses are named.
        tables: By name: user, item, category, context, cross, transition, and the ranker's own.
        model: The dense weights: `model.weights()` and `model.set_weights()`.
        optimizer: Their slots: `optimizer.slots()` and `optimizer.set_slots()`.
        popular, evaluation, slices, guard, counters: The small state, in `state()`.
        churn: What is learned of who leaves; None where the settings want nothing of it.
        progressive, breakdown: The measures beside those of what is simple, and of slices; they decide nothing, and are
            in versions on their own.
        device: Where the variables are.
        guarded: What the version that was loaded keeps of the guard of updates, see `trainer/holding.py`.
    """

    def __init__(
        self,
        settings: Settings,
        spec: FeatureSpec,
        preprocessing: Preprocessing | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings
        self.device = prepare(settings.trainer.device, settings.trainer.threads)
        self._clock = clock
        with tf.device(self.device):
            self.model = ranker_of(settings, spec, preprocessing)
            engine = engine_name(settings, self.model, self.device)
            self.optimizer = optimizer_of(self.model, settings, engine)
        learned = tables_of(self.model, settings, None if engine == "compiled" else self.device)
        self.transitions = transitions_of(settings)
        self._growth = Growth(self.model, learned)
        self.tables: dict[str, IdTable] = {**learned, self.transitions.name: self.transitions}
        self.popular = Popular(settings.model.popular, settings.trainer.max_rows)
        self.evaluation, self.progressive, self._new_users = Evaluation(), Progressive(), np.empty(0, np.uint64)
        self._columns = Columns(settings.attributes)
        self.slices = Slices(settings.attributes, self._columns)
        self.breakdown, self.guard = Breakdown.of(settings, self.slices), GuardState()
        self.guarded: Mapping[str, npt.NDArray[Any]] = {}
        self.counters, self.churn = Counters(), ChurnLearner.of(settings, spec)
        self._first_weights, self._first_slots = self.model.weights(), self.optimizer.slots()
        users, items = self._columns.users.names, self._columns.items.names
        self.crosses = Crosses(spec, settings.events.context, users, items)
        dropped = settings.model.hidden[0] if any(one.name == "tower_kept" for one in self.model.inputs) else 0
        self._recorder = Recorder(settings, self.crosses, self._columns, dropped)
        self.engine = engine_of(self.model, self.optimizer, learned, self.crosses, self._columns, settings, self.device)

    def clear(self) -> None:
        """Back to the state of a new trainer, to start an epoch or before a base is loaded."""
        for table in self.tables.values():
            table.clear()
        self.model.set_weights(self._first_weights)
        self.optimizer.set_slots(self._first_slots)
        self.popular = Popular(self.settings.model.popular, self.settings.trainer.max_rows)
        self.evaluation, self.progressive = Evaluation(), Progressive()
        self.slices = Slices(self.settings.attributes, self._columns)
        self.breakdown = Breakdown.of(self.settings, self.slices)
        self.guard, self.guarded = GuardState(), {}
        self.counters = Counters()
        if self.churn is not None:
            self.churn.clear()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The small state by name: counters, guard, evaluation, slices, popular. Tables, weights and slots are apart."""
        held: dict[str, npt.NDArray[Any]] = {}
        for prefix, record in (("counters", asdict(self.counters)), ("guard", asdict(self.guard))):
            held |= {f"{prefix}.{name}": np.array(value) for name, value in record.items()}
        for prefix, one in self._kept().items():
            held |= {f"{prefix}.{name}": value for name, value in one.state().items()}
        return held

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets the small state that `state` returned."""

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.counters = Counters(**{name: int(value) for name, value in part("counters.").items()})
        self.guard = GuardState(**{name: value.item() for name, value in part("guard.").items()})
        for prefix, one in self._kept().items():
            one.load(part(f"{prefix}."))

    def _kept(self) -> dict[str, Evaluation | Slices | Popular | ChurnLearner]:
        churn = {} if self.churn is None else {"churn": self.churn}
        return {"evaluation": self.evaluation, "slices": self.slices, "popular": self.popular, **churn}

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None, place: NoisePlace | None = None) -> Report:
        """Takes one step.

        Args:
            batch: A micro-batch in log time, without rows seen before or masked. None left is no step: do not call.
            seed: Dropout seed; by default a hash of the first row's position.
            place: Of the record, for the noise of `PrivateTrainer`.

        Raises:
            TrainingHeld: The guard has held training.
            ValueError: The batch has no row.
        """
        if self.guard.held:
            raise TrainingHeld(
                f"training is held since {self.guard.skipped} steps in a row were bad, the last at step "
                f"{self.counters.steps}",
                "look at the input, then `springtide rollback --to V --reason TEXT`, or `springtide resume` where it is good",
            )
        if len(batch) == 0:
            raise ValueError("a micro-batch without rows is no step")
        crosses = self._recorder.crosses_of(batch)
        self._observe(batch, crosses)
        if self.churn is not None:
            self.churn.take(batch, self.counters.log_ms)
        self.counters.steps += 1
        began, size = self._clock(), self.settings.trainer.rows_per_update or len(batch)
        said = self._came_next(batch)
        updates, left = [], 0
        for part, its_crosses in parts(batch, crosses, size):
            if self.guard.held:
                left += len(part)
            else:
                updates.append(self._update(part, its_crosses, seed))
        self.counters.skipped += left
        done = self._reported(batch, updates, said, began)
        return replace(done, rows=done.rows + left, skipped=done.skipped + left) if left else done

    def score(self, batch: MicroBatch) -> dict[str, F32]:
        """The interest logits of a batch without dropout, by what the candidates are. Changes nothing.

        Returns:
            recent_logits `[B, L]`, popular_logits `[B, P]`, successor_logits `[B, S]`, all float32.
        """
        record = self._record(batch, self._recorder.crosses_of(batch), (0, 0))
        scores = self.engine.measure(record, move=False).scores
        names = ("recent_logits", "popular_logits", "successor_logits")
        return {name: getattr(scores, name) for name in names}

    def _record(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Record:
        return self._recorder.record(batch, crosses, self.popular.top(), self.transitions, seed)

    def _observe(self, batch: MicroBatch, crosses: U64) -> None:
        counters, expire_s = self.counters, self.settings.trainer.expire_s
        counters.log_ms = max(counters.log_ms, int(batch.at_ms.max()))
        if counters.log_ms // HOUR_MS > counters.expired_hour:
            counters.expired_hour = counters.log_ms // HOUR_MS
            for table in self.tables.values():
                table.expire(counters.log_ms - int(expire_s * 1000))
        # A user who was away longer than the longest window has no category left, and is not new for that.
        self._new_users = batch.user[self.tables["user"].find(batch.user) == MISSING]
        for name, ids in (("user", batch.user), ("item", batch.item), ("category", batch.category)):
            self.tables[name].observe(np.ascontiguousarray(ids), batch.at_ms)
        context, attributes = self._recorder.context_of(batch), self._columns.items_of(batch)
        for ids in (context, attributes):
            if fields := ids.shape[1]:
                self.tables["context"].observe(ids.reshape(-1), np.repeat(batch.at_ms, fields))
        self._growth.observe(batch, context, attributes)
        self.transitions.observe(self._recorder.left(batch), batch.at_ms)
        if crosses.size:
            self.tables[CROSS].observe(crosses.reshape(-1), np.repeat(batch.at_ms, crosses.shape[1]))
            shares = self.crosses.shares
            self.tables[CROSS].observe(shares, np.full(shares.size, counters.log_ms))
        for table in self.tables.values():
            table.evict()

    def _update(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Update:
        """Scores rows, judges the update, and applies it if it is accepted."""
        record = self._record(batch, crosses, seed)
        return self._judge_and_apply(batch, record, self.engine.measure(record))

    def _judge_and_apply(self, batch: MicroBatch, record: Record, measured: Measured) -> Update:
        counters, settings, scores = self.counters, self.settings.trainer, measured.scores
        targets, pairs = record.targets.slot >= 0, record.targets
        losses, norm = scores.interest_loss[targets], math.sqrt(measured.squared_norm)
        loss = float(losses.mean()) if losses.size else 0.0
        taught = bool(losses.size) or bool(pairs.label_weight.any()) or bool(pairs.negative_weight.any())
        rows = self._teaching(len(batch), taught)
        judging = norm, rows, candidates_of(scores), settings.guard_factor, settings.guard_patience
        verdict, self.guard = judge(self.guard, self._judged(loss), *judging)
        if verdict is Verdict.ACCEPT:
            if rows:
                self.engine.apply(measured)
            for name, touched in measured.rows.items():
                self.tables[name].touch(touched)
            self._count(batch, record)
            counters.trained += len(batch)
            counters.event_time_ms = max(counters.event_time_ms, int(batch.at_ms.max()))
        else:
            counters.skipped += len(batch)
        return Update(record, scores, verdict, norm)

    def _came_next(self, batch: MicroBatch) -> CategoryPrediction:
        """What the counts of transitions say of `[n]` rows, before any of them is counted."""
        newest = self.transitions.find(np.ascontiguousarray(batch.recent_categories[:, 0]))
        return of_came_next(self.transitions, newest, batch.category)

    def _reported(
        self, batch: MicroBatch, updates: Sequence[Update], came_next: CategoryPrediction, began: float
    ) -> Report:
        """Measures the rows of the updates, accepted ones and skipped ones apart, and reports on them."""
        kinds = [update.verdict is Verdict.ACCEPT for update in updates]
        numbers = np.arange(len(batch))
        ends = np.cumsum([len(update.record) for update in updates])
        of_rows = np.repeat(kinds, np.diff(ends, prepend=0))
        reports = []
        for kind in dict.fromkeys(kinds):
            some = [update for update, its in zip(updates, kinds, strict=True) if its is kind]
            mine = numbers[: ends[-1]][of_rows == kind]
            rows = batch if mine.size == len(batch) else batch.take(np.isin(numbers, mine))
            said = came_next if mine.size == len(batch) else CategoryPrediction(*(part[mine] for part in came_next))
            reports.append(replace(self._measured(rows, joined_updates(some), said, kind), order=mine))
        return replace(joined(reports), seconds=self._clock() - began)

    def _measured(self, batch: MicroBatch, update: Update, came_next: CategoryPrediction, accepted: bool) -> Report:
        """Adds the rows of an update to the running measures."""
        record, scores, counters = update.record, update.scores, self.counters
        targets, pairs = record.targets.slot >= 0, record.targets
        scored = np.concatenate([pairs.label_weight, pairs.negative_weight]) > 0
        losses, engagement_losses = scores.interest_loss[targets], scores.engagement_loss[scored]
        loss = float(losses.mean()) if losses.size else float("nan")
        top1, top5 = (scores.rank[targets] < most for most in (1, 5))
        if not accepted:
            # The measures count rows of skipped steps too. A row without a finite loss counts as one of which nothing is
            # known; a pair without one is left out.
            finite = np.isfinite(losses)
            losses = np.where(finite, losses, np.float32(math.log(candidates_of(scores))))
            top1, top5 = top1 & finite, top5 & finite
            scored &= np.isfinite(scores.engagement_loss)
            engagement_losses = scores.engagement_loss[scored]
        labels = np.concatenate([pairs.label, np.zeros(len(batch), np.float32)])
        logits, positive = scores.engagement[scored], labels[scored] >= 0.5
        known = batch.recent_categories[:, 0] != MISSING
        known[~known] = ~np.isin(batch.user[~known], self._new_users)
        categories = len(self.tables["category"])
        found = judged(self.progressive, record, scores, came_next, known, categories, scored)
        self.progressive.update(found.scores, batch.category, counters.log_ms, accepted)
        self.evaluation.update(losses, top1, top5, known[targets], logits, positive, engagement_losses)
        places: list[npt.NDArray[Any]] = [batch.action, known]
        if self.slices:
            seen = Scored(targets, losses, top1, scored, record.partner, logits, positive, engagement_losses)
            users, items = self._columns.users_of(batch), self._columns.items_of(batch)
            places += self.slices.update(users, items, batch.header.names, seen)
        slices = self.breakdown.update(places, record.partner, found)
        return Report(
            rows=len(batch),
            skipped=0 if accepted else len(batch),
            verdict=update.verdict,
            interest_log_loss=loss,
            engagement_log_loss=float(engagement_losses.mean()) if engagement_losses.size else float("nan"),
            top1=int(top1.sum()),
            top5=int(top5.sum()),
            targets=int(targets.sum()),
            scores=logits,
            positive=positive,
            grad_norm=update.norm,
            event_time_ms=int(batch.at_ms.max()),
            seconds=0.0,
            quality=found.scores,
            slices=slices if accepted else None,
            judged=(found,),
            order=np.arange(len(batch)),
        )

    def _judged(self, loss: float) -> float:
        """The mean loss by which the guard judges a step; a private trainer has another one, as of what follows."""
        return loss

    def _teaching(self, rows: int, taught: bool) -> int:
        """The rows of a step that there is something to learn from: of clicks of probe users there is none."""
        return rows if taught else 0

    def _count(self, batch: MicroBatch, record: Record) -> None:
        """Counts what an accepted step clicked; a skipped one leaves no trace."""
        self.popular.update(batch.category, self.counters.log_ms)
        self.transitions.count(record.newest, np.where(record.targets.weight > 0, batch.category, np.uint64(0)))
