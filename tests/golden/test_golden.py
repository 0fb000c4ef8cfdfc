"""What 0.1.0 wrote is read and continued with the same bits, and upgrades lead from it and back again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from msgspec import structs
from prometheus_client import CollectorRegistry

from state.config.settings import Settings, known_settings
from state.config.sources import RENAMED, removed
from state.disk.documents import unseal
from state.events.identity import load_salt
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES, ROWS
from state.metrics import TrainerMetrics
from state.microbatch.batch import Header, MicroBatch
from state.microbatch.codec import decode, encode
from state.process.environment import Clocks
from state.ranking.transitions import pack, signs_of
from state.ranking.transitions import unpack as unpack_rows
from state.registry.control import Decision, follow, pin, roll_back
from state.registry.registry import Registry
from state.registry.specs import SpecActions
from state.rows.store import RowStore
from streaming.histories import check_identity
from tests.golden.archive import EXPECTED, HERE, SETTINGS_OF_0_1_0, Topic, read_topic, settings_of, unpack
from tests.golden.learning import learn_on, new_trainer
from tests.golden.measures import MAP_BYTES, differences, measure, without_digests
from tests.memory_log import MemoryLog
from tests.trainer.logs import account_in, append, run_to_end
from tests.vectors import vectorise
from trainer import upgrade
from trainer.engine.step import Trainer
from trainer.learner import Learner, Surroundings
from trainer.publications import ServedModel
from trainer.tables.id_table import Changes
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


RUN = RUNS["joined"]
NEWEST = RUN["registry"]["newest"]


def log_of(topic: Topic) -> MemoryLog:
    """A log with these records at their offsets: the ends of transactions lie between."""
    log = MemoryLog(ids=lambda: topic.topic_id)
    log.topics().ensure(topic.name, 1)
    with log.writer("stream") as writer:
        records = list(topic.records)
        while records:
            length = next((n for n in range(1, len(records)) if records[n]["offset"] != records[0]["offset"] + n), 1)
            with writer.transaction():
                for one in records[: max(1, length)]:
                    writer.send(topic.name, 0, None, one["value"])
            del records[: max(1, length)]
    assert log.topics().ends(topic.name) == topic.ends
    return log


def changed(settings: Settings) -> Settings:
    features = replace(settings.features, windows_s=(3600, 172800), history=64)
    events = replace(settings.events, actions=("wish", *reversed(settings.events.actions)))
    model = replace(settings.model, hidden=(24, 8))
    return replace(settings, features=features, model=model, events=events)


def learner(settings: Settings, registry: Registry, trainer: Trainer, log: MemoryLog) -> Learner:
    spec = FeatureSpec.from_settings(settings).digest
    ticks = iter(range(10**9))
    about = {"salt": RUN["registry"]["salt"], "popular": [], "newest_ms": 0}
    made = Learner(
        settings,
        registry,
        trainer,
        log,
        ServedModel(
            RUN["registry"]["program"],
            spec,
            about,
            checkpoint.environment(settings, trainer.device, trainer.engine.name),
        ),
        TrainerMetrics(CollectorRegistry()),
        Surroundings(clocks=Clocks(lambda: 0.0, lambda: float(next(ticks)))),
    )
    control = registry.control()
    assert control is not None
    made.enter(control)
    return made


def recomputed(batch: MicroBatch, spec: FeatureSpec, store: HistoryStore) -> bytes:
    """A record as the stream would write it under another spec, out of the histories as they are."""
    vectors = [
        vectorise(store.read(user), at_ms, None, Mask.NONE, spec)
        for user, at_ms in zip(batch.user.tolist(), batch.at_ms.tolist(), strict=True)
    ]
    columns = {**batch.columns, "features": np.stack([one.features for one in vectors])}
    columns |= {
        name: np.stack([getattr(one, name) for one in vectors]) for name in ("recent_categories", "category_windows")
    }
    header = batch.header
    return encode(
        Header(spec.digest, header.salt, header.ranges, header.created_ms, attributes=header.attributes), columns
    )


def test_tables_log_and_histories_go_on_with_other_features_and_back(tmp_path: Path) -> None:
    state = unpack(FOLDER / RUN["archive"], tmp_path)
    old = settings_of(RUN, state)
    new, topic = changed(old), read_topic(state / "topics", "microbatches")
    spec, log, registry = FeatureSpec.from_settings(new), log_of(topic), Registry(old.registry_dir)
    before = new_trainer(old, registry)
    checkpoint.restore(registry, NEWEST, before, RUN["registry"]["spec"])
    tables = {name: table.state() for name, table in before.tables.items()}

    # 1. Histories: the same clicks, and windows of them that 0.1.0 did not know.
    store = HistoryStore(state / "stream-0" / HISTORIES, spec.history, MAP_BYTES)
    salt = load_salt(state / "salt").fingerprint
    check_identity(store, spec, salt, SpecActions(registry.path, spec))
    users = [int(user) for user in tables["user"].ids]
    stored = {user: store.read(user) for user in users}
    assert sum(map(len, stored.values())) > 100
    by_name = {name: place for place, name in enumerate(spec.actions)}
    assert {int(action) for events in stored.values() for action in events["action"]} <= {
        by_name[name] for name in old.events.actions
    }

    # 2. The upgrade: what fits goes on bit for bit.
    said: list[str] = []
    assert upgrade.run(new, False, False, "longer windows", said.append, 7) is not None
    assert "  features.windows_s was 86400 and is 3600,172800" in said
    after = Trainer(new, spec)
    ours = learner(new, registry, after, log)
    first = registry.manifest(ours.place.parent)
    assert (first.parent, first.epoch, first.log.next) == (NEWEST, 3, RUN["registry"]["versions"]["4"]["log"][3])
    for name in ("user", "item", "category", "context", "cross", "transition"):
        assert after.tables[name].state().digest() == tables[name].digest(), name
    assert after.counters == before.counters
    assert after.popular.top().tolist() == before.popular.top().tolist()

    # 3. The log: what 0.1.0 left in it unlearned is passed over; the stream's new records are learned.
    last = decode(topic.records[-1]["value"])
    nexts = {part.source: part.next for part in last.header.ranges}
    moved = tuple(
        replace(part, first=nexts[part.source], next=nexts[part.source] + part.next - part.first)
        for part in last.header.ranges
    )
    shift = np.array([part.next - part.first for part in last.header.ranges], np.int64)[last.source]
    again = replace(last, header=replace(last.header, ranges=moved), offset=last.offset + shift)
    append(log, [recomputed(again, spec, store)], topic.name)
    run_to_end(ours)
    ours.close()
    assert after.counters.steps == before.counters.steps + 1
    assert ours.place.other_features > 0
    assert account_in(ours)["rows"] == sum(
        account_in(ours).get(name, 0) for name in ("trained", "skipped", "duplicate", "masked", "other_features")
    )
    assert {user: store.read(user).tobytes() for user in users} == {user: one.tobytes() for user, one in stored.items()}
    store.close()

    # 4. Back: the version of 0.1.0 is what it was, and goes on.
    registry.change(lambda now: roll_back(now, NEWEST, Mask.NONE, actor="ann", reason="worse", now_ms=9))
    back = learner(old, registry, before, log)
    assert checkpoint.digest(before) == RUN["registry"]["versions"]["4"]["digest"]
    assert back.place.parent == NEWEST
    run_to_end(back)
    back.close()
    assert before.counters.steps > after.counters.steps
    again_store = HistoryStore(state / "stream-0" / HISTORIES, old.features.history, MAP_BYTES)
    spec = FeatureSpec.from_settings(old)
    check_identity(again_store, spec, salt, SpecActions(registry.path, spec))
    assert again_store.digest() == RUN["stream"]["digest"]
    again_store.close()


def test_0_1_0_finds_its_own_version_again_once_the_system_went_back_to_it(tmp_path: Path) -> None:
    """It reads control of format 1 only, and refuses what it would do wrong: an epoch that goes on in another model."""
    run = RUNS["clicks"]
    state = unpack(FOLDER / run["archive"], tmp_path)
    settings, version = settings_of(run, state), run["registry"]["newest"]
    registry = Registry(settings.registry_dir)
    written = {path: path.read_bytes() for path in registry.path.rglob("*") if path.is_file()}

    def newest() -> dict[str, Any]:
        path = max((registry.path / "control").glob("*.json"))
        document: dict[str, Any] = json.loads(unseal(path.read_bytes()))
        return document

    said: Decision = {"actor": "ann", "reason": "test", "now_ms": 7}
    upgrade.propose(registry, changed(settings), registry.manifest(version), {}, **said)
    assert newest()["format"] == 2
    registry.change(lambda now: pin(now, version, **said))
    registry.change(lambda now: follow(now, **said))
    assert newest()["format"] == 2
    went = registry.change(lambda now: structs.replace(roll_back(now, version, Mask.NONE, **said), plan={"end": 14}))
    assert (went.epoch, went.base, newest()["format"]) == (3, version, 2)
    registry.change(lambda now: follow(now, **said))
    # What 0.1.0 itself wrote, field by field, and with nothing masked.
    known = json.loads(unseal(written[registry.path / "control" / "00000001.json"]))
    assert newest().keys() == known.keys()
    assert (newest()["format"], newest()["base"], newest()["mask"]) == (1, version, known["mask"])
    assert {path: path.read_bytes() for path in written} == written
