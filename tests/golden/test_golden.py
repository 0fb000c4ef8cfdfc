"""This release takes up what 0.1.0 left: it reads all of it, answers the same, and goes on learning to the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from state.config.settings import Settings, known_settings
from state.config.sources import RENAMED, removed
from state.features.mask import Mask
from state.history.store import HistoryStore
from state.layout import HISTORIES, ROWS
from state.ranking.transitions import pack, signs_of
from state.ranking.transitions import unpack as unpack_rows
from state.registry.registry import Registry
from state.rows.store import RowStore
from tests.golden.archive import EXPECTED, HERE, SETTINGS_OF_0_1_0, read_topic, settings_of, unpack
from tests.golden.learning import learn_on, new_trainer
from tests.golden.measures import MAP_BYTES, differences, measure, without_digests
from trainer.tables.changes import Changes
from trainer.tables.lists import CountTable
from trainer.versions import checkpoint, content

CLOSE = 1e-5
FOLDER = HERE / "0.1.0"
RUNS: Mapping[str, Any] = json.loads((FOLDER / EXPECTED).read_text())["runs"]


class Run(NamedTuple):
    """A run of 0.1.0, unpacked.

    Attributes:
        expected: What it says of itself.
        state: Its state directory.
        settings: Its settings.
    """

    expected: Mapping[str, Any]
    state: Path
    settings: Settings


@pytest.fixture(scope="module", params=sorted(RUNS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    expected = RUNS[request.param]
    state = unpack(FOLDER / expected["archive"], tmp_path_factory.mktemp(request.param))
    return Run(expected, state, settings_of(expected, state))


def test_each_setting_of_0_1_0_is_read_or_ignored_with_a_warning_or_its_error_names_the_present_one() -> None:
    assert SETTINGS_OF_0_1_0 - {known.name for known in known_settings()} - removed().keys() - RENAMED.keys() == set()


def test_everything_that_0_1_0_wrote_is_read_bit_by_bit_and_answers_as_it_did(run: Run) -> None:
    """Registry, digests of merged versions, log, histories, waiting rows, serving's rows; answers within 1e-5."""
    users = [one["user"] for one in run.expected["answers"]]
    found = measure(run.state, run.settings, run.expected["answers_at_ms"], users, run.expected["item"])
    assert set(found) == {"registry", "topics", "stream", "serving", "answers"}
    for part, theirs in found.items():
        # LiteRT's sums are in another order on another processor.
        assert differences(run.expected[part], theirs, CLOSE if part == "answers" else 0.0, part) == []


def test_learning_goes_on_to_the_same_weights(run: Run) -> None:
    """From the newest version, and from nothing: step by step the same digest where the environment is the same, else close."""
    registry = Registry(run.settings.registry_dir)
    trainer = new_trainer(run.settings, registry)
    log = read_topic(run.state / "topics", "microbatches")
    theirs = machine(run.expected["registry"]["environment"])
    ours = machine(checkpoint.environment(run.settings, trainer.device))
    starts = [run.expected[name] for name in ("learned on", "learned from nothing") if name in run.expected]
    for wanted in starts:
        steps, mask = len(wanted["steps"]) - 1, Mask.from_json(wanted["mask"])
        found = learn_on(trainer, registry, log, wanted["version"], steps, mask)
        assert differences(without_digests(wanted), without_digests(found), CLOSE) == []
        if all(ours.get(name) == value for name, value in theirs.items()):
            assert [one["digest"] for one in found["steps"]] == [one["digest"] for one in wanted["steps"]]
    assert starts


@pytest.mark.parametrize("run", ["joined"], indirect=True)
def test_every_list_of_what_came_next_keeps_its_bits(run: Run) -> None:
    registry, found = Registry(run.settings.registry_dir), 0
    for version in registry.versions():
        state = content.merge([checkpoint.tensors_of(registry, registry.manifest(version))])
        rows = state["transition.rows"]
        assert pack(unpack_rows(rows), signs_of(rows)).tobytes() == rows.tobytes()
        changes = Changes(**{field: state[f"transition.{field}"] for field in Changes.FIELDS})
        table = CountTable("transition", capacity=2)
        table.load(changes)
        assert table.digest() == changes.digest()
        found += int((unpack_rows(rows).counts > 0).sum())
    assert found > 50


def machine(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment says of processor and libraries; names of settings have a dot."""
    return {name: value for name, value in environment.items() if "." not in name}


def test_the_writers_of_this_release_take_the_stores_over(run: Run, tmp_path: Path) -> None:
    """A stream and an applier open them for writing, also after the machine was started anew."""
    state = unpack(FOLDER / run.expected["archive"], tmp_path)
    for _ in range(2):
        for owner in ("stream-0", "serving"):
            histories = HistoryStore(state / owner / HISTORIES, run.settings.features.history, MAP_BYTES)
            part = run.expected["stream" if owner == "stream-0" else "serving"]
            assert (histories.digest(), histories.waiting_rows()) == (part["digest"], part["waiting"])
            histories.close()
        rows = RowStore.open_or_rebuild(state / "serving" / ROWS, MAP_BYTES)
        assert rows.entries() == run.expected["serving"]["entries"]
        rows.close()
