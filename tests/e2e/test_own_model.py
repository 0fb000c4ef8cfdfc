"""The example of a model of one's own, with the real processes: checked, bootstrapped, trained, served."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from deploy import cli
from deploy.kafka.configuration import free_ports
from state.config.loading import load
from tests import forked
from tests.e2e.running import PORTS, ROOT

EXAMPLE = ROOT / "deploy" / "examples" / "own_model"
TOML = EXAMPLE / "springtide.toml"
OWN = load(["--config", str(TOML)], env={}).model


def test_the_documentation_shows_the_command_of_the_example() -> None:
    text = (ROOT / "docs" / "how-to" / "own-tower.md").read_text()
    assert "springtide up --config deploy/examples/own_model/springtide.toml" in text


@pytest.mark.nightly
def test_the_example_passes_check_model_which_names_both_functions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-model", "--config", str(TOML)]) == 0
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
    assert "model.tower 'shop:build' does not lower to LiteRT: it has no tf.BesselI0e" in said
    assert not (tmp_path / "state" / "kafka").exists()
    assert not (tmp_path / "state" / "logs").exists()
    assert not list((tmp_path / "state").glob("registry/specs/*"))
