"""A rollout with real processes: two hosts, each with its registry, applier and worker, real Kafka, users who ask over HTTP, and the command that drives it.

What users do is written into the training log here, as the stream would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from state.config.sections import Kafka
from state.config.settings import Settings
from state.events.identity import Salt, user_id
from state.features.spec import FeatureSpec
from state.log import Topics, Writer
from state.microbatch.codec import decode, encode
from state.microbatch.columns import NAMES
from state.registry.registry import Registry
from state.rollouts.assignment import LIVE, TRIAL, arm_of, place_of
from state.rollouts.rollouts import Rollouts
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.fire import Line, Trainer
from tests.deploy.serving.stocked import DIM, SALT_KEY, Lowered
from tests.deploy.serving.test_clicks import record
from tests.deploy.serving.test_rest import answers, free_port, until

USERS = 1500
SALT = Salt(SALT_KEY)
PATIENCE_S = 300.0


class ServedHost:
    """`springtide serve` over a registry of its own, with so many versions."""

    def __init__(self, folder: Path, kafka: Kafka, lowered: Lowered, versions: int, **more: object) -> None:
        self.state, self.port = folder / "state", free_port()
        self.state.mkdir(parents=True)
        salt = folder / "salt"
        salt.write_bytes(SALT_KEY)
        salt.chmod(0o600)
        values = {
            "paths.state": self.state, "paths.salt_file": salt, "serving.port": self.port, "serving.grpc_port": 0,
            "serving.metrics_port": 0, "serving.map_gb": 1, "serving.drain_s": 0, "serving.max_queue_ms": 60_000,
            "kafka.bootstrap_servers": kafka.bootstrap_servers, "kafka.microbatches_topic": kafka.microbatches_topic,
            "kafka.exposures_topic": kafka.exposures_topic, "rollout.planned_answers": 1000,
            # Processes share a machine with whatever else it does; latencies are judged in tests/state/rollouts.
            "rollout.slower_ms": 60_000, **more,
        }  # fmt: skip
        self.flags = [f"--{name}={value}" for name, value in values.items()]
        self.registry = Registry(self.state / "registry")
        trainer = Trainer(self.registry, [Line(lowered.model, lowered.content, FeatureSpec())], DIM)
        for _ in range(versions):
            trainer.publish()
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.serve", *self.flags], stdout=self.log, stderr=subprocess.STDOUT
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()


class Site:
    """A live host and a trial's, and the users."""

    def __init__(self, folder: Path, kafka: Kafka, lowered: Lowered) -> None:
        self.kafka, self.random = kafka, np.random.default_rng(1)
        self.driven: list[subprocess.Popen[bytes]] = []
        with Topics(kafka) as topics:
            topics.ensure(kafka.microbatches_topic, 1)
        self.trial = ServedHost(folder / "trial", kafka, lowered, 2)
        self.live = ServedHost(folder / "live", kafka, lowered, 1, **{"rollout.address": self.trial.url})
        self.client, self.writer, self.written = httpx.Client(timeout=30.0), Writer(kafka), 0
        until(lambda: answers(self.live.port, "/v1/profiles/a") and answers(self.trial.port, "/v1/profiles/a"))

    def ask(self, number: int) -> tuple[str | None, int]:
        """The arm that an answer names, and its version."""
        found = self.client.get(f"{self.live.url}/v1/profiles/user-{number}?top=1")
        assert found.status_code == 200, found.text
        return found.headers.get("springtide-arm"), found.json()["version"]["number"]

    def use(self, rates: Mapping[str, float], over: Callable[[], bool]) -> list[tuple[int, str | None, int]]:
        """Users ask and engage, at the rate of their arm, until it is over."""
        asked, deadline = [], time.monotonic() + PATIENCE_S
        while not over():
            assert time.monotonic() < deadline, f"it did not happen in time, after {len(asked):,} answers"
            engaged = []
            for number in self.random.integers(0, USERS, 100).tolist():
                arm, version = self.ask(number)
                asked.append((number, arm, version))
                if self.random.random() < rates[arm or LIVE]:
                    engaged.append(user_id(SALT, f"user-{number}"))
            if engaged:
                self._engage(engaged)
        return asked

    def _engage(self, users: list[int]) -> None:
        first, self.written = self.written, self.written + len(users)
        made = decode(record(first, self.written, salt=SALT.fingerprint))
        columns = {name: getattr(made, name) for name in NAMES} | {"user": np.array(users, np.uint64)}
        header = replace(made.header, created_ms=time.time_ns() // 1_000_000)
        self.writer.send(self.kafka.microbatches_topic, 0, None, encode(header, columns))
        self.writer.flush()

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "deploy.rollouts.command", *words, *self.live.flags]

    def said(self, *words: str) -> str:
        found = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=PATIENCE_S)
        assert found.returncode == 0, found.stderr
        return found.stdout

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
            self.process = subprocess.Popen(site.command(*words), stdout=output, stderr=subprocess.STDOUT)
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
        yield made


def test_a_worse_trial_goes_back_to_nobody(site: Site, tmp_path: Path) -> None:
    assert site.ask(1) == (None, 1), "nobody is told apart yet"
    driving = Driving(site, tmp_path / "log", "narrower", "--steps", "50,100", "--every", "1h", "--reason", "try it")
    until(lambda: site.ask(1)[0] is not None)
    asked = site.use({TRIAL: 0.25, LIVE: 0.6}, lambda: driving.says("narrower back"))
    assert driving.process.wait(timeout=60) == 0
    assert "it is worse" in driving.log.read_text() and "worse: -" in driving.log.read_text()
    # Each arm is answered by its own registry's version, and a user's arm is the one that the hash says.
    in_trial = {n: arm_of(place_of(SALT, "narrower", user_id(SALT, f"user-{n}")), 0.5) for n in range(USERS)}
    told = [one for one in asked if one[1] is not None]
    assert len(told) > 300
    assert all(arm == in_trial[number] and version == (2 if arm == TRIAL else 1) for number, arm, version in told)
    until(lambda: site.ask(1) == (None, 1))


def test_a_better_trial_comes_to_everybody_though_what_drives_it_is_killed(site: Site, tmp_path: Path) -> None:
    words = ("wider", "--steps", "30,60,100", "--every", "2s")
    driving = Driving(site, tmp_path / "log", *words)
    rates = {TRIAL: 0.8, LIVE: 0.4}
    first = site.use(rates, lambda: driving.says("wider running, 0.6"))
    driving.kill()
    before = Rollouts(site.live.registry.path).newest()
    assert before is not None
    meanwhile = site.use(rates, iter([False, False, True]).__next__)
    assert Rollouts(site.live.registry.path).newest() == before, "shares stay as they are"
    places = {number: place_of(SALT, "wider", user_id(SALT, f"user-{number}")) for number in range(USERS)}
    assert all(arm == arm_of(places[number], before.share) for number, arm, _ in meanwhile[-100:])
    again = Driving(site, tmp_path / "log", *words)
    last = site.use(rates, lambda: again.says("wider done"))
    assert again.process.wait(timeout=60) == 0
    # Who was in the trial's arm stays there.
    arms: dict[int, list[str | None]] = {}
    for number, arm, _ in [*first, *meanwhile, *last]:
        arms.setdefault(number, []).append(arm)
    moved = [one for one in arms.values() if TRIAL in one and LIVE in one[one.index(TRIAL) :]]
    assert moved == [] and last[-1][1:] == (TRIAL, 2)
    found = json.loads(site.said("wider", "--report", "-o", "json"))
    assert (found["finding"], found["phase"], found["share"]) == ("better", "done", 1.0)
    # All exposures of both drivers' times are known to a third one; the oldest and newest second of answers aside.
    every = sum(one["answers"] for one in found["arms"].values())
    told = sum(arm is not None for _, arm, _ in [*first, *meanwhile, *last])
    assert every <= told and every > 0.8 * told
    assert [one["share"] for one in found["history"]] == [0.3, 0.6, 1.0, 1.0]
    assert {one["actor"] for one in found["history"][1:]} == {"gate"}
    assert "ended" in site.said("wider", "--end", "--reason", "promoted")
    until(lambda: site.ask(1) == (None, 1))


def test_an_operator_halts_resumes_and_takes_it_back(site: Site, tmp_path: Path) -> None:
    driving = Driving(site, tmp_path / "log", "steady", "--steps", "100", "--every", "1h")
    until(lambda: site.ask(1) == (TRIAL, 2))
    assert "halted, 1 of the users" in site.said("steady", "--halt", "--reason", "lunch")
    assert site.ask(1) == (TRIAL, 2)
    assert "running" in site.said("steady", "--resume")
    ranked = site.client.post(f"{site.live.url}/v1/rank", json={"user_id": "user-1", "items": ["i1", "i2"]})
    assert ranked.headers["springtide-arm"] == TRIAL and ranked.json()["version"]["number"] == 2
    refused = site.client.post(f"{site.live.url}/v1/rank", json={"user_id": "user-1", "items": []})
    assert refused.status_code == 400 and refused.json()["where"] == "/items"
    assert "back, 0 of the users" in site.said("steady", "--back", "--reason", "enough")
    until(lambda: site.ask(1) == (None, 1))
    assert driving.process.wait(timeout=60) == 0
    other = subprocess.run(site.command("nobody", "--halt"), capture_output=True, text=True, timeout=60)
    assert other.returncode == 1 and "no rollout of nobody" in other.stderr


def test_a_trial_that_does_not_answer_costs_nobody_an_answer_and_goes_back(site: Site, tmp_path: Path) -> None:
    driving = Driving(site, tmp_path / "log", "broken", "--steps", "50", "--every", "1h")
    until(lambda: any(site.ask(number)[0] == TRIAL for number in range(20)))
    site.trial.process.terminate()
    site.trial.process.wait(timeout=60)
    asked = site.use({TRIAL: 0.3, LIVE: 0.3}, lambda: driving.says("broken back"))
    assert driving.process.wait(timeout=60) == 0
    assert "it fails in" in driving.log.read_text()
    assert {version for _, arm, version in asked if arm == TRIAL} == {1}, "the live version answered for it"
