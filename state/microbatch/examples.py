"""The format of training rows as tf.Examples, and a tf.data reader for them.

A directory of examples contains

    examples-00000-of-00005.tfrecord.gz   one tf.Example per row, in no particular order
    schema.pbtxt                          TensorFlow Metadata: name, type and shape of each feature
    transform/transform_fn/               the preprocessing that the bootstrap analysed, a SavedModel
    spec.json                             names of the columns, and the origin of the rows; written last

The rows are those that the trainer learns from. With `[labels]` an impression has the label that its wait determined,
and the features of its own time. The clicks that labelled it are not rows. An impression that still waited when the
clicks ended has no label and is left out.

An example has

    name           type    shape     meaning
    user           int64   []        pseudonym; ids are 64 bits in two's complement, 0 is none
    item           int64   []
    category       int64   []        the category of this click: the target of the interest head
    action         int64   []        index into `actions` of spec.json
    at_ms          int64   []        event time, ms
    offset         int64   []        position in the topic's partition, or row of the recording
    label          float32 []        engagement label in [0, 1], including a later one; NaN if unknown
    weight         float32 []        weight of the action in the interest loss
    context        int64   [K]       ids of `name=value`; absent where `events.context` is empty
    features       int64   [D]       windows before this click, raw integers, named by `features` of spec.json
    labels         int64   [L]       the user's latest categories, newest first; 0 pads
    label_windows  int64   [L * F] windows of each of them, named by `label_windows` of spec.json

and, if `features.sequence` is not 0, `sequence_items`, `sequence_categories`, `sequence_actions` and `sequence_ages`,
int64 `[T]`: the user's latest events before this click, see `state/features/kernel.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.batch import SEQUENCES, Columns, trained

FORMAT = 1
SPEC, SCHEMA, PREFIX = "spec.json", "schema.pbtxt", "examples"
SUFFIXES = {"gzip": ".tfrecord.gz", "none": ".tfrecord"}
IDS = ("user", "item", "category")
BATCH_ROWS = 1024


def shapes(spec: FeatureSpec, fields: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Type and shape of each feature of an example, in order."""
    kinds: dict[str, tuple[type, tuple[int, ...]]] = {
        **dict.fromkeys((*IDS, "action", "at_ms", "offset"), (int, ())),
        "label": (float, ()),
        "weight": (float, ()),
    }
    if fields:
        kinds["context"] = (int, (fields,))
    kinds["features"] = (int, (len(spec.names),))
    kinds["labels"] = (int, (spec.recent_categories,))
    kinds["label_windows"] = (int, (spec.recent_categories * len(spec.window_names),))
    if spec.sequence:
        kinds |= dict.fromkeys(SEQUENCES, (int, (spec.sequence,)))
    return kinds


def schema(spec: FeatureSpec, fields: int) -> Any:
    """The TensorFlow Metadata schema of an example."""
    from tensorflow_metadata.proto.v0 import schema_pb2

    document = schema_pb2.Schema()
    for name, (kind, shape) in shapes(spec, fields).items():
        feature = document.feature.add(name=name, type=schema_pb2.INT if kind is int else schema_pb2.FLOAT)
        feature.presence.min_fraction = 1.0
        feature.shape.SetInParent()
        for size in shape:
            feature.shape.dim.add(size=size)
    return document


def record_batch(batch: Columns) -> pa.RecordBatch:
    """Converts the rows that are learned from to the Arrow columns that tfx-bsl encodes as examples."""
    keep = trained(batch["kind"])
    rows = {name: column[keep] for name, column in batch.items()}
    count = int(keep.sum())
    columns: dict[str, Any] = {name: rows[name].view(np.int64) for name in IDS}
    # For an impression that waited, uses its own offset, not the one at which its label became known.
    columns |= {"action": rows["action"].astype(np.int64), "at_ms": rows["at_ms"]}
    columns |= {"offset": rows["offset"] - rows["waited"], "label": rows["label"], "weight": rows["weight"]}
    if rows["context"].shape[1]:
        columns["context"] = rows["context"].view(np.int64)
    columns["features"] = rows["features"].astype(np.int64)
    columns["labels"] = rows["recent_categories"].view(np.int64)
    columns["label_windows"] = (
        rows["category_windows"].reshape(count, math.prod(rows["category_windows"].shape[1:])).astype(np.int64)
    )
    columns |= {name: rows[name].astype(np.int64) for name in SEQUENCES if name in rows}
    return pa.RecordBatch.from_arrays(
        [_lists(column.reshape(count, math.prod(column.shape[1:]))) for column in columns.values()], [*columns]
    )


def _lists(column: Any) -> pa.Array:
    rows, width = column.shape
    ends = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
    return pa.ListArray.from_arrays(ends, pa.array(np.ascontiguousarray(column).reshape(-1)))


def about(path: Path) -> dict[str, Any]:
    """Reads spec.json of a directory of examples; SettingsError if the examples are incomplete or of another format."""
    try:
        document: dict[str, Any] = json.loads((path / SPEC).read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path} holds no complete examples ({error})", f"make them with `springtide bootstrap --examples {path}`"
        ) from None
    if document.get("format") != FORMAT:
        raise SettingsError(
            f"{path} holds examples of format {document.get('format')}, this release reads {FORMAT}", "make them again"
        )
    return document


def dataset(path: str | Path, batch_rows: int = BATCH_ROWS) -> Any:
    """A `tf.data.Dataset` over the examples of a directory, in batches of dictionaries.

    Ids and numbers are as in an example. The inputs of `DefaultRanker.predict` in `trainer.model.default_ranker` have
    the form that it expects: `features` `[B, D]` float32 and `category_windows` `[B, L, F]` float32, raw integers;
    `recent_mask` `[B, L]` float32, 1 where there is a category. A batch comes from one file. Shuffle with a buffer of
    several batches, because the order of the rows within a file is not random.

    Args:
        path: The directory.
        batch_rows: Rows of a batch, B; the last batch of a file may have fewer.

    Raises:
        SettingsError: The directory holds no complete examples of this format.
    """
    import tensorflow as tf

    path = Path(path)
    document = about(path)
    spec = FeatureSpec.from_json(document["spec"])
    columns = {
        name: tf.io.FixedLenFeature(shape, tf.int64 if kind is int else tf.float32)
        for name, (kind, shape) in shapes(spec, len(document["context"])).items()
    }
    per_label = [-1, spec.recent_categories, len(spec.window_names)]

    def as_tensors(serialized: Any) -> Mapping[str, Any]:
        rows = tf.io.parse_example(serialized, columns)
        rows["features"] = tf.cast(rows["features"], tf.float32)
        rows["recent_categories"] = rows.pop("labels")
        rows["category_windows"] = tf.cast(tf.reshape(rows.pop("label_windows"), per_label), tf.float32)
        rows["recent_mask"] = tf.cast(rows["recent_categories"] != 0, tf.float32)
        return dict(rows)

    files = sorted(str(file) for file in path.glob(f"{PREFIX}-*{SUFFIXES[document['compression']]}"))
    compression = "GZIP" if document["compression"] == "gzip" else ""
    records = tf.data.TFRecordDataset(files, compression_type=compression)
    return records.batch(batch_rows).map(as_tensors, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
