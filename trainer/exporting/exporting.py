"""Exports a version: writes it, compares it with serving's program on rows of the training log, and reports the result.

1. The version is loaded into a trainer, as a restart would.
2. A sample of serving's inputs is made of the latest records that the version learned, or of made-up rows if the log is
   unreachable.
3. The SavedModel, or the device's file, is written and loaded as its user loads it. Its outputs are compared with those
   of the version's program on the same rows: by probabilities, and by which candidate comes first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.disk import files as durable
from state.errors import GapError, LogError, MicroBatchError, ProgramError
from state.log import Log
from state.lowering import Quantize, difference
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.ranking.crosses import logits_of, with_network_share
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.segments import LogSegment
from trainer.engine.engine import CROSS
from trainer.engine.record import Recorder
from trainer.engine.step import Trainer
from trainer.exporting import device_file, saved_model
from trainer.exporting.device_file import choose
from trainer.exporting.saved_model import KnownAnswers
from trainer.model.attributes import Columns
from trainer.model.inputs import Input
from trainer.model.ranker import Ranker
from trainer.replay import SegmentReader
from trainer.tables.table import Table
from trainer.versions import checkpoint
from trainer.versions.program import Program, sample

U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]
Outputs = Mapping[str, F32]

ROWS = 256
RECORDS = 64
"""Most records of the log that are read, from the latest backwards."""

PATIENCE_S = 10.0
LOGITS = ("recent_logits", "popular_logits", "successor_logits")
TIMED = 200
TOLERANCE = 1e-5
"""How far a SavedModel may be from the program, relative to 1 + the program's value."""

Say = Callable[[str], None]


def _replayed(trainer: Trainer, batches: Sequence[MicroBatch]) -> tuple[dict[str, U64], dict[str, F32]]:
    """The rows of micro-batches, as serving finds them: ids as a record has them, and inputs as the program has them."""
    columns = Columns(trainer.settings.attributes)
    recorder = Recorder(trainer.settings, trainer.crosses, columns, 0)

    def looked_up(name: str, ids: U64) -> F32:
        table = trainer.tables[name]
        assert isinstance(table, Table)
        return table.gather(table.find(np.ascontiguousarray(ids).reshape(-1))).reshape(*ids.shape, table.dim)

    def rows_of(input_: Input) -> F32:
        rows = looked_up(input_.table, ids[input_.ids])
        if input_.mean:
            rows = rows.sum(-2) / np.float32(max(rows.shape[-2], 1))
        if input_.attributes and (attributes := ids[input_.attributes]).shape[1]:
            rows = rows + looked_up("context", attributes).sum(1) / np.float32(attributes.shape[1])
        return np.asarray(rows, np.float32)

    popular, pieces = trainer.popular.top(), []
    for batch in batches:
        none = np.zeros((len(batch), 0), np.uint64)
        record = recorder.record(batch, none, popular, trainer.transitions, (0, 0))
        crossed = trainer.crosses.ids(columns.values_of(batch))
        crosses = logits_of(looked_up(CROSS, crossed), looked_up(CROSS, trainer.crosses.shares)[:-1])
        pieces.append((record.ids, {**record.values, "cross": crosses}))
    ids: dict[str, U64] = {
        name: pieces[0][0][name] if name == "popular" else np.concatenate([ids[name] for ids, _ in pieces])[:ROWS]
        for name in pieces[0][0]
    }
    values = {name: np.concatenate([part[name] for _, part in pieces])[:ROWS] for name in pieces[0][1]}
    return ids, {
        input_.name: rows_of(input_) if input_.table else np.asarray(values[input_.name], np.float32)
        for input_ in trainer.model.inputs
        if not input_.training
    }


def latest(log: Log, version: Manifest) -> list[MicroBatch]:
    """The latest micro-batches that a version learned, as many as have `ROWS` rows together, if the log still has them."""
    first, batches = max(0, version.log.next - 2 * RECORDS), list[MicroBatch]()
    if not version.log.topic_id:
        return batches
    topic, partition = version.log.topic, version.log.partition
    reader = SegmentReader(
        lambda offset: log.reader(topic, [partition], {partition: offset}), version.log, (), PATIENCE_S
    )
    try:
        for _, value in reader.records(LogSegment(first, version.log.next)):
            batch = None if value is None else decode(value)
            if batch is not None and len(batch) and batch.header.spec == version.spec:
                batches.append(batch)
                while sum(map(len, batches[1:])) >= ROWS:
                    del batches[0]
    except (GapError, LogError, MicroBatchError, OSError):
        pass
    finally:
        reader.close()
    return batches


class Agreement(NamedTuple):
    """How far the outputs of two programs agree.

    Attributes:
        outputs: The largest difference of any output, relative to 1 + the other's value.
        probability: The largest difference of an interest's or an engagement's probability.
        first: Share of rows in which the same category is the most probable.
    """

    rows: int
    outputs: float
    probability: float
    first: float


def agreement(tested: Outputs, reference: Outputs) -> Agreement:
    """Compares the outputs of the program under test with those of the reference program on the same rows."""
    interests = [_softmax(np.concatenate([outputs[name] for name in LOGITS], 1)) for outputs in (tested, reference)]
    engagement = [1 / (1 + np.exp(-outputs["engagement_logit"].astype(np.float64))) for outputs in (tested, reference)]
    distances = [np.abs(pair[0] - pair[1]).max() for pair in (interests, engagement)]
    first = interests[0].argmax(1) == interests[1].argmax(1)
    return Agreement(
        len(first),
        max(difference(tested[name], value) for name, value in reference.items()),
        float(max(distances)),
        float(first.mean()),
    )


def _softmax(logits: F32) -> npt.NDArray[np.float64]:
    grown = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(grown / grown.sum(1, keepdims=True))


class Compared(NamedTuple):
    """The sample and the program that an export is compared with.

    Attributes:
        trainer: Restored to the version.
        ranker: Its ranker.
        ids: The sample's ids by name; None for made-up rows.
    """

    trainer: Trainer
    ranker: Ranker
    version: Manifest
    program: Program
    inputs: Mapping[str, F32]
    ids: Mapping[str, device_file.U64] | None
    of: str

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """Serving's answers: the program's outputs with the version's share of the network."""
        return with_network_share(self.program.predict(inputs), inputs, self.ranker.network_share)

    @property
    def kept(self) -> dict[str, F32]:
        """The inputs that all rows share, by name."""
        shapes = self.trainer.model.shapes()
        return {name: value for name, value in self.inputs.items() if shapes[name][0] is not None}


def load(registry: Registry, number: int, trainer: Trainer, spec: str, log: Log) -> Compared:
    """Loads the version into `trainer`, and makes a sample for it."""
    # 1.
    version = checkpoint.restore(registry, number, trainer, spec)
    program = Program(registry.specs.program(version.program))
    program.load(trainer.model.weights())
    # 2.
    ranker, crosses = trainer.ranker(), trainer.tables[CROSS]
    assert isinstance(crosses, Table)
    ranker.network_share = 1.0 + float(crosses.gather(crosses.find(trainer.crosses.shares[-1:]))[0, 0])
    batches = latest(log, version)
    if batches:
        ids, inputs = _replayed(trainer, batches)
        of = f"{len(ids['user'])} examples of the training log"
        return Compared(trainer, ranker, version, program, inputs, ids, of)
    inputs = sample(trainer.model, ROWS)
    of = f"{ROWS} synthetic examples: the training log has none"
    return Compared(trainer, ranker, version, program, inputs, None, of)


def export_saved_model(compared: Compared, folder: Path, say: Say, known: KnownAnswers | None = None) -> Path:
    """Writes a SavedModel into the directory of all versions; returns its path.

    Raises:
        ProgramError: Its outputs differ from serving's; it is not stored.
    """
    writing = saved_model.write(folder, compared.version.version, compared.ranker, compared.kept, known)
    exported = saved_model.Exported(writing)
    agreed = agreement(exported.predict(compared.inputs), compared.predict(compared.inputs))
    if agreed.outputs > TOLERANCE:
        shutil.rmtree(writing)
        raise ProgramError(
            f"the SavedModel of version {compared.version.version} differs from serving's answers by {agreed.outputs:.2g} "
            f"(allowed {TOLERANCE:g})",
            "an operation of the model's is computed otherwise by LiteRT: `springtide check-model`",
        )
    took_us = _median_us(exported.predict, compared.inputs, compared.kept)
    path = saved_model.publish(writing, compared.version.version)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    say(f"saved model  {path}, {size / 1e6:.2f} MB")
    if known is not None:
        say(f"by id        {known.users:,} users and {known.items:,} items, as of {known.at_ms} ms")
    say(_comparison(agreed, compared, took_us))
    return path


def export_device_file(
    compared: Compared, path: Path, users: Sequence[int], most_rows: int, quantize: Quantize, say: Say
) -> None:
    """Writes a file for a device, with the rows of `users` and at most `most_rows` of any other table, by one rename."""
    ranker, version = compared.ranker, compared.version
    rows = choose(compared.trainer, users, most_rows)
    lowered = device_file.lower(ranker, rows, compared.kept, quantize, f"version {version.version}")
    manifest = {
        "version": version.version,
        "spec": version.spec,
        "quantize": quantize,
        "context": list(compared.trainer.settings.events.context),
    }
    content = device_file.with_lists(lowered, rows, manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, content)
    counts = ", ".join(f"{len(chosen.ids):,} of {name}" for name, chosen in rows.items())
    say(f"device file  {path}, {len(content) / 1e6:.2f} MB, {quantize}; rows: {counts}")
    if compared.ids is None:
        say("agreement    unknown: the training log has no examples to replay")
        return
    program = Program(content, device_file.DEVICE)
    device_inputs = device_file.device_inputs(ranker, rows, compared.ids, compared.inputs, list(compared.kept))
    agreed = agreement(program.predict(device_inputs), compared.predict(compared.inputs))
    say(_comparison(agreed, compared, _median_us(program.predict, device_inputs)))
    aboard = {
        input_.table: rows[input_.table].places(compared.ids[input_.ids]) > 0
        for input_ in device_file.placed(ranker)
        if input_.ids == input_.table
    }
    say("on board     " + ", ".join(f"{name} of {share.mean():.0%} of the examples" for name, share in aboard.items()))


def _median_us(
    predict: Callable[[Mapping[str, Any]], object], inputs: Mapping[str, npt.NDArray[Any]], kept: Collection[str] = ()
) -> float:
    """Median microseconds of a prediction of one row alone; all rows share the inputs in `kept`."""
    rows = len(next(value for name, value in inputs.items() if name not in kept))
    took = []
    for count in range(TIMED):
        row = count % rows
        row_inputs = {name: value if name in kept else value[row : row + 1] for name, value in inputs.items()}
        began_s = time.perf_counter()
        predict(row_inputs)
        took.append(time.perf_counter() - began_s)
    return float(np.median(took)) * 1e6


def _comparison(agreed: Agreement, compared: Compared, took_us: float) -> str:
    ours_us = _median_us(compared.predict, compared.inputs, compared.kept)
    return (
        f"agreement    {compared.of}: probabilities within {agreed.probability:.1g}, the same category first in {agreed.first:.1%}\n"
        f"latency      {took_us:.0f} us an example alone, {ours_us:.0f} us by serving's program (median)"
    )
