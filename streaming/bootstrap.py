"""The bootstrap: analyses past clicks for feature constants and categories, and writes training examples of them.

    python -m streaming.bootstrap [FILE...] [--rows N] [--examples DIR] [--section.name VALUE ...]

One bounded Beam job with the stream's own code for clicks and windows:

    read ─ parse events ─ compute windows ──┬─ TensorFlow Transform: constants of the preprocessing
                                            └─ tf.Examples for training offline, if requested

1. A custom preprocessing is checked on made-up rows.
2. The job reads files, or the beginning of the clicks topic (it waits for `bootstrap.min_rows` clicks there). It reads
   at most 50,000 clicks (`--rows`).
3. `specs/<digest>/` of the registry appears at once with graph, labels, schema and statistics. It is written once for
   each feature spec. Another preprocessing of the same spec gets a directory with a number after the digest.
"""

from __future__ import annotations

import atexit
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.tfrecordio import WriteToTFRecord

from state.config.loading import load
from state.config.sections import AskedModel
from state.config.settings import Settings
from state.config.sources import split_settings
from state.disk import files as durable
from state.errors import SettingsError, SpringtideError, UnknownTopic, UnreachableBroker
from state.events.identity import Salt, own_salt
from state.events.parser import EventBatch
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import Reader
from state.microbatch.batch import Kind, trained
from state.microbatch.examples import FORMAT, PREFIX, SCHEMA, SPEC, SUFFIXES, schema
from state.microbatch.examples import record_batch as example_batch
from state.process.commands import parser_of
from state.process.part import Work, own_stderr, quiet_stderr, quiet_tensorflow, run_process
from state.recordings.files import Recording, as_settings, chosen
from state.recordings.rows import left_out, shown_reasons
from state.registry.model_fit import require_same_salt
from state.registry.registry import Registry
from state.statistics.baselines import baseline_files, infer_schema
from state.statistics.collecting import Statistics, dataset
from streaming.context import JobContext, open_job
from streaming.past import Batches, recorded_batches
from streaming.preprocessing import (
    DEFAULT,
    SAMPLE_ROWS,
    analyse,
    analysis,
    check_preprocessing,
    load_preprocessing,
    record_batch,
)
from streaming.rows import Rows
from streaming.steps import Handle, ParseEvents, Step, opened

POLL_S = 0.2
TIMEOUT_S = 120.0  # the maximum wait for `bootstrap.min_rows` clicks
PROGRESS_S = 2.0
COMPRESSION = "gzip"
SHARD_ROWS = 10_000  # of a file of examples, about
Say = Callable[[str], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The input and output of a bootstrap.

    Attributes:
        recording: Files; None for the clicks topic.
        sort: memory (read everything, then order by time) or assume (the files are in order).
        examples: Directory for tf.Examples; None for none.
        of_up: Whether `up` started this: it has checked the preprocessing, and creates the topic once its Kafka runs.
        rows: The maximum number of clicks.
    """

    recording: Recording | None = None
    sort: str = "memory"
    examples: Path | None = None
    of_up: bool = False
    rows: int = SAMPLE_ROWS


TOPIC = Wanted()


@dataclass
class Tally:
    """Counts of a sample so far.

    Attributes:
        examples: Rows used for training: all events except outcomes and impressions that have no label yet.
        records: Records, refused ones included.
        refused: Records that are not clicks, by reason.
        categories: Rows by category id.
    """

    clicks: int = 0
    examples: int = 0
    dropped: int = 0
    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    categories: Counter[int] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    newest_ms: int = 0
    reported_s: float = 0.0

    def count_events(self, events: EventBatch) -> None:
        """Counts parsed records."""
        self.clicks += len(events)
        self.records += len(events) + len(events.dead)
        self.refused.update(str(letter.reason) for letter in events.dead)
        self.names.update(events.names)
        self.newest_ms = max(self.newest_ms, int(events.at_ms.max(initial=0)))

    def count_rows(self, rows: Rows) -> None:
        """Counts the rows of a batch."""
        kinds = rows.columns["kind"]
        self.examples += int(trained(kinds).sum())
        self.dropped += int((kinds == Kind.DROPPED).sum())
        categories = rows.batch.category
        self.categories.update(categories[categories != 0].tolist())


@dataclass(frozen=True, kw_only=True)
class Sample(JobContext):
    """The context of one bootstrap; its store is deleted afterwards.

    Attributes:
        rows: The maximum number of clicks.
        asked: The options that the preprocessing read, as recorded by `AskedModel`.
    """

    rows: int
    say: Say
    clock_s: Callable[[], float]
    began_s: float
    statistics: Statistics
    tally: Tally = field(default_factory=Tally)
    asked: dict[str, list[str]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Maximum number of records of the next batch."""
        return min(self.settings.stream.cut_rows, self.rows - self.tally.clicks)

    def progress(self, wanted: str) -> None:
        """Reports the progress, at most once every two seconds."""
        now_s = self.clock_s()
        if now_s - max(self.tally.reported_s, self.began_s) >= PROGRESS_S:
            self.tally.reported_s = now_s
            self.say(f"{self.tally.clicks:,} {wanted} read, {self._rate(now_s):,.0f} rows/s")

    def end(self) -> None:
        """Reports what was read; called after the last record."""
        now_s, tally = self.clock_s(), self.tally
        dead = f" and {shown_reasons(tally.refused)}" if tally.refused else ""
        self.say(
            f"{tally.clicks:,} clicks{dead} read in {now_s - self.began_s:.1f} s ({self._rate(now_s):,.0f} rows/s)"
        )
        if warning := left_out(tally.refused, tally.records):
            self.say(warning)

    def _rate(self, now_s: float) -> float:
        return self.tally.records / max(now_s - self.began_s, 1e-9)


@contextmanager
def open_sample(
    settings: Settings, salt: Salt, clock: Callable[[], float], say: Say, rows: int = SAMPLE_ROWS
) -> Iterator[Handle[Sample]]:
    """Yields a new sample of at most `rows` clicks; its store is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="springtide-bootstrap-") as folder:
        store = HistoryStore(Path(folder), settings.features.history)
        try:
            job = open_job(settings, store, salt, topic_id="")
            statistics = Statistics(job.spec.actions, job.spec.names, settings.events.context)
            sample = Sample(**vars(job), rows=rows, say=say, clock_s=clock, began_s=clock(), statistics=statistics)
            with opened(sample) as handle:
                yield handle
        finally:
            store.close()


class ComputeWindows(Step[Sample]):
    """Turns events into rows, as in the stream: impressions wait for their label, in event time."""

    def process(self, events: EventBatch) -> Iterator[Rows]:
        """Yields the rows of one batch and of earlier impressions that it labels; skips batches without events."""
        with self.handle.watched() as sample:
            sample.tally.count_events(events)
            rows = sample.commit(sample.make_rows(events, round(sample.clock_s() * 1000)))
            sample.tally.count_rows(rows)
            sample.statistics.add(rows.columns)
        if len(events):
            yield rows


def of_topic(sample: Sample, await_topic: bool = False) -> Batches:
    """Reads the clicks topic from its beginning; ends when there are enough clicks and no more are waiting.

    With `await_topic` it waits for Kafka and the topic, up to `TIMEOUT_S`.

    Raises:
        SpringtideError: `TIMEOUT_S` passed with fewer than `bootstrap.min_rows` clicks.
        LogError: The topic cannot be read.
    """
    settings, wanted = sample.settings, sample.settings.bootstrap
    topic = settings.kafka.clicks_topic
    with _reader(sample, await_topic) as reader:
        began_s = sample.clock_s()
        while sample.left > 0:
            batches = reader.poll(POLL_S, sample.left)
            if batches:
                yield batches
            # While clicks keep arriving no poll is empty, so reading ends at a lag of less than one batch.
            if sample.tally.clicks >= wanted.min_rows and sum(reader.lag().values()) < settings.stream.cut_rows:
                break
            sample.progress(f"of at least {wanted.min_rows:,} clicks of {topic}")
            if sample.clock_s() - began_s > TIMEOUT_S and sample.tally.clicks < wanted.min_rows:
                raise SpringtideError(
                    f"after {TIMEOUT_S} s topic {topic} holds {sample.tally.clicks} usable clicks of the "
                    f"{wanted.min_rows} needed",
                    "start the producer, check the dead letters, lower "
                    "bootstrap.min_rows, or name files of recorded clicks: `springtide bootstrap FILE...`",
                )
    sample.end()


def _reader(sample: Sample, await_topic: bool) -> Reader:
    settings = sample.settings
    while True:
        try:
            return Reader(settings.kafka, settings.kafka.clicks_topic)
        except (UnreachableBroker, UnknownTopic):
            if not await_topic or sample.clock_s() - sample.began_s > TIMEOUT_S:
                raise
            time.sleep(POLL_S)


def of_recording(sample: Sample, recording: Recording, sort: str) -> Batches:
    """Reads the rows of files with their recorded times, as one partition.

    Raises:
        SettingsError, SpringtideError: See `recorded_batches`.
        SpringtideError: No row is a click.
    """
    clicks = recorded_batches(
        sample.settings.events, recording, sort, sample.clock_s(), sample.say, lambda _: sample.left
    )
    for batches in clicks:
        yield batches
        sample.progress("clicks of the files")
    if not sample.tally.clicks:
        raise SpringtideError(
            f"no row of {', '.join(str(file.path) for file in recording.files)} is a click: "
            f"{shown_reasons(sample.tally.refused)}",
            "correct [events] (fields, actions, time_unit, decoder), --columns or --constant",
        )
    sample.end()


class ReadSample(Step[Sample]):
    """Yields lists of partition batches until the sample is complete."""

    def __init__(self, handle: Handle[Sample], wanted: Wanted) -> None:
        super().__init__(handle)
        self._wanted = wanted

    def process(self, start: bytes) -> Batches:
        """Reads the clicks; the next steps process a batch before the next one is read."""
        wanted = self._wanted
        with self.handle.watched() as sample:
            if wanted.recording is None:
                yield from of_topic(sample, wanted.of_up)
            else:
                yield from of_recording(sample, wanted.recording, wanted.sort)


class EncodeExamples(beam.DoFn):
    """Encodes each batch of rows as serialised tf.Examples."""

    def setup(self) -> None:
        """Loads the encoder, which cannot be pickled."""
        from tfx_bsl.coders.example_coder import RecordBatchToExamplesEncoder

        self._encoder = RecordBatchToExamplesEncoder()

    def process(self, rows: Rows) -> Iterator[bytes]:
        """Encodes one batch."""
        yield from self._encoder.encode(example_batch(rows.columns))


def _describe(folder: Path, sample: Sample, description: Mapping[str, Any]) -> None:
    context = sample.settings.events.context
    durable.write(folder / SCHEMA, str(schema(sample.spec, len(context))).encode())
    content = {
        "format": FORMAT,
        **_named(sample.spec),
        "actions": list(sample.spec.actions),
        "context": list(context),
        "rows": sample.tally.examples,
        "compression": COMPRESSION,
        "preprocessing": sample.settings.model.preprocessing,
        **description,
    }
    durable.write(folder / SPEC, json.dumps(content, indent=1, sort_keys=True).encode())
    durable.sync_directory(folder)


def _named(spec: FeatureSpec) -> dict[str, Any]:
    return {"spec": spec.to_json(), "features": list(spec.names), "label_windows": list(spec.window_names)}


def build(pipeline: beam.Pipeline, handle: Handle[Sample], wanted: Wanted, output: Path | None) -> None:
    """Applies the job to `pipeline`, which is one of `analysis`; `output` is None if the analysis was done before."""
    settings, spec = handle.context.settings, handle.context.spec
    rows = (
        pipeline
        | "Start" >> beam.Impulse()
        | "Read the sample" >> beam.ParDo(ReadSample(handle, wanted))
        | "Parse events" >> beam.ParDo(ParseEvents(handle))
        | "Compute windows" >> beam.ParDo(ComputeWindows(handle))
    )
    if output is not None:
        features = rows | "Take features" >> beam.Map(lambda batch: record_batch(batch.vectors.features))
        analyse(
            features,
            len(spec.names),
            load_preprocessing(settings.model.preprocessing, AskedModel.of(settings.model, handle.context.asked)),
            output,
        )
    if wanted.examples is not None:
        # `_describe` completes the directory.
        shards = math.ceil(wanted.rows / SHARD_ROWS)
        target, suffix = str(wanted.examples / PREFIX), SUFFIXES[COMPRESSION]
        (
            rows
            | "Encode examples" >> beam.ParDo(EncodeExamples())
            | "Write examples"
            >> WriteToTFRecord(
                target, file_name_suffix=suffix, num_shards=shards, compression_type=CompressionTypes.GZIP
            )
        )


def document(sample: Sample, salt: Salt, now_ms: int) -> dict[str, Any]:
    """The content of `spec.json` next to the graph.

    It lists the first `model.popular` of the categories: most rows first, lower id first among equals.
    """
    model, tally = sample.settings.model, sample.tally
    ranked = sorted(tally.categories.items(), key=lambda entry: (-entry[1], entry[0]))[: model.popular]
    return {
        **_named(sample.spec),
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
        ProgramError: The preprocessing does not lower, or does not depend on its input alone.
        SpringtideError: There are too few clicks, or Kafka does not answer.
    """
    spec, salt = FeatureSpec.from_settings(settings), own_salt(settings)
    registry = Registry(settings.registry_dir)
    require_same_salt(registry, salt)
    name = registry.specs.bootstrapped(spec.digest, settings.model)
    if name is not None and wanted.examples is None:
        return False
    examples = wanted.examples
    # Examples of two runs must not mix.
    if examples is not None and examples.exists() and (not examples.is_dir() or any(examples.iterdir())):
        raise SettingsError(f"--examples {examples}: already exists", "name a new or empty directory")
    # 1.
    if settings.model.preprocessing != DEFAULT.preprocessing and name is None and not wanted.of_up:
        with quiet_stderr():
            checked = check_preprocessing(settings.model.preprocessing, spec, settings=settings.model)
        say(checked)

    def import_analysis() -> None:
        with quiet_stderr():
            importlib.import_module("tensorflow_transform.beam.tft_beam_io.transform_fn_io")
            importlib.import_module("tfx_bsl.tfxio.tensor_adapter")

    # Importing the analysis modules takes as long as the wait for clicks, so both run at the same time.
    imports = threading.Thread(target=import_analysis, name="imports", daemon=True)
    imports.start()
    imports.join(None if wanted.recording else 0)
    with (
        tempfile.TemporaryDirectory(prefix="springtide-specs-") as folder,
        open_sample(settings, salt, clock, say, wanted.rows) as handle,
    ):
        # 2.
        output = None if name is not None else Path(folder)
        with quiet_stderr(), handle.as_raised(), analysis() as pipeline:
            build(pipeline, handle, wanted, output)
        sample = handle.context
        now_ms = int(clock() * 1000)
        # 3.
        if output is not None:
            description = document(sample, salt, now_ms)
            name = registry.specs.free_name(spec.digest)
            registry.specs.add_spec(name, description, lambda folder: _keep(sample, output, folder))
        if wanted.examples is not None:
            shutil.copytree(registry.specs.transform(name or spec.digest), wanted.examples / "transform")
            description = {"digest": spec.digest, "salt": salt.fingerprint, "created_at_ms": now_ms}
            _describe(wanted.examples, sample, description)
            waiting, dropped = sample.store.waiting_rows(), sample.tally.dropped
            waits = f"; {waiting:,} impressions still waited for their label when the clicks ended" if waiting else ""
            could_not = f"; {dropped:,} could not wait" if dropped else ""
            say(f"{sample.tally.examples:,} examples in {wanted.examples}{waits}{could_not}")
    return True


def _keep(sample: Sample, transform: Path, folder: Path) -> None:
    shutil.copytree(transform, folder / "transform")
    statistics = dataset(sample.statistics, "bootstrap")
    schema = infer_schema(statistics, warm=False)
    for name, data in baseline_files(schema, statistics).items():
        (folder / name).write_bytes(data)


def asked(argv: Sequence[str]) -> tuple[Settings, Wanted]:
    """Parses a command line.

    Raises:
        SettingsError: The command line is wrong.
    """
    flags, words = split_settings(argv)
    parser = parser_of("bootstrap")
    parser.set_defaults(rows=SAMPLE_ROWS)
    options = parser.parse_args(words)
    if options.rows < 1:
        raise SettingsError(f"--rows {options.rows}: must be at least 1", "see `springtide bootstrap --help`")
    settings = load([*flags, *as_settings(options)], os.environ)
    recording = chosen(options, settings.events) if options.files else None
    return settings, Wanted(recording, options.sort, options.examples, options.of_up, options.rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Bootstraps once; returns the exit code."""
    logger.setLevel(logging.INFO)
    began = time.monotonic()

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        settings, wanted = asked(words)

        def work() -> None:
            if run(settings, logger.info, wanted):
                logger.info("done in %.1f s", time.monotonic() - began)
            else:
                logger.info("nothing to do: these feature settings were bootstrapped before")

        return settings, work

    # The error is reported once, by this logger; Beam would log it with its traceback.
    return run_process("bootstrap", start, argv, logger, own_stderr(), logging.CRITICAL)


def _leave() -> None:
    # Freeing the objects of Beam and TensorFlow takes a second, during which the trainer starts.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = 1
    # Registered first, so it runs last.
    atexit.register(_leave)
    # Beam's import may load TensorFlow already.
    quiet_tensorflow(os.environ)
    # Imported by its real name: objects that Beam pickles must not be defined in __main__.
    from streaming.bootstrap import main as run_main

    code = run_main()
