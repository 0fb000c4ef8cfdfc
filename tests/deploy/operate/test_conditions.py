"""Each condition that status waits for holds when the loop is there, and says what is missing until then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from deploy import status
from deploy.status import CONDITIONS, condition_of, wait
from state.config.loading import load
from state.config.settings import Settings
from state.errors import SettingsError, SpringtideError
from state.features.mask import Mask
from state.metrics import ApplierMetrics, TrainerMetrics, serve
from state.process.network import free_ports
from state.registry import control
from state.registry.control import Decision
from state.registry.log_line import WHOLE, turned
from state.registry.registry import Registry
from tests.deploy.operating import draft, files

WHO: Decision = {"actor": "ann", "reason": "poison", "now_ms": 5}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    ports = ("stream.metrics_port", "trainer.metrics_port", "serving.metrics_port", "serving.port", "up.metrics_port")
    flags = [f"--{name}={port}" for name, port in free_ports(ports).items()]
    return load([*flags, "--paths.state", str(tmp_path)], env={})


@pytest.fixture
def trainer(settings: Settings) -> Iterator[TrainerMetrics]:
    collected = CollectorRegistry()
    made = TrainerMetrics(collected)
    stop = serve(collected, settings.trainer.metrics_port)
    yield made
    stop()


@pytest.fixture
def applier(settings: Settings) -> Iterator[ApplierMetrics]:
    collected = CollectorRegistry()
    made = ApplierMetrics(collected)
    stop = serve(collected, settings.serving.metrics_port)
    yield made
    stop()


@pytest.fixture
def registry(settings: Settings) -> Registry:
    made = Registry(settings.registry_dir)
    made.propose(control.start(actor="trainer", reason="first start", now_ms=0))
    return made


def missing(name: str, settings: Settings) -> str:
    return CONDITIONS[name].missing(settings)


@pytest.mark.parametrize("name", CONDITIONS)
def test_where_nothing_runs_the_wait_ends_in_time_and_says_what_is_missing(settings: Settings, name: str) -> None:
    with pytest.raises(SpringtideError, match=rf"{name}: not within 0 s: \S+.*springtide status"):
        wait(settings, name, 0.0)


def test_a_rollback_is_caught_up_once_it_is_learned_again(
    settings: Settings, registry: Registry, trainer: TrainerMetrics
) -> None:
    trainer.epoch.set(1)
    assert missing("caught-up", settings) == "the trainer is starting"
    trainer.lag_records.set(5673)
    assert missing("caught-up", settings) == "the trainer is 5,673 records behind"
    trainer.caught_up.set(1)
    assert missing("caught-up", settings) == ""
    registry.change(lambda now: control.roll_back(now, 40, Mask.NONE, **WHO))
    assert missing("caught-up", settings) == "the trainer is in epoch 1, and epoch 2 is wanted"
    trainer.epoch.set(2)
    assert "still being learned again" in missing("caught-up", settings)
    registry.generations.add_outcome(2, "learned", {})
    assert missing("caught-up", settings) == ""


def test_answers_turn_and_then_follow(settings: Settings, registry: Registry, applier: ApplierMetrics) -> None:
    applier.version.set(50)
    applier.epoch.set(1)
    applier.history_epoch.set(1)
    assert missing("answering", settings) == missing("following", settings) == ""
    registry.change(lambda now: control.roll_back(now, 40, Mask.NONE, **WHO))
    assert "version 50 of epoch 1, and version 40 is wanted" in missing("answering", settings)
    applier.version.set(40)
    assert missing("answering", settings) == ""
    assert "`springtide follow`" in missing("following", settings)
    registry.change(lambda now: control.follow(now, **WHO))
    assert "a version of epoch 2 is wanted" in missing("following", settings)
    applier.epoch.set(2)
    assert missing("following", settings) == ""


def test_answers_follow_from_the_base_where_a_rollback_has_nothing_to_learn(
    settings: Settings, registry: Registry, applier: ApplierMetrics
) -> None:
    registry.publish(draft(1, None), files())
    registry.publish(draft(2, 1), files())
    applier.version.set(1)
    applier.epoch.set(1)
    applier.history_epoch.set(1)
    registry.change(lambda now: control.roll_back(now, 1, Mask.NONE, **WHO))
    registry.change(lambda now: control.follow(now, **WHO))
    assert "a version of epoch 2 is wanted" in missing("following", settings), "it may still learn"
    registry.generations.add_outcome(2, "learned", {"rows": 7, "masked": 7})
    assert missing("following", settings) == ""
    registry.publish(draft(3, 1, epoch=2), files())
    assert "a version of epoch 2 is wanted" in missing("following", settings)


def test_answers_follow_only_with_the_histories_of_the_line_that_control_names(
    settings: Settings, registry: Registry, applier: ApplierMetrics
) -> None:
    applier.history_epoch.set(1)
    line = turned(WHOLE, 1, 30, 60, ())
    registry.change(lambda now: control.roll_back(now, 40, Mask.NONE, log=line, **WHO))
    registry.change(lambda now: control.follow(now, **WHO))
    applier.epoch.set(2)
    assert missing("following", settings) == "the histories belong to epoch 1 of the log, and epoch 2 is wanted"
    applier.history_epoch.set(2)
    applier.microbatch_lag_records.set(2000)
    assert missing("following", settings) == "the histories are 2,000 records behind"
    applier.microbatch_lag_records.set(3)
    assert missing("following", settings) == ""


def test_the_command_says_when_it_holds_and_fails_when_it_does_not(
    settings: Settings, registry: Registry, applier: ApplierMetrics, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for name in settings.origins for word in (f"--{name}", str(settings.value(name)))]
    applier.epoch.set(1)
    applier.history_epoch.set(1)
    assert status.main(["--wait-for", "following", *flags]) == 0
    assert re.fullmatch(r"following after \d\.\d s\n", capsys.readouterr().out)
    assert status.main(["--wait-for", "caught-up", "--timeout", "0.3", *flags]) == 1
    assert "caught-up: not within 0.3 s" in capsys.readouterr().err


def test_numbers_of_trainer_and_answers_are_waited_for(
    settings: Settings, trainer: TrainerMetrics, applier: ApplierMetrics
) -> None:
    trainer.version.set(8)
    trainer.epoch.set(2)
    applier.version.set(7)
    for holds in ("version>=7", "version=8", "epoch=2", "answers=7", "answers>=7"):
        assert condition_of(holds).missing(settings) == ""
    assert condition_of("version=7").missing(settings) == "version is 8"
    assert condition_of("answers>=8").missing(settings) == "answers is 7"


@pytest.mark.parametrize("text", ["", "healthy", "version", "version>7", "epoch=x", "caught-up=1"])
def test_what_is_no_condition_is_refused_with_those_there_are(settings: Settings, text: str) -> None:
    with pytest.raises(SettingsError, match=r"caught-up.*answers>=N"):
        wait(settings, text, 0.0)
