"""Checks a custom ranker or tower before training: `python -m trainer.checks [--transform DIR]`.

`trainer/ranker_checks.py` checks a ranker. This module checks a tower, on
made-up rows, in a few seconds:

1. It can be loaded and built. Its weights are float32, have unique names, and
   have the same initial values in every process.
2. It returns `[B, hidden[-1]]` float32, with and without training.
3. Its output depends on row, weights and seed alone. It keeps no state, uses
   the seed only in training, and gives the same output for a row alone and in
   a batch.
4. It lowers to LiteRT's built-in operations, and LiteRT computes the same.

The check then compares the model's weights with those of the version that
training would continue from. It also lowers the whole model with the tower and
compares the outputs, as the trainer does. It refuses a name in `model.options`
that neither ranker, tower nor preprocessing reads.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from state.config.sections import AskedModel
from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.lowering import ROWS_TOLERANCE, TOLERANCE, difference, lower_saved_model, run_lowered
from state.process.part import OPTIONS_READ, run_check
from state.process.user_code import error_line

ROWS = 64
ALONE = 8
SEEDS = ((0, 0), (3, 5))
SEEDED = "draw from the seed with tf.random.stateless_*"
F32 = npt.NDArray[np.float32]


def is_own(model: ModelSettings) -> bool:
    """Whether `model.ranker` or `model.tower` is custom. The defaults need no check."""
    default = ModelSettings()
    return (model.ranker, model.tower) != (default.ranker, default.tower)


def check_tower(settings: ModelSettings, width_in: int) -> str:
    """Checks the tower that `model.tower` names; returns a one-line description.

    Args:
        settings: The section `[model]`.
        width_in: Width of the tower's input.

    Raises:
        SettingsError: There is no such builder, or two weights have the same name.
        ProgramError: The tower fails a check; the message says what it did and what is required.
    """
    import tensorflow as tf

    what = f"model.tower {settings.tower!r}"
    # 1.
    tower = _built(settings, width_in, what)
    _check_weights(tower, _built(settings, width_in, what), what)
    x = np.random.default_rng(7).normal(0.0, 1.0, (ROWS, width_in)).astype(np.float32)
    x[0], x[1] = 0.0, 10.0
    # 2.
    call = _CheckedTower(tower, settings.hidden[-1], what)
    held = [variable.numpy() for variable in tower.variables]
    plain, trained = call(x, False, SEEDS[0]), call(x, True, SEEDS[1])
    # 3.
    if not (np.isfinite(plain).all() and np.isfinite(trained).all()):
        raise ProgramError(f"{what}: its output is not finite for some rows", "guard logarithms and divisions")
    if any((now.numpy() != before).any() for now, before in zip(tower.variables, held, strict=True)):
        raise ProgramError(
            f"{what} changed a variable while it was called: a tower remembers nothing between calls (no moving averages)"
        )
    if (call(x, False, SEEDS[0]) != plain).any() or (call(x, True, SEEDS[1]) != trained).any():
        raise ProgramError(f"{what}: the same rows and seed gave two different outputs", SEEDED)
    if (call(x, False, SEEDS[1]) != plain).any():
        raise ProgramError(f"{what}: without training its output depends on the seed", "dropout is for training only")
    for row in range(ALONE):
        apart = difference(call(x[row : row + 1], False, SEEDS[0]), plain[row : row + 1])
        if apart > ROWS_TOLERANCE:
            raise ProgramError(
                f"{what}: row {row} gives another output alone than in a batch of {ROWS} (difference {apart:.2g}, allowed "
                f"{ROWS_TOLERANCE:g})",
                "nothing may be computed over the rows of a batch",
            )
    # 4.
    with tempfile.TemporaryDirectory(prefix="springtide-tower-") as folder:
        predict = tf.function(lambda x: {"vector": tower(x, False, tf.constant(SEEDS[0]))}, autograph=False)
        module = tf.Module()
        module.tower = tower
        concrete = predict.get_concrete_function(tf.TensorSpec([None, width_in], tf.float32, "x"))
        tf.saved_model.save(module, folder, signatures={"predict": concrete})
        content = lower_saved_model(Path(folder), ["predict"], what, frozen=True)
    apart = difference(run_lowered(content, "predict", {"x": x})["vector"], plain)
    if apart > TOLERANCE:
        raise ProgramError(
            f"{what}: LiteRT's output differs from TensorFlow's by {apart:.2g} (allowed {TOLERANCE:g})",
            "replace the operation that the two compute differently",
        )
    weights = ", ".join(f"{_name(one)} {list(one.shape)}" for one in tower.trainable_variables)
    return f"{what}: [B, {width_in}] to [B, {plain.shape[1]}], weights {weights or 'none'}, lowers to LiteRT, differs there by {apart:.1g}"


def require_options_read(model: ModelSettings, read: Collection[str]) -> None:
    """Refuses names in `model.options` that no custom function reads.

    Raises:
        SettingsError: There is such a name.
    """
    if unread := [name for name in model.written if name not in read]:
        names = f"the names read are {', '.join(sorted(read))}" if read else "no name was read"
        raise SettingsError(
            f"model.options {unread[0]}={model.written[unread[0]]}: neither ranker, tower nor preprocessing read it; {names}",
            "correct the name, take it out, or read it with settings.option(NAME, DEFAULT)",
        )


def _built(settings: ModelSettings, width_in: int, what: str) -> Any:
    from trainer.model.tower import load_builder

    wanted = "wanted is build(width_in: int, settings) -> tf.Module with __call__(x, training, seed)"
    try:
        tower = load_builder(settings.tower)(width_in, settings)
    except SettingsError:
        raise
    except Exception as error:
        raise ProgramError(f"{what} raised {error_line(error)}", wanted) from error
    import tensorflow as tf

    if not isinstance(tower, tf.Module) or not callable(tower):
        raise ProgramError(f"{what} returned {type(tower).__name__}", wanted)
    return tower


def _check_weights(tower: Any, again: Any, what: str) -> None:
    from trainer.model.tower import named

    weights, others = named(tower), named(again)
    for name, weight in weights.items():
        if weight.dtype != "float32":
            raise ProgramError(f"{what}: its weight {name} is {weight.dtype.name}", "weights are float32")
        if name not in others or weight.shape != others[name].shape:
            raise ProgramError(
                f"{what}: built twice it has other weights ({name})", "take no decision by chance or time"
            )
        if (weight.numpy() != others[name].numpy()).any():
            raise ProgramError(
                f"{what}: built twice its weight {name} begins with other values",
                "draw first values from a fixed seed, such as np.random.default_rng(7)",
            )


class _CheckedTower:
    """Calls the tower as the trainer does, checks its output, and reports its errors in the user's terms."""

    def __init__(self, tower: Any, width: int, what: str) -> None:
        import tensorflow as tf

        self._what, self._wanted = what, f"wanted is [B, {width}] float32, the last of model.hidden"
        self._width = width

        @tf.function(autograph=False)
        def call(x: Any, training: bool, seed: Any) -> Any:
            return tower(x, training, seed)

        self._call = call

    def __call__(self, x: F32, training: bool, seed: tuple[int, int]) -> F32:
        """`[n, width_in]` to `[n, width]` float32."""
        import tensorflow as tf

        try:
            found = self._call(tf.constant(x), training, tf.constant(seed, tf.int32))
        except Exception as error:
            # The trainer runs TensorFlow in a mode that refuses nondeterministic operations.
            if "determinism" in str(error):
                raise ProgramError(f"{self._what}: draws at random", SEEDED) from error
            raise ProgramError(
                f"{self._what}: called with x {list(x.shape)} and training={training} it raised {error_line(error)}",
                self._wanted,
            ) from error
        if not isinstance(found, tf.Tensor):
            raise ProgramError(f"{self._what} gave {type(found).__name__} for {len(x)} rows", self._wanted)
        if found.dtype != tf.float32 or tuple(found.shape) != (len(x), self._width):
            raise ProgramError(
                f"{self._what} gave shape {list(found.shape)} and type {found.dtype.name} for {len(x)} rows",
                self._wanted,
            )
        values: F32 = found.numpy()
        return values


def _name(variable: Any) -> str:
    return str(variable.name).removesuffix(":0")


def main(argv: Sequence[str] | None = None) -> int:
    """Checks `model.ranker` or `model.tower` behind the graph in `--transform DIR`; returns the exit code."""
    return run_check(
        argv,
        "--transform",
        lambda settings, transform: check_model(settings, FeatureSpec.from_settings(settings), transform),
    )


def check_own(settings: Settings, spec: FeatureSpec, preprocessing: Any = None) -> str:
    """Checks the custom ranker, or else the tower, with its actual input width.

    Args:
        settings: All settings.
        spec: The feature spec.
        preprocessing: What the bootstrap analysed; None takes logarithms.

    Raises:
        SettingsError: A function cannot be loaded.
        ProgramError: It fails a check, or does not lower to LiteRT.
    """
    from trainer.model.tower import width_in
    from trainer.ranker_checks import check_ranker

    if settings.model.ranker != ModelSettings().ranker:
        return check_ranker(settings, spec, preprocessing)
    return check_tower(settings.model, width_in(settings.model, spec, preprocessing))


def check_model(settings: Settings, spec: FeatureSpec, transform: Path | None) -> str:
    """Like `check_own`, behind the graph in `transform`, plus two checks.

    The model has to fit the current version, and the whole model of a tower has to lower.
    """
    from trainer import device
    from trainer.model.default_ranker import DefaultRanker
    from trainer.versions.fit import require_settings_fit
    from trainer.versions.program import build, preprocessing_of

    # Threads have to be fixed before TensorFlow's first operation, and loading the graph is one.
    device.prepare(settings.trainer.device, settings.trainer.threads)
    preprocessing = preprocessing_of(transform) if transform else None
    model = AskedModel.of(settings.model, {})
    said = check_own(dataclasses.replace(settings, model=model), spec, preprocessing)
    if transform is not None:
        require_options_read(model, {*model.asked, *json.loads((transform / OPTIONS_READ).read_text())})
    elif model.preprocessing == ModelSettings().preprocessing:
        require_options_read(model, model.asked.keys())
    require_settings_fit(settings, spec)
    if settings.model.ranker == ModelSettings().ranker:
        build(DefaultRanker(settings.model, spec, preprocessing))
    return said


if __name__ == "__main__":
    sys.exit(main())
