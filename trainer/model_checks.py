"""Checks a custom ranker or tower on made-up rows, before anything is trained.

1. It can be built. Its weights are float32 and, built twice, have the same initial values. An engine and serving can
   provide a ranker's inputs and store its tables. A tower returns `[B, hidden[-1]]` float32.
2. The ranker, or the default one with the tower, returns finite scores of the right shapes, and a loss for each row.
   Its engagement matches its item_query, if it has one. Every variable that a loss depends on is one of its weights.
3. Scores depend on row and weights alone: nothing is remembered, the seed is used only in training, and a row alone
   has the same scores as in a batch.
4. It lowers to LiteRT's built-in operations, and LiteRT computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import ProgramError, SettingsError
from state.features.spec import FeatureSpec
from state.lowering import TOLERANCE, difference
from state.process.user_code import error_line
from state.rows.tables import CODES, TAKEN, is_name
from trainer.engine.build import EMBEDDINGS
from trainer.engine.graphs import ranker_of
from trainer.model.inputs import INPUTS, SEQUENCES, own_rows
from trainer.model.model import Preprocessing, Targets
from trainer.model.preprocessing import graph_of
from trainer.model.ranker import Ranker
from trainer.model.tower import load_builder, named, width_in
from trainer.versions.lowering import build
from trainer.versions.program import sample

ROWS, ALONE = 32, 4
SEEDS = ((0, 0), (3, 5))
SEEDED = "draw from the seed with tf.random.stateless_*"
CANDIDATES = {"recent": "L", "popular": "P", "successor": "S"}
F32 = npt.NDArray[np.float32]
Outputs = Mapping[str, Any]


def check_own(settings: Settings, spec: FeatureSpec, preprocessing: Preprocessing | None = None) -> str:
    """Checks the ranker that `model.ranker` names, or else the tower in the default one; returns a one-line description.

    Raises:
        SettingsError: There is no such builder, or two weights of a tower have the same name.
        ProgramError: The function fails a check; the message says what it did and what is required.
    """
    if settings.model.ranker == ModelSettings().ranker:
        label = f"model.tower {settings.model.tower!r}"
        described, own = _check_tower(
            settings.model, width_in(settings.model, spec, graph_of(preprocessing, spec.names)), label
        )
        ranker = ranker_of(settings, spec, preprocessing)
    else:
        label = f"model.ranker {settings.model.ranker!r}"
        ranker = ranker_of(settings, spec, preprocessing)
        _check_declared(ranker, spec, label)
        described = ", ".join(f"{name} [{width}]" for name, width in ranker.tables.items()) or "none"
        described, own = f"tables {described}", ranker.dense
    _check_weights(ranker.dense, ranker_of(settings, spec, preprocessing).dense, label)
    inputs = sample(ranker, ROWS, training=True)
    before = [variable.numpy() for variable in ranker.variables]
    plain = _scores(ranker, inputs, label)
    _check_item_query(ranker, inputs, label)
    _check_losses(ranker, inputs, _constants(spec, preprocessing), label)
    if any((_scores(ranker, inputs, label)[name] != plain[name]).any() for name in plain):
        raise ProgramError(f"{label}: the same rows gave two different scores", SEEDED)
    if any((_scores(ranker, inputs, label, SEEDS[1])[name] != plain[name]).any() for name in plain):
        raise ProgramError(f"{label}: without training its scores depend on the seed", "dropout is for training only")
    if any((now.numpy() != value).any() for now, value in zip(ranker.variables, before, strict=True)):
        raise ProgramError(
            f"{label} changed a variable while it was called: nothing is remembered between calls (no moving averages)"
        )
    _check_rows_apart(ranker, inputs, plain, label)
    build(ranker)
    weights = ", ".join(f"{name} {list(weight.shape)}" for name, weight in own.items())
    return f"{label}: {described}, weights {weights or 'none'}, lowers to LiteRT"


def _check_tower(settings: ModelSettings, width_in: int, label: str) -> tuple[str, Mapping[str, Any]]:
    """Checks that the tower can be built and called; returns its shapes, and its weights by name."""
    wanted = "wanted is build(width_in: int, settings) -> tf.Module with __call__(x, training, seed)"
    try:
        tower = load_builder(settings.tower)(width_in, settings)
    except SettingsError:
        raise
    except Exception as error:
        raise ProgramError(f"{label} raised {error_line(error)}", wanted) from error
    if not isinstance(tower, tf.Module) or not callable(tower):
        raise ProgramError(f"{label} returned {type(tower).__name__}", wanted)
    width, x = settings.hidden[-1], np.random.default_rng(7).normal(0.0, 1.0, (ROWS, width_in)).astype(np.float32)
    wanted = f"wanted is [B, {width}] float32, the last of model.hidden"
    for training in (False, True):
        output = _called(
            partial(tower, tf.constant(x), training, tf.constant(SEEDS[1], tf.int32)),
            f"{label}: called with x {list(x.shape)} and training={training} it",
            wanted,
        )
        if not isinstance(output, tf.Tensor):
            raise ProgramError(f"{label} gave {type(output).__name__} for {ROWS} rows", wanted)
        if output.dtype != tf.float32 or tuple(output.shape) != (ROWS, width):
            raise ProgramError(
                f"{label} gave shape {list(output.shape)} and type {output.dtype.name} for {ROWS} rows", wanted
            )
    return f"[B, {width_in}] to [B, {width}]", named(tower)


def _check_declared(ranker: Ranker, spec: FeatureSpec, label: str) -> None:
    for name in ("tables", "inputs", "sizes", "dense"):
        if not hasattr(ranker, name):
            raise ProgramError(f"{label} has no {name}", "set tables, inputs, sizes and dense in __init__")
    _check_tables(ranker, label)
    standard, names = {input_.name for input_ in (*INPUTS, *SEQUENCES)}, [input_.name for input_ in ranker.inputs]
    own = {input_.name for input_ in ranker.inputs if input_.ids and input_ in own_rows(input_.table, input_.ids)}
    for input_ in ranker.inputs:
        if input_.name in own and input_.table in TAKEN:
            raise ProgramError(
                f"{label} looks up {input_.table!r} by own_rows", "pick the inputs of a table that is not its own"
            )
    if unknown := set(names) - standard - own:
        listed = ", ".join(sorted(standard))
        raise ProgramError(
            f"{label} names the input {min(unknown)!r}",
            f"there are {listed}, and what own_rows gives of tables of its own",
        )
    if missing := [f"{kind}_mask" for kind in CANDIDATES if f"{kind}_mask" not in names]:
        raise ProgramError(
            f"{label} does not read {', '.join(missing)}", "serving needs the mask to know the candidates"
        )
    if any("sequence" in (input_.ids or input_.name) for input_ in ranker.inputs) and not spec.sequence:
        raise ProgramError(f"{label} reads the user's latest events", "set their number in features.sequence")
    for input_ in ranker.inputs:
        if input_.table and input_.table not in ranker.tables:
            raise ProgramError(
                f"{label} reads {input_.name} without the width of {input_.table} rows", "add it to tables"
            )


def _check_tables(ranker: Ranker, label: str) -> None:
    looked_up = {input_.table for input_ in ranker.inputs}
    codes: dict[int, str] = {}
    for name, width in ranker.tables.items():
        if not isinstance(width, int) or width < 1:
            raise ProgramError(f"{label}: rows of its table {name!r} have the width {width!r}", "give them 1 or more")
        if name in EMBEDDINGS:
            continue
        if name in TAKEN:
            raise ProgramError(f"{label} names a table of its own {name!r}, which is taken", "give it another name")
        if not is_name(name):
            raise ProgramError(
                f"{label} names a table of its own {name!r}",
                "use lower-case letters, digits and underscores, and start with a letter",
            )
        if name not in looked_up:
            raise ProgramError(
                f"{label}: no input looks up its table {name!r}",
                f"add own_rows({name!r}, ...), or remove it from tables",
            )
        if (twin := codes.setdefault(CODES[name], name)) != name:
            raise ProgramError(
                f"{label}: the keys of its tables {twin!r} and {name!r} would be equal", "rename one table"
            )
    for name, first in ranker.initial_ranges.items():
        if name not in ranker.tables or not 0.0 <= first < np.inf:
            raise ProgramError(
                f"{label}: initial_ranges has {first!r} for {name!r}", "use a number of 0 or more for a name in tables"
            )


def _check_weights(weights: Mapping[str, Any], twins: Mapping[str, Any], label: str) -> None:
    """Checks the weights of a ranker or tower against those of another one that was built in the same way."""
    for name, weight in weights.items():
        if weight.dtype != "float32":
            raise ProgramError(f"{label}: its weight {name} is {weight.dtype.name}", "weights are float32")
        if name not in twins or weight.shape != twins[name].shape:
            raise ProgramError(
                f"{label}: built twice it has other weights ({name})", "take no decision by chance or time"
            )
        if (weight.numpy() != twins[name].numpy()).any():
            raise ProgramError(
                f"{label}: built twice its weight {name} begins with other values",
                "draw first values from a fixed seed, such as np.random.default_rng(7)",
            )


def _called(call: Callable[[], Any], label: str, wanted: str) -> Any:
    try:
        return call()
    # A custom ranker may raise any exception.
    except Exception as error:
        # The trainer runs TensorFlow in a mode that refuses nondeterministic operations.
        if "determinism" in str(error):
            raise ProgramError(f"{label} draws at random", SEEDED) from error
        raise ProgramError(f"{label} raised {error_line(error)}", wanted) from error


def _scores(ranker: Ranker, inputs: Mapping[str, F32], label: str, seed: tuple[int, int] = SEEDS[0]) -> dict[str, F32]:
    """The outputs of `encode` and `score` without dropout; checks their names, shapes and values."""
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    rows = len(inputs["recent_mask"])
    wanted = {f"{kind}_logits": [rows, ranker.sizes[letter]] for kind, letter in CANDIDATES.items()}
    wanted |= {f"{name}_logit": [rows] for name in ("engagement", "other", "negative")}

    def call() -> Outputs:
        return ranker.score(ranker.encode(tensors, False, tf.constant(seed, tf.int32)), tensors)

    outputs: Outputs = _called(call, f"{label}: score", f"wanted are {', '.join(wanted)} and vector")
    if missing := [name for name in (*wanted, "vector") if name not in outputs]:
        raise ProgramError(f"{label}: score gave no {', '.join(missing)}")
    for name, shape in wanted.items():
        if list(outputs[name].shape) != shape or outputs[name].dtype != tf.float32:
            raise ProgramError(
                f"{label}: {name} is {list(outputs[name].shape)} {outputs[name].dtype.name} for {rows} rows",
                f"wanted is {shape} float32",
            )
    values = {name: tensor.numpy() for name, tensor in outputs.items()}
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ProgramError(f"{label}: {name} is not finite for some rows", "guard logarithms and divisions")
    return values


def _check_item_query(ranker: Ranker, inputs: Mapping[str, F32], label: str) -> None:
    """Checks that items and crosses change engagement as `Ranker.item_query` promises, if it is defined."""
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    query = _called(
        lambda: ranker.item_query(ranker.encode(tensors, False, tf.constant(SEEDS[0], tf.int32))),
        f"{label}: item_query",
        "wanted is [B, E] float32, or None",
    )
    if query is None:
        return
    if "item_row" not in inputs or list(query.shape) != list(inputs["item_row"].shape):
        raise ProgramError(f"{label}: item_query is {list(query.shape)}", "wanted is the shape of item_row")
    none = {name: np.zeros_like(inputs[name]) for name in ("item_row", "cross") if name in inputs}
    without = _scores(ranker, {**inputs, **none}, label)["engagement_logit"]
    wanted = without + (query.numpy() * inputs["item_row"]).sum(1) + inputs.get("cross", np.float32(0.0))
    error = difference(_scores(ranker, inputs, label)["engagement_logit"], wanted)
    if error > TOLERANCE:
        raise ProgramError(
            f"{label}: engagement_logit is not item_query . item_row + cross + the terms of user and category: off by {error:.2g}",
            "return None from item_query, or correct it",
        )


def _constants(spec: FeatureSpec, preprocessing: Preprocessing | None) -> tuple[Any, ...]:
    """The variables of a preprocessing: the bootstrap set them, and they are not learned."""
    with tf.GradientTape() as tape:
        if preprocessing is not None:
            preprocessing(tf.zeros([1, len(spec.names)]))
    return tuple(tape.watched_variables())


def _check_losses(ranker: Ranker, inputs: Mapping[str, F32], constants: Sequence[Any], label: str) -> None:
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    rows = len(inputs["recent_mask"])
    ones = tf.ones([rows])
    targets = Targets(tf.range(rows) % 4 - 1, ones, ones, ones * 0, ones, ones * 0, ones)
    with tf.GradientTape() as tape:
        loss = _called(
            lambda: ranker.losses(ranker.encode(tensors, True, tf.constant(SEEDS[1])), tensors, targets),
            f"{label}: losses",
            "wanted is [B] float32",
        )
    if list(loss.shape) != [rows] or loss.dtype != tf.float32:
        raise ProgramError(
            f"{label}: losses gave {list(loss.shape)} {loss.dtype.name} for {rows} rows", "wanted is [B] float32"
        )
    known = {id(variable) for variable in (*ranker.dense.values(), *constants)}
    if forgotten := [
        variable.name.removesuffix(":0") for variable in tape.watched_variables() if id(variable) not in known
    ]:
        raise ProgramError(
            f"{label}: its losses depend on the variable {forgotten[0]}, which is not in dense: it is never learned, and no "
            "version has it",
            "put it into dense, or make it with trainable=False where it is a constant",
        )
    slopes = tape.gradient(loss, list(ranker.dense.values()))
    for name, slope in zip(ranker.dense, slopes, strict=True):
        if slope is None:
            raise ProgramError(f"{label}: no loss depends on its weight {name}", "use it, or take it out of dense")
        if not np.isfinite(tf.convert_to_tensor(slope).numpy()).all():
            raise ProgramError(f"{label}: the derivative by {name} is not finite", "guard logarithms and divisions")


def _check_rows_apart(ranker: Ranker, inputs: Mapping[str, F32], plain: Mapping[str, F32], label: str) -> None:
    by_row = {input_.name for input_ in ranker.inputs if input_.shape.startswith("B")}
    for row in range(ALONE):
        single = {name: value[row : row + 1] if name in by_row else value for name, value in inputs.items()}
        for name, value in _scores(ranker, single, label).items():
            error = difference(value, plain[name][row : row + 1])
            if error > TOLERANCE:
                raise ProgramError(
                    f"{label}: {name} of row {row} is another alone than in a batch of {ROWS} (difference {error:.2g}, "
                    f"allowed {TOLERANCE:g})",
                    "score computes nothing over the rows of a batch, only losses may",
                )
