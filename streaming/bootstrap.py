"""The analysis of the first clicks: constants of the preprocessing, first popular labels, category names.

`python -m streaming.bootstrap [--section.name VALUE ...]` runs once for each
feature spec, before the first training:

1. Waits until `bootstrap.min_rows` clicks are in the topic, reads those there
   are from its beginning (at most `sample_rows`) and computes their windows,
   as the stream does.
2. A bounded Beam job lets TensorFlow Transform analyse them.
3. `specs/<digest>/` of the registry appears at once with graph and labels.

The trainer and serving need neither Beam nor TensorFlow Transform: the result
is a plain TensorFlow graph.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from state.config import Settings, load
from state.errors import SaltMismatch, SettingsError, SpringtideError, of_disk
from state.events import Parser, Salt, load_salt
from state.features import FeatureSpec
from state.history import HistoryStore
from state.hush import hushed, own_stderr, quieten
from state.log import Reader
from state.registry import Registry
from streaming.profile import Profiler

FEATURES = "features"
LEAST_DEVIATION = 0.25
"""Of a logarithm: rarer columns are not blown up to unit variance."""

CLIP = 6.0
CHUNK_ROWS = 2000
PROGRESS_S = 2.0
POLL_S = 0.2
logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def preprocessing_fn(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """TensorFlow Transform preprocessing: logarithms, centred and scaled by what past clicks showed.

    A function of your own takes its place by the setting `model.preprocessing`.
    It must use operations that LiteRT has built in (no bucketize).

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


@dataclass
class Sample:
    """The first clicks and what they say.

    Attributes:
        features: Chunks of `[n, D]` uint16, windows before each click.
        labels: Clicks by category id.
        names: Names of category ids.
        newest_ms: Time of the newest click.
    """

    features: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    newest_ms: int = 0

    def __len__(self) -> int:
        """The number of clicks."""
        return sum(len(chunk) for chunk in self.features)


def collect(settings: Settings, spec: FeatureSpec, salt: Salt, clock: Callable[[], float], say: Say) -> Sample:
    """Reads the topic's beginning; returns when enough is there and no more is waiting.

    Raises:
        SpringtideError: `bootstrap.timeout_s` passed with less than `bootstrap.min_rows` clicks.
        LogError: The topic cannot be read.
    """
    wanted, topic = settings.bootstrap, settings.kafka.clicks_topic
    parser, found = Parser(settings.events, salt), Sample()
    began = said = clock()
    with tempfile.TemporaryDirectory(prefix="springtide-bootstrap-") as folder, Reader(settings.kafka, topic) as reader:
        store = HistoryStore(Path(folder), history=spec.history)
        profiler = Profiler(store, spec, settings.stream.cache_users)
        while len(found) < wanted.sample_rows:
            batches = reader.poll(POLL_S, settings.stream.batch_events)
            if batches:
                events = parser.parse(batches)
                rows = profiler.update(events)
                store.commit(rows.appends, events.ranges)
                profiler.committed(rows)
                found.features.append(np.array(rows.features))
                found.labels.update(events.category[events.category != 0].tolist())
                found.names.update(events.names)
                found.newest_ms = max(found.newest_ms, int(events.at_ms.max(initial=0)))
            # Where clicks keep coming no poll is empty: caught up to one batch is enough.
            if len(found) >= wanted.min_rows and sum(reader.lag().values()) < settings.stream.batch_events:
                break
            if clock() - said >= PROGRESS_S:
                said = clock()
                say(f"bootstrap: {len(found)} of at least {wanted.min_rows} clicks read from {topic}")
            if clock() - began > wanted.timeout_s and len(found) < wanted.min_rows:
                raise SpringtideError(
                    f"after {wanted.timeout_s} s topic {topic} holds {len(found)} usable clicks of the {wanted.min_rows} needed; "
                    "start the producer, look at the dead letters, or lower bootstrap.min_rows"
                )
        store.close()
    return found


def analyse(features: Sequence[npt.NDArray[np.uint16]], preprocessing: Callable[..., Any], output: Path) -> None:
    """The Beam job: writes `transform_fn/` and the schema of its input to the directory `output`.

    Args:
        features: Chunks of `[n, D]` uint16.
        preprocessing: A TensorFlow Transform preprocessing function of one input, `features`.
        output: Where to.
    """
    import apache_beam as beam
    import tensorflow_transform.beam as tft_beam
    from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tensorflow_transform.beam.tft_beam_io.transform_fn_io import WriteTransformFn
    from tfx_bsl.tfxio.tensor_adapter import TensorAdapterConfig

    width = features[0].shape[1]
    dense = schema_pb2.TensorRepresentation.DenseTensor(column_name=FEATURES)
    dense.shape.dim.add().size = width
    adapter = TensorAdapterConfig(_SCHEMA, {FEATURES: schema_pb2.TensorRepresentation(dense_tensor=dense)})
    whole = np.concatenate(list(features))
    chunks = [whole[at : at + CHUNK_ROWS] for at in range(0, len(whole), CHUNK_ROWS)]
    # Named: DirectRunner would first try to download another runner.
    with (
        tempfile.TemporaryDirectory() as scratch,
        beam.Pipeline(runner=FnApiRunner()) as pipeline,
        tft_beam.Context(scratch),
    ):
        batches = pipeline | "Take the sample" >> beam.Create(chunks) | "Make record batches" >> beam.Map(record_batch)
        transform = (batches, adapter) | "Analyse" >> tft_beam.AnalyzeDataset(preprocessing)
        transform | "Write the graph" >> WriteTransformFn(str(output))


def _import_analysis() -> None:
    with hushed():
        for module in (
            "apache_beam.runners.portability.fn_api_runner.fn_runner",
            "tensorflow_transform.beam.tft_beam_io.transform_fn_io",
            "tfx_bsl.tfxio.tensor_adapter",
        ):
            importlib.import_module(module)


_SCHEMA = pa.schema([(FEATURES, pa.list_(pa.float32()))])


def record_batch(features: npt.NDArray[np.uint16]) -> pa.RecordBatch:
    """`[n, D]` uint16 as the Arrow column that TensorFlow Transform takes.

    >>> record_batch(np.array([[1, 2], [3, 4]], np.uint16)).to_pydict()
    {'features': [[1.0, 2.0], [3.0, 4.0]]}
    """
    rows, width = features.shape
    values = pa.array(features.astype(np.float32).reshape(-1))
    offsets = pa.array(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return pa.RecordBatch.from_arrays([pa.ListArray.from_arrays(offsets, values)], schema=_SCHEMA)


def document(
    sample: Sample, spec: FeatureSpec, salt: Salt, preprocessing: str, popular: int, now_ms: int
) -> dict[str, Any]:
    """What `spec.json` says beside the graph.

    Args:
        sample: The clicks analysed.
        spec: What their windows mean.
        salt: What users' pseudonyms were made with.
        preprocessing: The setting `model.preprocessing`.
        popular: Labels to list, most clicked first, lower id first among equals.
        now_ms: Wall clock.
    """
    ranked = sorted(sample.labels.items(), key=lambda entry: (-entry[1], entry[0]))[:popular]
    return {
        "spec": spec.to_json(),
        "features": list(spec.names),
        "label_windows": list(spec.label_names),
        "salt": salt.fingerprint,
        "preprocessing": preprocessing,
        "rows": len(sample),
        "popular": [[f"{label:016x}", clicks] for label, clicks in ranked],
        "names": {f"{label:016x}": name for label, name in sorted(sample.names.items())},
        "newest_ms": sample.newest_ms,
        "created_at_ms": now_ms,
    }


def run(settings: Settings, say: Say, clock: Callable[[], float] = time.time) -> bool:
    """Bootstraps the feature spec of `settings`; False where that was done before.

    Raises:
        SaltMismatch: It was done with another salt.
        SpringtideError: There are too few clicks, or Kafka does not answer.
    """
    spec, salt = FeatureSpec.from_settings(settings), load_salt(settings.salt_path)
    registry = Registry(settings.registry_dir)
    if spec.digest in registry.specs():
        known = registry.spec(spec.digest)["salt"]
        if known != salt.fingerprint:
            raise SaltMismatch(
                f"the registry was bootstrapped with salt {known}, {settings.salt_path} has {salt.fingerprint}; "
                "restore that salt file, or start a new state directory"
            )
        return False
    preprocessing = load_preprocessing(settings.model.preprocessing)
    # Importing what the analysis needs takes as long as the wait for clicks: they overlap.
    threading.Thread(target=_import_analysis, name="imports", daemon=True).start()
    # 1.
    sample = collect(settings, spec, salt, clock, say)
    say(f"bootstrap: analysing {len(sample)} clicks of {len(sample.labels)} categories")
    # 2.
    about = document(sample, spec, salt, settings.model.preprocessing, settings.model.popular, int(clock() * 1000))
    # 3.
    with hushed():
        return registry.add_spec(
            spec.digest, about, lambda folder: analyse(sample.features, preprocessing, folder / "transform")
        )


def load_preprocessing(path: str) -> Callable[..., Any]:
    """The function that `module:name` names.

    >>> load_preprocessing("streaming.bootstrap:preprocessing_fn").__name__
    'preprocessing_fn'

    Raises:
        SettingsError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"model.preprocessing {path!r} cannot be loaded ({error}); name a function as `module:name`"
        ) from error
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Bootstraps once; returns the exit code."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s bootstrap %(levelname)s %(message)s", stream=own_stderr()
    )
    logger.setLevel(logging.INFO)
    for noisy in ("apache_beam", "kafka", "absl", "tensorflow", "root"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        settings = load(sys.argv[1:] if argv is None else argv, os.environ)
        began = time.monotonic()
        done = run(settings, logger.info)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
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
