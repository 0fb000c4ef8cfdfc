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
import tensorflow as tf

from state.config.loading import load
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import SaltMismatch, SettingsError, SpringtideError, UnknownTopic
from state.events.identity import load_salt, public_id
from state.features.spec import FeatureSpec
from state.log import PartitionBatch, Topics, Writer
from state.microbatch.examples import about, dataset, schema
from state.recordings.files import Recording, find
from state.registry.registry import Registry
from state.registry.specs import fits
from state.statistics.anomalies import validate
from state.statistics.baselines import Baselines
from state.statistics.collecting import by_name, frequencies
from streaming.bootstrap import ComputeWindows, Sample, Wanted, asked, of_recording, of_topic, open_sample, run
from streaming.preprocessing import CLIP
from streaming.rows import Rows
from streaming.steps import Handle, ParseEvents
from tests.conftest import KafkaFactory
from tests.trainer.logs import write_transform

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

    from trainer.model.preprocessing import preprocessing_of

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


BEGIN_S = 1_700_000_000
ROWS = 700
COLUMNS = ("user", "item", "category", "action", "at_ms", "offset", "label", "weight", "context")


def write_recording(folder: Path) -> Path:
    """Clicks that are not in order of time, two of them no clicks."""
    drawn = np.random.default_rng(5)
    lines = ["user,item,category,action,time,bought,device"]
    for number in drawn.permutation(ROWS).tolist():
        category, label = f"c{int(drawn.zipf(1.6)) % 9}", ("1", "0", "")[number % 3]
        device = ("phone", "desk", "")[number % 3]
        lines.append(f"u{number % 23},i{number % 50},{category},view,{BEGIN_S + number * 60},{label},{device}")
    lines += [f"u1,i1,c1,dance,{BEGIN_S},1,phone", "broken"]
    path = folder / "clicks.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


def flags_of(folder: Path) -> list[str]:
    own = {"paths.state": folder / "state", "events.label": "bought", "events.context": "device"}
    own |= {"stream.cut_rows": 64}
    return [f"--{name}={value}" for name, value in own.items()]


def bootstrap(*argv: object) -> list[str]:
    """Does a command line in this process; returns what it said."""
    said: list[str] = []
    settings, wanted = asked([*map(str, argv)])
    if not run(settings, said.append, wanted):
        said.append("nothing to do")
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings, str]:
    """A finished run of the command: its folder, settings and what it said."""
    folder = tmp_path_factory.mktemp("bootstrap")
    said = bootstrap(write_recording(folder), *flags_of(folder), "--rows", ROWS, "--examples", folder / "examples")
    return folder, load(flags_of(folder), env={}), "\n".join(said)


def computed(folder: Path, settings: Settings, most: int = ROWS) -> list[Rows]:
    """The rows of the recording, by the stream's code and without Beam."""
    recording = Recording(find([str(folder / "clicks.csv")]))
    salt = load_salt(settings.salt_path)
    with open_sample(settings, salt, lambda: 1_800_000_000.0, lambda _: None, most) as sample:
        steps = ParseEvents(sample), ComputeWindows(sample)
        batches = of_recording(sample.context, recording, "memory")
        return [rows for one in batches for events in steps[0].process(one) for rows in steps[1].process(events)]


def read_back(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All examples, in the order of their offsets."""
    parts = list(dataset(folder / "examples", batch_rows=90).as_numpy_iterator())
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(whole["offset"])
    return {name: column[order] for name, column in whole.items()}


def test_examples_are_bit_for_bit_the_rows_that_the_stream_makes(made: tuple[Path, Settings, str]) -> None:
    folder, settings, _ = made
    rows, found = computed(folder, settings), read_back(folder)
    assert len(found["user"]) == ROWS
    for name in COLUMNS:
        column = np.concatenate([getattr(one.batch, name) for one in rows])
        expected = column.view(np.int64) if column.dtype == np.uint64 else column
        np.testing.assert_array_equal(found[name], expected, name)
    for name in ("features", "category_windows"):
        expected = np.concatenate([getattr(one.vectors, name) for one in rows])
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected, name)
    labels = np.concatenate([one.vectors.recent_categories for one in rows])
    np.testing.assert_array_equal(found["recent_categories"].view(np.uint64), labels)
    np.testing.assert_array_equal(found["recent_mask"], labels != 0)
    assert (np.diff(found["at_ms"]) >= 0).all(), "the recording was not ordered by time"
    assert {*found["category"].view(np.uint64).tolist()} <= {public_id(f"c{number}") for number in range(9)}


@pytest.mark.parametrize("sort", ["memory", "assume"])
def test_a_recording_longer_than_the_setting_costs_the_sample_its_strays_only(tmp_path: Path, sort: str) -> None:
    lines = [f"u{number % 23},i1,c1,view,{BEGIN_S + number * 86_400}" for number in range(90)]
    strays = ["u1,i1,c1,view,0", f"u1,i1,c1,view,{BEGIN_S + 130 * 86_400}"]
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(["user,item,category,action,time", strays[0], *lines, strays[1], ""]))
    settings, said = load(["--paths.state", str(tmp_path / "state")], env={}), list[str]()
    salt = load_salt(settings.salt_path)
    with open_sample(settings, salt, lambda: 1_800_000_000.0, said.append, ROWS) as sample:
        rows_of(sample, of_recording(sample.context, Recording(find([str(path)])), sort))
        assert sample.context.tally.clicks == 90
        assert sample.context.tally.refused == {"implausible_time": 2}
    assert f"WARNING: {path}:2 and others: 2 rows of 92 are left out" in said[0]
    assert said[1].startswith("90 clicks and 2 dead letters (2 implausible_time) read in")
    assert said[2] == "WARNING: 2.2 % of the rows are left out: 2 dead letters (2 implausible_time)"


def test_a_label_that_came_later_is_in_the_example_of_its_impression_and_one_without_a_label_in_none(
    tmp_path: Path,
) -> None:
    # One is clicked, one is not, one still waits at the end; the windows count what came before each.
    events = [("a", "view", 0), ("b", "view", 10), ("a", "click", 20), ("c", "view", 200)]
    lines = [f"u1,{item},c,{action},{BEGIN_S + at}" for item, action, at in events]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,category,action,time", *lines, ""]))
    own = ["--events.actions=view,click", "--events.action_weights=1,2", "--labels.impressions=view"]
    own += [
        "--labels.outcomes=click",
        "--labels.wait_s=120",
        f"--paths.state={tmp_path / 'state'}",
    ]
    # As if an earlier run had analysed the clicks, which takes seconds.
    settings = load(own, env={})
    document = {"salt": load_salt(settings.salt_path).fingerprint}
    Registry(settings.registry_dir).specs.add_spec(
        FeatureSpec.from_settings(settings).digest, document, write_transform
    )
    said = bootstrap(tmp_path / "clicks.csv", *own, "--examples", tmp_path / "examples")
    assert said[-1].endswith("; 1 impressions still waited for their label when the clicks ended")
    found = read_back(tmp_path)
    assert (found["offset"].tolist(), found["label"].tolist()) == ([0, 1], [1.0, 0.0])
    visible = FeatureSpec.from_settings(settings).names.index("events.visible")
    assert found["features"][:, visible].tolist() == [0, 1]


def test_the_schema_beside_them_describes_every_feature(made: tuple[Path, Settings, str]) -> None:
    from tensorflow_transform.tf_metadata.schema_utils import schema_as_feature_spec

    folder, settings, _ = made
    described = schema(FeatureSpec.from_settings(settings), 1)
    assert (folder / "examples" / "schema.pbtxt").read_text() == str(described)
    columns = schema_as_feature_spec(described).feature_spec
    (file, *_) = sorted((folder / "examples").glob("*.tfrecord.gz"))
    (first,) = tf.data.TFRecordDataset(str(file), compression_type="GZIP").take(1)
    example = tf.train.Example.FromString(first.numpy())
    assert set(columns) == set(example.features.feature)
    parsed = tf.io.parse_single_example(first, columns)
    assert parsed["label_windows"].shape == (360,)
    assert parsed["at_ms"].shape == ()
    assert about(folder / "examples")["features"] == list(FeatureSpec.from_settings(settings).names)
    assert len(list((folder / "examples").glob("*.tfrecord.gz"))) == 1


def test_the_command_says_what_it_read_what_it_refused_and_how_long_it_took(made: tuple[Path, Settings, str]) -> None:
    said = made[2]
    assert re.search(
        r"700 clicks and 2 dead letters \(1 unknown_action, 1 (undecodable|wrong_type)\) read in [\d.]+ s \([\d,]+ rows/s\)",
        said,
    ), said


def test_a_bootstrap_from_files_needs_no_kafka_and_leaves_what_the_trainer_waits_for(
    made: tuple[Path, Settings, str],
) -> None:
    _, settings, _ = made
    registry = Registry(settings.registry_dir)
    (digest,) = registry.specs.names()
    assert digest == FeatureSpec.from_settings(settings).digest
    document = registry.specs.spec(digest)
    assert document["rows"] == ROWS
    assert sum(clicks for _, clicks in document["popular"]) == ROWS
    assert (registry.specs.transform(digest) / "transform_fn" / "saved_model.pb").exists()


def test_a_second_run_writes_more_examples_but_never_into_the_same_directory(
    made: tuple[Path, Settings, str], tmp_path: Path
) -> None:
    folder, _, _ = made
    line = [folder / "clicks.csv", *flags_of(folder), "--rows", "128"]
    with pytest.raises(SettingsError, match="already exists"):
        bootstrap(*line, "--examples", folder / "examples")
    assert bootstrap(*line, "--examples", tmp_path / "more")[-1] == f"128 examples in {tmp_path / 'more'}"
    assert sum(len(part["user"]) for part in dataset(tmp_path / "more").as_numpy_iterator()) == 128
    assert bootstrap(*line) == ["nothing to do"]


def test_examples_that_were_not_completed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "examples-00000-of-00001.tfrecord.gz").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"no complete examples.*springtide bootstrap --examples"):
        dataset(tmp_path)


def test_files_without_a_click_are_one_line_with_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "clicks.jsonl"
    path.write_text('{"user": "a", "item": 1, "category": 2, "action": "dance", "time": 1700000000}\n' * 3)
    with pytest.raises(SpringtideError, match=r"no row of .*3 dead letters \(3 unknown_action\); correct \[events\]"):
        bootstrap(path, "--paths.state", tmp_path / "state")
    assert Registry(tmp_path / "state" / "registry").specs.names() == []


@pytest.mark.parametrize("argv", [["nowhere.csv"], ["--rows", "none"], ["--rows", "0"], ["--exmaples", "x"]])
def test_wrong_use_is_refused_before_anything_is_read(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        asked(argv)


def test_an_exact_number_of_rows_is_taken_in_order_of_time(tmp_path: Path) -> None:
    write_recording(tmp_path)
    settings = load(flags_of(tmp_path), env={})
    at_ms = np.concatenate([rows.batch.at_ms for rows in computed(tmp_path, settings, 100)])
    # The row of an unknown action is the first of all, and no click.
    assert at_ms.tolist() == [(BEGIN_S + number * 60) * 1000 for number in range(100)]
