"""Progressive validation: each click is predicted from the clicks before it, and then learned.

For each record of the training log, in order:

1. Before each sampled click, the earlier clicks are added to the serving host's histories, and the changes of the
   trainer to its rows. Then the host recommends items. The baselines have learned the same clicks.
2. The trainer scores all rows of the record and then learns them. The baselines of interests and engagement predict
   and learn the rows one after another.

So histories are as fresh as in a loop without delay, and weights are at most one record old.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import MOST_CANDIDATES, ranked, recommend
from deploy.serving.answers.predictor import Predictor, Stores
from deploy.serving.answers.query import EXCLUSIONS, Exclusion, Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.following.clicks import Upkeep
from deploy.serving.host_files import program_path
from evaluation.baselines import (
    CategoryRows,
    ClickRates,
    ItemClick,
    Numbers,
    UserPast,
    category_baselines,
    item_baselines,
)
from evaluation.measures import OURS
from springtide_client.answers import Reason
from state.attributes.values import AttributeStore
from state.compiled import mixed
from state.config.settings import Settings
from state.events.identity import Salt
from state.features.spec import Events, FeatureSpec
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.metrics import ApplierMetrics
from state.microbatch.batch import MicroBatch, happened, in_log_time, trained
from state.process.environment import wall_ms
from state.ranking.item_scores import SOURCES, scores_without
from state.registry.manifest import Draft, Kind, LogRange, complete
from state.rows.store import RowStore
from trainer.engine.report import Report
from trainer.engine.step import Trainer
from trainer.measures.evaluation import fade
from trainer.measures.progressive import SUMS, CategoryPrediction, miss_shares, no_sums, row_sums
from trainer.versions import checkpoint

KEPT_VERSIONS = 2


class ServingHost:
    """The stores of one host, in its own `paths.state`, and the code that answers from them. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        spec: FeatureSpec,
        salt: Salt,
        program: bytes,
        attributes: AttributeStore | None = None,
    ) -> None:
        folder = settings.serving_dir
        self._spec, self._salt, self._digest = spec, salt, hashlib.sha256(program).hexdigest()
        self.rows = RowStore(folder / ROWS)
        self.histories = HistoryStore(folder / HISTORIES, settings.features.history)
        programs = folder / PROGRAMS
        programs.mkdir(exist_ok=True)
        program_path(programs, self._digest).write_bytes(program)
        metrics = ApplierMetrics(CollectorRegistry())
        self._upkeep = Upkeep(self.histories, spec.reach_ms(settings.events), settings.history, metrics, wall_ms)
        self._version, self._per_category = 0, settings.serving.per_category
        impressions = {*settings.labels.impressions}
        self._impressions = [n for n, name in enumerate(settings.events.actions) if name in impressions]
        self.sources = ItemSources(self.histories, self.rows)
        self.predictor = Predictor(
            Stores(self.rows, self.histories, attributes), settings, salt, wall_ms, pseudonym=int
        )

    def click(self, users: U64, events: Events) -> None:
        """Commits clicks as one commit of the applier does: `[m]` uint64 pseudonyms and `[m]` EVENT."""
        if not len(users):
            return
        extras = self._upkeep.news(events, {}, int(events["at_ms"].max()))
        self.histories.commit(Appends.of(users, events), (), extras)

    def follow(self) -> None:
        """Lets the worker's candidate sources read everything new."""
        while self.sources.read_more():
            pass

    def serve(self, tensors: Mapping[str, Any], whole: bool = False) -> None:
        """Applies the next version; answers use it from now on.

        `tensors` is its content, as in a registry. If `whole` is True, it is a base instead of the changes since the
        previous version.
        """
        kind: Kind = "base" if whole else "delta"
        parent = None if whole else self._version
        about = (self._spec.digest, self._digest, self._salt.fingerprint)
        draft = Draft(kind, 1, parent, LogRange(), (), 1, 1, 1, 1, *about)
        manifest = complete(draft, self._version + 1, ((1, self._version),), {})
        self._version += 1
        self.rows.apply(manifest, tensors, wall_ms(), follow=True)
        self.rows.drop({self._version - KEPT_VERSIONS})
        while self.rows.tidy():
            pass

    def recommend(
        self, user: int, at_ms: int, wanted: WantedItems, context: Mapping[str, str] = MappingProxyType({})
    ) -> list[tuple[int, Reason]]:
        """Returns the items and reasons of a worker's answer to `/v1/recommendations` for a pseudonym at a time."""
        query = Query(str(user), context=context, at_ms=at_ms)
        wanted = wanted._replace(per_category=self._per_category)
        about = self.predictor, self.sources, query, wanted, self._impressions
        if (items := ranked(*about)) is not None:
            return items
        return [(int(item.id, 16), item.reason) for item in finished(recommend(*about)).items]

    def ranks_without(self, item: int, most: int) -> dict[str, int]:
        """By source the rank of an item, from 0, had the latest recommendation lacked this source of candidates.

        The weights stay the same. The rank is -1 if the item would not be among the best `most`.
        """
        work = self.sources.work
        at = np.flatnonzero(work.items[: work.size[0]] == np.uint64(item))
        ranks = {}
        for source, name in enumerate(SOURCES):
            scores = scores_without(source, work)
            rank = int((scores > scores[at[0]]).sum()) if at.size and np.isfinite(scores[at[0]]) else most
            ranks[f"without {name}"] = rank if rank < most else -1
        return ranks

    def close(self) -> None:
        """Closes the stores."""
        self.histories.close()
        self.rows.close()


F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Flags = NDArray[np.bool_]

SHOWN = 20
ABSENT = -1
"""The rank of an item that is not in a list."""
INTERESTS = ("top1", "top5", "log_loss")
_COLUMNS = [SUMS.index(name) for name in INTERESTS]


class Plan(NamedTuple):
    """Which clicks are evaluated.

    Attributes:
        every: About one in `every` evaluated clicks is a request for recommendations; 0 for none.
    """

    begin: int = 0
    every: int = 1
    seed: int = 7

    def asks(self, offsets: I64) -> Flags:
        """Which clicks are requests, `[n]` bool: those whose hash is divisible by `every`."""
        if not self.every:
            return np.zeros(offsets.size, np.bool_)
        seed = np.uint64(self.seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
        hashes = mixed(offsets.astype(np.uint64) + seed)
        chosen: Flags = (hashes % np.uint64(self.every) == 0) & (offsets >= self.begin)
        return chosen


def clicks_of(settings: Settings, item: NDArray[Any], label: NDArray[Any], action: NDArray[Any]) -> Flags:
    """Which of n events are clicks on an item; an impression is not one unless its label says so."""
    impressions = {*settings.labels.impressions}
    clickable = np.array([name not in impressions for name in settings.events.actions], np.bool_)
    clicks: Flags = (item != 0) & ~(label < 0.5) & clickable[action]
    return clicks


class Judged(NamedTuple):
    """Predicted rows of n events, in the order of the log.

    Attributes:
        evaluated: `[n]` bool; the others were only learned.
        flag: `[n]` bool: of interests, whether the user had earlier clicks; of engagement, whether it was clicked.
        scores: By predictor, float64: of interests `[n, 3]`, `INTERESTS`; of engagement `[n]`, the click probability.
    """

    users: U64
    at_ms: I64
    evaluated: Flags
    flag: Flags
    scores: dict[str, F64]


class RequestOf(NamedTuple):
    """The click that a request precedes."""

    user: int
    item: int
    at_ms: int
    context: Mapping[str, str]


class Asked(NamedTuple):
    """One request for recommendations as of a click.

    Attributes:
        seen: Whether the user had an event with the clicked item before.
        history: Number of the user's clicks before.
        ranks: By predictor, the rank of the clicked item in the list, from 0; ABSENT if the list lacks it.
        unseen_ranks: Likewise for lists without items that the user has seen; empty if the item was seen.
        candidate: The source that proposed the clicked item to the ranking; empty if none did.
        hit: The source of the clicked item in our list; empty without a hit.
        unseen_hit: Likewise in our list without seen items.
        without: As `ranks`, of our list and of those that lack one source of candidates; empty without an item score.
    """

    user: int
    at_ms: int
    seen: bool
    history: int
    ranks: dict[str, int]
    unseen_ranks: dict[str, int]
    candidate: str
    hit: str
    unseen_hit: str
    without: dict[str, int]


@dataclass
class Lists:
    """The recommended lists of one kind of request.

    `items` are by predictor; `listed` and ranked `candidates` are by source.
    """

    items: dict[str, set[int]] = field(default_factory=dict)
    listed: Counter[str] = field(default_factory=Counter)
    candidates: Counter[str] = field(default_factory=Counter)


class ProgressiveValidation:
    """Predicts and learns the records of a log in order. Used by one thread.

    Args:
        contexts: By id the name and the text of each value of a context field.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: Trainer,
        host: ServingHost | None,
        plan: Plan,
        contexts: Mapping[int, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        self._trainer, self._host, self._plan, self._contexts = trainer, host, plan, contexts
        self._settings = settings
        self._past: dict[int, UserPast] = {}
        self._item_baselines = item_baselines()
        self._category_baselines = category_baselines()
        self._sums = {baseline.name: no_sums()[0] for baseline in self._category_baselines}
        self._rates, self._categories, self._items = ClickRates(), Numbers(), Numbers()
        self._first, self._changed = True, True
        self.interests, self.engagements, self.asked = list[Judged](), list[Judged](), list[Asked]()
        self.lists, self.unseen_lists = Lists(), Lists()

    def take(self, batch: MicroBatch) -> Report | None:
        """Takes one record of the training log; returns the report of the step, None if no row is learned."""
        # 1.
        if self._host is not None:
            self._ask(batch.take(happened(batch.kind)))
        # 2.
        learned = in_log_time(batch)
        learned = learned.take(trained(learned.kind))
        if not len(learned):
            return None
        report = self._trainer.step(learned)
        self._changed = True
        self._judge(learned, report)
        return report

    def _ask(self, batch: MicroBatch) -> None:
        assert self._host is not None
        events = events_of(batch, batch.header.ranges)
        clicks = clicks_of(self._settings, batch.item, batch.label, batch.action)
        learned = 0
        for row in np.flatnonzero(clicks & self._plan.asks(batch.offset)).tolist():
            self._learn(batch, events, clicks, learned, row)
            learned = row
            context = dict(
                self._contexts[identity] for identity in batch.context[row].tolist() if identity in self._contexts
            )
            request = RequestOf(int(batch.user[row]), int(batch.item[row]), int(batch.at_ms[row]), context)
            self._request(request)
        self._learn(batch, events, clicks, learned, len(batch))

    def _learn(self, batch: MicroBatch, events: Events, clicks: Flags, first: int, after: int) -> None:
        if first == after:
            return
        assert self._host is not None
        part = slice(first, after)
        self._host.click(batch.user[part], events[part])
        columns = (batch.user, batch.item, batch.category, batch.at_ms, clicks)
        for user, item, category, at_ms, is_click in zip(*(column[part].tolist() for column in columns), strict=True):
            past = self._past.get(user)
            if past is None:
                past = self._past[user] = UserPast()
            if is_click:
                click = ItemClick(item, category, at_ms)
                for baseline in self._item_baselines:
                    baseline.learn(click, past)
                past.category = category or past.category
                past.clicks += 1
            if item:
                past.items.append(item)
                past.seen.add(item)

    def _request(self, request: RequestOf) -> None:
        assert self._host is not None
        if self._changed:
            changes = checkpoint.served(self._trainer)
            self._host.serve(checkpoint.full(self._trainer) if self._first else changes, whole=self._first)
            self._first = self._changed = False
        self._host.follow()
        past = self._past.get(request.user, UserPast())
        seen = request.item in past.seen
        wanted = WantedItems(MOST_CANDIDATES)
        proposed = dict(self._host.recommend(request.user, request.at_ms, wanted, request.context))
        self.lists.candidates.update(proposed.values())
        ranking = self._trainer.item_ranking
        without = self._host.ranks_without(request.item, SHOWN) if ranking is not None and ranking.served() else {}
        ranks, hit = self._ranks(request, past, frozenset(), self.lists)
        unseen_ranks, unseen_hit = (
            ({}, "") if seen else self._ranks(request, past, frozenset(EXCLUSIONS), self.unseen_lists)
        )
        self.asked.append(
            Asked(
                request.user,
                request.at_ms,
                seen,
                past.clicks,
                ranks,
                unseen_ranks,
                proposed.get(request.item, ""),
                hit,
                unseen_hit,
                {OURS: ranks[OURS], **without} if without else {},
            )
        )

    def _ranks(
        self, request: RequestOf, past: UserPast, exclude: frozenset[Exclusion], lists: Lists
    ) -> tuple[dict[str, int], str]:
        assert self._host is not None
        wanted = WantedItems(SHOWN, None, exclude)
        answer = self._host.recommend(request.user, request.at_ms, wanted, request.context)
        lists.listed.update(reason for _, reason in answer)
        proposals = {OURS: [item for item, _ in answer]}
        for baseline in self._item_baselines:
            proposed = baseline.propose(past)
            if exclude:
                proposed = (item for item in proposed if item not in past.seen)
            proposals[baseline.name] = list(islice(proposed, SHOWN))
        ranks = {}
        for name, items in proposals.items():
            lists.items.setdefault(name, set()).update(items)
            ranks[name] = items.index(request.item) if request.item in items else ABSENT
        return ranks, answer[ranks[OURS]][1] if ranks[OURS] >= 0 else ""

    def _judge(self, batch: MicroBatch, report: Report) -> None:
        order = report.order
        targets = np.concatenate([judged.targets for judged in report.judged])
        rows = order[targets]
        evaluated = batch.opened >= self._plan.begin
        self._judge_interests(batch, rows, evaluated, np.concatenate([judged.rows for judged in report.judged]))
        labelled = ~np.isnan(batch.label)
        if labelled.any():
            self._judge_engagement(batch, report, labelled, evaluated)

    def _judge_interests(self, batch: MicroBatch, rows: I64, evaluated: Flags, own_scores: F64) -> None:
        if not rows.size:
            return
        # Baselines learn in the order of the log.
        rows, own_scores = np.sort(rows), own_scores[np.argsort(rows, kind="stable")]
        known = batch.recent_categories[rows, 0] != 0
        numbered = CategoryRows(
            self._categories.of(batch.category[rows]),
            self._categories.of(batch.recent_categories[rows, :5]),
            batch.at_ms[rows],
        )
        scores, categories = {OURS: own_scores[:, _COLUMNS]}, len(self._trainer.tables["category"])
        for baseline in self._category_baselines:
            predicted = baseline.predict(numbered, len(self._categories))
            scores[baseline.name] = self._scored(baseline.name, predicted, known, categories)
        self.interests.append(Judged(batch.user[rows], numbered.at_ms, evaluated[rows], known, scores))

    def _scored(self, name: str, predicted: CategoryPrediction, known: Flags, categories: int) -> F64:
        """Returns INTERESTS of each row; a category that is not a candidate costs the same as for the model."""
        sums = self._sums[name]
        miss = miss_shares(sums)
        fade(sums, known.size)
        return row_sums(predicted, known, miss, categories, sums)[:, _COLUMNS]

    def _judge_engagement(self, batch: MicroBatch, report: Report, labelled: Flags, evaluated: Flags) -> None:
        clicked = batch.label >= 0.5
        rates = self._rates.predict(
            np.maximum(self._items.of(batch.item), 0),
            clicked,
            np.array(batch.at_ms),
            max(len(self._items), 1),
        )
        own_predictions, first = np.full(len(batch), np.nan), 0
        for judged in report.judged:
            order = report.order[first : first + judged.targets.size]
            is_scored = judged.pairs.scored[: order.size]
            own_predictions[order[is_scored]] = judged.pairs.predicted[: int(is_scored.sum())]
            first += order.size
        rows = np.flatnonzero(labelled & ~np.isnan(own_predictions))
        scores = {name: predicted[rows] for name, predicted in {OURS: own_predictions, **rates}.items()}
        self.engagements.append(Judged(batch.user[rows], batch.at_ms[rows], evaluated[rows], clicked[rows], scores))
