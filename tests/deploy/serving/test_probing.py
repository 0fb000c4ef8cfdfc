"""A version that fails its probe is refused, named, and nobody is answered with it; the next good one is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deploy.serving.answers.host import Host
from deploy.serving.answers.program import LoadedProgram
from deploy.serving.following.versions import check_probe
from state import probe
from state.config.settings import Settings
from state.errors import BadRequest, ProgramError
from state.events.identity import Salt
from state.features.spec import FeatureSpec
from state.registry.control import pin
from state.registry.registry import Registry
from tests.deploy.serving.fire import HostWriter, Line, Trainer
from tests.deploy.serving.stocked import DIM, NOW_MS, SALT_KEY, Lowered
from tests.deploy.serving.test_hot_reload import settings as settings
from trainer.model.inputs import INPUTS, SEQUENCES


def spoiled(tensors: dict[str, Any]) -> None:
    """One weight of one kernel is another one."""
    name = next(name for name in tensors if name.startswith("dense.tower"))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] += 0.5


@pytest.fixture(scope="module")
def line(lowered: Lowered) -> Line:
    return Line(lowered.model, lowered.content, FeatureSpec())


@pytest.fixture
def trainer(settings: Settings, line: Line) -> Trainer:
    return Trainer(Registry(settings.registry_dir), [line], DIM)


@pytest.fixture
def host(settings: Settings, trainer: Trainer) -> Iterator[HostWriter]:
    made = HostWriter(settings)
    yield made
    made.close()


def test_a_version_that_answers_otherwise_is_refused_and_named(
    settings: Settings, trainer: Trainer, host: HostWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log, the metrics and /readyz; a restart and a pin do not make it answer, and what builds on it is taken."""
    good = trainer.publish()
    assert host.settle() == good and host.metrics.refused_version._value.get() == 0
    bad = trainer.publish(spoil=spoiled)
    with caplog.at_level(logging.WARNING):
        assert host.settle() == good and host.settle() == good
    (said,) = [one.getMessage() for one in caplog.records]
    assert f"version {bad} answers otherwise than its trainer" in said and f"version {good} continues to answer" in said
    assert (host.metrics.failed_probes._value.get(), host.metrics.refused_version._value.get()) == (1, bad)
    host.restart()
    assert host.settle() == good and host.metrics.failed_probes._value.get() == 1
    trainer.registry.change(lambda control: pin(control, bad, actor="ann", reason="a test", now_ms=1))
    assert host.settle() == good


def test_readiness_names_it_and_it_cannot_be_asked_for(settings: Settings, trainer: Trainer, host: HostWriter) -> None:
    good, bad = trainer.publish(), trainer.publish(spoil=spoiled)
    assert host.settle() == good
    host.close()
    worker = Host(settings, Salt(SALT_KEY), lambda: NOW_MS)
    assert worker.missing() == {}
    version, why = worker.refused() or (0, "")
    assert version == bad and "otherwise than its trainer" in why
    predictor = worker.predictor()
    with predictor.reading() as reader:
        assert predictor.load_version(reader).served.version == good
        with pytest.raises(BadRequest, match=f"version {bad} is refused"):
            predictor.load_version(reader, bad)
    worker.close()
    again = HostWriter(settings)
    better = trainer.publish()
    assert again.settle() == better and again.metrics.refused_version._value.get() == 0
    again.close()
    assert worker.missing() == {} and worker.refused() is None
    worker.close()


def test_a_program_that_cannot_run_is_refused(trainer: Trainer, host: HostWriter) -> None:
    good = trainer.publish()
    assert host.settle() == good
    trainer._programs[0] = trainer.registry.specs.add_program(b"no program at all")
    bad = trainer.publish()
    assert host.settle() == good and host.metrics.refused_version._value.get() == bad


def widened(tensors: dict[str, Any]) -> None:
    """One kernel has a row more."""
    name = next(name for name in tensors if name.startswith("dense.tower.kernel"))
    tensors[name] = np.pad(tensors[name], ((0, 1), (0, 0)))


def test_weights_that_do_not_fit_the_program_are_refused_with_their_shapes(
    trainer: Trainer, host: HostWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """LiteRT itself would end the process."""
    good = trainer.publish()
    assert host.settle() == good
    bad = trainer.publish(spoil=widened)
    assert host.settle() == good and host.metrics.refused_version._value.get() == bad
    assert "dense_tower_kernel_0 have shape [" in caplog.text and "its program wants [" in caplog.text


def without_probe(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(probe.PREFIX)]:
        del tensors[name]


def test_a_version_without_a_probe_has_the_verdict_of_the_version_it_builds_on(
    trainer: Trainer, host: HostWriter
) -> None:
    good = trainer.publish(spoil=without_probe)
    assert host.settle() == good
    trainer.publish(spoil=spoiled)
    assert host.settle() == good
    unprobed = trainer.publish(spoil=without_probe)
    assert host.settle() == good and host.metrics.refused_version._value.get() == unprobed
    host.restart()
    trainer.publish(spoil=without_probe)
    assert host.settle() == good
    better = trainer.publish()
    assert host.settle() == better


def test_the_first_version_is_refused_too(trainer: Trainer, host: HostWriter) -> None:
    bad = trainer.publish(spoil=spoiled)
    assert host.settle() == 0 and host.metrics.refused_version._value.get() == bad
    assert host.settle() == 0
    assert host.follower.served is None
    good = trainer.publish()
    assert host.settle() == good


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_trainer_and_program_agree_far_closer_than_is_asked(line: Line, lowered: Lowered, scale: float) -> None:
    rng = np.random.default_rng(11)
    weights = {
        name: (scale * rng.normal(0, 1 / np.sqrt(max(value.shape[:1] or (1,))), value.shape)).astype(np.float32)
        for name, value in line.weights.items()
    }
    line.model.set_weights(weights)
    tensors = {f"dense.{name}": value for name, value in weights.items()} | line.probe()
    program = LoadedProgram(lowered.content)
    check_probe(1, program, tensors)
    spoiled(tensors)
    with pytest.raises(ProgramError, match=r"differs by"):
        check_probe(1, program, tensors)


def test_the_probe_gives_whole_numbers_where_the_model_wants_them() -> None:
    assert {one.name for one in (*INPUTS, *SEQUENCES) if one.whole and not one.training} == probe.WHOLE
    given = probe.inputs({"features": (None, 3), "user_row": (-1, 4), "recent_mask": (None, 5), "popular_rows": (7, 2)})
    assert {name: one.shape for name, one in given.items()} == {
        "features": (64, 3), "user_row": (64, 4), "recent_mask": (64, 5), "popular_rows": (7, 2),
    }  # fmt: skip
    features = given["features"]
    assert (features == np.floor(features)).all() and features.min() == 0 and 1000 < features.max() < 4096
    assert set(given["recent_mask"].ravel().tolist()) == {0.0, 1.0} and np.abs(given["user_row"]).max() <= 0.2
    assert given["user_row"][5].tolist() == probe.inputs({"user_row": (64, 4)})["user_row"][5].tolist()
