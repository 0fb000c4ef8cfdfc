"""A rollout with real processes: a better trial comes to everybody, operators halt it, and failures cost nobody an answer.

Two hosts, each with its registry, applier and worker, real Kafka, users who ask over HTTP, and the command that drives it.

What users do is written into the training log here, as the stream would.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.events.identity import Salt, user_id
from state.experiments.evidence import LIVE, TRIAL, arm_of, position_of
from state.experiments.experiment import Change, Experiment, Experiments
from state.features.spec import FeatureSpec
from state.log import Topics, Writer
from state.microbatch.batch import NAMES
from state.microbatch.codec import decode, encode
from state.process.environment import wall_ms
from state.process.network import free_port
from state.registry.registry import Registry
from tests import forked
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.fire import Line, Trainer
from tests.deploy.serving.stocked import DIM, SALT_KEY, Lowered
from tests.deploy.serving.test_clicks import record
from tests.deploy.serving.test_rest import answers, until

USERS = 1500
SALT = Salt(SALT_KEY)
PATIENCE_S = 300.0


class ServedHost:
    """`springtide serve` over a registry of its own, with so many versions."""

    def __init__(self, folder: Path, kafka: Kafka, lowered: Lowered, versions: int, **more: object) -> None:
        self.folder, self.state, self.port = folder, folder / "state", free_port()
        self.state.mkdir(parents=True)
        salt = folder / "salt"
        salt.write_bytes(SALT_KEY)
        salt.chmod(0o600)
        values = {
            "paths.state": self.state, "paths.salt_file": salt, "serving.port": self.port, "serving.grpc_port": 0,
            "serving.metrics_port": 0, "serving.drain_s": 0, "serving.max_queue_ms": 60_000, "serving.timeout_s": 600,
            "kafka.bootstrap_servers": kafka.bootstrap_servers, "kafka.microbatches_topic": kafka.microbatches_topic,
            "kafka.exposures_topic": kafka.exposures_topic,
            # Processes share a machine with whatever else it does; latencies are judged in tests/state/experiments.
            "rollout.slower_ms": 60_000, **more,
        }  # fmt: skip
        self.flags = [f"--{name}={value}" for name, value in values.items()]
        self.registry = Registry(self.state / "registry")
        trainer = Trainer(self.registry, [Line(lowered.model, lowered.content, FeatureSpec())], DIM)
        for _ in range(versions):
            trainer.publish()
        self.log = (folder / "log").open("w+")
        self.process = forked.Popen(
            [sys.executable, "-m", "deploy.serve", *self.flags], stdout=self.log, stderr=subprocess.STDOUT
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()


def ended_or_ready(host: ServedHost) -> bool:
    return host.process.poll() is not None or answers(host.port, "/readyz")


class Site:
    """A live host and a trial's, and the users."""

    def __init__(self, folder: Path, kafka: Kafka, lowered: Lowered) -> None:
        self.kafka, self.seeds = kafka, itertools.count(1)
        self.driven: list[subprocess.Popen[bytes]] = []
        self.newest: list[tuple[int, str | None, int]] = []
        with Topics(kafka) as topics:
            topics.ensure(kafka.microbatches_topic, 1)
        self.trial = ServedHost(folder / "trial", kafka, lowered, 2)
        self.live = ServedHost(folder / "live", kafka, lowered, 1, **{"rollout.address": self.trial.url})
        self.experiments = Experiments(load(self.live.flags, {}, "/dev/null"))
        self.client, self.writer, self.written = httpx.Client(timeout=30.0), Writer(kafka), 0
        # Without a click of any time histories are not there yet; the first of these is of 1970.
        self._engage([user_id(SALT, "user-0")] * 2)

    def wait_until_ready(self) -> None:
        for host in (self.live, self.trial):
            until(partial(ended_or_ready, host), PATIENCE_S)
            assert host.process.poll() is None, (host.folder / "log").read_text()

    def ask(self, number: int) -> tuple[str | None, int]:
        """The arm that an answer names, and its version."""
        found = self.client.get(f"{self.live.url}/v1/profiles/user-{number}?top=1")
        assert found.status_code == 200, found.text
        return found.headers.get("springtide-arm"), found.json()["version"]["number"]

    def ask_many(self, numbers: Sequence[int]) -> list[tuple[int, str | None, int]]:
        """Number, arm and version of each answer of a batch."""
        asked = {"users": [f"user-{number}" for number in numbers], "top": 1}
        found = self.client.post(f"{self.live.url}/v1/profiles:batch", json=asked)
        assert found.status_code == 200, found.text
        answers = found.json()["profiles"]
        assert [one["user_id"] for one in answers] == asked["users"]
        return [(n, one.get("arm"), one["version"]["number"]) for n, one in zip(numbers, answers, strict=True)]

    def use(
        self, rates: Mapping[str, float], over: Callable[[], bool], crowd: Iterable[Sequence[int]] | None = None
    ) -> list[tuple[int, str | None, int]]:
        """Users ask and engage, so often an answer as the rate of their arm says, until it is over."""
        asked: list[tuple[int, str | None, int]] = []
        deadline, random = time.monotonic() + PATIENCE_S, np.random.default_rng(next(self.seeds))
        self.newest = []
        for numbers in crowd or (random.integers(0, USERS, 100).tolist() for _ in itertools.count()):
            if over():
                return asked
            assert time.monotonic() < deadline, f"it did not happen in time, after {len(asked):,} answers"
            given = self.newest = self.ask_many(numbers)
            asked += given
            engaged = [
                user_id(SALT, f"user-{number}")
                for (number, arm, _), chance in zip(given, random.random(len(given)), strict=True)
                for _ in range(int(rates[arm or LIVE] + chance))
            ]
            if engaged:
                self._engage(engaged)
        until(over, PATIENCE_S)
        return asked

    def _engage(self, users: list[int]) -> None:
        first, self.written = self.written, self.written + len(users)
        made = decode(record(first, self.written, salt=SALT.fingerprint))
        columns = {name: getattr(made, name) for name in NAMES} | {"user": np.array(users, np.uint64)}
        header = replace(made.header, created_ms=wall_ms())
        self.writer.send(self.kafka.microbatches_topic, 0, None, encode(header, columns))
        self.writer.flush()

    @property
    def experiment(self) -> Experiment:
        return self.experiments.document().experiments[-1]

    def begin(self, name: str) -> None:
        """An experiment whose registry is that of the other host."""
        change = Change(wall_ms(), "shadow", None, 0.0, "ann", "to see")
        made = Experiment(name, "shadow", "nothing", None, 1, {}, (change,))
        self.experiments.edit(lambda now: now.with_experiment(made))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", "experiment", *words, *self.live.flags]

    def said(self, *words: str) -> str:
        found = forked.run(self.command(*words), capture_output=True, text=True, timeout=PATIENCE_S)
        assert found.returncode == 0, found.stderr
        return str(found.stdout)

    def close(self) -> None:
        for process in self.driven:
            process.kill()
            process.wait()
        self.writer.close()
        self.client.close()
        self.live.close()
        self.trial.close()


class Driving:
    """The command, and what it says."""

    def __init__(self, site: Site, log: Path, *words: str) -> None:
        self.log = log
        with log.open("a") as output:
            self.process = forked.Popen(site.command("rollout", *words), stdout=output, stderr=subprocess.STDOUT)
        site.driven.append(self.process)

    def says(self, what: str) -> bool:
        assert self.process.poll() in (None, 0), self.log.read_text()
        return what in self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, kafka: Any, lowered: Lowered) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("rollout")
    mine = Settings().kafka
    suffix = f"rollout-{time.time_ns()}"
    settings = replace(
        mine, bootstrap_servers=kafka.bootstrap_servers, microbatches_topic=f"log-{suffix}",
        exposures_topic=f"exposures-{suffix}",
    )  # fmt: skip
    with ExitStack() as closing:
        made = Site(folder, settings, lowered)
        closing.callback(made.close)
        made.wait_until_ready()
        yield made


@pytest.mark.nightly
def test_an_operator_halts_resumes_and_rolls_back_and_each_endpoint_is_split(site: Site, tmp_path: Path) -> None:
    site.begin("steady")
    driving = Driving(site, tmp_path / "log", "steady", "--steps", "50,100", "--every", "1h")
    until(lambda: site.ask(1)[0] is not None)
    asked = site.ask_many(range(200))
    trial = next(number for number, arm, _ in asked if arm == TRIAL)
    assert "halted, 0.5 of the users" in site.said("halt", "steady", "--reason", "lunch")
    assert site.ask(trial) == (TRIAL, 2)
    assert "running" in site.said("resume", "steady")
    about = {"user_id": f"user-{trial}"}
    ranked = site.client.post(f"{site.live.url}/v1/rank", json={**about, "items": ["i1", "i2"]})
    assert ranked.headers["springtide-arm"] == TRIAL and ranked.json()["version"]["number"] == 2
    refused = site.client.post(f"{site.live.url}/v1/rank", json={**about, "items": []})
    assert refused.status_code == 400 and refused.json()["where"] == "/items"
    # What is wrong with a row of a batch is named by its place in the whole, whichever arm it would be of.
    for wrong in (trial, next(number for number, arm, _ in asked if arm == LIVE)):
        rows = [{"user_id": f"user-{number}"} for number in range(20)] + [{"user_id": f"user-{wrong}", "at": "noon"}]
        refused = site.client.post(f"{site.live.url}/v1/profiles:batch", json={"profiles": rows})
        assert (refused.status_code, refused.json()["where"]) == (400, "/profiles/20/at")
    assert "back, 0 of the users" in site.said("back", "steady", "--reason", "enough")
    until(lambda: site.ask(1) == (None, 1))
    assert driving.process.wait(timeout=60) == 0
    other = forked.run(site.command("halt", "nobody"), capture_output=True, text=True, timeout=60)
    assert other.returncode == 1 and "there is no experiment nobody" in other.stderr
    site.said("stop", "steady", "--reason", "enough")


def test_a_better_trial_comes_to_everybody_though_what_drives_it_is_killed(site: Site, tmp_path: Path) -> None:
    words = ("wider", "--steps", "30,60,100", "--every", "1s")
    site.begin("wider")
    driving = Driving(site, tmp_path / "log", *words)
    rates: dict[str, float] = {TRIAL: 0.8, LIVE: 0.4}
    first = site.use(rates, lambda: driving.says("wider running, 0.6"))
    driving.kill()
    before = site.experiment
    places = {number: position_of(SALT, "wider", user_id(SALT, f"user-{number}")) for number in range(USERS)}
    joining = next(number for number, place in places.items() if arm_of(place, 0.3) != arm_of(place, before.share))

    def took_the_step() -> bool:
        """Whether the host has read the step's share, a moment after its driver reported it."""
        return bool(site.newest) and site.newest[-1][1] == TRIAL

    meanwhile = site.use(rates, took_the_step, itertools.repeat([joining]))
    meanwhile += site.use(rates, iter([False, False, True]).__next__)
    assert site.experiment == before, "shares stay as they are"
    assert all(arm == arm_of(places[number], before.share) for number, arm, _ in meanwhile[-100:])
    assert all(site.ask(number)[0] == arm_of(places[number], before.share) for number in range(20))
    again = Driving(site, tmp_path / "again", *words)
    last = site.use(rates, lambda: again.says("wider done"))
    assert again.process.wait(timeout=60) == 0
    # Who was in the trial's arm stays there.
    arms: dict[int, list[str | None]] = {}
    for number, arm, _ in [*first, *meanwhile, *last]:
        arms.setdefault(number, []).append(arm)
    moved = [one for one in arms.values() if TRIAL in one and LIVE in one[one.index(TRIAL) :]]
    assert moved == [] and last[-1][1:] == (TRIAL, 2)
    found = json.loads(site.said("report", "wider", "-o", "json"))
    assert (found["finding"], found["phase"], found["share"]) == ("better", "done", 1.0)
    # All exposures of both drivers' times are known to a third one; the oldest and newest second of answers aside.
    every = sum(one["answers"] for one in found["arms"].values())
    assert found["arms"][LIVE]["rate"] == pytest.approx(rates[LIVE], abs=0.1)
    named = sum(arm is not None for _, arm, _ in [*first, *meanwhile, *last]) + 20
    assert every <= named and every > 0.8 * named
    assert [one["share"] for one in found["history"]] == [0.0, 0.3, 0.6, 1.0, 1.0]
    assert {one["actor"] for one in found["history"][1:]} == {"gate"}
    assert "wider is stopped" in site.said("stop", "wider", "--reason", "seen")
    until(lambda: site.ask(1) == (None, 1))


@pytest.mark.nightly
def test_a_trial_that_does_not_answer_costs_nobody_an_answer_and_goes_back(site: Site, tmp_path: Path) -> None:
    site.begin("broken")
    driving = Driving(site, tmp_path / "log", "broken", "--steps", "50", "--every", "1h")
    until(lambda: any(site.ask(number)[0] == TRIAL for number in range(20)))
    site.trial.process.terminate()
    site.trial.process.wait(timeout=60)
    asked = site.use({TRIAL: 0.3, LIVE: 0.3}, lambda: driving.says("broken back"))
    assert driving.process.wait(timeout=60) == 0
    assert "it fails in" in driving.log.read_text()
    assert {version for _, arm, version in asked[-100:]} == {1}, "the live version answered for it"
    waiting = Driving(site, tmp_path / "waiting", "broken", "--steps", "50", "--every", "1h")
    until(lambda: waiting.says("its first step waits"))
    assert "broken starting, 0 of the users" in waiting.log.read_text() and site.ask(1) == (None, 1)
    assert "back, 0 of the users" in site.said("back", "broken")
    assert waiting.process.wait(timeout=60) == 0
