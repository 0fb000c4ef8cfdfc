"""The model's preprocessing function: the default one, and code to load, analyse (TensorFlow Transform) and check one.

`python -m streaming.preprocessing` checks a user's function before anything starts. That takes a few seconds on
synthetic rows:

1. The function can be loaded, and returns `features` as `[B, D']` float32.
2. It depends on the rows alone. The same rows give the same bits, also after a second analysis. A row gives the same
   output alone as in a batch.
3. It lowers to LiteRT's built-in operations, and LiteRT computes the same.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.pvalue import PCollection
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from state.config.sections import AskedModel, Model
from state.config.settings import Settings
from state.errors import ProgramError, first_line
from state.features.spec import FeatureSpec
from state.lowering import TOLERANCE, difference, lower_saved_model, run_lowered
from state.process.part import OPTIONS_READ, run_check
from state.process.user_code import error_line, load_named

FEATURES = "features"
LEAST_DEVIATION = 0.25
"""Minimum standard deviation of a logarithm, so that rare columns are not inflated to unit variance."""

CLIP = 6.0
SAMPLE_ROWS = 50_000
"""The most clicks from which the constants are computed, unless `springtide bootstrap --rows` is given."""

DEFAULT = Model()
ROWS = 256
ALONE = 8
F32 = npt.NDArray[np.float32]
Preprocessing = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_FEATURES = pa.schema([(FEATURES, pa.list_(pa.float32()))])


def preprocessing_fn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """TensorFlow Transform preprocessing: logarithms, centred and scaled by the statistics of past clicks.

    The setting `model.preprocessing` replaces it with a custom function, which must use operations that are built into
    LiteRT (no bucketize).

    Args:
        inputs: `features`, `[B, D]` float32: the raw integers.

    Returns:
        `features`, `[B, D']` float32.
    """
    import tensorflow as tf
    import tensorflow_transform as tft

    logs = tf.math.log1p(inputs[FEATURES])
    # tft.scale_to_z_score divides by the rounding error of a constant column.
    mean = tft.mean(logs, reduce_instance_dims=False)
    variance = tft.var(logs, reduce_instance_dims=False)
    scaled = (logs - mean) / tf.sqrt(tf.maximum(variance, LEAST_DEVIATION**2))
    return {FEATURES: tf.clip_by_value(scaled, -CLIP, CLIP)}


def load_preprocessing(path: str, settings: Model = DEFAULT) -> Preprocessing:
    """Loads the function that `module:name` names; a function of two arguments also gets the settings and its options.

    Raises:
        SettingsError: There is no such function.
    """
    function: Any = load_named(path, "model.preprocessing")
    if callable(function) and len(inspect.signature(function).parameters) >= 2:
        return lambda inputs: cast(Mapping[str, Any], function(inputs, settings))
    return cast(Preprocessing, function)


@contextmanager
def analysis() -> Iterator[beam.Pipeline]:
    """Yields a local Beam pipeline with a TensorFlow Transform context; it runs at the end of the block."""
    import tensorflow_transform.beam as tft_beam

    # An explicit runner, because DirectRunner would first try to download another one.
    with (
        tempfile.TemporaryDirectory(prefix="springtide-analysis-") as scratch,
        beam.Pipeline(runner=FnApiRunner()) as pipeline,
        tft_beam.Context(scratch),
    ):
        yield pipeline


def analyse(features: PCollection[pa.RecordBatch], width: int, preprocessing: Preprocessing, output: Path) -> None:
    """Adds the analysis to a pipeline of `analysis`; it writes `transform_fn/` to the directory `output`.

    `features` are results of `record_batch` with `width` columns; `preprocessing` has the one input `features`.
    """
    import tensorflow_transform.beam as tft_beam
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tensorflow_transform.beam.tft_beam_io.transform_fn_io import WriteTransformFn
    from tfx_bsl.tfxio.tensor_adapter import TensorAdapterConfig

    dense = schema_pb2.TensorRepresentation.DenseTensor(column_name=FEATURES)
    dense.shape.dim.add().size = width
    adapter = TensorAdapterConfig(_FEATURES, {FEATURES: schema_pb2.TensorRepresentation(dense_tensor=dense)})
    transform = (features, adapter) | "Analyse" >> tft_beam.AnalyzeDataset(preprocessing)
    transform | "Write the graph" >> WriteTransformFn(str(output))


def analysed(features: Iterable[npt.NDArray[np.uint16]], preprocessing: Preprocessing, output: Path) -> None:
    """Analyses in-memory chunks of `[n, D]` uint16; writes `transform_fn/` to the directory `output`."""
    chunks = list(features)
    with analysis() as pipeline:
        batches = pipeline | "Take the rows" >> beam.Create(chunks) | "Make record batches" >> beam.Map(record_batch)
        analyse(batches, chunks[0].shape[1], preprocessing, output)


def record_batch(features: npt.NDArray[np.uint16]) -> pa.RecordBatch:
    """Converts `[n, D]` uint16 to the Arrow column that TensorFlow Transform takes."""
    rows, width = features.shape
    values = pa.array(features.astype(np.float32).reshape(-1))
    offsets = pa.array(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return pa.RecordBatch.from_arrays([pa.ListArray.from_arrays(offsets, values)], schema=_FEATURES)


def check_preprocessing(path: str, spec: FeatureSpec, keep: Path | None = None, settings: Model = DEFAULT) -> str:
    """Checks the function `module:name` that `model.preprocessing` names; returns a description in one line.

    The analysed graph stays in the directory `keep`. A function of two arguments also gets `settings`.

    Raises:
        SettingsError: There is no such function.
        ProgramError: It does not meet the requirements; the message has its behaviour and the requirement.
    """
    name = f"model.preprocessing {path!r}"
    function = load_preprocessing(path, settings)
    rows = made_up(spec)
    with tempfile.TemporaryDirectory(prefix="springtide-check-") as folder:
        first, second = keep or Path(folder, "first"), Path(folder, "second")
        # 1.
        for output in (first, second):
            _analysed(function, rows, output, name)
        # 2.
        transform = _Transform(first)
        outputs = transform(rows)
        if not np.isfinite(outputs).all():
            column = int(np.flatnonzero(~np.isfinite(outputs).all(0))[0])
            raise ProgramError(
                f"{name}: column {column} of its output is not finite for some rows of integers from 0 to 65535",
                "guard logarithms and divisions",
            )
        if (outputs != transform(rows)).any():
            raise ProgramError(
                f"{name}: the same rows gave two different outputs", "leave out randomness, time and variables"
            )
        if (outputs != _Transform(second)(rows)).any():
            raise ProgramError(
                f"{name}: two analyses of the same rows gave different graphs",
                "leave out randomness and time, also those of Python and NumPy",
            )
        for row in range(ALONE):
            error = difference(transform(rows[row : row + 1]), outputs[row : row + 1])
            if error > TOLERANCE:
                raise ProgramError(
                    f"{name}: row {row} gives another output alone than in a batch of {ROWS} (difference {error:.2g}, "
                    f"allowed {TOLERANCE:g})",
                    "what is computed over a batch must be a TensorFlow Transform analyzer",
                )
        # 3.
        error = difference(_lowered(transform, rows, Path(folder, "lowered"), name), outputs)
        if error > TOLERANCE:
            raise ProgramError(
                f"{name}: LiteRT's output differs from TensorFlow's by {error:.2g} (allowed {TOLERANCE:g})",
                "replace the operation that the two compute differently (a comparison such as log(x) >= quantile flips by "
                "rounding: compare the integers themselves)",
            )
    return f"{name}: [B, {rows.shape[1]}] to [B, {outputs.shape[1]}], lowers to LiteRT, differs there by {error:.1g}"


def made_up(spec: FeatureSpec) -> F32:
    """`[256, D]` float32 synthetic rows: always the same integers, many of them small, extremes included."""
    drawn = np.random.default_rng(7)
    rows = np.minimum(drawn.lognormal(2.0, 2.0, (ROWS, len(spec.names))), 65535.0)
    rows[drawn.random(rows.shape) < 0.3] = 0.0
    rows[0], rows[1] = 0.0, 65535.0
    return np.floor(rows).astype(np.float32)


def _analysed(function: Preprocessing, rows: F32, output: Path, name: str) -> None:
    failures: list[ProgramError] = []

    def checked(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return _checked_output(function(inputs), name, rows.shape[1])
        except ProgramError as error:
            failures.append(error)
            raise
        except Exception as error:
            failures.append(ProgramError(f"{name} raised {error_line(error)}"))
            raise

    try:
        analysed([rows.astype(np.uint16)], checked, output)
    # TensorFlow and Beam wrap the error; the first cause is the user's function.
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise ProgramError(f"{name} cannot be analysed: {type(error).__name__}: {first_line(error)}") from error


def _checked_output(output: Any, name: str, width: int) -> Mapping[str, Any]:
    import tensorflow as tf

    wanted = f"wanted is a dictionary {{'features': [B, D'] float32}}, one row for each of [B, {width}]"
    if not isinstance(output, Mapping) or set(output) != {FEATURES}:
        names = f"a dictionary of {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise ProgramError(f"{name} returned {names}", wanted)
    value = output[FEATURES]
    if not isinstance(value, tf.Tensor):
        raise ProgramError(f"{name} returned features as {type(value).__name__}", wanted)
    if value.dtype != tf.float32 or value.shape.rank != 2 or value.shape[1] is None or value.shape[0] is not None:
        raise ProgramError(f"{name} returned features of shape {value.shape} and type {value.dtype.name}", wanted)
    return {FEATURES: value}


class _Transform:
    """The analysed graph in a directory with `transform_fn/`: `[n, D]` to `[n, D']` float32."""

    def __init__(self, output: Path) -> None:
        import tensorflow as tf

        self.graph = tf.saved_model.load(str(output / "transform_fn"))

    def __call__(self, rows: F32) -> F32:
        import tensorflow as tf

        features: F32 = self.graph.transform_fn({FEATURES: tf.constant(rows)})[FEATURES].numpy()
        return features


def _lowered(transform: _Transform, rows: F32, folder: Path, name: str) -> F32:
    import tensorflow as tf

    module = tf.Module()
    module.graph = transform.graph
    predict = tf.function(lambda features: transform.graph.transform_fn({FEATURES: features}), autograph=False)
    concrete = predict.get_concrete_function(tf.TensorSpec([None, rows.shape[1]], tf.float32, FEATURES))
    tf.saved_model.save(module, str(folder), signatures={"predict": concrete})
    content = lower_saved_model(folder, ["predict"], name)
    return run_lowered(content, "predict", {FEATURES: rows})[FEATURES]


def main(argv: Sequence[str] | None = None) -> int:
    """Checks `model.preprocessing` of the settings; `--keep DIR` keeps the graph. Returns the exit code."""
    return run_check(argv, "--keep", check_and_keep)


def check_and_keep(settings: Settings, keep: Path | None) -> str:
    """Runs `check_preprocessing`; also writes the names of the options that the function read to `keep`."""
    model = AskedModel.of(settings.model, {})
    result = check_preprocessing(model.preprocessing, FeatureSpec.from_settings(settings), keep, model)
    if keep is not None:
        (keep / OPTIONS_READ).write_text(json.dumps(sorted(model.asked)))
    return result


if __name__ == "__main__":
    # Imported by its real name: objects that Beam pickles must not be defined in __main__.
    from streaming.preprocessing import main as run_main

    sys.exit(run_main())
