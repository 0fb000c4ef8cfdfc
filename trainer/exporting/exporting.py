"""Exports a version: writes it, compares it with what serving runs on rows of the training log, and tells.

1. The version is loaded into a trainer, as a restart would.
2. A sample of serving's inputs is made of the latest records that it learned; made-up rows where the log is away.
3. The SavedModel, or the device's file, is written, loaded as its user loads it, and compared with the version's program.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.disk import files as durable
from state.errors import ProgramError
from state.lowering import Quantize
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from trainer.engine.step import Trainer
from trainer.exporting import device_file, saved_model
from trainer.exporting.choosing import choose
from trainer.exporting.comparison import Agreement, agreement, median_us, one_row
from trainer.exporting.known_answers import KnownAnswers
from trainer.exporting.sample import ROWS, Replayed, enough, latest
from trainer.verify import OpenLog
from trainer.versions import checkpoint
from trainer.versions.program import Program, sample

TOLERANCE = 1e-5
"""How far a SavedModel may be from the program, relative to 1 + the program's value."""

F32 = npt.NDArray[np.float32]
Say = Callable[[str], None]


class Compared(NamedTuple):
    """What an export is compared on, and with.

    Attributes:
        trainer: Restored to the version.
        version: Its manifest.
        program: What serving runs, with its weights.
        inputs: Of the sample, by name.
        ids: Likewise; None of made-up rows.
        of: What the sample is, in words.
    """

    trainer: Trainer
    version: Manifest
    program: Program
    inputs: Mapping[str, F32]
    ids: Mapping[str, device_file.U64] | None
    of: str

    @property
    def kept(self) -> dict[str, F32]:
        """The inputs that are no row's own, by name."""
        rows = self.trainer.model.specs()
        return {name: value for name, value in self.inputs.items() if rows[name].shape[0] is not None}


def load(registry: Registry, number: int, trainer: Trainer, spec: str, open_log: OpenLog) -> Compared:
    """The version, and a sample for it.

    Args:
        registry: Is only read.
        number: Of the version.
        trainer: Is cleared first.
        spec: Digest of the feature spec of the settings.
        open_log: Opens the training log.

    Raises:
        SpringtideError: The version cannot be loaded with these settings.
    """
    # 1.
    version = checkpoint.restore(registry, number, trainer, spec)
    program = Program(registry.program(version.program))
    program.load(trainer.model.weights())
    # 2.
    batches = enough(latest(open_log, version))
    if batches:
        found = Replayed(trainer, batches)
        rows = len(found.ids["user"])
        return Compared(trainer, version, program, found.inputs, found.ids, f"{rows} rows of the training log")
    inputs = sample(trainer.model, ROWS)
    return Compared(trainer, version, program, inputs, None, f"{ROWS} made-up rows, for the training log has none")


def export_saved_model(of: Compared, folder: Path, say: Say, known: KnownAnswers | None = None) -> Path:
    """Writes a SavedModel; returns its directory.

    Args:
        of: The version, and what to compare on.
        folder: Of all versions.
        say: Takes lines.
        known: Answers by id; None for none.

    Raises:
        ProgramError: It answers otherwise than serving; it gets no place.
    """
    writing = saved_model.write(folder, of.version.version, of.trainer.model, of.kept, known)
    exported = saved_model.Exported(writing)
    found = agreement(exported.predict(of.inputs), of.program.predict(of.inputs))
    if found.outputs > TOLERANCE:
        shutil.rmtree(writing)
        raise ProgramError(
            f"the SavedModel of version {of.version.version} differs from serving's answers by {found.outputs:.2g} "
            f"(allowed {TOLERANCE:g})",
            "an operation of the model's is computed otherwise by LiteRT: `springtide check-model`",
        )
    took_us = _median_us(exported.predict, of.inputs, of.kept)
    path = saved_model.publish(writing, of.version.version)
    say(f"saved model  {path}, {saved_model.bytes_of(path) / 1e6:.2f} MB")
    if known is not None:
        say(f"by id        {known.users:,} users and {known.items:,} items, as of {known.at_ms} ms")
    say(_told(found, of, took_us))
    return path


def export_device_file(of: Compared, path: Path, users: Sequence[int], most: int, quantize: Quantize, say: Say) -> None:
    """Writes a file for a device, by one rename.

    Args:
        of: The version, and what to compare on.
        path: Of the file.
        users: Pseudonyms, in the order of their places.
        most: Rows of any other table.
        quantize: How constants are kept.
        say: Takes lines.

    Raises:
        ProgramError: The model does not lower.
    """
    ranker, version = of.trainer.model, of.version
    rows = choose(of.trainer, users, most)
    lowered = device_file.lower(ranker, rows, of.kept, quantize, f"version {version.version}")
    about = {
        "version": version.version,
        "spec": version.spec,
        "quantize": quantize,
        "context": list(of.trainer.settings.events.context),
    }
    content = device_file.with_lists(lowered, rows, about)
    writing = path.with_name(f".{path.name}.writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.unlink(missing_ok=True)
    durable.write(writing, content)
    writing.replace(path)
    durable.sync_directory(path.parent)
    counts = ", ".join(f"{len(one.ids):,} of {name}" for name, one in rows.items())
    say(f"device file  {path}, {len(content) / 1e6:.2f} MB, {quantize}; rows: {counts}")
    if of.ids is None:
        say("agreement    not taken: the training log has no rows to replay")
        return
    program = device_file.DeviceProgram(content)
    asked = device_file.device_inputs(ranker, rows, of.ids, of.inputs, list(of.kept))
    found = agreement(program.predict(asked), of.program.predict(of.inputs))
    say(_told(found, of, _median_us(program.predict, asked, {})))
    aboard = {
        one.table: rows[one.table].places(of.ids[one.ids]) > 0
        for one in device_file.placed(ranker)
        if one.ids == one.table
    }
    say("on board     " + ", ".join(f"{name} of {share.mean():.0%} of the rows" for name, share in aboard.items()))


def _median_us(
    predict: Callable[[Mapping[str, Any]], object],
    inputs: Mapping[str, npt.NDArray[Any]],
    kept: Mapping[str, F32],
) -> float:
    fixed = frozenset(kept)
    rows = len(next(value for name, value in inputs.items() if name not in fixed))
    return median_us(lambda row: predict(one_row(inputs, fixed, row)), rows, time.perf_counter)


def _told(found: Agreement, of: Compared, took_us: float) -> str:
    ours_us = _median_us(of.program.predict, of.inputs, of.kept)
    return (
        f"agreement    {of.of}: probabilities within {found.probability:.1g}, the same category first in {found.first:.1%}\n"
        f"latency      {took_us:.0f} us a row alone, {ours_us:.0f} us by serving's program (median)"
    )
