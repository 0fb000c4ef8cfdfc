"""Evaluates the model on named tensors and returns named tensors, independent of HTTP and gRPC.

A request uses the serving version, or any version that this host's rows still hold, by number or by
label. One version answers all rows of a request. A label refers to the version that the operator
assigned. Without one, `stable` is the version that answers and `previous` the one before it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from deploy.serving.answer import Answer, Query
from deploy.serving.host import Host
from deploy.serving.line import Line, QueueLimits
from deploy.serving.loaded_version import LoadedVersion, named
from deploy.serving.notes import CONTROL_NOTE
from deploy.serving.predictor import MOST_AT_ONCE
from deploy.serving.program import batch_of
from deploy.serving.signatures import BY_ID, CONTEXT, NOW, RAW, Signature, Tensor, Tensors, require, signatures_of
from state.errors import BadRequest, NotReady, UnknownModel
from state.metrics import WorkerMetrics
from state.rows.reader import RowReader, Served

STABLE, PREVIOUS, CANARY = "stable", "previous", "canary"
MODEL = "profile"
MOST_ROWS = 1000
VECTOR = frozenset(("vector",))
LATEST_MS = 253_402_300_799_000  # the end of the year 9999


def labels_of(reader: RowReader) -> dict[str, int]:
    """The version of each label, whether or not its rows are here.

    `stable` and `previous` are what answers and what answered before it where
    nobody set them.
    """
    control, served, before = reader.note(CONTROL_NOTE), reader.served(), reader.before()
    found = {} if served is None else {STABLE: served.version}
    if before is not None:
        found[PREVIOUS] = before
    return found | (json.loads(control).get("labels", {}) if control else {})


class ModelChoice(NamedTuple):
    """Which model is asked: the version that answers where neither number nor label is given."""

    name: str
    version: int | None = None
    label: str | None = None


class Prediction(NamedTuple):
    """What a version answered under a signature."""

    version: int
    signature: str
    outputs: dict[str, Tensor]


class TensorModel:
    """The model of one host; use it in one event loop.

    Args:
        host: What answers.
        metrics: Of the worker.
        limits: How long a request may wait.
    """

    def __init__(self, host: Host, metrics: WorkerMetrics, limits: QueueLimits) -> None:
        self._host, self._metrics, self._line = host, metrics, Line(limits)

    def versions(self, choice: ModelChoice) -> list[Served]:
        """The version that is requested; if none is named, all that are available, the serving one first.

        Raises:
            UnknownModel: There is no such model, version or label here.
            NotReady: There is no version yet.
        """
        with self._host.predictor().reading() as reader:
            number = resolve(reader, choice)
            served = reader.served()
            if served is None:
                raise NotReady("no version is here yet", "wait for the trainer's first version and for the applier")
            if number is None:
                return [served, *[one for one in reversed(reader.versions()) if one.version != served.version]]
            found = reader.version(number)
            if found is None:
                raise _unknown(reader, number)
            return [found]

    def signatures(self, choice: ModelChoice) -> tuple[int, dict[str, Signature]]:
        """The version that is asked for, and its signatures.

        Raises:
            UnknownModel, NotReady: As `versions`.
            SpringtideError: The version cannot be run.
        """
        predictor = self._host.predictor()
        with predictor.reading() as reader:
            version = predictor.take_up(reader, resolve(reader, choice))
            return version.served.version, signatures_of(version, predictor.context_fields)

    async def predict(
        self,
        choice: ModelChoice,
        signature: str,
        inputs: Callable[[Signature], Tensors],
        wanted: Collection[str] = (),
    ) -> Prediction:
        """Answers all rows from one version.

        Args:
            choice: Which model.
            signature: Its name; empty for `serving_default`.
            inputs: Reads the inputs, once it is known what they should be.
            wanted: Names of outputs; none for all.

        Raises:
            UnknownModel, NotReady: As `versions`.
            BadRequest: The signature is not there, or the inputs are not of its form.
            Overloaded, TookTooLong: More is asked than can be answered in time.
            SpringtideError: The version cannot be run.
        """
        predictor = self._host.predictor()
        with predictor.reading() as reader:
            version = predictor.take_up(reader, resolve(reader, choice))
            offered = signatures_of(version, predictor.context_fields)
            name = signature or BY_ID
            if name not in offered:
                raise BadRequest(f"there is no signature {name!r}", f"ask one of {', '.join(offered)}")
            given = inputs(offered[name])
            rows = require(offered[name], given)
            if rows > MOST_ROWS:
                raise BadRequest(f"the request asks for {rows} rows", f"ask for at most {MOST_ROWS} at once")
            if unknown := set(wanted) - offered[name].outputs.keys():
                raise BadRequest(f"there is no output {min(unknown)!r}", f"take {', '.join(offered[name].outputs)}")
            number, parts = version.served.version, []
            queries = [] if name == RAW else _queries(given, rows)
            with self._line.admit(len(range(0, rows, MOST_AT_ONCE))) as since_s:
                async for at in _pieces(rows):
                    self._line.look(since_s)
                    began_s = self._line.clock_s()
                    # Meanwhile others may have loaded the weights of another version.
                    if name == RAW:
                        parts.append(_run(predictor.take_up(reader, number), offered[name], given, at, rows))
                    else:
                        answers = predictor.profiles(queries[at : at + MOST_AT_ONCE], reader, number)
                        self._metrics.cold_starts.inc(sum(answer.cold_start for answer in answers))
                        parts.append(tensors_of(answers, offered[name]))
                    self._line.measure(self._line.clock_s() - began_s)
        outputs = {one: np.concatenate([part[one] for part in parts]) for one in wanted or offered[name].outputs}
        return Prediction(number, name, outputs)


def resolve(reader: RowReader, choice: ModelChoice) -> int | None:
    """The version of a choice; None for the serving one.

    Raises:
        UnknownModel: There is no such model or label.
    """
    if choice.name != MODEL:
        raise UnknownModel(f"there is no model {choice.name[:200]!r}", f"ask for {MODEL}")
    if choice.label is None:
        if choice.version is not None and choice.version < 0:
            raise _unknown(reader, choice.version)
        return choice.version
    labels = labels_of(reader)
    if choice.label not in labels:
        raise UnknownModel(f"there is no label {choice.label[:200]!r}", f"ask for one of {', '.join(sorted(labels))}")
    return labels[choice.label]


def _unknown(reader: RowReader, number: int) -> UnknownModel:
    return UnknownModel(f"version {number} is not here", f"ask for one of {named(reader)}")


async def _pieces(rows: int) -> AsyncIterator[int]:
    """Where each piece of a request begins; others are answered in between."""
    for at in range(0, rows, MOST_AT_ONCE):
        if at:
            await asyncio.sleep(0)
        yield at


def _queries(inputs: Tensors, rows: int) -> list[Query]:
    """The questions that rows by id ask.

    Raises:
        BadRequest: A string is not UTF-8, or a time is invalid.
    """
    texts = {name: _texts(name, values) for name, values in inputs.items() if name != "at"}
    times = inputs["at"].tolist() if "at" in inputs else [NOW] * rows
    for place, at in enumerate(times):
        if at != NOW and not 0 <= at <= LATEST_MS:
            raise BadRequest(
                f"row {place} of the input 'at' is {at}", f"give milliseconds since 1970, or {NOW} for now"
            )
    empty = [""] * rows
    contexts = {name.removeprefix(CONTEXT): values for name, values in texts.items() if name.startswith(CONTEXT)}
    return [
        Query(
            texts["user_id"][place],
            texts.get("item", empty)[place] or None,
            texts.get("category", empty)[place] or None,
            {name: values[place] for name, values in contexts.items() if values[place]},
            None if times[place] == NOW else times[place],
            VECTOR,
        )
        for place in range(rows)
    ]


def _texts(name: str, values: Tensor) -> list[str]:
    try:
        return [value.decode() for value in values.tolist()]
    except UnicodeDecodeError:
        raise BadRequest(f"the input {name!r} has a string that is no UTF-8", "encode it so") from None


def tensors_of(answers: Sequence[Answer], signature: Signature) -> dict[str, Tensor]:
    """The outputs by id; interests are padded with empty labels of probability 0."""
    rows, slots = len(answers), signature.outputs["interest_labels"].shape[1]
    labels, ids = (np.full((rows, slots), b"", np.object_) for _ in range(2))
    probabilities = np.zeros((rows, slots), np.float32)
    for place, answer in enumerate(answers):
        for slot, interest in enumerate(answer.interests):
            labels[place, slot] = interest["label"].encode()
            ids[place, slot] = interest["id"].encode()
            probabilities[place, slot] = interest["probability"]
    engagement = [np.nan if one.engagement is None else one.engagement["probability"] for one in answers]
    return {
        "interest_labels": labels,
        "interest_ids": ids,
        "interest_probabilities": probabilities,
        "engagement": np.array(engagement, np.float32),
        "vector": np.stack([one.vector for one in answers if one.vector is not None]),
        "known": np.array([one.known for one in answers]),
        "at": np.array([one.at_ms for one in answers], np.int64),
    }


def _run(version: LoadedVersion, signature: Signature, given: Tensors, at: int, rows: int) -> dict[str, Tensor]:
    """What the program answers for one part of the raw rows."""
    here = min(MOST_AT_ONCE, rows - at)
    fed: dict[str, Tensor] = {}
    for name, spec in signature.inputs.items():
        if spec.shape[0] >= 0:
            fed[name] = given[name] if name in given else signature.kept[name]
            continue
        fed[name] = np.zeros((batch_of(here), *spec.shape[1:]), np.float32)
        fed[name][:here] = given[name][at : at + here]
    return {name: value[:here] for name, value in version.program.predict(fed).items()}
