"""Compares the model with simple baselines: all of them score each row before any learns from it.

**A miss counts as a miss.** A predictor assigns shares p, which add up to 1, to its candidates. Let m be its
probability of a miss. A category that is a candidate then has the probability (1 - m) p. The other known categories
share m equally with one slot for all unknown categories. If there is no candidate, m is 1. So each predictor is one
distribution over the same outcomes, and log losses are comparable.

m is the escape probability of prediction by partial matching (Cleary and Witten 1984). Its estimate over the earlier
rows is (misses + 1/2) / (rows + 1) (Krichevsky and Trofimov 1981). New and known users have separate estimates.

Sums are kept since the beginning and with the half-life of `Evaluation`. Each durable version stores them and the popular
categories of the last hour.

The predictors of a row's category, before it is known:

    model      the candidates that serving has, by their logits; the last slot of training is not among them
    popular    all categories by their clicks over all users, halved each hour of log time
    previous   the one category of the user's previous event
    came_next  what came next after that one, by the counts of transitions (`state/ranking/transitions.py`)

Each predictor ranks candidates and assigns them shares that add up to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, layout
from state.ranking.transitions import FOLLOWERS
from trainer.measures.evaluation import SOME, fade
from trainer.tables.index import I32, U64
from trainer.tables.lists import CountTable, Popular

F64 = npt.NDArray[np.float64]

PREDICTORS = ("model", "popular", "previous", "came_next")
BASELINES = PREDICTORS[1:]

NONE = -1
"""The rank of a category that is no candidate."""

LISTED = 64
"""Popular categories whose order is kept. Any other counted category gets the next rank."""

COUNTED = 8192
"""The most categories that are counted for the popular ones."""

SPAN_MS, KEPT = 300_000, 61_858
"""Every SPAN_MS (five minutes of log time) a count decays by KEPT / 65536 = 2 ** (-1 / 12): half after an hour."""


@layout("i4[::1], f8[::1], i4[::1]")
class CategoryPrediction(NamedTuple):
    """The prediction of one predictor for t rows.

    Attributes:
        rank: `[t]` int32, candidates before the row's category; NONE if it is no candidate.
        log_share: `[t]` float64, logarithm of its share; 0 if it is no candidate.
        candidates: `[t]` int32, the number of candidates.
    """

    rank: I32
    log_share: F64
    candidates: I32


def hourly_popular() -> Popular:
    """An empty counter for the popular categories of about the last hour."""
    return Popular(LISTED, COUNTED, SPAN_MS, KEPT)


def of_popular(popular: Popular, category: U64) -> CategoryPrediction:
    """The prediction by the clicks of about the last hour, for `[t]` categories.

    >>> popular = hourly_popular()
    >>> popular.update(np.array([5, 7, 7, 7], np.uint64), 0)
    >>> found = of_popular(popular, np.array([5, 9], np.uint64))
    >>> found.rank.tolist(), np.exp(found.log_share).tolist(), found.candidates.tolist()
    ([1, -1], [0.25, 1.0], [2, 2])
    """
    counts, rank, total = popular.standing_of(category)
    is_candidate = counts > 0
    return CategoryPrediction(
        np.where(is_candidate, rank, NONE).astype(np.int32),
        np.log(np.where(is_candidate, counts, max(total, 1)) / max(total, 1)),
        np.full(category.size, len(popular), np.int32),
    )


def of_previous(newest: U64, category: U64) -> CategoryPrediction:
    """The prediction by the category of the user's previous event (0 is none), for `[t]` categories.

    >>> found = of_previous(np.array([5, 5, 0], np.uint64), np.array([5, 7, 7], np.uint64))
    >>> found.rank.tolist(), found.candidates.tolist()
    ([0, -1, -1], [1, 1, 0])
    """
    return CategoryPrediction(
        np.where(newest == category, 0, NONE).astype(np.int32),
        np.zeros(category.size),
        (newest != 0).astype(np.int32),
    )


def of_came_next(transitions: CountTable, newest: I32, category: U64) -> CategoryPrediction:
    """The prediction by what came next after users' newest categories, whose `[t]` rows are `newest`."""
    lists, count = transitions.held, newest.size
    prediction = CategoryPrediction(np.empty(count, np.int32), np.empty(count), np.empty(count, np.int32))
    _came_next(newest, lists.counts, lists.ids, np.array(category), *prediction)
    return prediction


@compiled("i4[::1], i4[:, ::1], u8[:, ::1], u8[::1], i4[::1], f8[::1], i4[::1]")
def _came_next(at: I32, counts: I32, ids: U64, category: U64, rank: I32, log_share: F64, candidates: I32) -> None:
    for i in range(at.shape[0]):
        rank[i], log_share[i], candidates[i] = NONE, 0.0, 0
        if at[i] == 0:
            continue
        total, own_count = 0, 0
        for k in range(FOLLOWERS):
            count = counts[at[i], k]
            if count == 0:
                break
            candidates[i] += 1
            total += count
            if ids[at[i], k] == category[i]:
                rank[i], own_count = k, count
        if own_count > 0:
            log_share[i] = np.log(own_count / total)


Flags = npt.NDArray[np.bool_]

USERS = ("all", "new", "known")
"""Groups of users. A known user has a category in the windows, or was seen before and has a row."""

SUMS = ("rows", "log_loss", "log_loss_squares", "reciprocal_rank", "top1", "top5", "offered", "missed")
"""Sums over rows with a category.

In this order:

- number of rows
- log loss, and its squares
- 1 / (1 + rank), 0 for a miss
- rows whose category ranked first, and rows whose category was among the first five
- rows with candidates, and rows whose category was none of their candidates
"""

MEASURES = {"log_loss": "log_loss", "mrr": "reciprocal_rank", "top1": "top1", "top5": "top5", "missed": "missed"}
"""Metric names in manifests, and the entry of SUMS of which each is the mean."""

_MEANS = [(measure, SUMS.index(sum_name)) for measure, sum_name in MEASURES.items()]
_ROWS, _LOG_LOSS, _TOP1, _OFFERED, _MISSED = (
    SUMS.index(name) for name in ("rows", "log_loss", "top1", "offered", "missed")
)


@dataclass(frozen=True)
class StepScores:
    """The sums of a step, or of several steps together.

    Attributes:
        sums: `[predictor, users, sum]` float64, by PREDICTORS, USERS and SUMS.
        pairs: (User, item) pairs whose engagement was scored.
        positives: Of them, pairs that were clicked, or have a positive label.
    """

    sums: F64
    pairs: int
    positives: int
    predicted: float
    engagement_log_loss: float

    def __add__(self, other: StepScores) -> StepScores:
        return StepScores(
            self.sums + other.sums,
            self.pairs + other.pairs,
            self.positives + other.positives,
            self.predicted + other.predicted,
            self.engagement_log_loss + other.engagement_log_loss,
        )

    def total(self, name: str, predictor: str = "model", users: str = "all") -> float:
        """One entry of SUMS."""
        return float(self.sums[PREDICTORS.index(predictor), USERS.index(users), SUMS.index(name)])


class ScoredPairs(NamedTuple):
    """The (user, item) pairs whose engagement was scored.

    Attributes:
        scored: `[2 n]` bool, which pairs, of n rows and then of their negatives.
        logits: `[m]` float64, shifted as in training if negatives are drawn.
        predicted: `[m]` float64, their probabilities.
        positive: `[m]` bool, whether they were clicked, or labelled so.
        losses: `[m]` float64, their log losses.
    """

    scored: Flags
    logits: F64
    predicted: F64
    positive: Flags
    losses: F64


class Judged(NamedTuple):
    """The evaluated predictions for n rows, before anything learned from them.

    Attributes:
        targets: `[n]` bool, the rows with a category.
        rows: `[t, sum]` float64, SUMS of the model for each row with a category.
    """

    scores: StepScores
    targets: Flags
    rows: F64
    pairs: ScoredPairs


def no_sums(*first: int) -> npt.NDArray[Any]:
    """`[*first, predictor, users, sum]` float64 zeros."""
    return np.zeros((*first, len(PREDICTORS), len(USERS), len(SUMS)))


class Progressive:
    """The running metrics of the model and of the baselines."""

    def __init__(self) -> None:
        # [total and recent, predictor, users, sum]
        self._sums: F64 = no_sums(2)
        # [total and recent, all rows and rows of skipped steps]
        self._rows: F64 = np.zeros((2, 2))
        self.popular = hourly_popular()

    def score(
        self,
        predictions: Mapping[str, CategoryPrediction],
        targets: Flags,
        known: Flags,
        categories: int,
        pairs: ScoredPairs,
    ) -> Judged:
        """Scores the predictions for n rows before anything learns from them; has no side effects.

        `targets` are the rows with a category, `known` those of known users, both `[n]`. `categories` is the number of
        known ones, with those of these rows: otherwise new ones would cost nothing.
        """
        kinds, misses, sums = known[targets], miss_shares(self._sums[1]), no_sums()
        of_rows = [
            row_sums(predictions[name], kinds, misses[number], categories, sums[number])
            for number, name in enumerate(PREDICTORS)
        ]
        clicked, predicted, losses = int(pairs.positive.sum()), float(pairs.predicted.sum()), float(pairs.losses.sum())
        return Judged(StepScores(sums, pairs.losses.size, clicked, predicted, losses), targets, of_rows[0], pairs)

    def update(self, scores: StepScores, category: U64, log_ms: int, learned: bool = True) -> None:
        """Adds the scores of a step; updates the popular categories if the step was learned."""
        for sums in (self._sums, self._rows):
            fade(sums[1], int(scores.total("rows")))
        self._sums += scores.sums
        self._rows += (category.size, 0 if learned else category.size)
        if learned:
            self.popular.update(category, log_ms)

    def values(self) -> dict[str, float]:
        """The metrics by name: recent ones without a prefix, those since the beginning with the prefix `total.`.

        - log_loss, mrr, top1, top5 and missed of the model, also under `new.` and `known.`
        - the same under `baseline.<name>.`
        - `lift.top1` and `lift.log_loss`: the model's advantage over the best baseline
        - `skipped`: the share of rows that the guard skipped, which all other metrics include

        A metric without rows is absent.
        """
        values: dict[str, float] = {}
        for when, prefix in ((1, ""), (0, "total.")):
            # As lists, because each version has these values, and single elements of an array are slow.
            sums_of = self._sums[when].tolist()
            for predictor, name in enumerate(PREDICTORS):
                for users, kind in enumerate(USERS):
                    sums, where = sums_of[predictor][users], prefix + where_of(name, kind)
                    if sums[_ROWS] >= SOME:
                        values |= {f"{where}{measure}": sums[at] / sums[_ROWS] for measure, at in _MEANS}
            values |= {f"{prefix}lift.{name}": value for name, value in lift(self._sums[when, :, 0]).items()}
            rows, skipped = self._rows[when].tolist()
            if rows >= SOME:
                values[f"{prefix}skipped"] = skipped / rows
        return values

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums and the popular categories, to be stored in a version."""
        popular = {f"popular.{name}": value for name, value in self.popular.state().items()}
        return {"sums": self._sums.copy(), "rows": self._rows.copy(), **popular}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned. Metrics that a version of an older release lacks start from scratch."""
        self._sums, self._rows, self.popular = (
            no_sums(2),
            np.array(state.get("rows", np.zeros((2, 2)))),
            hourly_popular(),
        )
        if "sums" in state and state["sums"].shape == self._sums.shape:
            self._sums = np.array(state["sums"])
            self.popular.load({name: state[f"popular.{name}"] for name in ("ids", "counts", "hour")})


def miss_shares(sums: F64) -> F64:
    """`[..., 2]` float64: the miss probability for new users and for known ones, by recent `[..., users, sum]`."""
    recent = sums[..., 1:, :]
    without = recent[..., _ROWS] - recent[..., _OFFERED]
    return np.asarray((recent[..., _MISSED] - without + 0.5) / (recent[..., _OFFERED] + 1.0))


def where_of(predictor: str, users: str) -> str:
    """The prefix of a metric's name.

    >>> where_of("model", "all"), where_of("popular", "new")
    ('', 'baseline.popular.new.')
    """
    return ("" if predictor == "model" else f"baseline.{predictor}.") + ("" if users == "all" else f"{users}.")


def row_sums(prediction: CategoryPrediction, known: Flags, miss: F64, categories: int, sums: F64) -> F64:
    """SUMS of each of t rows, `[t, sum]` float64, which are added to `sums`, `[users, sum]`.

    `miss` is `[2]`: the miss probability if there are candidates, of new users and of known ones.

    >>> one, sums = np.ones(1), no_sums()[0]
    >>> hit = CategoryPrediction(one.astype(np.int32), np.log(one / 4), one.astype(np.int32) * 4)
    >>> rows = row_sums(hit, np.array([True]), np.array([0.5, 0.2]), 9, sums)
    >>> round(float(np.exp(-rows[0, 1])), 6), sums[:, 0].tolist()
    (0.2, [1.0, 0.0, 1.0])
    >>> missed = CategoryPrediction(-one.astype(np.int32), 0 * one, one.astype(np.int32) * 4)
    >>> round(float(np.exp(-row_sums(missed, np.array([True]), np.array([0.5, 0.2]), 9, sums)[0, 1])), 6)
    0.033333
    """
    rows = np.zeros((known.size, len(SUMS)))
    _judge(prediction, known, miss, categories, rows, sums)
    return rows


@compiled("CategoryPrediction, bool[::1], f8[::1], i8, f8[:, ::1], f8[:, ::1]")
def _judge(prediction: CategoryPrediction, known: Flags, miss: F64, categories: int, rows: F64, sums: F64) -> None:
    """Adds the rows to `sums`; the columns are in the order of SUMS."""
    rank, log_share, candidates = prediction
    for i in range(rank.shape[0]):
        kind = 1 if known[i] else 0
        hit, log_others = rank[i] >= 0, np.log(float(max(categories - candidates[i], 0)) + 1.0)
        log_loss = log_others
        if hit:
            log_loss = -np.log1p(-miss[kind]) - log_share[i]
            rows[i, 3] = 1.0 / (1.0 + rank[i])
            rows[i, 4] = 1.0 if rank[i] == 0 else 0.0
            rows[i, 5] = 1.0 if rank[i] < 5 else 0.0
        elif candidates[i] > 0:
            log_loss = log_others - np.log(miss[kind])
        rows[i, 0], rows[i, 1], rows[i, 2] = 1.0, log_loss, log_loss * log_loss
        rows[i, 6] = 1.0 if candidates[i] > 0 else 0.0
        rows[i, 7] = 0.0 if hit else 1.0
        for k in range(rows.shape[1]):
            sums[0, k] += rows[i, k]
            sums[1 + kind, k] += rows[i, k]


def lift(sums: F64) -> dict[str, float]:
    """The model's advantage over the best of the baselines, from `[predictor, sum]` float64; empty without rows.

    >>> sums = np.ones((len(PREDICTORS), len(SUMS)))
    >>> sums[:, _LOG_LOSS], sums[:, _TOP1] = (1.5, 4.0, 2.0, 3.0), (0.5, 0.1, 0.25, 0.2)
    >>> lift(sums)
    {'top1': 0.25, 'log_loss': 0.5}
    """
    if sums[0, _ROWS] < SOME:
        return {}
    means = sums / sums[:, _ROWS, None]
    best = means[[PREDICTORS.index(name) for name in BASELINES]]
    return {
        "top1": float(means[0, _TOP1] - best[:, _TOP1].max()),
        "log_loss": float(best[:, _LOG_LOSS].min() - means[0, _LOG_LOSS]),
    }
