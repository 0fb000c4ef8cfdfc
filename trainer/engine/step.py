"""One training step: predict, score, measure, judge, apply; the only code that changes weights.

A step takes one micro-batch, already trimmed and unmasked:

1. Sightings: ids are counted, those due get a row, old ones expire by log time.
2. Candidates, negatives and rows are found on the host; no id enters the graph.
3. One graph scores the rows without dropout and computes the gradients with it.
4. The guard judges loss and gradient.
5. A second graph applies the gradients: Adagrad to the rows used, Adam to the
   dense weights; crosses, and the shared weights of the evidence, were learned
   while rows were scored. After a skip it does not run: no bit of a weight
   changes. The sightings stay, because they are facts of the log and not of the
   gradient; rows admitted by a skipped step have their first values.
6. The report is added to the progressive measures, and the clicks to the
   popular categories; a skipped step enters neither.

The loss is a sum over rows divided by 1,024, so that learning does not depend
on how traffic was cut. Given the same state, batch and environment, the bits
that come out are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.config.settings import Settings
from state.errors import TrainingHeld
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking import transitions
from state.ranking.crosses import WIDTH, Crosses, Values
from trainer.device import prepare
from trainer.engine.facts import Facts, Learned, Scores, Slopes
from trainer.engine.graph import CROSS, Graph, Measured
from trainer.engine.guard import GuardState, Verdict, judge
from trainer.engine.optimizers import Adam
from trainer.engine.sums import dropout, gather, square
from trainer.measures.evaluation import Evaluation
from trainer.measures.slices import Scored, Slices
from trainer.model.attributes import Columns, combine
from trainer.model.candidates import candidates, partners, seed_of
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.losses import NEGATIVE_SHIFT
from trainer.model.preprocessing import Preprocessing
from trainer.tables.index import I32, U64
from trainer.tables.popular import HOUR_MS, Popular
from trainer.tables.table import MISSING, Table

F32 = npt.NDArray[np.float32]

TRANSITION = "transition"
"""The table of what came next after a category, which is counted and not learned."""

TRANSITION_CAPACITY = 1024
"""Lists at the start: there are as many as categories, and each takes a kilobyte."""

EMBEDDINGS = ("user", "item", "category", "context")


def labelled(settings: Settings) -> bool:
    """Whether the log says of its rows whether somebody engaged, so that no negative is drawn."""
    return bool(settings.events.label or settings.labels.impressions)


@dataclass(frozen=True)
class Report:
    """What one step saw and did.

    Attributes:
        rows: Rows of the step.
        verdict: What the guard said; only after ACCEPT did weights change.
        interest_log_loss: Mean over rows with a category, before learning; NaN without any.
        engagement_log_loss: Mean over scored pairs, before learning.
        top1: Rows whose category was the best candidate.
        top5: Rows whose category was among the best five.
        targets: Rows with a category.
        scores: `[m]` float32 engagement logits, before learning.
        positive: `[m]` bool, their outcomes.
        grad_norm: Norm of the whole gradient.
        event_time_ms: Newest event time of the step.
        seconds: Duration of the step.
    """

    rows: int
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


class Trainer:
    """Tables, dense weights, optimizers, guard and measures, and the step over them.

    Args:
        settings: All settings; `[model]` and `[trainer]` are used.
        spec: The feature spec of the micro-batches.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.
        clock: Seconds, for the duration in the report only.

    Attributes:
        tables: By name: user, item, category, context, cross, transition.
        model: The dense weights: `model.weights()` and `model.set_weights()`.
        optimizer: Their slots: `optimizer.slots()` and `optimizer.set_slots()`.
        popular, evaluation, slices, guard, counters: The small state, in `state()`.
        device: Where the variables are.
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
        model = settings.model
        self.tables = {
            name: Table(
                name,
                model.dim,
                settings.trainer.capacity,
                model.initial_accumulator,
                settings.trainer.admit_after if name != "context" else 1,
                self.device,
            )
            for name in EMBEDDINGS
        }
        # A cross begins at nothing: a weight and a margin of 0, of which nothing was learned.
        self.tables[CROSS] = Table(
            CROSS, WIDTH, settings.trainer.capacity, 0.0, settings.trainer.admit_after, self.device, initial_range=0.0
        )
        self.tables[TRANSITION] = Table(
            TRANSITION,
            transitions.WIDTH,
            TRANSITION_CAPACITY,
            admit_after=settings.trainer.admit_after,
            device=self.device,
            initial_range=0.0,
            trained=False,
        )
        with tf.device(self.device):
            self.model = DefaultRanker(model, spec, preprocessing, labelled(settings))
            self.optimizer = Adam(
                self.model.dense, model.dense_learning_rate, self.model.learning_rates, self.model.fast_weights,
                HYPERPARAMETERS.fast_learning_rate,
            )  # fmt: skip
        self.popular = Popular(model.popular)
        self.evaluation = Evaluation()
        self._columns = Columns(settings.attributes)
        self.slices = Slices(settings.attributes, self._columns)
        self.guard = GuardState()
        self.counters = Counters()
        self._first_weights = self.model.weights()
        self._first_slots = self.optimizer.slots()
        fields = len(settings.events.context) + len(self._columns.users.names)
        learned = {name: table for name, table in self.tables.items() if name != TRANSITION}
        self._graph = Graph(self.model, self.optimizer, learned, fields, len(self._columns.items.names))
        self._windows = self.model.window_scaling
        self._crosses = Crosses(spec, settings.events.context, self._columns.users.names, self._columns.items.names)

    def clear(self) -> None:
        """Back to the state of a new trainer, to start an epoch or before a base is loaded."""
        for table in self.tables.values():
            table.clear()
        self.model.set_weights(self._first_weights)
        self.optimizer.set_slots(self._first_slots)
        self.popular = Popular(self.settings.model.popular)
        self.evaluation = Evaluation()
        self.slices = Slices(self.settings.attributes, self._columns)
        self.guard = GuardState()
        self.counters = Counters()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The small state by name: counters, guard, evaluation, slices, popular. Tables, weights and slots are apart."""
        held: dict[str, npt.NDArray[Any]] = {}
        for prefix, record in (("counters", asdict(self.counters)), ("guard", asdict(self.guard))):
            held |= {f"{prefix}.{name}": np.array(value) for name, value in record.items()}
        held |= {f"evaluation.{name}": value for name, value in self.evaluation.state().items()}
        held |= {f"slices.{name}": value for name, value in self.slices.state().items()}
        held |= {f"popular.{name}": value for name, value in self.popular.state().items()}
        return held

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets the small state that `state` returned."""

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.counters = Counters(**{name: int(value) for name, value in part("counters.").items()})
        guard = {name: value.item() for name, value in part("guard.").items()}
        self.guard = GuardState(**guard)
        self.evaluation.load(part("evaluation."))
        self.slices.load(part("slices."))
        self.popular.load(part("popular."))

    def step(self, batch: MicroBatch, seed: tuple[int, int] | None = None) -> Report:
        """Takes one step.

        Args:
            batch: A micro-batch without rows seen before or masked. None left is no step: do not call.
            seed: Dropout seed; by default a hash of the first row's position.

        Raises:
            TrainingHeld: The guard has held training.
            ValueError: The batch has no row.
        """
        began = self._clock()
        if self.guard.held:
            raise TrainingHeld(
                f"training is held since {self.guard.skipped} steps in a row were bad, the last at step "
                f"{self.counters.steps}; look at the input, then `springtide rollback --to V`"
            )
        if len(batch) == 0:
            raise ValueError("a micro-batch without rows is no step")
        crosses = self._crosses_of(batch)
        self._sight(batch, crosses)
        facts, inputs = self._inputs(batch, crosses, seed)
        with tf.device(self.device):
            measured, scores, slopes, learned = self._graph.measure(facts, inputs)
        sparse = self._sparse(facts, inputs, measured, slopes)
        return self._judge_and_apply(batch, facts, inputs, measured, scores, sparse, learned, began)

    def score(self, batch: MicroBatch) -> dict[str, F32]:
        """The interest logits of a batch without dropout, by what the candidates are. Changes nothing.

        Returns:
            recent_logits `[B, L]`, popular_logits `[B, P]`, successor_logits `[B, S]`, all float32.
        """
        with tf.device(self.device):
            _, scores, _, _ = self._graph.measure(*self._inputs(batch, self._crosses_of(batch), (0, 0)), move=False)
        names = ("recent_logits", "popular_logits", "successor_logits")
        return {name: getattr(scores, name) for name in names}

    def _crosses_of(self, batch: MicroBatch) -> U64:
        """`[n, C]` uint64, 0 in rows without a label; `[n, 0]` where no row has one.

        Only a label is learned from: of a drawn negative it is not known that anybody was shown it.
        """
        known = ~np.isnan(batch.label)
        if not known.any():
            return np.zeros((len(batch), 0), np.uint64)
        rows = batch.take(known)
        users, items = self._columns.users_of(rows), self._columns.items_of(rows)
        ids = self._crosses.ids(Values(rows.user, rows.item, rows.category, rows.context, users, items, rows.features))
        if len(rows) == len(batch):
            return ids
        found = np.zeros((len(batch), ids.shape[1]), np.uint64)
        found[known] = ids
        return found

    def _sight(self, batch: MicroBatch, crosses: U64) -> None:
        counters, expire_s = self.counters, self.settings.trainer.expire_s
        counters.log_ms = max(counters.log_ms, int(batch.at_ms.max()))
        if counters.log_ms // HOUR_MS > counters.expired_hour:
            counters.expired_hour = counters.log_ms // HOUR_MS
            for table in self.tables.values():
                table.expire(counters.log_ms - int(expire_s * 1000))
        for name, ids in (("user", batch.user), ("item", batch.item), ("category", batch.category)):
            self.tables[name].sight(np.ascontiguousarray(ids), batch.at_ms)
        for context in (self._context(batch), self._columns.items_of(batch)):
            if fields := context.shape[1]:
                self.tables["context"].sight(context.reshape(-1), np.repeat(batch.at_ms, fields))
        self.tables[TRANSITION].sight(_left(batch), batch.at_ms)
        if crosses.size:
            self.tables[CROSS].sight(crosses.reshape(-1), np.repeat(batch.at_ms, crosses.shape[1]))
            shares = self._crosses.shares
            self.tables[CROSS].sight(shares, np.full(shares.size, counters.log_ms))

    def _context(self, batch: MicroBatch) -> npt.NDArray[np.uint64]:
        """`[n, K + Au]` uint64: what the tower sees as context, the user's attributes behind the fields."""
        users = self._columns.users_of(batch)
        return np.concatenate([batch.context, users], 1) if users.shape[1] else batch.context

    def _inputs(self, batch: MicroBatch, crosses: U64, seed: tuple[int, int] | None) -> tuple[Facts, dict[str, Any]]:
        """Everything the heads and the graph need, rows in place of ids."""
        rows = len(batch)
        sources = [part.source for part in batch.header.ranges]
        topics = np.array([source.topic for source in sources], np.uint64)[batch.source]
        partitions = np.array([source.partition for source in sources], np.uint64)[batch.source]
        partner = partners(topics, partitions, batch.opened)
        popular = self.popular.top()
        table = self.tables[TRANSITION]
        listed, newest_at = table.distinct(table.find(np.ascontiguousarray(batch.recent_categories[:, 0])))
        lists = table.get(listed)
        came_next = transitions.succession(newest_at, lists, batch.recent_categories, popular)
        slots = candidates(batch.category, batch.recent_categories, popular, came_next.ids, partner)
        if seed is None:
            seed = seed_of(int(topics[0]), int(partitions[0]), int(batch.opened[0]))

        known = ~np.isnan(batch.label)
        negative = ~known & (batch.item != batch.item[partner]) & (partner != np.arange(rows))
        scored = np.concatenate([known | (batch.item != 0), negative])

        attributes = self._columns.items_of(batch)
        combined = combine(batch.item, attributes) if attributes.shape[1] else None
        of_item = {"pair_item_at": batch.item, "negative_item_at": batch.item[partner]}
        parts = {
            "user": {"user_at": batch.user},
            "item": of_item if combined is None else {"item_at": combined.item},
            "category": {
                "recent_at": batch.recent_categories.reshape(-1),
                "popular_at": popular,
                "successor_at": came_next.ids.reshape(-1),
                "pair_category_at": batch.category,
                "negative_category_at": batch.category[partner],
                "other_at": slots.other,
            },
            "context": {"context_at": self._context(batch).reshape(-1)},
            CROSS: {"cross_at": crosses.reshape(-1), "share_at": self._crosses.shares[: crosses.shape[1]]},
        }
        if combined is not None:
            parts["context"]["item_attributes_at"] = combined.attributes.reshape(-1)
        inputs: dict[str, Any] = {"features": batch.features, "seed": np.array(seed, np.int32), "partner": partner}
        inputs |= {f"{TRANSITION}_rows": listed, "newest_at": newest_at, "lists": lists}
        at: dict[str, I32] = {}
        for name in parts:
            table, ids = self.tables[name], np.concatenate(list(parts[name].values()))
            inputs[f"{name}_rows"], places = table.distinct(table.find(ids))
            ends = np.cumsum([part.size for part in parts[name].values()])
            at |= dict(zip(parts[name], np.split(places, ends[:-1]), strict=True))
        if combined is not None:
            at |= {"pair_item_at": combined.at, "negative_item_at": combined.at[partner]}
            inputs |= {name: at[name] for name in ("item_at", "item_attributes_at")}
        recent_at = at["recent_at"].reshape(batch.recent_categories.shape)
        inputs |= {name: at[name] for name in ("user_at", "popular_at", "context_at")}
        inputs["latest_at"] = np.ascontiguousarray(recent_at[:, : HYPERPARAMETERS.latest]).reshape(-1)
        width = self.settings.model.hidden[0] if self._graph.drops else 0
        inputs["kept"] = dropout(seed, rows, width, self.settings.model.dropout)
        weight = np.where(slots.target >= 0, batch.weight, np.float32(0.0)) * np.float32(
            1.0 / HYPERPARAMETERS.loss_scale
        )
        facts = Facts(
            windows=np.concatenate([batch.category_windows, came_next.recent_categories], 2),
            log_scale=self._windows.log_scale,
            scale=self._windows.scale,
            shift=self._windows.shift,
            recent_mask=(batch.recent_categories != 0).astype(np.float32),
            popular_mask=slots.popular_mask,
            successor_mask=(came_next.ids != 0).astype(np.float32),
            other_mask=(slots.other != 0).astype(np.float32),
            popular_next=came_next.popular,
            successor_next=came_next.successors,
            recent_at=recent_at,
            successor_at=at["successor_at"].reshape(came_next.ids.shape),
            other_at=at["other_at"],
            pair_category_at=np.concatenate([at["pair_category_at"], at["negative_category_at"]]),
            pair_item_at=np.concatenate([at["pair_item_at"], at["negative_item_at"]]),
            target=slots.target,
            weight=weight.astype(np.float32),
            engaged=np.concatenate([np.where(known, batch.label, np.float32(1.0)), np.zeros(rows, np.float32)]),
            engaged_shift=np.where(np.concatenate([known, known]), np.float32(0.0), np.float32(NEGATIVE_SHIFT)),
            engaged_weight=scored.astype(np.float32)
            * np.float32(HYPERPARAMETERS.engagement_share / HYPERPARAMETERS.loss_scale),
            cross_at=at["cross_at"].reshape(crosses.shape),
            share_at=at["share_at"],
            cross_prior=self._crosses.precision,
        )
        return facts, inputs

    def _sparse(self, facts: Facts, inputs: Mapping[str, Any], measured: Measured, slopes: Slopes) -> dict[str, F32]:
        """The derivatives by the distinct rows of each table; the first of them is the missing row."""
        dim, attributes = self.settings.model.dim, len(self._columns.items.names)
        found = {"user": np.zeros((inputs["user_rows"].size, dim), np.float32), "item": slopes.item}
        found |= {"category": slopes.category, "context": np.zeros((inputs["context_rows"].size, dim), np.float32)}
        if attributes:
            found["item"] = np.zeros((inputs["item_rows"].size, dim), np.float32)
            gather(found["item"], inputs["item_at"], slopes.item)
            shares = np.repeat(slopes.item / np.float32(attributes), attributes, 0)
            gather(found["context"], inputs["item_attributes_at"], shares)
        for name, at, of in (
            ("user", "user_at", measured.user),
            ("category", "latest_at", measured.latest),
            ("category", "popular_at", measured.popular),
            ("context", "context_at", measured.context),
        ):
            gather(found[name], inputs[at], of.numpy())
        return found

    def _judge_and_apply(
        self,
        batch: MicroBatch,
        facts: Facts,
        inputs: Mapping[str, Any],
        measured: Measured,
        scores: Scores,
        sparse: Mapping[str, F32],
        learned: Learned,
        began: float,
    ) -> Report:
        counters, settings = self.counters, self.settings.trainer
        targets = facts.target >= 0
        scored = facts.engaged_weight > 0
        losses, engagement_losses = scores.interest_loss[targets], scores.engagement_loss[scored]
        norm = math.sqrt(float(measured.norm.numpy()) + sum(square(slopes[1:]) for slopes in sparse.values()))
        loss = float(losses.mean()) if losses.size else 0.0
        verdict, self.guard = judge(self.guard, loss, norm, len(batch), settings.guard_factor, settings.guard_patience)
        rank = scores.rank[targets]
        top1, top5 = rank < 1, rank < 5
        logits, positive = scores.engagement[scored], facts.engaged[scored] >= 0.5
        event_time_ms = int(batch.at_ms.max())

        counters.steps += 1
        if verdict is Verdict.ACCEPT:
            rows = {name: inputs[f"{name}_rows"] for name in self.tables}
            with tf.device(self.device):
                self._graph.apply(rows, sparse, measured, learned)
            for name, table in self.tables.items():
                table.touch(rows[name])
            known = batch.recent_categories[:, 0] != MISSING
            self.evaluation.update(losses, top1, top5, known[targets], logits, positive, engagement_losses)
            if self.slices:
                seen = Scored(targets, losses, top1, scored, inputs["partner"], logits, positive, engagement_losses)
                users, items = self._columns.users_of(batch), self._columns.items_of(batch)
                self.slices.update(users, items, batch.header.names, seen)
            self.popular.update(batch.category, counters.log_ms)
            # Counted once the step is accepted: a skipped one leaves no trace.
            lists = inputs["lists"]
            transitions.record(inputs["newest_at"], np.where(facts.weight > 0, batch.category, np.uint64(0)), lists)
            table = self.tables[TRANSITION]
            table.put(inputs[f"{TRANSITION}_rows"][1:], lists[1:], np.zeros((len(lists) - 1, 0), np.float32))
            counters.trained += len(batch)
            counters.event_time_ms = max(counters.event_time_ms, event_time_ms)
        else:
            counters.skipped += len(batch)
        return Report(
            rows=len(batch),
            verdict=verdict,
            interest_log_loss=loss if losses.size else float("nan"),
            engagement_log_loss=float(engagement_losses.mean()) if engagement_losses.size else float("nan"),
            top1=int(top1.sum()),
            top5=int(top5.sum()),
            targets=int(targets.sum()),
            scores=logits,
            positive=positive,
            grad_norm=norm,
            event_time_ms=event_time_ms,
            seconds=self._clock() - began,
        )


def _left(batch: MicroBatch) -> U64:
    """The category that each row's event came after, `[n]` uint64; 0 where there is none, or no category came next."""
    return np.where(batch.category != 0, batch.recent_categories[:, 0], np.uint64(0))
