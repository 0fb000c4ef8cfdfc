"""How good recommendations are, how much of the best they find, and how fast they and rankings are.

Taobao's clicks in one pass of the core of `springtide evaluate`, in steps of 1,024 rows: before some of the clicks the
user is asked for 20 items. Then rows like the learned ones, and clicks, of so many made-up items are added. Of the 20
items nearest to a user among all of them it is said how many the index finds; answers and rankings are timed.

    python -m tests.bench.recommend [--steps 82] [--asked 1600] [--items 1000000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy.serving.answers.items import SIMILAR_CANDIDATES, rank, recommend, similar
from deploy.serving.answers.query import Cap, NamedItem, Query, WantedItems
from deploy.serving.answers.queue import finished
from deploy.serving.host_files import MOST_ITEMS
from evaluation.measures import OURS
from evaluation.progressive import Plan, ProgressiveValidation, ServingHost
from evaluation.recording import SALT
from evaluation.report import recommendation_tables
from springtide_client.answers import Recommendations, SimilarItems
from state.config.settings import Settings
from state.events.identity import public_id
from state.features.spec import EVENT, FeatureSpec
from state.process.environment import wall_ms
from tests.bench.quality import analysis
from tests.bench.recorded import SOURCE, STEP_ROWS, micro_batches, read_clicks
from tests.bench.report import Figure, Stages, report
from trainer.engine.step import Trainer
from trainer.versions import checkpoint
from trainer.versions.lowering import build

SHOWN = 20
USUAL = WantedItems(SHOWN)
STAGES = Stages("recommend")


class Bench(ServingHost):
    """A serving host that also finds similar items and ranks."""

    def recommended(self, user: int, wanted: WantedItems = USUAL) -> Recommendations:
        """A worker's whole answer as of now, with probabilities."""
        query = Query(str(user), at_ms=wall_ms())
        return finished(recommend(self.predictor, self.sources, query, wanted, self._impressions))

    def near(self, user: int) -> SimilarItems:
        """Similar items as of now."""
        return similar(self.predictor, self.sources.near, Query(str(user), top=0), WantedItems(SHOWN))

    def query(self, user: int) -> Any:
        """What items are near to for a user."""
        with self.predictor.reading() as reader:
            prepared = self.predictor.prepare([Query(str(user))], reader)
            return prepared.version.program.predict(prepared.inputs)["item_query"][0].copy()


class Trained(NamedTuple):
    """A host that serves what was learned in one pass.

    Attributes:
        host: The host.
        validation: The pass.
        rows: `[k, dim]` float32, the learned rows of items.
        users: The pseudonyms of all users.
    """

    host: Bench
    validation: ProgressiveValidation
    rows: Any
    users: list[int]


def trained_host(settings: Settings, spec: FeatureSpec, steps: int, asked: int) -> Trained:
    """Trains in one pass over Taobao's clicks, and asks for recommendations before about `asked` of them."""
    STAGES.say("the model")
    recorded = read_clicks()
    trainer = Trainer(settings, spec, analysis(recorded, spec, settings, steps))
    host = Bench(settings, spec, SALT, build(trainer.ranker()))
    plan = Plan(every=max(1, steps * STEP_ROWS // asked) if asked else 0)
    validation = ProgressiveValidation(settings, trainer, host, plan)
    batches = micro_batches(recorded, spec, settings.events.action_weights)
    for number, batch in enumerate(islice(batches, steps)):
        STAGES.say("clicks", f"{number * STEP_ROWS:,} of {len(recorded.users):,}")
        validation.take(batch)
    learned = checkpoint.full(trainer)
    host.serve(learned, whole=True)
    return Trained(host, validation, learned["item.rows"], np.unique(recorded.users[: steps * STEP_ROWS]).tolist())


def grow(host: Bench, items: int, like: Any) -> None:
    """Rows of so many more items, like some that were learned, in the categories that there are, and a click of each."""
    rng, now_ms = np.random.default_rng(5), wall_ms()
    made = np.array([public_id(f"made-{number}") for number in range(items)], np.uint64)
    categories = rng.choice(np.unique(read_clicks().events["category"]), items)
    for first in range(0, items, MOST_ITEMS):
        STAGES.say("clicks of made-up items", f"{first:,} of {items:,}")
        events = np.zeros(min(MOST_ITEMS, items - first), EVENT)
        events["item"], events["category"] = made[first : first + MOST_ITEMS], categories[first : first + MOST_ITEMS]
        events["at_ms"], events["topic"] = now_ms, SOURCE.topic
        host.click(np.full(len(events), 1, np.uint64), events)
        host.follow()
    rows = like[rng.integers(0, len(like), items)] * rng.normal(1.0, 0.2, (items, 1))
    rows = (rows + rng.normal(0, 0.3 * like.std(), rows.shape)).astype(np.float32)
    STAGES.say("rows of made-up items")
    host.serve({"item.ids": made, "item.rows": rows})


def timed(act: Callable[[int], object], times: int) -> dict[str, float]:
    """Wall and processor time of an act, in ms."""
    act(0)
    took, used = [], []
    for number in range(times):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        act(number)
        took.append(1000 * (time.perf_counter() - wall_s))
        used.append(1000 * (time.process_time() - cpu_s))
    found = {"p50": np.percentile(took, 50), "p99": np.percentile(took, 99), "cpu": np.mean(used)}
    return {name: float(value) for name, value in {**found, "cpu p99": np.percentile(used, 99)}.items()}


def recall(host: Bench, users: list[int]) -> float:
    """Of the 20 items nearest to a user by all rows, those that the index finds."""
    parts = list[tuple[Any, Any]]()
    following: int | None = 0
    with host.rows.reader() as reader:
        served = reader.served()
        assert served is not None
        while following is not None:
            ids, rows, following = reader.rows_from("item", following, 100_000, served)
            parts.append((ids, rows))
    every, found = [np.concatenate(part) for part in zip(*parts, strict=True)], []
    for user in users:
        query = host.query(user)
        products = every[1] @ query
        best = every[0][np.argpartition(-products, SHOWN)[:SHOWN]]
        found.append(len({*best.tolist()} & {*host.sources.near.nearest(query, SHOWN)}) / SHOWN)
    return float(np.mean(found))


def main(steps: int, asked: int, items: int) -> None:
    """Prints and writes the figures."""
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        settings = Settings()
        settings = replace(settings, paths=replace(settings.paths, state=str(Path(folder))))
        spec = FeatureSpec.from_settings(settings)
        host, validation, rows, users = trained_host(settings, spec, steps, asked)
        grow(host, items - len(rows), rows)
        users = users[:200]
        STAGES.say("the index of items")
        begun_s = time.process_time()
        host.follow()
        index_s = time.process_time() - begun_s
        STAGES.say("times")
        found = recall(host, users[:100])
        queries = [host.query(user) for user in users]
        nearest = timed(lambda number: host.sources.near.nearest(queries[number % len(users)], SIMILAR_CANDIDATES), 300)
        similars = timed(lambda number: host.near(users[number % len(users)]), 300)
        recommending = timed(lambda number: host.recommended(users[number % len(users)]), 300)
        listed = [NamedItem(f"made-{number}") for number in range(1000)]
        ranking = timed(
            lambda number: finished(rank(host.predictor, Query(str(users[number % len(users)])), listed)), 50
        )
        ads = [one._replace(bid=0.1 + number % 7, cap=Cap(3, 86_400.0)) for number, one in enumerate(listed)]
        bidding = timed(lambda number: finished(rank(host.predictor, Query(str(users[number % len(users)])), ads)), 50)
        fresh = timed(lambda number: first_click(host, number), 50)
        host.close()
    scores = {score.name: score.figures["recall@20"] for score in recommendation_tables(validation.asked)[0].scores}
    shares = {name: figure.value or 0.0 for name, figure in scores.items()}
    report(
        "recommend",
        {
            "recall@20": Figure(shares.pop(OURS), "ratio", f">= {shares['own items']:.4f}"),
            **{f"recall@20, {name}": Figure(share, "ratio") for name, share in shares.items()},
            "recall of the 20 items nearest of all": Figure(found, "ratio", ">= 0.95"),
            "processor time of the index of all items": Figure(index_s, "s"),
            "nearest items p50": Figure(nearest["p50"], "ms"),
            "similar items p99": Figure(similars["p99"], "ms"),
            "recommendations p50": Figure(recommending["p50"], "ms"),
            "recommendations p99": Figure(recommending["p99"], "ms", "<= 15"),
            "processor time of recommendations": Figure(recommending["cpu"], "ms", "<= 2"),
            "processor time of recommendations, p99": Figure(recommending["cpu p99"], "ms", "<= 15"),
            "1,000 ranked items p50": Figure(ranking["p50"], "ms"),
            "1,000 ranked items p99": Figure(ranking["p99"], "ms"),
            "processor time of 1,000 ranked items": Figure(ranking["cpu"], "ms"),
            "processor time of 1,000 items with bids and caps, of that without": Figure(
                bidding["cpu"] / ranking["cpu"], "ratio", "<= 1.5"
            ),
            "first click committed to recommended, p99": Figure(fresh["p99"], "ms", "<= 2000"),
        },
        {"steps": steps, "asked": len(validation.asked), "items": items, "data": "Taobao UserBehavior"},
    )


def first_click(host: Bench, number: int) -> None:
    """A new item's first click, until somebody else who asks for its category is answered it."""
    events = np.zeros(1, EVENT)
    item = public_id(f"new-{time.time_ns()}-{number}")
    events["item"], events["category"], events["topic"] = item, public_id(f"category-{number}"), SOURCE.topic
    events["at_ms"] = wall_ms()
    host.click(np.full(1, 1, np.uint64), events)
    host.follow()
    wanted = WantedItems(SHOWN, f"category-{number}")
    while f"{item:016x}" not in {one.id for one in host.recommended(3, wanted).items}:
        pass


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=82, help="steps of 1,024 rows, at least 1")
    flags.add_argument("--asked", type=int, default=1600, help="clicks before which the user is asked")
    flags.add_argument("--items", type=int, default=1_000_000, help="items at the times, made-up ones included")
    given = flags.parse_args()
    main(given.steps, given.asked, given.items)
