"""A model that the newest version does not fit is refused early, by name, with what to type; any other goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy import up
from state.config.settings import Settings
from state.errors import ModelMismatch, SettingsError
from state.registry.model_fit import require_same_model
from state.registry.registry import SERVING, Registry
from tests.trainer.clicks import SALT, SPEC, batches, small_settings
from tests.trainer.logs import publish, started, write_transform
from trainer.checks import require_settings_fit
from trainer.engine.step import Trainer
from trainer.versions import checkpoint
from trainer.versions.carrying import require_ranker_fits

HIDDEN, DIM = ("--model.hidden", "24,8"), ("--model.dim", "16")
OWN_TOWER = ("--model.tower", "deploy.examples.own_model.tower:build")
OWN_PREPROCESSING = ("--model.preprocessing", "deploy.examples.own_model.preprocessing:preprocessing_fn")
OTHER_RANKER = ("--model.ranker", "deploy.examples.two_tower.ranker:build")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A base and a delta of the small model."""
    settings = small_settings("--paths.state", str(tmp_path))
    found, trainer = started(settings.registry_dir), Trainer(settings, SPEC)
    environment = checkpoint.environment(settings, trainer.device)
    parent = None
    for batch in batches(0, 2):
        parent = publish(found, trainer, parent, environment=environment)
        trainer.step(batch)
    return found


def changed(registry: Registry, flags: Sequence[str]) -> Settings:
    return small_settings("--paths.state", str(registry.path.parent), *flags)


def test_settings_alone_tell_what_differs_and_what_to_type(registry: Registry) -> None:
    with pytest.raises(ModelMismatch) as refused:
        require_same_model(changed(registry, [*HIDDEN, *DIM]))
    differs = "model.dim was 8 and is 16, model.hidden was 16,8 and is 24,8"
    assert refused.value.what == f"version 2 in {registry.path} was trained with another model: {differs}"
    assert refused.value.do == (
        "`springtide upgrade --dry-run` shows what is carried over, `springtide upgrade --reason TEXT` (or `springtide up "
        "--upgrade --reason TEXT`) continues from it; or put the settings back (--model.dim 8 --model.hidden 16,8)"
    )


def test_where_nothing_was_trained_nothing_is_refused(tmp_path: Path) -> None:
    require_same_model(small_settings("--paths.state", str(tmp_path), *HIDDEN))
    Registry(tmp_path / "registry")
    require_same_model(small_settings("--paths.state", str(tmp_path), *HIDDEN))


@pytest.mark.parametrize(
    ("flags", "loads"),
    [
        ((), True),
        (("--model.learning_rate", "0.3", "--model.dropout", "0.5"), True),
        (("--model.tower", "trainer.network:build"), True),
        (HIDDEN, False),
        (DIM, False),
        (OWN_TOWER, False),
        (OTHER_RANKER, False),
    ],
    ids=str,
)
def test_a_version_is_refused_early_where_it_could_not_be_loaded_and_only_there(
    registry: Registry, flags: Sequence[str], loads: bool
) -> None:
    settings = changed(registry, flags)
    trainer = Trainer(settings, SPEC)
    if loads:
        require_same_model(settings)
        require_ranker_fits(registry, settings, SPEC, trainer.model)
        checkpoint.restore(registry, 2, trainer, SPEC.digest)
        return
    with pytest.raises(ModelMismatch, match=r"version 2 .* was trained with another model: .*--model\."):
        require_ranker_fits(registry, settings, SPEC, trainer.model)
    with pytest.raises(SettingsError):
        checkpoint.restore(registry, 2, trainer, SPEC.digest)


def test_another_preprocessing_and_an_option_that_it_asked_for_are_refused(registry: Registry) -> None:
    back = "--model.preprocessing streaming.preprocessing:preprocessing_fn"
    with pytest.raises(ModelMismatch, match=r"model\.preprocessing was .* and is .*own_model") as refused:
        require_same_model(changed(registry, OWN_PREPROCESSING))
    assert back in refused.value.do
    about = {"preprocessing": "streaming.preprocessing:preprocessing_fn", "asked": {"scale": ["1.0", "1.0"]}}
    registry.specs.add_spec(SPEC.digest, about, write_transform)
    require_same_model(changed(registry, ("--model.options", "heads=4")))
    with pytest.raises(ModelMismatch, match=r"model\.options was empty and is scale=2"):
        require_same_model(changed(registry, ("--model.options", "scale=2")))


@pytest.mark.parametrize(("name", "at"), [("manifest.json", 0), (SERVING, 0), (SERVING, 100), (SERVING, -1)])
def test_a_damaged_version_is_left_to_those_who_set_it_aside(registry: Registry, name: str, at: int) -> None:
    settings = changed(registry, OWN_TOWER)
    path = registry.folder("delta", 2) / name
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 0xFF
    path.write_bytes(damaged)
    fresh = Registry(registry.path)
    require_same_model(settings)
    require_ranker_fits(fresh, settings, SPEC, Trainer(settings, SPEC).model)
    assert fresh.newest_good(1) == 1


def test_check_model_holds_a_tower_to_the_version_at_hand(registry: Registry) -> None:
    """What `springtide check-model` and `up` ask of a model of the user's own, before anything starts."""
    require_settings_fit(changed(registry, OWN_TOWER), SPEC)  # nothing was bootstrapped
    registry.specs.add_spec(SPEC.digest, {"salt": SALT, "popular": [], "newest_ms": 0}, write_transform)
    require_settings_fit(changed(registry, ()), SPEC)
    with pytest.raises(ModelMismatch, match=r"model\.tower was"):
        require_settings_fit(changed(registry, OWN_TOWER), SPEC)


def test_trainer_and_up_say_so_before_tensorflow_is_loaded_or_anything_is_started(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--paths.state", str(registry.path.parent), "--model.dim", "8", "--model.hidden", "24,8"]
    done = subprocess.run([sys.executable, "-m", "trainer.loop", *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "ModelMismatch: version 2 in " in done.stderr
    assert "TensorFlow" not in done.stderr
    assert up.main(flags) == 2
    said = capsys.readouterr()
    assert "springtide: version 2 in " in said.err
    assert "from version 2, epoch 1:\n  model.hidden was 16,8 and is 24,8\ncarried over:" in said.out
    assert said.out.endswith("dry run: nothing was changed\n")
