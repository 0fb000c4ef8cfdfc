"""One training step: predict, score, measure, judge, apply; the only code that changes weights.

A step takes one micro-batch, already trimmed and unmasked:

1. Sightings: ids are counted, those due get a row, old ones expire by log time (`state/microbatch/batch.py`), and
   the least used leave a full table.
2. The record is learned in equal updates of about `trainer.rows_per_update` rows. For each, candidates, negatives and
   rows are found on the host. The engine scores the rows without dropout and computes the gradients with it.
3. The guard judges the loss and the gradient of the update.
4. If it accepts, the engine applies the gradients: Adagrad to the rows used, Adam to the dense weights. Crosses and the
   fast weights were learned while rows were scored. Clicks are added to the popular categories and the transitions.
   If it skips, no weight changes. Sightings and churn examples stay, because they are facts of the log and
   not of the gradient. Rows admitted by a skipped update have their initial values.
5. The scores of all updates are added to the progressive measures, once a record. Another thread counts the clicks of
   items meanwhile, if there is one.

The loss is a sum over rows divided by 1,024, so that learning does not depend on how traffic was cut. The same state,
batch and environment give the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from state.config.settings import Settings
from state.errors import TrainingHeld
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking.crosses import Crosses
from state.ranking.item_lists import NEXT_CATEGORY, VISITED
from trainer.churn import ChurnLearner
from trainer.device import device_of
from trainer.engine.build import EMBEDDINGS, TRANSITION, Growth, tables_of, transitions_of
from trainer.engine.crosses import share_network
from trainer.engine.engine import CROSS, F32, Measured
from trainer.engine.guard import GuardState, Verdict, judge
from trainer.engine.interest_counts import InterestCounts
from trainer.engine.item_ranking import ItemRanking
from trainer.engine.parts import parts_of
from trainer.engine.record import Record, Recorder, parts
from trainer.engine.report import Measures, Report, Update, candidates_of
from trainer.measures.evaluation import Evaluation
from trainer.measures.progressive import CategoryPrediction, of_came_next
from trainer.measures.slices import Slices
from trainer.model.attributes import Columns
from trainer.model.model import Analysed, Preprocessing
from trainer.privacy import NoisePlace
from trainer.tables.id_table import MISSING, Changes, IdTable
from trainer.tables.index import U64
from trainer.tables.lists import HOUR_MS, ItemListTable, Popular

if TYPE_CHECKING:
    from trainer.model.ranker import Ranker

Taking = Literal["take_served", "take_changes", "state"]
LoadVersion = Callable[["Trainer", int], object]


class WorkerLoad(NamedTuple):
    """A worker's part of a step.

    Attributes:
        seconds: Time that it computed gradients, without waiting for others.
        users: Users whose rows it holds.
    """

    seconds: float
    users: int


@dataclass
class Counters:
    """Counts since the trainer's epoch began from scratch; part of each version.

    Attributes:
        steps: Steps taken, skipped ones included.
        trained: Rows learned from.
        skipped: Rows of skipped steps.
        log_ms: Newest log time seen.
        event_time_ms: Newest event time learned from.
        expired_hour: Hour of log time of the last expiry.
    """

    steps: int = 0
    trained: int = 0
    skipped: int = 0
    log_ms: int = 0
    event_time_ms: int = 0
    expired_hour: int = 0


class Trainer:
    """Tables, dense weights, optimizers, guard and measures, and the step over them.

    Args:
        settings: All settings.
        spec: The feature spec of the micro-batches.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.
        clock: Seconds, for the duration in the report only.

    Attributes:
        transitions, crosses: What came next after each category; how crosses are named.
        tables: By name: user, item, category, context, cross, transition, and the ranker's own.
        model: The dense weights: `model.weights()` and `model.set_weights()`.
        optimizer: Their slots: `optimizer.slots()` and `optimizer.set_slots()`.
        popular, guard, counters: The small state, in `state()`, with parts of `measures` and `churn`.
        measures: Of the model against baselines, and of slices.
        churn: The churn model; None without `churn.days`.
        device: Of the variables.
        guarded: The state of the update guard in the loaded version, see `trainer/holding.py`.
        loads: Of each worker in the last step; empty without other workers.
    """

    loads: Sequence[WorkerLoad] = ()

    def __init__(
        self,
        settings: Settings,
        spec: FeatureSpec,
        preprocessing: Preprocessing | Analysed | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings
        self.device = device_of(settings.trainer.device)
        self._clock = clock
        self._parts = parts_of(settings, spec, preprocessing, self.device)
        self.model, self.optimizer = self._parts.model, self._parts.optimizer
        learned = tables_of(self.model, settings, self._parts.device)
        self.transitions = transitions_of(settings)
        self._growth = Growth(self.model, learned)
        self.tables: dict[str, IdTable] = {**learned, self.transitions.name: self.transitions}
        self.item_ranking = ItemRanking.of(settings)
        if self.item_ranking is not None:
            self.tables |= self.item_ranking.tables
        self.interest_counts = InterestCounts.of(settings, spec)
        if self.interest_counts is not None:
            self.tables[NEXT_CATEGORY] = self.interest_counts.table
        self._columns, self.churn = Columns(settings.attributes), ChurnLearner.of(settings, spec)
        self._begin()
        self._first_weights, self._first_slots = self.model.weights(), self.optimizer.slots()
        users, items = self._columns.users.names, self._columns.items.names
        self.crosses = Crosses(spec, settings.events.context, users, items)
        dropped = settings.model.hidden[0] if any(input_.name == "tower_kept" for input_ in self.model.inputs) else 0
        self._recorder = Recorder(settings, self.crosses, self._columns, dropped)
        self.engine = self._parts.engine(learned, self.crosses, self._columns)

    def clear(self) -> None:
        """Resets to the state of a new trainer, to begin an epoch or before a base is loaded."""
        for table in self.tables.values():
            table.clear()
        self.model.set_weights(self._first_weights)
        self.optimizer.set_slots(self._first_slots)
        for part in (self.churn, self.item_ranking, self.interest_counts):
            if part is not None:
                part.clear()
        self._begin()

    def ranker(self) -> Ranker:
        """The ranker's graph with the present weights, to lower or to export it. Loads TensorFlow."""
        return self._parts.ranker()

    def _begin(self) -> None:
        self.popular = Popular(self.settings.model.popular, self.settings.trainer.max_rows)
        self.measures, self.counters, self.guard = Measures(self.settings, self._columns), Counters(), GuardState()
        self.guarded: Mapping[str, npt.NDArray[Any]] = {}

    # Methods that `DividedTrainer` overrides

    def take_rows(self, how: Taking, without: Collection[str] = ()) -> dict[str, dict[str, npt.NDArray[Any]]]:
        """Copies rows by the method `how` of `IdTable`, by table and column of `Changes`, but not of the tables `without`."""
        tables = {name: table for name, table in self.tables.items() if name not in without}.items()
        if how == "take_served":
            return {name: table.take_served() for name, table in tables}
        return {name: (table.state() if how == "state" else table.take_changes()).columns() for name, table in tables}

    def own_rows(self, table: str, rows: Changes) -> Changes:
        """The rows of a version that this trainer holds: all of them."""
        return rows

    def alone(self) -> AbstractContextManager[None]:
        """In the block the trainer holds the whole model, to carry a version over to it or to learn past clicks."""
        return nullcontext()

    def rejoin(self, load: LoadVersion, version: int) -> None:
        """Called when an epoch was entered at `version`, 0 for none. `load` restores a trainer to a version."""

    def beat(self) -> None:
        """Called between two polls of the log: checks that the other workers answer; there are none."""

    def stop(self) -> None:
        """Ends the other workers; there are none."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The small state by name: counters, guard, evaluation, slices, popular, churn; without tables, weights and slots."""
        state: dict[str, npt.NDArray[Any]] = {}
        for prefix, record in (("counters", asdict(self.counters)), ("guard", asdict(self.guard))):
            state |= {f"{prefix}.{name}": np.array(value) for name, value in record.items()}
        for prefix, component in self._kept().items():
            state |= {f"{prefix}.{name}": value for name, value in component.state().items()}
        return state

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets the small state that `state` returned."""

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.counters = Counters(**{name: int(value) for name, value in part("counters.").items()})
        self.guard = GuardState(**{name: value.item() for name, value in part("guard.").items()})
        for prefix, component in self._kept().items():
            component.load(part(f"{prefix}."))

    def _kept(self) -> dict[str, Evaluation | Slices | Popular | ChurnLearner | ItemRanking | InterestCounts]:
        parts: dict[str, Evaluation | Slices | Popular | ChurnLearner | ItemRanking | InterestCounts] = {
            "evaluation": self.measures.evaluation,
            "slices": self.measures.slices,
            "popular": self.popular,
        }
        if self.churn is not None:
            parts["churn"] = self.churn
        if self.item_ranking is not None:
            parts["recommend"] = self.item_ranking
        if self.interest_counts is not None:
            parts["interests"] = self.interest_counts
        return parts

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None, place: NoisePlace | None = None) -> Report:
        """Takes one step.

        Args:
            batch: A micro-batch in log time, without rows seen before or masked.
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
                "check the input, then `springtide rollback --to V --reason TEXT`, or `springtide resume` if it is good",
            )
        if len(batch) == 0:
            raise ValueError("a micro-batch without rows is no step")
        crosses = self._recorder.crosses_of(batch)
        self._new_users = self._observe(batch, crosses)
        if self.churn is not None:
            self.churn.take(batch, self.counters.log_ms)
        self.counters.steps += 1
        began, size = self._clock(), self.settings.trainer.rows_per_update or len(batch)
        newest = self.transitions.find(np.ascontiguousarray(batch.recent_categories[:, 0]))
        came_next = of_came_next(self.transitions, newest, batch.category)
        updates, skipped = [], 0
        for part, its_crosses in parts(batch, crosses, size):
            if self.guard.held:
                skipped += len(part)
            else:
                updates.append(self._update(part, its_crosses, seed))
        self.counters.skipped += skipped
        tasks: list[Callable[[], Any]] = [] if self.item_ranking is None else [self.item_ranking.count]
        report: Report = self.engine.threads.share(self._reporting(batch, updates, came_next), *tasks)[0]
        return replace(
            report, rows=report.rows + skipped, skipped=report.skipped + skipped, seconds=self._clock() - began
        )

    def score(self, batch: MicroBatch) -> dict[str, F32]:
        """The interest logits of a batch without dropout: `recent_logits` `[B, L]`, `popular_logits` `[B, P]` and
        `successor_logits` `[B, S]`, float32. Changes nothing.
        """
        record = self._record(batch, self._recorder.crosses_of(batch), (0, 0))
        scores = self.engine.measure(record, move=False).scores
        if self.interest_counts is not None:
            scores = self.interest_counts.corrected(batch, record, scores, self._visited())
        names = ("recent_logits", "popular_logits", "successor_logits")
        return {name: getattr(scores, name) for name in names}

    def forget(self, users: U64) -> int:
        """Removes all data of users (`[n]` uint64): own rows, rows of a ranker's user tables, crosses, churn examples.

        Returns the number of removed rows and examples.
        """
        tables, crosses = self.tables, self.crosses
        known = {name: tables[name].known() for name in ("item", "category", "context")}
        # Every known user has the cross of the user alone. Without it there are no other crosses of that user.
        alone = [crosses.of_user(user, *(known["item"][:0],) * 3) for user in users.tolist()]
        user_crosses = [
            crosses.of_user(user, known["item"], known["category"], known["context"])
            for user, first in zip(users.tolist(), alone, strict=True)
            if tables[CROSS].has(first)
        ]
        removed = tables[CROSS].forget(np.concatenate([np.empty(0, np.uint64), *user_crosses]))
        # User ids occur in no other table's ids: 64-bit hashes do not collide.
        without_users = (*EMBEDDINGS, CROSS, TRANSITION, NEXT_CATEGORY)
        named = [name for name in tables if name == "user" or name not in without_users]
        waiting = 0 if self.churn is None else self.churn.forget(users)
        return removed + waiting + sum(tables[name].forget(users) for name in named)

    def _visited(self) -> ItemListTable | None:
        return None if self.item_ranking is None else self.item_ranking.tables[VISITED]

    def _record(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Record:
        return self._recorder.record(batch, crosses, self.popular.top(), self.transitions, seed)

    def _observe(self, batch: MicroBatch, crosses: U64) -> U64:
        """Counts the sightings of a batch; returns its users who had no row before, repeated as they occur."""
        counters, expire_s = self.counters, self.settings.trainer.expire_s
        counters.log_ms = max(counters.log_ms, int(batch.at_ms.max()))
        if counters.log_ms // HOUR_MS > counters.expired_hour:
            counters.expired_hour = counters.log_ms // HOUR_MS
            for table in self.tables.values():
                table.expire(counters.log_ms - int(expire_s * 1000))
        new_users = self._observe_users(batch)
        for name, ids in (("item", batch.item), ("category", batch.category)):
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
        return new_users

    def _observe_users(self, batch: MicroBatch) -> U64:
        # A user who returns after more than the longest window has no categories left, but is not a new user.
        new_users: U64 = batch.user[self.tables["user"].find(batch.user) == MISSING]
        self.tables["user"].observe(np.ascontiguousarray(batch.user), batch.at_ms)
        return new_users

    def _reporting(
        self, batch: MicroBatch, updates: list[Update], came_next: CategoryPrediction
    ) -> Callable[[], Report]:
        """A task that corrects and counts interests, and measures the step. It does not read the lists of items."""
        counts, categories = self.interest_counts, len(self.tables["category"])
        corrected: Callable[[], list[Update]] = partial(list, updates)
        if counts is not None:
            corrected = partial(counts.learn, batch, updates, counts.keyed(batch, updates, self._visited()))
        return lambda: self.measures.report(
            batch, corrected(), came_next, self._new_users, categories, self.counters.log_ms
        )

    def _update(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> Update:
        """Scores rows, judges the update, and applies it if it is accepted."""
        record = self._record(batch, crosses, seed)
        return self._judge_and_apply(batch, record, self.engine.measure(record))

    def _judge_and_apply(self, batch: MicroBatch, record: Record, measured: Measured) -> Update:
        counters, scores, crossed = self.counters, measured.scores, measured.crossed
        if crossed is not None:
            ids, labels = record.ids["cross"], record.targets.label
            engagement, its_losses = share_network(ids, labels, crossed, scores.engagement, scores.engagement_loss)
            scores = scores._replace(engagement=engagement, engagement_loss=its_losses)
        targets, pairs = record.targets.slot >= 0, record.targets
        losses, norm = scores.interest_loss[targets], math.sqrt(measured.squared_norm)
        loss = float(losses.mean()) if losses.size else 0.0
        taught = bool(losses.size) or bool(pairs.label_weight.any()) or bool(pairs.negative_weight.any())
        rows = self._teaching(len(batch), taught)
        verdict, self.guard = judge(self.guard, self._judged(loss), norm, rows, candidates_of(scores))
        if verdict is Verdict.ACCEPT:
            if rows:
                self.engine.apply(measured)
            for name, touched in measured.rows.items():
                self.tables[name].touch(touched)
            self._count(batch, record)
            if self.item_ranking is not None:
                self.item_ranking.see(batch, scores, record.ids["successor"], record.ids["popular"])
            counters.trained += len(batch)
            counters.event_time_ms = max(counters.event_time_ms, int(batch.at_ms.max()))
        else:
            counters.skipped += len(batch)
        return Update(record, scores, verdict, (norm,))

    def _judged(self, loss: float) -> float:
        """The mean loss by which the guard judges an update; a private trainer overrides this and the next two."""
        return loss

    def _teaching(self, rows: int, taught: bool) -> int:
        """The rows of an update that there is something to learn from: none of the clicks of probe users."""
        return rows if taught else 0

    def _count(self, batch: MicroBatch, record: Record) -> None:
        """Counts the clicks of an accepted update; a skipped one leaves no trace."""
        self.popular.update(batch.category, self.counters.log_ms)
        self.transitions.count(record.newest, np.where(record.targets.weight > 0, batch.category, np.uint64(0)))
