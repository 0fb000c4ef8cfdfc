"""Checks a user's preprocessing function before anything starts: `python -m streaming.preprocessing_check`.

The check takes a few seconds on synthetic rows:

1. The function can be loaded, and returns `features` as `[B, D']` float32.
2. It depends on the rows alone. The same rows give the same bits, also after a second analysis. A row gives the same
   output alone as in a batch.
3. It lowers to LiteRT's built-in operations, and LiteRT computes the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from state.config.asked_model import AskedModel
from state.config.sections import Model
from state.config.settings import Settings
from state.errors import ProgramError
from state.features.spec import FeatureSpec
from state.lowering import ROWS_TOLERANCE, TOLERANCE, difference, lower_saved_model, run_lowered
from state.process.part import OPTIONS_READ, run_check
from state.process.user_code import first_line, told
from streaming.preprocessing import DEFAULT, FEATURES, Preprocessing, analysed, load_preprocessing

ROWS = 256
ALONE = 8
F32 = npt.NDArray[np.float32]


def is_own(path: str) -> bool:
    """Whether `model.preprocessing` differs from the default, which needs no check."""
    return path != Model().preprocessing


def check_preprocessing(path: str, spec: FeatureSpec, keep: Path | None = None, settings: Model = DEFAULT) -> str:
    """Checks the function that `model.preprocessing` names; returns a description in one line.

    Args:
        path: `module:name`.
        spec: Names the D columns.
        keep: Directory to leave the analysed graph in, `transform_fn/`.
        settings: Passed to a function of two arguments.

    Raises:
        SettingsError: There is no such function.
        ProgramError: It does not meet the requirements; the message says what it did and what is required.
    """
    what = f"model.preprocessing {path!r}"
    function = load_preprocessing(path, settings)
    rows = made_up(spec)
    with tempfile.TemporaryDirectory(prefix="springtide-check-") as folder:
        first, second = keep or Path(folder, "first"), Path(folder, "second")
        # 1.
        for output in (first, second):
            _analysed(function, rows, output, what, len(spec.names))
        # 2.
        transform = _Transform(first)
        found = transform(rows)
        if not np.isfinite(found).all():
            column = int(np.flatnonzero(~np.isfinite(found).all(0))[0])
            raise ProgramError(
                f"{what}: column {column} of its output is not finite for some rows of integers from 0 to 65535",
                "guard logarithms and divisions",
            )
        if (found != transform(rows)).any():
            raise ProgramError(
                f"{what}: the same rows gave two different outputs", "leave out randomness, time and variables"
            )
        if (found != _Transform(second)(rows)).any():
            raise ProgramError(
                f"{what}: two analyses of the same rows gave different graphs",
                "leave out randomness and time, also those of Python and NumPy",
            )
        for row in range(ALONE):
            apart = difference(transform(rows[row : row + 1]), found[row : row + 1])
            if apart > ROWS_TOLERANCE:
                raise ProgramError(
                    f"{what}: row {row} gives another output alone than in a batch of {ROWS} (difference {apart:.2g}, "
                    f"allowed {ROWS_TOLERANCE:g})",
                    "what is computed over a batch must be a TensorFlow Transform analyzer",
                )
        # 3.
        apart = difference(_lowered(transform, rows, Path(folder, "lowered"), what), found)
        if apart > TOLERANCE:
            raise ProgramError(
                f"{what}: LiteRT's output differs from TensorFlow's by {apart:.2g} (allowed {TOLERANCE:g})",
                "replace the operation that the two compute differently (a comparison such as log(x) >= quantile flips by "
                "rounding: compare the integers themselves)",
            )
    return f"{what}: [B, {rows.shape[1]}] to [B, {found.shape[1]}], lowers to LiteRT, differs there by {apart:.1g}"


def made_up(spec: FeatureSpec) -> F32:
    """`[256, D]` float32 synthetic rows: always the same integers, many of them small, extremes included."""
    drawn = np.random.default_rng(7)
    rows = np.minimum(drawn.lognormal(2.0, 2.0, (ROWS, len(spec.names))), 65535.0)
    rows[drawn.random(rows.shape) < 0.3] = 0.0
    rows[0], rows[1] = 0.0, 65535.0
    return np.floor(rows).astype(np.float32)


def _analysed(function: Preprocessing, rows: F32, output: Path, what: str, width: int) -> None:
    """Runs the analysis; an error in the user's function is reported as such."""
    failures: list[ProgramError] = []

    def checked(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return _checked_output(function(inputs), what, width)
        except ProgramError as error:
            failures.append(error)
            raise
        except Exception as error:
            failures.append(ProgramError(f"{what} raised {told(error)}"))
            raise

    try:
        analysed([rows.astype(np.uint16)], checked, output)
    # TensorFlow and Beam wrap the error; the first cause is the user's function.
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise ProgramError(f"{what} cannot be analysed: {type(error).__name__}: {first_line(error)}") from error


def _checked_output(output: Any, what: str, width: int) -> Mapping[str, Any]:
    import tensorflow as tf

    wanted = f"wanted is a dictionary {{'features': [B, D'] float32}}, one row for each of [B, {width}]"
    if not isinstance(output, Mapping) or set(output) != {FEATURES}:
        names = f"a dictionary of {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise ProgramError(f"{what} returned {names}", wanted)
    found = output[FEATURES]
    if not isinstance(found, tf.Tensor):
        raise ProgramError(f"{what} returned features as {type(found).__name__}", wanted)
    if found.dtype != tf.float32 or found.shape.rank != 2 or found.shape[1] is None or found.shape[0] is not None:
        raise ProgramError(f"{what} returned features of shape {found.shape} and type {found.dtype.name}", wanted)
    return {FEATURES: found}


class _Transform:
    """An analysed graph.

    Args:
        output: The directory with `transform_fn/`.
    """

    def __init__(self, output: Path) -> None:
        import tensorflow as tf

        self.graph = tf.saved_model.load(str(output / "transform_fn"))

    def __call__(self, rows: F32) -> F32:
        """`[n, D]` to `[n, D']` float32."""
        import tensorflow as tf

        found: F32 = self.graph.transform_fn({FEATURES: tf.constant(rows)})[FEATURES].numpy()
        return found


def _lowered(transform: _Transform, rows: F32, folder: Path, what: str) -> F32:
    """The output that LiteRT computes."""
    import tensorflow as tf

    module = tf.Module()
    module.graph = transform.graph
    predict = tf.function(lambda features: transform.graph.transform_fn({FEATURES: features}), autograph=False)
    concrete = predict.get_concrete_function(tf.TensorSpec([None, rows.shape[1]], tf.float32, FEATURES))
    tf.saved_model.save(module, str(folder), signatures={"predict": concrete})
    content = lower_saved_model(folder, ["predict"], what)
    return run_lowered(content, "predict", {FEATURES: rows})[FEATURES]


def main(argv: Sequence[str] | None = None) -> int:
    """Checks `model.preprocessing` of the settings; `--keep DIR` keeps the graph. Returns the exit code."""
    return run_check(argv, "--keep", check_and_keep)


def check_and_keep(settings: Settings, keep: Path | None) -> str:
    """Runs `check_preprocessing`; also writes the names of the options that the function read to `keep`."""
    model = AskedModel.of(settings.model, {})
    said = check_preprocessing(model.preprocessing, FeatureSpec.from_settings(settings), keep, model)
    if keep is not None:
        (keep / OPTIONS_READ).write_text(json.dumps(sorted(model.asked)))
    return said


if __name__ == "__main__":
    # Imported by its real name: objects that Beam pickles must not be defined in __main__.
    from streaming.preprocessing_check import main as run_main

    sys.exit(run_main())
