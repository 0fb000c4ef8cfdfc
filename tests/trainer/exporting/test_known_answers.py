"""A SavedModel that knows users by id answers what serving answered, and refuses what it cannot know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from deploy.serving.answers import known_answers
from deploy.serving.answers.query import Query
from deploy.serving.answers.tensor_model import BY_ID, VECTOR, signatures_of, tensors_of
from state.errors import SettingsError
from tests.deploy.serving.conftest import lowered as lowered
from tests.deploy.serving.conftest import stores as stores
from tests.deploy.serving.stocked import NOW_MS, Stores, predictor
from trainer.exporting import saved_model
from trainer.exporting.saved_model import KnownAnswers

KEPT = {"popular_rows": np.zeros((4, 8), np.float32)}


def test_named_users_are_answered_as_serving_answers(stores: Stores, tmp_path: Path) -> None:
    """Under the same signature; everybody else as a user of whom nothing is known."""
    answers, users = predictor(stores), ["ann", "bob"]
    known = KnownAnswers(known_answers.answers(answers, 1, users, ["i1", "i2"]))
    assert (known.users, known.items, known.at_ms) == (2, 2, NOW_MS)
    path = saved_model.publish(saved_model.write(tmp_path, 1, stores.lowered.model, KEPT, known), 1)
    loaded = tf.saved_model.load(str(path))
    assert set(loaded.signatures) == {"raw", "serving_default"}
    by_id = loaded.signatures["serving_default"]
    with answers.reading() as reader:
        offered = signatures_of(answers.load_version(reader), ())[BY_ID]
    kinds = {"O": tf.string, "<i8": tf.int64, "<f4": tf.float32, "|b1": tf.bool}
    for ours, theirs in (
        (by_id.structured_input_signature[1], offered.inputs),
        (by_id.structured_outputs, offered.outputs),
    ):
        assert {name: (one.dtype, len(one.shape)) for name, one in ours.items()} == {
            name: (kinds[one.dtype], len(one.shape)) for name, one in theirs.items()
        }
    asked = ["ann", "stranger", "bob"]
    items = ["i1", "", "i2"]
    given = {"user_id": asked, "item": items, "category": [""], "at": [-1]}
    found = by_id(
        **{name: tf.constant(value, tf.int64 if name == "at" else tf.string) for name, value in given.items()}
    )
    queries = [Query(user, item or None, at_ms=NOW_MS, fields=VECTOR) for user, item in zip(asked, items, strict=True)]
    wanted = tensors_of(answers.profiles(queries), offered)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5, atol=1e-6)
        else:
            assert found[name].numpy().tolist() == value.tolist(), name
    assert from_graph(path, given)["interest_labels"].tolist() == wanted["interest_labels"].tolist()
    for name, wrong, what in (
        ("item", "i9", "items"),
        ("category", "hats", "own category"),
        ("at", 5, "for 1800000000000 ms only"),
    ):
        odd = {"user_id": ["ann"], "item": [""], "category": [""], "at": [-1]} | {name: [wrong]}
        with pytest.raises(tf.errors.InvalidArgumentError, match=what):
            by_id(**{one: tf.constant(value, tf.int64 if one == "at" else tf.string) for one, value in odd.items()})


def from_graph(path: Path, given: dict[str, list[object]]) -> dict[str, np.ndarray]:
    """What the graph and its signature alone answer: so TensorFlow Serving loads it, which knows no Python."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        (meta,) = [tf.compat.v1.saved_model.load(session, ["serve"], str(path))]
        signature = meta.signature_def["serving_default"]
        fed = {signature.inputs[name].name: value for name, value in given.items()}
        found: dict[str, np.ndarray] = session.run(
            {name: one.name for name, one in signature.outputs.items()}, feed_dict=fed
        )
    return found


def test_a_host_writes_the_answers_in_a_process_of_its_own(
    stores: Stores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each user once; too many pairs, and a version that is not here, are refused."""
    users, to = tmp_path / "users", tmp_path / "answers.npz"
    users.write_text("ann\n\nann\n bob\n")
    stores.close()
    words = [
        "--users",
        str(users),
        "--to",
        str(to),
        "--paths.state",
        stores.settings.paths.state,
    ]
    words += [word for name in ("dim", "hidden", "popular") for word in (f"--model.{name}", _text(stores, name))]
    assert known_answers.main([*words, "--version", "1"]) == 0, capsys.readouterr().err
    made = KnownAnswers(to.read_bytes())
    assert (made.users, made.items) == (2, 0)
    assert known_answers.main([*words, "--version", "7"]) != 0
    assert "version 7 is not here" in capsys.readouterr().err


def _text(stores: Stores, name: str) -> str:
    value = getattr(stores.settings.model, name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_too_many_pairs_are_refused(stores: Stores) -> None:
    with pytest.raises(SettingsError, match="more than"):
        known_answers.answers(predictor(stores), 1, ["a"] * 2000, ["b"] * 1000)
