"""Checks a custom ranker or tower before training: `python -m trainer.checks [--transform DIR]`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from state.config.sections import AskedModel
from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.process.part import OPTIONS_READ, run_check
from state.registry.registry import Registry
from trainer import device


def is_own(model: ModelSettings) -> bool:
    """Whether `model.ranker` or `model.tower` is custom. The defaults need no check."""
    default = ModelSettings()
    return (model.ranker, model.tower) != (default.ranker, default.tower)


def require_options_read(model: ModelSettings, read: Collection[str]) -> None:
    """Refuses names in `model.options` that no custom function reads."""
    if unread := [name for name in model.written if name not in read]:
        names = f"the names read are {', '.join(sorted(read))}" if read else "no name was read"
        raise SettingsError(
            f"model.options {unread[0]}={model.written[unread[0]]}: neither ranker, tower nor preprocessing read it; {names}",
            "correct the name, take it out, or read it with settings.option(NAME, DEFAULT)",
        )


def check_model(settings: Settings, spec: FeatureSpec, transform: Path | None) -> str:
    """Like `check_own`, behind the graph in `transform`. Options have to be read, and the model to fit the current version."""
    # Not at the top: TensorFlow reads its log level when it is loaded, and `run_check` sets it before.
    from trainer.model.preprocessing import preprocessing_of
    from trainer.model_checks import check_own

    # Threads have to be fixed before TensorFlow's first operation, and loading the graph is one.
    device.prepare(settings.trainer.device, settings.trainer.threads)
    preprocessing = preprocessing_of(transform) if transform else None
    model = AskedModel.of(settings.model, {})
    result = check_own(dataclasses.replace(settings, model=model), spec, preprocessing)
    if transform is not None:
        require_options_read(model, {*model.asked, *json.loads((transform / OPTIONS_READ).read_text())})
    elif model.preprocessing == ModelSettings().preprocessing:
        require_options_read(model, model.asked.keys())
    require_settings_fit(settings, spec)
    return result


def require_settings_fit(settings: Settings, spec: FeatureSpec) -> None:
    """Like `require_ranker_fits`, for the ranker of the settings; does nothing if nothing was trained.

    Raises:
        ModelMismatch: See `require_ranker_fits`.
        SettingsError: There is no such ranker.
        RegistryError: The registry cannot be read.
    """
    if not settings.registry_dir.is_dir():
        return
    registry = Registry(settings.registry_dir)
    if (
        registry.control() is not None
        and (name := registry.specs.bootstrapped(spec.digest, settings.model)) is not None
    ):
        from trainer.engine.graphs import ranker_of
        from trainer.model.preprocessing import preprocessing_of
        from trainer.versions.carrying import require_ranker_fits

        preprocessing = preprocessing_of(registry.specs.transform(name))
        require_ranker_fits(registry, settings, spec, ranker_of(settings, spec, preprocessing))


def main(argv: Sequence[str] | None = None) -> int:
    """Checks `model.ranker` or `model.tower` behind the graph in `--transform DIR`; returns the exit code."""
    return run_check(
        argv,
        "--transform",
        lambda settings, transform: check_model(settings, FeatureSpec.from_settings(settings), transform),
    )


if __name__ == "__main__":
    sys.exit(main())
