"""Recorded and made clicks as the micro-batches that the stream would make of them.

Taobao's UserBehavior.csv (user, item, category, behaviour, seconds) and
KuaiRand-Pure's impressions with their clicks, each beside the repository in
`../shared/data`; see `deploy/examples` for the settings that read them. Beside
them the clicks of synthetic shoppers and of readers of a newspaper.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from deploy.replaying.news import NewsReaders
from deploy.replaying.shoppers import SEED, Clicks, Population, ShopperCrowd
from state.attributes.values import AttributeTable
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import fields_of
from state.events.identity import context_id, context_text
from state.features.mask import Mask
from state.features.spec import EVENT, LABELLED, POSITIVE, FeatureSpec
from state.microbatch.batch import Header, MicroBatch
from state.positions import Range, Source
from tests.vectors import vectorise

ROOT = Path(__file__).resolve().parents[2]
CLICKS = ROOT / "../shared/data/taobao/UserBehavior.csv"
KUAIRAND_SETTINGS = ROOT / "deploy/examples/kuairand.toml"
KUAIRAND = ROOT / "../shared/data/kuairand"
ACTIONS = {"pv": 0, "fav": 1, "cart": 2, "buy": 3}
STEP_ROWS = 1024
START_MS = 1_790_000_000_000
SOURCE = Source("7a" * 16, 0)

U64 = npt.NDArray[np.uint64]


def hashed(text: str) -> int:
    """An id of 64 bits, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") or 1


@dataclass(frozen=True)
class Recorded:
    """Events in order of time, and what came with them.

    Attributes:
        users: `[n]` uint64.
        events: `[n]` EVENT.
        label: `[n]` float32, NaN where there is none.
        context: `[n, K]` uint64.
        user_attributes: `[n, Au]` uint64.
        item_attributes: `[n, Ai]` uint64.
        attributes: Names of the attributes of users and of items.
        measured: `[n]` bool, rows that the figures speak of.
    """

    users: U64
    events: npt.NDArray[Any]
    label: npt.NDArray[np.float32]
    context: U64
    user_attributes: U64
    item_attributes: U64
    attributes: tuple[tuple[str, ...], tuple[str, ...]]
    measured: npt.NDArray[np.bool_]


def read_clicks(path: Path = CLICKS) -> Recorded:
    """Taobao's clicks; a cut-off last line is left out."""
    with path.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if len(row) == 5 and row[3] in ACTIONS]
    rows.sort(key=lambda row: int(row[4]))
    ids = {text: hashed(text) for row in rows for text in row[:3]}
    events = np.zeros(len(rows), EVENT)
    events["at_ms"] = [int(row[4]) * 1000 for row in rows]
    events["item"] = [ids[row[1]] for row in rows]
    events["category"] = [ids[row[2]] for row in rows]
    events["action"] = [ACTIONS[row[3]] for row in rows]
    events["offset"] = np.arange(len(rows))
    events["topic"] = SOURCE.topic
    return plain(np.array([ids[row[0]] for row in rows], np.uint64), events)


def plain(users: U64, events: npt.NDArray[Any]) -> Recorded:
    """Clicks of which nothing else is known."""
    none = np.zeros((users.size, 0), np.uint64)
    return Recorded(
        users=users,
        events=events,
        label=np.full(users.size, np.nan, np.float32),
        context=none,
        user_attributes=none,
        item_attributes=none,
        attributes=((), ()),
        measured=np.ones(users.size, np.bool_),
    )


def made_clicks(settings: Settings, clicks: int, seed: int = SEED, drift_s: float = 120.0) -> Recorded:
    """The first clicks of synthetic shoppers, whose tastes drift."""
    shoppers, actions = settings.shoppers, settings.events.actions
    crowd = ShopperCrowd(Population(shoppers.users, drift_s=drift_s), shoppers.rate, seed, START_MS, actions)
    return as_recorded(crowd.click(clicks), settings)


def news_clicks(settings: Settings, clicks: int = 120_000, seed: int = 7) -> Recorded:
    """Five days of clicks of synthetic readers of a newspaper; the category is the story."""
    readers = NewsReaders(seed=seed, begin_ms=START_MS, actions=settings.events.actions, by_story=True)
    return as_recorded(readers.click(clicks), settings)


def as_recorded(made: Clicks, settings: Settings) -> Recorded:
    """Synthetic clicks as events."""
    events = np.zeros(len(made), EVENT)
    events["at_ms"], events["offset"], events["topic"] = made.at_ms, np.arange(len(made)), SOURCE.topic
    events["item"], events["category"] = _hashed(made.items), _hashed(made.categories)
    actions = {name: number for number, name in enumerate(settings.events.actions)}
    events["action"] = [actions[name] for name in made.actions]
    return plain(_hashed(made.users), events)


def kuairand_settings() -> Settings:
    """Those of `deploy/examples/kuairand.toml`."""
    return load(["--config", str(KUAIRAND_SETTINGS)], env={})


def read_impressions(settings: Settings, folder: Path = KUAIRAND) -> Recorded:
    """KuaiRand's impressions, each user, video and millisecond once; measured are 28 to 30 April 2022."""
    names = settings.events
    table = pq.read_table(folder / "impressions.parquet").to_pydict()
    order = np.argsort(np.array(table["time_ms"]), kind="stable").tolist()
    keys = list(zip(table["user_id"], table["video_id"], table["time_ms"], strict=True))
    firsts: dict[tuple[int, int, int], int] = {}
    for row in order:
        firsts.setdefault(keys[row], row)
    order = [*firsts.values()]
    column = {name: [values[row] for row in order] for name, values in table.items()}
    events = np.zeros(len(order), EVENT)
    events["at_ms"] = column["time_ms"]
    events["item"] = _hashed(column[names.item])
    events["category"] = _hashed(column[names.category])
    label = np.array(column[names.label], np.float32)
    events["flags"] = LABELLED | np.where(label >= 0.5, POSITIVE, 0)
    events["offset"] = np.arange(len(order))
    events["topic"] = SOURCE.topic
    users = AttributeTable("user", fields_of(settings.attributes.user_fields))
    items = AttributeTable("item", fields_of(settings.attributes.item_fields))
    return Recorded(
        users=_hashed(column[names.user]),
        events=events,
        label=label,
        context=np.array(
            [[context_id(name, context_text(value)) for value in column[name]] for name in names.context], np.uint64
        ).T.copy(),
        user_attributes=_joined(users, folder / "user_features_pure.csv", "user_id", column[names.user]),
        item_attributes=_joined(items, folder / "video_features_basic_pure.csv", "video_id", column[names.item]),
        attributes=(users.names, items.names),
        measured=np.array([20220428 <= date <= 20220430 for date in column["date"]]),
    )


def _hashed(values: Sequence[Any]) -> U64:
    ids = {value: hashed(str(value)) for value in set(values)}
    return np.array([ids[value] for value in values], np.uint64)


def _joined(table: AttributeTable, path: Path, key: str, wanted: list[Any]) -> U64:
    """The ids of the attributes of each of `wanted`, `[n, A]`."""
    with path.open(newline="") as lines:
        known = {row[key]: table.ids(table.read(json.dumps(row).encode())) for row in csv.DictReader(lines)}
    unknown = table.unknown.tolist()
    return np.array([known.get(str(one), unknown) for one in wanted], np.uint64)


def micro_batches(
    recorded: Recorded,
    spec: FeatureSpec,
    weights: tuple[float, ...],
    step_rows: int = STEP_ROWS,
    known: int | None = None,
    begin: int = 0,
) -> Iterator[MicroBatch]:
    """Micro-batches with the windows that each event saw; with `known`, only the first so many events are ever seen.

    The first `begin` events are in histories, and in no micro-batch.
    """
    users, events = recorded.users, recorded.events
    order = np.argsort(users, kind="stable")
    ids, starts = np.unique(users[order], return_index=True)
    histories: Mapping[int, Any] = dict(zip(ids.tolist(), np.split(events[order], starts[1:]), strict=True))
    seen = dict.fromkeys(histories, 0) | Counter(users[:begin].tolist())
    for first in range(begin, users.size, step_rows):
        part = slice(first, min(first + step_rows, users.size))
        rows = part.stop - first
        vectors: Any = spec.empty(rows)
        for row, (user, at_ms) in enumerate(zip(users[part].tolist(), events["at_ms"][part].tolist(), strict=True)):
            vector = vectorise(histories[user], at_ms, seen[user], Mask.NONE, spec)
            for columns, values in zip(vectors, vector, strict=True):
                columns[row] = values
            seen[user] += known is None or first + row < known
        ranges = (Range(SOURCE, first, part.stop, rows=rows),)
        yield MicroBatch(
            Header(spec.digest, "0" * 16, ranges, 0, attributes=recorded.attributes),
            user=users[part],
            item=events["item"][part].copy(),
            category=events["category"][part].copy(),
            action=events["action"][part].copy(),
            at_ms=events["at_ms"][part].copy(),
            label=recorded.label[part].copy(),
            weight=np.array(weights, np.float32)[events["action"][part]],
            source=np.zeros(rows, np.uint16),
            offset=np.arange(first, part.stop),
            context=recorded.context[part].copy(),
            **vectors._asdict(),
            user_attributes=recorded.user_attributes[part].copy(),
            item_attributes=recorded.item_attributes[part].copy(),
        )
