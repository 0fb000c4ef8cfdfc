"""Real recordings through the real replay, Kafka and stream: every row is a training row or a dead letter.

The data is read where it lies, beside the repository.
"""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from state.accounts import StreamAccount, check_accounts
from state.attributes.values import SIDES, band, tables_of
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import fields_of
from state.events.identity import public_id
from state.history.store import HistoryStore
from state.log import Topics
from state.microbatch.batch import MicroBatch
from tests import forked
from tests.conftest import KafkaFactory
from tests.streaming.streams import deduplicated, following, headers_of, running, until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
DATA = ROOT.parent / "shared" / "data"
TAOBAO = DATA / "taobao" / "UserBehavior.csv"
KUAIRAND = DATA / "kuairand" / "impressions.parquet"
USERS = DATA / "kuairand" / "user_features_pure.csv"
VIDEOS = DATA / "kuairand" / "video_features_basic_pure.csv"


def needs(path: Path) -> pytest.MarkDecorator:
    place = f"../shared/data/{path.relative_to(DATA)}"
    return pytest.mark.skipif(not path.exists(), reason=f"the data set is not here: {place} beside the repository")


def settings_of(example: str, kafka_settings: KafkaFactory, state: Path) -> Settings:
    """The settings file of an example, with the test's Kafka and state directory."""
    kafka = kafka_settings()
    flags = {
        "--kafka.bootstrap_servers": kafka.bootstrap_servers,
        "--kafka.clicks_topic": kafka.clicks_topic,
        "--kafka.dead_letters_topic": kafka.dead_letters_topic,
        "--kafka.microbatches_topic": kafka.microbatches_topic,
        "--kafka.group": kafka.group,
        "--kafka.clicks_partitions": "2",
        "--paths.state": str(state),
        "--stream.metrics_port": "0",
    }
    if load(["--config", str(EXAMPLES / example)], env={}).attributes.user_topic:
        with Topics(kafka) as topics:
            for side in SIDES:
                flags[f"--attributes.{side}_topic"] = topic = f"{kafka.clicks_topic}.{side}s"
                topics.ensure(topic, 1, {"cleanup.policy": "compact"})
    words = [word for pair in flags.items() for word in pair]
    return load(["--config", str(EXAMPLES / example), *words], env={})


def replay(settings: Settings, path: Path, *words: str) -> str:
    """Runs `springtide replay`; returns its last line."""
    return springtide(settings, "replay", str(path), *words)[-1]


def springtide(settings: Settings, *words: str) -> list[str]:
    """Runs a command; returns its lines."""
    done = forked.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        env={**os.environ, **settings.environment()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout).splitlines()


def sent(settings: Settings) -> int:
    """Records of the clicks topic."""
    with Topics(settings.kafka) as topics:
        return sum(end for _, end in topics.ends(settings.kafka.clicks_topic).values())


def streamed(settings: Settings, log: Path) -> tuple[list[MicroBatch], dict[str, int]]:
    """Lets a stream process take all clicks; returns its micro-batches and its account."""
    positions = sent(settings)
    with following(settings.kafka, settings.kafka.microbatches_topic) as batches:

        def reached() -> bool:
            _, marks = deduplicated(batches.poll())
            return sum(marks.values()) == positions

        with running(settings, log) as stream:
            until(reached, f"all {positions} clicks in the training log")
            assert stream.stop() == 0, stream.lines
        found, _ = deduplicated(batches.poll())
    store = HistoryStore(settings.stream_dir / "histories", map_bytes=1 << 30)
    totals = dict(store.totals)
    store.close()
    return found, totals


@pytest.mark.nightly
@needs(TAOBAO)
def test_taobao_its_cut_line_and_its_stray_are_dead_letters(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    settings = settings_of("taobao.toml", kafka_settings, tmp_path / "state")
    lines = TAOBAO.read_bytes().splitlines()
    # Two runs: the second goes on where the first one's limit was.
    assert "row 3,000 of 84,476; the same command resumes" in replay(settings, TAOBAO, "--limit", "3000")
    assert sent(settings) == 3000
    last = replay(settings, TAOBAO)
    assert "84,474 clicks, 2 dead letters (1 implausible_time by events.max_age_s, 1 wrong_type); complete" in last
    assert sent(settings) == len(lines) == 84_476
    assert "are in" in replay(settings, TAOBAO)
    assert sent(settings) == 84_476

    batches, totals = streamed(settings, tmp_path / "log")
    assert totals == {"positions": 84_476, "rows": 84_474, "dead": 2, "filtered": 0, "absent": 0}
    assert check_accounts(StreamAccount(**totals)) == ()
    letters = headers_of(settings.kafka, settings.kafka.dead_letters_topic)
    assert Counter(letter["reason"] for letter in letters) == {"implausible_time": 1, "wrong_type": 1}

    actions = np.concatenate([batch.columns["action"] for batch in batches])
    at_ms = np.concatenate([batch.columns["at_ms"] for batch in batches])
    assert len(actions) == 84_474
    named = Counter(settings.events.actions[action] for action in actions.tolist())
    # One row is of September 2017, 70 days before the others.
    kept = [row for row in (line.split(b",") for line in lines[:-1]) if int(row[4]) >= 1_511_000_000]
    assert named == Counter(row[3].decode() for row in kept)
    # Moved, not stretched.
    seconds = np.sort([int(row[4]) for row in kept])
    assert (np.diff(np.sort(at_ms)) == np.diff(seconds) * 1000).all()


@pytest.mark.nightly
@needs(KUAIRAND)
def test_kuairand_clicks_are_labels_outcomes_stay_out_and_attributes_are_those_of_its_tables(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    settings = settings_of("kuairand.toml", kafka_settings, tmp_path / "state")
    users, videos = springtide(settings, "attributes", "--users", str(USERS), "--items", str(VIDEOS))
    assert "sent 27,285 records of users to" in users and users.endswith("0 refused rows; complete")
    assert "sent 7,583 records of items to" in videos and videos.endswith("0 refused rows; complete")
    limit = 5000
    assert "5,000 clicks, 0 dead letters; row 5,000" in replay(
        settings, KUAIRAND, "--limit", str(limit), "--sort", "assume"
    )
    batches, totals = streamed(settings, tmp_path / "log")
    assert totals == {"positions": limit, "rows": limit, "dead": 0, "filtered": 0, "absent": 0}

    columns = ["user_id", "video_id", "is_click", "tab", "tag", "time_ms"]
    recorded = pq.read_table(KUAIRAND, columns=columns).slice(0, limit).to_pydict()
    labels = np.concatenate([batch.columns["label"] for batch in batches])
    assert Counter(labels.tolist()) == Counter(map(float, recorded["is_click"]))
    contexts = np.concatenate([batch.columns["context"] for batch in batches])
    assert contexts.shape == (limit, 1)
    assert Counter(contexts[:, 0].tolist()) == Counter(public_id(f"tab={tab}") for tab in recorded["tab"])
    # Several tags are one category, as written.
    categories = np.concatenate([batch.columns["category"] for batch in batches])
    assert Counter(categories.tolist()) == Counter(map(public_id, recorded["tag"]))
    assert any("," in name for batch in batches for name in batch.header.names.values())

    tables = tables_of(settings.attributes)
    for side, path, key in (("user", USERS, "user_id"), ("item", VIDEOS, "video_id")):
        with path.open(newline="") as file:
            known = {row[key]: row for row in csv.DictReader(file)}
        fields = fields_of(getattr(settings.attributes, f"{side}_fields"))
        wanted = [
            tuple(
                tables[side].ids(
                    [
                        None if not (text := known[str(one)][field.path])
                        else band(float(text), field.edges) if field.edges else text
                        for field in fields
                    ]
                )
            )
            if str(one) in known
            else tuple(tables[side].unknown.tolist())
            for one in recorded[key]
        ]  # fmt: skip
        joined = np.concatenate([batch.columns[f"{side}_attributes"] for batch in batches])
        assert Counter(map(tuple, joined.tolist())) == Counter(wanted)
    announced = {name for batch in batches for name in batch.header.names.values()}
    assert {"full_active", "high_active"} <= announced


def test_the_examples_are_settings_and_their_document_shows_their_commands() -> None:
    document = (ROOT / "docs" / "how-to" / "recordings.md").read_text()
    for path in sorted(EXAMPLES.glob("*.toml")):
        load(["--config", str(path)], env={})
        assert f"springtide replay --config deploy/examples/{path.name}" in document
    assert "springtide attributes --config deploy/examples/kuairand.toml --users" in document
