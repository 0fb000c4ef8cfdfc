"""The example of a model of one's own, with the real processes: checked, bootstrapped, trained, served."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy import cli
from deploy.kafka.configuration import free_ports
from deploy.startup.upgrading import is_bootstrapped
from state.config.loading import load
from state.config.sections import Model
from state.features.spec import FeatureSpec
from state.registry.model_fit import require_same_model
from state.registry.registry import Registry
from tests.e2e.running import PORTS, ROOT, SHORT, Loop, led_by

EXAMPLE = ROOT / "deploy" / "examples" / "own_model"
TOML = EXAMPLE / "springtide.toml"
OWN = load(["--config", str(TOML)], env={}).model


def command(*words: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_model(*words: str) -> tuple[int, str, str]:
    """What `springtide check-model` does; exit status, output and errors."""
    said, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        status = cli.main(["check-model", *words])
    return status, said.getvalue(), failed.getvalue()


@pytest.mark.nightly
def test_the_example_trains_publishes_and_answers(tmp_path: Path) -> None:
    own = {
        f"model.{name}": ",".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in vars(OWN).items()
    }
    assert own["model.tower"] != Model().tower and own["model.preprocessing"] != Model().preprocessing
    loop = Loop(tmp_path, {**SHORT, **own})
    loop.start()
    try:
        said = loop.said()
        assert "lowers to LiteRT" in said.split("1/9")[0], "the checks come before the first step"
        user, category = "ada-of-her-own-model", "category-of-her-own"
        ends = loop.click([(user, f"item-{number}", category, "purchase") for number in range(20)])
        answer = loop.answer_trained_on(user, ends, led_by(category), item="item-3", category=category)
        assert len(answer["vector"]) == 64
        registry = Registry(loop.settings.registry_dir)
        spec = FeatureSpec.from_settings(loop.settings)
        assert registry.specs.spec(spec.digest)["preprocessing"] == OWN.preprocessing
        assert np.isfinite(answer["vector"]).all()
        assert (loop.metrics("trainer").total("springtide_trainer_steps_total") or 0) > 0
        assert loop.stop() == 0
        # What a second `up` asks of the registry before it starts anything, and before its bootstrap.
        require_same_model(loop.settings)
        assert is_bootstrapped(loop.settings)
    finally:
        if loop.running:
            loop.stop()


def test_the_readme_shows_the_command_of_the_example() -> None:
    text = (EXAMPLE / "README.md").read_text()
    assert "springtide up --config deploy/examples/own_model/springtide.toml" in text


@pytest.mark.nightly
def test_the_example_passes_check_model_which_names_both_functions() -> None:
    status, said, failed = check_model("--config", str(TOML))
    assert status == 0, failed
    preprocessing, tower = said.splitlines()
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


PREPROCESSING = ("--model.preprocessing=shop:preprocessing_fn", "tf.UpperBound")
TOWER = ("--model.tower=shop:build", "tf.BesselI0e")


def test_check_model_says_what_does_not_lower_in_one_line_with_the_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flag, operation = PREPROCESSING
    status, _, failed = check_model(flag, "--paths.state", str(tmp_path / "state"))
    assert status == 1, failed
    (said,) = failed.splitlines()
    assert refusal(flag, operation) in said


def refusal(flag: str, operation: str) -> str:
    setting, _, function = flag.removeprefix("--").partition("=")
    return f"{setting} '{function}' does not lower to LiteRT: it has no {operation}"


def test_up_refuses_what_does_not_lower_in_one_line_with_the_operation_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(BAD)
    ports = [f"--{name}={port}" for name, port in free_ports(PORTS).items()]
    flag, operation = TOWER
    done = command("up", flag, "--paths.state", str(tmp_path / "state"), *ports, path=tmp_path)
    assert done.returncode == 1, done.stderr
    (said,) = done.stderr.splitlines()
    assert refusal(flag, operation) in said
    assert not (tmp_path / "state" / "kafka").exists()
    assert not (tmp_path / "state" / "logs").exists()
    assert not list((tmp_path / "state").glob("registry/specs/*"))
