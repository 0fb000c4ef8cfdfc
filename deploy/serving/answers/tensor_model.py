"""Evaluates the model on named tensors, as the TensorFlow Serving API does, independent of HTTP and gRPC.

The signature `serving_default` takes users by id. `raw` takes the program's own inputs, by their names in the graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.predictor import KINDS, Predictor
from deploy.serving.answers.program import batch_of
from deploy.serving.answers.query import LATEST_MS, Query
from deploy.serving.answers.queue import MOST_AT_ONCE, StepQueue
from deploy.serving.answers.version import LoadedVersion, named
from deploy.serving.host_files import CONTROL_NOTE
from springtide_client.answers import Profile
from state.errors import BadRequest, NotReady
from state.metrics import WorkerMetrics
from state.rows.reader import RowReader, Served

BY_ID, RAW = "serving_default", "raw"
CONTEXT = "context."
NOW = -1
STABLE, PREVIOUS = "stable", "previous"
MODEL = "profile"
MOST_ROWS = 1000
VECTOR = frozenset(("vector",))

Tensor = NDArray[Any]
Tensors = Mapping[str, Tensor]
"""Tensors by name; strings are bytes in object arrays."""


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of one input or output.

    Attributes:
        dtype: The NumPy type string; `O` for strings.
        shape: The shape, with -1 for any size; the first dimension is the number of rows.
        default: The value for each row if an optional input is missing; None for a required input.
    """

    dtype: str
    shape: tuple[int, ...]
    default: bytes | int | None = None


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one signature by name, required inputs first.

    `kept` has the inputs without a row dimension for which the version has a value.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    kept: Tensors = field(default_factory=dict)

    def required(self) -> list[str]:
        """Returns the names of required inputs."""
        return [name for name, spec in self.inputs.items() if spec.default is None and name not in self.kept]


def signatures_of(version: LoadedVersion, context_fields: Sequence[str]) -> dict[str, Signature]:
    """Returns the signatures of a version by name."""
    program = version.program
    candidates = sum(program.shapes[f"{kind}_mask"][1] for kind in KINDS if f"{kind}_mask" in program.shapes)
    optional = TensorSpec("O", (-1,), b"")
    inputs = {
        "user_id": TensorSpec("O", (-1,)),
        "item": optional,
        "category": optional,
        "at": TensorSpec("<i8", (-1,), NOW),
        **{CONTEXT + name: optional for name in context_fields},
    }
    outputs = {
        "interest_labels": TensorSpec("O", (-1, candidates)),
        "interest_ids": TensorSpec("O", (-1, candidates)),
        "interest_probabilities": TensorSpec("<f4", (-1, candidates)),
        "engagement": TensorSpec("<f4", (-1,)),
        "vector": TensorSpec("<f4", program.outputs["vector"]),
        "known": TensorSpec("|b1", (-1,)),
        "at": TensorSpec("<i8", (-1,)),
    }
    constants = {"popular_rows": version.popular_rows, **version.own_popular}
    by_rows = sorted(program.shapes.items(), key=lambda entry: entry[1][0])
    raw = Signature(
        {name: TensorSpec("<f4", shape) for name, shape in by_rows},
        {name: TensorSpec("<f4", shape) for name, shape in sorted(program.outputs.items())},
        {name: value for name, value in constants.items() if name in program.shapes},
    )
    return {BY_ID: Signature(inputs, outputs), RAW: raw}


def require(signature: Signature, inputs: Tensors) -> int:
    """Checks inputs against a signature, and returns their number of rows.

    Raises:
        BadRequest: A name is unknown or missing, a tensor has a wrong type, shape or number of rows, or there are no
            rows, or too many.
    """
    known = ", ".join(signature.inputs)
    rows: int | None = None
    for name, tensor in inputs.items():
        spec = signature.inputs.get(name)
        if spec is None:
            raise BadRequest(f"there is no input {name[:100]!r}", f"give {known}")
        if np.dtype(spec.dtype) != tensor.dtype:
            raise BadRequest(f"the input {name!r} is of type {tensor.dtype}", f"give {np.dtype(spec.dtype)}")
        fits = len(tensor.shape) == len(spec.shape) and all(
            wanted in (-1, size) for wanted, size in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BadRequest(f"the input {name!r} has the shape {list(tensor.shape)}", f"give {list(spec.shape)}")
        if spec.shape[0] < 0:
            if rows not in (None, len(tensor)):
                raise BadRequest(f"the input {name!r} has {len(tensor)} rows and others have {rows}", "give as many")
            rows = len(tensor)
    missing = [name for name in signature.required() if name not in inputs]
    if missing:
        raise BadRequest(f"the input {missing[0]!r} is missing", f"give it; the inputs are {known}")
    if not rows:
        raise BadRequest("the request asks for no row", "give at least one")
    if rows > MOST_ROWS:
        raise BadRequest(f"the request asks for {rows} rows", f"ask for at most {MOST_ROWS} at once")
    return rows


def labels_of(reader: RowReader) -> dict[str, int]:
    """Returns the version of each label, whether or not its rows are here."""
    control, served, before = reader.note(CONTROL_NOTE), reader.served(), reader.before()
    labels = {} if served is None else {STABLE: served.version}
    if before is not None:
        labels[PREVIOUS] = before
    return labels | (json.loads(control).get("labels", {}) if control else {})


class ModelChoice(NamedTuple):
    """The requested model; the served version if neither number nor label is given."""

    name: str
    version: int | None = None
    label: str | None = None

    def resolve(self, reader: RowReader) -> int | None:
        """Returns the number of the version (None: the served one); raises BadRequest without such a model or label."""
        if self.name != MODEL:
            raise BadRequest(f"there is no model {self.name[:200]!r}", f"ask for {MODEL}", http_status=404)
        if self.label is None:
            if self.version is not None and self.version < 0:
                raise _unknown(reader, self.version)
            return self.version
        labels = labels_of(reader)
        if self.label not in labels:
            known = ", ".join(sorted(labels))
            raise BadRequest(f"there is no label {self.label[:200]!r}", f"ask for one of {known}", http_status=404)
        return labels[self.label]


class Prediction(NamedTuple):
    """What a version answered under a signature."""

    version: int
    signature: str
    outputs: dict[str, Tensor]


class TensorModel:
    """The model of one host. Used in one event loop."""

    def __init__(self, predictor: Callable[[], Predictor], steps: StepQueue, metrics: WorkerMetrics) -> None:
        self._predictor, self._steps, self._metrics = predictor, steps, metrics

    def versions(self, choice: ModelChoice) -> list[Served]:
        """Returns the requested version; if none is named, all available ones, the served one first.

        Raises:
            BadRequest: There is no such model, version or label here.
            NotReady: There is no version yet.
        """
        with self._predictor().reading() as reader:
            number = choice.resolve(reader)
            served = reader.served()
            if served is None:
                raise NotReady("no version is here yet", "wait for the trainer's first version and for the applier")
            if number is None:
                others = [version for version in reversed(reader.versions()) if version.version != served.version]
                return [served, *others]
            version = reader.version(number)
            if version is None:
                raise _unknown(reader, number)
            return [version]

    def signatures(self, choice: ModelChoice) -> tuple[int, dict[str, Signature]]:
        """Returns the requested version, and its signatures.

        Raises:
            BadRequest, NotReady: As `versions`.
            SpringtideError: The version cannot be run.
        """
        predictor = self._predictor()
        with predictor.reading() as reader:
            version = predictor.load_version(reader, choice.resolve(reader))
            return version.served.version, signatures_of(version, predictor.context_fields)

    async def predict(
        self, choice: ModelChoice, signature: str, inputs: Callable[[Signature], Tensors], wanted: Collection[str] = ()
    ) -> Prediction:
        """Answers all rows from one version.

        `inputs` reads the inputs, given the signature. `wanted` names outputs; empty for all.

        Raises:
            BadRequest, NotReady: As `versions`.
            BadRequest: The signature does not exist, or the inputs are not of its form.
            Overloaded, TookTooLong: More is requested than can be answered in time.
            SpringtideError: The version cannot be run.
        """
        predictor, name = self._predictor(), signature or BY_ID
        with predictor.reading() as reader:
            version = predictor.load_version(reader, choice.resolve(reader))
            offered = signatures_of(version, predictor.context_fields)
            if name not in offered:
                raise BadRequest(f"there is no signature {name!r}", f"ask one of {', '.join(offered)}")
            form = offered[name]
            tensors = inputs(form)
            rows = require(form, tensors)
            if unknown := set(wanted) - form.outputs.keys():
                raise BadRequest(f"there is no output {min(unknown)!r}", f"take {', '.join(form.outputs)}")
            number = version.served.version
            queries = [] if name == RAW else _queries(tensors, rows)

            def steps() -> Generator[None, None, list[dict[str, Tensor]]]:
                parts = []
                for at in range(0, rows, MOST_AT_ONCE):
                    if name == RAW:
                        # Other requests may have loaded the weights of another version in between.
                        parts.append(_run(predictor.load_version(reader, number), form, tensors, at, rows))
                    else:
                        answers = predictor.profiles(queries[at : at + MOST_AT_ONCE], reader, number)
                        self._metrics.cold_starts.inc(sum(answer.cold_start for answer in answers))
                        parts.append(tensors_of(answers, form))
                    yield
                return parts

            parts = await self._steps.run(steps(), len(range(0, rows, MOST_AT_ONCE)))
        outputs = {output: np.concatenate([part[output] for part in parts]) for output in wanted or form.outputs}
        return Prediction(number, name, outputs)


def _unknown(reader: RowReader, number: int) -> BadRequest:
    return BadRequest(f"version {number} is not here", f"ask for one of {named(reader)}", http_status=404)


def _queries(inputs: Tensors, rows: int) -> list[Query]:
    """Converts rows by id to queries; raises BadRequest if a string is not UTF-8, or a time is invalid."""
    texts = {name: _texts(name, values) for name, values in inputs.items() if name != "at"}
    times = inputs["at"].tolist() if "at" in inputs else [NOW] * rows
    for row, at in enumerate(times):
        if at != NOW and not 0 <= at <= LATEST_MS:
            raise BadRequest(f"row {row} of the input 'at' is {at}", f"give milliseconds since 1970, or {NOW} for now")
    empty = [""] * rows
    contexts = {name.removeprefix(CONTEXT): values for name, values in texts.items() if name.startswith(CONTEXT)}
    return [
        Query(
            texts["user_id"][row],
            texts.get("item", empty)[row] or None,
            texts.get("category", empty)[row] or None,
            {name: values[row] for name, values in contexts.items() if values[row]},
            None if times[row] == NOW else times[row],
            VECTOR,
        )
        for row in range(rows)
    ]


def _texts(name: str, values: Tensor) -> list[str]:
    try:
        return [value.decode() for value in values.tolist()]
    except UnicodeDecodeError:
        raise BadRequest(f"the input {name!r} has a string that is no UTF-8", "encode it so") from None


def tensors_of(answers: Sequence[Profile], signature: Signature) -> dict[str, Tensor]:
    """Returns the outputs by id; interests are padded with empty labels of probability 0."""
    rows, slots = len(answers), signature.outputs["interest_labels"].shape[1]
    labels, ids = (np.full((rows, slots), b"", np.object_) for _ in range(2))
    probabilities = np.zeros((rows, slots), np.float32)
    for row, answer in enumerate(answers):
        for slot, interest in enumerate(answer.interests):
            labels[row, slot] = interest.label.encode()
            ids[row, slot] = interest.id.encode()
            probabilities[row, slot] = interest.probability
    engagement = [np.nan if answer.engagement is None else answer.engagement.probability for answer in answers]
    return {
        "interest_labels": labels,
        "interest_ids": ids,
        "interest_probabilities": probabilities,
        "engagement": np.array(engagement, np.float32),
        "vector": np.stack([answer.vector for answer in answers if answer.vector is not None]),
        "known": np.array([answer.known for answer in answers]),
        "at": np.array([answer.at_ms for answer in answers], np.int64),
    }


def _run(version: LoadedVersion, signature: Signature, tensors: Tensors, first: int, rows: int) -> dict[str, Tensor]:
    count = min(MOST_AT_ONCE, rows - first)
    fed: dict[str, Tensor] = {}
    for name, spec in signature.inputs.items():
        if spec.shape[0] >= 0:
            fed[name] = tensors[name] if name in tensors else signature.kept[name]
            continue
        fed[name] = np.zeros((batch_of(count), *spec.shape[1:]), np.float32)
        fed[name][:count] = tensors[name][first : first + count]
    return {name: value[:count] for name, value in version.predict(fed).items()}
