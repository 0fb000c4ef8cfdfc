"""Shoppers and their replay: the drift is real, the stream is repeatable, and it stops when told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from deploy.replay import main
from deploy.replaying.shoppers import Clicks, Pace, Population, ShopperCrowd, encode, let_click
from state.config.sections import Events, Kafka
from state.config.settings import Settings
from state.log import Reader, Topics
from tests import forked

KafkaFactory = Callable[..., Kafka]
START_MS = 1_700_000_000_000
ROOT = Path(__file__).parents[2]


def crowd(
    users: int = 50, seed: int = 7, drift_s: float = 120.0, rate: float = 50.0, categories: int = 32
) -> ShopperCrowd:
    population = Population(users, categories, 400, drift_s)
    return ShopperCrowd(population, rate, seed, START_MS, Events().actions)


def by_user(clicks: Clicks) -> dict[str, list[tuple[int, str]]]:
    found = defaultdict(list)
    for user, category, at_ms in zip(clicks.users, clicks.categories, clicks.at_ms.tolist(), strict=True):
        found[user].append((at_ms, category))
    return found


def top(categories: list[str]) -> str:
    return Counter(categories).most_common(1)[0][0]


def test_the_same_seed_gives_the_same_clicks_however_they_are_asked_for() -> None:
    first, second, other = crowd().click(3000), crowd().click(3000), crowd(seed=8).click(3000)
    assert (first.users, first.items, first.categories, first.actions) == (
        second.users,
        second.items,
        second.categories,
        second.actions,
    )
    assert first.at_ms.tolist() == second.at_ms.tolist()
    assert first.categories != other.categories


def test_a_shopper_often_stays_in_the_category_of_the_last_click() -> None:
    clicks = crowd().click(30_000)
    same = total = 0
    for events in by_user(clicks).values():
        for (_, before), (_, after) in pairwise(events):
            same += before == after
            total += 1
    assert 0.5 < same / total < 0.85
    shuffled = np.random.default_rng(1).permutation(clicks.categories)
    assert (shuffled[1:] == shuffled[:-1]).mean() < 0.25


def test_tastes_drift() -> None:
    """Within `drift_s / 4` the top category mostly stays; after ten times that it mostly is another."""
    clicks = crowd(users=20, drift_s=120.0, rate=40.0).click(40_000)
    near, far = [], []
    for events in by_user(clicks).values():
        windows: dict[int, list[str]] = defaultdict(list)
        for at_ms, category in events:
            windows[(at_ms - START_MS) // 30_000].append(category)
        tops = {window: top(found) for window, found in windows.items() if len(found) >= 15}
        near += [tops[w] == tops[w + 1] for w in tops if w + 1 in tops]
        far += [tops[w] == tops[w + 10] for w in tops if w + 10 in tops]
    assert len(near) > 100
    assert len(far) > 100
    assert np.mean(near) > 0.6
    assert np.mean(far) < np.mean(near) - 0.25


def test_examples_in_documents_name_what_shoppers_click_in_the_first_minute() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))]
    named = {one for text in texts for one in re.findall(r"\b(?:shopper|item|category)-[0-9][0-9-]*\b", text)}
    settings = Settings()
    crowd = ShopperCrowd.from_settings(settings, None, settings.shoppers.rate, START_MS)
    clicks = crowd.click(round(60 * settings.shoppers.rate))
    assert {one.partition("-")[0] for one in named} == {"shopper", "item", "category"}
    assert named - {*clicks.users, *clicks.items, *clicks.categories} == set()


def test_events_carry_the_configured_field_names_and_time() -> None:
    clicks = Clicks(["ada"], ["i"], ["c"], ["view"], np.array([1_700_000_000_123]))
    names = replace(Events(), user="who", item="what", category="kind", action="did", time="when", time_unit="iso")
    piece = encode(clicks, names)
    assert piece.keys == [b"ada"]
    assert json.loads(piece.values[0]) == {
        "who": "ada",
        "what": "i",
        "kind": "c",
        "did": "view",
        "when": "2023-11-14T22:13:20.123Z",
    }
    (seconds,) = encode(clicks, replace(Events(), time_unit="s")).values
    assert json.loads(seconds)["time"] == 1_700_000_000


def test_replay_keeps_the_rate_the_limit_and_the_speed() -> None:
    sent: list[Clicks] = []
    clock = iter(np.arange(0.0, 1e6, 0.5))
    total = let_click(crowd(rate=100.0), sent.append, Pace(100.0, 2.0, 1000), Instant(), lambda: float(next(clock)))
    assert total == 1000
    assert [len(each) for each in sent] == [100] * 10
    assert sent[-1].at_ms[-1] == START_MS + 10_000


def test_a_head_start_is_due_at_once_and_then_the_rate_is_kept() -> None:
    sent: list[Clicks] = []
    clock = iter(range(100))
    let_click(crowd(rate=100.0), sent.append, Pace(100.0, 1.0, 900, 5.0), Instant(), lambda: float(next(clock)))
    assert [len(clicks) for clicks in sent] == [600, 100, 100, 100]


def test_replay_without_a_rate_sends_as_fast_as_it_can() -> None:
    sent: list[Clicks] = []
    assert let_click(crowd(rate=0.0), sent.append, Pace(0.0, limit=45_000), Instant()) == 45_000
    assert [len(each) for each in sent] == [20_000, 20_000, 5_000]


class Instant(threading.Event):
    """Nobody waits in a test of the clock."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


# Against a broker


def read_all(kafka: Kafka, count: int) -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    deadline = time.monotonic() + 20
    with Reader(kafka, kafka.clicks_topic) as reader:
        while len(events) < count and time.monotonic() < deadline:
            for batch in reader.poll(0.2):
                events += [json.loads(value or b"") for value in batch.values]
    return events


def flags(kafka: Kafka) -> list[str]:
    return [f"--kafka.bootstrap_servers={kafka.bootstrap_servers}", f"--kafka.clicks_topic={kafka.clicks_topic}"]


def test_the_command_makes_the_topic_and_sends_to_the_limit(
    kafka_settings: KafkaFactory, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kafka = kafka_settings()
    assert main(["--synthetic", "--rate", "0", "--limit", "300", *flags(kafka)]) == 0
    assert main(["--burst", "u", "c", "5", *flags(kafka)]) == 0
    assert main(["--synthetic", "--kafka.bootstrap_servrs=x"]) == 2
    output = capsys.readouterr()
    assert "sent 300 clicks" in output.out
    assert "sent 5 clicks of one user in c" in output.out
    assert "bootstrap_servrs" in output.err
    events = read_all(kafka, 305)
    assert len(events) == 305
    assert [event["category"] for event in events if event["user"] == "u"] == ["c"] * 5


def test_a_replay_stops_cleanly_on_sigterm(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    process = forked.Popen(
        [sys.executable, "-m", "deploy.replay", "--synthetic", "--rate", "500", *flags(kafka)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with Topics(kafka) as topics:
        deadline = time.monotonic() + 60
        sent = 0
        while sent == 0 and time.monotonic() < deadline:
            if kafka.clicks_topic in topics.names():
                sent = sum(end for _, end in topics.ends(kafka.clicks_topic).values())
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
        assert sent > 0
        assert output.startswith("sent ")
        total = sum(end for _, end in topics.ends(kafka.clicks_topic).values())
    assert f"sent {total} clicks" in output
