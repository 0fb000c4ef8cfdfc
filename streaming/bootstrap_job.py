"""The Beam job of a bootstrap: clicks read, made into rows by the stream's steps, analysed, and written as examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam

from state.config.asked_model import AskedModel
from state.recordings.files import Recording
from streaming import examples
from streaming.context import Handle
from streaming.preprocessing import (
    analyse,
    analysis,
    category_batch,
    list_categories,
    load_preprocessing,
    record_batch,
)
from streaming.sample import ComputeWindows, Sample
from streaming.sample_source import ReadSample
from streaming.steps import ParseEvents


@dataclass(frozen=True)
class Wanted:
    """What to read and what to make of it.

    Attributes:
        recording: Files; None for the clicks topic.
        sort: How files are ordered: memory or assume.
        examples: Directory for tf.Examples; None for none.
        of_up: Whether `up` started this: it has checked the preprocessing, and makes the topic once its Kafka runs.
    """

    recording: Recording | None = None
    sort: str = "memory"
    examples: Path | None = None
    of_up: bool = False


TOPIC = Wanted()


def build(pipeline: beam.Pipeline, handle: Handle[Sample], wanted: Wanted, output: Path | None) -> None:
    """Applies the job to `pipeline`, which is one of `analysis`.

    Args:
        pipeline: What to add to.
        handle: Of the sample.
        wanted: What to read and make.
        output: Where the analyses go; None where they were done before.
    """
    settings, spec = handle.context.settings, handle.context.spec
    rows = (
        pipeline
        | "Start" >> beam.Impulse()
        | "Read the sample" >> beam.ParDo(ReadSample(handle, wanted.recording, wanted.sort, wanted.of_up))
        | "Parse events" >> beam.ParDo(ParseEvents(handle))
        | "Compute windows" >> beam.ParDo(ComputeWindows(handle))
    )
    if output is not None:
        features = rows | "Take features" >> beam.Map(lambda one: record_batch(one.vectors.features))
        analyse(
            features,
            len(spec.names),
            load_preprocessing(settings.model.preprocessing, AskedModel.of(settings.model, handle.context.asked)),
            output / "transform",
        )
        categories = rows | "Take categories" >> beam.Map(lambda one: category_batch(one.batch.category))
        list_categories(categories, output / "categories")
    if wanted.examples is not None:
        shards = math.ceil(settings.bootstrap.sample_rows / settings.bootstrap.shard_rows)
        examples.write_examples(rows, wanted.examples, settings.bootstrap.compression, shards)


def run_job(handle: Handle[Sample], wanted: Wanted, output: Path | None) -> None:
    """Runs the job over the sample in this process.

    Raises:
        SpringtideError: What a step raised.
    """
    with handle.as_raised(), analysis() as pipeline:
        build(pipeline, handle, wanted, output)
