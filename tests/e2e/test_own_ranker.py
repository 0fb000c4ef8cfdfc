"""Examples of a ranker and a model of one's own, with the real processes."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import cli
from state.config.loading import load
from state.features.spec import FeatureSpec
from state.log import Writer
from state.process.environment import wall_ms
from state.process.network import free_ports
from state.registry.control import Control
from state.registry.registry import Registry
from tests import forked
from tests.e2e.running import PORTS, ROOT, SHORT, Loop, until
from tests.e2e.watching import Watching, beside

EXAMPLES = ROOT / "deploy" / "examples"
TOML = EXAMPLES / "din" / "springtide.toml"
FLOOD = 320.0
"""Clicks a second of one user, next to 400 of all others: a rate that the example's ranker learns on two cores."""
WATCHED: Mapping[str, object] = {
    "shoppers.rate": 400,
    "guard.window_s": 1,
}
"""Windows of a second, so that there are soon enough of them to compare with."""


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    made = Loop(tmp_path_factory.mktemp("din"), {**SHORT, **WATCHED, "config": TOML})
    made.start()
    try:
        yield made
        assert made.stop() == 0
    finally:
        if made.running:
            made.stop()


@pytest.fixture(scope="module")
def watching(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    """A Prometheus beside it."""
    with beside(loop.settings, tmp_path_factory.mktemp("prometheus")) as found:
        yield found


@pytest.mark.parametrize("name", ["din", "two_tower"])
def test_the_documentation_of_an_example_names_its_settings(name: str) -> None:
    assert (
        f"--config deploy/examples/{name}/springtide.toml" in (ROOT / "docs" / "how-to" / "own-ranker.md").read_text()
    )


@pytest.mark.nightly
def test_a_ranker_of_ones_own_trains_publishes_and_answers(loop: Loop) -> None:
    wanted = load(["--config", str(TOML)], env={})
    assert loop.settings.model == wanted.model
    assert f"model.ranker '{wanted.model.ranker}'" in loop.said().split("1/9")[0], "checked before the first step"
    user, category = "ada-of-din", "category-of-her-own"
    ends = loop.click([(user, f"item-{number}", category, "purchase") for number in range(20)])
    answer = loop.answer_trained_on(user, ends, item="item-3", category=category)
    assert category in [one["label"] for one in answer["interests"]]
    assert len(answer["vector"]) == wanted.model.hidden[-1]
    assert np.isfinite(answer["vector"]).all()
    assert 0.0 < answer["engagement"]["probability"] < 1.0
    assert (loop.metrics("trainer").total("springtide_trainer_steps_total") or 0) > 0
    assert FeatureSpec.from_settings(loop.settings).sequence == 20


def version(loop: Loop) -> dict[str, Any]:
    found: dict[str, Any] = until(lambda: loop.profile("anyone"), "no answer")["version"]
    return found


@pytest.mark.nightly
def test_a_flood_is_held_and_the_rollback_that_status_prints_heals(loop: Loop, watching: Watching) -> None:
    until(
        lambda: (loop.metrics("trainer").value("springtide_trainer_guard_windows") or 0) >= 32,
        "the guard has too few windows to compare with",
    )
    registry, begin, epoch = Registry(loop.settings.registry_dir), loop.ends(), version(loop)["epoch"]
    click = {"user": "stuck-client", "item": "stuck-item", "category": "stuck-category", "action": "view"}

    def held() -> Control | None:
        control = registry.control()
        return control if control is not None and control.held is not None else None

    with Writer(loop.settings.kafka) as writer:
        begin_s, sent = time.monotonic(), 0

        def flooded() -> Control | None:
            nonlocal sent
            due = int(FLOOD * (time.monotonic() - begin_s))
            for _ in range(due - sent):
                value = json.dumps(click | {"time": wall_ms()}).encode()
                writer.send(loop.settings.kafka.clicks_topic, None, b"stuck-client", value)
            sent = max(due, sent)
            return held()

        control = until(flooded, "a flood is not held")
    suspect = control.held
    assert suspect is not None
    # 1. Answers stay at a version that has learned none of it.
    until(lambda: version(loop)["number"] == suspect.version, "answers do not turn")
    sources = version(loop)["sources"]
    assert all(sources.get(source, 0) <= end for source, end in begin.items()), "its version is from before the flood"
    assert loop.metrics("trainer").value("springtide_trainer_held") == 1.0
    watching.wait_for("SpringtideTrainingHeld")
    # 2. Status says what, why and from where, and what to type.
    state = loop.springtide("status")
    found = state["held"]
    assert found["rule"] == suspect.rule
    assert not 0.7 * found["usual"] < found["signal"] < 1.4 * found["usual"], "numbers that tell"
    assert f"partition {found['clicks'][0]['partition']} offset {found['clicks'][0]['first']}" in found["words"]
    program, command, *words = shlex.split(found["commands"][0])
    assert (program, command) == ("springtide", "rollback")
    # 3. Typed, it heals: what was suspect is left out, and answers follow by themselves.
    done = loop.springtide(command, *words)
    assert done["control"]["epoch"] == epoch + 1 and done["plan"]["masked"] > FLOOD / 2

    def healed() -> bool:
        # What of the flood came after a hold may be held once more, and is left out alike.
        if held() is not None:
            loop.springtide(*shlex.split(loop.springtide("status")["held"]["commands"][0])[1:])
        return bool(version(loop)["epoch"] > epoch)

    until(healed, "answers do not follow into the new epoch", 400.0)
    ends = loop.click([("honest", "book", "reading", "view")])
    answer = until(
        lambda: loop.if_trained_on("honest", ends) if healed() else None,
        "no version has learned from an honest click",
        400.0,
    )
    assert answer["version"]["epoch"] > epoch
    assert held() is None
    watching.wait_until_over("SpringtideTrainingHeld")


EXAMPLE = ROOT / "deploy" / "examples" / "own_model"
OWN_MODEL_TOML = EXAMPLE / "springtide.toml"
OWN = load(["--config", str(OWN_MODEL_TOML)], env={}).model


def test_the_documentation_shows_the_command_of_the_example() -> None:
    text = (ROOT / "docs" / "how-to" / "own-tower.md").read_text()
    assert "springtide up --config deploy/examples/own_model/springtide.toml" in text


@pytest.mark.nightly
def test_the_example_passes_check_model_which_names_both_functions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-model", "--config", str(OWN_MODEL_TOML)]) == 0
    preprocessing, tower = capsys.readouterr().out.splitlines()
    assert preprocessing.startswith(
        f"model.preprocessing '{OWN.preprocessing}': [B, 128] to [B, 256], lowers to LiteRT"
    )
    assert tower.startswith(f"model.tower '{OWN.tower}': [B, 352] to [B, 64]")


BAD = """
import tensorflow as tf
import tensorflow_transform as tft


def preprocessing_fn(inputs):
    return {"features": tf.cast(tft.bucketize(inputs["features"][:, :1], 4), tf.float32)}


class Tower(tf.Module):
    def __call__(self, x, training, seed):
        return tf.math.bessel_i0e(x[:, :128])


def build(width_in, settings):
    return Tower()
"""


@pytest.mark.nightly
def test_up_refuses_what_does_not_lower_in_one_line_with_the_operation_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(BAD)
    ports = [f"--{name}={port}" for name, port in free_ports(PORTS).items()]
    words = ["up", "--model.tower=shop:build", "--paths.state", str(tmp_path / "state"), *ports]
    done = forked.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    (said,) = done.stderr.splitlines()
    assert "model.tower 'shop:build'" in said and "does not lower to LiteRT: it has no tf.BesselI0e" in said
    assert not (tmp_path / "state" / "kafka").exists()
    assert not (tmp_path / "state" / "logs").exists()
    assert not list((tmp_path / "state").glob("registry/specs/*"))
