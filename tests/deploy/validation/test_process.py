"""The validation of live clicks: windows are judged against the baseline, whatever dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import sections
from deploy.validation import process
from deploy.validation.process import KINDS, MOST_LABELS, OTHERS, LogValidation, labels_of
from deploy.watch.scrape import scrape
from state.config.settings import Settings
from state.errors import LogError
from state.log import Log
from state.metrics import ValidationMetrics
from state.process.network import free_port
from state.statistics.baselines import KeptWindows
from tests import forked
from tests.conftest import KafkaFactory
from tests.deploy.validation.live import (
    MINUTE_MS,
    START_MS,
    bootstrapped,
    columns,
    minutes,
    record,
    settings_at,
    written,
)
from tests.memory_log import MemoryLog


class Run:
    """The validation of one process, and what it counted."""

    def __init__(self, settings: Settings, log: MemoryLog) -> None:
        self.collected = CollectorRegistry()
        self.validation = LogValidation(settings, log, ValidationMetrics(self.collected), lambda: 0.0)

    def catch_up(self) -> None:
        for _ in range(20):
            self.validation.step()
            if self.value("springtide_validation_lag_records") == 0:
                return
        raise AssertionError("it does not come to the log's end")

    def value(self, name: str, **labels: str) -> float | None:
        return self.collected.get_sample_value(name, labels)

    def anomalies(self) -> dict[str, float]:
        found = {kind: self.value("springtide_validation_anomalies", type=kind) for kind in KINDS}
        return {kind: count for kind, count in found.items() if count}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = settings_at(tmp_path / "state")
    bootstrapped(made)
    return made


def windows(settings: Settings) -> dict[int, bytes]:
    kept = KeptWindows(settings.validation_dir)
    return {end_ms: kept.read(end_ms).statistics.SerializeToString(deterministic=True) for end_ms in kept.ends()}


def test_rows_like_those_of_the_baseline_have_no_anomaly_and_a_window_is_a_minute(settings: Settings) -> None:
    run = Run(settings, written(minutes(5)))
    run.catch_up()
    assert run.anomalies() == {}
    # The first one may have begun before, and the last one goes on.
    assert [*windows(settings)] == [START_MS + minute * MINUTE_MS for minute in range(2, 5)]
    assert run.value("springtide_validation_window_rows") == 400
    assert run.value("springtide_validation_windows_total", outcome="begun_before") == 1
    assert run.value("springtide_validation_windows_total", outcome="judged") == 3
    assert run.value("springtide_validation_rows_total") == 2000
    near = run.value("springtide_validation_distance_ratio", feature="category", against="baseline")
    assert near is not None and 0 < near < 0.1


def test_of_many_rows_some_records_of_the_whole_window_count(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MOST_ROWS", 40)
    run = Run(settings, written(minutes(3)))
    run.catch_up()
    assert run.value("springtide_validation_rows_total") == 1200
    counted = run.value("springtide_validation_window_rows")
    assert counted is not None and settings.validation.min_rows <= counted < 400


def test_without_a_baseline_windows_are_kept_up_to_their_number_and_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "KEPT_WINDOWS", 2)
    settings = settings_at(tmp_path / "state")
    run = Run(settings, written(minutes(6)))
    run.catch_up()
    assert [*windows(settings)] == [START_MS + minute * MINUTE_MS for minute in (4, 5)]
    assert run.value("springtide_validation_windows_total", outcome="no_baseline") == 4
    assert run.anomalies() == {}


def test_whatever_dies_the_windows_are_the_same(settings: Settings, tmp_path: Path) -> None:
    log = written(minutes(2))
    whole = settings_at(tmp_path / "whole")
    for later in range(2, 7):
        Run(settings, log).catch_up()
        written(minutes(1, first=later), log)
    Run(settings, log).catch_up()
    Run(whole, log).catch_up()
    assert windows(settings) == windows(whole) != {}


@pytest.mark.parametrize(
    ("fault", "kind", "feature"),
    [
        ({"hot": 0.5}, "COMPARATOR_L_INFTY_HIGH", "category"),
        ({"known": 0.0}, "SCHEMA_MISSING_COLUMN", "user_attributes.age_band"),
        ({"known": 0.6}, "FEATURE_TYPE_LOW_FRACTION_PRESENT", "user_attributes.age_band"),
    ],
)
def test_a_fault_is_found_in_its_window_told_once_and_over_when_it_is(
    settings: Settings, caplog: pytest.LogCaptureFixture, fault: dict[str, float], kind: str, feature: str
) -> None:
    caplog.set_level(logging.INFO, "deploy.validation")
    log = written(minutes(3))
    run = Run(settings, log)
    run.catch_up()
    assert run.anomalies() == {}
    written([*minutes(2, 400, 3, **fault), record(columns(1), START_MS + 5 * MINUTE_MS)], log)
    run.catch_up()
    assert run.anomalies() == {kind: 1}
    (told,) = (line.getMessage() for line in caplog.records if line.levelno == logging.WARNING)
    assert told.startswith(f"{feature}: ") and told.endswith("(400 rows)")
    # The first of the later windows still moves, back from the window before.
    written([*minutes(3, first=6), record(columns(1), START_MS + 9 * MINUTE_MS)], log)
    run.catch_up()
    assert run.anomalies() == {}
    assert caplog.records[-1].getMessage() == f"{feature}: as expected again"


def test_few_rows_are_judged_by_nothing_and_take_back_what_was_said(settings: Settings) -> None:
    log = written([*minutes(4, hot=0.5, known=0.6)])
    run = Run(settings, log)
    run.catch_up()
    missing = run.value("springtide_validation_missing_ratio", feature="user_attributes.age_band")
    far = run.value("springtide_validation_distance_ratio", feature="category", against="baseline")
    assert missing is not None and 0.3 < missing < 0.5 and far is not None and far > 0.2
    written([*minutes(1, rows=20, first=4), *minutes(1, first=5)], log)
    run.catch_up()
    assert run.anomalies() == {}
    assert run.value("springtide_validation_windows_total", outcome="few_rows") == 1
    assert run.value("springtide_validation_distance_ratio", feature="category", against="baseline") is None


def test_records_that_are_none_and_those_of_other_features_are_passed_and_counted(settings: Settings) -> None:
    records = [
        *minutes(2),
        b"no micro-batch",
        record(columns(50), START_MS + MINUTE_MS, spec="f" * 64),
        *minutes(2, first=2),
    ]
    run = Run(settings, written(records))
    run.catch_up()
    for outcome, count in (("read", 8), ("unreadable", 1), ("other_features", 1)):
        assert run.value("springtide_validation_records_total", outcome=outcome) == count


def test_a_log_that_goes_away_costs_time_alone(settings: Settings) -> None:
    log = written(minutes(3))
    run = Run(settings, log)
    run.catch_up()
    before = windows(settings)
    run.validation.disconnect()
    log.go_away()
    with pytest.raises(LogError):
        run.validation.step()
    log.come_back()
    written(minutes(2, first=3), log)
    run.catch_up()
    assert {*before} < {*windows(settings)}


def test_an_accepted_baseline_counts_from_the_next_window_on(settings: Settings) -> None:
    log = written(minutes(3, hot=0.5))
    run = Run(settings, log)
    run.catch_up()
    assert run.anomalies() == {"COMPARATOR_L_INFTY_HIGH": 1}
    from deploy.operate.schema import accept_window

    accept_window(settings, "ann", "a new season", START_MS)
    written(minutes(2, first=3, hot=0.5), log)
    run.catch_up()
    assert run.anomalies() == {}
    assert run.value("springtide_validation_baseline") == 1


def test_features_are_held_against_the_window_before_once_histories_have_grown(settings: Settings) -> None:
    """Just after a bootstrap each window has fuller histories than the one before."""
    log = written([*minutes(3), *minutes(1, first=3, scale=20.0), record(columns(1), START_MS + 4 * MINUTE_MS)])
    early = Run(settings, log)
    early.catch_up()
    assert early.anomalies() == {}
    written([*minutes(3, first=100), *minutes(1, first=103, scale=20.0)], log)
    written([record(columns(1), START_MS + 104 * MINUTE_MS)], log)
    early.catch_up()
    assert early.anomalies()["COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH"] == 1


def test_the_labels_of_many_features_are_few() -> None:
    names = [f"context.c{number}" for number in range(30)] + [f"features.a{number}.recency" for number in range(200)]
    labels = labels_of(names)
    assert len({*labels.values()}) == MOST_LABELS
    assert labels["context.c29"] == "context.c29" and labels["features.a199.recency"] == OTHERS


DEADLINE_S = 120.0


def test_the_process_judges_windows_of_a_real_log_and_ends_when_asked_to(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka, port = kafka_settings(), free_port()
    flags = [
        *("--kafka.bootstrap_servers", kafka.bootstrap_servers),
        *("--kafka.microbatches_topic", kafka.microbatches_topic),
        *("--up.metrics_port", str(port - 2)),
    ]
    settings = settings_at(tmp_path / "state", *flags)
    bootstrapped(settings)
    log, topic = Log(settings.kafka), settings.kafka.microbatches_topic
    with log.topics() as topics:
        topics.ensure(topic, 1)
    with log.writer("stream") as writer:
        for value in minutes(4):
            with writer.transaction():
                writer.send(topic, 0, None, value)
    changed = ("paths.state", "validation.window_s", "validation.min_rows", "events.context")
    own = [word for name in changed for word in (f"--{name}", str_of(settings.value(name)))]
    process = forked.Popen(
        [sys.executable, "-m", "deploy.validation.process", *own, *flags],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = {"validation": f"http://127.0.0.1:{port}/metrics"}
        end_s = time.monotonic() + DEADLINE_S
        judged = None
        while (judged or 0) < 2 and time.monotonic() < end_s and process.poll() is None:
            found = scrape(address)["validation"]
            judged = found.value("springtide_validation_windows_total", outcome="judged")
            time.sleep(0.05)
        assert judged == 2
        assert found.value("springtide_validation_window_rows") == 400
        assert len(found.values) < 300
        # `springtide status` says it too.
        told = sections.live_clicks(settings)
        assert told is not None and (told["rows"], told["baseline"]) == (400, 0)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, said
    assert sections.live_clicks(settings) is None


def str_of(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
