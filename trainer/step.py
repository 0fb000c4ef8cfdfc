"""One training step: predict, score, measure, judge, apply; the only code that changes weights.

A step takes one micro-batch, already trimmed and unmasked:

1. Sightings: ids are counted, those due get a row, old ones expire by log time.
2. Candidates, negatives and rows are found on the host; no id enters the graph.
3. One graph scores the rows without dropout and computes the gradients with it.
4. The guard judges loss and gradient.
5. A second graph applies the gradients: Adagrad to the rows used, Adam to the
   dense weights. After a skip it does not run: no bit of a weight changes. The
   sightings stay, because they are facts of the log and not of the gradient;
   rows admitted by a skipped step have their first values.
6. The report is added to the progressive measures, and the clicks to the
   popular labels; a skipped step enters neither.

The loss is a sum over rows divided by 1,024, so that learning does not depend
on how traffic was cut. Given the same state, batch and environment, the bits
that come out are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.config import Settings
from state.errors import TrainingHeld
from state.features import FeatureSpec
from state.microbatch import MicroBatch
from trainer.candidates import candidates, partners, seed_of
from trainer.device import prepare
from trainer.evaluation import Evaluation
from trainer.guard import GuardState, Verdict, judge
from trainer.index import I32
from trainer.model import LATEST, Model, Preprocessing
from trainer.optimizer import Adam, apply_adagrad
from trainer.popular import HOUR_MS, Popular
from trainer.tables import MISSING, Table

LOSS_ROWS = 1024.0
"""The loss of a step is its sum over rows, divided by this."""

ENGAGEMENT_SHARE = 0.2
"""Weight of the engagement loss against the interest loss."""

ASSUMED_CLICK_RATE = 0.05
"""Clicks per impression in a log without impressions. One negative is drawn for each
click, so that scores are shifted by log((1 - r) / r) to stand for r (King and Zeng 2001)."""

NEGATIVE_SHIFT = float(np.log((1.0 - ASSUMED_CLICK_RATE) / ASSUMED_CLICK_RATE))

TABLES = ("user", "item", "category", "context")

RATES = {"interest.": 20.0}
"""The few weights over label windows see every label of every row and learn faster."""


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
        tables: By name: user, item, category, context.
        model: The dense weights: `model.weights()` and `model.set_weights()`.
        optimizer: Their slots: `optimizer.slots()` and `optimizer.set_slots()`.
        popular, evaluation, guard, counters: The small state, in `state()`.
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
            for name in TABLES
        }
        with tf.device(self.device):
            self.model = Model(model, spec, preprocessing)
            self.optimizer = Adam(self.model.dense, model.dense_learning_rate, RATES)
        self.popular = Popular(model.popular)
        self.evaluation = Evaluation()
        self.guard = GuardState()
        self.counters = Counters()
        self._first_weights = self.model.weights()
        self._first_slots = self.optimizer.slots()
        self._measure = tf.function(self._measure_graph, input_signature=[_signature(spec, model.popular)])
        # Distinct rows differ in number from step to step: unknown sizes keep one trace.
        self._apply = tf.function(
            self._apply_graph,
            input_signature=[
                {name: tf.TensorSpec([None], tf.int32) for name in TABLES},
                [tf.TensorSpec(weight.shape, tf.float32) for weight in self.model.dense.values()],
                {name: tf.TensorSpec([None, model.dim], tf.float32) for name in TABLES},
            ],
        )

    def clear(self) -> None:
        """Back to the state of a new trainer, to start an epoch or before a base is loaded."""
        for table in self.tables.values():
            table.clear()
        self.model.set_weights(self._first_weights)
        self.optimizer.set_slots(self._first_slots)
        self.popular = Popular(self.settings.model.popular)
        self.evaluation = Evaluation()
        self.guard = GuardState()
        self.counters = Counters()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The small state by name: counters, guard, evaluation, popular. Tables, weights and slots are apart."""
        held: dict[str, npt.NDArray[Any]] = {}
        for prefix, record in (("counters", asdict(self.counters)), ("guard", asdict(self.guard))):
            held |= {f"{prefix}.{name}": np.array(value) for name, value in record.items()}
        held |= {f"evaluation.{name}": value for name, value in self.evaluation.state().items()}
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
        self._sight(batch)
        inputs = self._inputs(batch, seed)
        with tf.device(self.device):
            measured = self._measure(inputs)
        return self._judge_and_apply(batch, inputs, measured, began)

    def score(self, batch: MicroBatch) -> dict[str, npt.NDArray[np.float32]]:
        """The interest logits of a batch without dropout: label_logits `[B, L]`, popular_logits `[B, P]`. Changes nothing."""
        with tf.device(self.device):
            measured = self._measure(self._inputs(batch, (0, 0)))
        return {name: measured[name].numpy() for name in ("label_logits", "popular_logits")}

    def _sight(self, batch: MicroBatch) -> None:
        counters, expire_s = self.counters, self.settings.trainer.expire_s
        counters.log_ms = max(counters.log_ms, int(batch.at_ms.max()))
        if counters.log_ms // HOUR_MS > counters.expired_hour:
            counters.expired_hour = counters.log_ms // HOUR_MS
            for table in self.tables.values():
                table.expire(counters.log_ms - int(expire_s * 1000))
        for name, ids in (("user", batch.user), ("item", batch.item), ("category", batch.category)):
            self.tables[name].sight(np.ascontiguousarray(ids), batch.at_ms)
        fields = batch.context.shape[1]
        if fields:
            self.tables["context"].sight(batch.context.reshape(-1), np.repeat(batch.at_ms, fields))

    def _inputs(self, batch: MicroBatch, seed: tuple[int, int] | None) -> dict[str, Any]:
        """Everything the graph needs, rows in place of ids."""
        rows = len(batch)
        sources = [part.source for part in batch.header.ranges]
        topics = np.array([source.topic for source in sources], np.uint64)[batch.source]
        partitions = np.array([source.partition for source in sources], np.uint64)[batch.source]
        partner = partners(topics, partitions, batch.offset)
        popular = self.popular.top()
        slots = candidates(batch.category, batch.labels, popular, partner)
        if seed is None:
            seed = seed_of(int(topics[0]), int(partitions[0]), int(batch.offset[0]))

        known = ~np.isnan(batch.label)
        negative = ~known & (batch.item != batch.item[partner]) & (partner != np.arange(rows))
        scored = np.concatenate([known | (batch.item != 0), negative])

        ids = {
            "user": batch.user,
            "item": np.concatenate([batch.item, batch.item[partner]]),
            "category": np.concatenate(
                [
                    batch.labels.reshape(-1),
                    batch.labels[:, :LATEST].reshape(-1),
                    popular,
                    batch.category,
                    batch.category[partner],
                    slots.other,
                ]
            ),
            "context": batch.context.reshape(-1),
        }
        inputs: dict[str, Any] = {}
        for name, table in self.tables.items():
            found = table.find(np.ascontiguousarray(ids[name]))
            inputs[f"{name}_rows"], inputs[f"{name}_at"] = table.distinct(found)
        return inputs | {
            "features": batch.features,
            "label_windows": batch.label_windows,
            "label_mask": (batch.labels != 0).astype(np.float32),
            "popular_mask": slots.popular_mask,
            "other_mask": (slots.other != 0).astype(np.float32)[:, None],
            "target": slots.target,
            "weight": np.where(slots.target >= 0, batch.weight, np.float32(0.0)),
            "engaged": np.concatenate([np.where(known, batch.label, np.float32(1.0)), np.zeros(rows, np.float32)]),
            "engaged_shift": np.where(np.concatenate([known, known]), np.float32(0.0), np.float32(NEGATIVE_SHIFT)),
            "engaged_weight": scored.astype(np.float32),
            "seed": np.array(seed, np.int32),
        }

    def _measure_graph(self, given: Mapping[str, Any]) -> dict[str, Any]:
        model, count = self.model, tf.shape(given["target"])[0]
        gathered = {
            name: tf.raw_ops.ResourceGather(resource=table.rows.handle, indices=given[f"{name}_rows"], dtype=tf.float32)
            for name, table in self.tables.items()
        }
        windows = tf.cast(given["label_windows"], tf.float32)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(gathered)
            tape.watch(list(model.dense.values()))
            user, context = self._user_rows(gathered, given, count)
            labels, latest, popular, category, foreign, other = self._category_rows(gathered, given, count)
            item, foreign_item = tf.split(tf.gather(gathered["item"], given["item_at"]), 2)
            inputs = {
                "features": tf.cast(given["features"], tf.float32),
                "user_row": user,
                "context_row": context,
                "label_rows": labels,
                "latest_rows": latest,
                "label_windows": windows,
                "label_mask": given["label_mask"],
                "popular_rows": popular,
                "popular_mask": given["popular_mask"],
            }
            evidence = model.label_evidence(inputs)
            scoring, learning = model.vectors(inputs, given["seed"])

            def interest(vector: Any) -> tuple[Any, Any, Any]:
                label_logits, popular_logits, query = model.interest(vector, inputs, evidence)
                last = model.other(query, other, given["other_mask"])
                logits = tf.concat([label_logits, popular_logits, last], 1)
                target = tf.maximum(given["target"], 0)
                return (
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels=target, logits=logits),
                    label_logits,
                    popular_logits,
                )

            def engagement(vector: Any) -> tuple[Any, Any]:
                projected = tf.matmul(vector, model.dense["engagement.vector"])
                scores = tf.concat(
                    [
                        model.engagement_of(projected, user, item, category),
                        model.engagement_of(projected, user, foreign_item, foreign),
                    ],
                    0,
                )
                shifted = scores + given["engaged_shift"]
                return tf.nn.sigmoid_cross_entropy_with_logits(labels=given["engaged"], logits=shifted), scores

            with tape.stop_recording():
                interest_loss, label_logits, popular_logits = interest(scoring)
                engagement_loss, scores = engagement(scoring)
            total = tf.reduce_sum(interest(learning)[0] * given["weight"])
            total += ENGAGEMENT_SHARE * tf.reduce_sum(engagement(learning)[0] * given["engaged_weight"])
            total /= LOSS_ROWS
        dense, sparse = tape.gradient(
            total, (list(model.dense.values()), gathered), unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        # The missing row is the first of each table's rows and is never trained.
        sparse = {name: tf.convert_to_tensor(gradient)[1:] for name, gradient in sparse.items()}
        dense = [tf.convert_to_tensor(gradient) for gradient in dense]
        rank = _rank(tf.concat([label_logits, popular_logits], 1), given["target"])
        return {
            "label_logits": label_logits,
            "popular_logits": popular_logits,
            "interest_loss": interest_loss,
            "engagement_loss": engagement_loss,
            "scores": scores,
            "rank": rank,
            "norm": tf.linalg.global_norm([*dense, *sparse.values()]),
            "dense": dense,
            "sparse": sparse,
        }

    def _user_rows(self, gathered: Mapping[str, Any], given: Mapping[str, Any], count: Any) -> tuple[Any, Any]:
        user = tf.gather(gathered["user"], given["user_at"])
        fields = len(self.settings.events.context)
        if not fields:
            return user, tf.zeros_like(user)
        context = tf.gather(gathered["context"], tf.reshape(given["context_at"], [count, fields]))
        return user, tf.reduce_mean(context, 1)

    def _category_rows(self, gathered: Mapping[str, Any], given: Mapping[str, Any], count: Any) -> list[Any]:
        """Label rows `[B, L, dim]`, the latest again `[B * 3, dim]`, popular rows `[P, dim]`, own, partner's and last slot's rows `[B, dim]`."""
        slots, dim = self.model.labels, self.settings.model.dim
        flat = tf.gather(gathered["category"], given["category_at"])
        parts = tf.split(flat, [count * slots, count * LATEST, self.settings.model.popular, count, count, count])
        return [tf.reshape(parts[0], [count, slots, dim]), *parts[1:]]

    def _judge_and_apply(self, batch: MicroBatch, inputs: dict[str, Any], measured: Any, began: float) -> Report:
        counters, settings = self.counters, self.settings.trainer
        targets = inputs["target"] >= 0
        scored = inputs["engaged_weight"] > 0
        losses = measured["interest_loss"].numpy()[targets]
        engagement_losses = measured["engagement_loss"].numpy()[scored]
        norm = float(measured["norm"].numpy())
        loss = float(losses.mean()) if losses.size else 0.0
        verdict, self.guard = judge(self.guard, loss, norm, len(batch), settings.guard_factor, settings.guard_patience)
        rank = measured["rank"].numpy()[targets]
        top1, top5 = rank < 1, rank < 5
        scores, positive = measured["scores"].numpy()[scored], inputs["engaged"][scored] >= 0.5
        event_time_ms = int(batch.at_ms.max())

        counters.steps += 1
        if verdict is Verdict.ACCEPT:
            rows = {name: inputs[f"{name}_rows"][1:] for name in self.tables}
            with tf.device(self.device):
                self._apply(rows, measured["dense"], measured["sparse"])
            for name, table in self.tables.items():
                table.touch(rows[name])
            known = batch.labels[:, 0] != MISSING
            self.evaluation.update(losses, top1, top5, known[targets], scores, positive, engagement_losses)
            self.popular.update(batch.category, counters.log_ms)
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
            scores=scores,
            positive=positive,
            grad_norm=norm,
            event_time_ms=event_time_ms,
            seconds=self._clock() - began,
        )

    def _apply_graph(self, rows: Mapping[str, I32], dense: list[Any], sparse: Mapping[str, Any]) -> None:
        for name, table in self.tables.items():
            apply_adagrad(table.rows, table.accum, self.settings.model.learning_rate, rows[name], sparse[name])
        self.optimizer.apply(dense)


def _rank(logits: Any, target: Any) -> Any:
    """How many candidates come before the target, `[B]` int32; all of them where it is none of these.

    Of equal candidates the one in the lower slot comes first.
    """
    slots = tf.range(tf.shape(logits)[1])
    own = tf.expand_dims(target, 1)
    is_own = tf.cast(slots == own, tf.float32)
    score = tf.reduce_sum(logits * is_own, 1, keepdims=True)
    before = (logits > score) | ((logits == score) & (slots < own))
    there = tf.reduce_sum(is_own, 1) > 0
    return tf.where(there, tf.reduce_sum(tf.cast(before, tf.int32), 1), tf.shape(logits)[1])


def _signature(spec: FeatureSpec, popular: int) -> dict[str, Any]:
    """Types of the graph's inputs; rows and distinct ids vary from step to step without a new trace."""
    shapes: dict[str, tuple[list[int | None], Any]] = {
        "features": ([None, len(spec.names)], tf.uint16),
        "label_windows": ([None, spec.labels, len(spec.label_names)], tf.uint16),
        "label_mask": ([None, spec.labels], tf.float32),
        "popular_mask": ([None, popular], tf.float32),
        "other_mask": ([None, 1], tf.float32),
        "target": ([None], tf.int32),
        "weight": ([None], tf.float32),
        "engaged": ([None], tf.float32),
        "engaged_shift": ([None], tf.float32),
        "engaged_weight": ([None], tf.float32),
        "seed": ([2], tf.int32),
    }
    for name in TABLES:
        shapes[f"{name}_rows"] = ([None], tf.int32)
        shapes[f"{name}_at"] = ([None], tf.int32)
    return {name: tf.TensorSpec(shape, kind, name=name) for name, (shape, kind) in shapes.items()}
