"""`springtide schema`: the baseline is shown, the newest window compared with it in words, and accepted with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import cli
from deploy.validation.process import LogValidation
from state.config.settings import Settings
from state.errors import RegistryError, SettingsError
from state.metrics import ValidationMetrics
from state.process.environment import actor
from state.registry.registry import Registry
from state.statistics.baselines import schema_of
from tests.deploy.validation.live import MINUTE_MS, START_MS, bootstrapped, minutes, settings_at, written
from tests.memory_log import MemoryLog

NOW_MS = START_MS + 60 * MINUTE_MS


class SchemaOperator:
    """Somebody at the command line of a loop that had some minutes of clicks."""

    def __init__(self, state: Path) -> None:
        self.settings: Settings = settings_at(state)
        self.state = state

    def __call__(self, *words: str) -> str:
        printed: list[str] = []
        own = ["--paths.state", str(self.state), "--validation.window_s", "60", "--validation.min_rows", "100"]
        line = ["schema", *words, *own, "--events.context", "device"]
        cli.run(line, lambda module, flags: None, NOW_MS, printed.append)
        return "\n".join(printed)

    def clicks(self, log: MemoryLog) -> None:
        """The validation reads to the log's end."""
        validation = LogValidation(self.settings, log, ValidationMetrics(CollectorRegistry()), lambda: 0.0)
        for _ in range(5):
            validation.step()


@pytest.fixture
def operator(tmp_path: Path) -> SchemaOperator:
    made = SchemaOperator(tmp_path / "state")
    bootstrapped(made.settings)
    return made


def test_the_baseline_is_shown_with_what_it_allows(operator: SchemaOperator) -> None:
    first, *lines = operator("show").splitlines()
    assert first.startswith("baseline 0, of the bootstrap, ") and first.endswith(", 4,000 events")
    (category,) = (line for line in lines if line.startswith("category "))
    assert "bytes" in category and "0.1 from it, 0.1 from the window before" in category
    document = json.loads(operator("show", "-o", "json"))
    by_name = {one["name"]: one for one in document["features"]}
    assert by_name["category"]["domain"] == 20 and by_name["user"]["distinct"] == 50
    schema = schema_of(operator("show", "--pbtxt"))
    assert {feature.name for feature in schema.feature} == {*by_name}


def test_a_shift_is_told_in_words_with_numbers_and_the_farthest_first(operator: SchemaOperator) -> None:
    operator.clicks(written([*minutes(3), *minutes(2, first=3, hot=0.5), *minutes(1, first=5)]))
    document = json.loads(operator("diff", "-o", "json"))
    assert document["window_end_ms"] == START_MS + 5 * MINUTE_MS
    assert [*document["anomalies"]] == ["category"]
    farthest = document["distances"][0]
    assert (farthest["feature"], farthest["measure"]) == ("category", "L_INFTY")
    assert farthest["distance"] > 0.1 == farthest["threshold"]
    first, wrong, head, top, *_ = operator("diff").splitlines()
    assert first.startswith("the window until ") and "400 events, against baseline 0, of the bootstrap" in first
    assert wrong.startswith("category: The L-infinity distance from the baseline is 0.")
    assert head.split()[:2] == ["feature", "from"] and top.startswith("category ")


def test_an_accepted_window_is_the_baseline_and_stands_in_the_history(operator: SchemaOperator) -> None:
    operator.clicks(written(minutes(4, hot=0.5)))
    assert "category: " in operator("diff")
    assert "baseline 1: the next window is held against it" in operator("accept", "--reason", "a new season")
    assert "nothing is wrong with it" in operator("diff")
    assert operator("show").startswith(f"baseline 1, accepted by {actor()} (a new season), ")
    newest = Registry(operator.settings.registry_dir).controls()[-1]
    assert (newest.action, newest.reason, newest.actor, newest.plan) == (
        "accept",
        "a new season",
        actor(),
        {"baseline": 1},
    )
    assert (newest.epoch, newest.serving.mode, newest.training) == (1, "follow", True)
    assert json.loads(operator("accept", "--reason", "again", "-o", "json"))["number"] == 2


def test_thresholds_are_edited_as_text_and_accepted(operator: SchemaOperator, tmp_path: Path) -> None:
    operator.clicks(written(minutes(4)))
    edited = tmp_path / "schema.pbtxt"
    edited.write_text(operator("show", "--pbtxt").replace("threshold: 0.1", "threshold: 0.001"))
    operator("accept", "--schema", str(edited), "--reason", "stricter")
    by_name = {one["name"]: one for one in json.loads(operator("show", "-o", "json"))["features"]}
    assert by_name["category"]["thresholds"] == {"baseline": 0.001, "previous": 0.001}
    assert "category: " in operator("diff")


def test_windows_count_against_the_baseline_once_histories_are_full(operator: SchemaOperator) -> None:
    def limits() -> set[str]:
        features = json.loads(operator("show", "-o", "json"))["features"]
        (one,) = (feature for feature in features if feature["name"] == "features.view.count_1h")
        return {*one["thresholds"]}

    log = written(minutes(4))
    operator.clicks(log)
    operator("accept", "--reason", "a minute after the bootstrap")
    assert limits() == {"previous"}
    week = 7 * 24 * 60
    operator.clicks(written(minutes(4, first=week), log))
    operator("accept", "--reason", "a week later")
    assert limits() == {"baseline", "previous"}


def test_each_refusal_says_what_to_do(operator: SchemaOperator, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no window of live clicks has ended yet.*springtide validate"):
        operator("diff")
    with pytest.raises(SettingsError, match=r"needs --reason TEXT"):
        operator("accept")
    with pytest.raises(SettingsError, match=r"belong to `springtide schema accept`"):
        operator("show", "--reason", "x")
    operator.clicks(written(minutes(4)))
    with pytest.raises(SettingsError, match=r"begin with the text that `springtide schema show --pbtxt` prints"):
        operator("accept", "--reason", "x", "--schema", str(tmp_path / "none"))
    newest = sorted((operator.settings.validation_dir / "windows").glob("*.pb"))[-1]
    newest.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match=r"cannot be read.*remove it: the next window takes its place"):
        operator("diff")
    with pytest.raises(RegistryError, match="no registry here"):
        SchemaOperator(tmp_path / "elsewhere")("show")
    Registry(tmp_path / "bare" / "registry")
    with pytest.raises(SettingsError, match=r"not bootstrapped yet.*springtide bootstrap"):
        SchemaOperator(tmp_path / "bare")("show")
