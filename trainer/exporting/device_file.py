"""One file for a device: a LiteRT program with a version's weights, and the rows of chosen ids.

    signature raw     the program's own inputs, as in serving
    signature device  row indices instead of rows: an input `<name>_at` (int32) for each of `<name>`

An index is the number of a line in a list of the same file. The lists are a ZIP archive after the program, where
TensorFlow Lite keeps associated files. LiteRT ignores it.

    rows/<table>.txt   line n is the id at index n, 16 hexadecimal digits; index 0, "-", represents every other id
    version.json       the version, its feature spec and context fields
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.lowering import Quantize, lower_saved_model
from trainer.engine.step import Trainer
from trainer.exporting.saved_model import RAW, raw_signature
from trainer.model.inputs import Input
from trainer.model.model import Model
from trainer.model.ranker import Ranker
from trainer.tables.table import Table

DEVICE = "device"
AT = "_at"
OTHERS = "-"
F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]


class ChosenRows(NamedTuple):
    """The rows of a table that a file contains.

    Attributes:
        ids: `[n]` uint64, in the order of their indices, which start at 1.
        rows: `[n, width]` float32.
    """

    ids: U64
    rows: F32

    def places(self, ids: U64) -> npt.NDArray[np.int32]:
        """The index of each id, of any shape; 0 for an id that the file does not contain.

        >>> ChosenRows(np.array([7, 5], np.uint64), np.zeros((2, 3), np.float32)).places(np.array([[5, 9]], np.uint64)).tolist()
        [[2, 0]]
        """
        if not len(self.ids):
            return np.zeros(ids.shape, np.int32)
        order = np.argsort(self.ids, kind="stable")
        positions = np.searchsorted(self.ids[order], ids).clip(max=len(order) - 1)
        return np.where(self.ids[order][positions] == ids, order[positions] + 1, 0).astype(np.int32)


def placed(model: Model) -> list[Input]:
    """The ranker's inputs that become indices: those that are the row of one id for each row of the batch."""
    return [
        input_
        for input_ in model.inputs
        if input_.table and not input_.training and not input_.mean and input_.shape[0] == "B"
    ]


def _device_signature(ranker: Ranker, rows: Mapping[str, ChosenRows], kept: Mapping[str, F32]) -> Any:
    """`Ranker.predict` with row indices instead of rows. Inputs that do not depend on the batch row (`kept`) are constants."""
    specs = {name: spec for name, spec in ranker.specs().items() if name not in kept}
    tables = {input_.name: input_.table for input_ in placed(ranker)}
    tables_of_rows = {
        name: np.concatenate([np.zeros_like(chosen.rows[:1], shape=(1, chosen.rows.shape[1])), chosen.rows])
        for name, chosen in rows.items()
    }
    signature = {
        name + AT if name in tables else name: tf.TensorSpec(spec.shape[:-1], tf.int32, name + AT)
        if name in tables
        else spec
        for name, spec in specs.items()
    }

    def predict(**values: Any) -> Any:
        constants = {table: tf.constant(tables_of_rows[table]) for table in set(tables.values())}
        inputs = {
            name: tf.gather(constants[tables[name]], values[name + AT]) if name in tables else values[name]
            for name in specs
        }
        return ranker.predict(inputs | {name: tf.constant(value) for name, value in kept.items()})

    return tf.function(predict, autograph=False).get_concrete_function(**signature)


def lower(
    ranker: Ranker, rows: Mapping[str, ChosenRows], kept: Mapping[str, F32], quantize: Quantize, subject: str
) -> bytes:
    """The LiteRT program with both signatures; weights and rows are constants."""
    module = tf.Module()
    module.model = ranker
    # LiteRT does not support default values of inputs: all are required.
    signatures = {RAW: raw_signature(ranker, {}), DEVICE: _device_signature(ranker, rows, kept)}
    with tempfile.TemporaryDirectory(prefix="springtide-device-") as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        return lower_saved_model(Path(folder), sorted(signatures), subject, frozen=True, quantize=quantize)


def with_lists(program: bytes, rows: Mapping[str, ChosenRows], manifest: Mapping[str, Any]) -> bytes:
    """The program followed by the archive of its lists."""
    file = io.BytesIO(program)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for table, chosen in rows.items():
            lines = [OTHERS, *(f"{identity:016x}" for identity in chosen.ids.tolist())]
            archive.writestr(f"rows/{table}.txt", "\n".join(lines) + "\n")
        archive.writestr("version.json", json.dumps(manifest, indent=1))
    return file.getvalue()


def choose(trainer: Trainer, users: Sequence[int], most: int) -> dict[str, ChosenRows]:
    """The rows, by table, that a device's file contains: of `users` in their order, and at most `most` of any other table.

    The trainer is restored to the version. A user without a row has zeros.
    """
    return {
        name: _of(trainer, name, users, most) for name in sorted({input_.table for input_ in placed(trainer.model)})
    }


def _of(trainer: Trainer, name: str, users: Sequence[int], most_rows: int) -> ChosenRows:
    table = trainer.tables[name]
    assert isinstance(table, Table)
    if name == "user":
        ids: U64 = np.array(users, np.uint64)
        return ChosenRows(ids, table.gather(table.find(ids)))
    changes = table.state()
    # Newest first, ties by id, so that the same version gives the same file.
    newest = np.lexsort((changes.ids, -changes.last_seen_ms))[:most_rows]
    return ChosenRows(changes.ids[newest], changes.rows[newest])


def device_inputs(
    ranker: Ranker,
    rows: Mapping[str, ChosenRows],
    ids: Mapping[str, U64],
    inputs: Mapping[str, F32],
    kept: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of the signature `device` for rows whose ids and raw inputs are known."""
    prepared: dict[str, npt.NDArray[Any]] = {name: value for name, value in inputs.items() if name not in kept}
    for input_ in placed(ranker):
        del prepared[input_.name]
        prepared[input_.name + AT] = rows[input_.table].places(ids[input_.ids])
    return prepared
