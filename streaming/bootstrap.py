"""The bootstrap: analyses past clicks for feature constants and categories, and writes training examples of them.

    python -m streaming.bootstrap [FILE...] [--rows N] [--examples DIR] [--section.name VALUE ...]

One bounded Beam job with the stream's own code for clicks and windows:

                                            ┌─ TensorFlow Transform: constants of the preprocessing
    read ─ parse events ─ compute windows ──┼─ TensorFlow Transform: vocabulary of the categories
                                            └─ tf.Examples for training offline, if requested

1. A custom preprocessing is checked on made-up rows.
2. The job reads files, or the beginning of the clicks topic (it waits for `bootstrap.min_rows` clicks there). It reads
   at most `bootstrap.sample_rows` clicks.
3. `specs/<digest>/` of the registry appears at once with graph, labels, schema and statistics. It is written once for
   each feature spec. Another preprocessing of the same spec gets a directory with a number after the digest.

`specs/<digest>/spec.json` records where the constants came from, and the first categories with their names.

The trainer and serving need neither Beam nor TensorFlow Transform: the result is a plain TensorFlow graph.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.tfrecordio import WriteToTFRecord
from apache_beam.pvalue import PCollection

from state.config.loading import load
from state.config.sections import AskedModel
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk import files as durable
from state.errors import SettingsError
from state.events.identity import Salt, own_salt
from state.features.spec import FeatureSpec
from state.microbatch.examples import FORMAT, PREFIX, SCHEMA, SPEC, SUFFIXES, schema
from state.microbatch.examples import record_batch as example_batch
from state.process.part import Work, run_process
from state.process.quiet_stderr import own_stderr, quiet_stderr, quiet_tensorflow
from state.recordings.files import Recording, add_file_arguments, as_settings, chosen
from state.registry.model_fit import require_same_salt
from state.registry.registry import Registry
from state.statistics.baselines import baseline_files
from state.statistics.protos import dataset
from state.statistics.schema import infer
from streaming.context import Handle
from streaming.preprocessing import (
    analyse,
    analysis,
    category_batch,
    check_preprocessing,
    is_own,
    list_categories,
    load_preprocessing,
    read_categories,
    record_batch,
)
from streaming.rows import Rows
from streaming.sample import ComputeWindows, ReadSample, Sample, Say, open_sample
from streaming.steps import ParseEvents

COMPRESSION = "gzip"


class EncodeExamples(beam.DoFn):
    """Encodes each batch of rows as serialised tf.Examples."""

    def setup(self) -> None:
        """Loads the encoder, which cannot be pickled."""
        from tfx_bsl.coders.example_coder import RecordBatchToExamplesEncoder

        self._encoder = RecordBatchToExamplesEncoder()

    def process(self, rows: Rows) -> Iterator[bytes]:
        """Encodes one batch."""
        yield from self._encoder.encode(example_batch(rows.columns))


def require_empty(folder: Path) -> None:
    """Refuses a directory that is not empty: examples of two runs must not mix.

    Raises:
        SettingsError: It is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"--examples {folder}: is there already", "name a new or empty directory")


def write_examples(rows: PCollection[Rows], folder: Path, shards: int) -> None:
    """Adds the steps to a job that write the rows as examples into `folder`; `describe` completes it.

    Args:
        rows: Batches of rows.
        folder: Output directory.
        shards: Number of files.
    """
    (
        rows
        | "Encode examples" >> beam.ParDo(EncodeExamples())
        | "Write examples"
        >> WriteToTFRecord(
            str(folder / PREFIX),
            file_name_suffix=SUFFIXES[COMPRESSION],
            num_shards=shards,
            compression_type=CompressionTypes.GZIP,
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


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The input and output of a bootstrap.

    Attributes:
        recording: Files; None for the clicks topic.
        sort: How files are ordered: memory or assume.
        examples: Directory for tf.Examples; None for none.
        of_up: Whether `up` started this: it has checked the preprocessing, and creates the topic once its Kafka runs.
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
        output: Directory of the analyses; None if they were done before.
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
        write_examples(rows, wanted.examples, shards)


def run_job(handle: Handle[Sample], wanted: Wanted, output: Path | None) -> None:
    """Runs the job over the sample in this process.

    Raises:
        SpringtideError: A step failed.
    """
    with handle.as_raised(), analysis() as pipeline:
        build(pipeline, handle, wanted, output)


def document(sample: Sample, salt: Salt, categories: Mapping[int, int], now_ms: int) -> dict[str, Any]:
    """The content of `spec.json` next to the graph.

    Args:
        sample: The clicks analysed.
        salt: The salt of the users' pseudonyms.
        categories: Clicks by category id. As many are listed as `model.popular`
            says: most clicked first, lower id first among equals.
        now_ms: Wall clock.
    """
    model, spec, tally = sample.settings.model, sample.spec, sample.tally
    ranked = sorted(categories.items(), key=lambda entry: (-entry[1], entry[0]))[: model.popular]
    return {
        "spec": spec.to_json(),
        "features": list(spec.names),
        "label_windows": list(spec.window_names),
        "salt": salt.fingerprint,
        "preprocessing": model.preprocessing,
        "options": list(model.options),
        "asked": sample.asked,
        "rows": tally.clicks,
        "popular": [[f"{label:016x}", clicks] for label, clicks in ranked],
        "names": {f"{label:016x}": name for label, name in sorted(tally.names.items())},
        "newest_ms": tally.newest_ms,
        "created_at_ms": now_ms,
    }


def run(settings: Settings, say: Say, wanted: Wanted = TOPIC, clock: Callable[[], float] = time.time) -> bool:
    """Bootstraps the feature spec of `settings`, and writes examples; returns False if there was nothing to do.

    Raises:
        MissingSalt: The salt of the stored data is gone.
        SaltMismatch: An earlier bootstrap used another salt.
        ProgramError: The preprocessing does not lower, or is no function of its input.
        SpringtideError: There are too few clicks, or Kafka does not answer.
    """
    spec, salt = FeatureSpec.from_settings(settings), own_salt(settings)
    registry = Registry(settings.registry_dir)
    require_same_salt(registry, salt)
    known = registry.specs.bootstrapped(spec.digest, settings.model)
    if known is not None and wanted.examples is None:
        return False
    if wanted.examples is not None:
        require_empty(wanted.examples)
    # 1.
    if is_own(settings.model.preprocessing) and known is None and not wanted.of_up:
        with quiet_stderr():
            checked = check_preprocessing(settings.model.preprocessing, spec, settings=settings.model)
        say(checked)
    # Importing what the analysis needs takes as long as the wait for clicks: they overlap.
    imports = threading.Thread(target=_import_analysis, name="imports", daemon=True)
    imports.start()
    imports.join(None if wanted.recording else 0)
    with (
        tempfile.TemporaryDirectory(prefix="springtide-specs-") as folder,
        open_sample(settings, spec, salt, clock, say) as handle,
    ):
        # 2.
        output = None if known is not None else Path(folder)
        with quiet_stderr():
            run_job(handle, wanted, output)
        sample = handle.context
        now_ms = int(clock() * 1000)
        # 3.
        if output is not None:
            about = document(sample, salt, read_categories(output / "categories"), now_ms)
            known = registry.specs.free_name(spec.digest)
            registry.specs.add_spec(known, about, lambda place: _keep(sample, output / "transform", place))
        if wanted.examples is not None:
            _copy(registry.specs.transform(known or spec.digest), wanted.examples / "transform")
            about = {
                "digest": spec.digest,
                "salt": salt.fingerprint,
                "rows": sample.tally.examples,
                "created_at_ms": now_ms,
            }
            about |= {"compression": COMPRESSION, "preprocessing": settings.model.preprocessing}
            describe(wanted.examples, spec, settings.events.context, about)
            left_out = f"; {unlabelled}" if (unlabelled := sample.unlabelled) else ""
            say(f"{sample.tally.examples:,} examples in {wanted.examples}{left_out}")
    return True


def _keep(sample: Sample, transform: Path, place: Path) -> None:
    """Writes graph, schema and statistics of a sample to the new directory `place`."""
    _copy(transform, place / "transform")
    statistics = dataset(sample.statistics, "bootstrap")
    schema = infer(statistics, warm=False)
    for name, data in baseline_files(schema, statistics).items():
        (place / name).write_bytes(data)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _import_analysis() -> None:
    with quiet_stderr():
        for module in (
            "tensorflow_transform.beam.tft_beam_io.transform_fn_io",
            "tfx_bsl.tfxio.tensor_adapter",
        ):
            importlib.import_module(module)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises Springtide's errors."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"see `{self.prog} --help`")


def asked(argv: Sequence[str]) -> tuple[Settings, Wanted]:
    """Parses a command line.

    Raises:
        SettingsError: The command line is wrong.
        SystemExit: It asked for help.
    """
    flags, words = split_settings(argv)
    parser = _Parser(
        prog="springtide bootstrap",
        description="Analyse past clicks once per feature spec, from files or from the start of the clicks topic.",
        epilog="Settings are written --section.name VALUE. Exit codes: 0 done, 1 failed, 2 wrong use.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, metavar="N", help="maximum number of clicks (bootstrap.sample_rows)")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="also write the rows as tf.Examples in TFRecord files to DIR, which must be new or empty",
    )
    parser.add_argument("--of-up", action="store_true", help=argparse.SUPPRESS)
    add_file_arguments(parser, "Recorded times are kept.")
    options = parser.parse_args(words)
    rows = [] if options.rows is None else [f"--bootstrap.sample_rows={options.rows}"]
    settings = load([*flags, *as_settings(options), *rows], os.environ)
    recording = chosen(options, settings.events) if options.files else None
    return settings, Wanted(recording, options.sort, options.examples, options.of_up)


def main(argv: Sequence[str] | None = None) -> int:
    """Bootstraps once; returns the exit code."""
    logger.setLevel(logging.INFO)
    began = time.monotonic()

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        settings, wanted = asked(words)

        def work() -> None:
            done = run(settings, logger.info, wanted)
            logger.info(
                "done in %.1f s" if done else "nothing to do: these feature settings were bootstrapped before (%.1f s)",
                time.monotonic() - began,
            )

        return settings, work

    # The error is reported once, by this logger; Beam would log it with its traceback.
    return run_process("bootstrap", start, argv, logger, own_stderr(), logging.CRITICAL)


if __name__ == "__main__":
    # Beam's import may load TensorFlow already.
    quiet_tensorflow(os.environ)
    # By its real name: what Beam pickles must not live in __main__.
    from streaming.bootstrap import main as run_main

    sys.exit(run_main())
