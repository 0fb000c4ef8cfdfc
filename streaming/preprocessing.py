"""The preprocessing function of the model: its loading, the default one, and its TensorFlow Transform analysis."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.pvalue import PCollection
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from state.config.sections import Model
from state.process.user_code import load_named

FEATURES = "features"
CATEGORY = "category"
VOCABULARY = "categories"
LEAST_DEVIATION = 0.25
"""Minimum standard deviation of a logarithm, so that rare columns are not inflated to unit variance."""

CLIP = 6.0
DEFAULT = Model()

Preprocessing = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def preprocessing_fn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """TensorFlow Transform preprocessing: logarithms, centred and scaled by the statistics of past clicks.

    The setting `model.preprocessing` replaces it with a function of the user's. That function must use operations that
    are built into LiteRT (no bucketize).

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

    >>> load_preprocessing("streaming.preprocessing:preprocessing_fn").__name__
    'preprocessing_fn'

    Raises:
        SettingsError: There is no such function.
    """
    found: Any = load_named(path, "model.preprocessing")
    if not callable(found) or len(inspect.signature(found).parameters) < 2:
        function: Preprocessing = found
        return function

    def with_settings(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        made: Mapping[str, Any] = found(inputs, settings)
        return made

    return with_settings


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

    Args:
        features: Results of `record_batch`.
        width: D.
        preprocessing: A TensorFlow Transform preprocessing function of one input, `features`.
        output: Output directory.
    """
    import tensorflow_transform.beam as tft_beam
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tensorflow_transform.beam.tft_beam_io.transform_fn_io import WriteTransformFn
    from tfx_bsl.tfxio.tensor_adapter import TensorAdapterConfig

    dense = schema_pb2.TensorRepresentation.DenseTensor(column_name=FEATURES)
    dense.shape.dim.add().size = width
    adapter = TensorAdapterConfig(_SCHEMA, {FEATURES: schema_pb2.TensorRepresentation(dense_tensor=dense)})
    transform = (features, adapter) | "Analyse features" >> tft_beam.AnalyzeDataset(preprocessing)
    transform | "Write the graph" >> WriteTransformFn(str(output))


def list_categories(categories: PCollection[pa.RecordBatch], output: Path) -> None:
    """Adds the category count to a pipeline of `analysis`: TensorFlow Transform's vocabulary, most frequent first.

    Args:
        categories: Results of `category_batch`.
        output: Output directory; `read_categories` reads it.
    """
    import tensorflow_transform as tft
    import tensorflow_transform.beam as tft_beam
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tensorflow_transform.beam.tft_beam_io.transform_fn_io import WriteTransformFn
    from tfx_bsl.tfxio.tensor_adapter import TensorAdapterConfig

    ragged = schema_pb2.TensorRepresentation.VarLenSparseTensor(column_name=CATEGORY)
    adapter = TensorAdapterConfig(_CATEGORIES, {CATEGORY: schema_pb2.TensorRepresentation(varlen_sparse_tensor=ragged)})

    def vocabulary(inputs: Mapping[str, Any]) -> dict[str, Any]:
        tft.vocabulary(inputs[CATEGORY], vocab_filename=VOCABULARY, store_frequency=True)
        return {CATEGORY: inputs[CATEGORY]}

    counted = (categories, adapter) | "Count categories" >> tft_beam.AnalyzeDataset(vocabulary)
    counted | "Write the categories" >> WriteTransformFn(str(output))


def read_categories(output: Path) -> dict[int, int]:
    """Returns clicks by category id, as written by `list_categories`."""
    counts: dict[int, int] = {}
    for line in (output / "transform_fn" / "assets" / VOCABULARY).read_text().splitlines():
        clicks, _, category = line.partition(" ")
        # The vocabulary of an empty sample has one entry that is not a category.
        if int(clicks) > 0:
            counts[int(category, 16)] = int(clicks)
    return counts


def analysed(features: Iterable[npt.NDArray[np.uint16]], preprocessing: Preprocessing, output: Path) -> None:
    """Analyses in-memory chunks of `[n, D]` uint16; writes `transform_fn/` to the directory `output`."""
    chunks = list(features)
    with analysis() as pipeline:
        batches = pipeline | "Take the rows" >> beam.Create(chunks) | "Make record batches" >> beam.Map(record_batch)
        analyse(batches, chunks[0].shape[1], preprocessing, output)


_SCHEMA = pa.schema([(FEATURES, pa.list_(pa.float32()))])
_CATEGORIES = pa.schema([(CATEGORY, pa.list_(pa.binary()))])


def record_batch(features: npt.NDArray[np.uint16]) -> pa.RecordBatch:
    """Converts `[n, D]` uint16 to the Arrow column that TensorFlow Transform takes.

    >>> record_batch(np.array([[1, 2], [3, 4]], np.uint16)).to_pydict()
    {'features': [[1.0, 2.0], [3.0, 4.0]]}
    """
    rows, width = features.shape
    values = pa.array(features.astype(np.float32).reshape(-1))
    offsets = pa.array(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return pa.RecordBatch.from_arrays([pa.ListArray.from_arrays(offsets, values)], schema=_SCHEMA)


def category_batch(categories: npt.NDArray[np.uint64]) -> pa.RecordBatch:
    """Converts `[n]` uint64 category ids, 0 for none, to the Arrow column of their vocabulary.

    >>> category_batch(np.array([255, 0], np.uint64)).to_pydict()
    {'category': [[b'00000000000000ff']]}
    """
    values = [b"%016x" % category for category in categories[categories != 0].tolist()]
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32))
    return pa.RecordBatch.from_arrays(
        [pa.ListArray.from_arrays(offsets, pa.array(values, pa.binary()))], schema=_CATEGORIES
    )
