"""A poisoned deployment, rolled back fast and then exactly, beside one that never saw the masked clicks: real parts, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy import cli
from deploy.serving.host import Host
from deploy.serving.notes import CLOCK_EXTRA
from state.config.sections import Features
from state.config.settings import Settings
from state.errors import NotReady
from state.events.identity import load_salt
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Reader, Topics
from state.metrics import TrainerMetrics
from state.positions import Source
from state.registry.control import start
from state.registry.mask_entries import entries
from state.registry.registry import Registry
from tests.conftest import KafkaFactory
from tests.e2e.parts import Part
from tests.streaming.streams import BEGIN_MS, FOREVER, StreamProcess, running, send, settings_for, until
from tests.streaming.test_exact_rollback import ALL, BATCH, GOOD, clicks, mask_of
from trainer.engine.step import Trainer
from trainer.learner import Learner
from trainer.versions import checkpoint
from trainer.versions.program import build

AT_MS = BEGIN_MS + (ALL + 60) * 1000
USERS = [*(f"user-{number}" for number in range(17)), "bot-3", "mad", "nobody-knows"]
ITEMS = ["item-0", "item-7", "flooded-item", None]


@dataclass
class Deployment:
    """A stream, a trainer and a serving host of one state directory."""

    settings: Settings
    learner: Learner
    folder: Path

    @property
    def registry(self) -> Registry:
        return Registry(self.settings.registry_dir)

    def learn(self) -> int:
        """Learns all that the log has; returns the version with it."""
        self.learner.tick(0.0)
        self.learner.caught_up = False
        while not self.learner.caught_up:
            self.learner.tick(0.01)
        self.learner._settle(wait=True)
        if self.learner.place.changed:
            self.learner.publish()
            self.learner._settle(wait=True)
        return self.learner.place.parent

    def trained(self) -> dict[str, Any]:
        """Weights, rows, optimizer, counters and measures as one digest; the account; how far the clicks are learned."""
        learner = self.learner
        return {
            "digest": checkpoint.digest(learner._trainer),
            "account": learner._account(),
            "marks": dict(learner.place.marks),
            "rows": learner._trainer.counters,
        }

    def has_read(self, clicks: int, epoch: int = 1) -> bool:
        """Whether the stream has committed so many clicks in that epoch of the log."""
        if not (self.folder / "stream.log").exists() or " reading " not in (self.folder / "stream.log").read_text():
            return False
        store = HistoryStore(
            self.settings.stream_dir / HISTORIES, self.settings.features.history, 1 << 30, readonly=True
        )
        try:
            reached = max(store.positions().values(), default=0) >= clicks
            return reached and (epoch == 1 or b'"epoch": %d' % epoch in (store.extra("log_line") or b""))
        finally:
            store.close()

    def histories(self) -> dict[str, Any]:
        store = HistoryStore(
            self.settings.stream_dir / HISTORIES, self.settings.features.history, 1 << 30, readonly=True
        )
        try:
            return {"digest": store.digest(), "counts": store.counts(), "users": store.users()}
        finally:
            store.close()


def deployed(kafka_settings: KafkaFactory, folder: Path, topic: str, trainer: Trainer | None) -> Deployment:
    made = settings_for(
        kafka_settings(clicks_topic=topic), folder / "state", folder.parent / "salt",
        cut_ms=60_000, cut_rows=BATCH, batch_events=BATCH,
    )  # fmt: skip
    settings = replace(
        made,
        features=Features(history=24),
        model=replace(made.model, dim=8, hidden=(16, 8), popular=4),
        trainer=replace(made.trainer, capacity=64, publish_s=3600.0, metrics_port=0),
        serving=replace(made.serving, map_gb=1, metrics_port=0),
    )
    spec, registry = FeatureSpec.from_settings(settings), Registry(settings.registry_dir)
    salt = load_salt(settings.salt_path)
    about = {"salt": salt.fingerprint, "popular": [], "newest_ms": BEGIN_MS}
    trainer = trainer or Trainer(settings, spec)
    log = settings.kafka.microbatches_topic
    with Topics(settings.kafka) as topics:
        topics.ensure(log, 1, FOREVER)

    def open_log(offset: int | None, leader: int = -1) -> Reader:
        return Reader(settings.kafka, log, [0], {} if offset is None else {0: offset})

    learner = Learner(
        settings, registry, trainer, open_log, registry.add_program(build(trainer.model)), spec.digest, about,
        TrainerMetrics(CollectorRegistry()),
    )  # fmt: skip
    return Deployment(settings, learner, folder)


@pytest.fixture
def parts() -> Iterator[list[Part]]:
    made: list[Part] = []
    yield made
    for part in made:
        part.kill()


def asked(host: Host) -> dict[str, Any]:
    """What each user is answered about each item, at one time."""
    # A worker that met a category before its name came shows the id until the next version.
    host.close()
    predictor = host.predictor()
    found = {}
    for user in USERS:
        for item in ITEMS:
            answer = predictor.profile(user, item=item, at_ms=AT_MS)
            found[f"{user} {item}"] = (
                answer.interests, answer.engagement, answer.vector.tobytes(), answer.features, answer.known,
            )  # fmt: skip
    return found


def served(host: Host, one: Deployment, version: int) -> Callable[[], bool]:
    """Whether the host answers with a version and has read the log to its end."""
    kafka = one.settings.kafka
    with Topics(kafka) as topics:
        end = topics.ends(kafka.microbatches_topic)[0][1]

    def look() -> bool:
        try:
            predictor = host.predictor()
            answer = predictor.profile("user-1", at_ms=AT_MS)
        except NotReady:
            return False
        position = json.loads(predictor._histories.extra("microbatches") or b"{}").get("next", {}).get("0", 0)
        return answer.version["number"] == version and position >= end

    return look


def noted(host: Host) -> dict[str, Any]:
    histories = host.predictor()._histories
    clock = json.loads(histories.extra(CLOCK_EXTRA) or b"{}")
    return {"digest": histories.digest(), "counts": histories.counts(), "clock": clock["event_ms"]}


def iso(number: int) -> str:
    return str(BEGIN_MS + number * 1000)


def rolled_back(one: Deployment, to: int, mode: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    """Gives the operator's command; returns its plan."""
    for name, value in one.settings.environment().items():
        monkeypatch.setenv(name, value)
    users, said = one.folder / "bots.txt", list[str]()
    users.write_text("\n".join([*(f"bot-{number}" for number in range(50)), "mad"]))
    line = [
        *("rollback", "--to", str(to), "--mode", mode, "--reason", "bots", "-o", "json", "--skip-users", str(users)),
        *("--skip", f"0:{GOOD + 300}-{GOOD + 309}", "--skip-time", f"{iso(GOOD + 100)}..{iso(GOOD + 160)}"),
        *more,
    ]
    cli.run(line, lambda *_: None, AT_MS + 3_600_000, said.append)
    monkeypatch.undo()
    plan: dict[str, Any] = json.loads("\n".join(said))["plan"]
    return plan


def ended(stream: StreamProcess) -> None:
    assert stream.stop() == 0, stream.lines


def test_after_an_exact_rollback_all_is_as_if_the_masked_clicks_had_never_been(
    kafka_settings: KafkaFactory, tmp_path: Path, parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, values = kafka_settings().clicks_topic, clicks()
    ours = deployed(kafka_settings, tmp_path / "ours", topic, None)
    kafka, registry = ours.settings.kafka, ours.registry
    with Topics(kafka) as topics:
        topic_id = topics.ensure(topic, 1, FOREVER).topic_id
    send(kafka, values[:GOOD], partition=lambda _: 0)
    ours.learner.enter(registry.propose(start(actor="trainer", reason="first start", now_ms=0)))
    parts.append(Part("applier", ours.settings, tmp_path / "ours" / "applier.log"))
    host = Host(ours.settings, load_salt(ours.settings.salt_path), lambda: AT_MS)
    # 1. The good clicks are learned; then the poison is, and answered from.
    with running(ours.settings, tmp_path / "ours" / "stream.log") as stream:
        until(lambda: ours.has_read(GOOD), "the good clicks are not committed", 60.0)
        good = ours.learn()
        send(kafka, values[GOOD:], GOOD, partition=lambda _: 0)
        until(lambda: ours.has_read(ALL - BATCH), "the poison is not committed", 60.0)
        bad = ours.learn()
        until(served(host, ours, bad), "the poison is not answered from", 60.0)
        poisoned, answered_poison = ours.trained(), asked(host)
        # 2. Fast: the trainer leaves the masked rows out; rows after them still count them in their windows.
        assert "exact" not in rolled_back(ours, good, "fast", monkeypatch)
        ours.learn()
        fast = ours.trained()
        assert fast["account"]["masked"] > 200
        # 3. Exactly.
        planned = rolled_back(ours, good, "exact", monkeypatch, "--dry-run")["exact"]
        rolled_back(ours, good, "exact", monkeypatch)
        assert (planned["clicks"], planned["histories"] > 0) == (fast["marks"][Source(topic_id, 0)] - GOOD, True)
        control = registry.control()
        assert control is not None
        assert (control.mode, control.epoch, control.log[-1].epoch) == ("exact", 3, 2)
        until(lambda: ours.has_read(ALL, epoch=2), "the stream did not go back and read again", 60.0)
        ended(stream)
    ours.learn()
    registry.change(
        lambda now: replace(now, generation=now.generation + 1, serving=start(actor="", reason="", now_ms=0).serving)
    )
    exact, newest = ours.trained(), ours.learner.place.parent
    until(served(host, ours, newest), "the new epoch is not answered from", 60.0)
    answers, notes = asked(host), noted(host)
    ours.learner.close()
    host.close()

    # 4. The other has the mask from the beginning.
    theirs = deployed(kafka_settings, tmp_path / "theirs", topic, ours.learner._trainer)
    mask = replace(mask_of(theirs.settings, topic_id), generation=1)
    held = tuple(entries(mask))
    first = start(actor="trainer", reason="first start", now_ms=0)
    theirs.learner.enter(theirs.registry.propose(replace(first, masks=held, mask_generation=1, last_mask=len(held))))
    parts.append(Part("applier", theirs.settings, tmp_path / "theirs" / "applier.log"))
    with running(theirs.settings, tmp_path / "theirs" / "stream.log") as stream:
        until(lambda: theirs.has_read(ALL), "the other stream did not read all", 60.0)
        ended(stream)
    version = theirs.learn()
    host = Host(theirs.settings, load_salt(theirs.settings.salt_path), lambda: AT_MS)
    until(served(host, theirs, version), "the other does not answer", 60.0)

    assert exact == theirs.trained()
    assert ours.histories() == theirs.histories()
    assert notes == noted(host)
    assert answers == asked(host)
    assert answers != answered_poison
    assert len({poisoned["digest"], fast["digest"], exact["digest"]}) == 3
    (counted,) = ours.histories()["counts"].values()
    assert (counted["next"], counted["masked"] > 200) == (ALL, True)
    assert Source(topic_id, 0) in exact["marks"]
    host.close()
    theirs.learner.close()
