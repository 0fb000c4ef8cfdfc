"""The bootstrap: what past clicks say about features and categories, and training examples of them.

    python -m streaming.bootstrap [FILE...] [--rows N] [--examples DIR] [--section.name VALUE ...]

One bounded Beam job with the stream's own code for clicks and windows:

                                            ┌─ TensorFlow Transform: constants of the preprocessing
    read ─ parse events ─ compute windows ──┼─ TensorFlow Transform: vocabulary of the categories
                                            └─ tf.Examples for training offline, where asked for

1. A preprocessing of the user's own is checked on made-up rows.
2. The job reads files, or the beginning of the clicks topic (it waits for
   `bootstrap.min_rows` clicks there), at most `bootstrap.sample_rows` of them.
3. `specs/<digest>/` of the registry appears at once with graph and labels,
   once for each feature spec.

The trainer and serving need neither Beam nor TensorFlow Transform: the result
is a plain TensorFlow graph.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from state.config.settings import Settings, load
from state.config.sources import split_settings
from state.errors import SaltMismatch, SettingsError, SpringtideError, of_disk
from state.events.identity import Salt, load_salt
from state.features.spec import FeatureSpec
from state.process.quiet_stderr import hushed, own_stderr, quieten
from state.recordings.files import Recording
from state.recordings.options import add_file_arguments, as_settings, chosen
from state.registry.registry import Registry, require_preprocessing
from streaming import examples
from streaming.preprocessing import (
    analyse,
    category_batch,
    list_categories,
    load_preprocessing,
    read_categories,
    record_batch,
)
from streaming.preprocessing_check import check_preprocessing, is_own
from streaming.sample import ComputeWindows, ParseSample, ReadSample, Sample, Say, opened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to read and what to make of it.

    Attributes:
        recording: Files; None for the clicks topic.
        sort: How files are ordered: memory or assume.
        examples: Directory for tf.Examples; None for none.
        checked: Whether the preprocessing was checked already.
    """

    recording: Recording | None = None
    sort: str = "memory"
    examples: Path | None = None
    checked: bool = False


TOPIC = Wanted()


def build(pipeline: beam.Pipeline, settings: Settings, spec: FeatureSpec, wanted: Wanted, output: Path | None) -> None:
    """Applies the job to `pipeline`; call it in a `tensorflow_transform.beam.Context`.

    Args:
        pipeline: What to add to.
        settings: The effective settings.
        spec: What the windows mean.
        wanted: What to read and make.
        output: Where the analyses go; None where they were done before.
    """
    rows = (
        pipeline
        | "Start" >> beam.Impulse()
        | "Read the sample" >> beam.ParDo(ReadSample(wanted.recording, wanted.sort))
        | "Parse events" >> beam.ParDo(ParseSample())
        | "Compute windows" >> beam.ParDo(ComputeWindows())
    )
    if output is not None:
        features = rows | "Take features" >> beam.Map(lambda one: record_batch(one.features))
        analyse(features, len(spec.names), load_preprocessing(settings.model.preprocessing), output / "transform")
        categories = rows | "Take categories" >> beam.Map(lambda one: category_batch(one.batch.category))
        list_categories(categories, output / "categories")
    if wanted.examples is not None:
        shards = math.ceil(settings.bootstrap.sample_rows / settings.bootstrap.shard_rows)
        examples.write_examples(rows, wanted.examples, settings.bootstrap.compression, shards)


def run_job(sample: Sample, spec: FeatureSpec, wanted: Wanted, output: Path | None) -> None:
    """Runs the job over `sample` in this process.

    Raises:
        SpringtideError: What a step raised.
    """
    import tensorflow_transform.beam as tft_beam

    try:
        # Named: DirectRunner would first try to download another runner.
        with (
            tempfile.TemporaryDirectory(prefix="springtide-analysis-") as scratch,
            beam.Pipeline(runner=FnApiRunner()) as pipeline,
            tft_beam.Context(scratch),
        ):
            build(pipeline, sample.settings, spec, wanted, output)
    # Beam turns an exception of a step into a RuntimeError with its traceback as text.
    except RuntimeError as error:
        raise sample.failure or error from None


def document(
    sample: Sample, spec: FeatureSpec, salt: Salt, categories: Mapping[int, int], now_ms: int
) -> dict[str, Any]:
    """What `spec.json` says beside the graph.

    Args:
        sample: The clicks analysed.
        spec: What their windows mean.
        salt: What users' pseudonyms were made with.
        categories: Clicks by category id. As many are listed as `model.popular`
            says: most clicked first, lower id first among equals.
        now_ms: Wall clock.
    """
    model = sample.settings.model
    ranked = sorted(categories.items(), key=lambda entry: (-entry[1], entry[0]))[: model.popular]
    return {
        "spec": spec.to_json(),
        "features": list(spec.names),
        "label_windows": list(spec.window_names),
        "salt": salt.fingerprint,
        "preprocessing": model.preprocessing,
        "rows": sample.clicks,
        "popular": [[f"{label:016x}", clicks] for label, clicks in ranked],
        "names": {f"{label:016x}": name for label, name in sorted(sample.names.items())},
        "newest_ms": sample.newest_ms,
        "created_at_ms": now_ms,
    }


def require_same(about: Mapping[str, Any], settings: Settings, salt: Salt) -> None:
    """Refuses a feature spec that was bootstrapped with another salt or preprocessing.

    Raises:
        SaltMismatch: With another salt.
        SpecMismatch: With another preprocessing.
    """
    if about["salt"] != salt.fingerprint:
        raise SaltMismatch.between(f"the registry {settings.registry_dir}", about["salt"], salt.fingerprint)
    require_preprocessing(about, settings.model.preprocessing)


def run(settings: Settings, say: Say, wanted: Wanted = TOPIC, clock: Callable[[], float] = time.time) -> bool:
    """Bootstraps the feature spec of `settings`, and writes examples; False where nothing was to do.

    Raises:
        SaltMismatch: It was done with another salt.
        SpecMismatch: It was done with another preprocessing.
        ProgramError: The preprocessing does not lower, or is no function of its input.
        SpringtideError: There are too few clicks, or Kafka does not answer.
    """
    spec, salt = FeatureSpec.from_settings(settings), load_salt(settings.salt_path)
    registry = Registry(settings.registry_dir)
    known = spec.digest in registry.specs()
    if known:
        require_same(registry.spec(spec.digest), settings, salt)
    if known and wanted.examples is None:
        return False
    if wanted.examples is not None:
        examples.require_empty(wanted.examples)
    # 1.
    if is_own(settings.model.preprocessing) and not known and not wanted.checked:
        with hushed():
            checked = check_preprocessing(settings.model.preprocessing, spec)
        say(checked)
    # Importing what the analysis needs takes as long as the wait for clicks: they overlap.
    imports = threading.Thread(target=_import_analysis, name="imports", daemon=True)
    imports.start()
    imports.join(None if wanted.recording else 0)
    with (
        tempfile.TemporaryDirectory(prefix="springtide-specs-") as folder,
        opened(settings, spec, salt, clock, say) as sample,
    ):
        # 2.
        output = None if known else Path(folder)
        with hushed():
            run_job(sample, spec, wanted, output)
        now_ms = int(clock() * 1000)
        # 3.
        if output is not None:
            about = document(sample, spec, salt, read_categories(output / "categories"), now_ms)
            registry.add_spec(spec.digest, about, lambda place: _copy(output / "transform", place / "transform"))
        if wanted.examples is not None:
            _copy(registry.transform(spec.digest), wanted.examples / "transform")
            about = {"digest": spec.digest, "salt": salt.fingerprint, "rows": sample.examples, "created_at_ms": now_ms}
            about |= {"compression": settings.bootstrap.compression, "preprocessing": settings.model.preprocessing}
            examples.describe(wanted.examples, spec, settings.events.context, about)
            left_out = f"; {unlabelled}" if (unlabelled := sample.unlabelled) else ""
            say(f"{sample.examples:,} examples in {wanted.examples}{left_out}")
    return True


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _import_analysis() -> None:
    with hushed():
        for module in (
            "tensorflow_transform.beam.tft_beam_io.transform_fn_io",
            "tfx_bsl.tfxio.tensor_adapter",
        ):
            importlib.import_module(module)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see `{self.prog} --help`")


def asked(argv: Sequence[str]) -> tuple[Settings, Wanted]:
    """What a command line says.

    Raises:
        SettingsError: It is wrong.
        SystemExit: It asked for help.
    """
    flags, words = split_settings(argv)
    parser = _Parser(
        prog="springtide bootstrap",
        description="Analyses past clicks once for each feature spec: files, or the beginning of the clicks topic.",
        epilog="Settings are written --section.name VALUE. Exit codes: 0 done, 1 failed, 2 wrong use.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, metavar="N", help="at most so many clicks (bootstrap.sample_rows)")
    parser.add_argument(
        "--examples", type=Path, metavar="DIR", help="also write the rows as tf.Examples, TFRecord files, to a new DIR"
    )
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)
    add_file_arguments(parser, "Times stay as recorded.")
    options = parser.parse_args(words)
    rows = [] if options.rows is None else [f"--bootstrap.sample_rows={options.rows}"]
    settings = load([*flags, *as_settings(options), *rows], os.environ)
    recording = chosen(options, settings.events) if options.files else None
    return settings, Wanted(recording, options.sort, options.examples, options.checked)


def main(argv: Sequence[str] | None = None) -> int:
    """Bootstraps once; returns the exit code."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s bootstrap %(levelname)s %(message)s", stream=own_stderr()
    )
    logger.setLevel(logging.INFO)
    for noisy in ("apache_beam", "kafka", "absl", "tensorflow", "root"):
        # What goes wrong is said once, below; Beam says it with its traceback.
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    began = time.monotonic()
    try:
        settings, wanted = asked(sys.argv[1:] if argv is None else argv)
        done = run(settings, logger.info, wanted)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("stopped; nothing was kept")
        return 1
    logger.info(
        "done in %.1f s" if done else "nothing to do: these feature settings were bootstrapped before (%.1f s)",
        time.monotonic() - began,
    )
    return 0


if __name__ == "__main__":
    # Beam's import may load TensorFlow already.
    quieten(os.environ)
    # By its real name: what Beam pickles must not live in __main__.
    from streaming.bootstrap import main as run_main

    sys.exit(run_main())
