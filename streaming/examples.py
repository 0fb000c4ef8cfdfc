"""Writes training rows as tf.Examples in sharded TFRecord files, for offline training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.tfrecordio import WriteToTFRecord
from apache_beam.pvalue import PCollection

from state.disk import files as durable
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.microbatch.examples import FORMAT, PREFIX, SCHEMA, SPEC, SUFFIXES, record_batch, schema
from streaming.rows import Rows

COMPRESSIONS = {"gzip": CompressionTypes.GZIP, "none": CompressionTypes.UNCOMPRESSED}


class EncodeExamples(beam.DoFn):
    """Encodes each batch of rows as serialised tf.Examples."""

    def setup(self) -> None:
        """Loads the encoder, which cannot be pickled."""
        from tfx_bsl.coders.example_coder import RecordBatchToExamplesEncoder

        self._encoder = RecordBatchToExamplesEncoder()

    def process(self, rows: Rows) -> Iterator[bytes]:
        """Encodes one batch."""
        yield from self._encoder.encode(record_batch(rows.columns))


def require_empty(folder: Path) -> None:
    """Refuses a directory that is not empty: examples of two runs must not mix.

    Raises:
        SettingsError: It is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"--examples {folder}: is there already", "name a new or empty directory")


def write_examples(rows: PCollection[Rows], folder: Path, compression: str, shards: int) -> None:
    """Adds the steps to a job that write the rows as examples into `folder`; `describe` completes it.

    Args:
        rows: Batches of rows.
        folder: Output directory.
        compression: gzip or none.
        shards: Number of files.
    """
    (
        rows
        | "Encode examples" >> beam.ParDo(EncodeExamples())
        | "Write examples"
        >> WriteToTFRecord(
            str(folder / PREFIX),
            file_name_suffix=SUFFIXES[compression],
            num_shards=shards,
            compression_type=COMPRESSIONS[compression],
        )
    )


def describe(folder: Path, spec: FeatureSpec, context: tuple[str, ...], about: Mapping[str, Any]) -> None:
    """Writes schema.pbtxt and then spec.json next to the examples, durably; after that the examples are complete.

    Args:
        folder: Directory of the examples.
        spec: Spec of their features.
        context: The names of the K context fields.
        about: Origin of the examples; becomes part of spec.json.
    """
    durable.write(folder / SCHEMA, str(schema(spec, len(context))).encode())
    document = {
        "format": FORMAT,
        "spec": spec.to_json(),
        "features": list(spec.names),
        "label_windows": list(spec.window_names),
        "actions": list(spec.actions),
        "context": list(context),
        **about,
    }
    durable.write(folder / SPEC, json.dumps(document, indent=1, sort_keys=True).encode())
    durable.sync_directory(folder)
