"""Counts of items and of interests: rankings and corrections that follow the log, whatever its cut and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from state.config.settings import Settings
from state.features.spec import EVENT, FeatureSpec
from state.microbatch.batch import MicroBatch
from state.ranking import item_scores
from state.ranking.item_lists import CLICKED, EVERYTHING, FOLLOWED, LIVES, NEXT_CATEGORY, VISITED
from state.ranking.item_scores import (
    ALL,
    COLUMNS,
    EVERYTHING_AT,
    INTERESTS_AT,
    UNSEEN,
    WEIGHTS,
    Reads,
    Workspace,
    sources_of,
)
from tests.bench.recorded import SOURCE, Recorded, micro_batches, plain
from trainer.engine.engine import Scores
from trainer.engine.interest_counts import InterestCounts
from trainer.engine.item_ranking import ItemRanking
from trainer.engine.report import Update
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content

ROWS = 256
CATEGORIES = np.arange(101, 109, dtype=np.uint64)


def clicks(rows: int, repeats: float, seed: int = 5) -> Recorded:
    """Readers who each click an item that is popular now, or with some probability one of their latest three again."""
    chance = np.random.default_rng(seed)
    users = chance.integers(1, 60, rows).astype(np.uint64)
    events = np.zeros(rows, EVENT)
    events["at_ms"], events["offset"] = 1_800_000_000_000 + np.arange(rows) * 20_000, np.arange(rows)
    events["topic"] = SOURCE.topic
    latest: dict[int, list[int]] = {}
    for row, user in enumerate(users.tolist()):
        mine = latest.setdefault(user, [])
        # Every 30 minutes ten new items replace the old ones.
        item = 1000 + row // 90 * 10 + int(chance.integers(10))
        if mine and chance.random() < repeats:
            item = mine[-1 - int(chance.integers(min(3, len(mine))))]
        mine.append(item)
        events["item"][row] = item
        events["category"][row] = CATEGORIES[item % 8]
    return plain(users, events)


def batches(rows: int, repeats: float, size: int = ROWS) -> Iterator[MicroBatch]:
    yield from micro_batches(clicks(rows, repeats), FeatureSpec(), (1.0,) * 4, size)


def count(ranking: ItemRanking, batch: MicroBatch) -> None:
    """Counts a batch, of which a model knows nothing."""
    rows = len(batch)
    recent = np.where(batch.recent_categories != 0, 0.0, -1e9).astype(np.float32)
    zeros = np.zeros((rows, 8), np.float32)
    none = np.zeros(rows, np.float32)
    scores = Scores(recent, zeros, zeros[:, :4], none, none.astype(np.int32), np.tile(none, 2), np.tile(none, 2))
    ranking.see(batch, scores, np.zeros((rows, 4), np.uint64), CATEGORIES)
    ranking.count()


def learned(repeats: float, rows: int = 12 * ROWS, size: int = ROWS) -> ItemRanking:
    ranking = ItemRanking(Settings())
    for batch in batches(rows, repeats, size):
        count(ranking, batch)
    return ranking


def test_lists_hold_what_was_clicked_under_each_key() -> None:
    ranking, rows = learned(0.3, 2 * ROWS), clicks(2 * ROWS, 0.3)
    lists, items = ranking.tables[CLICKED], rows.events["item"]
    held = lists.held.take(lists.find(EVERYTHING))
    assert {*held.ids[held.ids != 0].tolist()} == {*items.tolist()}
    np.testing.assert_allclose(held.counts[:, 2].sum(), held.totals[:, 2].sum(), rtol=1e-4)
    under = {*items[rows.events["category"] == CATEGORIES[3]].tolist()}
    of_category = lists.held.ids[lists.find(CATEGORIES[3:4])[0]]
    assert {*of_category[of_category != 0].tolist()} == under
    # What followed an item of a user.
    user = int(rows.users[0])
    mine = items[rows.users == user].tolist()
    followed = ranking.tables[FOLLOWED]
    after = followed.held.ids[followed.find(np.array(mine[:1], np.uint64))[0]].tolist()
    assert next(item for item in mine if item != mine[0]) in after
    visited = ranking.tables[VISITED]
    assert visited.held.ids[visited.find(np.array([user], np.uint64))[0], 0] == mine[-1]


def test_a_forgotten_user_has_no_list() -> None:
    ranking = learned(0.3, 2 * ROWS)
    user = np.array([7], np.uint64)
    assert ranking.tables[VISITED].has(user) and ranking.tables[VISITED].forget(user) == 1
    assert not ranking.tables[VISITED].has(user)


def test_a_setting_turns_the_lists_off() -> None:
    settings = Settings()
    assert ItemRanking.of(replace(settings, trainer=replace(settings.trainer, item_ranking="engagement"))) is None


def test_a_private_log_has_no_lists() -> None:
    settings = Settings()
    assert ItemRanking.of(replace(settings, privacy=replace(settings.privacy, epsilon=1.0))) is None


def own_is_best(ranking: ItemRanking) -> float:
    """The share of users whose best item is one of their own."""
    work, phi, shares = Workspace.empty(), np.zeros(COLUMNS, np.float32), []
    lists, followed, visited = (ranking.tables[name] for name in (CLICKED, FOLLOWED, VISITED))
    reads = Reads(
        lists.find(EVERYTHING), np.full(len(EVERYTHING), EVERYTHING_AT, np.int32), np.ones(len(EVERYTHING), np.float32)
    )
    at_s = int(visited.held.at_s.max())
    for row in visited.find(np.arange(1, 60, dtype=np.uint64)).tolist():
        after = followed.find(visited.held.ids[row, :2].copy())
        held = (lists.held, followed.held, visited.held)
        found = item_scores.gather(*held, reads, after, row, at_s, phi, work)
        item_scores.score(ranking.state()["weights"][ALL], phi, found, work)
        item_scores.clear(found, work)
        shares.append(work.own[np.argmax(work.scores[:found])] > 0)
    return float(np.mean(shares))


@pytest.mark.parametrize(("repeats", "least", "most"), [(0.0, 0.0, 0.3), (0.9, 0.7, 1.0)])
def test_the_share_of_repeats_is_learned(repeats: float, least: float, most: float) -> None:
    ranking = learned(repeats, 24 * ROWS)
    assert ranking.served()
    assert least <= own_is_best(ranking) <= most


def repeated(ranking: ItemRanking, rows: int = 6 * ROWS) -> Iterator[MicroBatch]:
    """Users who each click their newest item over and over."""
    users = 1 + np.arange(rows, dtype=np.uint64) % np.uint64(59)
    visited = ranking.tables[VISITED]
    events = np.zeros(rows, EVENT)
    events["at_ms"] = int(visited.held.at_s.max(initial=1_800_000_000)) * 1000 + 1000 * np.arange(1, rows + 1)
    events["offset"], events["topic"] = 1_000_000 + np.arange(rows), SOURCE.topic
    newest = visited.held.ids[visited.find(users), 0]
    events["item"] = np.where(newest == 0, users + np.uint64(1_000_000), newest)
    events["category"] = CATEGORIES[events["item"] % 8]
    yield from micro_batches(plain(users, events), FeatureSpec(), (1.0,) * 4, ROWS)


def test_repeats_teach_nothing_about_new_items() -> None:
    ranking = learned(0.3)
    before = ranking.state()["weights"]
    assert (before[ALL] != before[UNSEEN]).any()
    for batch in repeated(ranking):
        count(ranking, batch)
    after = ranking.state()["weights"]
    np.testing.assert_array_equal(after[UNSEEN], before[UNSEEN])
    assert (after[ALL] != before[ALL]).any()


def test_a_log_of_repeats_alone_serves_the_weights_for_all_items() -> None:
    ranking = ItemRanking(Settings())
    for batch in repeated(ranking):
        count(ranking, batch)
    served = ranking.served()[WEIGHTS]
    np.testing.assert_array_equal(served[UNSEEN], served[ALL])
    assert (ranking.state()["weights"][UNSEEN] != served[UNSEEN]).any()


def test_an_item_outside_of_the_likeliest_categories_has_the_rest_of_their_probability() -> None:
    ranking = learned(0.3, 2 * ROWS)
    assert ranking.served()
    lists, followed, visited = (ranking.tables[name] for name in (CLICKED, FOLLOWED, VISITED))
    keys = np.array([*EVERYTHING, 0, CATEGORIES[0], *[0] * (item_scores.INTERESTS - 1)], np.uint64)
    reads = Reads(lists.find(keys), sources_of(0), np.full(len(keys), 0.6, np.float32))
    work, after, phi = Workspace.empty(), np.zeros(2, np.int32), np.zeros(COLUMNS, np.float32)
    held = (lists.held, followed.held, visited.held)
    found = item_scores.gather(*held, reads, after, 0, int(visited.held.at_s.max()), phi, work)
    shares = np.expm1(work.features[: item_scores.SHARES, :found]).reshape(-1, LIVES, found)
    likely = np.isin(work.items[:found], lists.held.ids[reads.rows[len(EVERYTHING) + 1]])
    assert 0 < likely.sum() < found
    np.testing.assert_allclose(shares[INTERESTS_AT][:, ~likely], 0.4 * shares[EVERYTHING_AT][:, ~likely], rtol=1e-3)
    assert (shares[INTERESTS_AT][:, likely] > 0.4 * shares[EVERYTHING_AT][:, likely]).all()


SPEC = FeatureSpec()
RECORD_ROWS, MANY = 128, 60


def with_interests(interests: str = "counts") -> Settings:
    made = Settings()
    return replace(made, trainer=replace(made.trainer, device="cpu", interests=interests))


def clicks_on_the_popular(records: int, size: int = RECORD_ROWS, seed: int = 5) -> Iterator[MicroBatch]:
    """Clicks on the five categories that are popular now; every 40 minutes others are."""
    chance, rows = np.random.default_rng(seed), records * RECORD_ROWS
    events = np.zeros(rows, EVENT)
    events["at_ms"], events["offset"] = 1_800_000_000_000 + np.arange(rows) * 10_000, np.arange(rows)
    events["topic"] = SOURCE.topic
    now = np.random.default_rng(seed + 1).permuted(np.tile(np.arange(MANY), (rows, 1))[::240], axis=1)
    category = now[np.arange(rows) // 240, chance.integers(0, 5, rows)]
    events["category"], events["item"] = 1000 + category, 5000 + 10 * category + chance.integers(0, 4, rows)
    users = chance.integers(1, 80, rows).astype(np.uint64)
    yield from micro_batches(plain(users, events), SPEC, (1.0,) * 4, size)


def trained(records: int, interests: str = "counts", size: int = RECORD_ROWS) -> Trainer:
    trainer = Trainer(with_interests(interests), SPEC)
    for batch in clicks_on_the_popular(records, size):
        trainer.step(batch)
    return trainer


def known_top5(trainer: Trainer) -> float:
    return trainer.measures.progressive.values()["total.known.top5"]


def test_interests_follow_what_is_clicked_now() -> None:
    alone, counted = (known_top5(trained(30, interests)) for interests in ("model", "counts"))
    assert counted > alone + 0.05


def test_a_restart_changes_no_bit_and_the_cut_of_the_log_no_count() -> None:
    whole, other = trained(4), Trainer(with_interests(), SPEC)
    for number, batch in enumerate(clicks_on_the_popular(4)):
        if number == 2:
            tensors, other = checkpoint.full(other), Trainer(with_interests(), SPEC)
            checkpoint.load(other, tensors)
        other.step(batch)
    assert content.digest(checkpoint.full(other)) == content.digest(checkpoint.full(whole))
    cut = trained(4, size=100)
    for name in (CLICKED, FOLLOWED, VISITED, NEXT_CATEGORY):
        assert cut.tables[name].digest() == whole.tables[name].digest(), name


def test_the_model_itself_learns_the_same_as_without_the_correction() -> None:
    counted, alone = trained(4), trained(4, "model")
    for name, weight in alone.model.weights().items():
        assert counted.model.weights()[name].tobytes() == weight.tobytes()
    assert all(counted.tables[name].digest() == table.digest() for name, table in alone.tables.items())


def test_a_score_has_the_correction_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(6)
    *_, batch = clicks_on_the_popular(7)
    first = batch.rows(slice(0, 1))
    scored = trainer.score(first)
    corrected: list[np.ndarray] = []
    assert trainer.interest_counts is not None
    learn = trainer.interest_counts.learn

    def kept(*given: Any) -> list[Update]:
        updates = learn(*given)
        corrected.append(updates[0].scores.popular_logits)
        return updates

    monkeypatch.setattr(trainer.interest_counts, "learn", kept)
    trainer.step(first)
    np.testing.assert_allclose(scored["popular_logits"], corrected[0], rtol=1e-5, atol=1e-5)


def test_impressions_without_a_click_are_neither_counted_nor_learned() -> None:
    trainer = Trainer(with_interests(), SPEC)
    for batch in clicks_on_the_popular(2):
        trainer.step(replace(batch, label=np.zeros(len(batch), np.float32)))
    assert trainer.interest_counts is not None and not trainer.interest_counts.learned
    assert not any(len(trainer.tables[name]) for name in (CLICKED, FOLLOWED, VISITED))
    table = trainer.tables[NEXT_CATEGORY]
    assert not {*table.known().tolist()} - {*EVERYTHING.tolist()}


@pytest.mark.parametrize("off", ["model", "private"])
def test_without_the_setting_or_with_a_privacy_budget_there_are_no_lists(off: str) -> None:
    made = with_interests("model" if off == "model" else "counts")
    if off == "private":
        made = replace(made, privacy=replace(made.privacy, epsilon=1.0))
    assert InterestCounts.of(made, SPEC) is None
