"""How good recommendations are, how much of the best they find, and how fast they and rankings are.

Taobao's clicks in one pass: after each tenth step of 1,024 rows the trainer's version and the clicks so far go into a
serving host's stores, and users of the next step are asked for 20 items as of their next click. A hit is the item of
that click among them, beside the 20 most clicked items so far and the user's own 20 latest. Then rows like the learned
ones, and notes of clicks, of so many made-up items are added. Of the 20 items nearest to a user among all of them it is
said how many the index finds; answers and rankings are timed.

    python -m tests.bench.recommend [--steps 82] [--asked 200] [--items 1000000]
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.serving.answers.item_index import ItemSources
from deploy.serving.answers.items import SIMILAR_CANDIDATES, Recommendations, SimilarItems, rank, recommend, similar
from deploy.serving.answers.predictor import Predictor
from deploy.serving.answers.query import Cap, NamedItem, Query, WantedItems
from deploy.serving.following.remembered import Remembered
from deploy.serving.item_feed import MOST_ITEMS, ItemFeed
from deploy.serving.version_files import program_path
from state.config.settings import Settings
from state.events.identity import load_salt, public_id, user_id
from state.features.spec import EVENT, FeatureSpec
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES, PROGRAMS, ROWS
from state.process.wall_clock import wall_ms
from state.registry.manifest import LogRange, Manifest
from state.rows.store import RowStore
from tests.bench.quality import analysis
from tests.bench.recorded import SOURCE, STEP_ROWS, Recorded, micro_batches, read_clicks
from tests.bench.report import Figure, Stages, report
from trainer.engine.step import Trainer
from trainer.versions import checkpoint
from trainer.versions.program import build

SHOWN = 20
EVERY = 10
USUAL = WantedItems(SHOWN)
STAGES = Stages("recommend")


@dataclass
class Hits:
    """Of so many answers, those with the item of the next click in them; and the rows that were learned in the end."""

    asked: int = 0
    ours: int = 0
    popular: int = 0
    latest: int = 0
    rows: Any = None


class ServingHost:
    """The stores of one host with what answers from them, filled as the applier does."""

    def __init__(self, settings: Settings, spec: FeatureSpec) -> None:
        folder = settings.serving_dir
        self._salt, self._spec = load_salt(settings.salt_path), spec
        self.rows = RowStore(folder / ROWS, settings.serving.map_gb << 30)
        self.histories = HistoryStore(folder / HISTORIES, settings.features.history, settings.serving.map_gb << 30)
        self.programs = folder / PROGRAMS
        self.programs.mkdir()
        self._remembered = Remembered(self.histories, 90, 10_000_000)
        self._feed = ItemFeed(self.histories)
        self.sources = ItemSources(self.histories, self.rows)
        self.predictor = Predictor(self.rows, self.histories, self.programs, spec, self._salt, (), "wall", wall_ms)

    def click(self, users: Any, events: Any) -> None:
        """Takes clicks, as of one micro-batch."""
        clock_ms = int(events["at_ms"].max())
        found = self._remembered.news(events, {}, clock_ms)
        self.histories.commit(Appends.of(users, events), (), found | self._feed.news(events, found, clock_ms))
        self.follow()

    def follow(self) -> None:
        """Lets the worker read all that is not read yet."""
        while self.sources.turn():
            pass

    def serve(self, version: int, tensors: dict[str, Any], program: bytes) -> None:
        """Answers by a version from now on."""
        digest = hashlib.sha256(program).hexdigest()
        program_path(self.programs, digest).write_bytes(program)
        manifest = Manifest(
            version=version, kind="base", epoch=1, parent=None, visible=((1, version),), log=LogRange(),
            sources=((SOURCE, version),), steps=1, rows=1, created_at_ms=1, event_time_ms=1, spec=self._spec.digest,
            program=digest, salt=self._salt.fingerprint, mask_generation=0, metrics={}, environment={}, files={},
        )  # fmt: skip
        self.rows.apply(manifest, tensors, wall_ms(), follow=True)

    def recommended(self, user: str, at_ms: int | None = None, wanted: WantedItems = USUAL) -> Recommendations:
        """An answer of HTTP, without HTTP."""
        return finished(recommend(self.predictor, self.sources, Query(user, at_ms=at_ms), wanted))

    def near(self, user: str) -> SimilarItems:
        """Likewise of similar items."""
        return similar(self.predictor, self.sources.near, Query(user, top=0), WantedItems(SHOWN))

    def query(self, user: str) -> Any:
        """What items are near to for a user."""
        with self.predictor.reading() as reader:
            prepared = self.predictor.prepare([Query(user)], reader)
            return prepared.version.program.predict(prepared.inputs)["item_query"][0].copy()


def finished(steps: Generator[None, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def named(recorded: Recorded, salt: Any) -> tuple[Recorded, dict[int, str]]:
    """The clicks by users whose raw ids are known, and these ids by pseudonym."""
    found, at = np.unique(recorded.users, return_inverse=True)
    names = [f"user-{number}" for number in range(len(found))]
    users = np.array([user_id(salt, name) for name in names], np.uint64)
    return replace(recorded, users=users[at]), dict(zip(users.tolist(), names, strict=True))


def ask(host: ServingHost, hits: Hits, rows: Any, names: dict[int, str], clicks: Counter[int], latest: Any) -> None:
    """Asks as of each of some clicks, which nothing has learned from."""
    popular = {item for item, _ in clicks.most_common(SHOWN)}
    for user, event in rows:
        item, at_ms = int(event["item"]), int(event["at_ms"])
        found = host.recommended(names[user], at_ms).items
        hits.asked += 1
        hits.popular += item in popular
        hits.latest += item in latest.get(user, [])[-SHOWN:]
        hits.ours += f"{item:016x}" in {one["id"] for one in found}


def quality(host: ServingHost, settings: Settings, spec: FeatureSpec, steps: int, asked: int) -> Hits:
    """Trains in one pass and asks on the way."""
    STAGES.say("the model")
    recorded, names = named(read_clicks(), load_salt(settings.salt_path))
    trainer = Trainer(settings, spec, analysis(recorded, spec, settings, steps))
    program, hits, clicks = build(trainer.model), Hits(), Counter[int]()
    latest: dict[int, list[int]] = {}
    rng = np.random.default_rng(3)
    for number, batch in enumerate(micro_batches(recorded, spec, settings.events.action_weights)):
        if number >= steps:
            break
        part = slice(number * STEP_ROWS, number * STEP_ROWS + len(batch.user))
        users, events = recorded.users[part], recorded.events[part]
        if number and number % EVERY == 0:
            STAGES.say("clicks", f"{number * STEP_ROWS:,} of {len(recorded.users):,}")
            host.serve(number, checkpoint.full(trainer), program)
            host.follow()
            # A user's first click of the step: all clicks before it are known.
            _, first = np.unique(users, return_index=True)
            some = rng.choice(first, min(asked, len(first)), replace=False)
            ask(host, hits, [(int(users[row]), events[row]) for row in some], names, clicks, latest)
        trainer.step(batch)
        host.click(users, events)
        clicks.update(events["item"].tolist())
        for user, item in zip(users.tolist(), events["item"].tolist(), strict=True):
            mine = latest.setdefault(user, [])
            if item in mine:
                mine.remove(item)
            mine.append(item)
    learned = checkpoint.full(trainer)
    host.serve(steps, learned, program)
    hits.rows = learned["item.rows"]
    return hits


def grow(host: ServingHost, items: int, version: int, like: Any) -> None:
    """Rows of so many more items, like some that were learned, in the categories that there are, and a click of each."""
    rng, now_ms = np.random.default_rng(5), wall_ms()
    with host.rows.reader() as reader:
        served = reader.served()
    assert served is not None
    made = np.array([public_id(f"made-{number}") for number in range(items)], np.uint64)
    categories = rng.choice(np.unique(read_clicks().events["category"]), items)
    for first in range(0, items, MOST_ITEMS):
        STAGES.say("clicks of made-up items", f"{first:,} of {items:,}")
        events = np.zeros(min(MOST_ITEMS, items - first), EVENT)
        events["item"], events["category"] = made[first : first + MOST_ITEMS], categories[first : first + MOST_ITEMS]
        events["at_ms"], events["topic"] = now_ms, SOURCE.topic
        host.click(np.full(len(events), 1, np.uint64), events)
    rows = like[rng.integers(0, len(like), items)] * rng.normal(1.0, 0.2, (items, 1))
    rows = (rows + rng.normal(0, 0.3 * like.std(), rows.shape)).astype(np.float32)
    STAGES.say("rows of made-up items")
    manifest = Manifest(
        version=version + 1, kind="delta", epoch=1, parent=version, visible=((1, version + 1),), log=LogRange(),
        sources=((SOURCE, version),), steps=1, rows=1, created_at_ms=1, event_time_ms=1, spec=served.spec,
        program=served.program, salt=served.salt, mask_generation=0, metrics={}, environment={}, files={},
    )  # fmt: skip
    host.rows.apply(manifest, {"item.ids": made, "item.rows": rows}, now_ms, follow=True)


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


def recall(host: ServingHost, users: list[str]) -> float:
    """Of the 20 items nearest to a user by all rows, those that the index finds."""
    parts, following = list[tuple[Any, Any]](), 0
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
        host = ServingHost(settings, spec)
        hits = quality(host, settings, spec, steps, asked)
        grow(host, items - len(hits.rows), steps, hits.rows)
        STAGES.say("the index of items")
        begun_s = time.process_time()
        host.follow()
        index_s = time.process_time() - begun_s
        users = [f"user-{number}" for number in range(200)]
        STAGES.say("times")
        found = recall(host, users[:100])
        queries = [host.query(user) for user in users]
        nearest = timed(lambda number: host.sources.near.nearest(queries[number % 200], SIMILAR_CANDIDATES), 300)
        similars = timed(lambda number: host.near(users[number % 200]), 300)
        recommending = timed(lambda number: host.recommended(users[number % 200]), 300)
        listed = [NamedItem(f"made-{number}") for number in range(1000)]
        ranking = timed(lambda number: finished(rank(host.predictor, Query(users[number % 200]), listed)), 50)
        ads = [one._replace(bid=0.1 + number % 7, cap=Cap(3, 86_400.0)) for number, one in enumerate(listed)]
        bidding = timed(lambda number: finished(rank(host.predictor, Query(users[number % 200]), ads)), 50)
        fresh = timed(lambda number: first_click(host, number), 50)
        host.histories.close()
        host.rows.close()
    latest = hits.latest / hits.asked
    report(
        "recommend",
        {
            "hit rate at 20": Figure(hits.ours / hits.asked, "ratio", f">= {latest:.4f}"),
            "hit rate at 20, the user's own latest": Figure(latest, "ratio"),
            "hit rate at 20, most clicked items": Figure(hits.popular / hits.asked, "ratio"),
            "recall of the 20 items nearest of all": Figure(found, "ratio", ">= 0.95"),
            "processor time of the index of all items": Figure(index_s, "s"),
            "nearest items p50": Figure(nearest["p50"], "ms"),
            "similar items p99": Figure(similars["p99"], "ms"),
            "recommendations p50": Figure(recommending["p50"], "ms"),
            "recommendations p99": Figure(recommending["p99"], "ms", "<= 15"),
            "processor time of recommendations": Figure(recommending["cpu"], "ms"),
            "processor time of recommendations, p99": Figure(recommending["cpu p99"], "ms", "<= 15"),
            "1,000 ranked items p50": Figure(ranking["p50"], "ms"),
            "1,000 ranked items p99": Figure(ranking["p99"], "ms"),
            "processor time of 1,000 ranked items": Figure(ranking["cpu"], "ms"),
            "processor time of 1,000 items with bids and caps, of that without": Figure(
                bidding["cpu"] / ranking["cpu"], "ratio", "<= 1.5"
            ),
            "first click committed to recommended, p99": Figure(fresh["p99"], "ms", "<= 2000"),
        },
        {"steps": steps, "asked": hits.asked, "items": items, "data": "Taobao UserBehavior"},
    )


def first_click(host: ServingHost, number: int) -> None:
    """A new item's first click, until somebody else who asks for its category is answered it."""
    events = np.zeros(1, EVENT)
    item = public_id(f"new-{time.time_ns()}-{number}")
    events["item"], events["category"], events["topic"] = item, public_id(f"category-{number}"), SOURCE.topic
    events["at_ms"] = wall_ms()
    host.click(np.full(1, 1, np.uint64), events)
    wanted = WantedItems(SHOWN, f"category-{number}")
    while f"{item:016x}" not in {one["id"] for one in host.recommended("user-3", None, wanted).items}:
        pass


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--steps", type=int, default=82, help="steps of 1,024 rows, at least 11")
    flags.add_argument("--asked", type=int, default=200, help="users asked after each tenth step")
    flags.add_argument("--items", type=int, default=1_000_000, help="items at the times, made-up ones included")
    given = flags.parse_args()
    main(given.steps, given.asked, given.items)
