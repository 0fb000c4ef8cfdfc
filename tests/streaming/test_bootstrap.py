"""The bootstrap: real clicks in, constants and first labels out, once for each feature spec."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state.config.loading import load
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import SaltMismatch, SpringtideError, UnknownTopic, UnreachableBroker
from state.events.identity import load_salt
from state.features.spec import FeatureSpec
from state.log import PartitionBatch, Topics, Writer
from state.registry.registry import Registry
from state.registry.specs import fits
from state.statistics.anomalies import validate
from state.statistics.baselines import Baselines
from state.statistics.protos import by_name, frequencies
from streaming.bootstrap import ComputeWindows, Sample, Wanted, of_topic, open_sample, run
from streaming.preprocessing import CLIP, analysed, preprocessing_fn
from streaming.rows import Rows
from streaming.steps import Handle, ParseEvents
from tests.conftest import KafkaFactory

START_MS = 1_790_000_000_000


def silent(_: str) -> None:
    pass


def settings_of(kafka: object, state: Path, **flags: object) -> Settings:
    argv = ["--paths.state", str(state)]
    for name in ("bootstrap_servers", "clicks_topic"):
        argv += [f"--kafka.{name}", str(getattr(kafka, name))]
    for name, value in flags.items():
        argv += [f"--{name.replace('__', '.')}", str(value)]
    return load(argv, {})


def send_clicks(settings: Settings, clicks: int) -> None:
    drawn = np.random.default_rng(3)
    with Topics(settings.kafka) as topics, Writer(settings.kafka) as writer:
        topics.ensure(settings.kafka.clicks_topic, 2)
        for number in range(clicks):
            user = f"u{drawn.integers(40)}"
            event = {
                "user": user,
                "item": f"i{drawn.integers(90)}",
                "category": f"c{int(drawn.zipf(1.7)) % 12}",
                "action": "view",
                "time": START_MS + 1000 * number,
            }
            at = START_MS + 1000 * number
            writer.send(
                settings.kafka.clicks_topic, number % 2, user.encode(), json.dumps(event).encode(), timestamp_ms=at
            )
        writer.flush()


def rows_of(sample: Handle[Sample], batches: Iterable[list[PartitionBatch]]) -> list[Rows]:
    """What the steps of the job make of batches, one after the other, without Beam."""
    steps = ParseEvents(sample), ComputeWindows(sample)
    return [rows for one in batches for events in steps[0].process(one) for rows in steps[1].process(events)]


@pytest.fixture
def settings(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    made = settings_of(kafka_settings(), tmp_path / "state", bootstrap__min_rows=300, bootstrap__timeout_s=60)
    send_clicks(made, 400)
    return made


def test_one_that_up_started_waits_for_the_topic_and_the_first_clicks_become_constants_labels_and_names_once(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    settings = settings_of(kafka_settings(), tmp_path / "state", bootstrap__min_rows=300, bootstrap__timeout_s=600)
    with pytest.raises(UnknownTopic):
        run(settings, silent)
    said, asked = list[str](), list[float]()

    def clock() -> float:
        asked.append(time.time())
        # The second time it is asked because the topic is missing.
        if len(asked) == 2:
            send_clicks(settings, 400)
        return asked[-1]

    assert run(settings, said.append, Wanted(of_up=True), clock)
    assert re.fullmatch(r"400 clicks read in [\d.]+ s \([\d,]+ rows/s\)", said[-1])
    spec = FeatureSpec.from_settings(settings)
    registry = Registry(settings.registry_dir)
    assert registry.specs.names() == [spec.digest]
    about = registry.specs.spec(spec.digest)
    assert about["salt"] == load_salt(settings.salt_path).fingerprint
    assert FeatureSpec.from_json(about["spec"]) == spec
    clicks = [count for _, count in about["popular"]]
    assert clicks == sorted(clicks, reverse=True)
    assert sum(clicks) == 400
    assert len(set(clicks)) < len(clicks), "no two categories were clicked equally often: the tie is not tested"
    assert about["popular"] == sorted(about["popular"], key=lambda entry: (-entry[1], int(entry[0], 16)))
    assert {about["names"][label] for label, _ in about["popular"]} <= {f"c{number}" for number in range(12)}

    baseline = Baselines(settings.registry_dir).newest(spec.digest)
    assert baseline is not None and baseline.accepted.number == 0
    counted = by_name(baseline.statistics)
    assert sorted(frequencies(counted["category"]).values(), reverse=True) == clicks
    assert {f"features.{name}" for name in spec.names} <= {*counted}
    assert {*counted} == {feature.name for feature in baseline.schema.feature}
    assert not validate(baseline.statistics, baseline.schema, baseline.statistics).anomaly_info

    from trainer.versions.program import preprocessing_of

    transform = preprocessing_of(registry.specs.transform(spec.digest))
    with open_sample(settings, load_salt(settings.salt_path), lambda: 0.0, silent) as sample:
        ours = np.concatenate([rows.vectors.features for rows in rows_of(sample, of_topic(sample.context))]).astype(
            np.float32
        )
        clicked = Counter(sample.context.tally.names[label] for label, clicks in _popular(about) for _ in range(clicks))
        assert sum(clicked.values()) == sample.context.tally.clicks == 400
    scaled = transform(ours).numpy()
    logs = np.log1p(ours.astype(np.float64))
    expected = np.clip((logs - logs.mean(0)) / np.maximum(logs.std(0), 0.25), -CLIP, CLIP)
    np.testing.assert_allclose(scaled, expected, atol=1e-3)

    assert not run(settings, silent), "a second run has nothing to do"
    settings.salt_path.write_bytes(b"another salt, of thirty-two bytes")
    with pytest.raises(SaltMismatch, match="restore the salt file"):
        run(settings, silent)


def _popular(about: dict[str, Any]) -> list[tuple[int, int]]:
    return [(int(label, 16), clicks) for label, clicks in about["popular"]]


def test_too_few_clicks_end_the_wait_with_what_to_do(settings: Settings) -> None:
    ticks = iter(range(0, 10_000, 30))
    starved = load(
        [
            *("--paths.state", settings.paths.state, "--bootstrap.min_rows", "100000"),
            *("--kafka.bootstrap_servers", settings.kafka.bootstrap_servers),
            *("--kafka.clicks_topic", settings.kafka.clicks_topic),
        ],
        {},
    )
    said: list[str] = []
    with pytest.raises(SpringtideError, match=r"lower bootstrap\.min_rows"):
        run(starved, said.append, clock=lambda: float(next(ticks)))
    assert any("of at least 100,000 clicks" in line for line in said)
    assert Registry(starved.registry_dir).specs.names() == []


def test_a_constant_column_stays_finite(tmp_path: Path) -> None:
    features = np.random.default_rng(0).integers(0, 9, (500, 6)).astype(np.uint16)
    features[:, 2] = 7
    analysed([features], preprocessing_fn, tmp_path)

    from trainer.versions.program import preprocessing_of

    scaled = preprocessing_of(tmp_path)(
        np.vstack([features, np.full((1, 6), 65535, np.uint16)]).astype(np.float32)
    ).numpy()
    assert np.abs(scaled[:-1, 2]).max() < 1e-4
    assert np.abs(scaled).max() <= CLIP


def scaled(inputs: dict[str, Any], settings: Model) -> dict[str, Any]:
    import tensorflow as tf

    return {"features": tf.math.log1p(inputs["features"]) * settings.option("scale", 1.0)}


def test_an_option_that_the_preprocessing_asked_for_makes_another_graph_and_others_do_not(settings: Settings) -> None:
    def wanted(*options: str) -> Settings:
        model = replace(settings.model, preprocessing=f"{__name__}:scaled", options=options)
        return replace(settings, model=model)

    assert run(wanted("scale=0.5", "heads=4"), silent, Wanted(of_up=True))
    about = Registry(settings.registry_dir).specs.spec(FeatureSpec.from_settings(settings).digest)
    assert (about["options"], about["asked"]) == (["scale=0.5", "heads=4"], {"scale": ["0.5", "1.0"]})
    assert not run(wanted("scale=0.5", "heads=8"), silent), "the graph does not depend on heads"
    # Another graph lies beside the first one, whose versions still go by it.
    registry, spec = Registry(settings.registry_dir), FeatureSpec.from_settings(settings).digest
    assert registry.specs.bootstrapped(spec, wanted("scale=2").model) is None
    assert run(wanted("scale=2"), silent, Wanted(of_up=True))
    found = [
        registry.specs.bootstrapped(spec, wanted(*options).model) for options in (("scale=0.5",), ("scale=2",), ())
    ]
    assert found == [spec, f"{spec}.2", None]
    assert registry.specs.transform(f"{spec}.2").is_dir()
    # What an earlier release wrote names no options.
    assert fits({"preprocessing": f"{__name__}:scaled"}, wanted("scale=2").model)


def test_a_broker_that_is_away_is_reported_in_one_line(tmp_path: Path) -> None:
    away = load(
        ["--paths.state", str(tmp_path), "--kafka.bootstrap_servers", "127.0.0.1:1", "--kafka.request_timeout_s", "1"],
        {},
    )
    with pytest.raises(UnreachableBroker) as raised:
        run(away, silent)
    assert "\n" not in str(raised.value)
